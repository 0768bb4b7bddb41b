from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rows
from snapshots import actor_bits, adapter_bits, base_bits

from evollm import (
    DPO,
    Callback,
    ConfigurationError,
    DivergedError,
    EvoLLMError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.hpo import Evaluation, rank

HP_CONFIG = HyperparameterConfig(
    lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5), nll_alpha=RLParameter(0.01, 1.0)
)


@pytest.fixture
def evolution() -> dict[str, object]:
    return {"tournament": TournamentSelection(2, True, 4, rand_seed=3), "mutation": Mutations(0.2, 0.8, rand_seed=5)}


@pytest.fixture
def quiet(tmp_path: Path) -> dict[str, object]:
    return {"run_dir": tmp_path / "run", "verbose": False, "num_sample_answers": 0}


class Record(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def __getattribute__(self, name: str):
        if name.startswith("on_"):
            return lambda event: self.events.append((name, event))
        return super().__getattribute__(name)

    def steps(self, name: str) -> list[int]:
        return [event.step for kind, event in self.events if kind == name]


def test_a_population_of_one_equals_a_plain_loop_over_learn_bit_for_bit(make_agent, tokenizer, quiet) -> None:
    def env() -> PreferenceGym:
        return PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4)

    tuned, looped = make_agent(), make_agent()
    finetune_llm_preference([tuned], env(), num_epochs=2, evaluation_interval=2, **quiet)
    batches = env()
    for _ in range(2 * len(batches)):
        looped.learn(batches.next_batch())
    assert actor_bits(tuned) == actor_bits(looped)


def run_population(make_population, tokenizer, evolution, run_dir: Path, **changes) -> list[DPO]:
    env = PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4)
    arguments = {"num_epochs": 3, "verbose": False, "num_sample_answers": 0, **evolution, **changes}
    population = make_population(4, hp_config=HP_CONFIG)
    return finetune_llm_preference(population, env, run_dir=run_dir, **arguments)[0]


