"""The HTML page: the values that its template is rendered with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from evollm.hpo import format_value
from evollm.report.family_tree import MAX_BOXED_GENERATIONS, tree_picture
from evollm.report.findings import compare, headline, kind_of_rows
from evollm.report.hyperparameter_figures import hyperparameter_pictures
from evollm.report.score_figures import final_pictures, held_out_pictures, last_evaluation_pictures
from evollm.report.statistics import RESAMPLES
from evollm.report.style import Picture, drawing
from evollm.report.training_figures import resource_pictures, time_spent, training_pictures
from evollm.report.where import where_it_ran
from evollm.runs.events import Candidate
from evollm.runs.record import CUT, RunRecord

# A longer line of agents is not written out.
MAX_WRITTEN_AGENTS = 8
_SECTIONS = ("settings", "hp_config", "agents", "lora", "options", "schedule", "data", "versions")


def render(record: RunRecord) -> tuple[str, list[Picture]]:
    """Write the page.

    Returns:
        The HTML, and the pictures in it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with drawing():
        final = _final(record)
        tree = _tree(record)
        schedules = hyperparameter_pictures(record)
        held_out = _held_out(record)
        training = _training(record)
        resources = _resources(record)
    # Texts of models and users are escaped; only the pictures are inserted as markup.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("evollm.report").joinpath("page.html").read_text(encoding="utf-8"))
    samples = record.ended.samples if record.ended else ()
    html = template.render(
        title=_title(record),
        facts=_facts(record),
        headline=headline(record, compare(record)),
        final=final,
        samples=samples,
        cut=any(answer.endswith(CUT) for sample in samples for answer in (sample.before, sample.after)),
        tree=tree,
        schedules=schedules,
        held_out=held_out,
        training=training,
        resources=resources,
        where=where_it_ran(record),
        data=record.config["data"]["reports"],
        settings=_settings(record.config),
    )
    groups = [section["pictures"] for section in (final, held_out, training, resources) if section]
    pictures = [picture for group in groups for picture in group] + schedules + ([tree["picture"]] if tree else [])
    return html, pictures


def _title(record: RunRecord) -> str:
    name = Path(str(record.config.get("base") or "")).name or "A language model"
    size = len(record.founders)
    how = f"{record.words.name} by a population of {size}" if size > 1 else record.words.name
    return f"{name}: {how}"


def _facts(record: RunRecord) -> str:
    config, batch = record.config, record.config["data"].get("batch_size")
    facts = [_counted(len(record.founders), "agent")]
    if record.evolutions:
        facts.append(_counted(len(record.generations), "generation"))
    facts.append(f"{_counted(record.last_step, 'step')}" + (f" of {batch} {record.words.noun}s" if batch else ""))
    if record.timings:
        facts.append(duration(sum(timing.seconds for timing in record.timings)))
    facts += [str(config["device"])] if config.get("device") else []
    version = config.get("versions", {}).get("evollm")
    return f"{', '.join(facts)}. Run folder {record.path.resolve().name}" + (f", evollm {version}." if version else ".")


def _final(record: RunRecord) -> dict[str, Any] | None:
    ended = record.ended
    if ended is None or not ended.pairs:
        return None
    unbiased = ended.split == "final"
    earlier = f"step {ended.best_step}" if ended.best_step < ended.step else ""
    winner = ", ".join(filter(None, ["tuned" if len(record.lives) == 1 else f"winner ({ended.best})", earlier]))
    runner_up = f"{'best at the end' if earlier else 'runner-up'} ({ended.runner_up})"
    names = {"before": "untuned", "runner_up": runner_up, "after": winner}
    rows = []
    for one in compare(record):
        difference, interval = one.written()
        row = {"against": one.against, "score": one.score.label, "difference": difference, "interval": interval}
        tone = one.verdict if one.verdict in ("better", "worse") else "open"
        rows.append(row | {"verdict": one.verdict, "tone": tone})
    text = f"Measured on {kind_of_rows(record)}. "
    text += f"{record.words.on_scores} " if record.words.on_scores else ""
    noun = record.words.noun
    text += (
        f"Differences are paired, with bootstrap intervals ({RESAMPLES:,} draws of the {noun}s). They tell of "
        f"the choice of {noun}s alone; another seed is not in them."
    )
    return {
        "title": f"Final score on unseen {noun}s" if unbiased else "Score at the end",
        "text": text,
        "who": "winner" if len(record.lives) > 1 else "tuned model",
        "rows": rows,
        "candidates": [_candidate(record, one) for one in ended.candidates],
        "pictures": final_pictures(record.words, ended.pairs, names, unbiased=unbiased),
    }


