"""Shares in adapters that come back to the base when their owner is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evollm.models.shared_base import SharedBase


class AdapterShares(dict[str, "str | None"]):
    """The adapters that an owner has a share in, by role; None: the base without adapter.

    Put a share in as soon as it is taken (`add_adapter`, `copy_adapter`, `frozen_adapter`, `retain`). An owner that is
    done calls `release`. One that is dropped need not: the base learns which shares have lost their owner, and takes
    them back before it adds an adapter or begins a pass.

    Args:
        base: The base that the adapters are on.
    """

    def __init__(self, base: SharedBase) -> None:
        super().__init__()
        self._base = base
        self._handed_out = False

    def hand_out(self) -> None:
        """Somebody else has been given the model with these adapters: only `release` gives the shares back now."""
        self._handed_out = True

    def release(self) -> None:
        """Give all shares back."""
        while self:
            name = self.pop(next(iter(self)))
            if name is not None:
                self._base.release(name)

    def __del__(self) -> None:
        # The collector runs at any moment, in any thread, in the middle of a pass too: no adapter may be touched here.
        if not self._handed_out:
            self._base.lost_shares.extend(name for name in self.values() if name is not None)
