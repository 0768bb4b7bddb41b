"""What do several processes save, with members divided among them, with batches, and with both?

    python benchmarking/processes.py

A population on a random Llama learns from the demo's pairs, with a tournament in the middle, in 1, 2 and 4 processes of
one thread each, in turns. Printed are seconds of a run from its first step to its end, the median over the rounds, and
the times of one process divided by that. "members by 2" is two processes for each share of the members. With more
processes than cores they only take turns, so that the ratio shows what the division costs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from peft import LoraConfig
from throughput import machine
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from evollm import (
    DPO,
    Callback,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.demo import demo_model, demo_pairs

# Processes, what they divide, and how many hold members together.
WAYS = ((1, "members", 1), (2, "members", 1), (2, "data", 1), (4, "members", 1), (4, "members", 2))
TIMEOUT = 1800


def main() -> None:
    """Launch every way in turns and print a table; or be one process of a launch."""
    options = _parse()
    if options.parallel:
        _train(options)
        return
    seconds: dict[tuple[int, str, int], list[float]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way in WAYS:
            print(f"round {number + 1} of {options.rounds}: {way[0]} processes, {_divided(*way[1:])} ...", flush=True)
            seconds[way].append(_launch(*way, options))
    alone = median(seconds[1, "members", 1])
    print(f"\n{machine()}, {date.today()}; {options.members} members, {options.steps} steps")
    print(f"{'processes':>10}  {'divided':<14}{'seconds':>9}{'times one':>11}")
    for (processes, *how), found in seconds.items():
        print(f"{processes:>10}  {_divided(*how):<14}{median(found):>9.1f}{alone / median(found):>11.2f}")


def _divided(parallel: str, together: int) -> str:
    return parallel if together == 1 else f"{parallel} by {together}"


def _launch(processes: int, parallel: str, together: int, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    command += [
        "--parallel",
        parallel,
        "--together",
        str(together),
        "--members",
        str(options.members),
        "--steps",
        str(options.steps),
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--out", str(out)], env=environment, check=True, timeout=TIMEOUT, capture_output=True)
        return float(json.loads(out.read_text()))


class _Clock(Callback):
    """When the first step ended."""

    first = 0.0

    def on_step(self, event: object) -> None:
        del event
        self.first = self.first or time.perf_counter()


def _train(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape))
    env = PreferenceGym(
        demo_pairs("train"),
        demo_pairs("selection")[:16],
        tokenizer,
        data_batch_size_per_gpu=8 // accelerator.num_processes,
        accelerator=accelerator,
    )
    population = DPO.population(
        options.members,
        actor_network=model,
        lora_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        lr=1e-4,
        hp_config=HyperparameterConfig(lr=RLParameter(min=1e-5, max=1e-3)),
        accelerator=accelerator,
    )
    clock = _Clock()
    finetune_llm_preference(
        population,
        env,
        max_steps=options.steps,
        evo_steps=options.steps // 2,
        tournament=TournamentSelection(2, True, options.members, rand_seed=3),
        mutation=Mutations(0.2, 0.8, rand_seed=5),
        num_sample_answers=0,
        verbose=False,
        accelerator=accelerator,
        parallel=options.parallel,
        processes_per_worker=options.together,
        callbacks=[clock],
    )
    if accelerator.is_main_process:
        options.out.write_text(json.dumps(time.perf_counter() - clock.first))


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parallel", help=argparse.SUPPRESS)
    parser.add_argument("--together", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
