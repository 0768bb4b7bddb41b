"""The optimizers of agents, by their names in transformers' `OptimizerNames`, and the parameter groups of LoRA+."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from evollm.algorithms.row_optimizer import RowOptimizer, check_types, on_rows, places_of
from evollm.checks import finite_number, nearest_name, positive_number
from evollm.errors import ConfigurationError, MissingExtraError, brief
from evollm.models.adapters.rows import KINDS, Row, kind_of_parameters
from evollm.processes import uses_deepspeed

# Shape of a tensor in an optimizer's state, and whether the tensor is of bytes, that is quantised.
Form: TypeAlias = tuple[tuple[int, ...], bool]
_SCALAR: Form = ((), False)

ADAMW = "adamw_torch"
# The learning rate of adapters of embeddings in LoRA+, as in PEFT's create_loraplus_optimizer.
EMBEDDING_LR = 1e-6
# Key of a parameter group of LoRA+: its rate divided by the agent's; None: EMBEDDING_LR.
_RATIO = "lr_ratio"
# bitsandbytes quantises the state of parameters with at least so many values, in blocks of this size.
_MIN_8BIT_SIZE, _BLOCK_SIZE = 4096, 256


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of a library, with the library's defaults for what no setting says.

    Attributes:
        module: The module of its class.
        name: The name of its class.
        forms: The form of each value in the state of a parameter.
        counters: Options of a parameter group that are part of the state.
        has_fused: Whether it can make a step on a GPU in one kernel.
    """

    module: str
    name: str
    forms: Callable[[Tensor], dict[str, Form]]
    counters: tuple[str, ...] = ()
    has_fused: bool = False

    @property
    def package(self) -> str:
        """The library."""
        return self.module.partition(".")[0]

    def create(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """An optimizer of these parameter groups."""
        optimizer: torch.optim.Optimizer = self._class(groups, lr=lr, weight_decay=weight_decay)
        return optimizer

    def create_on(
        self, rows: Sequence[Row], groups: list[dict[str, Any]], paths: Sequence[Sequence[str]], lr: float, decay: float
    ) -> torch.optim.Optimizer:
        """An optimizer of rows, with the paths of each parameter group, whose options are given."""
        places = [places_of(rows, group) for group in paths]
        for options, group in zip(groups, places, strict=True):
            options["params"] = list(dict.fromkeys(place.segment for place in group))
        kind = on_rows(self._class)
        options = {"fused": True} if self.has_fused and all(row.values.is_cuda for row in rows) else {}
        optimizer: RowOptimizer = kind(groups, lr=lr, weight_decay=decay, **options)
        optimizer.attach(rows, places)
        return optimizer

    @property
    def _class(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


def _like(parameter: Tensor, *names: str) -> dict[str, Form]:
    return dict.fromkeys(names, (tuple(parameter.shape), False))


def _of_bitsandbytes(parameter: Tensor, moments: int, *, eight_bit: bool) -> dict[str, Form]:
    """The state of a parameter in an optimizer with so many moments."""
    quantised = eight_bit and parameter.numel() >= _MIN_8BIT_SIZE
    forms: dict[str, Form] = {"step": _SCALAR}
    for number in range(1, moments + 1):
        forms[f"state{number}"] = (tuple(parameter.shape), quantised)
        if quantised:
            forms[f"qmap{number}"] = ((2**8,), False)
            forms[f"absmax{number}"] = ((math.ceil(parameter.numel() / _BLOCK_SIZE),), False)
    return forms


OPTIMIZERS: Mapping[str, Optimizer] = {
    ADAMW: Optimizer(
        "torch.optim",
        "AdamW",
        lambda one: {"step": _SCALAR, **_like(one, "exp_avg", "exp_avg_sq")},
        has_fused=True,
    ),
    "adamw_8bit": Optimizer("bitsandbytes.optim", "AdamW8bit", lambda one: _of_bitsandbytes(one, 2, eight_bit=True)),
    "lion_32bit": Optimizer("bitsandbytes.optim", "Lion", lambda one: _of_bitsandbytes(one, 1, eight_bit=False)),
    "lion_8bit": Optimizer("bitsandbytes.optim", "Lion8bit", lambda one: _of_bitsandbytes(one, 1, eight_bit=True)),
    "schedule_free_adamw": Optimizer(
        "schedulefree",
        "AdamWScheduleFree",
        lambda one: _like(one, "z", "exp_avg_sq"),
        ("k", "weight_sum", "lr_max", "scheduled_lr"),
    ),
}


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings of an agent's optimizer; `AgentArguments` documents each field."""

    optim: str = ADAMW
    weight_decay: float = 0.0
    loraplus_lr_ratio: float | None = None

    def __post_init__(self) -> None:
        name = self.optim
        if not isinstance(name, str) or name not in OPTIMIZERS:
            nearest = f"; the nearest is {nearest_name(name, OPTIMIZERS)!r}" if isinstance(name, str) else ""
            raise ConfigurationError("optim", name, f"is not known{nearest}, known are {', '.join(OPTIMIZERS)}")
        # transformers' OptimizerNames is a str, too: a checkpoint may hold plain texts only.
        object.__setattr__(self, "optim", next(known for known in OPTIMIZERS if known == name))
        object.__setattr__(self, "weight_decay", float(finite_number("weight_decay", self.weight_decay)))
        if self.weight_decay < 0:
            raise ConfigurationError("weight_decay", self.weight_decay, "must not be negative")
        if self.loraplus_lr_ratio is not None:
            ratio = float(positive_number("loraplus_lr_ratio", self.loraplus_lr_ratio))
            object.__setattr__(self, "loraplus_lr_ratio", ratio)

    @property
    def uses_loraplus(self) -> bool:
        """Whether parameters have different learning rates."""
        return self.loraplus_lr_ratio not in (None, 1)


def check_optimizer(settings: OptimizerSettings, accelerator: Any) -> None:
    """Check, before a base is loaded, that an agent can have its optimizer.

    Args:
        settings: The agent's settings.
        accelerator: An `accelerate.Accelerator` or None.

    Raises:
        ConfigurationError: DeepSpeed cannot shard it.
        MissingExtraError: Its package is not installed.
    """
    if uses_deepspeed(accelerator):
        for field, value in (("optim", ADAMW), ("loraplus_lr_ratio", None)):
            if settings.uses_loraplus if value is None else settings.optim != value:
                fix = f"DeepSpeed shards AdamW with one learning rate: use {value}, or processes without DeepSpeed"
                raise ConfigurationError(field, getattr(settings, field), fix)
    package = OPTIMIZERS[settings.optim].package
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(package, "optimizers", f"optim={settings.optim!r}") from error


@functools.cache
def _check_kernels(optim: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check that an optimizer of bitsandbytes can update weights of this dtype on this device.

    Raises:
        ConfigurationError: It cannot.
    """
    if dtype != torch.float32:
        fix = f"updates float32 weights, and the adapter's are {dtype}: use {ADAMW}, or a base of at most float32"
        raise ConfigurationError("optim", optim, fix)
    probe = nn.Parameter(torch.zeros(_MIN_8BIT_SIZE, device=device))
    probe.grad = torch.ones_like(probe)
    try:
        OPTIMIZERS[optim].create([{"params": [probe]}], 1.0, 0.0).step()
    except Exception as error:  # of a missing kernel or library; bitsandbytes has no exception class of its own
        fix = f"does not run on {device} ({brief(str(error))}): use {ADAMW}, or another version of bitsandbytes"
        raise ConfigurationError("optim", optim, fix) from error


def create_optimizer(
    settings: OptimizerSettings,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Row],
    lr: float,
    factor: float = 1.0,
    accelerator: Any = None,
) -> torch.optim.Optimizer:
    """Create an optimizer.

    Args:
        settings: The agent's settings.
        parameters: The adapter's parameters by name.
        rows: The rows that the parameters lie in.
        lr: The agent's `lr`.
        factor: The factor of the schedule.
        accelerator: An `accelerate.Accelerator` or None; with DeepSpeed the moments are sharded over the processes.

    Returns:
        An optimizer whose `state_dict` has the state of each parameter, in the order of `parameter_groups`.

    Raises:
        ConfigurationError: The optimizer does not run on the parameters' device, or for their dtype.
    """
    if uses_deepspeed(accelerator):
        from evollm.distributed.sharded_adamw import ShardedAdamW  # noqa: PLC0415
        from evollm.distributed.zero_config import zero_stage  # noqa: PLC0415

        if len(rows) > 1:
            devices = [str(row.values.device) for row in rows]
            raise ConfigurationError("device_map", devices, "DeepSpeed shards adapters on one device: load it on one")
        places, stage = places_of(rows, list(parameters)), zero_stage(accelerator)
        sharded: Any = on_rows(ShardedAdamW)(places[0].segment, lr * factor, settings.weight_decay, stage)
        sharded.attach(rows, [places])
        rows[0].pin(sharded.memory)
        return cast(torch.optim.Optimizer, sharded)
    optimizer, kinds = OPTIMIZERS[settings.optim], _kinds(parameters)
    groups = parameter_groups(settings, parameters)
    given = [_options(settings, kinds[group[0]]) for group in groups]
    if optimizer.package == "bitsandbytes":
        # It quantises the state of each parameter in blocks, and leaves small parameters alone.
        for device, dtype in {(parameter.device, parameter.dtype) for parameter in parameters.values()}:
            _check_kernels(settings.optim, device, dtype)
        for options, group in zip(given, groups, strict=True):
            options["params"] = [parameters[path] for path in group]
        found = optimizer.create(given, lr, settings.weight_decay)
        # Of a copied agent `Row.settle` comes with the passes alone: torch drops an optimizer's hooks when copying.
        found.register_step_pre_hook(functools.partial(_settle, rows))
    else:
        found = optimizer.create_on(rows, given, groups, lr, settings.weight_decay)
    set_learning_rate(found, lr, factor)
    return found


def _settle(rows: Sequence[Row], *_: Any) -> None:
    """Follow parameters that user code has moved or replaced."""
    for row in rows:
        row.settle()


def parameter_groups(settings: OptimizerSettings, parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """The paths of each parameter group: one group, or with LoRA+ those of PEFT's `create_loraplus_optimizer`."""
    if not settings.uses_loraplus:
        return [list(parameters)]
    kinds = _kinds(parameters)
    groups = [[path for path in parameters if kinds[path] == kind] for kind in KINDS]
    return [group for group in groups if group]


def _kinds(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    return kind_of_parameters({path: parameter.shape for path, parameter in parameters.items()})


def _options(settings: OptimizerSettings, kind: str) -> dict[str, Any]:
    """The options of the parameter group of a kind."""
    if not settings.uses_loraplus:
        return {}
    ratios = {"A": 1.0, "embedding": None, "B": settings.loraplus_lr_ratio, "bias": settings.loraplus_lr_ratio}
    return {_RATIO: ratios[kind], **({"weight_decay": 0.0} if kind == "bias" else {})}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, factor: float = 1.0) -> None:
    """Set the learning rates of all parameter groups.

    With LoRA+ (arXiv 2402.12354) B matrices have `loraplus_lr_ratio` times the rate, and adapters of embeddings 1e-6,
    times the schedule's factor.

    Args:
        optimizer: The optimizer.
        lr: The agent's `lr`.
        factor: The factor of the schedule.
    """
    for group in optimizer.param_groups:
        ratio = group.get(_RATIO, 1.0)
        group["lr"] = (EMBEDDING_LR if ratio is None else lr * ratio) * factor


@contextmanager
def gradient_point(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The block in which a gradient is computed and a step is made.

    A schedule-free optimizer (arXiv 2405.15682) takes the gradient at other weights, y, than those that it trains, x.
    The parameters are y inside the block and x outside. Without a step they have the bits that they had before.

    Raises:
        ConfigurationError: See `check_types`.
    """
    if not isinstance(optimizer, RowOptimizer):
        check_types(optimizer)
    mode: Any = optimizer
    if not hasattr(mode, "train"):
        yield
        return
    mode.settle()
    parameters = [parameter for group in mode.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    num_steps = mode.param_groups[0]["k"]
    mode.train()
    try:
        yield
    finally:
        mode.eval()
        if mode.param_groups[0]["k"] == num_steps:
            with torch.no_grad():
                for parameter, weights in zip(parameters, before, strict=True):
                    parameter.copy_(weights)
