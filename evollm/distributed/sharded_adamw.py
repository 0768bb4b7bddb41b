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
    after `destroy`. DeepSpeed sets hooks on the parameters that it is given, so it is given twins of the parameters in
    the same memory: no hook runs in the backward pass through the base.

    Args:
        parameters: The parameters to update, in float32; they are moved into one block of memory.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        stage: 1 shards the moments, 2 also the gradients that DeepSpeed holds.

    Raises:
        ConfigurationError: A parameter is not in float32.
        MissingExtraError: DeepSpeed is not installed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float, stage: int) -> None:
        other = next((parameter.dtype for parameter in parameters if parameter.dtype != torch.float32), None)
        if other is not None:
            fix = "DeepSpeed keeps its shards in float32: use a base of at most float32, or plain data parallelism"
            raise ConfigurationError("adapter dtype", other, fix)
        super().__init__(parameters, lr=lr, weight_decay=weight_decay)
        self._twins = [nn.Parameter(parameter.detach()) for parameter in parameters]
        # With parameter groups of its own, since DeepSpeed puts its shard in place of the parameters there.
        inner = torch.optim.AdamW(self._twins, lr=lr, weight_decay=weight_decay)
        self._zero = _zero_optimizer(inner, self._twins, stage)
        for parameter, twin in zip(parameters, self._twins, strict=True):
            # DeepSpeed has moved the twins into one block of memory.
            parameter.data = twin.data
        # DeepSpeed's hooks and the twins form a reference cycle that the garbage collector cannot see.
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
        gradients = [parameter.grad for parameter in self.param_groups[0]["params"]]
        # DeepSpeed takes gradients from a backward pass only: this one gives each twin its parameter's gradient. The
        # average that DeepSpeed takes over the processes changes nothing, since their gradients are equal.
        products = [(twin * grad).sum() for twin, grad in zip(self._twins, gradients, strict=True) if grad is not None]
        torch.stack(products).sum().backward()
        if self._zero.partition_gradients:
            self._zero.overlapping_partition_gradients_reduce_epilogue()
        else:
            self._zero.reduce_gradients()
        self._zero.step()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, with the moments gathered from all processes; all of them must call this."""
        state = super().state_dict()
        shard = self.sharded.state.get(self._shard, {})
        if _STEP not in shard:
            return state
        whole = {name: self._gather(shard[name]) for name in _MOMENTS}
        state["state"] = {
            number: {_STEP: shard[_STEP].clone(), **{name: whole[name][number] for name in _MOMENTS}}
            for number in range(len(self._twins))
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this process's shard from a state of AdamW."""
        # torch checks and casts the state; the whole moments are deleted again below.
        super().load_state_dict(state_dict)
        whole = [self.state[parameter] for parameter in self.param_groups[0]["params"]]
        self.state.clear()
        self.sharded.state.clear()
        if not all(whole):
            return
        shard: dict[str, Tensor] = {_STEP: whole[0][_STEP].clone()}
        for name in _MOMENTS:
            shard[name] = torch.zeros_like(self._shard)
            for twin, moments in zip(self._twins, whole, strict=True):
                for in_shard, in_twin in _overlap(twin):
                    shard[name][in_shard] = moments[name].flatten()[in_twin]
        self.sharded.state[self._shard] = shard

    def close(self) -> None:
        """Free the shards; the optimizer cannot be used afterwards."""
        self.state.clear()
        self.sharded.state.clear()
        self._destroy()
        self._twins.clear()

    @property
    def _shard(self) -> Tensor:
        """(n,) this process's shard of all parameters."""
        return cast(Tensor, self.sharded.param_groups[0]["params"][0])

    def _gather(self, shard: Tensor) -> list[Tensor]:
        """The value of each parameter, from the shards of all processes."""
        whole = [torch.zeros(twin.numel(), dtype=shard.dtype, device=shard.device) for twin in self._twins]
        for twin, values in zip(self._twins, whole, strict=True):
            for in_shard, in_twin in _overlap(twin):
                values[in_twin] = shard[in_shard]
        block = torch.cat(whole)
        Processes.present().add_up(block)
        parts = block.split([twin.numel() for twin in self._twins])
        return [part.clone().view_as(twin) for part, twin in zip(parts, self._twins, strict=True)]


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
