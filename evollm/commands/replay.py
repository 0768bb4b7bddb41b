"""`evollm replay`: train one agent on the schedule that a run has found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from evollm.checks import usable_path
from evollm.command_line import command, place
from evollm.commands.arguments import add_elite, add_trust
from evollm.commands.parsing import Subparsers, add_command

if TYPE_CHECKING:
    from evollm.tuning import ReplayResult


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "replay",
        _run,
        help="train one agent on the schedule of hyperparameters that a run has found",
        description="Train one agent on the schedule of hyperparameters of a run's best agent. On the same data its "
        "adapter becomes the\nbest agent's, bit for bit. On other data (--data), or in another number of epochs, the "
        "schedule is stretched.",
        example="evollm replay my-run --data more-pairs.jsonl --run-dir my-replay",
    )
    parser.add_argument("source", metavar="RUN", help="folder of a run that has ended")
    parser.add_argument("--data", help="other rows to learn from: a file or a hub name")
    parser.add_argument("--num-epochs", type=int, help="passes over the data (default: as many as the run made)")
    parser.add_argument("--max-steps", type=int, help="steps at most")
    parser.add_argument("--run-dir", help="run folder of the replay (default: a new one in evollm-runs)")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with a replay of this run that was interrupted")
    add_elite(parser)
    parser.add_argument(
        "--checkpoints", metavar="FOLDER", help="the checkpoints, of a run that keeps them outside its folder"
    )
    add_trust(parser)


def _run(options: argparse.Namespace) -> None:
    from evollm.runs.folder import is_run
    from evollm.training.paths import new_run_dir
    from evollm.tuning import replay

    run_dir = options.run_dir
    if run_dir is None and options.resume is None:
        # To be known if the replay is interrupted.
        run_dir = str(new_run_dir())
    given = {
        "num_epochs": options.num_epochs,
        "max_steps": options.max_steps,
        "run_dir": run_dir,
        "resume_from_checkpoint": options.resume,
        "checkpoint_path": options.checkpoints,
        "elite_path": options.elite,
    }
    try:
        result = replay(options.source, data=options.data, trust_remote_code=options.trust_remote_code, **given)
    except KeyboardInterrupt:
        folder = usable_path("run_dir", options.resume or run_dir)
        raise KeyboardInterrupt(*([f"go on with: {_again(options, folder)}"] if is_run(folder) else [])) from None
    print(f"\nRun folder: {result.run_dir}\n{_verdict(result)}")


def _again(options: argparse.Namespace, folder: Path) -> str:
    """The command that goes on with a replay that was interrupted."""
    named = ("data", "num_epochs", "max_steps", "elite", "checkpoints")
    given = {f"--{name.replace('_', '-')}": getattr(options, name) for name in named}
    words = [word for name, value in given.items() if value is not None for word in (name, place(value))]
    trust = ["--trust-remote-code"] if options.trust_remote_code else []
    return command("replay", place(options.source), "--resume", place(folder), *words, *trust)


def _verdict(result: ReplayResult) -> str:
    if result.exact is None:
        return f"There is nothing to compare with: {result.reason}."
    if result.exact:
        return "The adapter is that of the run's best agent, bit for bit."
    return (
        "The adapter is not that of the run's best agent, bit for bit: another machine, version or number of threads "
        "rounds differently."
    )
