"""Train GRPO and KTO in two processes that divide batches or members, and try what must not differ between them.

torchrun --nproc_per_node 2 tests/own_answers_run.py FOLDER MAX_STEPS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from conftest import make_rows
from parallel_run import join, make_small_model
from peft import LoraConfig
from tokenizers_for_tests import make_tokenizer

from evollm import GRPO, KTO, RewardGym, UnpairedGym
from evollm.algorithms import rollouts
from evollm.execution import description
from evollm.execution.worker import Worker
from evollm.models.flops import PROBE
from evollm.models.generation import GeneratedAnswer, answers_to
from evollm.training import finetune
from evollm.version import __version__

ROWS_IN_A_BATCH = 4
# Some steps of those that are asked for.
BUDGET = 1.2
spent = Worker.spent


def brevity(completions: list[str]) -> list[float]:
    return [-float(len(completion)) for completion in completions]


def on_another_device(base: Any, questions: Any, *arguments: Any, **options: Any) -> list[GeneratedAnswer]:
    """Answers that begin as others do, and end sooner."""
    found = answers_to(base, questions, *arguments, **options)
    return [GeneratedAnswer(answer.ids[:1], ended=False) for answer in found]


def with_more_probes(worker: Worker) -> dict[str, int]:
    """What is spent where the probe takes longer."""
    found = spent(worker)
    return {**found, PROBE: found.get(PROBE, 0) + 2 * sum(found.values())}


def main() -> None:
    """Train, and note what was said to runs that cannot work."""
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    accelerator = join()
    rank = accelerator.process_index

    def works_in_the_main_process(completions: list[str]) -> list[float]:
        if rank:
            raise ModuleNotFoundError("No module named 'judging'")
        return brevity(completions)

    held: dict[str, Any] = {
        "function": refused(folder, steps, accelerator, works_in_the_main_process),
        "weights": [
            refused(folder, steps, accelerator, weight=1.0 + rank),
            refused(folder, steps, accelerator, weight=1.0 + rank, parallel="data"),
        ],
        "options": [
            refused(folder, steps, accelerator, checkpoint_steps=1 + rank),
            refused(folder, steps, accelerator, parallel=("data", "members")[rank]),
        ],
    }
    description.__version__ = f"0.0.{rank}"
    held["packages"] = refused(folder, steps, accelerator)
    description.__version__ = __version__
    if rank:
        Worker.spent = with_more_probes
    # Another process need not be told of the folder.
    changes = {"run_dir": None} if rank else {}
    held["kto"] = train(folder, "kto", steps, accelerator, budget=BUDGET, **changes)
    if rank:
        rollouts.answers_to = on_another_device
    held["grpo"] = train(folder, "grpo", steps, accelerator)
    (folder / f"held-{rank}.json").write_text(json.dumps(held))


def train(
    folder: Path,
    algorithm: str,
    steps: int,
    accelerator: Accelerator | None = None,
    reward: Callable[..., Any] = brevity,
    weight: float = 1.0,
    **changes: Any,
) -> list[list[float]]:
    """Train two agents in a folder that has the name of the algorithm; the values of their actors."""
    tokenizer, processes = make_tokenizer(adds_bos=True), accelerator.num_processes if accelerator is not None else 1
    # The last batch of an epoch has fewer rows, and processes unequal shares of it.
    rows, size = make_rows(10), {"data_batch_size_per_gpu": ROWS_IN_A_BATCH // processes, "accelerator": accelerator}
    shared = {
        "actor_network": make_small_model(),
        "lora_config": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "lr": 1e-3,
        "accelerator": accelerator,
    }
    if algorithm == "grpo":
        prompts = [{"prompt": row["prompt"]} for row in rows]
        env: Any = RewardGym(prompts[:7], prompts[7:], tokenizer, reward, reward_weights=[weight], **size)
        agents: list[Any] = GRPO.population(2, **shared, group_size=3, max_completion_length=4)
    else:
        answers = [
            {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
            for row in rows
            for good in (True, False)
        ]
        env = UnpairedGym(answers[:15], answers[15:], tokenizer, **size)
        agents = KTO.population(2, **shared)
    given = {"run_dir": folder / algorithm, **changes}
    agents, _ = finetune(agents, env, max_steps=steps, verbose=False, accelerator=accelerator, **given)
    return [[float(value) for p in agent.actor_parameters() for value in p.detach().flatten()] for agent in agents]


def refused(
    folder: Path, steps: int, accelerator: Accelerator, reward: Callable[..., Any] = brevity, **changes: Any
) -> str:
    """The error of a run of GRPO with divided members, "" without one; no step may have been done."""
    try:
        train(folder / "refused", "grpo", steps, accelerator, reward, **{"parallel": "members", **changes})
    except Exception as error:
        assert not (folder / "refused" / "grpo" / "metrics.jsonl").exists()
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
