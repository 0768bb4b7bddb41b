"""`evollm inspect`: what evollm understands of a dataset."""

from __future__ import annotations

import argparse

from evollm.commands.parsing import OWN, Subparsers, add_command


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "inspect",
        _run,
        help="say what evollm understands of a dataset, before anything is trained on it",
        description="Read a dataset as a run would: rows kept and dropped with reasons, lengths, repetitions, three "
        "rows as the\nmodel sees them, and an estimate of the memory. No weights are loaded unless --estimate asks for "
        "it.",
        example="evollm inspect pairs.jsonl --model my-model",
    )
    parser.add_argument(
        "data",
        nargs="+",
        help="a JSONL, Parquet or CSV file, or org/name of a dataset on the hub; several are one dataset",
    )
    parser.add_argument("--model", required=True, help="name or folder of the model, or of its tokenizer alone")
    parser.add_argument("--split", help="split of a dataset on the hub (default: train)")
    parser.add_argument("--sft", action="store_true", default=None, help="examples (default: what the columns say)")
    parser.add_argument("--grpo", action="store_true", help="prompts alone, which GRPO answers")
    parser.add_argument(
        "--dataset-weights",
        metavar="YAML",
        help='weights of several sets, "{a: 3, b: 1}", which are given as name=data: inspect a=a.jsonl b=b.jsonl ...',
    )
    parser.add_argument(
        "--columns", metavar="YAML", help='which column is what, such as "{prompt: question, ignore: [context]}"'
    )
    parser.add_argument("--against", help="another dataset: count the rows that are in both")
    parser.add_argument("--max-context-length", type=int, help="most tokens of prompt and longer completion")
    parser.add_argument("--min-completion-length", type=int, help="fewest tokens of a completion")
    parser.add_argument("--population", type=int, default=4, help="agents of the run (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of the run (default: %(default)s)")
    parser.add_argument("--estimate", action="store_true", help="load the weights and time a few steps of one agent")


def _run(options: argparse.Namespace) -> None:
    from evollm.config import parse_config
    from evollm.errors import DataError
    from evollm.inspection import inspect_data, print_inspection

    arguments = {name: value for name, value in vars(options).items() if name not in OWN}
    files = arguments.pop("data")
    if arguments["columns"] is not None:
        arguments["columns"] = parse_config(arguments["columns"], "--columns")
    data = files if len(files) > 1 else files[0]
    if arguments["dataset_weights"] is not None:
        arguments["dataset_weights"] = parse_config(arguments["dataset_weights"], "--dataset-weights")
        data = _sets(files)
    inspection = inspect_data(data, arguments.pop("model"), **arguments)
    print_inspection(inspection)
    if not inspection.report.kept:
        raise DataError("data", files[0] if len(files) == 1 else files, "no row can be used: see the reasons above")
    for name, one in inspection.sets.items():
        if not one.rows:
            raise DataError(f"data.{name}", data[name], "no row can be used: see the reasons above")


def _sets(files: list[str]) -> dict[str, str]:
    """The sets that are given as name=data."""
    from evollm.errors import ConfigurationError

    named = [file.partition("=") for file in files]
    for name, sign, data in named:
        if not (name and sign and data):
            raise ConfigurationError("data", name or sign, "with --dataset-weights write name=data for each set")
    sets = {name: data for name, _, data in named}
    if len(sets) < len(files):
        raise ConfigurationError("data", files, "has a name twice: give each set one of its own")
    return sets
