"""Error messages for arguments of AgileRL, and of TRL's GRPO, that evollm lacks: they say what to write instead.

For an argument that is not listed here Python raises its own TypeError.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

from evollm.errors import ConfigurationError

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

_BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Arguments whose values may contain an API key.
_SECRET = frozenset({"wandb_api_key", "wandb_kwargs", "init_hp"})
_TRACKER = "report_to='wandb' reads wandb's own variables"

# For each callable: the names of AgileRL's arguments, and what to write here.
AGENT = {
    "mini_batch_size": "batch_size is the pairs of an optimizer step and micro_batch_size_per_gpu those of a pass",
    "quantization_config": "give it as model_config={'quantization_config': ...}, with model_name",
    "lora_target_scope": "give lora_config=LoraConfig(target_modules=...)",
    "fsdp_config": "processes are spread by accelerator=, with FSDP2 or DeepSpeed's stage 3 for a large base",
    "activation_offload": "gradient_checkpointing=True saves memory: leave it out",
    "moe_lora_recompute": "gradient_checkpointing=True saves memory: leave it out",
    "chunk_rows": "token_budget bounds a pass: leave it out",
    "cast_logprobs_to_fp32": "log-probs are summed in float32 at least: leave it out",
    "reduce_memory_peak": "logits of all tokens are never kept: leave it out",
    "cosine_lr_schedule_config": "the schedule is lr_scheduler_type='cosine' with warmup_ratio=...: leave it out",
    "resume_from_checkpoint": "build the agents, then call load_checkpoint(path) of each",
}
SFT_AGENT = AGENT | {
    "use_liger_loss": "there is one loss: leave it out",
    "use_separate_reference_adapter": "an SFT agent has no reference: leave it out",
}
GRPO_AGENT = AGENT | {
    "num_generations": "the answers to a prompt are group_size",
    "num_iterations": "the steps on the same answers are update_epochs",
    "clip_coef": "the ratio is clipped by epsilon, and above by epsilon_high",
    "max_output_tokens": "the most tokens of an answer are max_completion_length",
    "max_model_len": "give the gym max_context_length, for prompts, and max_completion_length for answers",
    "reward_funcs": "rewards are the gym's: RewardGym(..., reward_functions=...)",
}
GYM = {
    "objective": "the class says it, PreferenceGym or SFTGym: leave it out",
    "response_column": "give columns={'completion': <that column>}",
    "chat_template_kwargs": "give each row a column chat_template_kwargs",
    "rank": "give accelerator=Accelerator(): leave it out",
    "world_size": "give accelerator=Accelerator(): leave it out",
}
RESET = {"reset_dataloaders": "reset(seed=...) begins with epoch 0"}
LOOP = {
    "init_hp": "the agents have their hyperparameters, and the run's config.json lists them: leave it out",
    "env_fn": "all agents see the batches of one gym: give env",
    "selection_strategy": "give tournament=TournamentSelection(...)",
    "wandb_api_key": f"{_TRACKER}: set WANDB_API_KEY and leave it out",
    "wandb_project": f"{_TRACKER}: set WANDB_PROJECT and leave it out",
    "wandb_entity": f"{_TRACKER}: set WANDB_ENTITY and leave it out",
    "wandb_run_name": f"{_TRACKER}: set WANDB_NAME and leave it out",
    "wandb_kwargs": f"{_TRACKER}: set WANDB_PROJECT, WANDB_ENTITY or WANDB_NAME and leave it out",
    "tensorboard_log_dir": "TensorBoard's files are in the run folder: give run_dir",
    "log_csv": "the run folder has metrics.jsonl: leave it out",
}
TOURNAMENT = {
    "eval_loop": "a score is over all held-out pairs and the last one counts: leave it out; a seed is rand_seed=...",
    "language_model": "leave it out",
}
MUTATIONS = {
    "dormant_threshold": "evollm mutates hyperparameters only: leave it out",
    "activation_selection": "evollm mutates hyperparameters only: leave it out",
    "rl_hp_selection": "which hyperparameters mutate is the agents' hp_config: leave it out",
}
SAVE = {"weights_only": "save_optimizer=False leaves the optimizer out, lora_only=True the base's weights"}
LOAD = {
    "restore_config": "a resume restores it, a next stage does not (overwrite_reference_adapter): leave it out",
    "restore_hyperparameters": "a resume restores them, a next stage does not (overwrite_reference_adapter)",
}
SAVE_ADAPTER = {"checkpoint_path": "the folder's name here is path"}
TEST = {
    "max_steps": "a test is over all held-out pairs: leave it out",
    "swap_channels": "leave it out",
    "sum_scores": "leave it out",
}
ACTION = {"training": "an agent acts in one way: leave it out"}

# AgileRL's order of positional arguments that are keyword arguments here, as far as its versions agree.
TOURNAMENT_ORDER = ("tournament_size", "elitism", "population_size", "eval_loop")
MUTATIONS_ORDER = ("no_mutation", "architecture", "new_layer_prob", "parameters", "activation", "rl_hp", "mutation_sd")
LOOP_ORDER = ("pop", "env", "init_hp")
RESET_ORDER = ("self", "reset_dataloaders")


def explains(names: Mapping[str, str], order: Sequence[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that it explains arguments of another library.

    Args:
        names: The other library's arguments, and what to write instead.
        order: The other library's positional arguments, to name one that was passed by position.

    Returns:
        A decorator. The function raises `ConfigurationError` for such an argument, and for too many positional ones.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        by_place = [name for name, parameter in parameters.items() if parameter.kind in _BY_PLACE]

        @wraps(function)
        def explaining(*arguments: P.args, **named: P.kwargs) -> R:
            if len(arguments) > len(by_place):
                raise _misplaced(by_place, order, arguments, names)
            for name, value in named.items():
                if name in names and name not in parameters:
                    shown = "..." if name in _SECRET else value
                    raise ConfigurationError(name, shown, f"is not an argument here: {names[name]}")
            return function(*arguments, **named)

        return explaining

    return decorate


def explains_construction(names: Mapping[str, str], order: Sequence[str] = ()) -> Callable[[C], C]:
    """Decorate a dataclass so that its constructor explains arguments, as `explains` does."""

    def decorate(kind: C) -> C:
        kind.__init__ = explains(names, ("self", *order))(kind.__init__)  # type: ignore[misc]
        return kind

    return decorate


def _misplaced(
    by_place: Sequence[str], order: Sequence[str], arguments: Sequence[object], names: Mapping[str, str]
) -> ConfigurationError:
    """Return the error for the first argument that is positional and must be a keyword argument."""
    place = len(by_place)
    known = place < len(order)
    name = order[place] if known else f"argument {place + 1 - by_place.count('self')}"
    value = "..." if name in _SECRET else arguments[place]
    taken = ", ".join(one for one in by_place if one != "self") or "none"
    meant = (
        f"in AgileRL this place is {name}'s, and {names[name]}" if name in names else "give arguments by their names"
    )
    return ConfigurationError(name, value, f"is given by its place, as only these can be ({taken}): {meant}")
