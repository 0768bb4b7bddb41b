"""The rows of a quarter of an hour as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]


def tables(rows: Sequence[Row]) -> str:
    """Every kind of row as a table of its own, in the order of the calls; what failed stands at the end."""
    parts = [_card(rows), *(_table(kind, rows) for kind in COLUMNS), _trouble(rows)]
    return "\n\n".join(part for part in parts if part)


def _card(rows: Sequence[Row]) -> str:
    cards = {}
    for row in rows:
        if row["kind"] == "card":
            versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items() if number)
            kernels = ", of ".join(f"{head}: {kernel}" for head, kernel in row["attention"].items())
            described = (
                f"{row['machine']}, {row['date']}, CUDA {row['cuda']}, {versions}, "
                f"commit {row['commit'] or 'unknown'}. "
                f"Products of 8192: {_number(row['product_tflops'])} TFLOP/s; copies: {_number(row['copy_tb'])} TB/s, "
                f"bytes read and written; attention of packed pairs in bfloat16, heads of {kernels}."
            )
            cards.setdefault((row["machine"], row["date"]), described)
    if not cards:
        return ""
    command = "`python benchmarking/gpu_quarter_hour.py call N --wheels FOLDER --out FOLDER`, N from 1 to 3"
    return "\n\n".join([*cards.values(), command])


def _table(kind: str, rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row["kind"] == kind]
    if not mine:
        return ""
    title, columns = COLUMNS[kind]
    if kind == "speed":
        mine = list(_with_ratios(mine))
    header = f"| {' | '.join(columns)} |"
    lines = [f"| {' | '.join(write(row) for write in columns.values())} |" for row in mine]
    return "\n".join([f"### {title}", "", header, "|" + "---|" * len(columns), *lines])


def _trouble(rows: Sequence[Row]) -> str:
    told = [f"- {row['run']}, {row['part']}: left out, {row['why']}" for row in rows if row["kind"] == "skipped"]
    bad = [row for row in rows if row["kind"] == "status" and row["status"] != "done"]
    told += [f"- {row['run']}, {row['part']}: {row['status']}" for row in bad]
    return "\n".join(["### Not measured", "", *told]) if told else ""


def _with_ratios(rows: Iterable[Row]) -> Iterable[Row]:
    """Each row with its rate over TRL's on the same machine, shape and batch."""
    rows = list(rows)
    theirs = {_where(row): row["rate"] for row in rows if row["case"] == "TRL" and "rate" in row}
    for row in rows:
        rate = theirs.get(_where(row))
        yield {**row, "ratio": row["rate"] / rate if rate and "rate" in row else None}


