from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_executor import PlainExecutor

from evollm import DPO, ConfigurationError, PreferenceGym, finetune_llm_preference
from evollm.algorithms.dpo_step import evaluate_together
from evollm.hpo import Evaluation
from evollm.models.engine import Engine
from evollm.runs.evaluations import evaluations_to_bytes, read_evaluations


@pytest.fixture
def trained(make_population, gym):
    """Two agents that have learnt, each with its own learning rate."""
    population = make_population(2, token_budget=10_000)
    for agent, lr in zip(population, (1e-2, 3e-2), strict=True):
        agent.lr = lr
        for _ in range(3):
            agent.learn(gym.next_batch())
    return population


def dense(agent: DPO, gym: PreferenceGym) -> np.ndarray:
    """(n,) KL(pi || ref) of each pair, from all logits of one sequence at a time."""
    found = []
    for sample in gym.test_pairs:
        sides = []
        for completion in sample.completions:
            ids = torch.from_numpy(np.concatenate([sample.prompt_ids, completion.ids]))[None]
            logprobs = []
            for name in (agent.actor_adapter, agent.adapter("reference")):
                with torch.no_grad(), agent.base.active(name) as network:
                    logits = network(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1]
                logprobs.append(logits.double().log_softmax(dim=1))
            policy, reference = logprobs
            sides.append((policy.exp() * (policy - reference)).sum(dim=1)[torch.from_numpy(completion.scored)].sum())
        found.append(float(sum(sides) / 2))
    return np.array(found)


def test_the_kl_is_that_of_the_dense_distributions(trained, gym) -> None:
    for agent in trained:
        measured = agent.evaluate(gym, kl=True)
        assert measured.kl is not None
        np.testing.assert_allclose(measured.kl, dense(agent, gym), rtol=1e-4, atol=1e-6)
        assert measured.kl.min() > 1e-4
        plain = agent.evaluate(gym)
        assert plain.kl is None
        np.testing.assert_array_equal(plain.chosen_logratios, measured.chosen_logratios)


def test_members_that_share_a_pass_have_their_own_kl(trained, gym) -> None:
    """In one pass the states of the members lie one block after the other, and the reference's belong to each block."""
    together = evaluate_together(trained, gym, kl=True)
    for agent, measured in zip(trained, together, strict=True):
        np.testing.assert_allclose(measured.kl, dense(agent, gym), rtol=1e-4, atol=1e-6)


def test_without_the_tiled_head_and_with_one_sequence_at_a_time_it_is_the_same(trained, gym, monkeypatch) -> None:
    agent = trained[0]
    expected = agent.evaluate(gym, kl=True).kl
    prepare = Engine.prepare
    for change in ({"tiled_head": False}, {"shared_prompt": False}, {"tiled_head": False, "shared_prompt": False}):
        monkeypatch.setattr(
            Engine, "prepare", lambda self, *args, change=change: replace(prepare(self, *args), **change)
        )
        np.testing.assert_allclose(agent.evaluate(gym, kl=True).kl, expected, rtol=1e-4, atol=1e-6)


def test_an_untrained_agent_has_no_divergence(make_agent, gym) -> None:
    measured = make_agent().evaluate(gym, kl=True)
    np.testing.assert_allclose(measured.kl, 0.0, atol=1e-6)


def test_a_guard_on_the_kl_is_measured_recorded_and_decides(make_population, gym, tmp_path) -> None:
    population = make_population(2)
    population[0].lr, population[1].lr = 1e-3, 5e-2
    with pytest.warns(UserWarning, match="every agent breaks a guard"):
        _, fitnesses = finetune_llm_preference(
            population, gym, max_steps=3, guards={"max_kl": 1e-9}, run_dir=tmp_path / "run", verbose=False
        )
    assert fitnesses == [-1e9, -1e9]
    (path,) = (tmp_path / "run" / "evaluations").iterdir()
    found = read_evaluations(path)
    assert found["agent-0"].kl.mean() < found["agent-1"].kl.mean()


def test_an_evaluation_without_the_kl_is_read_as_before(tmp_path) -> None:
    old, new = Evaluation(np.ones(2), np.zeros(2)), Evaluation(np.ones(2), np.zeros(2), np.full(2, 0.5))
    (tmp_path / "both.safetensors").write_bytes(evaluations_to_bytes({"old": old, "new": new}))
    found = read_evaluations(tmp_path / "both.safetensors")
    assert found["old"].kl is None
    assert found["new"].kl.tolist() == [0.5, 0.5]
    with pytest.raises(ConfigurationError, match=r"kl\.shape"):
        Evaluation(np.ones(2), np.zeros(2), np.ones(3))


def test_an_executor_that_cannot_measure_the_kl_is_refused(make_population, gym, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"guards\.max_kl=1\.0: needs an argument kl"):
        finetune_llm_preference(
            make_population(2), gym, guards={"max_kl": 1.0}, executor=PlainExecutor, run_dir=tmp_path / "run"
        )
