"""Small real runs to report on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_examples, make_rows
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from evollm import (
    DPO,
    SFT,
    Callback,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_sft,
)

HP_CONFIG = HyperparameterConfig(
    lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5), loss_type=RLParameter(choices=("sigmoid", "ipo"))
)
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
EVIL = "<script>alert('x')</script> & \"quotes\""


class Break(Callback):
    """Makes one agent diverge after some steps."""

    def __init__(self, agents: list[Any], index: int, step: int) -> None:
        self.agents, self.index, self.step = agents, index, step

    def on_step(self, event) -> None:
        if event.step == self.step:
            with torch.no_grad():
                next(agent for agent in self.agents if agent.index == self.index).actor_parameters()[0].fill_(torch.nan)


def small_model(tokenizer) -> LlamaForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, initializer_range=0.2))


def evolve(tokenizer, folder: Path, *, agents: int = 4, generations: int = 4, final: bool = True, **changes) -> Path:
    """A run of a population that evolves every two steps, in which agent 1 diverges at the second."""
    questions = make_rows(6, 40)
    questions[0]["prompt"] = EVIL
    env = PreferenceGym(
        make_rows(8), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4, final_dataset=questions if final else None
    )
    population = DPO.population(
        agents, actor_network=small_model(tokenizer), lora_config=LORA, lr=1e-3, hp_config=HP_CONFIG
    )
    arguments: dict[str, Any] = {
        "max_steps": 2 * generations,
        "evo_steps": 2,
        "tournament": TournamentSelection(2, True, agents, rand_seed=3),
        "mutation": Mutations(0.2, 0.8, rand_seed=5),
        "checkpoint_steps": 0,
        "save_elite": False,
        "verbose": False,
        "callbacks": [Break(population, 1, 1)],
    }
    finetune_llm_preference(population, env, run_dir=folder, **{**arguments, **changes})
    return folder


def tune_alone(tokenizer, folder: Path) -> Path:
    """A run of one SFT agent."""
    env = SFTGym(make_examples(8), make_examples(6, 12), tokenizer, data_batch_size_per_gpu=4)
    agent = SFT(actor_network=small_model(tokenizer), lora_config=LORA, lr=1e-3)
    finetune_llm_sft([agent], env, run_dir=folder, checkpoint_steps=0, save_elite=False, verbose=False)
    return folder
