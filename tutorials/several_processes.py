"""Train one population in several processes: each computes a share of every batch, all hold the same agents.

    torchrun --nproc_per_node 2 tutorials/several_processes.py --steps 3

    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 tutorials/several_processes.py --steps 3 --zero 2

The second line spreads state over the processes by DeepSpeed (pip install "evollm[deepspeed]"). Without `--model` and
`--train` it takes the demo's. One process does the same: `--nproc_per_node 1`.
"""

from __future__ import annotations

import argparse

from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
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


def main() -> None:
    """Train, and let the main process show the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--train", help="JSONL of preference pairs to train on")
    parser.add_argument("--test", help="JSONL of preference pairs to select by")
    parser.add_argument("--pairs-per-process", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--zero", type=int, default=0, help="stage of DeepSpeed's ZeRO, 1 to 3; 0: plain data parallelism"
    )
    parser.add_argument("--out", default="several-processes", help="run folder, which must be new")
    arguments = parser.parse_args()

    # Accelerate would take NCCL on a CPU too, fail to connect the processes, and let each train alone.
    gloo = [InitProcessGroupKwargs(backend="gloo")]
    if arguments.zero:
        plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": arguments.zero}})
        # Without cpu=True, under which accelerate forgets DeepSpeed.
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=gloo)
    else:
        accelerator = Accelerator(cpu=True, kwargs_handlers=gloo)
    # With a GPU for each process: the same without cpu=True and kwargs_handlers

    model_name = arguments.model or demo_model()
    model = AutoModelForCausalLM.from_pretrained(model_name)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    env = PreferenceGym(
        arguments.train or demo_pairs("train"),
        arguments.test or demo_pairs("selection")[:8],
        tokenizer,
        # For each process, so that a batch has this times the processes.
        data_batch_size_per_gpu=arguments.pairs_per_process,
        accelerator=accelerator,
    )
    population = DPO.population(
        size=4,
        actor_network=model,
        lr=1e-4,
        hp_config=HyperparameterConfig(lr=RLParameter(min=2e-5, max=4e-4), beta=RLParameter(min=0.05, max=0.5)),
        accelerator=accelerator,
    )
    population, accuracies = finetune_llm_preference(
        population,
        env,
        max_steps=arguments.steps,
        evo_steps=max(1, arguments.steps // 3),
        tournament=TournamentSelection(tournament_size=2, elitism=True, population_size=4),
        mutation=Mutations(no_mutation=0.2, rl_hp=0.8, rand_seed=1),
        run_dir=arguments.out,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        print({agent.index: round(accuracy, 3) for agent, accuracy in zip(population, accuracies, strict=True)})


if __name__ == "__main__":
    main()
