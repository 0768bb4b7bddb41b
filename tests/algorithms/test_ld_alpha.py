"""LD-DPO (arXiv 2409.06411): tokens beyond the length of the pair's shorter completion count `ld_alpha` times.

As in TRL, the sums of the policy and of the reference are weighed alike, and likelihoods and lengths are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_family
from peft import LoraConfig
from torch import Tensor

from evollm import DPO, ConfigurationError
from evollm.algorithms.dpo_step import DPOObjective, learn_together
from evollm.algorithms.loss_inputs import LossTable
from evollm.algorithms.losses import LossSettings
from evollm.algorithms.step import Linearised
from evollm.data.samples import Batch, Sample
from evollm.models import ReferenceCache
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.fast_paths import FastPaths
from evollm.models.logprobs import CompletionSums, MemberLogprobs, TokenLogprobs, pieces_of

SHAPES = [(9, 5, 3), (3, 1, 12), (14, 7, 7)]


def make_batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch([Sample.of(*(rng.integers(VOCABULARY, size=size) for size in shape)) for shape in SHAPES])


def make_agent(model: Any, **arguments: Any) -> DPO:
    targets = ["q", "v", "wo"] if model.config.is_encoder_decoder else ["q_proj", "down_proj"]
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return DPO(actor_network=model, lora_config=lora, **{"lr": 1e-2, "max_grad_norm": 1e9, **arguments})


def token_logprobs(network: Any, prompt: np.ndarray, side: np.ndarray) -> Tensor:
    """(T,) log-probs of a side's tokens, by the model's own logits."""
    ids, targets = torch.from_numpy(np.concatenate([prompt, side]))[None], torch.from_numpy(side)
    if network.config.is_encoder_decoder:
        logits = network(input_ids=ids[:, : len(prompt)], labels=targets[None]).logits[0]
    else:
        logits = network(ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(side)), targets]


def direct_loss(agent: DPO, batch: Batch, alpha: float, nll_alpha: float) -> Tensor:
    """The mean over pairs of -log sigmoid(beta * weighed margin), and the likelihood of all chosen tokens."""

    def sums(adapter: str | None) -> tuple[list[Tensor], list[Tensor]]:
        weighed, whole = [], []
        for row in range(len(batch)):
            pair = batch[row]
            shorter = min(len(pair.chosen_ids), len(pair.rejected_ids))
            for side in (pair.chosen_ids, pair.rejected_ids):
                with agent.base.active(adapter) as network:
                    found = token_logprobs(network, pair.prompt_ids, side)
                weighed.append(found[:shorter].sum() + alpha * found[shorter:].sum())
                whole.append(found.sum())
        return weighed, whole

    policy, whole = sums(agent.actor_adapter)
    with torch.no_grad():
        reference, _ = sums(agent.adapter("reference"))
    ratios = torch.stack(policy) - torch.stack(reference)
    losses = -torch.nn.functional.logsigmoid(agent.beta * (ratios[0::2] - ratios[1::2]))
    nll = -torch.stack(whole)[0::2].sum() / int(batch.chosen_lengths.sum())
    return losses.mean() + nll_alpha * nll


def only_plain(agent: DPO) -> None:
    Engine.of(agent.base).prepare = lambda members, length: FastPaths(False, False, False, length)  # type: ignore


@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
def test_loss_and_gradient_of_ld_dpo_are_those_of_weighed_tokens(family: str, ld_alpha: float, plain: bool) -> None:
    agent = make_agent(make_family(family), ld_alpha=ld_alpha, nll_alpha=0.7, gradient_checkpointing=False)
    learn_together([agent], make_batch(1))  # Away from the reference, where all margins are 0.
    if plain:
        only_plain(agent)
    batch = make_batch()
    direct = direct_loss(agent, batch, ld_alpha, nll_alpha=0.7)
    expected = torch.autograd.grad(direct, agent.actor_parameters())
    gradients: list[Tensor] = []
    agent.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in agent.actor_parameters())
    )
    metrics = agent.learn(batch)
    assert metrics["loss"] == pytest.approx(direct.item(), rel=0, abs=1e-9)
    torch.testing.assert_close(gradients, list(expected), rtol=1e-8, atol=1e-10)


PAIRS = Batch([Sample.of(*(np.zeros(size, np.int64) for size in shape)) for shape in ((2, 4, 2), (2, 1, 3))])


def two_pairs() -> tuple[MemberLogprobs, CompletionSums]:
    """Lengths (4, 2) and (1, 3): the policy's sums are -8, -1 and -3, -9; up to the shorter side -2, -1 and -3, -4."""

    def tensors(*values: Sequence[float]) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(value, dtype=torch.float64) for value in values)

    # Both chosen sides, then both rejected ones.
    (tokens,) = tensors([-1.0, -1.0, -2.0, -4.0, -1.0, -1.0, -2.0, -4.0, -2.0, -3.0])
    policy = TokenLogprobs(tokens[None], pieces_of(PAIRS)).of(0)
    return policy, CompletionSums(tensors([-9.0, -2.0], [-3.5, -6.0]), tensors([-4.0, -2.0], [-3.5, -3.0]))


def objective(ld_alpha: float | None, terms: Sequence[str] = ("sigmoid",), nll_alpha: float = 0.0) -> DPOObjective:
    weights = tuple((name, 1.0) for name in terms)
    reference = two_pairs()[1].weighted(ld_alpha)
    table, settings = LossTable(PAIRS, [reference]), LossSettings(beta=0.1)
    return DPOObjective(PAIRS, reference, table, 0, weights, settings, nll_alpha, ld_alpha)