def _where(row: Row) -> tuple[Any, ...]:
    return row["machine"], row["shape"], row["batch_size"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _get(key: str, write: Callable[[Any], str] = str) -> Callable[[Row], str]:
    return lambda row: "-" if row.get(key) is None else write(row[key]).replace("|", "/")


def _errors(key: str) -> Callable[[Row], str]:
    return _get(key, lambda errors: ", ".join(f"{name} {value or float('nan'):.1e}" for name, value in errors.items()))


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _reasons(row: Row) -> str:
    return row.get("error") or "; ".join(row.get("not_taken", ())) or "-"


def _of_paths(key: str) -> Callable[[Row], str]:
    return lambda row: _yes(row["paths"][key]) if "paths" in row else _yes(row[key])


def _rest(*known: str) -> Callable[[Row], str]:
    """Whatever else a row says, so that a table need not know all that a probe reports."""
    left = {*known, "run", "part", "kind", "longest", "shared_prompt", "tiled_head", "stacking", "reasons"}

    def write(row: Row) -> str:
        found = {k: v for k, v in row.items() if k not in left}
        return ", ".join(f"{k} {_number(v) if isinstance(v, float) else v}" for k, v in found.items()) or "-"

    return write


COLUMNS: dict[str, tuple[str, Columns]] = {
    "speed": (
        "Throughput",
        {
            "shape": _get("shape"),
            "batch": _get("batch_size"),
            "": lambda row: f"{row['case']}, {row['members']} members" if row.get("members", 1) > 1 else row["case"],
            "member-pairs/s": _get("rate", _number),
            "x TRL": _get("ratio", lambda value: f"{value:.1f}"),
            "ms a step": _get("step_ms", _number),
            "steps": _get("steps"),
            "busy": _get("busy", _percent),
            "of the floor": _get("of_floor", _percent),
            "TFLOP/s (products)": lambda row: f"{_number(row.get('tflops'))} ({_number(row.get('floor_tflops'))})",
            "kernels a step": _get("kernels"),
            "peak MiB": _get("peak_mib", lambda value: f"{value:.0f}"),
            "attention": _get("attention"),
            "not taken": _reasons,
        },
    ),
    "attention": (
        "Attention against float64 (relative errors; dense: with a square mask, in bfloat16)",
        {
            "head size": _get("head_size"),
            "heads": _get("heads"),
            "window": _get("window"),
            "ran": _get("ran"),
            "errors": _errors("errors"),
            "dense": _errors("dense_errors"),
            "right": _get("right", _yes),
        },
    ),
    "packed against plain": (
        "A small model, packed against plain (relative errors against float32)",
        {
            "packed": _errors("errors"),
            "plain": _errors("plain_errors"),
            "shared prompt": _of_paths("shared_prompt"),
            "tiled head": _of_paths("tiled_head"),
            "stacking": _of_paths("stacking"),
            "reasons": lambda row: "; ".join(row["paths"]["reasons"]) or "-",
            "right": _get("right", _yes),
        },
    ),
    "compiled against plain": (
        "A small model, compiled against plain layers (relative errors against float32)",
        {
            "compiled": _errors("errors"),
            "plain": _errors("plain_errors"),
            "s to compile and run": _get("seconds", _number),
            "stacking": _of_paths("stacking"),
            "right": _get("right", _yes),
        },
    ),
    "same step twice": (
        "The same steps again, bits compared",
        {
            "deterministic algorithms": _get("deterministic", lambda value: "asked for" if value else "not asked for"),
            "same bits": _get("equal", _yes),
            "share that differs": _get("share_differing", lambda value: f"{value:.1e}"),
            "largest difference": _get("largest", lambda value: f"{value:.1e}"),
            "error": _get("error"),
        },
    ),
    "profile": (
        "Profile of one step",
        {
            "shape": _get("shape"),
            "ms without profiler": _get("step_ms", _number),
            "operators": _get("operators"),
            "kernels": _get("kernels"),
            "kernel ms": _get("kernel_ms", _number),
            "busy": _get("busy", _percent),
        },
    ),
    "probe": (
        "The probe's verdict on SmolLM2-135M-Instruct",
        {
            "tokens": _get("tokens"),
            "dtype": _get("dtype"),
            "shared prompt": _of_paths("shared_prompt"),
            "tiled head": _of_paths("tiled_head"),
            "stacking": _of_paths("stacking"),
            "reasons": lambda row: "; ".join(row["reasons"]) or "-",
            "more": _rest("tokens", "dtype"),
        },
    ),
    "parity": (
        "Parity with TRL",
        {
            "dtype": _get("dtype"),
            "steps": _get("steps"),
            "losses within": _get("loss_gap", lambda value: f"{value:.1e}"),
            "gradient norms within": _get("norm_gap", lambda value: f"{value:.1e}"),
            "bounds": _get("bounds", lambda value: ", ".join(map(str, value))),
            "agree": _get("right", _yes),
        },
    ),
    "demo": (
        "The demo",
        {
            "generations": _get("generations"),
            "members": _get("members"),
            "device": _get("device"),
            "dtype": _get("dtype"),
            "seconds": _get("seconds", _number),
            "fitness": _get("fitness", lambda values: ", ".join(f"{value:.3f}" for value in values)),
        },
    ),
}
