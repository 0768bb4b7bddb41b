"""Kill workers of a Ray run, and the run's own process, at random moments, and compare its end with one never killed.

A population of four trains on two workers of a cluster on this machine. A killed worker has to be replaced by the run;
after a kill of its own process the run is begun again as its messages say. Compared are adapters, optimizer states,
generators, lineage and metrics. A run that makes no step for a long time is stuck.

    python tests/ray_kills.py --workers 50 --drivers 10
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from small_run import digest, train

STEPS = 240
# Seconds between two kills, in which a worker may or may not have been replaced.
PAUSES = (0.5, 20.0)
# Seconds without a step or a kill after which a run is stuck.
PATIENCE = 180.0
# Kills without a step in between. A worker that is lost six times in one call ends a run, as for want of memory.
MOST_WITHOUT_A_STEP = 4
# Kills in a run of workers and of its own process.
OF_WORKERS, OF_DRIVERS = 10, 2


@dataclass
class Result:
    """What has come of the kills.

    Attributes:
        runs: Runs that were brought to their end.
        workers: Killed workers.
        drivers: Killed processes of runs.
        mismatches: Runs whose end differed.
        stuck: Runs that made no step for a long time.
        failed: Runs that ended by themselves with an error.
    """

    runs: int = 0
    workers: int = 0
    drivers: int = 0
    mismatches: int = 0
    stuck: int = 0
    failed: int = 0


def train_on_ray(folder: Path, model: Path, address: str) -> None:
    """Begin the run in a folder, or go on with it."""
    changes = {"max_steps": STEPS, "evo_steps": 10, "checkpoint_steps": 5, "model": str(model), "executor": "ray"}
    train(folder, nullcontext(), workers=2, resources_per_worker={"CPU": 1}, ray_address=address, **changes)


def workers() -> list[psutil.Process]:
    """The processes of all workers on this machine that belong to the cluster of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::HeldWorker"):
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


def kill_and_compare(of_workers: int, of_drivers: int, folder: Path, rng: random.Random) -> Result:
    """Kill until there were so many kills of both kinds."""
    from peft import LoraConfig  # noqa: F401, PLC0415 - before the clock runs
    from tokenizers_for_tests import make_tokenizer  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(make_tokenizer(adds_bos=True)), **shape, max_position_embeddings=128)
    model = folder / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    address = ray.get_runtime_context().gcs_address
    whole = folder / "whole" / "run"
    driver = _start(whole, model, address)
    if driver.wait(1800) != 0:
        raise RuntimeError((whole.parent / "log").read_text()[-2000:])
    expected = digest(whole, STEPS)
    result = Result()
    while result.workers < of_workers or result.drivers < of_drivers:
        run = folder / f"killed-{result.runs}" / "run"
        if _one_run(run, model, address, result, rng):
            result.mismatches += digest(run, STEPS) != expected
        result.runs += 1
        print(result, flush=True)
    ray.shutdown()
    return result


def _one_run(run: Path, model: Path, address: str, result: Result, rng: random.Random) -> bool:
    """Whether the run has come to its end."""
    driver = _start(run, model, address)
    kills = ["worker"] * OF_WORKERS + ["driver"] * OF_DRIVERS
    rng.shuffle(kills)
    size, moved, next_kill, without_a_step = 0, time.monotonic(), time.monotonic() + rng.uniform(*PAUSES), 0
    while driver.poll() is None:
        time.sleep(0.02)
        metrics = run / "metrics.jsonl"
        grown = metrics.stat().st_size if metrics.exists() else 0
        if grown != size:
            size, moved, without_a_step = grown, time.monotonic(), 0
        if time.monotonic() - moved > PATIENCE:
            result.stuck += 1
            driver.kill()
            driver.wait()
            return False
        may_kill = kills and time.monotonic() >= next_kill and without_a_step < MOST_WITHOUT_A_STEP
        alive = workers() if may_kill else []
        if not alive:
            continue
        if kills.pop() == "worker":
            # Psutil, so that no other process that has got the same number is hit.
            rng.choice(alive).kill()
            result.workers += 1
        else:
            driver.kill()
            driver.wait()
            result.drivers += 1
            driver = _start(run, model, address)
        moved, next_kill = time.monotonic(), time.monotonic() + rng.uniform(*PAUSES)
        without_a_step += 1
    if driver.returncode != 0:
        result.failed += 1
        print((run.parent / "log").read_text()[-2000:])
    return driver.returncode == 0


def _start(run: Path, model: Path, address: str) -> subprocess.Popen[bytes]:
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--run", str(run), str(model), address]
    with (run.parent / "log").open("ab") as log:
        driver = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    # Nobody would wait for it if this process were ended.
    atexit.register(driver.kill)
    return driver


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--drivers", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        run, model, address = options.run
        train_on_ray(Path(run), Path(model), address)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as name:
        result = kill_and_compare(options.workers, options.drivers, Path(name), random.Random(options.seed))
    print(f"{result.workers} kills of workers and {result.drivers} of runs, over {result.runs} runs:")
    print(f"{result.mismatches} ended differently, {result.stuck} were stuck, {result.failed} failed")
    sys.exit(bool(result.mismatches or result.stuck or result.failed))


if __name__ == "__main__":
    main()
