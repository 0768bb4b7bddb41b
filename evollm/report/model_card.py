"""The model card of a run's best agent, from the run folder."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evollm.errors import CheckpointError
from evollm.hpo import Birth, format_value
from evollm.runs import RunRecord, read_run
from evollm.runs.record import Ended

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ExportedModel:
    """The model that a card describes.

    Attributes:
        base_name: Hub name or path of the base, as the user gave it; "" if the base was given as an object.
        folder: The folder of the model, as the user gave it.
        loader: Class of transformers that loads the base.
        is_adapter: Whether the folder has the adapter alone, and not a merged model.
        tokenizer: The folder or hub name that the tokenizer is loaded from.
        has_template: Whether the tokenizer has a chat template.
        agent: Index of the agent.
        step: Steps done when the agent's checkpoint was saved; None: it is the best agent of a run that has ended.
    """

    base_name: str
    folder: str
    loader: str
    is_adapter: bool
    tokenizer: str
    has_template: bool
    agent: int
    step: int | None = None

    @property
    def hub_name(self) -> str:
        """The base's name on the hub; "" if it is a path or has no name."""
        return self.base_name if _HUB_NAME.fullmatch(self.base_name) and not Path(self.base_name).exists() else ""


def model_card(run_dir: Path, model: ExportedModel) -> str:
    """Return Markdown with the model's base, data, use, scores and hyperparameters.

    Args:
        run_dir: Folder of the run.
        model: The model that was written.

    Raises:
        CheckpointError: The folder lacks a file, or the run has not ended and `model.step` is None.
    """
    try:
        record = read_run(run_dir, rows=False)
        if model.step is not None:
            scores, best = _scores_of_checkpoint(record, model.agent, model.step), model.agent
        elif record.ended is not None:
            scores, best = _scores(record, record.ended), record.ended.best
        else:
            raise CheckpointError(f"{run_dir}: the run has not ended; resume it with resume_from_checkpoint")
        lineage = record.lineage.before(record.winner_step if model.step is None else model.step)
        births = [birth for _, birth in lineage.ancestry(best)]
        # If the oldest ancestor is a fresh agent, its generation is not the first.
        line = list(enumerate(births, start=len(lineage.evolutions) + 1 - len(births)))
        return _card(record, line, scores, model)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{run_dir} is not the folder of a run: {error!r}") from error


def _card(record: RunRecord, line: Sequence[tuple[int, Birth]], scores: list[str], model: ExportedModel) -> str:
    config, words, hub_name = record.config, record.words, model.hub_name
    library = "peft" if model.is_adapter else "transformers"
    base = f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else f"`{_text(model.base_name)}`"
    modules = config["lora"]["target_modules"]
    targets = sorted(map(str, modules)) if isinstance(modules, list) else [modules]
    lines = [
        "---",
        *([f"base_model: {hub_name}"] if hub_name else []),
        f"library_name: {library}",
        f"tags: [{', '.join(words.tags)}, lora, evollm]",
        "---",
        "",
        f"# {hub_name or 'A language model'}, {_text(words.title)}",
        "",
        f"Base: {base if model.base_name else 'a model without a name'}. "
        f"Tuned with {_text(words.method)} by evollm {_text(config['versions']['evollm'])}: "
        f"{len(config['agents'])} agents, {int(config['schedule']['total'])} steps of "
        f"{int(config['data']['batch_size'])} {_text(words.noun)}s.",
        "",
        "## Use",
        "",
        *_use(model, str(config["data"].get("form", ""))),
        "",
        "## Data",
        "",
        *[f"- {_text(report.splitlines()[0])}" for report in config["data"]["reports"]],
        f"- Digest of all token ids: `{_text(config['data']['fingerprint'])}`",
        "",
        "## Scores",
        "",
        *scores,
        "",
        "## Hyperparameters",
        "",
        *_hyperparameter_table(line),
        "",
        f"LoRA: rank {int(config['lora']['r'])}, alpha {float(config['lora']['lora_alpha']):g}, "
        f"on {', '.join(f'`{_text(name)}`' for name in targets)}.",
    ]
    return "\n".join(lines) + "\n"


