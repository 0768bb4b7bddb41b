"""What leaves evollm: an adapter by itself, or the base with the adapter merged into it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from evollm.checkpoints.agent import write_adapter
from evollm.checkpoints.card import model_card
from evollm.checkpoints.files import replace_folder
from evollm.models import SharedBase
from evollm.processes import Processes


def main_writes(write: Callable[[], None], base: SharedBase | None = None) -> None:
    """Let the main process write while the others wait; all call it.

    Args:
        write: Writes.
        base: What it writes weights of; they are whole meanwhile.
    """
    processes = Processes.present()
    with nullcontext() if base is None else base.whole():
        try:
            if processes.is_main:
                write()
        finally:
            # Also when there is no room: who catches that goes on with the others.
            processes.wait()


class HasActor(Protocol):
    """An agent, as far as its actor goes."""

    base: SharedBase

    @property
    def actor_adapter(self) -> str:
        """Name of the actor on the base."""


def save_llm_checkpoint(agent: HasActor, path: str | Path) -> None:
    """Write an agent's tuned adapter alone, to deploy: `PeftModel.from_pretrained(base_model, path)` loads it.

    Args:
        agent: The agent.
        path: Folder to write or replace.
    """

    def write() -> None:
        with replace_folder(path) as folder:
            write_adapter(folder, agent.base.export(agent.actor_adapter), agent.base.name)

    main_writes(write)


def save_merged_model(
    agent: HasActor, path: str | Path, tokenizer: Any | None = None, run_dir: str | Path | None = None
) -> None:
    """Write the base with an agent's adapter merged into it: `AutoModelForCausalLM.from_pretrained(path)` loads it.

    Of an encoder-decoder model, `AutoModelForSeq2SeqLM` does.

    The base in memory stays as it is; the merged weights need as much memory once more while they are written.

    Args:
        agent: The agent.
        path: Folder to write or replace.
        tokenizer: Written beside the model, with its chat template.
        run_dir: The run that tuned the agent; with it the folder gets a model card that states data, schedule of
            hyperparameters and scores.

    Raises:
        ConfigurationError: The base is quantised, or merged weights would not compute what the adapter computes.
        CheckpointError: The run folder cannot be read.
    """
    main_writes(lambda: _write_merged_model(agent, path, tokenizer, run_dir), agent.base)


def _write_merged_model(agent: HasActor, path: str | Path, tokenizer: Any | None, run_dir: str | Path | None) -> None:
    card = None if run_dir is None else model_card(Path(run_dir), agent.base.name)
    with replace_folder(path) as folder:
        agent.base.save_weights(folder, merged=agent.actor_adapter)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
