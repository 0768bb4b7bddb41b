"""The DPO example of AgileRL's documentation with evolution added, and what to change in such a script.

    python tutorials/coming_from_agilerl.py --out from-agilerl

You learn that the names stay and what they mean here. The imports of an AgileRL script become

    from agilerl.algorithms import DPO                                -> from evollm.algorithms import DPO
    from agilerl.llm_envs import PreferenceGym                        -> from evollm.llm_envs import PreferenceGym
    from agilerl.training.train_llm import finetune_llm_preference    -> from evollm.training.train_llm import ...
    from agilerl.utils.utils import save_llm_checkpoint               -> from evollm.utils.utils import ...

and `from evollm import ...` has all of them. docs/from_agilerl.md has the names as a table, and what differs. Without
further arguments it takes the demo's model and pairs.
"""

from __future__ import annotations

import argparse

from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm.algorithms import DPO
from evollm.demo import demo_model, demo_pairs
from evollm.hpo import HyperparameterConfig, Mutations, RLParameter, TournamentSelection
from evollm.llm_envs import PreferenceGym
from evollm.training.train_llm import finetune_llm_preference
from evollm.utils.utils import save_llm_checkpoint


def main() -> None:
    """Train a population with AgileRL's names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--train", help="JSONL of preference pairs to train on")
    parser.add_argument("--test", help="JSONL of preference pairs to select by")
    parser.add_argument("--steps", type=int, default=6, help="at least 2")
    parser.add_argument("--out", default="from-agilerl", help="run folder, which must be new")
    arguments = parser.parse_args()
    name = arguments.model or demo_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    accelerator = Accelerator()

    env = PreferenceGym(
        train_dataset=arguments.train or demo_pairs("train"),
        test_dataset=arguments.test or demo_pairs("selection")[:16],
        tokenizer=tokenizer,
        data_batch_size_per_gpu=4,
        accelerator=accelerator,
    )
    population = DPO.population(
        4,  # one base for all of them, not a copy for each
        env.observation_space,
        env.action_space,
        actor_network=model,
        pad_token_id=tokenizer.eos_token_id,
        pad_token=tokenizer.eos_token,
        lr=5e-5,
        beta=0.1,
        nll_alpha=0.1,
        # The defaults of AgileRL's page, made explicit.
        max_grad_norm=0.1,
        update_epochs=1,
        seed=42,
        hp_config=HyperparameterConfig(lr=RLParameter(min=1e-5, max=1e-3), beta=RLParameter(min=0.03, max=0.5)),
        accelerator=accelerator,
    )
    population, accuracies = finetune_llm_preference(
        population,
        env,
        max_steps=arguments.steps,
        evo_steps=max(1, arguments.steps // 3),  # batches, not samples
        tournament=TournamentSelection(tournament_size=2, elitism=True, population_size=4),
        # Mutations of networks do not exist here: their weights may be given, as 0.
        mutation=Mutations(no_mutation=0.2, architecture=0, parameters=0, activation=0, rl_hp=0.8),
        run_dir=arguments.out,
        # AgileRL copies the actor onto the reference at every epoch. Here it stays, unless this says otherwise.
        update_reference_each_epoch=False,
        accelerator=accelerator,
    )
    # Accuracies on held-out pairs, which do not contain beta; AgileRL's fitness is the reward margin, which does.
    best = max(zip(accuracies, range(len(population)), strict=True))[1]
    save_llm_checkpoint(population[best], f"{arguments.out}/adapter")
    print(f"best accuracy {max(accuracies):.3f}; adapter in {arguments.out}/adapter")


if __name__ == "__main__":
    main()
