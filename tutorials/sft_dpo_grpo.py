"""Three stages on one base: learn good answers, learn which answer is better, then learn from rewards of own answers.

    python tutorials/sft_dpo_grpo.py --out stages

Without further arguments it takes the demo's model and pairs; the reward is a rule of this script, for short answers
that end by themselves. Each stage begins with the actor of the one before, which is its reference too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import (
    DPO,
    GRPO,
    SFT,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RewardGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_reasoning,
    finetune_llm_sft,
)
from evollm.algorithms import LLMAgent
from evollm.data.cells import Row
from evollm.demo import demo_model, demo_pairs


def rows_of(path: str | None) -> list[Row]:
    """The rows of a JSONL file, or the demo's pairs."""
    if path is None:
        return demo_pairs("train")
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def brevity(completions: list[str], **columns: Any) -> list[float]:
    """1 for an empty answer, less for longer ones. What reward functions get is said in docs/grpo.md."""
    del columns
    return [1 / (1 + len(text) / 40) for text in completions]


def weights(agent: LLMAgent, role: str) -> list[torch.Tensor]:
    """The weights of the adapter in a role."""
    name = agent.adapter(role)
    assert name is not None
    return list(agent.base.adapters.export(name).tensors.values())


def begins_at(agent: LLMAgent, before: list[torch.Tensor]) -> bool:
    """Whether actor and reference are the actor of the stage before."""
    pairs = [zip(weights(agent, role), before, strict=True) for role in ("actor", "reference")]
    return all(torch.equal(mine, theirs) for pair in pairs for mine, theirs in pair)


def main() -> None:
    """Run the three stages, each from the best agent of the one before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--preferences", help="JSONL of pairs: prompt, chosen and rejected, as text")
    parser.add_argument("--steps", type=int, default=4, help="steps of each stage, at least 2")
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--out", default="stages", help="folder for the three runs, which must be new")
    arguments = parser.parse_args()
    out = Path(arguments.out)

    name = arguments.model or demo_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    pairs = rows_of(arguments.preferences)
    examples = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    prompts = [{"prompt": pair["prompt"]} for pair in pairs]

    # Stage 1. An SFT agent has no reference.
    learner = SFT(actor_network=model, lr=1e-4)
    completions = SFTGym(examples[:-8], examples[-8:], tokenizer, data_batch_size_per_gpu=4)
    finetune_llm_sft([learner], completions, max_steps=arguments.steps, run_dir=out / "sft")

    # Stage 2. From a checkpoint of another algorithm an agent takes the actor, and makes it its reference too.
    chooser = DPO(actor_network=model, lr=5e-5, beta=0.1, nll_alpha=0.2)
    chooser.load_checkpoint(str(out / "sft/elite"))
    preferences = PreferenceGym(pairs[:-8], pairs[-8:], tokenizer, data_batch_size_per_gpu=4)
    finetune_llm_preference([chooser], preferences, max_steps=arguments.steps, run_dir=out / "dpo")
    chosen = weights(chooser, "actor")
    learner.release()

    # Stage 3. Two agents that differ in learning rate and temperature answer the same prompts.
    population = GRPO.population(
        2,
        actor_network=model,
        lr=2e-5,
        group_size=4,
        max_completion_length=arguments.tokens,
        hp_config=HyperparameterConfig(lr=RLParameter(min=5e-6, max=1e-4), temperature=RLParameter(min=0.7, max=1.3)),
    )
    for agent in population:
        agent.load_checkpoint(str(out / "dpo/elite"))
    print("stage 3 begins at stage 2's actor:", all(begins_at(agent, chosen) for agent in population))
    rewarded = RewardGym(prompts[:-8], prompts[-8:], tokenizer, brevity, data_batch_size_per_gpu=4)
    _, rewards = finetune_llm_reasoning(
        population,
        rewarded,
        max_steps=arguments.steps,
        evo_steps=arguments.steps // 2,
        tournament=TournamentSelection(tournament_size=2, elitism=True, population_size=2),
        mutation=Mutations(no_mutation=0.2, rl_hp=0.8),
        run_dir=out / "grpo",
    )
    print("mean rewards:", *(f"{reward:.3f}" for reward in rewards))


if __name__ == "__main__":
    main()