@pytest.mark.parametrize(
    ("ld_alpha", "margins"),
    # At 0.5 the policy's sums are -5, -3 and -1, -6.5, the reference's -6.5, -3.5 and -2, -4.5: log-ratios 1.5, 0.5
    # and 1, -2. At 0 the longer sides' are 2 and -1, and at 1, or without it, 1 and -3.
    [(None, (0.5, 4.0)), (1.0, (0.5, 4.0)), (0.5, (1.0, 3.0)), (0.0, (1.5, 2.0))],
)
def test_ld_dpo_has_the_values_worked_out_by_hand(ld_alpha: float | None, margins: tuple[float, float]) -> None:
    metrics = objective(ld_alpha).metrics(two_pairs()[0])
    expected = np.mean([np.log1p(np.exp(-0.1 * margin)) for margin in margins])
    assert metrics["loss"] == pytest.approx(expected, abs=1e-12)
    assert metrics["rewards/margins"] == pytest.approx(0.1 * np.mean(margins), abs=1e-12)


def test_likelihoods_are_over_all_tokens_whatever_ld_alpha() -> None:
    policy, _ = two_pairs()
    assert objective(0.0, ["sft"]).metrics(policy)["loss"] == pytest.approx(9 / 5)
    assert objective(0.0, nll_alpha=1.0).metrics(policy)["nll_loss"] == pytest.approx(9 / 5)


def test_a_loss_of_the_whole_batch_falls_into_rows_with_ld_alpha_too() -> None:
    policy, _ = two_pairs()
    policy.found.values.requires_grad_()
    whole = objective(0.3, ["aot"], nll_alpha=0.5)
    expected = torch.autograd.grad(whole.loss(range(2), policy), policy.found.values, retain_graph=True)
    linear, parts = Linearised.of(whole, policy), []
    for row in range(2):
        own = [piece for piece in policy.pieces if piece.row == row]
        values = policy.found.values[:, policy.found.index_of(own)]
        alone = TokenLogprobs(values, tuple(piece._replace(row=0) for piece in own))
        parts.append(linear.loss([row], alone.of(0)))
    torch.testing.assert_close(torch.autograd.grad(sum(parts), policy.found.values), expected)


def test_ld_alpha_of_1_learns_what_none_learns(make_model: Callable[..., Any]) -> None:
    weights = []
    for ld_alpha in (None, 1.0):
        agent = make_agent(make_model(), ld_alpha=ld_alpha, loss_type=["sigmoid", "aot"])
        for seed in range(2):
            agent.learn(make_batch(seed))
        weights.append([parameter.detach() for parameter in agent.actor_parameters()])
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


def test_fitness_and_margins_do_not_depend_on_ld_alpha(make_model: Callable[..., Any], gym) -> None:
    model = make_model()
    plain, weighed = make_agent(model), make_agent(model, ld_alpha=0.0)
    batch = gym.next_batch()
    plain.learn(batch)
    weighed.base.adapters.load(weighed.actor_adapter, plain.base.adapters.export(plain.actor_adapter).tensors)
    assert all(np.array_equal(*sides) for sides in zip(plain.logratios(batch), weighed.logratios(batch), strict=True))
    assert plain.test(gym) == weighed.test(gym)
    assert plain.evaluate(gym).mean_margin == weighed.evaluate(gym).mean_margin
    assert weighed.learn(batch)["loss"] != plain.learn(batch)["loss"]


def test_references_with_and_without_the_shorter_sums_are_kept_apart(make_model, tmp_path) -> None:
    model, batch = make_model(), make_batch()
    plain, weighed = make_agent(model), make_agent(model, ld_alpha=0.5)
    base = plain.base
    assert base.adapters.fingerprint(plain.adapter("reference")) == base.adapters.fingerprint(
        weighed.adapter("reference")
    )
    assert plain.reference_logprobs(batch).up_to_shorter is None
    expected = weighed.reference_logprobs(batch)
    assert plain.reference_logprobs(batch).up_to_shorter is None
    assert len(base.reference_cache) == 2 * len(batch)
    base.reference_cache.save(tmp_path / "kept")
    again = ReferenceCache()
    again.load(tmp_path / "kept")
    base.reference_cache = again
    torch.testing.assert_close(weighed.reference_logprobs(batch).columns, expected.columns, rtol=0, atol=0)
    assert len(again) == 2 * len(batch)
    again.forget(base.adapters.fingerprint(plain.adapter("reference")))
    assert len(again) == 0


def test_no_budget_changes_the_sums_up_to_the_shorter_side() -> None:
    agent = make_agent(make_family("llama"))
    engine, batch = Engine.of(agent.base), make_batch()
    names = [agent.actor_adapter, None]
    expected = engine.logprobs(Item.on(batch, names), PassOptions())
    for options in (PassOptions(token_budget=1), PassOptions(max_pairs=2)):
        for found, wanted in zip(engine.logprobs(Item.on(batch, names), options), expected, strict=True):
            sums, other = (one.sums(up_to_shorter=True).up_to_shorter for one in (found, wanted))
            torch.testing.assert_close(sums, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ld_alpha", [-0.1, 1.5, float("nan"), "half", True])
def test_an_ld_alpha_that_cannot_work_is_refused(make_model, ld_alpha: object) -> None:
    with pytest.raises(ConfigurationError, match="ld_alpha"):
        make_agent(make_model(), ld_alpha=ld_alpha)


def test_a_checkpoint_remembers_ld_alpha(make_model, tmp_path) -> None:
    model = make_model()
    make_agent(model, ld_alpha=0.25).save_checkpoint(str(tmp_path / "agent"))
    assert DPO.load(str(tmp_path / "agent"), actor_network=model).settings.ld_alpha == 0.25
