"""DPO agents with other losses than DPO's own."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import make_rows
from families import VOCABULARY, make_family
from torch import Tensor

from evollm import (
    DPO,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.algorithms.losses import LOSSES, LossSettings, PairScores
from evollm.data.samples import Batch, Sample

EXACT = {"rtol": 1e-9, "atol": 1e-11}


SHAPES = [(9, 5, 7), (3, 12, 2), (14, 1, 6), (1, 2, 9), (6, 11, 3)]


@pytest.fixture
def batch() -> Batch:
    rng = np.random.default_rng(0)
    return Batch([Sample.of(*(rng.integers(VOCABULARY, size=size) for size in shape)) for shape in SHAPES])


@pytest.fixture
def make_exact(lora):
    """Float64 agents on one small base; the actor is not the reference."""
    model = make_family("llama")

    def make(**arguments) -> DPO:
        agent = DPO(actor_network=model, lora_config=lora, nll_alpha=0, max_grad_norm=1e9, **arguments)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in agent.actor_parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        return agent

    return make


def loss_and_gradient(agent: DPO, batch: Batch) -> tuple[float, list[Tensor]]:
    """What `learn` reports and hands to the optimizer."""
    seen: list[Tensor] = []
    agent.optimizer.step = lambda: seen.extend(p.grad.clone() for p in agent.actor_parameters())  # type: ignore
    return agent.learn(batch)["loss"], seen


def by_hand(agent: DPO, batch: Batch, names: list[str], weights: list[float], settings: LossSettings):
    """The same by PEFT's own forward passes, one for each sequence, and autograd over the whole batch."""
    network = agent.get_policy()
    sums = []
    for row in range(len(batch)):
        prompt, chosen = int(batch.prompt_lengths[row]), int(batch.chosen_lengths[row])
        end = prompt + chosen
        ids = torch.from_numpy(batch[row].token_ids)
        rejected = ids[end : end + int(batch.rejected_lengths[row])]
        for side in (ids[prompt:end], rejected):
            sequence = torch.cat([ids[:prompt], side])
            logits = network(sequence[None]).logits[0, prompt - 1 : -1]
            sums.append(logits.log_softmax(-1)[range(len(side)), side].sum())
    policy = torch.stack(sums).view(-1, 2)
    reference = agent.reference_logprobs(batch)
    scores = PairScores(
        policy[:, 0],
        policy[:, 1],
        reference.chosen,
        reference.rejected,
        torch.from_numpy(batch.chosen_lengths),
        torch.from_numpy(batch.rejected_lengths),
        float(batch.chosen_lengths.mean()),
    )
    loss = sum(weight * LOSSES[name](scores, settings).mean() for name, weight in zip(names, weights, strict=True))
    return loss.item(), list(torch.autograd.grad(loss, agent.actor_parameters()))


@pytest.mark.parametrize("token_budget", [None, 30])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_an_agent_learns_by_each_loss_as_autograd_does_over_the_whole_batch(
    make_exact, batch, name: str, token_budget: int | None
) -> None:
    agent = make_exact(loss_type=name, label_smoothing=0.1, beta=0.3, token_budget=token_budget)
    expected = by_hand(agent, batch, [name], [1.0], LossSettings(beta=0.3, label_smoothing=0.1))
    loss, gradient = loss_and_gradient(agent, batch)
    assert loss == pytest.approx(expected[0], rel=1e-9)
    for found, right in zip(gradient, expected[1], strict=True):
        torch.testing.assert_close(found, right, **EXACT)


def test_losses_add_up_with_their_weights(make_exact, batch) -> None:
    agent = make_exact(loss_type=["sigmoid", "aot", "sft"], loss_weights=[1.0, 0.5, 0.25])
    expected = by_hand(agent, batch, ["sigmoid", "aot", "sft"], [1.0, 0.5, 0.25], LossSettings())
    loss, gradient = loss_and_gradient(agent, batch)
    assert loss == pytest.approx(expected[0], rel=1e-9)
    for found, right in zip(gradient, expected[1], strict=True):
        torch.testing.assert_close(found, right, **EXACT)


