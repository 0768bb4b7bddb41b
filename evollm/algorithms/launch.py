"""What an agent is asked to do, against how its processes were launched."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from evollm.algorithms.optimizers import check_optimizer
from evollm.algorithms.settings import AgentSettings
from evollm.processes import uses_fsdp


def check_launch(settings: AgentSettings, lora_config: LoraConfig, accelerator: Any) -> None:
    """Check, before a base is loaded, that an agent can be trained under this accelerator.

    Args:
        settings: The agent's settings.
        lora_config: Its LoRA configuration.
        accelerator: An `accelerate.Accelerator` or None.

    Raises:
        ConfigurationError: DeepSpeed cannot shard its optimizer, or FSDP a base under its adapter.
        MissingExtraError: The optimizer's package is not installed.
    """
    check_optimizer(settings, accelerator)
    if uses_fsdp(accelerator):
        from evollm.distributed.fsdp_settings import check_fsdp_agent  # noqa: PLC0415

        check_fsdp_agent(settings.torch_compiler, lora_config)
