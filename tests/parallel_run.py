"""Train a small population in however many processes this was launched with; what `tests/test_processes.py` runs.

torchrun --nproc_per_node 2 tests/parallel_run.py FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from conftest import make_rows
from nonfinite import break_token, marked
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

PAIRS_IN_A_BATCH = 4


def join() -> Accelerator:
    """Join the other processes on the CPU, with one thread and without warnings."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])


def main() -> None:
    """Train, or resume, in plain data parallelism."""
    train(Path(sys.argv[1]), int(sys.argv[2]), join())


def make_small_model() -> LlamaForCausalLM:
    """A small Llama, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(make_tokenizer(adds_bos=True)),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def train(folder: Path, max_steps: int, accelerator: Accelerator) -> list[DPO]:
    """Train, or resume, and let each process write what it holds at the end; returns the population."""
    tokenizer = make_tokenizer(adds_bos=True)
    env = PreferenceGym(
        # All processes have to leave out the same rows.
        marked(make_rows(13), {4: "chosen"}),
        marked(make_rows(5, 13), {1: "prompt"}),
        tokenizer,
        data_batch_size_per_gpu=PAIRS_IN_A_BATCH // accelerator.num_processes,
        accelerator=accelerator,
    )
    population = DPO.population(
        3,
        actor_network=break_token(make_small_model(), tokenizer),
        lora_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        lr=1e-3,
        hp_config=HyperparameterConfig(lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5)),
        accelerator=accelerator,
    )
    where = {"resume_from_checkpoint": folder} if (folder / "config.json").exists() else {"run_dir": folder}
    population, scores = finetune_llm_preference(
        population,
        env,
        max_steps=max_steps,
        evo_steps=2,
        evaluation_interval=1,
        checkpoint_steps=1,
        tournament=TournamentSelection(2, True, 3, rand_seed=3),
        mutation=Mutations(0.2, 0.8, rand_seed=5),
        num_sample_answers=1,
        verbose=False,
        accelerator=accelerator,
        **where,
    )
    held = [[float(value) for p in agent.actor_parameters() for value in p.detach().flatten()] for agent in population]
    (folder / f"held-{accelerator.process_index}.json").write_text(json.dumps({"actors": held, "scores": scores}))
    return population


if __name__ == "__main__":
    main()
