"""Prints an inspection to the terminal."""

from __future__ import annotations

from collections.abc import Mapping

import rich.console
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evollm.data.prompt_rows import PROMPTS
from evollm.data.row_report import listed
from evollm.data.unpaired_rows import Balance
from evollm.inspection.forecast import Forecast
from evollm.inspection.result import Inspection, RenderedRow, SetShare
from evollm.names import row_name

MOST_CHARACTERS = 600
UNPAIRED = (
    "Rows with a label (unpaired preferences): used for SFT, on the completions that are labelled good alone; KTO "
    "(algorithm: kto) learns from all that have a prompt"
)

NO_FORECAST = (
    "\nNo estimate: what GRPO takes depends on its answers, group_size of them to a prompt, each of up to "
    "max_completion_length tokens"
)


def print_inspection(inspection: Inspection, console: rich.console.Console | None = None) -> None:
    """Print an inspection; scored tokens are marked by bars as well as by colour."""
    console = console or rich.console.Console()

    def say(what: object) -> None:
        console.print(what, highlight=False, soft_wrap=isinstance(what, str))

    report = inspection.report
    for line in _rows_lines(inspection):
        say(escape(line))
    if not report.kept:
        return
    say(_length_table(inspection))
    if inspection.sets:
        say(_set_table(inspection.sets))
    for line in _token_lines(inspection):
        say(line)
    say("\n" + _repetition_line(inspection))
    if inspection.chosen_longer is not None:
        say(
            f"The chosen side is longer in {inspection.chosen_longer:.0%} of the pairs, the rejected one in "
            f"{inspection.rejected_longer:.0%}"
        )
    for example in inspection.examples:
        _say_example(console, example)
    if inspection.forecast is not None:
        say("\n" + _forecast_lines(inspection.forecast))
    elif _is_prompts(inspection):
        say(NO_FORECAST)


def _rows_lines(inspection: Inspection) -> list[str]:
    """The columns that are read, and the numbers of kept and dropped rows."""
    report = inspection.report
    read = ", ".join(name if name == role else f"{name} as {role}" for role, name in inspection.columns.items())
    lines = [f"Columns read: {read}"]
    if inspection.unused:
        what = "Columns for the reward functions" if _is_prompts(inspection) else "Columns not used"
        lines.append(f"{what}: {', '.join(inspection.unused)}")
    if report.noun == "example" and "label" in inspection.columns:
        lines.append(UNPAIRED)
    if inspection.balance is not None:
        lines.append(_balance_line(inspection.balance))
    lines.append(f"{report.kept} {report.noun}{'' if report.kept == 1 else 's'} kept, {report.num_dropped} dropped")
    for reason, (count, rows) in report.dropped.items():
        lines.append(f"  {count} {reason}: {listed(count, rows)}")
    lines += [f"Warning: {warning}" for warning in report.warnings]
    return lines + ([f"  For turns of it {report.template_hint}"] if report.template_hint else [])


def _is_prompts(inspection: Inspection) -> bool:
    return inspection.report.noun == PROMPTS.noun


def _set_table(sets: Mapping[str, SetShare]) -> Table:
    table = Table(title="\nsets", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "weight", "rows", "dropped", "rows in an epoch", "share", "share of tokens", "times each row"):
        table.add_column(name, justify="right" if name else "left")
    rows, tokens = sum(one.drawn for one in sets.values()), sum(one.epoch_tokens for one in sets.values())
    for name, one in sets.items():
        counts = escape(name), f"{one.weight:g}", str(one.rows), str(one.num_dropped)
        if not rows:
            table.add_row(*counts, "", "", "", "")
            continue
        shares = f"{one.drawn / rows:.1%}", f"{one.epoch_tokens / tokens:.1%}"
        table.add_row(*counts, str(one.drawn), *shares, f"{one.drawn / one.rows:.2f}")
    return table


