"""What leaves evollm: an adapter by itself, or the base with the adapter merged into it."""

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
    index: int

    @property
    def actor_adapter(self) -> str:
        """Name of the actor on the base."""


def _check_agent(agent: object) -> None:
    if not hasattr(agent, "actor_adapter"):
        shown = agent if isinstance(agent, str) else type(agent).__name__
        raise ConfigurationError("agent", shown, "must be an agent; of a checkpoint's folder: DPO.load(folder)")


class CanBeSaved(HasActor, Protocol):
    """An agent, as far as its attributes go, too."""

    def to_folder(self, save_optimizer: bool) -> AgentFolder:
        """What a checkpoint holds."""


@explains(SAVE_ADAPTER)
def save_llm_checkpoint(
    agent: CanBeSaved,
    path: str | Path,
    tokenizer: Any | None = None,
    run_dir: str | Path | None = None,
    step: int | None = None,
) -> None:
    """Write an agent's tuned adapter alone, to deploy: `PeftModel.from_pretrained(base_model, path)` loads it.

    So does `agent.load_checkpoint(path)`, as a next stage: the folder has neither reference nor optimizer, so that the
    adapter becomes the reference too. Beside the adapter lies `attributes.pt`, which says on which base it was tuned.

    Args:
        agent: The agent.
        path: Folder to write or replace.
        tokenizer: The base's, for the model card; it is not written.
        run_dir: As for `save_merged_model`.
        step: Likewise.

    Raises:
        ConfigurationError: It is no agent.
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

    Of an encoder-decoder model, `AutoModelForSeq2SeqLM` does.

    The base in memory stays as it is; the merged weights need as much memory once more while they are written.

    Args:
        agent: The agent.
        path: Folder to write or replace.
        tokenizer: Written beside the model, with its chat template.
        run_dir: The run that tuned the agent; with it the folder gets a model card that states base, data, schedule of
            hyperparameters and scores, with the lines that load it.
        step: Steps that the run had done when the agent was saved, of one from a checkpoint; None: it is the best agent
            of a run that has ended.

    Raises:
        ConfigurationError: It is no agent, its base is quantised, or merged weights would not compute what the
            adapter computes.
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
    """The model card of what is written to `path`; None without a run."""
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
