"""What a model and a LoRA configuration must be for many adapters to share one base."""

from __future__ import annotations

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from evollm.checks import finite_number, whole_number
from evollm.errors import ConfigurationError
from evollm.models.lora_json import check_readable

# The others rewrite the base's own weights, which every other adapter stands on, or need data.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# Options that work on the base itself, through hooks for which the base would have to be called by PEFT, or change an
# adapter's weights in a forward pass.
_UNSUPPORTED = (
    "kasa_config",
    "megatron_config",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "velora_config",
)


def check_plain_model(field: str, model: object) -> None:
    """Refuse what no agent can be built on.

    Raises:
        ConfigurationError: No model of transformers, or one that carries adapters.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise ConfigurationError(
            field,
            model if isinstance(model, str) else type(model).__name__,
            "must be a language model of transformers, causal or encoder-decoder (or use model_name)",
        )
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigurationError(
            field,
            type(model).__name__,
            "already carries adapters; pass the plain base model, and the LoRA settings as lora_config "
            "(an adapter that was trained before: model.merge_and_unload() first)",
        )


def check_lora_config(config: LoraConfig) -> None:
    """Refuse a configuration with which one adapter would change the base or another adapter.

    Raises:
        ConfigurationError: The message names the field.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigurationError("lora_config", type(config).__name__, "must be a peft.LoraConfig")
    whole_number("lora_config.r", config.r, 1)
    finite_number("lora_config.lora_alpha", config.lora_alpha)
    dropout = finite_number("lora_config.lora_dropout", config.lora_dropout)
    if not 0 <= dropout < 1:
        raise ConfigurationError("lora_config.lora_dropout", dropout, "must be from 0 to below 1")
    targets = config.target_modules
    named = isinstance(targets, list | tuple | set) and all(isinstance(name, str) for name in targets)
    if not (targets is None or isinstance(targets, str) or named):
        raise ConfigurationError("lora_config.target_modules", targets, "must be names of modules, or 'all-linear'")
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ConfigurationError(
            "lora_config.init_lora_weights",
            config.init_lora_weights,
            f"rewrites the base or needs data; use one of {_INITIALISATIONS}",
        )
    for option in _UNSUPPORTED:
        if getattr(config, option, None):
            raise ConfigurationError(f"lora_config.{option}", getattr(config, option), "does not work on a shared base")
    if config.bias != "none":
        raise ConfigurationError("lora_config.bias", config.bias, "trains the shared base's own biases; use 'none'")
    check_readable(config)