def test_members_of_different_losses_share_a_pass_and_learn_what_they_learn_alone(make_exact, batch) -> None:
    from evollm.algorithms.dpo_step import learn_together  # noqa: PLC0415

    names = ["sigmoid", "aot", "ipo"]
    alone, together = ([make_exact(loss_type=name, index=row) for row, name in enumerate(names)] for _ in range(2))
    for agent in alone:
        agent.learn(batch)
    learn_together(together, batch)
    for one, other in zip(alone, together, strict=True):
        for found, right in zip(other.actor_parameters(), one.actor_parameters(), strict=True):
            torch.testing.assert_close(found, right, **EXACT)


def test_a_run_evolves_the_loss_and_its_smoothing(make_model, lora, tokenizer, tmp_path) -> None:
    def run(folder: str, **arguments) -> list[DPO]:
        env = PreferenceGym(make_rows(8), make_rows(4, 8), tokenizer, data_batch_size_per_gpu=2)
        population = DPO.population(
            4,
            actor_network=make_model(),
            lora_config=lora,
            lr=1e-3,
            label_smoothing=0.1,
            hp_config=HyperparameterConfig(
                loss_type=RLParameter(choices=("sigmoid", "ipo", "aot")), label_smoothing=RLParameter(0.05, 0.4)
            ),
        )
        return finetune_llm_preference(
            population,
            env,
            evo_steps=1,
            tournament=TournamentSelection(2, True, 4, rand_seed=3),
            mutation=Mutations(0, 1, rand_seed=5),
            checkpoint_steps=1,
            verbose=False,
            tensorboard=True,
            **arguments,
            **({"run_dir": tmp_path / folder} if "resume_from_checkpoint" not in arguments else {}),
        )[0]

    population = run("whole", max_steps=4)
    lines = [json.loads(line) for line in (tmp_path / "whole/lineage.jsonl").read_text().splitlines()]
    changes = {
        mutation["name"]: mutation
        for line in lines
        for birth in line.get("births", [])
        for mutation in birth["mutations"]
    }
    assert changes.keys() == {"loss_type", "label_smoothing"}
    assert changes["loss_type"]["factor"] is None
    assert len({agent.loss_type for agent in population}) > 1
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-000004")
    resumed = run("cut", max_steps=4, resume_from_checkpoint=tmp_path / "cut")
    assert [agent.hyperparameter_values() for agent in resumed] == [
        agent.hyperparameter_values() for agent in population
    ]


def test_a_checkpoint_keeps_several_losses(make_exact, batch, tmp_path) -> None:
    agent = make_exact(loss_type=("hinge", "sft"), loss_weights=(1, 0.5))
    agent.save_checkpoint(str(tmp_path / "saved"))
    loaded = DPO.load(str(tmp_path / "saved"), actor_network=agent.base.network)
    assert loaded.loss_terms == agent.loss_terms == (("hinge", 1.0), ("sft", 0.5))
    assert loaded.learn(batch, training=False)["loss"] == agent.learn(batch, training=False)["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "sigmoidal"}, r"loss_type='sigmoidal'.*nearest is 'sigmoid'"),
        ({"loss_type": []}, r"loss_type=\[\]: must be a name or a list"),
        ({"loss_type": ["sigmoid", 3]}, "loss_type"),
        ({"loss_type": "exo_pair"}, r"label_smoothing=0\.0: must be above 0 and below 0\.5"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0\.5: must be at least 0 and below"),
        ({"label_smoothing": math.nan}, "label_smoothing=nan"),
        ({"loss_weights": [1, 2]}, r"loss_weights=\[1\.0, 2\.0\]: must hold a number for each of loss_type='sigmoid'"),
        ({"loss_weights": [0.0], "nll_alpha": 0}, r"loss_weights=\[0\.0\]: are all 0, and so is nll_alpha"),
        ({"loss_weights": "1"}, "loss_weights='1': must be a list"),
        ({"discopop_tau": 0}, "discopop_tau=0: must be above 0"),
        ({"hp_config": HyperparameterConfig(loss_type=RLParameter(choices=("ipo", "aot")))}, "not one of its choices"),
    ],
)
def test_a_loss_that_cannot_work_is_refused_by_name(make_agent, arguments, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_agent(**arguments)
