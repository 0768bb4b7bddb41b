"""The console output of a run: a progress bar, a table for each generation, and the result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from evollm.errors import shown
from evollm.hpo import AnyEvaluation, Birth, ancestry, format_value, rank
from evollm.pace import Pace
from evollm.report import few_rows, gain_of
from evollm.runs.events import (
    BaselineScored,
    Callback,
    Checkpointed,
    Evaluated,
    Evolved,
    RunEnded,
    RunStarted,
    StepDone,
)
from evollm.runs.words import Score, Words

BAR_WIDTH = 8
# The hyperparameters that tables show: these always, those below where they differ from their default.
SHOWN = ("lr", "beta", "nll_alpha")
DEFAULTS = {"loss_type": "sigmoid", "label_smoothing": 0.0}


class Console(Callback):
    """Prints to the terminal.

    Args:
        console: Where to print, by default standard output.
    """

    _words: Words

    def __init__(self, console: rich.console.Console | None = None) -> None:
        # Without emoji, since a folder or an answer may contain a text such as :cat:, which rich would replace.
        self._console = console or rich.console.Console(emoji=False)
        # Without a bar, such as in a file, progress is printed as lines.
        self._has_bar = _can_show_bar(self._console)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(BAR_WIDTH),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
            transient=True,
            # In seconds. The default of 30 is too short for steps of half a minute.
            speed_estimate_period=3600,
        )
        self._task: TaskID | None = None
        self._total = 0
        self._pace: Pace | None = None
        self._births: dict[int, Birth] = {}
        self._losses: dict[int, float] = {}
        self._evolutions: list[Evolved] = []
        self._printed_attention: set[str] = {""}

    def on_start(self, event: RunStarted) -> None:
        """Print data, agents, steps and folder of the run, and start the bar."""
        self._births = {birth.index: birth for birth in event.founders}
        for evolution in event.evolutions:
            self._apply(evolution)
        agents = f"{len(self._births)} agent{'s' if len(self._births) > 1 else ''}"
        data, words = event.config["data"], Words.from_dict(event.config["words"])
        self._words = words
        for report in data["reports"]:
            self._print(escape(report))
        base = f"{event.config['base_dtype'].removeprefix('torch.')}, on {event.config['device']}"
        self._print(
            f"{agents} on one base ({base}), {event.total_steps} steps of {data['batch_size']} "
            f"{words.noun}s; folder {escape(str(event.run_dir))}",
            soft_wrap=True,
        )
        held_out = {"test": 0, "final": 0, **event.held_out}
        few = "" if event.step else few_rows(words, agents=len(event.founders), **held_out)
        if few:
            self._print(f"Warning: {few}", soft_wrap=True)
        if event.step:
            self._print(f"resumed after step {event.step}")
        self._total = event.total_steps
        self._task = self._progress.add_task("", total=event.total_steps, completed=event.step)
        if self._has_bar:
            self._progress.start()
        self._phase("training" if event.step else "scoring the untuned model")
        self._pace = Pace(event.total_steps, event.step)

    def on_baseline(self, event: BaselineScored) -> None:
        """Show that training begins."""
        self._phase("training")
        self._pace = Pace(self._total)

    def _phase(self, name: str) -> None:
        """Show the present phase of the run: beside the bar, or as a line if there is no bar."""
        assert self._task is not None
        self._progress.update(self._task, description=name)
        if not self._has_bar:
            self._print(f"{name} ...")

    def on_step(self, event: StepDone) -> None:
        """Advance the bar, or print the progress; and print each attention implementation once."""
        if event.attention not in self._printed_attention:
            self._printed_attention.add(event.attention)
            self._print(f"[dim]attention: {escape(event.attention)}[/dim]", soft_wrap=True)
        self._losses |= {index: metrics["loss"] for index, metrics in event.metrics.items()}
        assert self._task is not None
        assert self._pace is not None
        metrics = batch_line(list(event.metrics.values()))
        self._progress.update(self._task, completed=event.step, description=metrics)
        if not self._has_bar and self._pace.is_due(event.step):
            share = f"{event.step / self._total:.0%}"
            self._print(f"step {event.step} of {self._total} ({share}): {metrics}; {self._pace.left(event.step)}")

    def on_evaluation(self, event: Evaluated) -> None:
        """Print the table of a generation."""
        self._print(generation_table(event, self._births, self._losses, self._words))
        if self._task is not None and event.step == self._total:
            self._phase("final score and sample answers")

    def on_evolution(self, event: Evolved) -> None:
        """Print the parent and the mutations of each agent."""
        self._apply(event)
        for birth in event.plan.births:
            parent = "" if birth.parent is None else f" <- {birth.parent}"
            self._print(f"  agent {birth.index}{parent}  {escape(birth.origin)}", soft_wrap=True)
        left = sorted(event.plan.fitnesses.keys() - {parent for birth in event.plan.births for parent in birth.parents})
        if left and len(event.plan.births) != len(event.plan.fitnesses):
            self._print(f"  without heirs: {', '.join(map(str, left))}", soft_wrap=True)

    def _apply(self, evolution: Evolved) -> None:
        self._evolutions.append(evolution)
        self._births = {birth.index: birth for birth in evolution.plan.births}

    def on_checkpoint(self, event: Checkpointed) -> None:
        """Print the folder of the checkpoint."""
        self._print(f"step {event.step}: population saved in {escape(str(event.path))}", soft_wrap=True)

    def on_end(self, event: RunEnded) -> None:
        """Print the result."""
        self.close()
        if event.stopped:
            self._print(f"Stopped after step {event.step} of {self._total}: {escape(event.stopped)}", soft_wrap=True)
        if event.before is not None and event.after is not None:
            words, scored = self._words, (event.before, event.after)
            self._print(score_lines(words, event.split, *scored, chosen_by_score=len(self._births) > 1), soft_wrap=True)
            self._print(f"The best agent against the start: {gain_of(words, *scored)}", soft_wrap=True)
        if event.best_step < event.step:
            self._print(f"It is agent {event.best} after step {event.best_step} of {event.step}, the best evaluation.")
        for one in event.candidates:
            won = ", and is the result" if one.won else ""
            self._print(f"{one.recipe}: {one.difference:+.4f} against the best agent (p = {one.p_value:.2g}){won}")
        plans = [evolution.plan for evolution in self._evolutions if evolution.step < event.best_step]
        if plans:
            self._print("Its line: " + schedule_line(ancestry(plans, event.best)), soft_wrap=True)
        if event.spent is not None:
            self._print(f"Spent {event.spent}", soft_wrap=True)
        for sample in event.samples:
            self._print(f"\n[bold]{escape(shown(sample.prompt))}[/bold]")
            for label, answer in (("[dim]before:[/dim]", sample.before), ("[green]after:[/green]", sample.after)):
                text = Text.from_markup(f"{label} {escape(shown(answer)) or '(empty)'}", emoji=False)
                self._print(Padding(text, (0, 0, 0, 2)))
        if event.best_path is not None:
            actor = str(event.best_path / "actor")
            self._print(f"\nBest adapter: {escape(actor)}", soft_wrap=True)
            line = f"model = PeftModel.from_pretrained(base_model, {json.dumps(actor, ensure_ascii=False)})"
            self._print(f"Load it with: [bold]{escape(line)}[/bold]", soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._has_bar:
            self._progress.stop()

    def _print(self, what: object, *, soft_wrap: bool = False) -> None:
        self._console.print(what, soft_wrap=soft_wrap, highlight=False, emoji=False)


def _can_show_bar(console: rich.console.Console) -> bool:
    """Whether output goes to a terminal or a notebook; rich's own test can be forced to take a file for a terminal."""
    is_terminal = console.is_terminal and not console.is_dumb_terminal and console.file.isatty()
    return console.is_jupyter or is_terminal


