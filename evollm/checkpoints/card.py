"""The model card of a run's best agent, from what lies in the run folder."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
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


def model_card(run_dir: Path, base_name: str) -> str:
    """Markdown that says what the model was tuned on, with which hyperparameters, and how it scored.

    Args:
        run_dir: Folder of a run that has ended.
        base_name: Hub name or path of the base.

    Raises:
        CheckpointError: The folder lacks a file, or the run has not ended.
    """
    try:
        config = json.loads(read_bytes(inside(run_dir, CONFIG)))
        lineage = read_lineage(run_dir)
        end = next((line for line in read_lines(inside(run_dir, METRICS)) if line["kind"] == "end"), None)
        if end is None:
            raise CheckpointError(f"{run_dir}: the run has not ended; resume it with resume_from_checkpoint")
        return _card(config, lineage, end, base_name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{run_dir} is not the folder of a run: {error!r}") from error


def _card(config: Mapping[str, Any], lineage: Lineage, end: Mapping[str, Any], base_name: str) -> str:
    # A path on somebody's machine says nothing to others.
    hub_name = base_name if _HUB_NAME.fullmatch(base_name) and not Path(base_name).exists() else ""
    front = ["---", *([f"base_model: {hub_name}"] if hub_name else []), "library_name: transformers"]
    stage = _STAGES[config["algorithm"]]
    front += [f"tags: [{stage.tags}, lora, evollm]", "---"]
    lines = [
        *front,
        "",
        f"# {hub_name or 'A language model'}, {stage.title}",
        "",
        f"Tuned with {stage.method} by evollm {_text(config['versions']['evollm'])}: "
        f"{len(config['agents'])} agents, {int(config['schedule']['total'])} steps of "
        f"{int(config['data']['batch_size'])} {stage.rows}.",
        "",
        "## Data",
        "",
        *[f"- {_text(report.splitlines()[0])}" for report in config["data"]["reports"]],
        f"- Digest of all token ids: `{_text(config['data']['fingerprint'])}`",
        "",
        "## Scores",
        "",
        *_scores(end, stage.rows),
        "",
        "## Hyperparameters",
        "",
        *_schedule(lineage, end["best"]),
        "",
        f"LoRA: rank {int(config['lora']['r'])}, alpha {float(config['lora']['lora_alpha']):g}, "
        f"on {_modules(config['lora']['target_modules'])}.",
    ]
    return "\n".join(lines) + "\n"


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
