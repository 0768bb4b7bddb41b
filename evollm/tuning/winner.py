"""The best agent of a run: loaded, asked for answers, exported."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evollm.algorithms import algorithm_named
from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import save_llm_checkpoint, save_merged_model, save_policy_archive
from evollm.checkpoints.agent import read_agent_folder
from evollm.checkpoints.atomic import check_replaceable
from evollm.checkpoints.find import FoundAgent, NoAgentError, best_of_run, check_is_base, find_agent
from evollm.checks import usable_path
from evollm.data.row_report import FORMS
from evollm.data.samples import IntArray
from evollm.data.tokenization import prompt_ids
from evollm.errors import CheckpointError, ConfigurationError, brief
from evollm.models.generation import greedy_answers
from evollm.models.loading.model_config import reloadable
from evollm.models.loading.precision import AUTO
from evollm.models.loading.pretrained import load_base_model, load_tokenizer
from evollm.runs import has_ended, read_config
from evollm.runs.folder import run_above
from evollm.tuning.arguments_file import TuneArguments, known_of, place_of, resume_of
from evollm.tuning.from_yaml import model_config_of

KINDS = ("merged", "adapter", "policy")


@dataclass(frozen=True)
class Winner:
    """The best agent of a run, on its base.

    Attributes:
        agent: The agent.
        tokenizer: The base's tokenizer.
        run_dir: The run folder.
        form: What the run's rows were: `chat`, `text` or `mixed`; "" where its folder does not say it.
        found: The agent's folder.
    """

    agent: SavableAgent
    tokenizer: Any
    run_dir: Path
    form: str = ""
    found: FoundAgent = field(default_factory=lambda: FoundAgent(Path()))

    @property
    def uses_template(self) -> bool:
        """Whether prompts go through the chat template, as the run's rows did."""
        return self.form != "text" and bool(getattr(self.tokenizer, "chat_template", None))

    def answer(self, prompt: str | Sequence[Mapping[str, str]], max_new_tokens: int, *, tuned: bool) -> str:
        """The likeliest answer of the agent, or of the base.

        Args:
            prompt: A text that is to be continued, or the messages of a conversation.
            max_new_tokens: Longest answer, in tokens.
            tuned: Whether the agent answers, and not the base.

        Raises:
            ConfigurationError: It is too long, or the chat template refuses the conversation, or there is none.
        """
        base = self.agent.base
        ids = self.prompt_ids(prompt)
        limit = base.max_positions
        if limit is not None and len(ids) >= limit:
            raise ConfigurationError("prompt", f"{len(ids)} tokens", f"the base takes {limit}: ask something shorter")
        if limit is not None and not base.is_encoder_decoder:
            max_new_tokens = min(max_new_tokens, limit - len(ids))
        adapter = self.agent.actor_adapter if tuned else None
        return greedy_answers(base, [adapter], [ids], self.tokenizer, max_new_tokens)[0][0]

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, str]]) -> IntArray:
        """(P,) token ids of what `answer` takes, as those of the rows of a run are made.

        Raises:
            ConfigurationError: The chat template refuses the conversation, or there is none.
        """
        is_encoder_decoder = self.agent.base.is_encoder_decoder
        if isinstance(prompt, str):
            return prompt_ids(prompt, self.tokenizer, encoder_decoder=is_encoder_decoder)
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigurationError("tokenizer.chat_template", None, "there is none: ask with strings (--raw)")
        try:
            text = self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # Whatever the template's own code raises.
            fix = f"refuses this conversation: {brief(str(error))}"
            raise ConfigurationError("tokenizer.chat_template", self.tokenizer.name_or_path, fix) from error
        # A template writes the BOS itself; an encoder reads a text as the tokenizer makes it.
        return np.array(self.tokenizer(text, add_special_tokens=is_encoder_decoder)["input_ids"], dtype=np.int64)


