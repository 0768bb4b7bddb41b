"""Four agents on one base in 4 bits: QLoRA, with a search on top.

    python tutorials/qlora.py --out qlora

You learn how to load a base through bitsandbytes and what stays in full precision: the adapters, their optimizers and
all log-probs. It needs `pip install bitsandbytes` and works on a CPU too. Without further arguments it takes the demo's
model and pairs.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

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


def main() -> None:
    """Load a base in 4 bits and let four agents search on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--train", help="JSONL of preference pairs to train on")
    parser.add_argument("--test", help="JSONL of preference pairs to select by")
    parser.add_argument("--steps", type=int, default=6, help="at least 2")
    parser.add_argument("--out", default="qlora", help="run folder, which must be new")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # float32 is the faster type on most CPUs.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    name = arguments.model or demo_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=quantization, device_map=device, dtype=dtype)
    print(f"base: {model.get_memory_footprint() / 2**20:.1f} MiB in 4 bits")

    env = PreferenceGym(
        arguments.train or demo_pairs("train"),
        arguments.test or demo_pairs("selection")[:16],
        tokenizer,
        data_batch_size_per_gpu=4,
    )
    population = DPO.population(
        4,
        actor_network=model,
        device=device,
        lora_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        lr=1e-4,
        beta=0.1,
        nll_alpha=0.1,
        hp_config=HyperparameterConfig(lr=RLParameter(min=1e-5, max=1e-3), beta=RLParameter(min=0.03, max=0.5)),
    )
    assert all(parameter.dtype == torch.float32 for agent in population for parameter in agent.actor_parameters())
    finetune_llm_preference(
        population,
        env,
        max_steps=arguments.steps,
        evo_steps=max(1, arguments.steps // 3),
        tournament=TournamentSelection(tournament_size=2, elitism=True, population_size=4),
        mutation=Mutations(no_mutation=0.2, rl_hp=0.8),
        run_dir=arguments.out,
    )


if __name__ == "__main__":
    main()
