"""Exports of an agent: its adapter alone, or the base with the adapter merged into it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from evollm.checkpoints.agent import AgentFolder, write_adapter, write_attributes
from evollm.checkpoints.atomic import replace_folder
from evollm.errors import ConfigurationError
from evollm.foreign import SAVE_ADAPTER, explains
from evollm.models import SharedBase
from evollm.models.adapters.merging import save_base
from evollm.models.loading.pretrained import auto_class
from evollm.processes import Processes
from evollm.report.model_card import ExportedModel, model_card


def main_writes(write: Callable[[], None], base: SharedBase | None = None) -> None:
    """Call `write` in the main process while the other processes wait; all processes must call this function.

    Args:
        write: Writes the files.
        base: The base whose weights are written; those of a sharded base are gathered during the call.
    """
    processes = Processes.present()
    with nullcontext() if base is None else base.whole():
        try:
            if processes.is_main:
                write()
        finally:
            # Also after an error, since a caller that catches it goes on with the other processes.
            processes.wait()


class HasActor(Protocol):
    """An agent whose actor can be merged into its base."""

    base: SharedBase
    index: int

    @property
    def actor_adapter(self) -> str:
        """Name of the actor's adapter on the base."""


def _check_agent(agent: object) -> None:
    if not hasattr(agent, "actor_adapter"):
        shown = agent if isinstance(agent, str) else type(agent).__name__
        raise ConfigurationError("agent", shown, "must be an agent; of a checkpoint's folder: DPO.load(folder)")


class CanBeSaved(HasActor, Protocol):
    """An agent that can be saved."""

    def to_folder(self, save_optimizer: bool) -> AgentFolder:
        """The contents of a checkpoint folder."""


@explains(SAVE_ADAPTER)
def save_llm_checkpoint(
    agent: CanBeSaved,
    path: str | Path,
    tokenizer: Any | None = None,
    run_dir: str | Path | None = None,
    step: int | None = None,
) -> None:
    """Write an agent's tuned adapter alone, to deploy: `PeftModel.from_pretrained(base_model, path)` loads it.

    `agent.load_checkpoint(path)` loads it for a next stage of training: since the folder has neither reference nor
    optimizer, the adapter becomes the reference, too. The file `attributes.pt` beside the adapter identifies its base.

    Args:
        agent: The agent.
        path: Folder to write or replace.
        tokenizer: The base's tokenizer, for the model card; it is not written.
        run_dir: As for `save_merged_model`.
        step: As for `save_merged_model`.

    Raises:
        ConfigurationError: `agent` is not an agent.
    """
    _check_agent(agent)
    saved = agent.to_folder(save_optimizer=False)

    def write() -> None:
        card = _card(agent, path, tokenizer, run_dir, step, is_adapter=True)
        with replace_folder(path) as folder:
            write_adapter(folder, saved.adapter("actor"), agent.base.name)
            write_attributes(folder, saved)
            _write_card(folder, card)

    main_writes(write)


def save_merged_model(
    agent: HasActor,
    path: str | Path,
    tokenizer: Any | None = None,
    run_dir: str | Path | None = None,
    step: int | None = None,
) -> None:
    """Write the base with an agent's adapter merged into it: `AutoModelForCausalLM.from_pretrained(path)` loads it.

    An encoder-decoder model is loaded by `AutoModelForSeq2SeqLM`. The base in memory is not changed; during the call
    the merged weights take as much memory again.

    Args:
        agent: The agent.
        path: Folder to write or replace.
        tokenizer: Tokenizer to write beside the model, with its chat template.
        run_dir: The run that tuned the agent; with it the folder gets a model card with base, data, hyperparameters,
            scores and the code that loads the model.
        step: Steps done when the agent's checkpoint was saved; None: it is the best agent of a run that has ended.

    Raises:
        ConfigurationError: `agent` is not an agent, its base is quantised, or the merged weights would not compute the
            same as the adapter.
        CheckpointError: The run folder cannot be read.
    """
    _check_agent(agent)

    def write() -> None:
        card = _card(agent, path, tokenizer, run_dir, step, is_adapter=False)
        with replace_folder(path) as folder:
            save_base(agent.base, folder, merged=agent.actor_adapter)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            _write_card(folder, card)

    main_writes(write, agent.base)


def _card(
    agent: HasActor,
    path: str | Path,
    tokenizer: Any | None,
    run_dir: str | Path | None,
    step: int | None,
    *,
    is_adapter: bool,
) -> str | None:
    """Return the model card of the model in `path`; None without a run."""
    if run_dir is None:
        return None
    name = agent.base.name
    model = ExportedModel(
        base_name=name,
        folder=str(path),
        loader=auto_class(agent.base.network.config).__name__,
        is_adapter=is_adapter,
        tokenizer=str(path) if tokenizer is not None and not is_adapter else name,
        has_template=bool(getattr(tokenizer, "chat_template", None)),
        agent=agent.index,
        step=step,
    )
    return model_card(Path(run_dir), model)


def _write_card(folder: Path, card: str | None) -> None:
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