def open_winner(
    run_dir: str | os.PathLike[str],
    model: str | None = None,
    trust_remote_code: bool = False,
    elite: str | os.PathLike[str] | None = None,
) -> Winner:
    """Load the best agent of a run; of one that has not ended, the best of its newest checkpoint.

    Args:
        run_dir: The run folder, or the folder of an agent or of a checkpoint in it.
        model: Hub name or folder of the base; None: the one that the run names.
        trust_remote_code: Run code that comes with the base. A run folder cannot ask for it.
        elite: Folder of the best agent, or of checkpoints, of a run that keeps them outside its folder.

    Raises:
        ConfigurationError: This is no run folder, or the base cannot be loaded.
        CheckpointError: The run has saved no agent yet, or its files are damaged.
    """
    check_is_base("model", model)
    above = run_above(usable_path("run_dir", run_dir))
    if above is not None and elite is None:
        run_dir, elite = above, run_dir
    config = read_config(run_dir)
    folder = usable_path("run_dir", run_dir)
    known = known_of(folder)
    # Without an agent no model need be loaded.
    found = _best_of(folder, config, known) if elite is None else find_agent("elite", elite)
    if found.remark:
        warnings.warn(found.remark, UserWarning, stacklevel=2)
    arguments = known.settings
    name = model or arguments.get("model") or config["base"]
    if model is None:
        needed = {"tokenizer", "model_config"} if name else {"model", "tokenizer", "model_config"}
        known.require(needed, run_dir, "give the name or folder of a model that has them (model)")
    if not name:
        raise ConfigurationError("model", None, f"{run_dir} does not name the model that it ran on: give it")
    agent_class = algorithm_named(config["algorithm"].lower()).agent
    model_config = _model_config(arguments, found.path, trust_remote_code)
    tokenizer = load_tokenizer(arguments.get("tokenizer") or name, model_config)
    base: dict[str, Any] = (
        {"model_config": model_config} if model is None else {"actor_network": load_base_model(model, model_config)}
    )
    agent = agent_class.load(str(found.path), arguments.get("device"), **base)
    form = config["data"].get("form")
    return Winner(agent, tokenizer, folder, form if form in FORMS else "", found)


def _best_of(run_dir: Path, config: Mapping[str, Any], known: TuneArguments) -> FoundAgent:
    """The best agent of a run that keeps its agents in its folder.

    Raises:
        ConfigurationError: The run keeps them elsewhere.
        CheckpointError: There is no agent, or it is damaged.
    """
    needed = "elite_path" if has_ended(run_dir) else "checkpoint_path"
    known.require_places([needed], run_dir, lambda _, path: f"--elite {shlex.quote(path)}")
    inner = {name: place_of(run_dir, known, name) for name in ("elite_path", "checkpoint_path")}
    try:
        return best_of_run(run_dir, inner["elite_path"], inner["checkpoint_path"])
    except NoAgentError as error:
        every = config["schedule"].get("checkpoint_every")
        when = f"it saves one every {every} steps" if every else "it saves none (checkpoint_steps=0)"
        raise CheckpointError(f"{error} ({when}); go on with it: {resume_of(run_dir)}") from None


def _model_config(arguments: Mapping[str, Any], elite: Path, trust_remote_code: bool) -> dict[str, Any]:
    """How the base is loaded: as the arguments of `tune` say, else as the agent's checkpoint does."""
    kept = model_config_of(arguments.get("model_config"))
    if kept is None:
        kept = reloadable(read_agent_folder(elite).attributes.get("model_config") or {})
    elif arguments.get("dtype") not in (None, AUTO):
        kept = {**kept, "dtype": arguments["dtype"]}
    return {**kept, "trust_remote_code": trust_remote_code}


def export(
    run_dir: str | os.PathLike[str],
    to: str | os.PathLike[str],
    what: str = "merged",
    model: str | None = None,
    trust_remote_code: bool = False,
    elite: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the best agent of a run for others to load; of one that has not ended, the best of its newest checkpoint.

    Args:
        run_dir: As for `open_winner`.
        to: Folder to write.
        what: `merged`: a model that transformers loads, with tokenizer and model card; `adapter`: the adapter alone,
            which PEFT loads, with a model card; `policy`: `policy.pt` of the original DPO repository.
        model: Hub name or folder of the base; None: the one that the run names.
        trust_remote_code: As for `open_winner`.
        elite: Likewise.

    Returns:
        What was written.

    Raises:
        ConfigurationError: Something else lies at `to`, there is no such kind, or the base cannot be merged.
        CheckpointError: The run has saved no agent yet, or its files are damaged.
    """
    path = usable_path("to", to)
    if what not in KINDS:
        raise ConfigurationError("what", what, f"must be one of {', '.join(KINDS)}")
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ConfigurationError("to", str(path), "is there already: give a new folder")
    # Before the model is loaded.
    check_replaceable("to", path)
    winner = open_winner(run_dir, model, trust_remote_code, elite)
    if what == "merged":
        save_merged_model(winner.agent, path, winner.tokenizer, winner.run_dir, winner.found.step)
    elif what == "adapter":
        save_llm_checkpoint(winner.agent, path, winner.tokenizer, winner.run_dir, winner.found.step)
    else:
        path.mkdir(parents=True, exist_ok=True)
        path = path / "policy.pt"
        save_policy_archive(winner.agent, path)
    return path
