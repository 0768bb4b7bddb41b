"""Data parallelism over processes: collective operations, and checks of the launch.

Every process has the base, all adapters and all optimizers, unless DeepSpeed or FSDP shards them, and gets the same
batches. It computes a share of the pairs; log-probs and gradients are all-reduced, and all later computations are the
same in each process. The traffic is small: nearly all of it is one all-reduce of an adapter's gradients for each agent
and step. A sharded base adds the gathering of each layer for each pass.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
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
    """The rank of this process, and the number of processes.

    Attributes:
        rank: The rank, from 0.
        size: The world size.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def present(cls) -> Processes:
        """Return the rank and the world size of torch.distributed; one process if it is not initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

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
            dist.all_reduce(tensor)

    def smallest(self, value: int) -> int:
        """The smallest of the processes' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, device=_device())
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        return -self.smallest(-value)

    def from_main(self, value: Any) -> Any:
        """Return the main process's value, which must consist of JSON values."""
        if self.size == 1:
            return value
        # As JSON, not as a pickle, which could run code.
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=_device())
        length = torch.tensor(len(data), device=_device())
        dist.broadcast(length, src=0)
        if not self.is_main:
            data = torch.empty(int(length), dtype=torch.uint8, device=_device())
        dist.broadcast(data, src=0)
        return json.loads(bytes(data.tolist()))

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        if self.size > 1:
            dist.barrier()


def _device() -> torch.device:
    """The device of the tensors that processes exchange."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


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
        if launched > 1 and Processes.present().size == 1:
            raise ConfigurationError("accelerator", None, f"{launched} processes were launched: {_LAUNCH}")
        return Processes.present()
    known = getattr(accelerator, "num_processes", None)
    if known is None:
        raise ConfigurationError("accelerator", accelerator, "must be an accelerate.Accelerator or None")
    _check_kind(_kind(accelerator))
    present = Processes.present()
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
