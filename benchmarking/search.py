"""Does searching pay? The quality of a search's result against its compute, for strategies at equal compute.

    python benchmarking/search.py record --data helpful.jsonl.gz harmless.jsonl.gz --seeds 0 1 2 --out records

trains the default settings and 16 random configurations to the end for each seed and data set, and records what each
scores on every pair at every rung: a sweep that has been recorded already is left out, so hours can be spread.

    python benchmarking/search.py run --strategies tournament pbt pb2 mf_pbt --data ... --seeds 0 1 2 --out records

runs strategies of `evollm.hpo.STRATEGIES` through the library's loop, from the first eight of these configurations and
on the same batches; `--budget 2` at the compute of two runs.

    python benchmarking/search.py report --out records

computes all strategies without inheritance from the records in seconds, and prints the tables: what each strategy costs
in runs and what it reaches, with 95 % intervals over seeds and pairs, which score on the selection pairs predicts the
final one, and what merges and scaled adapters gain. `replay` prints the table of strategies alone.

Data are files of the form of hh-rlhf (`chosen` and `rejected` texts of turns that begin with Human: and Assistant:).
The data set `tiny` is rule-made, with a model of two layers and sizes of its own: dozens of searches in minutes.
Files are split by dialogue; configurations are compared on the selection pairs, and the final pairs select nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gpu import quiet
from peft import LoraConfig
from searching import tiny
from searching.problem import BOUNDS, Sizes, founders, read_dialogues, short_enough, split_by_dialogue
from searching.reporting import replay, report
from searching.running import Plan, run
from searching.sweep import Sweep, record
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm.demo import demo_model
from evollm.hpo import PREFERENCE_FITNESSES, STRATEGIES

# Of the data's own sizes, those that the command line may change.
SIZES = ("train", "selection", "final", "batch_size", "longest")


@dataclass(frozen=True)
class Job:
    """One sweep, or one run of a strategy, of one seed on one data set; `plan` None: the sweep."""

    plan: Plan | None
    data: Path
    seed: int
    out: Path
    sizes: Sizes
    model: str | None
    device: str
    dtype: str
    token_budget: int | None
    recompute: bool
    answers: bool
    founders: int

    @property
    def is_tiny(self) -> bool:
        """Whether the data are rule-made and the model is tiny."""
        return str(self.data) == "tiny"

    @property
    def name(self) -> str:
        """For people, and for the file."""
        what = "record" if self.plan is None else f"run-{self.plan.label}"
        return f"{what}-{self.data.name.split('.')[0]}-{self.seed}"

    @property
    def path(self) -> Path:
        """Where its result goes."""
        return self.out / f"{self.name}.npz"


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    options = _parse(arguments)
    changed = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    settings = {name: getattr(options, name) for name in ("members", "budget", "evo_steps", "fitness", "settings")}
    plans = [None] if "record" in options.what else []
    plans += [Plan(name, **settings) for name in options.strategies] if "run" in options.what else []
    jobs = [
        Job(
            plan=plan,
            data=data,
            seed=seed,
            out=options.out,
            sizes=replace(tiny.SIZES if str(data) == "tiny" else Sizes(), **changed),
            model=options.model,
            device=options.device,
            dtype=options.dtype,
            token_budget=options.token_budget,
            recompute=options.recompute,
            answers=options.answers,
            founders=options.founders,
        )
        for plan in plans
        for seed in options.seeds
        for data in options.data
    ]
    waiting = [job for job in jobs if not job.path.exists()]
    started = time.monotonic()
    print(f"{len(jobs)} searches, {len(jobs) - len(waiting)} of them there already", flush=True)
    for told in _run_all(waiting, options.jobs):
        print(f"{time.monotonic() - started:.0f} s: {told}", flush=True)
    if "replay" in options.what:
        print(replay(options.out))
    if "report" in options.what:
        print(report(options.out, options.figure))


def _run_all(jobs: Sequence[Job], at_a_time: int) -> Iterator[str]:
    """Carry out jobs, several in processes of their own; what became of each, as soon as it is known."""
    if at_a_time == 1:
        yield from map(run_job, jobs)
        return
    with ProcessPoolExecutor(at_a_time, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_job, job) for job in jobs]):
            yield done.result()


def run_job(job: Job) -> str:
    """Carry one out; a failure is told and does not stop the others."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{job.name}: {text}", flush=True)

    try:
        _carry_out(job, say)
    except (Exception, SystemExit):  # The others go on.
        return f"{job.name} failed:\n{traceback.format_exc()}"
    return f"{job.name}: {time.monotonic() - started:.0f} s, {job.path}"


def _carry_out(job: Job, say: Callable[[str], None]) -> None:
    quiet()
    sweep = _tiny(job) if job.is_tiny else _real(job)
    configurations = founders(job.seed, sweep.bounds, job.founders, grid=job.is_tiny)
    if job.plan is None:
        record(sweep, configurations, job.path, answers=job.answers, say=say)
    else:
        run(sweep, configurations, job.path, job.plan, say)


def _real(job: Job) -> Sweep:
    folder = job.model or str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = short_enough(read_dialogues(job.data), tokenizer, job.sizes.longest)
    train, selection, final = split_by_dialogue(rows, job.sizes.splits, job.seed)
    return Sweep(
        job.data.name.split(".")[0],
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job.dtype)).to(job.device),
        tokenizer,
        (train, selection, final),
        job.sizes,
        job.seed,
        BOUNDS,
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        job.token_budget,
        job.recompute or None,
    )


def _tiny(job: Job) -> Sweep:
    drawn = iter(tiny.rows(sum(job.sizes.splits), job.seed))
    train, selection, final = ([next(drawn) for _ in range(size)] for size in job.sizes.splits)
    budget = job.token_budget or tiny.TOKEN_BUDGET
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return Sweep(
        "tiny",
        tiny.network(),
        tiny.tokenizer(),
        (train, selection, final),
        job.sizes,
        job.seed,
        tiny.BOUNDS,
        lora,
        budget,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("record", "run", "replay", "report"))
    parser.add_argument("--data", type=Path, nargs="+", default=())
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--model", help="model folder (default: the demo's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--jobs", type=int, default=1, help="searches at a time, each in a process of its own")
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--recompute", action="store_true", help="recompute activations, so that more searches fit")
    parser.add_argument("--answers", action="store_true", help="sample answers, for their lengths")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--founders", type=int, default=16, help="random configurations of a record")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=("tournament", "pbt", "pb2", "mf_pbt"))
    parser.add_argument("--members", type=int, default=Plan.members, help="founders of a run")
    parser.add_argument("--budget", type=float, help="most compute of a run, in runs of one agent")
    parser.add_argument("--evo-steps", type=int, help="steps of a run before the first decision")
    parser.add_argument(
        "--figure", type=Path, help="SVG or PNG of a report, with the data set's name before the suffix"
    )
    parser.add_argument("--settings", type=json.loads, default={}, help="of the strategies, as a JSON object")
    parser.add_argument("--fitness", choices=PREFERENCE_FITNESSES, help="of a run; the library's default")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
