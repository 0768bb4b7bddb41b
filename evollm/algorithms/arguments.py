"""The arguments that the constructors of all agents take, listed once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel
from typing_extensions import TypedDict

from evollm.hpo.hyperparameters import HyperparameterConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

# The line of a class's docstring that `help` shows the documentation of the shared arguments for.
_SHARED = "    **shared: Those of [`AgentArguments`][evollm.algorithms.AgentArguments]."


class AgentArguments(TypedDict, total=False):
    """What every agent takes by name, whatever its algorithm. A row is a pair or an example.

    Attributes:
        pad_token_id: Kept for compatibility; padding is recognised by lengths.
        pad_token: Likewise.
        model_name: Hub name or folder of the base, instead of `actor_network`; see `load_base_model`.
        actor_network: The base as a loaded language model, causal or encoder-decoder, without adapters. LoRA layers are
            put into it.
        model_config: Keyword arguments for `from_pretrained`, with `model_name`.
        archive: A `policy.pt` of the original DPO repository: its weights become the base's, for actor and reference
            alike. An `actor_network` is overwritten; see `load_policy_archive`.
        hp_config: Which hyperparameters mutate, and within which bounds; None: none.
        index: Number of the agent in its population.
        batch_size: At most so many rows for one optimizer step; a larger batch, of all processes, makes several steps.
        update_epochs: Passes over each batch that `learn` is given.
        calc_position_embeddings: Pass explicit position ids rather than leave them to the model.
        micro_batch_size_per_gpu: At most so many rows in one forward pass; gradients accumulate to the same update.
        device: `cpu`, `cuda`, ...; an accelerator's device comes first. None: a card if there is one, and where it is
            for an `actor_network`.
        dtype: Type that a base is loaded in by its name: `float32`, `bfloat16`, ...; `auto`: bfloat16 on a card that is
            fast at it and on a CPU that multiplies it at least 1.5 times as fast as float32 (measured), else float32;
            None: what it is stored in. Adapters and sums of log-probs are float32 at least.
        lora_config: `peft.LoraConfig`; by default rank 16, alpha 32, on all linear layers.
        accelerator: Of one process, or of several that each compute a share of every batch; DeepSpeed's spreads state
            over them.
        wrap: Accepted for compatibility; nothing is wrapped in a single process.
        clone: Accepted for compatibility; use the method `clone`.
        seed: Seeds the adapter's initialisation and the agent's own generator.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time. None:
            where the free memory does not hold enough of them for full speed, found at the first training pass.
        torch_compiler: A mode of `torch.compile` for the base's layers, such as `default`.
        token_budget: Most tokens in one forward pass, of all members that share it. None: what the device and its free
            memory suggest. The update is the same up to rounding; give it for the same bits on another machine.
        drop_nonfinite_rows: Leave out rows on which the frozen reference (of SFT the base) gives log-probs that are not
            finite, with a warning that names them. False: raise `DataError` when the first is found.
    """

    pad_token_id: int | None
    pad_token: str | None
    model_name: str | None
    actor_network: PreTrainedModel | None
    model_config: Mapping[str, Any] | None
    archive: str | Path | None
    hp_config: HyperparameterConfig | None
    index: int
    batch_size: int
    update_epochs: int
    calc_position_embeddings: bool
    micro_batch_size_per_gpu: int | None
    device: str | torch.device | None
    dtype: str | torch.dtype | None
    lora_config: LoraConfig | None
    accelerator: Accelerator | None
    wrap: bool
    clone: bool
    seed: int
    gradient_checkpointing: bool | None
    torch_compiler: str | None
    token_budget: int | None
    drop_nonfinite_rows: bool


def show_arguments(kind: Any) -> None:
    """Put the shared arguments into the signature and the docstring of a class of agents, as `help` shows them.

    The parameters are those of its own constructor, then those of its parents' as far as keyword arguments are passed
    on to them, and last the fields of `settings_class` and `hyperparameters_class`.
    """
    if kind.__doc__:  # None under python -OO.
        documented = inspect.cleandoc(AgentArguments.__doc__ or "").partition("Attributes:\n")[2]
        kind.__doc__ = inspect.cleandoc(kind.__doc__).replace(_SHARED, documented)
    found: dict[str, inspect.Parameter] = {}
    for constructor in (vars(parent)["__init__"] for parent in kind.__mro__ if "__init__" in vars(parent)):
        _, *parameters = inspect.signature(constructor).parameters.values()
        variadic = [one for one in parameters if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        for one in parameters:
            if one not in variadic:
                found.setdefault(one.name, one)
        if not variadic:
            break
    else:
        for field in (*fields(kind.settings_class), *fields(kind.hyperparameters_class)):
            shown = inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
            )
            if field.name != "use_separate_reference_adapter":  # Agents with a reference list it themselves.
                found.setdefault(field.name, shown)
    kind.__signature__ = inspect.Signature(sorted(found.values(), key=lambda one: one.kind))
