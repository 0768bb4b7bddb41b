"""AdamW with its moments sharded over the processes by DeepSpeed (ZeRO, arXiv 1910.02054, stages 1 and 2)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from evollm.distributed.zero_config import import_deepspeed
from evollm.errors import ConfigurationError
from evollm.processes import Processes

_STEP = "step"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW(torch.optim.AdamW):
    """AdamW; each process holds the moments of its shard of the parameters.

    All processes use it in the same way as `torch.optim.AdamW`. Gradients must be those of the whole batch, already
    summed over the processes and clipped. `state_dict` has AdamW's own layout, for any number of processes.

    DeepSpeed's optimizer is used without DeepSpeed's engine, which clips gradients to 1 by default and stays in memory
    after `destroy`. DeepSpeed sets hooks on the parameter that it is given, so it is given a twin of the parameter in
    the same memory: no hook runs in the backward pass through the base.

    Args:
        parameter: (P,) the parameter to update, in float32.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        stage: 1 shards the moments, 2 also the gradients that DeepSpeed holds.

    Attributes:
        memory: (P,) the parameter's values in DeepSpeed's memory, where the parameter has to be from now on.

    Raises:
        ConfigurationError: The parameter is not in float32.
        MissingExtraError: DeepSpeed is not installed.
    """

    def __init__(self, parameter: nn.Parameter, lr: float, weight_decay: float, stage: int) -> None:
        if parameter.dtype != torch.float32:
            fix = "DeepSpeed keeps its shards in float32: use a base of at most float32, or plain data parallelism"
            raise ConfigurationError("adapter dtype", parameter.dtype, fix)
        super().__init__([parameter], lr=lr, weight_decay=weight_decay)
        self._parameter = parameter
        self._twin = nn.Parameter(parameter.detach())
        # With parameter groups of its own, since DeepSpeed puts its shard in place of the parameters there.
        inner = torch.optim.AdamW([self._twin], lr=lr, weight_decay=weight_decay)
        self._zero = _zero_optimizer(inner, [self._twin], stage)
        self.memory = self._twin.data
        # DeepSpeed's hooks and the twin form a reference cycle that the garbage collector cannot see.
        self._destroy = weakref.finalize(self, self._zero.destroy)
        self._destroy.atexit = False

    @property
    def sharded(self) -> torch.optim.Optimizer:
        """The optimizer of this process's shard."""
        return cast(torch.optim.Optimizer, self._zero.optimizer)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters with their gradients, which must be equal in all processes."""
        assert closure is None, "gradients are computed by evollm"
        for mine, shard in zip(self.param_groups, self.sharded.param_groups, strict=True):
            shard["lr"] = mine["lr"]
        # The parameters may have been overwritten since the last step, by loading an adapter for example.
        self._zero.refresh_fp32_params()
        assert self._parameter.grad is not None
        # DeepSpeed takes gradients from a backward pass only: this one gives the twin the parameter's gradient. The
        # average that DeepSpeed takes over the processes changes nothing, since their gradients are equal.
        (self._twin * self._parameter.grad).sum().backward()
        if self._zero.partition_gradients:
            self._zero.overlapping_partition_gradients_reduce_epilogue()
        else:
            self._zero.reduce_gradients()
        self._zero.step()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, with the moments gathered from all processes; all of them must call this."""
        shard = self.sharded.state.get(self._shard, {})
        if _STEP in shard:
            # For as long as the state is copied from there.
            self.state[self._parameter] = {
                _STEP: shard[_STEP],
                **{name: self._gather(shard[name]) for name in _MOMENTS},
            }
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this process's shard from a state of AdamW."""
        # torch checks and casts the state; the whole moments are deleted again below.
        super().load_state_dict(state_dict)
        whole = self.state.pop(self._parameter, None)
        self.sharded.state.clear()
        if not whole:
            return
        shard: dict[str, Tensor] = {_STEP: whole[_STEP].clone()}
        for name in _MOMENTS:
            shard[name] = torch.zeros_like(self._shard)
            for in_shard, in_twin in _overlap(self._twin):
                shard[name][in_shard] = whole[name][in_twin]
        self.sharded.state[self._shard] = shard

    def close(self) -> None:
        """Free the shards; the optimizer cannot be used afterwards."""
        self.state.clear()
        self.sharded.state.clear()
        self._destroy()
        del self._twin, self.memory

    @property
    def _shard(self) -> Tensor:
        """(n,) this process's shard of all parameters."""
        return cast(Tensor, self.sharded.param_groups[0]["params"][0])

    def _gather(self, shard: Tensor) -> Tensor:
        """(P,) the whole, from the shards of all processes."""
        whole = torch.zeros(self._twin.numel(), dtype=shard.dtype, device=shard.device)
        for in_shard, in_twin in _overlap(self._twin):
            whole[in_twin] = shard[in_shard]
        Processes.present().add_up(whole)
        return whole


def _overlap(twin: Any) -> list[tuple[slice, slice]]:
    """Slices of this process's shard and of a parameter that hold the same elements; empty if there are none."""
    mapping = twin._hp_mapping
    if mapping is None:
        return []
    shard, parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    return [
        (slice(shard.start, shard.start + shard.numel), slice(parameter.start, parameter.start + parameter.numel)),
    ]


def _zero_optimizer(inner: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], stage: int) -> Any:
    """DeepSpeed's optimizer of stage 1 or 2 around another one."""
    deepspeed = import_deepspeed()
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: PLC0415
    from deepspeed.utils.timer import NoopTimer  # noqa: PLC0415

    return DeepSpeedZeroOptimizer(
        inner,
        {parameter: str(number) for number, parameter in enumerate(parameters)},
        NoopTimer(),
        None,
        verbose=False,
        # DeepSpeed allocates a buffer of this many gradients.
        reduce_bucket_size=sum(parameter.numel() for parameter in parameters),
        dp_process_group=deepspeed.comm.get_world_group(),
        clip_grad=0.0,
        communication_data_type=torch.float32,
        partition_grads=stage > 1,
        # Gradients have been checked before: a diverged agent makes no step.
        check_grad_overflow=False,
        compute_grad_norm=False,
    )
