"""The best agent of a run that has ended: opened, asked, handed on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evollm.algorithms import DPO, SFT
from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import save_llm_checkpoint, save_merged_model, save_policy_archive
from evollm.checkpoints.agent import read_agent_folder
from evollm.checkpoints.files import check_replaceable
from evollm.checks import usable_path
from evollm.errors import ConfigurationError
from evollm.models.generation import greedy_answers
from evollm.models.precision import AUTO
from evollm.models.pretrained import load_base_model, load_tokenizer, reloadable
from evollm.tuning.plain import model_config_of
from evollm.tuning.record import known_of, place_of, read_record

KINDS = ("merged", "adapter", "policy")
_AGENTS: dict[str, type[SavableAgent]] = {"DPO": DPO, "SFT": SFT}


@dataclass(frozen=True)
class Winner:
    """The best agent of a run, on its base.

    Attributes:
        agent: The agent.
        tokenizer: The base's tokenizer.
        run_dir: The run folder.
    """

    agent: SavableAgent
    tokenizer: Any
    run_dir: Path

    def answers(self, prompt: str, max_new_tokens: int = 128, raw: bool = False) -> tuple[str, str]:
        """The likeliest answers of the base and of the agent to what a user says.

        Args:
            prompt: A user's message, written out by the tokenizer's chat template; without a template, the text that
                is to be continued.
            max_new_tokens: Longest answer, in tokens.
            raw: Continue the text as it is, template or not: what rows of strings are learnt from.
        """
        text = prompt
        if not raw and getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # A template writes the BOS itself.
        ids = np.array(self.tokenizer(text, add_special_tokens=text is prompt)["input_ids"], dtype=np.int64)
        base, tuned = (
            greedy_answers(self.agent.base, adapter, [ids], self.tokenizer, max_new_tokens)[0]
            for adapter in (None, self.agent.actor_adapter)
        )
        return base, tuned


def open_winner(
    run_dir: str | os.PathLike[str],
    model: str | None = None,
    trust_remote_code: bool = False,
    elite: str | os.PathLike[str] | None = None,
) -> Winner:
    """Load the best agent of a run.

    Args:
        run_dir: The run folder; the run has ended.
        model: Hub name or folder of the base; None: the one that the run names.
        trust_remote_code: Run code that comes with the base. A run folder cannot ask for it.
        elite: Folder of the best agent, of a run that keeps it outside its folder.

    Raises:
        ConfigurationError: This is no run folder, or the base cannot be loaded.
        CheckpointError: The run has not ended, or its files are damaged.
    """
    record = read_record(run_dir)
    _ = record.best  # Before a model is loaded: the run must have ended.
    known = known_of(run_dir)
    asked = known.settings
    name = model or asked.get("model") or record.config["base"]
    if model is None:
        needed = {"tokenizer", "model_config"} if name else {"model", "tokenizer", "model_config"}
        known.require(needed, run_dir, "give the name or folder of a model that has them (model)")
    if not name:
        raise ConfigurationError("model", None, f"{run_dir} does not name the model that it ran on: give it")
    agent_class = _AGENTS[record.config["algorithm"]]
    if elite is None:
        known.require_places(["elite_path"], run_dir, lambda _, path: f"--elite {shlex.quote(path)}")
        elite = place_of(record.run_dir, known, "elite_path")
    model_config = _model_config(asked, usable_path("elite", elite), trust_remote_code)
    tokenizer = load_tokenizer(asked.get("tokenizer") or name, model_config)
    base: dict[str, Any] = (
        {"model_config": model_config} if model is None else {"actor_network": load_base_model(model, model_config)}
    )
    return Winner(agent_class.load(str(elite), asked.get("device"), **base), tokenizer, record.run_dir)


def _model_config(asked: Mapping[str, Any], elite: Path, trust_remote_code: bool) -> dict[str, Any]:
    """How the base is loaded: as `tune` was asked to, else as the agent's checkpoint says."""
    kept = model_config_of(asked.get("model_config"))
    if kept is None:
        kept = reloadable(read_agent_folder(elite).attributes.get("model_config") or {})
    elif asked.get("dtype") not in (None, AUTO):
        kept = {**kept, "dtype": asked["dtype"]}
    return {**kept, "trust_remote_code": trust_remote_code}


def export(
    run_dir: str | os.PathLike[str],
    to: str | os.PathLike[str],
    what: str = "merged",
    model: str | None = None,
    trust_remote_code: bool = False,
    elite: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the best agent of a run for others to load.

    Args:
        run_dir: The run folder.
        to: Folder to write.
        what: `merged`: a model that transformers loads, with tokenizer and model card; `adapter`: the adapter alone,
            which PEFT loads; `policy`: `policy.pt` of the original DPO repository.
        model: Hub name or folder of the base; None: the one that the run names.
        trust_remote_code: As for `open_winner`.
        elite: Likewise.

    Returns:
        What was written.

    Raises:
        ConfigurationError: Something else lies at `to`, there is no such kind, or the base cannot be merged.
        CheckpointError: The run has not ended, or its files are damaged.
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
        save_merged_model(winner.agent, path, winner.tokenizer, run_dir=winner.run_dir)
    elif what == "adapter":
        save_llm_checkpoint(winner.agent, path)
    else:
        path.mkdir(parents=True, exist_ok=True)
        path = path / "policy.pt"
        save_policy_archive(winner.agent, path)
    return path
