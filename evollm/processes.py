"""Processes that compute together: collective operations, and checks of the launch.

In data parallelism every process has the base, all adapters and all optimizers, unless DeepSpeed or FSDP shards them,
and gets the same batches. It computes a share of the pairs; log-probs and gradients are all-reduced, and all later
computations are the same in each process. The traffic is small: nearly all of it is one all-reduce of an adapter's
gradients for each agent and step. A sharded base adds the gathering of each layer for each pass. Where processes have
members of their own instead (`evollm.execution.members`), a worker computes inside `Processes.bound`: as one process,
or as the processes of a group, which divide the batches of their members.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evollm.errors import ConfigurationError

_LAUNCH = (
    "launch with `torchrun --nproc_per_node N script.py`, and make agents and gym with accelerator=Accelerator(), "
    'on a CPU Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])'
)
_LAUNCH_DEEPSPEED = (
    "launch with `torchrun --nproc_per_node N script.py`, one process too, and make agents and gym with "
    "accelerator=Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=...)), with DS_ACCELERATOR=cpu on a CPU, "
    'without cpu=True and with kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]'
)

# The types that accelerate gives processes on a CPU, whatever plugin it was given.
_OF_CPU = ("MULTI_CPU", "NO")


@dataclass(frozen=True)
class Processes:
    """The rank of this process among processes that compute together, and their number.

    Attributes:
        rank: The rank, from 0.
        size: The number of processes.
        group: The process group of torch.distributed; None: all launched processes.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, compare=False)

    @classmethod
    def present(cls) -> Processes:
        """Return those that `bound` names, else all of torch.distributed; one process if it is not initialised."""
        return _BOUND[-1] if _BOUND else cls.launched()

    @classmethod
    def launched(cls) -> Processes:
        """Return all processes of torch.distributed; one process if it is not initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def in_groups(self, size: int) -> Processes:
        """The group of this process, of groups of consecutive ranks; each of all launched processes must call this.

        The groups of a size are made once, since each holds connections.

        Args:
            size: Processes in a group, a divisor of all.
        """
        if size == 1:
            return Processes()
        if size == self.size:
            return self
        every = dist.group.WORLD
        assert every is not None
        key = every, size
        if key not in _GROUPS:
            # With the timeout that the user gave all processes, not that of the backend.
            timeout: timedelta = every._get_backend(self._device).options._timeout
            group, _ = dist.new_subgroups(size, timeout=timeout)
            _GROUPS[key] = Processes(self.rank % size, size, group)
        return _GROUPS[key]

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Inside the block these are the present processes of this process; `Processes().bound()`: it is by itself."""
        _BOUND.append(self)
        try:
            yield
        finally:
            _BOUND.pop()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, count: int) -> list[int]:
        """The positions, of `count` rows, that this process computes."""
        return list(range(self.rank, count, self.size))

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, with the same bits in each."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)

    def smallest(self, value: int) -> int:
        """The smallest of the processes' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=self._device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.group)
        return int(tensor)

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        return -self.smallest(-value)

    def from_main(self, value: Any) -> Any:
        """Return the main process's value, which must consist of JSON values."""
        if self.size == 1:
            return value
        # As JSON, not as a pickle, which could run code.
        return json.loads(self._sent(json.dumps(value).encode(), 0))

    def of_all(self, data: bytes) -> list[bytes]:
        """Return what each process passes, in the order of the ranks; each is sent to all, an empty one to none."""
        if self.size == 1:
            return [data]
        return [self._sent(data, rank, length) for rank, length in enumerate(self._lengths(data))]

    def for_main(self, data: bytes) -> list[bytes]:
        """Return in the main process what each process passes, in the order of the ranks; [] in the others."""
        if self.size == 1:
            return [data]
        lengths = self._lengths(data)
        if not self.is_main:
            if data:
                part = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
                dist.send(part, dst=self._source(0), group=self.group)
            return []
        found = [data]
        for rank, length in enumerate(lengths[1:], start=1):
            part = torch.empty(length, dtype=torch.uint8, device=self._device)
            if length:
                dist.recv(part, src=self._source(rank), group=self.group)
            found.append(part.cpu().numpy().tobytes())
        return found

    def _lengths(self, data: bytes) -> list[int]:
        """The number of bytes of each process, in the order of the ranks."""
        lengths = torch.zeros(self.size, dtype=torch.int64, device=self._device)
        lengths[self.rank] = len(data)
        dist.all_reduce(lengths, group=self.group)
        return lengths.tolist()

    def _sent(self, data: bytes, rank: int, length: int | None = None) -> bytes:
        """The bytes of the process with this rank; `length`: their number, None: the others are told first."""
        if length is None:
            told = torch.tensor(len(data), device=self._device)
            dist.broadcast(told, src=self._source(rank), group=self.group)
            length = int(told)
        if length == 0:
            return b""
        own = rank == self.rank
        part = torch.frombuffer(bytearray(data if own else length), dtype=torch.uint8).to(self._device)
        dist.broadcast(part, src=self._source(rank), group=self.group)
        return data if own else part.cpu().numpy().tobytes()

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def _source(self, rank: int) -> int:
        """The rank among all launched processes."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    @property
    def _device(self) -> torch.device:
        """The device of the tensors that processes exchange."""
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")


# The innermost block of `bound` counts.
_BOUND: list[Processes] = []
# The group of this process by the process group of all and the number of processes in a group.
_GROUPS: dict[tuple[Any, int], Processes] = {}


def has_own_members() -> bool:
    """Whether this process computes inside `Processes.bound`, with members that other processes do not have."""
    return bool(_BOUND)


def launch_store(prefix: str) -> Any:
    """The launcher's store of connected processes, which works while some have failed; keys begin with a prefix."""
    # Not exported, and the only store that is still there when the main process has ended.
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store  # noqa: PLC0415

    return PrefixStore(prefix, _get_default_store())


