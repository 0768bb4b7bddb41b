"""Wall time and result of `tune(budget=2.0)` against eight full random runs, on the demo's pairs and model.

    python benchmarking/search_time.py

Both start from the same eight spread founders, on one epoch of the 156 training pairs in batches of 6. They are run in
turn, as often as `--repeats` says, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evollm import tune
from evollm.demo import demo_model
from evollm.demo.run import PAIRS

SEARCHES = {"tune(budget=2.0)": {"budget": 2.0}, "eight full random runs": {"search": "random"}}


def main() -> None:
    """Run both, or one if the command line names it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=SEARCHES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run(options.only)))
        return
    print("| search | seconds | runs | final accuracy | winner's lr |\n|---|---|---|---|---|")
    for _ in range(options.repeats):
        for name in SEARCHES:
            command = [sys.executable, __file__, "--only", name]
            lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
            found = json.loads(lines[-1])
            cells = (f"{found[key]:{form}}" for key, form in (("seconds", ".0f"), ("runs", ".2f"), ("accuracy", ".3f")))
            print(f"| {name} | {' | '.join(cells)} | {found['lr']:.1e} |", flush=True)


def run(name: str) -> dict[str, float]:
    """Carry out one search, and say what it took and found."""
    model = str(demo_model())
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = tune(
            model,
            str(PAIRS / "train.jsonl"),
            test_data=str(PAIRS / "selection.jsonl"),
            final_data=str(PAIRS / "final.jsonl"),
            population=8,
            num_epochs=1,
            data_batch_size_per_gpu=6,
            gradient_checkpointing=False,
            checkpoint_steps=0,
            num_sample_answers=0,
            run_dir=Path(folder) / "run",
            verbose=False,
            **SEARCHES[name],
        )
        seconds = time.perf_counter() - started
        ends = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert result.spent is not None
    accuracy = ends[-1]["after_accuracy"]
    return {"seconds": seconds, "runs": result.spent.runs, "accuracy": accuracy, "lr": result.best.lr}


if __name__ == "__main__":
    main()
