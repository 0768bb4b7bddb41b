"""A script as AgileRL's users have it for DPO: with evollm's name, and the changes that docs/from_agilerl.md lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import make_rows
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import ConfigurationError, HyperparameterConfig, RLParameter, finetune_llm_sft
from evollm.algorithms.dpo import DPO
from evollm.hpo import Birth, Result, SearchStart, TournamentSearch, preference_fitness
from evollm.hpo.mutation import Mutations
from evollm.hpo.tournament import TournamentSelection
from evollm.llm_envs import PreferenceGym
from evollm.training import carry_out
from evollm.training.train_llm import finetune_llm_preference
from evollm.utils.utils import save_llm_checkpoint

PAGE = (Path(__file__).resolve().parents[1] / "docs/from_agilerl.md").read_text(encoding="utf-8")

# What such scripts read from YAML.
INIT_HP: dict[str, Any] = {
    "POP_SIZE": 3,
    "BATCH_SIZE": 4,
    "LR": 1e-3,
    "BETA": 0.1,
    "NLL_ALPHA": 0.5,
    "UPDATE_EPOCHS": 1,
    "MAX_CONTEXT_LENGTH": 128,
    "NUM_BATCHES": 3,
    "EVO_STEPS": 1,
    "TOURN_SIZE": 2,
    "ELITISM": True,
    "EVAL_LOOP": 1,
    "LORA": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
}
MUT_P: dict[str, Any] = {"NO_MUT": 0.1, "RL_HP_MUT": 0.9, "MUT_SD": 0.1, "RAND_SEED": 5}


@pytest.fixture
def splits() -> tuple[Dataset, Dataset]:
    both = Dataset.from_list(make_rows(16)).shuffle(seed=42).train_test_split(test_size=0.25)
    return both["train"], both["test"]


def test_such_a_script_runs_with_the_changes_that_the_page_lists(model_folder, splits, tmp_path, monkeypatch) -> None:
    """Each line that is not AgileRL's own with another package name stands below a comment that begins with "Was"."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    train_dataset, test_dataset = splits
    accelerator: Accelerator | None = Accelerator()
    if accelerator is not None and accelerator.state.deepspeed_plugin is None:
        accelerator = None
    env = PreferenceGym(
        train_dataset=train_dataset,
        test_dataset=test_dataset,
        tokenizer=tokenizer,
        data_batch_size_per_gpu=INIT_HP["BATCH_SIZE"],
        accelerator=accelerator,
        max_context_length=INIT_HP.get("MAX_CONTEXT_LENGTH"),
    )
    # Was a list of agents in a loop, and had no hp_config.
    pop = DPO.population(
        INIT_HP["POP_SIZE"],
        hp_config=HyperparameterConfig(lr=RLParameter(min=1e-4, max=1e-2)),
        model_name=str(model_folder),
        pad_token_id=tokenizer.eos_token_id,
        pad_token=tokenizer.eos_token,
        batch_size=INIT_HP["BATCH_SIZE"],
        lr=INIT_HP["LR"],
        beta=INIT_HP["BETA"],
        nll_alpha=INIT_HP.get("NLL_ALPHA", 1.0),
        update_epochs=INIT_HP["UPDATE_EPOCHS"],
        lora_config=LoraConfig(**INIT_HP["LORA"]),
        accelerator=accelerator,
        gradient_checkpointing=accelerator is not None,
        use_liger_loss=INIT_HP.get("USE_LIGER_LOSS", False),
    )
    # Was a call with a fourth argument, EVAL_LOOP.
    tournament = TournamentSelection(INIT_HP["TOURN_SIZE"], INIT_HP["ELITISM"], INIT_HP["POP_SIZE"])
    mutations = Mutations(
        no_mutation=MUT_P["NO_MUT"],
        architecture=0,
        new_layer_prob=0,
        parameters=0,
        activation=0,
        rl_hp=MUT_P["RL_HP_MUT"],
        mutation_sd=MUT_P["MUT_SD"],
        rand_seed=MUT_P["RAND_SEED"],
        accelerator=accelerator,
    )
    # Was without a result, had init_hp and wandb_api_key to wandb_run_name, and max_steps in samples.
    pop, fitnesses = finetune_llm_preference(
        pop=pop,
        env=env,
        save_elite=True,
        elite_path="outputs/elite",
        wb=INIT_HP.get("WANDB", False),
        evo_steps=INIT_HP["EVO_STEPS"],
        tournament=tournament,
        mutation=mutations,
        evaluation_interval=INIT_HP.get("EVALUATION_INTERVAL", 200),
        accelerator=accelerator,
        max_steps=INIT_HP["NUM_BATCHES"],
    )
    elite = max(pop, key=lambda agent: agent.fitness[-1] if agent.fitness else float("-inf"))
    save_llm_checkpoint(elite, "outputs/adapter")
    assert len(fitnesses) == len(pop) == 3
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), "outputs/adapter")
    (run,) = Path("evollm-runs").iterdir()
    kinds = [json.loads(line)["kind"] for line in (run / "lineage.jsonl").read_text().splitlines()]
    assert kinds == ["founders", "evolution", "evolution"]
    # Was compare_responses of some prompts.
    end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (end["kind"], len(end["samples"])) == ("end", 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("init_hp", "init_hp='...': is not an argument here: .*leave it out"),
        ("wandb_api_key", "wandb_api_key='...': .*WANDB_API_KEY"),
        ("wandb_project", "wandb_project='AgileRL': .*WANDB_PROJECT"),
        ("wandb_entity", "wandb_entity='AgileRL': .*WANDB_ENTITY"),
        ("wandb_run_name", "wandb_run_name='AgileRL': .*WANDB_NAME"),
    ],
)
def test_each_argument_that_has_to_go_is_named_and_stands_on_the_page(line: str, said: str) -> None:
    for finetune in (finetune_llm_preference, finetune_llm_sft):
        with pytest.raises(ConfigurationError, match=said):
            finetune(pop=[], env=None, **{line: "AgileRL"})
    assert f"`{line}`" in PAGE


