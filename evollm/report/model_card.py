"""The model card of a run's best agent, from what lies in the run folder."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evollm.errors import CheckpointError
from evollm.hpo import Birth, format_value
from evollm.runs import Lineage, RunRecord, read_run
from evollm.runs.record import Ended

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        base_name: Hub name or path of the base, as the user gave it; "" of one that was handed in as an object.
        folder: Where the user had it written.
        loader: Class of transformers that loads the base.
        is_adapter: Whether the folder holds the adapter alone, and not a merged model.
        tokenizer: What the tokenizer is loaded from: the folder, or the base.
        has_template: Whether that has a chat template.
        agent: Number of the agent.
        step: Steps done when it was saved in a checkpoint; None: it is the best agent of a run that has ended.
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
        """The base's name on the hub; "" of one that is not from there."""
        return self.base_name if _HUB_NAME.fullmatch(self.base_name) and not Path(self.base_name).exists() else ""


def model_card(run_dir: Path, subject: Subject) -> str:
    """Markdown that says what the model was tuned on, how it is loaded, with which hyperparameters, how it scored.

    Args:
        run_dir: Folder of the run.
        subject: What was written.

    Raises:
        CheckpointError: The folder lacks a file, or the run has not ended and the agent is from no checkpoint of it.
    """
    try:
        record = read_run(run_dir, rows=False)
        if subject.step is not None:
            scores, best = _scores_before_the_end(record, subject.agent, subject.step), subject.agent
        elif record.ended is not None:
            scores, best = _scores(record, record.ended), record.ended.best
        else:
            raise CheckpointError(f"{run_dir}: the run has not ended; resume it with resume_from_checkpoint")
        before = [one for one in record.evolutions if subject.step is None or one.step < subject.step]
        births = [birth for _, birth in Lineage(record.founders, before).ancestry(best)]
        # A line may begin with a fresh agent of a later generation.
        line = list(enumerate(births, start=len(before) + 1 - len(births)))
        return _card(record, line, scores, subject)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{run_dir} is not the folder of a run: {error!r}") from error


def _card(record: RunRecord, line: Sequence[tuple[int, Birth]], scores: list[str], subject: Subject) -> str:
    config, words, hub_name = record.config, record.words, subject.hub_name
    library = "peft" if subject.is_adapter else "transformers"
    front = ["---", *([f"base_model: {hub_name}"] if hub_name else []), f"library_name: {library}"]
    front += [f"tags: [{', '.join(words.tags)}, lora, evollm]", "---"]
    base = f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else f"`{_text(subject.base_name)}`"
    lines = [
        *front,
        "",
        f"# {hub_name or 'A language model'}, {_text(words.title)}",
        "",
        f"Base: {base if subject.base_name else 'a model without a name'}. "
        f"Tuned with {_text(words.method)} by evollm {_text(config['versions']['evollm'])}: "
        f"{len(config['agents'])} agents, {int(config['schedule']['total'])} steps of "
        f"{int(config['data']['batch_size'])} {_text(words.noun)}s.",
        "",
        "## Use",
        "",
        *_use(subject, str(config["data"].get("form", ""))),
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
        *_schedule(line),
        "",
        f"LoRA: rank {int(config['lora']['r'])}, alpha {float(config['lora']['lora_alpha']):g}, "
        f"on {_modules(config['lora']['target_modules'])}.",
    ]
    return "\n".join(lines) + "\n"


def _use(subject: Subject, form: str) -> list[str]:
    """Lines that load what was written and ask it something, in the form of the rows that it has learnt from."""
    loader, folder = subject.loader, json.dumps(subject.folder)
    as_text = form == "text" or not subject.has_template
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
    if subject.is_adapter:
        load = [
            f"base_model = {loader}.from_pretrained({json.dumps(subject.base_name or 'BASE')})",
            f"model = PeftModel.from_pretrained(base_model, {folder})",
        ]
    said = {"chat": "messages, through the chat template", "text": "strings, without a chat template"}
    return [
        *([f"It has learnt from {said[form]}.", ""] if form in said else []),
        "```python",
        *(["from peft import PeftModel"] if subject.is_adapter else []),
        f"from transformers import {loader}, AutoTokenizer",
        "",
        *load,
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(subject.tokenizer or 'BASE')})",
        f"prompt = {question}",
        f"inputs = {encode}",
        "output = model.generate(**inputs, max_new_tokens=64)",
        f"print(tokenizer.decode(output[0{start}], skip_special_tokens=True))",
        "```",
    ]


def _text(value: object) -> str:
    """A text from a file as one that says the same in Markdown, and is no markup."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|").replace("`", "'")


def _scores(record: RunRecord, ended: Ended) -> list[str]:
    rows, before, after = f"{_text(record.words.noun)}s", ended.scores.get("before", {}), ended.scores.get("after", {})
    if not after:
        return [f"No held-out {rows} were given."]
    final = ended.split == "final"
    on = f"{rows} that nothing was selected by" if final else f"the {rows} that agents were selected by"
    head = [f"On {on}:", "", "| | before | after |", "|---|---|---|"]
    named = _score_names(record)
    return [*head, *(f"| {named[name]} | {before[name]:.3f} | {value:.3f} |" for name, value in after.items())]


def _scores_before_the_end(record: RunRecord, agent: int, step: int) -> list[str]:
    """The last scores of an agent from a checkpoint."""
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


def _schedule(line: Sequence[tuple[int, Birth]]) -> list[str]:
    """The line of the best agent: one row for each generation."""
    names = list(line[0][1].hyperparameters)
    lines = [f"| generation | agent | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for generation, birth in line:
        values = " | ".join(_text(format_value(birth.hyperparameters[name])) for name in names)
        lines.append(f"| {generation} | {birth.index} | {values} |")
    return lines


def _modules(modules: object) -> str:
    names = sorted(map(str, modules)) if isinstance(modules, list) else [modules]
    return ", ".join(f"`{_text(name)}`" for name in names)