def batch_line(agents: Sequence[Mapping[str, float]]) -> str:
    """Return loss and accuracy on a batch from each agent's metrics: the lowest and the best of several agents."""
    lowest, best = ("lowest ", "best ") if len(agents) > 1 else ("", "")
    line = f"{lowest}loss {min(metrics['loss'] for metrics in agents):.3f}"
    if "rewards/accuracies" in agents[0]:
        line += f", {best}accuracy {max(metrics['rewards/accuracies'] for metrics in agents):.2f}"
    return line


def generation_table(event: Evaluated, births: Mapping[int, Birth], losses: Mapping[int, float], words: Words) -> Table:
    """Return a table with one row for each agent, the fittest first and marked."""
    on = "" if event.rows is None else f", on {event.rows} {words.noun}s"
    title = f"generation {event.generation}, step {event.step}{on}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    shown = [name for name in (*SHOWN, *DEFAULTS) if any(name in _shown_names(one) for one in event.agents.values())]
    for name in ("agent", "parent", *shown, *(score.heading or score.label for score in words.scores), "loss"):
        table.add_column(name, justify="right")
    indices = list(event.fitnesses)
    for index in (indices[position] for position in rank(list(event.fitnesses.values()))):
        values = event.agents[index]
        evaluation = event.evaluations.get(index)
        scores = ["diverged", *[""] * (len(words.scores) - 1)]
        if evaluation is not None:
            scores = [format(evaluation.scores[score.name], score.format_spec) for score in words.scores]
        table.add_row(
            f"* {index}" if index == event.best else str(index),
            " x ".join(map(str, births[index].parents)),
            *(format_value(values[name]) if name in values else "" for name in shown),
            *scores,
            f"{losses[index]:.3f}" if index in losses else "",
            style="bold" if index == event.best else None,
        )
    table.caption = "* the elite"
    return table


def schedule_line(line: Sequence[Birth]) -> str:
    """Return the hyperparameters of an agent's ancestry as text, founder first and without the births of elites."""
    generations = []
    for birth in line:
        if not birth.elite:
            values = birth.hyperparameters
            listed = ", ".join(f"{name} {format_value(values[name])}" for name in _shown_names(values))
            generations.append(f"agent {birth.index} ({listed})")
    return " -> ".join(generations)


def _shown_names(values: Mapping[str, Any]) -> list[str]:
    """The names of an agent's hyperparameters that are shown."""
    changed = [name for name, default in DEFAULTS.items() if values.get(name, default) != default]
    return [name for name in SHOWN if name in values] + changed


def score_lines(words: Words, split: str, before: AnyEvaluation, after: AnyEvaluation, *, chosen_by_score: bool) -> str:
    """Return the scores before and after, and the number and kind of the rows, as text."""
    kind, noun = "final" if split == "final" else "selection", f"{words.noun}s"
    values = [
        (score, f"{before.scores[score.name]:{score.format_spec}} -> {after.scores[score.name]:{score.format_spec}}")
        for score in words.scores
    ]
    (first, value), others = values[0], values[1:]
    lines = f"\nHeld-out {first.label} on {len(after)} {kind} {noun}: [bold]{value}[/bold]{_unit(first)}"
    if others:
        lines += f" ({', '.join(f'{score.heading or score.label} {value}{_unit(score)}' for score, value in others)})"
    if split != "final" and chosen_by_score:
        lines += (
            f"\nThe fittest agent was chosen on these very {noun}; pass final_dataset to the gym for an unbiased score."
        )
    return lines


def _unit(score: Score) -> str:
    return "" if score.is_share or not score.unit else f" {score.unit}"
