"""Reading accelerate's FSDP plugin: an error for settings that would have no effect."""

from __future__ import annotations

import os
from typing import Any

from peft import LoraConfig
from torch.distributed.fsdp import CPUOffloadPolicy

from evollm.errors import ConfigurationError

_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def check_fsdp(accelerator: Any) -> None:
    """Refuse an accelerator with FSDP1, or with a setting that evollm would not follow.

    On a CPU accelerate keeps nothing of the plugin, so that most settings are checked on GPUs only.

    Args:
        accelerator: An `accelerate.Accelerator` for which `evollm.processes.uses_fsdp` holds.

    Raises:
        ConfigurationError: It names the first such setting.
    """
    if accelerator.mixed_precision != "no":
        fix = "adapters train in float32: leave it out, and load the base in the precision that you want"
        raise ConfigurationError("accelerator.mixed_precision", accelerator.mixed_precision, fix)
    if getattr(accelerator, "parallelism_config", None) is not None:
        fix = "has no effect: leave it out; the base is sharded over all processes"
        raise ConfigurationError("accelerator.parallelism_config", accelerator.parallelism_config, fix)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        check_fsdp_plugin(plugin)
    if os.environ.get(_LOADING, "false").lower() == "true":
        fix = (
            "each process shards the weights that it has loaded, and this setting loads them in one alone: leave it out"
        )
        raise ConfigurationError("fsdp_plugin.cpu_ram_efficient_loading", True, fix)


def check_fsdp_plugin(plugin: Any) -> None:
    """Refuse FSDP1, and settings of FSDP2 that evollm would not follow.

    Args:
        plugin: An `accelerate.FullyShardedDataParallelPlugin`.

    Raises:
        ConfigurationError: It names the first such setting.
    """
    if plugin.fsdp_version != 2:  # noqa: PLR2004
        fix = "FSDP1 cannot shard a frozen base below whole adapters: FullyShardedDataParallelPlugin(fsdp_version=2)"
        raise ConfigurationError("fsdp_plugin.fsdp_version", plugin.fsdp_version, fix)
    unfollowed: tuple[tuple[str, bool, str], ...] = (
        ("cpu_offload", isinstance(plugin.cpu_offload, CPUOffloadPolicy), "offloading is not supported: leave it out"),
        (
            "mixed_precision_policy",
            plugin.mixed_precision_policy is not None,
            "leave it out, and load the base in the precision that you want",
        ),
        (
            "reshard_after_forward",
            plugin.reshard_after_forward is False,
            "each layer is freed after its forward pass: leave it out",
        ),
        ("ignored_modules", plugin.ignored_modules is not None, "all repeated layers are sharded: leave it out"),
        (
            "activation_checkpointing_offload",
            # Of later versions of accelerate.
            getattr(plugin, "activation_checkpointing_offload", False) is True,
            "offloading is not supported: leave it out",
        ),
    )
    for name, found, fix in unfollowed:
        if found:
            raise ConfigurationError(f"fsdp_plugin.{name}", getattr(plugin, name), fix)


def check_fsdp_agent(torch_compiler: str | None, lora_config: LoraConfig) -> None:
    """Refuse an agent that cannot be trained on a base whose layers have no weights between their passes.

    Args:
        torch_compiler: The agent's setting.
        lora_config: Its LoRA configuration.

    Raises:
        ConfigurationError: The layers are to be compiled, or the adapters begin from the base's weights.
    """
    if torch_compiler is not None:
        fix = "layers that FSDP shards are not compiled: leave it out, or use plain data parallelism"
        raise ConfigurationError("torch_compiler", torch_compiler, fix)
    if lora_config.use_dora:
        fix = "begins from the base's weights, of which FSDP leaves each process a share: use LoRA without it"
        raise ConfigurationError("lora_config.use_dora", True, fix)
