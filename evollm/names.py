"""The names of settings, with aliases from other libraries and hints for unknown ones, and of rows in messages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from evollm.checks import nearest_name
from evollm.errors import ConfigurationError

# Names in other libraries, and in the classes of evollm, for the parameters of `tune`.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "model_name": "model",
        "model_name_or_path": "model",
        "actor_network": "model",
        "base_model": "model",
        "train_dataset": "data",
        "train_data": "data",
        "dataset": "data",
        "test_dataset": "test_data",
        "eval_dataset": "test_data",
        "eval_data": "test_data",
        "final_dataset": "final_data",
        "population_size": "population",
        "pop_size": "population",
        "size": "population",
        "learning_rate": "lr",
        "optimizer": "optim",
        "rpo_alpha": "nll_alpha",
        "per_device_train_batch_size": "data_batch_size_per_gpu",
        "num_train_epochs": "num_epochs",
        "epochs": "num_epochs",
        "output_dir": "run_dir",
        "peft_config": "lora_config",
        "lora": "lora_config",
        "max_length": "max_context_length",
        "eval_steps": "evaluation_interval",
        "save_steps": "checkpoint_steps",
        "save_total_limit": "keep_last",
        "processing_class": "tokenizer",
        "resume": "resume_from_checkpoint",
        "num_generations": "group_size",
        "num_iterations": "update_epochs",
        "reward_funcs": "reward_functions",
        "clip_coef": "epsilon",
        "max_output_tokens": "max_completion_length",
        "bounds": "hp_config",
        "search_space": "hp_config",
    }
)
LORA_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "rank": "r",
        "lora_r": "r",
        "lora_rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "modules": "target_modules",
        "targets": "target_modules",
        "lora_target_modules": "target_modules",
    }
)
BOUND_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "low": "min",
        "lower": "min",
        "lowest": "min",
        "high": "max",
        "upper": "max",
        "highest": "max",
        "values": "choices",
        "options": "choices",
    }
)
_QUANTISED = "model_config.quantization_config"
# Settings that are entries of another setting.
_INSIDE = {
    **{name: f"lora_config.{LORA_ALIASES[name]}" for name in LORA_ALIASES if name != "modules"},
    **{name: f"lora_config.{name}" for name in ("r", "lora_alpha", "lora_dropout", "target_modules")},
    "load_in_4bit": f"{_QUANTISED}.load_in_4bit",
    "load_in_8bit": f"{_QUANTISED}.load_in_8bit",
    "quantization_config": _QUANTISED,
    "bnb_config": _QUANTISED,
    "attn_implementation": "model_config.attn_implementation",
    "revision": "model_config.revision",
    "model_init_kwargs": "model_config",
}
_SCHEDULE = "the schedule of the learning rate is lr_scheduler_type, such as cosine, with warmup_ratio or warmup_steps"
_TYPE = "the base's type is dtype, such as dtype=bfloat16; adapters stay in float32"
# Settings of other libraries that evollm lacks, with the reason.
_NOT_SUPPORTED = {
    **dict.fromkeys(("lr_scheduler", "scheduler"), _SCHEDULE),
    **dict.fromkeys(("bf16", "fp16", "precision", "mixed_precision", "torch_dtype"), _TYPE),
    "gradient_accumulation_steps": "a step is data_batch_size_per_gpu pairs, and micro_batch_size_per_gpu or "
    "token_budget bounds its memory",
    "max_prompt_length": "max_context_length bounds prompt and completion, and cuts the prompt on its left",
    "logging_steps": "every step is logged",
    "precompute_ref_log_probs": "each pair's reference is computed once and kept in any case",
    "ref_model": "the reference is a frozen adapter, or the base",
}


def check_known(given: Mapping[str, Any], known: Collection[str], aliases: Mapping[str, str], inside: str = "") -> None:
    """Check that all names are known.

    Args:
        given: Names with their values.
        known: The known names.
        aliases: Other names for the known names.
        inside: The setting that has the names as entries, such as `lora_config`; "": none.

    Raises:
        ConfigurationError: A name is unknown; the message says where it belongs, or gives the nearest known name.
    """
    for name, value in given.items():
        if name not in known:
            field = f"{inside}.{name}" if inside else str(name)
            hint = _hint(str(name), value, known, aliases, inside)
            raise ConfigurationError(field, value, f"is no parameter; {hint}")


def _hint(name: str, value: object, known: Collection[str], aliases: Mapping[str, str], inside: str) -> str:
    spelt = name.lower().replace("-", "_")
    if not inside and name.partition(".")[0] in known:
        outer, _, inner = name.partition(".")
        return f"in a file write {outer}: {{{inner}: ...}}; a dotted name is for a command line"
    if not inside and spelt in _INSIDE and spelt not in known:
        return f"it is an entry of another one: {_INSIDE[spelt]}"
    if not inside and spelt in _NOT_SUPPORTED:
        return f"leave it out: {_NOT_SUPPORTED[spelt]}"
    if isinstance(value, Mapping) and not inside and value and all(entry in known for entry in value):
        return f"write its entries by themselves, without {name} around them"
    return f"the nearest known one is {nearest_name(spelt, known, aliases)!r}"


def row_name(row: object, set_name: str) -> str:
    """A row of the user's data in words, such as `row 3`, or `row 3 of sums` where there are several sets."""
    return f"row {row} of {set_name}" if set_name else f"row {row}"
