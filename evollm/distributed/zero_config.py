"""Reading a DeepSpeed configuration: its ZeRO stage, and an error for settings that would have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evollm.errors import ConfigurationError, MissingExtraError

_STAGES = (1, 2, 3)
# Allowed values of each setting; None: all, since the setting does not change results. `auto` is always allowed.
_SETTINGS: dict[str, tuple[object, ...] | None] = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": None,
    "steps_per_print": None,
    "wall_clock_breakdown": (False,),
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
    "gradient_accumulation_steps": (1,),
    "gradient_clipping": (0,),
    "fp16.enabled": (False,),
    "bf16.enabled": (False,),
    "zero_optimization.stage": _STAGES,
    "zero_optimization.offload_optimizer.device": ("none",),
    "zero_optimization.offload_param.device": ("none",),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (False,),
}
_FIXES = {
    "optimizer": "evollm makes AdamW for each agent: leave it out, and give lr to the agents",
    "scheduler": "learning rates are the agents', and evolution changes them: leave it out",
    "gradient_accumulation_steps": "an agent accumulates by micro_batch_size_per_gpu: leave it out or set 1",
    "gradient_clipping": "each agent clips by its own max_grad_norm: leave it out",
    "fp16": "adapters train in float32: leave it out, and load the base in the precision that you want",
    "bf16": "adapters train in float32: leave it out, and load the base in the precision that you want",
    "zero_optimization.stage": f"must be one of {_STAGES}; without sharding use Accelerator() without DeepSpeed",
    "zero_optimization.offload": "offloading is not supported: leave it out",
}


def import_deepspeed() -> Any:
    """Import DeepSpeed, which is an optional dependency.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import deepspeed  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("deepspeed", "deepspeed", "ZeRO") from error
    return deepspeed


def zero_stage(accelerator: Any) -> int:
    """The ZeRO stage that an accelerator asks for; 0 without DeepSpeed.

    Args:
        accelerator: An `accelerate.Accelerator` or None.

    Raises:
        ConfigurationError: Its DeepSpeed configuration has a setting that would have no effect.
        MissingExtraError: DeepSpeed is not installed.
    """
    kind = getattr(getattr(accelerator, "distributed_type", None), "value", None)
    if kind != "DEEPSPEED":
        return 0
    import_deepspeed()
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    check_zero_config(config)
    return int(config["zero_optimization"]["stage"])


def check_zero_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration with a setting that evollm would not follow; the value `auto` always passes.

    Raises:
        ConfigurationError: It names the first such setting.
    """
    for name, value in _leaves(config):
        allowed = _SETTINGS.get(name, ())
        if value in ("auto", None) or allowed is None or value in allowed:
            continue
        fix = next((fix for prefix, fix in _FIXES.items() if name.startswith(prefix)), "has no effect: leave it out")
        raise ConfigurationError(f"deepspeed_config.{name}", value, fix)


def _leaves(config: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """The values of a nested configuration, each with its dotted path."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        found += _leaves(value, f"{path}{key}.") if isinstance(value, Mapping) else [(path + key, value)]
    return found
