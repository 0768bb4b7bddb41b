"""How far from one process do two processes end, at several learning rates?

    python benchmarking/ddp_parity.py --model stories260K

A small population learns and evolves three times: in one process, in two that share each batch (gloo, on the CPU), and
in one process again with another `token_budget`. The last has nothing to do with processes: it groups the same pairs
into other passes, and shows what rounding alone comes to. Beta and nll_alpha evolve, the learning rate does not.

Each comparison is over all agents of the last generation:

- largest: the largest difference of any value of an adapter
- of learnt: the norm of the differences, in parts of the norm of what the agent has learnt
- lineage: whether the same agents came from the same parents with the same values
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from numpy.typing import NDArray
from peft import LoraConfig
from throughput import machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import (
    DPO,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.demo import demo_model, demo_pairs

PAIRS_IN_A_BATCH = 8
HELD_OUT = 16
STEPS_OF_A_GENERATION = 3
BUDGET, OTHER_BUDGET = 1024, 384


@dataclass(frozen=True)
class Ended:
    """What a run came to.

    Attributes:
        start: (P,) all values of the adapter that every agent began with.
        actors: (N, P) those of each agent of the last generation.
        lineage: Who came from whom with which hyperparameters.
    """

    start: NDArray[np.float64]
    actors: NDArray[np.float64]
    lineage: Any


@dataclass(frozen=True)
class Comparison:
    """How far two runs ended from each other; see above. The differences are NaN where the lineages differ."""

    largest: float
    of_learnt: float
    same_lineage: bool

    @classmethod
    def of(cls, one: Ended, other: Ended) -> Comparison:
        """Compare each agent with the one in the same place."""
        if one.lineage != other.lineage:
            return cls(float("nan"), float("nan"), same_lineage=False)
        difference, learnt = one.actors - other.actors, one.actors - one.start
        of_learnt = np.linalg.norm(difference, axis=1) / np.linalg.norm(learnt, axis=1)
        return cls(float(np.abs(difference).max()), float(of_learnt.max()), same_lineage=True)

    def __str__(self) -> str:
        """Return the three figures as columns."""
        return f"{self.largest:>12.1e}{self.of_learnt:>12.1e}{'equal' if self.same_lineage else 'differs':>10}"


def main() -> None:
    """Run each learning rate three times, and print a table."""
    options = _parse()
    if options.out is not None:
        train(options)
        return
    columns = f"{'largest':>12}{'of learnt':>12}{'lineage':>10}"
    print(f"{machine()}, {date.today()}, {options.steps} steps, {options.population} agents")
    print(f"{'':>8}{'two processes':>34}{'another token_budget':>34}\n{'lr':>8}{columns}{columns}")
    for lr in options.lrs:
        one = run(options, lr, processes=1)
        two, other = run(options, lr, processes=2), run(options, lr, processes=1, budget=OTHER_BUDGET)
        print(f"{lr:>8.0e}{Comparison.of(one, two)}{Comparison.of(one, other)}", flush=True)


def run(options: argparse.Namespace, lr: float, *, processes: int, budget: int = BUDGET) -> Ended:
    """Train in processes of their own."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [__file__, "--out", name, "--lrs", str(lr), "--budget", str(budget), "--steps", str(options.steps)]
        command += ["--population", str(options.population)]
        for option in ("model", "pairs"):
            command += [f"--{option}", getattr(options, option)] if getattr(options, option) else []
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        arrays = np.load(Path(name) / "actors.npz")
        return Ended(arrays["start"], arrays["actors"], json.loads((Path(name) / "lineage.json").read_text()))


def train(options: argparse.Namespace) -> None:
    """Train the population in this process, alone or beside others; the main one writes what came of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    name = options.model or str(demo_model())
    train_rows, test_rows = _rows(options.pairs)
    env = PreferenceGym(
        train_rows,
        test_rows,
        AutoTokenizer.from_pretrained(name),
        data_batch_size_per_gpu=PAIRS_IN_A_BATCH // accelerator.num_processes,
        accelerator=accelerator,
    )
    population = DPO.population(
        options.population,
        actor_network=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        lora_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        lr=options.lrs[0],
        max_grad_norm=1.0,
        nll_alpha=0.2,
        token_budget=options.budget,
        hp_config=HyperparameterConfig(beta=RLParameter(min=0.02, max=0.5), nll_alpha=RLParameter(min=0.05, max=1)),
        accelerator=accelerator,
    )
    start = _values(population[0])
    population, _ = finetune_llm_preference(
        population,
        env,
        max_steps=options.steps,
        evo_steps=STEPS_OF_A_GENERATION,
        tournament=TournamentSelection(population_size=options.population),
        mutation=Mutations(),
        run_dir=options.out / "run",
        checkpoint_steps=0,
        save_elite=False,
        num_sample_answers=0,
        verbose=False,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        np.savez(options.out / "actors.npz", start=start, actors=np.stack([_values(agent) for agent in population]))
        lines = (options.out / "run/lineage.jsonl").read_text().splitlines()
        # Fitnesses hold mean margins, which differ by rounding.
        lineage = [{key: part for key, part in json.loads(line).items() if key != "fitnesses"} for line in lines]
        (options.out / "lineage.json").write_text(json.dumps(lineage))


def _values(agent: DPO) -> NDArray[np.float64]:
    return np.concatenate([values.detach().double().numpy().ravel() for values in agent.actor_parameters()])


def _rows(path: str | None) -> tuple[list[Any], list[Any]]:
    """Rows to learn from, and to select by."""
    if path is None:
        # As texts: not every small model has a chat template.
        train, test = ([_as_texts(row) for row in demo_pairs(split)] for split in ("train", "selection"))
        return train, test[:HELD_OUT]
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return rows[:-HELD_OUT], rows[-HELD_OUT:]


def _as_texts(row: dict[str, Any]) -> dict[str, str]:
    return {name: f"{messages[-1]['content']}\n" for name, messages in row.items()}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder with its tokenizer (default: the demo's)")
    parser.add_argument("--pairs", help="JSONL file of preference pairs (default: the demo's)")
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--population", type=int, default=4)
    parser.add_argument("--budget", type=int, default=BUDGET, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