def uses_deepspeed(accelerator: Any) -> bool:
    """Whether an accelerator uses DeepSpeed."""
    return _kind(accelerator) == "DEEPSPEED"


def uses_fsdp(accelerator: Any) -> bool:
    """Whether an accelerator was made for FSDP; on a CPU accelerate notes that in the environment alone."""
    kind = _kind(accelerator)
    return kind == "FSDP" or (accelerator is not None and kind in _OF_CPU and _asked_for("ACCELERATE_USE_FSDP"))


def check_processes(accelerator: Any) -> Processes:
    """Check that the launched processes are connected, and that accelerate runs what was configured.

    Args:
        accelerator: An `accelerate.Accelerator` or None.

    Returns:
        The processes.

    Raises:
        ConfigurationError: `accelerator` is not an accelerator, uses something else than data parallelism,
            DeepSpeed or FSDP, or has another number of processes than were launched.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ:
        # `accelerate launch --cpu --num_processes 2` sets MASTER_PORT, but starts one process.
        fix = f"`accelerate launch --cpu` starts one process, whatever its --num_processes: {_LAUNCH}"
        raise ConfigurationError("accelerator", accelerator and "Accelerator(...)", fix)
    if accelerator is None:
        if launched > 1 and Processes.launched().size == 1:
            raise ConfigurationError("accelerator", None, f"{launched} processes were launched: {_LAUNCH}")
        return Processes.launched()
    known = getattr(accelerator, "num_processes", None)
    if known is None:
        raise ConfigurationError("accelerator", accelerator, "must be an accelerate.Accelerator or None")
    _check_kind(_kind(accelerator))
    present = Processes.launched()
    if known != present.size or launched != present.size:
        launch = _LAUNCH_DEEPSPEED if uses_deepspeed(accelerator) else _LAUNCH
        fix = (
            f"{launched} processes were launched and {present.size} are connected, so each would train alone: {launch}"
        )
        raise ConfigurationError("accelerator.num_processes", known, fix)
    return present


def _kind(accelerator: Any) -> str:
    """The name of accelerate's distributed type, `NO` for none."""
    return str(getattr(getattr(accelerator, "distributed_type", None), "value", "NO"))


def _check_kind(kind: str) -> None:
    """Refuse unsupported types, and settings that accelerate ignores without an error."""
    field = "accelerator.distributed_type"
    if kind in ("MEGATRON_LM", "TP"):
        fix = f"is not supported: use plain data parallelism, or DeepSpeed's ZeRO or FSDP2 to shard; {_LAUNCH}"
        raise ConfigurationError(field, kind, fix)
    if _asked_for("ACCELERATE_USE_FSDP") and kind not in ("FSDP", *_OF_CPU):
        raise ConfigurationError(field, kind, f"FSDP was asked for and is not used; {_LAUNCH}")
    if _asked_for("ACCELERATE_USE_DEEPSPEED") and kind != "DEEPSPEED":
        fix = f"DeepSpeed was asked for and is not used, which is what Accelerator(cpu=True) does: {_LAUNCH_DEEPSPEED}"
        raise ConfigurationError(field, kind, fix)


def _asked_for(variable: str) -> bool:
    """Whether accelerate's plugins or its launcher have set an environment variable to true."""
    return os.environ.get(variable, "false").lower() == "true"
