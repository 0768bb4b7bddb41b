"""Train populations whose members are spread over the processes that this was launched with.

torchrun --nproc_per_node 2 tests/members_run.py FOLDER MAX_STEPS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from conftest import make_rows
from nonfinite import break_token, marked
from parallel_run import PAIRS_IN_A_BATCH, join, make_small_model
from peft import LoraConfig
from tokenizers_for_tests import make_tokenizer

from evollm import (
    DPO,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.execution.worker import Worker
from evollm.hpo import PB2

# By the name of the run's folder: the size of the population and the arguments of the loop.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "tournament": (3, {"evo_steps": 2}),
    "halving": (4, {"evo_steps": 2, "search": "successive_halving"}),
    "pb2": (4, {"evo_steps": 2, "search": "pb2"}),
    # One process holds no member from the beginning.
    "one agent": (1, {"update_reference_each_epoch": True}),
}


class Unfit:
    """A fitness function that fails, once training has begun."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, 0

    def __call__(self, evaluation: Any) -> float:
        self.calls += 1
        if self.calls > 1:
            raise KeyError(f"no fitness of process {self.rank}")
        return 0.0


def main() -> None:
    """Train, or resume, each of the runs, then try what cannot work."""
    folder, max_steps = Path(sys.argv[1]), int(sys.argv[2])
    accelerator = join()
    rank = accelerator.process_index
    held: dict[str, Any] = {name: train(folder, name, max_steps, accelerator) for name in RUNS}
    held["refused"] = [
        refused(folder, accelerator, rows=13 + rank),
        refused(folder, accelerator, rows=13 + rank, parallel="data"),
        refused(folder, accelerator, lr=1e-3 * (1 + rank)),
        refused(folder, accelerator, parallel="member"),
    ]
    held["unfit"] = refused(folder / "unfit", accelerator, fitness=Unfit(rank))
    learn_step = Worker.learn_step

    def fall_over(worker: Worker, step: int) -> Any:
        if rank == 1 and step == 2:
            raise RuntimeError("the card fell off")
        return learn_step(worker, step)

    Worker.learn_step = fall_over
    held["failed"] = refused(folder, accelerator)
    (folder / f"held-{rank}.json").write_text(json.dumps(held))


def train(
    folder: Path, name: str, max_steps: int, accelerator: Accelerator | None = None, rows: int = 13, **changes: Any
) -> dict[str, Any]:
    """Train, or resume, a run in a folder of its name; what the process holds at the end."""
    size, arguments = RUNS[name]
    lr = changes.pop("lr", 1e-3)
    processes = accelerator.num_processes if accelerator is not None else 1
    tokenizer = make_tokenizer(adds_bos=True)
    env = PreferenceGym(
        marked(make_rows(rows), {4: "chosen"}),
        marked(make_rows(5, 13), {1: "prompt"}),
        tokenizer,
        data_batch_size_per_gpu=PAIRS_IN_A_BATCH // processes,
        accelerator=accelerator,
    )
    population = DPO.population(
        size,
        actor_network=break_token(make_small_model(), tokenizer),
        lora_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        lr=lr,
        hp_config=HyperparameterConfig(lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5)),
        accelerator=accelerator,
    )
    given = {"parallel": "members", "fitness": "margin_over_std", **arguments, **changes}
    if name == "tournament":
        given["tournament"] = TournamentSelection(2, True, size, rand_seed=3)
        given["mutation"] = Mutations(0.2, 0.8, rand_seed=5)
    if given.get("search") == "pb2":
        given["search"] = PB2(rand_seed=3)
    resumes = (folder / name / "config.json").exists()
    population, scores = finetune_llm_preference(
        population,
        env,
        max_steps=max_steps,
        evaluation_interval=1,
        checkpoint_steps=1,
        num_sample_answers=1,
        verbose=False,
        accelerator=accelerator,
        **({"resume_from_checkpoint": folder / name} if resumes else {"run_dir": folder / name}),
        **given,
    )
    return {
        "agents": [agent.index for agent in population],
        "values": [agent.hyperparameter_values() for agent in population],
        "actors": [
            [float(value) for p in agent.actor_parameters() for value in p.detach().flatten()] for agent in population
        ],
        "scores": scores,
        "adapters": len(population[0].base.adapters.names),
        "share": share_of_layers(population[0].base),
    }


def share_of_layers(base: Any) -> float:
    """The share of the layers' own weights that this process holds."""
    own = [one for layer in base.layers.modules for name, one in layer.named_parameters() if ".lora_" not in name]
    held = getattr(base.layers.gathered, "__self__", None)
    shards = own if held is None else held.shards
    return sum(one.numel() for one in shards) / sum(one.numel() for one in own)


def refused(folder: Path, accelerator: Accelerator, **changes: Any) -> str:
    """The error of a run, "" without one."""
    try:
        train(folder / "refused", "tournament", 4, accelerator, **changes)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