def test_a_population_made_in_a_loop_is_refused_with_what_to_write(
    model_folder, make_agent, make_model, gym, lora, tmp_path
) -> None:
    tournament, mutation = TournamentSelection(2, True, 2), Mutations(rl_hp=1)
    bounds = HyperparameterConfig(lr=RLParameter(min=1e-6, max=1e-2))
    one_base = {"actor_network": make_model(), "lora_config": lora}
    loops: dict[str, Callable[[], list[DPO]]] = {
        r"agents of different bases: build all on one, with DPO\.population": lambda: [
            DPO(model_name=str(model_folder), lora_config=lora, hp_config=bounds) for _ in range(2)
        ],
        r"two agents have the same number: give each its own index": lambda: [
            DPO(**one_base, hp_config=bounds) for _ in range(2)
        ],
        r"a mutation has nothing to change: build the agents with hp_config=": lambda: [
            DPO(**one_base, index=index) for index in range(2)
        ],
    }
    for said, make in loops.items():
        with pytest.raises(ConfigurationError, match=said):
            finetune_llm_preference(
                make(),
                gym,
                max_steps=2,
                evo_steps=1,
                tournament=tournament,
                mutation=mutation,
                run_dir=tmp_path / "run",
            )
    assert not (tmp_path / "run").exists()
    assert "DPO.population" in PAGE


def test_a_loop_of_ones_own_evolves_as_the_page_says(make_population, gym) -> None:
    """In place of `tournament.select(pop)` and `mutation.mutation(pop)`; the page's lines."""
    (block,) = [part for part in PAGE.split("```python\n")[1:] if "carry_out" in part]
    agents = make_population(3, hp_config=HyperparameterConfig(lr=RLParameter(min=1e-5, max=1e-2)))
    for agent in agents:
        agent.learn(gym.next_batch())
    names: dict[str, Any] = {"pop": agents, "env": gym, "Birth": Birth, "Result": Result, "SearchStart": SearchStart}
    names |= {"TournamentSearch": TournamentSearch, "carry_out": carry_out, "preference_fitness": preference_fitness}
    names |= {"TournamentSelection": TournamentSelection, "Mutations": Mutations}
    exec(block.split("```")[0], names)
    assert len(names["pop"]) == 3
    assert sorted({agent.index for agent in names["pop"]})[1:] == [3, 4]


def test_hyperparameters_start_alike_only_where_asked_for(make_population) -> None:
    bounds = HyperparameterConfig(lr=RLParameter(min=1e-5, max=1e-2))
    assert bounds.names() == ("lr",)
    assert len({agent.lr for agent in make_population(3, hp_config=bounds)}) == 3
    assert {agent.lr for agent in make_population(3, hp_config=bounds, sample_hyperparameters=False)} == {1e-3}
    assert "sample_hyperparameters=False" in PAGE


def test_a_gym_is_one_of_gymnasiums(gym) -> None:
    observation, info = gym.reset()
    assert (set(observation), set(info)) == (
        {"input_ids", "prompt_lengths", "chosen_lengths", "rejected_lengths"},
        {"epoch", "index"},
    )
    assert len(gym.step(gym.action_space.sample())) == 5
    # Batches, and not rows.
    assert len(gym) == 3