def _candidate(record: RunRecord, one: Candidate) -> dict[str, str]:
    """A row of the table of candidates."""
    scores = [
        f"{score.label} {one.scores[score.name]:.4g}" for score in record.words.scores if score.name in one.scores
    ]
    return {
        "name": str(one.recipe),
        "scores": ", ".join(scores),
        "difference": f"{one.difference:+.4f}",
        "p_value": f"{one.p_value:.2g}",
        "verdict": "the result" if one.won else "",
    }


def _tree(record: RunRecord) -> dict[str, Any] | None:
    if not record.evolutions:
        return None
    return {
        "picture": tree_picture(record),
        "score": f"held-out {' and '.join(score.label for score in record.words.shown)}",
        "line": _line(record),
        "mark": "box" if len(record.generations) <= MAX_BOXED_GENERATIONS else "dot",
    }


def _line(record: RunRecord) -> str:
    """The winner's line as text; for a long line its length and its ends."""
    if len(record.line) > MAX_WRITTEN_AGENTS:
        first, last = (f"agent {record.line[end].birth.index}" for end in (0, -1))
        return f"{len(record.line)} agents long, from {first} to {last}"
    agents = []
    for birth in (life.birth for life in record.line):
        changes = [
            f"{one.name} from {format_value(one.before)} to {format_value(one.after)}" for one in birth.mutations
        ]
        agents.append(f"agent {birth.index}" + (f" ({', '.join(changes)})" if changes else ""))
    return ", then ".join(agents)


def _held_out(record: RunRecord) -> dict[str, Any] | None:
    pictures = held_out_pictures(record) + last_evaluation_pictures(record)
    if not pictures:
        return None
    counts = sorted({len(scored.pairs) for scored in record.evaluations if scored.pairs is not None})
    number = f"{counts[0]} to {counts[-1]} " if len(counts) > 1 else f"{counts[0]} " if counts else ""
    rows = f"the same {number}{record.words.noun}s"
    text = f"The agent on {rows}"
    if len(record.lives) > 1:
        text = f"Every agent by itself on {rows}, which the selection goes by"
    bands = "" if not counts else "; bands and bars are 95 % intervals over them"
    return {"text": f"{text}{bands}.", "pictures": pictures}


def _training(record: RunRecord) -> dict[str, Any]:
    text = "What was reported of each batch."
    if len(record.lives) > 1:
        text = "What each agent reported of each batch; all see the same ones."
        text += f" {record.words.on_training}" if record.words.on_training else ""
    return {"text": text, "pictures": training_pictures(record)}


def _resources(record: RunRecord) -> dict[str, Any] | None:
    spent = time_spent(record.timings)
    if not spent:
        return None
    steps = [timing.seconds for timing in record.timings if timing.kind == "step"]
    highest = max(timing.resident_bytes for timing in record.timings) / 2**30
    text = f"{duration(sum(spent.values()))} in all"
    text += f", {sum(steps) / len(steps):.2f} s a step" if steps else ""
    text += f"; at most {highest:.2f} GiB of memory were seen, which is looked at after each of these events."
    resumed = sum(timing.kind == "start" for timing in record.timings) - 1
    if resumed > 0:
        text += f" The run was resumed {'once' if resumed == 1 else f'{resumed} times'}; lost steps are not counted."
    if record.spent:
        text += f" It spent {record.spent[-1][1]}."
    return {"text": text, "pictures": resource_pictures(record)}


def duration(seconds: float) -> str:
    """Return a time as text: `1 h 2 min`, `3 min 4 s` or `5.6 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """All settings of the run as text: those outside of sections first, then section by section."""
    sections = [("run", [(name, _as_text(value)) for name, value in config.items() if not isinstance(value, dict)])]
    for name in _SECTIONS:
        section = config.get(name)
        if isinstance(section, dict) and section:
            rows = [(str(key), _as_text(value)) for key, value in section.items() if key != "reports"]
            sections.append((name, rows))
    return sections


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return format_value(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
