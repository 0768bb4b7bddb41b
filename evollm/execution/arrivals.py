"""Whether the processes of a group have come through a call, one of which may have failed while others wait for it."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any

# Seconds in which a group's other processes may come through a call that has failed in one of them.
PATIENCE = 10


class Arrivals:
    """The calls that the processes of a group have come through, told by a store.

    A process that fails between two collective operations of its group leaves the others waiting in the next one, from
    which nothing frees them. Who fails must know that, or would wait itself, for all to hear of its error.

    Args:
        store: A store of torch.distributed, of these processes alone.
        rank: The rank of this process in its group.
        size: The number of processes in it.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._calls = 0

    def note(self, *, failed: bool) -> bool:
        """Tell that this process has come through its next call, or failed in it; all make the same calls.

        Returns:
            False if this process has failed and others are still in the call after `PATIENCE` seconds.
        """
        if self._size == 1:
            return True
        # Nobody waits for an earlier call: all were through it before they began this one.
        self._store.delete_key(self._key(self._rank))
        self._calls += 1
        self._store.set(self._key(self._rank), "")
        if not failed:
            return True
        with suppress(RuntimeError):  # dist.DistStoreError, of a wait that has lasted too long.
            self._store.wait([self._key(rank) for rank in range(self._size)], timedelta(seconds=PATIENCE))
            return True
        return False

    def _key(self, rank: int) -> str:
        return f"{rank} {self._calls}"