def test_the_same_seed_twice_gives_identical_lineage_and_elite_bits(
    make_population, tokenizer, evolution, tmp_path
) -> None:
    bits = []
    for name in ("first", "second"):
        population = run_population(make_population, tokenizer, evolution, tmp_path / name)
        bits.append([actor_bits(agent) for agent in population])
        # Whatever else draws from the global generators makes no difference.
        torch.rand(3)
        np.random.rand(3)
    first, second = tmp_path / "first", tmp_path / "second"
    assert bits[0] == bits[1]
    for name in ("lineage.jsonl", "metrics.jsonl", "elite/actor/adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_run_may_be_told_to_be_deterministic_and_reads_no_memory_that_nobody_wrote(
    make_population, tokenizer, evolution, tmp_path
) -> None:
    """Torch then refuses what has no deterministic algorithm, and fills new memory with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    bits = []
    for strictly in (False, True):
        torch.use_deterministic_algorithms(strictly)
        try:
            population = run_population(make_population, tokenizer, evolution, tmp_path / str(strictly))
        finally:
            torch.use_deterministic_algorithms(False)
        bits.append([actor_bits(agent) for agent in population])
    assert bits[0] == bits[1]


def test_the_run_evolves_between_epochs_and_keeps_the_elite(make_population, tokenizer, evolution, tmp_path) -> None:
    record = Record()
    population = run_population(make_population, tokenizer, evolution, tmp_path / "run", callbacks=[record])
    assert record.steps("on_step") == list(range(1, 10))
    assert record.steps("on_evaluation") == [3, 6, 9]
    assert record.steps("on_evolution") == [3, 6]
    plans = [event.plan for kind, event in record.events if kind == "on_evolution"]
    assert [plan.births[0].index for plan in plans] == [plan.elite for plan in plans]
    assert plans[0].births[0].mutations == ()
    for agent in population:
        assert 1e-4 <= agent.lr <= 1e-2
        assert 0.05 <= agent.beta <= 0.5
    lines = [json.loads(line) for line in (tmp_path / "run/lineage.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["founders", "evolution", "evolution"]


def test_every_unit_is_a_step(make_population, tokenizer, evolution, tmp_path) -> None:
    record = Record()
    run_population(
        make_population,
        tokenizer,
        evolution,
        tmp_path / "run",
        callbacks=[record],
        max_steps=8,
        evo_steps=4,
        evaluation_interval=3,
        checkpoint_steps=5,
    )
    assert record.steps("on_step")[-1] == 8
    assert record.steps("on_evaluation") == [3, 4, 6, 8]
    assert record.steps("on_evolution") == [4]
    assert record.steps("on_checkpoint") == [5, 8]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-000005", "step-000008"]


def test_a_population_never_holds_more_adapters_than_its_size_and_one_reference(
    make_population, tokenizer, evolution, tmp_path
) -> None:
    population = run_population(make_population, tokenizer, evolution, tmp_path / "run")
    assert len(population[0].base.adapters.names) == 5


def test_eight_agents_hold_one_base(make_population, gym, quiet) -> None:
    population = make_population(8)
    before = base_bits(population[0].base)
    finetune_llm_preference(population, gym, max_steps=2, **quiet)
    base = population[0].base
    adapters = {id(p) for name in base.adapters.names for p in base.adapters.parameters(name).values()}
    models = {id(agent.base.network): agent.base.network for agent in population}
    storages = {
        parameter.untyped_storage().data_ptr()
        for model in models.values()
        for parameter in model.parameters()
        if id(parameter) not in adapters
    }
    assert len(models) == 1
    # One storage for each of the base's own parameters: 2 layers of 9, embedding, final norm and head.
    assert len(storages) == 2 * 9 + 3
    assert base_bits(base) == before


class BreakAgent(Callback):
    """Makes the loss of one agent NaN from a step on."""

    def __init__(self, agent: DPO, step: int) -> None:
        self.agent, self.step = agent, step

    def on_step(self, event) -> None:
        if event.step == self.step:
            with torch.no_grad():
                self.agent.actor_parameters()[0].fill_(float("nan"))


@pytest.mark.parametrize("broken", [0, 2])
def test_a_nan_in_one_agent_leaves_the_others_as_in_a_run_without_it(
    make_population, make_model, tokenizer, quiet, broken
) -> None:
    def env() -> PreferenceGym:
        return PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4)

    def agents() -> list[DPO]:
        return make_population(4, actor_network=make_model(dtype=torch.float64), hp_config=HP_CONFIG)

    population = agents()
    victim = population[broken]
    record = Record()
    finetune_llm_preference(population, env(), num_epochs=1, callbacks=[BreakAgent(victim, 1), record], **quiet)
    alone = agents()
    finetune_llm_preference(
        [agent for agent in alone if agent.index != broken],
        env(),
        num_epochs=1,
        **{**quiet, "run_dir": quiet["run_dir"].with_name("without")},
    )
    assert victim.diverged
    learnt = [broken in event.metrics for kind, event in record.events if kind == "on_step"]
    assert learnt == [True, True, False]
    for agent, other in zip(population, alone, strict=True):
        if agent is not victim:
            torch.testing.assert_close(agent.actor_parameters(), other.actor_parameters(), rtol=0, atol=1e-10)
            assert not agent.diverged


def test_a_diverged_agent_is_culled_and_never_a_parent(make_population, tokenizer, evolution, tmp_path) -> None:
    env = PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4)
    population = make_population(4, hp_config=HP_CONFIG)
    record = Record()
    population, fitnesses = finetune_llm_preference(
        population,
        env,
        num_epochs=2,
        run_dir=tmp_path / "run",
        verbose=False,
        callbacks=[BreakAgent(population[0], 1), record],
        **evolution,
    )
    (plan,) = [event.plan for kind, event in record.events if kind == "on_evolution"]
    assert 0 not in [birth.parent for birth in plan.births]
    assert 0 not in [agent.index for agent in population]
    assert np.isfinite(fitnesses).all()
    assert all(torch.isfinite(parameter).all() for agent in population for parameter in agent.actor_parameters())


def test_a_run_in_which_all_diverge_stops_and_says_so(make_agent, gym, quiet) -> None:
    agent = make_agent()
    with pytest.raises(DivergedError, match="lower lr or beta"):
        finetune_llm_preference([agent], gym, max_steps=5, callbacks=[BreakAgent(agent, 1)], **quiet)


def test_a_fitness_of_the_users_decides(make_population, tokenizer, evolution, tmp_path) -> None:
    def prefer_small_steps(evaluation: Evaluation) -> float:
        return -abs(evaluation.mean_margin)

    record = Record()
    run_population(
        make_population, tokenizer, evolution, tmp_path / "run", callbacks=[record], fitness=prefer_small_steps
    )
    first = next(event for kind, event in record.events if kind == "on_evaluation")
    smallest = min(first.evaluations, key=lambda index: abs(first.evaluations[index].mean_margin))
    assert first.best == smallest


def test_an_agent_that_breaks_a_guard_is_behind_all_that_hold_it(
    make_population, tokenizer, evolution, tmp_path
) -> None:
    free, held = Record(), Record()
    run_population(make_population, tokenizer, evolution, tmp_path / "free", callbacks=[free])
    first = next(event for kind, event in free.events if kind == "on_evaluation")
    drifts = {index: one.chosen_logratios.mean() for index, one in first.evaluations.items()}
    assert len(drifts) > 1
    # All but one agent break this guard; the others are ranked by how far they are from it.
    guards = {"min_chosen_logratio": float(max(drifts.values()))}
    run_population(make_population, tokenizer, evolution, tmp_path / "held", callbacks=[held], guards=guards)
    guarded = next(event for kind, event in held.events if kind == "on_evaluation")
    positions = rank(list(guarded.fitnesses.values()))
    assert [list(guarded.fitnesses)[place] for place in positions] == sorted(drifts, key=drifts.get, reverse=True)
    assert guarded.best == max(drifts, key=drifts.get)
    assert guarded.fitnesses[guarded.best] == first.fitnesses[guarded.best]
    with pytest.raises(ConfigurationError, match=r"options\.guards\.min_chosen_logratio: .* then, -3\.0 now"):
        run_population(
            make_population,
            tokenizer,
            evolution,
            None,
            resume_from_checkpoint=tmp_path / "held",
            guards={"min_chosen_logratio": -3.0},
        )


def test_the_reference_follows_the_actor_when_asked_to(make_agent, gym, quiet) -> None:
    fixed, following = make_agent(), make_agent()
    before = adapter_bits(fixed.base)[fixed.adapter("reference")]
    state = gym.state_dict()
    finetune_llm_preference([fixed], gym, num_epochs=2, **quiet)
    assert adapter_bits(fixed.base)[fixed.adapter("reference")] == before
    gym.load_state_dict(state)
    run_dir = quiet["run_dir"].with_name("following")
    finetune_llm_preference(
        [following], gym, num_epochs=2, update_reference_each_epoch=True, **{**quiet, "run_dir": run_dir}
    )
    assert following.reference_update_tracker == 1
    assert adapter_bits(following.base)[following.adapter("reference")] != before
    assert actor_bits(fixed) != actor_bits(following)


def test_without_held_out_pairs_one_agent_still_trains(make_agent, tokenizer, quiet) -> None:
    env = PreferenceGym(make_rows(8), None, tokenizer, data_batch_size_per_gpu=4)
    agent = make_agent()
    population, fitnesses = finetune_llm_preference([agent], env, **quiet)
    assert population == [agent]
    assert agent.steps == 2
    assert np.isnan(fitnesses).all()


def bad_run(make_population, tokenizer, **changes):
    """Arguments of a run of four with one thing wrong."""
    rows = changes.pop("rows", make_rows(12))
    test_rows = changes.pop("test_rows", make_rows(6, 12))
    env = PreferenceGym(rows, test_rows, tokenizer, data_batch_size_per_gpu=4)
    population = changes.pop("population", None) or make_population(4, hp_config=HP_CONFIG)
    arguments = {"num_epochs": 3, "tournament": TournamentSelection(2, True, 4), "mutation": Mutations(), **changes}
    return population, env, arguments


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tournament": TournamentSelection(2, True, 5)}, "population_size"),
        ({"tournament": None}, "tournament=None"),
        ({"mutation": None}, "mutation=None"),
        ({"test_rows": None}, "test_dataset"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"evo_steps": -1}, "evo_steps=-1"),
        ({"max_steps": 2.5}, "max_steps=2.5"),
        ({"num_sample_answers": -1}, "num_sample_answers=-1"),
        ({"tournament": 4}, "tournament=4"),
        ({"mutation": 4}, "mutation=4"),
        ({"num_epochs": 1}, "num_epochs=1: the run ends after 3 steps, before it could evolve: raise it"),
        ({"num_epochs": 1, "test_rows": None}, "test_dataset"),
        ({"evo_steps": 100}, "evo_steps=100: the run ends after 9 steps"),
        ({"fitness": "acuracy"}, "fitness='acuracy': is no fitness of this algorithm; the nearest is 'accuracy'"),
        ({"fitness": "loss"}, "fitness='loss'"),
        ({"fitness": 5}, "fitness=5"),
        ({"guards": {"max_chosen_logratio": 5}}, "guards.max_chosen_logratio=5: is no parameter; the nearest known"),
        ({"fitness": lambda evaluation: [1]}, "fitness=[1]"),
        ({"callbacks": [5]}, "callbacks=[5]"),
        ({"callbacks": 5}, "callbacks=5"),
        ({"checkpoint_path": 5}, "checkpoint_path=5"),
        ({"accelerator": "x"}, "accelerator='x'"),
        ({"save_elite": "no"}, "save_elite='no'"),
        ({"rows": [{**row, "prompt": "word " * 400} for row in make_rows(4)]}, "max_context_length"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_trains(
    make_population, tokenizer, tmp_path, changes, named
) -> None:
    population, env, arguments = bad_run(make_population, tokenizer, **changes)
    before = adapter_bits(population[0].base)
    with pytest.raises(EvoLLMError) as caught:
        finetune_llm_preference(population, env, run_dir=tmp_path / "run", verbose=False, **arguments)
    assert named in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert adapter_bits(population[0].base) == before
    assert not (tmp_path / "run").exists()


def test_agents_of_different_bases_are_refused(make_agent, gym, quiet) -> None:
    with pytest.raises(ConfigurationError, match="different bases"):
        finetune_llm_preference([make_agent(index=0), make_agent(index=1)], gym, **quiet)


def test_an_empty_population_and_equal_indices_are_refused(make_agent, gym, quiet) -> None:
    with pytest.raises(ConfigurationError, match=r"pop=\[\]"):
        finetune_llm_preference([], gym, **quiet)
    agent = make_agent()
    with pytest.raises(ConfigurationError, match="index"):
        finetune_llm_preference([agent, agent.clone()], gym, **quiet)


def test_a_folder_with_another_run_is_not_written_into(make_agent, gym, quiet) -> None:
    finetune_llm_preference([make_agent()], gym, max_steps=1, **quiet)
    before = (quiet["run_dir"] / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigurationError, match="run_dir"):
        finetune_llm_preference([make_agent()], gym, max_steps=1, **quiet)
    assert (quiet["run_dir"] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("population", [None, "agent", ["x"], [None]])
def test_what_is_no_population_is_refused(gym, quiet, population) -> None:
    with pytest.raises(ConfigurationError, match="pop="):
        finetune_llm_preference(population, gym, **quiet)


def test_an_agent_without_a_list_and_a_wrapped_one_are_refused(make_agent, gym, quiet) -> None:
    class Wrapper:
        def __init__(self, agent: DPO) -> None:
            self.agent = agent

    agent = make_agent()
    with pytest.raises(ConfigurationError, match=r"a list of at least one agent: \[agent\]"):
        finetune_llm_preference(agent, gym, **quiet)
    with pytest.raises(ConfigurationError, match="pass what it wraps"):
        finetune_llm_preference([Wrapper(agent)], gym, **quiet)
    with pytest.raises(ConfigurationError, match="env="):
        finetune_llm_preference([agent], None, **quiet)


def test_agents_that_would_mutate_differently_are_refused(make_model, make_agent, tokenizer, quiet) -> None:
    model = make_model()
    population = [make_agent(actor_network=model, index=i, hp_config=None if i == 1 else HP_CONFIG) for i in range(4)]
    _, env, arguments = bad_run(None, tokenizer, population=population)
    with pytest.raises(ConfigurationError, match="agent 1's differs"):
        finetune_llm_preference(population, env, **{**quiet, **arguments})


def test_a_mutation_with_nothing_to_change_is_refused(make_population, tokenizer, quiet) -> None:
    population, env, arguments = bad_run(make_population, tokenizer, population=make_population(4))
    with pytest.raises(ConfigurationError, match="hp_config=None"):
        finetune_llm_preference(population, env, **{**quiet, **arguments})
    # Without mutations the four agents are one agent four times, which goes on once.
    only_selection = {**arguments, "mutation": Mutations(1.0, 0.0)}
    assert len(finetune_llm_preference(population, env, **{**quiet, **only_selection})[0]) == 1


def test_a_whole_number_may_only_mutate_as_one(make_agent) -> None:
    with pytest.raises(ConfigurationError, match=r"batch_size=4.*dtype=int"):
        make_agent(batch_size=4, hp_config=HyperparameterConfig(batch_size=RLParameter(2, 8)))


def test_whole_numbers_mutate_through_a_run(make_population, tokenizer, evolution, tmp_path) -> None:
    env = PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4)
    population = make_population(
        4, batch_size=4, hp_config=HyperparameterConfig(batch_size=RLParameter(1, 8, dtype=int))
    )
    run = {"run_dir": tmp_path / "run", "verbose": False, "num_sample_answers": 0}
    population, _ = finetune_llm_preference(population, env, num_epochs=3, **evolution, **run)
    assert all(isinstance(agent.batch_size, int) and 1 <= agent.batch_size <= 8 for agent in population)


def test_the_elite_folder_is_one_of_its_own(make_agent, gym, tmp_path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    for elite in (tmp_path / "thesis", tmp_path / "run"):
        with pytest.raises(ConfigurationError, match="elite_path"):
            finetune_llm_preference(
                [make_agent()], gym, run_dir=tmp_path / "run", elite_path=elite, verbose=False, max_steps=1
            )
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"


def test_without_held_out_pairs_a_diverged_agent_is_not_the_best(make_population, tokenizer, quiet) -> None:
    env = PreferenceGym(make_rows(12), None, tokenizer, data_batch_size_per_gpu=4)
    population, record = make_population(3), Record()
    finetune_llm_preference(population, env, callbacks=[BreakAgent(population[0], 1), record], **quiet)
    (end,) = [event for kind, event in record.events if kind == "on_end"]
    assert end.best == 1


def test_scores_stay_comparable_when_references_move(make_agent, make_model, gym, quiet) -> None:
    """With a tiny learning rate two runs hardly differ, so a margin to a moved reference would be half the other's."""
    margins = []
    for name, moves in (("fixed", False), ("moving", True)):
        agent, record = make_agent(lr=1e-5), Record()
        run_dir = quiet["run_dir"].with_name(name)
        finetune_llm_preference(
            [agent],
            PreferenceGym(make_rows(12), make_rows(6, 12), gym.tokenizer, data_batch_size_per_gpu=4),
            num_epochs=2,
            update_reference_each_epoch=moves,
            callbacks=[record],
            **{**quiet, "run_dir": run_dir},
        )
        evaluations = [event.evaluations[0] for kind, event in record.events if kind == "on_evaluation"]
        margins.append([evaluation.mean_margin for evaluation in evaluations])
        assert len(agent.base.adapters.names) == 2
    assert margins[1] == pytest.approx(margins[0], rel=0.05)


def test_a_run_does_not_depend_on_what_ran_before_it_on_the_base(make_agent, make_model, tokenizer, quiet) -> None:
    bits = []
    for earlier in (False, True):
        model = make_model()
        for seed, batch_size in ((1, 5), (2, 4))[not earlier :]:
            env = PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, batch_size, seed=seed)
            agent = make_agent(actor_network=model)
            run_dir = quiet["run_dir"].with_name(f"{earlier}-{seed}")
            finetune_llm_preference([agent], env, num_epochs=2, **{**quiet, "run_dir": run_dir})
        bits.append(actor_bits(agent))
    assert bits[0] == bits[1]


def test_a_released_agent_says_so(make_population) -> None:
    first, _ = make_population(2)
    first.release()
    with pytest.raises(ConfigurationError, match="was released"):
        first.use_adapter("actor")
