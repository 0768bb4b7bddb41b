"""The model card of a run's best agent, from what lies in the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evollm.errors import CheckpointError
from evollm.hpo import Birth, EvolutionPlan, ancestry, format_value


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
    front += ["tags: [dpo, preference-tuning, lora, evollm]", "---"]
    lines = [
        *front,
        "",
        f"# {hub_name or 'A language model'}, tuned on preferences",
        "",
        f"Tuned with Direct Preference Optimization by evollm {config['versions']['evollm']}: "
        f"{len(config['agents'])} agents, {config['schedule']['total']} steps of {config['data']['batch_size']} pairs.",
        "",
        "## Data",
        "",
        *[f"- {report.splitlines()[0]}" for report in config["data"]["reports"]],
        f"- Digest of all token ids: `{config['data']['fingerprint']}`",
        "",
        "## Scores",
        "",
        *_scores(end),
        "",
        "## Hyperparameters",
        "",
        *_schedule(lineage, end["best"]),
        "",
        f"LoRA: rank {config['lora']['r']}, alpha {config['lora']['lora_alpha']}, "
        f"on {_modules(config['lora']['target_modules'])}.",
    ]
    return "\n".join(lines) + "\n"


def _scores(end: Mapping[str, Any]) -> list[str]:
    if "after_accuracy" not in end:
        return ["No held-out pairs were given."]
    pairs = (
        "pairs that nothing was selected by" if end["split"] == "final" else "the pairs that agents were selected by"
    )
    lines = [f"On {pairs}:", "", "| | before | after |", "|---|---|---|"]
    names = (("accuracy", "preference accuracy"), ("mean_margin", "mean margin (nats)"))
    for key, name in names:
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
