"""`evollm export`: hand the best agent of a run on."""

from __future__ import annotations

import argparse

from evollm.commands.arguments import add_elite, add_model, add_run, add_trust
from evollm.commands.parsing import Subparsers, add_command

# Those of `evollm.tuning.winner`, which is slow to import.
KINDS = ("merged", "adapter", "policy")


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "export",
        _run,
        help="write the best agent of a run as a model, an adapter or a policy.pt",
        description="Write the best agent of a run; of one that has not ended, the best of its newest checkpoint.\n"
        "merged: a model that transformers loads, with tokenizer and model card. adapter: the adapter alone, for\n"
        "PEFT, with a card. policy: policy.pt of the original DPO repository.",
        example="evollm export my-run --to my-model",
    )
    add_run(parser)
    parser.add_argument("--to", required=True, metavar="FOLDER", help="new folder to write")
    parser.add_argument("--what", choices=KINDS, default="merged", help="what to write (default: %(default)s)")
    add_model(parser)
    add_elite(parser)
    add_trust(parser)


def _run(options: argparse.Namespace) -> None:
    from evollm.tuning.winner import export

    path = export(options.run_dir, options.to, options.what, options.model, options.trust_remote_code, options.elite)
    print(f"Written: {path}")
