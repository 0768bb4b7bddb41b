"""`evollm resume`: go on with a run that was interrupted."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from evollm.commands.arguments import add_run, trusts
from evollm.commands.ending import print_ending
from evollm.commands.launch import is_main, launched, leave, of_launch
from evollm.commands.parsing import Subparsers, add_command
from evollm.config import override
from evollm.errors import ConfigurationError

# Arguments that each say how long a run is.
LENGTHS = ("num_epochs", "max_steps", "generations")
# Arguments that say where members are, of which there is one kind.
IN_PROCESSES, OF_WORKERS = ("parallel", "processes_per_worker"), ("executor", "workers", "resources_per_worker")


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "resume",
        _run,
        help="go on with a run that was interrupted",
        description="Go on with an interrupted run from its newest whole checkpoint; it ends with the same bits. Works "
        "for runs of\ntrain, demo, and evollm.tune with names of model and data.",
        example="evollm resume evollm-runs/20261121-101500-000000",
        together=True,
    )
    add_run(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="a longer run, such as num_epochs=4",
    )


def _run(options: argparse.Namespace) -> None:
    launch = of_launch()
    given = override({}, options.overrides)
    if "resume_from_checkpoint" in given:
        fix = f"leave it out: the run to resume is {options.run_dir}"
        raise ConfigurationError("resume_from_checkpoint", given["resume_from_checkpoint"], fix)
    from evollm.tuning import tune
    from evollm.tuning.arguments_file import arguments_to_resume

    arguments = arguments_to_resume(options.run_dir, given)
    # A length that is given stands for all that the run had: the shortest of several would end the run.
    if any(given.get(name) is not None for name in LENGTHS):
        arguments = {name: value for name, value in arguments.items() if name not in LENGTHS}
    arguments = elsewhere(arguments, given)
    config = override({**arguments, **_same_batch(options.run_dir)}, options.overrides)
    result = tune(**{**config, **launch}, resume_from_checkpoint=options.run_dir)
    leave()
    if is_main():
        print_ending(result.run_dir, result.report, trusts(config))


def elsewhere(arguments: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a run, without those of workers if it goes on in processes, and the other way round."""
    left_out: set[str] = set()
    if any(given.get(name) is not None for name in IN_PROCESSES):
        left_out |= {*OF_WORKERS} - given.keys()
    if given.get("executor") not in (None, "local"):
        left_out |= {*IN_PROCESSES} - given.keys()
    return {name: value for name, value in arguments.items() if name not in left_out}


def _same_batch(run_dir: str) -> dict[str, int]:
    """The rows of a batch for each of the present processes, with which a batch has as many as the run began with."""
    from evollm.runs import read_config

    rows, rest = divmod(read_config(run_dir)["data"]["batch_size"], launched())
    return {} if rest else {"data_batch_size_per_gpu": rows}
