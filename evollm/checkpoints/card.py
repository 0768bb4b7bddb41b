"""The model card of a run's best agent, from what lies in the run folder."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evollm.errors import CheckpointError
from evollm.hpo import ancestry, format_value
from evollm.own_files import inside, read_bytes
from evollm.runs import Lineage, read_lineage, read_lines
from evollm.runs.folder import CONFIG, METRICS


@dataclass(frozen=True)
class _Stage:
    """How a card speaks of a kind of run."""

    title: str
    method: str
    tags: str
    rows: str


_STAGES = {
    "DPO": _Stage("tuned on preferences", "Direct Preference Optimization", "dpo, preference-tuning", "pairs"),
    "SFT": _Stage("tuned on completions", "supervised fine-tuning", "sft", "examples"),
}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SCORES = {
    "accuracy": "preference accuracy",
    "mean_margin": "mean margin (nats)",
    "loss": "loss (nats per completion token)",
    "perplexity": "perplexity",
}


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
        config = json.loads(read_bytes(inside(run_dir, CONFIG)))
        lineage = read_lineage(run_dir)
        lines = read_lines(inside(run_dir, METRICS))
        end = next((line for line in lines if line["kind"] == "end"), None)
        if end is None and subject.step is None:
            raise CheckpointError(f"{run_dir}: the run has not ended; resume it with resume_from_checkpoint")
        rows = _STAGES[config["algorithm"]].rows
        if subject.step is None:
            assert end is not None
            scores, best, step = _scores(end, rows), int(end["best"]), None
        else:
            best, step = subject.agent, subject.step
            scores = _scores_before_the_end(lines, best, step, int(config["schedule"]["total"]), rows)
        before = [(at, plan) for at, plan in lineage.evolutions if step is None or at < step]
        return _card(config, Lineage(lineage.founders, before), scores, best, subject)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{run_dir} is not the folder of a run: {error!r}") from error


def _card(config: Mapping[str, Any], lineage: Lineage, scores: list[str], best: int, subject: Subject) -> str:
    hub_name = subject.hub_name
    library = "peft" if subject.is_adapter else "transformers"
    front = ["---", *([f"base_model: {hub_name}"] if hub_name else []), f"library_name: {library}"]
    stage = _STAGES[config["algorithm"]]
    front += [f"tags: [{stage.tags}, lora, evollm]", "---"]
    base = f"[{hub_name}](https://huggingface.co/{hub_name})" if hub_name else f"`{_text(subject.base_name)}`"
    lines = [
        *front,
        "",
        f"# {hub_name or 'A language model'}, {stage.title}",
        "",
        f"Base: {base if subject.base_name else 'a model without a name'}. "
        f"Tuned with {stage.method} by evollm {_text(config['versions']['evollm'])}: "
        f"{len(config['agents'])} agents, {int(config['schedule']['total'])} steps of "
        f"{int(config['data']['batch_size'])} {stage.rows}.",
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
        *_schedule(lineage, best),
        "",
        f"LoRA: rank {int(config['lora']['r'])}, alpha {float(config['lora']['lora_alpha']):g}, "
        f"on {_modules(config['lora']['target_modules'])}.",
    ]
    return "\n".join(lines) + "\n"


def _use(subject: Subject, form: str) -> list[str]:
    """Lines that load what was written and ask it something, in the form of the rows that it has learnt from."""
    loader, folder = subject.loader, _literal(subject.folder)
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
            f"base_model = {loader}.from_pretrained({_literal(subject.base_name or 'BASE')})",
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
        f"tokenizer = AutoTokenizer.from_pretrained({_literal(subject.tokenizer or 'BASE')})",
        f"prompt = {question}",
        f"inputs = {encode}",
        "output = model.generate(**inputs, max_new_tokens=64)",
        f"print(tokenizer.decode(output[0{start}], skip_special_tokens=True))",
        "```",
    ]


def _literal(text: str) -> str:
    """A text as Python and Markdown have it."""
    return json.dumps(text)


def _text(value: object) -> str:
    """A text from a file as one that says the same in Markdown, and is no markup."""
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|").replace("`", "'")


def _scores(end: Mapping[str, Any], rows: str) -> list[str]:
    found = {key: name for key, name in _SCORES.items() if f"after_{key}" in end}
    if not found:
        return [f"No held-out {rows} were given."]
    final = end["split"] == "final"
    on = f"{rows} that nothing was selected by" if final else f"the {rows} that agents were selected by"
    lines = [f"On {on}:", "", "| | before | after |", "|---|---|---|"]
    for key, name in found.items():
        lines.append(f"| {name} | {float(end[f'before_{key}']):.3f} | {float(end[f'after_{key}']):.3f} |")
    return lines


def _scores_before_the_end(
    lines: Sequence[Mapping[str, Any]], agent: int, step: int, total: int, rows: str
) -> list[str]:
    """The last scores of an agent from a checkpoint."""
    scored = [line for line in lines if line["kind"] == "evaluation" and line["step"] <= step]
    own = [line for line in scored if line["agent"] == agent]
    saved = f"The run had not ended: this is agent {agent} after step {step} of {total}"
    found = {key: name for key, name in _SCORES.items() if own and key in own[-1]}
    if not found:
        return [f"{saved}, which has not been scored."]
    at = int(own[-1]["step"])
    head = [f"{saved}. On the {rows} that agents were selected by:", "", f"| | after step {at} |", "|---|---|"]
    return [*head, *(f"| {name} | {float(own[-1][key]):.3f} |" for key, name in found.items())]


def _schedule(lineage: Lineage, best: int) -> list[str]:
    """The line of the best agent: one row for each generation."""
    births = ancestry([plan for _, plan in lineage.evolutions], best)
    if not births:
        births = [birth for birth in lineage.founders if birth.index == best]
    names = list(births[0].hyperparameters)
    lines = [f"| generation | agent | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for generation, birth in enumerate(births):
        values = " | ".join(_text(format_value(birth.hyperparameters[name])) for name in names)
        lines.append(f"| {generation} | {birth.index} | {values} |")
    return lines


def _modules(modules: object) -> str:
    names = sorted(map(str, modules)) if isinstance(modules, list) else [modules]
    return ", ".join(f"`{_text(name)}`" for name in names)
