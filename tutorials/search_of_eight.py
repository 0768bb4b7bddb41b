"""Search learning rate and beta with a population, and ask whether the search was worth it.

    python tutorials/search_of_eight.py --out search

You learn how to declare what evolves, how to read the winner's schedule of hyperparameters, and how to compare fairly:
a single run at the starting values gets as many member-steps as all agents together. Both are scored on final pairs
that nothing was selected by. Without further arguments it takes the demo's model and pairs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

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
from evollm.hpo import EvolutionPlan, ancestry

START = {"lr": 2e-5, "beta": 0.1, "nll_alpha": 0.1, "max_grad_norm": 1.0}


def plans_of(run_dir: Path) -> list[EvolutionPlan]:
    """The evolutions of a run, oldest first."""
    lines = [json.loads(line) for line in (run_dir / "lineage.jsonl").read_text(encoding="utf-8").splitlines()]
    return [EvolutionPlan.from_dict(line) for line in lines if line["kind"] == "evolution"]


def main() -> None:
    """Search, print the winner's schedule, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--train", help="JSONL of preference pairs to train on")
    parser.add_argument("--test", help="JSONL of preference pairs to select by")
    parser.add_argument("--final", help="JSONL of preference pairs for the score at the end")
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--generations", type=int, default=4, help="at least 2")
    parser.add_argument("--evo-steps", type=int, default=4, help="steps of a generation")
    parser.add_argument("--out", default="search", help="folder for the two runs, which must be new")
    arguments = parser.parse_args()
    out, size = Path(arguments.out), arguments.population
    steps = arguments.generations * arguments.evo_steps

    name = arguments.model or demo_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)

    def make_env() -> PreferenceGym:
        # A fresh gym begins at the first batch, so both runs see the same order.
        return PreferenceGym(
            arguments.train or demo_pairs("train"),
            arguments.test or demo_pairs("selection")[:24],
            tokenizer,
            data_batch_size_per_gpu=4,
            final_dataset=arguments.final or demo_pairs("final"),
        )

    env = make_env()
    population = DPO.population(
        size,
        actor_network=model,
        hp_config=HyperparameterConfig(lr=RLParameter(min=5e-6, max=1e-3), beta=RLParameter(min=0.03, max=0.5)),
        **START,
    )
    population, _ = finetune_llm_preference(
        population,
        env,
        max_steps=steps,
        evo_steps=arguments.evo_steps,
        tournament=TournamentSelection(tournament_size=2, elitism=True, population_size=size),
        mutation=Mutations(no_mutation=0.2, rl_hp=0.8),
        run_dir=out / "population",
    )
    winner = max(population, key=lambda agent: agent.fitness[-1])
    print("\nThe winner's schedule, a line for each generation:")
    for birth in ancestry(plans_of(out / "population"), winner.index):
        values = birth.hyperparameters
        print(f"  agent {birth.index}: lr {values['lr']:.2g}, beta {values['beta']:.3g}")
    found = winner.evaluate(env, "final")
    for agent in population:
        agent.release()

    # As many steps of one agent as the population made together.
    single, env = DPO(actor_network=model, **START), make_env()
    finetune_llm_preference([single], env, max_steps=steps * size, checkpoint_steps=0, run_dir=out / "single")
    alone = single.evaluate(env, "final")
    print(f"\nOn {len(found.margins)} final pairs, after {steps * size} member-steps each:")
    print(f"  {size} agents, the best: accuracy {found.accuracy:.3f}, margin {found.mean_margin:+.2f} nats")
    print(f"  one at the start values: accuracy {alone.accuracy:.3f}, margin {alone.mean_margin:+.2f} nats")


if __name__ == "__main__":
    main()