def _token_lines(inspection: Inspection) -> list[str]:
    """The tokens of all rows, and what lengths would do to them."""
    said = f"{inspection.num_tokens} tokens"
    if _is_prompts(inspection):
        said += " of prompts"
    else:
        said += f", of which {inspection.prompt_share:.0%} are prompts"
    lines = [said + (", which are computed once for both sides" if inspection.chosen_longer is not None else "")]
    if inspection.limit is None:
        lines.append("No max_context_length: no prompt is cut")
    for fit in inspection.fits:
        holds = " (this one holds)" if fit.limit == inspection.limit else ""
        too_long = "" if _is_prompts(inspection) else f", {fit.too_long} too long"
        lines.append(f"  at max_context_length {fit.limit}: {fit.prompts_cut} prompts cut{too_long}{holds}")
    return lines


def _balance_line(balance: Balance) -> str:
    line = f"Rows with a label (unpaired preferences): for KTO, algorithm: kto; {balance}"
    if balance.lacks_a_class:
        return f"{line}: KTO needs both; --sft reads the completions that are labelled good alone"
    return f"{line}; recommended are {balance.advice()}"


def _length_table(inspection: Inspection) -> Table:
    table = Table(title="\nlengths in tokens", title_justify="left", box=SIMPLE_HEAD)
    for name in ("", "50 %", "90 %", "99 %", "longest"):
        table.add_column(name, justify="right" if name else "left")
    for name, lengths in inspection.lengths.items():
        label = f"whole {inspection.report.noun}" if name == "whole" else name
        table.add_row(label, *map(str, (lengths.p50, lengths.p90, lengths.p99, lengths.longest)))
    return table


def _repetition_line(inspection: Inspection) -> str:
    if _is_prompts(inspection):
        line = f"{inspection.repeated_prompts} are a prompt that was there before"
    else:
        line = f"{inspection.duplicates} are repetitions"
        line += f", {inspection.repeated_prompts} have a prompt that was there before"
    if inspection.contradictions:
        line += f", {inspection.contradictions} prefer the other way round what an earlier one says"
    if inspection.overlap is not None:
        line += f"; {inspection.overlap} are in the other dataset too"
    return line


def _say_example(console: rich.console.Console, example: RenderedRow) -> None:
    row = row_name(example.row, escape(example.set_name))
    if example.chosen is None:
        console.print(f"\n[bold]{row}[/bold], as it is answered")
        console.print(Padding(Text(_shortened(example.prompt)), (0, 0, 0, 4)), highlight=False)
    else:
        console.print(f"\n[bold]{row}[/bold], {example.num_scored} tokens between the bars are scored")
    for label, side in (("chosen", example.chosen), ("rejected", example.rejected)):
        if side is None:
            continue
        text = Text(f"{_shortened(example.prompt)}", style="dim")
        text.append("▌", style="bold green")
        text.append(_shortened(side), style="green" if label == "chosen" else "red")
        text.append("▐", style="bold green")
        if example.rejected is not None:
            console.print(f"  {label}:")
        console.print(Padding(text, (0, 0, 0, 4)), highlight=False)


def _shortened(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def _forecast_lines(forecast: Forecast) -> str:
    gib = 2**30
    agents = f"{forecast.population} agent{'' if forecast.population == 1 else 's'}"
    lines = (
        f"Estimate for {agents} with LoRA of rank 16 on all linear layers: {forecast.memory_bytes / gib:.2f} GiB of "
        f"memory beside Python and its libraries (base {forecast.base_bytes / gib:.2f}, activations about "
        f"{forecast.activation_bytes / gib:.2f}); {forecast.free_bytes / gib:.2f} GiB are free here"
    )
    if forecast.seconds is None:
        return lines + "\nTime: not measured; --estimate loads the weights and times a few steps"
    epochs = f"{forecast.epochs} epoch{'' if forecast.epochs == 1 else 's'}"
    return lines + f"\nEstimated time of {epochs}, without evaluations: {rough_duration(forecast.seconds)}"


def rough_duration(seconds: float) -> str:
    """Return an estimated time as text with few digits: `40 s`, `3 min` or `1.5 h`."""
    minute, hour = 60, 3600
    if seconds < 2 * minute:
        return f"{seconds:.0f} s"
    return f"{seconds / minute:.0f} min" if seconds < 2 * hour else f"{seconds / hour:.1f} h"
