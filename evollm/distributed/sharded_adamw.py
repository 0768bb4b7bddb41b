"""AdamW whose moments are spread over the processes by DeepSpeed (ZeRO, arXiv 1910.02054, stages 1 and 2)."""

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
    """AdamW without weight decay, of which each process holds the moments of its share of the parameters.

    It is used as `torch.optim.AdamW` is, in all processes alike: gradients are those of the whole batch, already summed
    and clipped, and `state_dict` has AdamW's own layout, whatever the number of processes.

    DeepSpeed's optimizer is used without its engine: the engine clips gradients to 1 unless told otherwise, and stays
    in memory after `destroy`. It keeps hooks on the parameters that it is given, so it gets parameters of its own,
    which lie in the same memory; the backward pass through the base knows nothing of it.

    Args:
        parameters: What it updates, in float32; they are moved into one block of memory.
        lr: Learning rate.
        stage: 1 spreads moments, 2 the gradients that DeepSpeed holds too.

    Raises:
        ConfigurationError: A parameter is not in float32.
        MissingExtraError: DeepSpeed is not installed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, stage: int) -> None:
        other = next((parameter.dtype for parameter in parameters if parameter.dtype != torch.float32), None)
        if other is not None:
            fix = "DeepSpeed keeps its shards in float32: use a base of at most float32, or plain data parallelism"
            raise ConfigurationError("adapter dtype", other, fix)
        super().__init__(parameters, lr=lr, weight_decay=0.0)
        self._twins = [nn.Parameter(parameter.detach()) for parameter in parameters]
        # Its own group of settings, since DeepSpeed replaces the parameters in it by its shard.
        inner = torch.optim.AdamW(self._twins, lr=lr, weight_decay=0.0)
        self._zero = _zero_optimizer(inner, self._twins, stage)
        for parameter, twin in zip(parameters, self._twins, strict=True):
            # DeepSpeed has moved the twins into its block.
            parameter.data = twin.data
        # Its hooks form a cycle with the twins that the garbage collector cannot see.
        self._destroy = weakref.finalize(self, self._zero.destroy)
        self._destroy.atexit = False

    @property
    def sharded(self) -> torch.optim.Optimizer:
        """The optimizer of this process's share."""
        return cast(torch.optim.Optimizer, self._zero.optimizer)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters by their gradients, which are the same in all processes."""
        assert closure is None, "gradients are computed by evollm"
        for mine, shard in zip(self.param_groups, self.sharded.param_groups, strict=True):
            shard["lr"] = mine["lr"]
        # Whatever has been written into the parameters since, by loading an adapter for example.
        self._zero.refresh_fp32_params()
        gradients = [parameter.grad for parameter in self.param_groups[0]["params"]]
        # DeepSpeed takes gradients from a backward pass, and averages over the processes what is equal in all of them.
        products = [(twin * grad).sum() for twin, grad in zip(self._twins, gradients, strict=True) if grad is not None]
        torch.stack(products).sum().backward()
        if self._zero.partition_gradients:
            self._zero.overlapping_partition_gradients_reduce_epilogue()
        else:
            self._zero.reduce_gradients()
        self._zero.step()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state with whole moments; all processes must call it."""
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
        """Take the own share out of a state as AdamW writes it."""
        # Checks and casts it as AdamW would; the whole moments live no longer than this call.
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
        """(n,) this process's share of all parameters."""
        return cast(Tensor, self.sharded.param_groups[0]["params"][0])

    def _gather(self, shard: Tensor) -> list[Tensor]:
        """What the shards of all processes are for each parameter."""
        whole = [torch.zeros(twin.numel(), dtype=shard.dtype, device=shard.device) for twin in self._twins]
        for twin, values in zip(self._twins, whole, strict=True):
            for in_shard, in_twin in _overlap(twin):
                values[in_twin] = shard[in_shard]
        block = torch.cat(whole)
        Processes.present().add_up(block)
        parts = block.split([twin.numel() for twin in self._twins])
        return [part.clone().view_as(twin) for part, twin in zip(parts, self._twins, strict=True)]


def _overlap(twin: Any) -> list[tuple[slice, slice]]:
    """Where a parameter and this process's shard meet, in the shard and in the parameter; empty: nowhere."""
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
        # Gradients are collected in a buffer of this many values, which is allocated whole.
        reduce_bucket_size=sum(parameter.numel() for parameter in parameters),
        dp_process_group=deepspeed.comm.get_world_group(),
        clip_grad=0.0,
        communication_data_type=torch.float32,
        partition_grads=stage > 1,
        # A diverged agent makes no step: nothing that gets here has to be looked at again.
        check_grad_overflow=False,
        compute_grad_norm=False,
    )
