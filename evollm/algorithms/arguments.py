"""The arguments of the constructors of all agents, listed once."""

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

# The line of a class's docstring that `show_arguments` replaces by the documentation of the shared arguments.
_SHARED = "    **shared: Those of [`AgentArguments`][evollm.algorithms.AgentArguments]."


class AgentArguments(TypedDict, total=False):
    """Keyword arguments of every agent, whatever its algorithm. A row is a pair or an example.

    Attributes:
        pad_token_id: Kept for compatibility; padding is recognised by lengths.
        pad_token: Kept for compatibility, like `pad_token_id`.
        model_name: Hub name or folder of the base, instead of `actor_network`; see `load_base_model`.
        actor_network: The base as a loaded language model, causal or encoder-decoder, without adapters. LoRA layers are
            put into it.
        model_config: Keyword arguments for `from_pretrained`, used with `model_name`.
        archive: A `policy.pt` of the original DPO repository, whose weights replace the base's, also those of an
            `actor_network`, for actor and reference alike; see `load_policy_archive`.
        hp_config: The hyperparameters that mutate, with their bounds; None: no hyperparameter mutates.
        index: Number of the agent in its population.
        batch_size: Most rows in one optimizer step, over all processes; a larger batch makes several steps.
        update_epochs: Passes over each batch given to `learn`.
        calc_position_embeddings: Pass explicit position ids rather than leave them to the model.
        micro_batch_size_per_gpu: Most rows in one forward pass; gradients accumulate to the same update.
        device: `cpu`, `cuda`, ...; the device of an `accelerator` takes precedence. None: the device of an
            `actor_network`, else a GPU if there is one.
        dtype: The dtype in which `model_name` is loaded: `float32`, `bfloat16`, ...; `auto`: bfloat16 on a GPU that is
            fast at it and on a CPU whose bfloat16 products are measured to be at least 1.5 times as fast as float32's,
            else float32; None: the dtype of the stored weights. Adapters and sums of log-probs are at least float32.
        lora_config: `peft.LoraConfig`; by default rank 16, alpha 32, on all linear layers.
        accelerator: An `Accelerator` of one or more processes, each of which computes a share of every batch; with
            DeepSpeed, state is sharded over the processes.
        wrap: Accepted for compatibility; nothing is wrapped in a single process.
        clone: Accepted for compatibility; use the method `clone`.
        seed: Seeds the adapter's initialisation and the agent's own generator.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time. None:
            only if free memory cannot hold the activations for full speed, measured at the first training pass.
        torch_compiler: A mode of `torch.compile` for the base's layers, such as `default`: half the kernels, after a
            minute or more of compilation.
        token_budget: Most tokens in one forward pass, over all members in the pass. None: chosen from the device and
            its free memory. Updates are the same up to rounding; set a number for the same bits on another machine.
        drop_nonfinite_rows: Leave out rows on which the frozen reference (for SFT the base) gives non-finite log-probs,
            with a warning that names the rows. False: raise `DataError` at the first such row.
        lr_scheduler_type: A schedule of transformers' `get_scheduler`, whose factor multiplies the agent's `lr`:
            `constant`, `linear`, `cosine`, `cosine_with_min_lr`, `inverse_sqrt`, `constant_with_warmup`, ... A step of
            the schedule is a batch, whatever `batch_size` and `update_epochs`; a run counts from its first step, a
            child goes on at its parent's step, and a fresh agent of a search has the steps that the run has left. For
            `learn` without a run set `num_training_steps`.
        lr_scheduler_kwargs: Further arguments of the schedule, such as `{"min_lr_rate": 0.1}`.
        warmup_ratio: Share of the steps in which the rate rises linearly from 0; no effect beside `warmup_steps`.
        warmup_steps: Number of these steps; below 1 a share of them, as in transformers 5.
        optim: The optimizer, by its name in transformers: `adamw_torch`; `adamw_8bit`, `lion_32bit` and `lion_8bit` of
            bitsandbytes; `schedule_free_adamw` of schedulefree, of which everything but training sees the averaged
            weights. All but the first need the extra `optimizers`. Options other than those named here are each
            library's defaults.
        weight_decay: Decoupled weight decay (arXiv 1711.05101) of the adapter.
        loraplus_lr_ratio: Learning rate of the B matrices divided by that of the A matrices, `lr` (LoRA+, arXiv
            2402.12354), with the parameter groups of PEFT's `create_loraplus_optimizer`: adapters of embeddings have
            the rate 1e-6, and biases no weight decay. None or 1: all weights have the rate `lr`.
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
    lr_scheduler_type: str
    lr_scheduler_kwargs: Mapping[str, Any] | None
    warmup_ratio: float
    warmup_steps: float
    optim: str
    weight_decay: float
    loraplus_lr_ratio: float | None


def show_arguments(kind: Any) -> None:
    """Add the shared arguments to the signature and the docstring of a class of agents, for `help`.

    The signature has the parameters of the class's constructor, then those of its parents' constructors as long as
    keyword arguments are passed on, and last the fields of `settings_class` and `hyperparameters_class`.
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
            if field.name != "use_separate_reference_adapter":  # Agents with a reference have this argument themselves.
                found.setdefault(field.name, shown)
    kind.__signature__ = inspect.Signature(sorted(found.values(), key=lambda one: one.kind))
