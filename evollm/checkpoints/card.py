"""The model card of a run's best agent, from what lies in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evollm.errors import CheckpointError
from evollm.hpo import Birth, EvolutionPlan, ancestry, format_value


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
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        lineage = list(_lines(run_dir / "lineage.jsonl"))
        end = next((line for line in _lines(run_dir / "metrics.jsonl") if line["kind"] == "end"), None)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{run_dir} is not the folder of a run: {error}") from error
    if end is None:
        raise CheckpointError(f"{run_dir}: the run has not ended; resume it with resume_from_checkpoint")
    # A path on somebody's machine says nothing to others.
    hub_name = base_name if base_name and not Path(base_name).exists() else ""
    front = ["---", *([f"base_model: {hub_name}"] if hub_name else []), "library_name: transformers"]
    stage = _STAGES[config["algorithm"]]
    front += [f"tags: [{stage.tags}, lora, evollm]", "---"]
    lines = [
        *front,
        "",
        f"# {hub_name or 'A language model'}, {stage.title}",
        "",
        f"Tuned with {stage.method} by evollm {config['versions']['evollm']}: "
        f"{len(config['agents'])} agents, {config['schedule']['total']} steps of "
        f"{config['data']['batch_size']} {stage.rows}.",
        "",
        "## Data",
        "",
        *[f"- {report.splitlines()[0]}" for report in config["data"]["reports"]],
        f"- Digest of all token ids: `{config['data']['fingerprint']}`",
        "",
        "## Scores",
        "",
        *_scores(end, stage.rows),
        "",
        "## Hyperparameters",
        "",
        *_schedule(lineage, end["best"]),
        "",
        f"LoRA: rank {config['lora']['r']}, alpha {config['lora']['lora_alpha']}, "
        f"on {_modules(config['lora']['target_modules'])}.",
    ]
    return "\n".join(lines) + "\n"


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


def _schedule(lineage: list[dict[str, Any]], best: int) -> list[str]:
    """The line of the best agent: one row for each generation."""
    plans = [EvolutionPlan.from_dict(line) for line in lineage if line["kind"] == "evolution"]
    births = ancestry(plans, best)
    if not births:
        founders = [
            Birth.from_dict(birth) for line in lineage if line["kind"] == "founders" for birth in line["births"]
        ]
        births = [birth for birth in founders if birth.index == best]
    names = list(births[0].hyperparameters)
    lines = [f"| generation | agent | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for generation, birth in enumerate(births):
        values = " | ".join(format_value(birth.hyperparameters[name]) for name in names)
        lines.append(f"| {generation} | {birth.index} | {values} |")
    return lines


def _modules(modules: object) -> str:
    return ", ".join(f"`{name}`" for name in sorted(modules)) if isinstance(modules, list) else f"`{modules}`"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)
