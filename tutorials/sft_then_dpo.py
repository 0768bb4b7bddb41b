"""Three stages on one base: learn good answers, learn which answer is better, and learn that once more.

    python tutorials/sft_then_dpo.py --out stages

Without further arguments it takes the demo's model and pairs; the chosen answers are the examples of the first stage.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import (
    DPO,
    SFT,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_sft,
)
from evollm.data.cells import Row
from evollm.demo import demo_model, demo_pairs


def rows_of(path: str | None) -> list[Row]:
    """The rows of a JSONL file, or the demo's pairs."""
    if path is None:
        return demo_pairs("train")
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Run the three stages, each from the best agent of the one before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--sft", help="JSONL of examples: prompt and completion, or messages")
    parser.add_argument("--preferences", help="JSONL of pairs: prompt, chosen and rejected")
    parser.add_argument("--steps", type=int, default=4, help="steps of each stage, at least 2")
    parser.add_argument("--out", default="stages", help="folder for the three runs, which must be new")
    arguments = parser.parse_args()
    out = Path(arguments.out)

    # One model object: whatever is built on it shares it.
    name = arguments.model or demo_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    pairs = rows_of(arguments.preferences)
    examples = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    if arguments.sft:
        examples = rows_of(arguments.sft)
    # The last eight rows are held out: agents are scored and selected by them.
    completions = SFTGym(examples[:-8], examples[-8:], tokenizer, data_batch_size_per_gpu=4)
    preferences = PreferenceGym(pairs[:-8], pairs[-8:], tokenizer, data_batch_size_per_gpu=4)

    # Stage 1. The loss is that of the completions' tokens; the best agent goes to OUT/sft/elite.
    learner = SFT(actor_network=model, lr=1e-4)
    finetune_llm_sft([learner], completions, max_steps=arguments.steps, run_dir=out / "sft")
    learner.release()

    # Stage 2. From a checkpoint of another algorithm an agent takes the actor, and makes it its reference too.
    chooser = DPO(actor_network=model, lr=5e-5, beta=0.1, nll_alpha=0.2)
    chooser.load_checkpoint(str(out / "sft/elite"))
    finetune_llm_preference([chooser], preferences, max_steps=arguments.steps, run_dir=out / "dpo-1")
    chooser.release()

    # Stage 3. From one of the same algorithm it would resume, with the old reference; True says that a stage begins.
    # Any stage may be a population: here two agents search for the learning rate.
    population = DPO.population(
        2, actor_network=model, lr=2e-5, beta=0.3, hp_config=HyperparameterConfig(lr=RLParameter(min=5e-6, max=1e-4))
    )
    for agent in population:
        agent.load_checkpoint(str(out / "dpo-1/elite"), overwrite_reference_adapter=True)
    finetune_llm_preference(
        population,
        preferences,
        max_steps=arguments.steps,
        evo_steps=arguments.steps // 2,
        tournament=TournamentSelection(tournament_size=2, elitism=True, population_size=2),
        mutation=Mutations(no_mutation=0.2, rl_hp=0.8),
        run_dir=out / "dpo-2",
    )


if __name__ == "__main__":
    main()
