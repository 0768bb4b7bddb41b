"""Kill a run again and again, resume it each time, and compare its end with that of a run that was never killed.

A population of four trains on a small model, with evaluations, evolutions and a checkpoint after each step. Half of the
kills come at a random moment, the others in the middle of a random file operation of a save. Compared are the adapters,
optimizer states, generators, lineage and metrics.

    python tests/kill_test.py --kills 100
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_rows
from faults import broken, die
from peft import LoraConfig
from tokenizers_for_tests import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from evollm import (
    DPO,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.checkpoints import newest_population, read_population

STEPS = 8


def train(folder: Path, die_at: int | None = None) -> None:
    """Run to the end, from the newest checkpoint if there is one; the process dies at file operation `die_at`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tokenizer = make_tokenizer(adds_bos=True)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    population = DPO.population(
        4,
        actor_network=LlamaForCausalLM(config),
        lora_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        lr=1e-3,
        hp_config=HyperparameterConfig(lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5)),
        gradient_checkpointing=False,
    )
    env = PreferenceGym(make_rows(10), make_rows(6, 10), tokenizer, data_batch_size_per_gpu=4)
    where = {"resume_from_checkpoint": folder} if (folder / "config.json").exists() else {"run_dir": folder}
    with broken(die_at, die) if die_at is not None else nullcontext():
        finetune_llm_preference(
            population,
            env,
            max_steps=STEPS,
            evo_steps=2,
            checkpoint_steps=1,
            tournament=TournamentSelection(2, True, 4, rand_seed=3),
            mutation=Mutations(0.2, 0.8, rand_seed=5),
            update_reference_each_epoch=True,
            num_sample_answers=1,
            verbose=False,
            **where,
        )


def digest(folder: Path) -> str:
    """Of everything that a run ends with."""
    newest = newest_population(folder / "checkpoints")
    assert newest is not None
    population = read_population(newest)
    assert population.state["step"] == STEPS
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for agent in population.agents:
        add({role: dict(state.tensors) for role, state in agent.adapters.items()})
        add(dict(agent.attributes))
        add(agent.optimizer)
    add({key: value for key, value in population.state.items() if key != "config"})
    for name in ("lineage.jsonl", "metrics.jsonl"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def kill_and_compare(kills: int, folder: Path, seed: int = 0) -> tuple[int, int, int, int]:
    """Kill runs until there were so many kills.

    Returns:
        Runs, kills at random moments, kills within file operations, and runs whose end differed.
    """
    rng = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    # What takes long to import; the process that forks finds no modules of the tests.
    context.set_forkserver_preload(["evollm", "transformers.models.llama.modeling_llama"])
    _finish(context.Process(target=train, args=(folder / "warm-up",)))
    start = time.perf_counter()
    _finish(context.Process(target=train, args=(folder / "whole",)))
    duration = time.perf_counter() - start
    expected = digest(folder / "whole")
    runs, by_time, by_file, mismatches = 0, 0, 0, 0
    while by_time + by_file < kills:
        run = folder / f"killed-{runs}"
        while True:
            enough = by_time + by_file >= kills
            die_at = rng.randrange(150) if not enough and rng.random() < 0.5 else None
            process = context.Process(target=train, args=(run, die_at))
            process.start()
            process.join(None if enough or die_at is not None else rng.uniform(0, duration))
            killed = process.is_alive()
            if killed and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, f"ended by itself with {process.exitcode}"
            by_time, by_file = by_time + killed, by_file + (not killed)
        runs += 1
        mismatches += digest(run) != expected
    return runs, by_time, by_file, mismatches


def _finish(process: Any) -> None:
    process.start()
    process.join()
    assert process.exitcode == 0


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        runs, by_time, by_file, mismatches = kill_and_compare(options.kills, Path(name), options.seed)
    print(
        f"{by_time + by_file} kills ({by_time} at random moments, {by_file} within file operations) over {runs} runs: "
        f"{mismatches} ended differently from a run that was never killed"
    )
    sys.exit(mismatches > 0)


if __name__ == "__main__":
    main()