def _use(model: ExportedModel, form: str) -> list[str]:
    """Python code that loads the model and generates an answer; `form` is that of the training rows, chat or text."""
    loader, folder = model.loader, json.dumps(model.folder)
    as_text = form == "text" or not model.has_template
    question = '"What is tea?"'
    if not as_text:
        question = f'[{{"role": "user", "content": {question}}}]'
    encode = 'tokenizer(prompt, return_tensors="pt")'
    if not as_text:
        encode = (
            "tokenizer.apply_chat_template(\n"
            '    prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
        )
    start = "" if loader == "AutoModelForSeq2SeqLM" else ', inputs["input_ids"].shape[1] :'
    load = [f"model = {loader}.from_pretrained({folder})"]
    if model.is_adapter:
        load = [
            f"base_model = {loader}.from_pretrained({json.dumps(model.base_name or 'BASE')})",
            f"model = PeftModel.from_pretrained(base_model, {folder})",
        ]
    forms = {"chat": "messages, through the chat template", "text": "strings, without a chat template"}
    return [
        *([f"It has learnt from {forms[form]}.", ""] if form in forms else []),
        "```python",
        *(["from peft import PeftModel"] if model.is_adapter else []),
        f"from transformers import {loader}, AutoTokenizer",
        "",
        *load,
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(model.tokenizer or 'BASE')})",
        f"prompt = {question}",
        f"inputs = {encode}",
        "output = model.generate(**inputs, max_new_tokens=64)",
        f"print(tokenizer.decode(output[0{start}], skip_special_tokens=True))",
        "```",
    ]


def _text(value: object) -> str:
    """Escape a text from a file for Markdown, on one line."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|").replace("`", "'")


def _scores(record: RunRecord, ended: Ended) -> list[str]:
    rows, before, after = f"{_text(record.words.noun)}s", ended.scores.get("before", {}), ended.scores.get("after", {})
    if not after:
        return [f"No held-out {rows} were given."]
    final = ended.split == "final"
    on = f"{rows} that nothing was selected by" if final else f"the {rows} that agents were selected by"
    total = record.config["schedule"]["total"]
    at = (
        f"After step {ended.best_step} of {int(total)}, the best evaluation, on"
        if ended.best_step < ended.step
        else "On"
    )
    head = [f"{at} {on}:", "", "| | before | after |", "|---|---|---|"]
    named = _score_names(record)
    return [*head, *(f"| {named[name]} | {before[name]:.3f} | {value:.3f} |" for name, value in after.items())]


def _scores_of_checkpoint(record: RunRecord, agent: int, step: int) -> list[str]:
    """The last scores of an agent before its checkpoint was saved."""
    saved = f"The run had not ended: this is agent {agent} after step {step} of {record.config['schedule']['total']}"
    own = [scored for scored in record.evaluations if scored.agent == agent and scored.step <= step]
    if not own or not own[-1].scores:
        return [f"{saved}, which has not been scored."]
    on = f"On the {_text(record.words.noun)}s that agents were selected by:"
    head = [f"{saved}. {on}", "", f"| | after step {own[-1].step} |", "|---|---|"]
    named = _score_names(record)
    return [*head, *(f"| {named[name]} | {value:.3f} |" for name, value in own[-1].scores.items())]


def _score_names(record: RunRecord) -> dict[str, str]:
    return {score.name: _text(score.in_full or score.title) for score in record.words.scores}


def _hyperparameter_table(line: Sequence[tuple[int, Birth]]) -> list[str]:
    """The hyperparameters of the agent's ancestry: one row for each generation."""
    names = list(line[0][1].hyperparameters)
    lines = [f"| generation | agent | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for generation, birth in line:
        values = " | ".join(_text(format_value(birth.hyperparameters[name])) for name in names)
        lines.append(f"| {generation} | {birth.index} | {values} |")
    return lines
