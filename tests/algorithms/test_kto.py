from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_rows
from families import VOCABULARY, make_family
from peft import LoraConfig
from snapshots import actor_bits, base_bits
from torch import Tensor

from evollm import DPO, KTO, ConfigurationError, DataError, HyperparameterConfig, RLParameter, UnpairedGym
from evollm.algorithms import kto_step
from evollm.algorithms.kto_step import evaluate_together, kl_estimates, learn_together, mismatched
from evollm.algorithms.unpaired_losses import UNPAIRED_LOSSES, apo_zero_unpaired, kto
from evollm.data.samples import LABEL, Batch, Completion, Sample
from evollm.hpo import UnpairedEvaluation
from evollm.models.engine import BatchSlot, Engine, PassOptions
from evollm.models.flops import REFERENCES
from evollm.models.reference_cache import ReferenceCache

SHAPES = [(9, 5), (3, 12), (14, 1), (2, 2), (6, 11)]
LABELS = [1.0, 0.0, 0.0, 1.0, 1.0]
VALUES: list[dict[str, Any]] = [
    {"lr": 3e-3, "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6},
    {"lr": 1e-2, "beta": 0.1},
    {"lr": 5e-3, "beta": 0.5, "loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0},
]


def make_batch(seed: int = 0, shapes: Sequence[tuple[int, int]] = SHAPES, labels: Sequence[float] = LABELS) -> Batch:
    rng = np.random.default_rng(seed)
    samples = [Sample.of(*(rng.integers(VOCABULARY, size=size) for size in shape)) for shape in shapes]
    return Batch([replace(one, extras={LABEL: label}) for one, label in zip(samples, labels, strict=True)])


def make_agents(values: Sequence[dict[str, Any]] = VALUES, **shared: Any) -> list[KTO]:
    """Float64 agents on one small Llama, with weights as after some training."""
    model = make_family("llama")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    arguments = {"actor_network": model, "lora_config": lora, **shared}
    return [KTO(index=index, seed=index, **arguments, **own) for index, own in enumerate(values)]


def plain_logprob(agent: KTO, role: str, prompt: Any, answer: Any) -> Tensor:
    """log pi(answer | prompt) by transformers' own forward pass of one sequence."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]))
    with agent.select_adapter(role):
        logits = agent.base.adapters.peft_model(input_ids=ids[None]).logits[0, :-1].double()
    logprobs = logits.log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0]
    return logprobs[len(prompt) - 1 :].sum()


def plain_step(agent: KTO, batch: Batch) -> tuple[float, float, float]:
    """Loss, gradient norm and divergence, row by row as the paper and TRL write them."""
    texts = [(sample.prompt_ids, sample.completions[0].ids) for sample in batch]

    def ratio(prompt: Any, answer: Any) -> Tensor:
        with torch.no_grad():
            reference = plain_logprob(agent, "reference", prompt, answer)
        return plain_logprob(agent, "actor", prompt, answer) - reference

    with torch.no_grad():
        others = [ratio(prompt, texts[number - 1][1]) for number, (prompt, _) in enumerate(texts)]
    kl = max(0.0, sum(one.item() for one in others) / len(others)) if agent.loss_type == "kto" else 0.0
    total = torch.zeros((), dtype=torch.float64)
    for sample, (prompt, answer) in zip(batch, texts, strict=True):
        own = ratio(prompt, answer)
        if sample.label == 1:
            total = total + agent.desirable_weight * (1 - 1 / (1 + torch.exp(-agent.beta * (own - kl))))
        else:
            total = total + agent.undesirable_weight * (1 - 1 / (1 + torch.exp(-agent.beta * (kl - own))))
    loss = total / len(texts)
    gradients = torch.autograd.grad(loss, agent.actor_parameters())
    return loss.item(), torch.stack([one.square().sum() for one in gradients]).sum().sqrt().item(), kl


@pytest.mark.parametrize("values", VALUES)
def test_eight_steps_are_those_of_a_plain_computation(values: dict[str, Any]) -> None:
    (agent,) = make_agents([values])
    agent.base.adapters.restore_trainability(agent.actor_adapter)
    divergences = []
    for seed in range(8):
        batch = make_batch(seed)
        loss, norm, kl = plain_step(agent, batch)
        metrics = agent.learn(batch)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-9)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-7)
        assert metrics["kl"] == pytest.approx(kl, abs=1e-9)
        divergences.append(kl)
    assert any(divergences) == (agent.loss_type == "kto")


def test_losses_by_hand() -> None:
    """Log-ratio 2, divergence 1, beta 0.5: 1 - sigmoid(0.5) = 0.3775 and 1 - sigmoid(-0.5) = 0.6225."""
    ratios, desirable = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert kto(ratios, desirable, 1.0, 0.5).tolist() == pytest.approx([0.377541, 0.622459], abs=1e-6)
    assert apo_zero_unpaired(ratios, desirable, 1.0, 0.5).tolist() == pytest.approx([0.268941, 0.731059], abs=1e-6)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_gradients_far_on_the_wrong_side_are_finite(name: str) -> None:
    ratios = torch.tensor([-1e4, 1e4, 1e4, -1e4], requires_grad=True)
    UNPAIRED_LOSSES[name](ratios, torch.tensor([True, False, True, False]), 3.0, 0.5).sum().backward()
    assert torch.isfinite(ratios.grad).all()


def test_members_of_shared_passes_learn_what_they_learn_alone() -> None:
    together, alone = make_agents(), make_agents()
    for seed in range(3):
        batch = make_batch(seed)
        found = learn_together(together, batch)
        for agent, metrics in zip(alone, found, strict=True):
            assert agent.learn(batch) == pytest.approx(metrics, rel=1e-8, abs=1e-10)
    for first, second in zip(together, alone, strict=True):
        for mine, theirs in zip(first.actor_parameters(), second.actor_parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-10)


def test_small_passes_make_the_same_step() -> None:
    whole, parts = make_agents(VALUES[:1])[0], make_agents(VALUES[:1], micro_batch_size_per_gpu=1)[0]
    assert parts.learn(make_batch()) == pytest.approx(whole.learn(make_batch()), rel=1e-8)


def test_a_mismatched_answer_is_that_of_the_row_before_and_ends_at_the_limit() -> None:
    batch = make_batch()
    others = mismatched(batch, 12)
    assert [len(one.prompt_ids) for one in others] == [9, 3, 14, 2, 6]
    assert [len(one.completions[0]) for one in others] == [3, 5, 1, 1, 2]
    assert others[0].completions[0].ids.tolist() == batch[4].completions[0].ids[:3].tolist()
    assert others[1].completions[0] is batch[0].completions[0]
    assert mismatched(batch)[0].completions[0] is batch[4].completions[0]
    marked = replace(batch[0], completions=(Completion(np.arange(4), np.array([False, True, True, False])),))
    cut = mismatched(Batch([batch[1], marked]), 5)[0].completions[0]
    assert cut.mask.tolist() == [False, True]


def test_a_mismatched_answer_is_not_that_of_a_copy_of_the_row() -> None:
    first, second, third = make_batch().samples[:3]
    others = mismatched(Batch([first, second, second, third, first]))
    answers = [sample.completions[0] for sample in (third, first, first, second, third)]
    assert [one.completions[0] for one in others] == answers
    assert mismatched(Batch([first, first]))[0].completions[0] is first.completions[0]


def test_answers_of_a_base_with_few_positions_are_cut_for_the_divergence(make_model, lora) -> None:
    agent = KTO(actor_network=make_model(max_position_embeddings=16), lora_config=lora)
    learnt = agent.learn(make_batch(shapes=[(12, 4), (2, 14), (15, 1), (3, 3), (4, 12)]))
    assert np.isfinite(learnt["loss"])


def test_the_divergence_is_never_negative_and_that_of_one_answer_is_0() -> None:
    (agent,) = make_agents(VALUES[:1])
    agent.learn(make_batch())
    found = [kl_estimates([agent], make_batch(seed, SHAPES[:2], LABELS[:2]), ReferenceCache())[0] for seed in range(12)]
    assert min(found) == 0
    assert max(found) > 0
    assert kl_estimates([agent], make_batch(0, SHAPES[:1], LABELS[:1]), ReferenceCache()) == [0.0]


def test_a_replayed_agent_has_its_slot_in_the_pass_of_the_divergence(monkeypatch) -> None:
    (agent,) = make_agents(VALUES[:1])
    agent.slot, slots, known = BatchSlot(1, 3), [], Engine.logprobs

    def recorded(engine: Engine, items: Any, options: PassOptions, *kind: str) -> Any:
        slots.append(options.slot)
        return known(engine, items, options, *kind)

    monkeypatch.setattr(Engine, "logprobs", recorded)
    kl_estimates([agent], make_batch(), ReferenceCache())
    assert slots == [BatchSlot(1, 3), None]  # of the agent, of its reference


def test_references_are_computed_once_and_those_of_mismatched_answers_for_a_batch(monkeypatch) -> None:
    (agent,) = make_agents([{**VALUES[0], "update_epochs": 2}])
    agents = [agent, agent.clone(index=1)]
    batch, rows, known = make_batch(), [], Engine.logprobs

    def counted(engine: Engine, items: Any, options: PassOptions, *kind: str) -> Any:
        rows.extend([len(items[0].batch)] if REFERENCES in kind else [])
        return known(engine, items, options, *kind)

    monkeypatch.setattr(Engine, "logprobs", counted)
    learn_together(agents, batch)
    learn_together(agents, batch)
    # Five answers and five mismatched ones, under one reference of both; in the second batch the mismatched ones.
    assert rows == [5, 5, 5]
    assert len(agent.base.reference_cache) == 5


def test_metrics_without_a_class_are_nan_and_training_false_changes_nothing() -> None:
    (agent,) = make_agents(VALUES[:1])
    before = actor_bits(agent)
    metrics = agent.learn(make_batch(labels=[1.0] * 5), training=False)
    assert np.isnan(metrics["rewards/rejected"])
    assert np.isnan(metrics["rewards/margins"])
    assert metrics["rewards/chosen"] == pytest.approx(0.0, abs=1e-12)
    # Policy and reference are equal: each loss is half the weight.
    assert metrics["loss"] == pytest.approx(1.3 / 2)
    assert actor_bits(agent) == before


def gym_of(tokenizer: Any, count: int = 12, held_out: int = 8, **arguments: Any) -> UnpairedGym:
    return UnpairedGym(make_rows(count), make_rows(held_out, count), tokenizer, **arguments)


def test_an_agent_learns_what_labels_say(make_model, tokenizer, lora) -> None:
    env = gym_of(tokenizer, data_batch_size_per_gpu=6)
    agent = KTO(actor_network=make_model(), lora_config=lora, lr=5e-3, beta=0.3)
    frozen = base_bits(agent.base)
    before = agent.evaluate(env)
    assert before.auc == 0.5
    assert len(before) == 16
    for _ in range(16):
        agent.learn(env.next_batch())
    after = agent.evaluate(env)
    assert after.auc > 0.9
    assert after.mean_margin > 1
    assert base_bits(agent.base) == frozen
    observation, _ = env.reset(seed=0)
    assert env.step(agent.get_action(observation))[1] > 0.7


def test_labels_that_are_exchanged_teach_the_opposite(make_model, tokenizer, lora) -> None:
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in make_rows(12)]
    env = UnpairedGym(rows, make_rows(8, 12), tokenizer, data_batch_size_per_gpu=6)
    agent = KTO(actor_network=make_model(), lora_config=lora, lr=5e-3, beta=0.3)
    for _ in range(16):
        agent.learn(env.next_batch())
    assert agent.evaluate(env).auc < 0.1


def test_a_part_of_the_rows_has_both_labels_however_rare_one_is(tokenizer) -> None:
    """Racing compares members on few rows; without both labels everybody's AUC would be 0.5."""
    rows = [{"prompt": f"ask {one} ", "completion": f"say {one}", "label": one == 7} for one in range(20)]
    for seed in range(5):
        env = UnpairedGym(make_rows(8), rows, tokenizer, seed=seed)
        before: set[int] = set()
        for count in (2, 4, 8, 16):
            parts = list(env.eval_batches("test", rows=count))
            labels = np.concatenate([batch.labels for _, batch in parts])
            positions = {int(row) for part, _ in parts for row in part}
            assert sorted(set(labels)) == [0.0, 1.0]
            assert len(positions) == count
            assert before <= positions
            before = positions


def test_evaluations_do_not_depend_on_what_evolves_and_a_subset_is_of_the_same_rows(
    make_model, tokenizer, lora
) -> None:
    env = gym_of(tokenizer, data_batch_size_per_gpu=6)
    agent = KTO(actor_network=make_model(), lora_config=lora, lr=5e-3)
    agent.learn(env.next_batch())
    twin = agent.clone(index=1)
    twin.set_hyperparameters({"beta": 2.0, "desirable_weight": 3.0, "undesirable_weight": 0.1, "lr": 1.0})
    first, second = evaluate_together([agent, twin], env)
    assert first.equals(second)
    few = agent.evaluate(env, rows=6)
    assert len(few) == 6
    assert set(few.desirable) <= {0.0, 1.0}
    assert isinstance(few, UnpairedEvaluation)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_saved_agent_goes_on_with_the_same_bits(make_model, tokenizer, lora, tmp_path, resumed: bool) -> None:
    env = gym_of(tokenizer, data_batch_size_per_gpu=6)
    agent = KTO(actor_network=make_model(), lora_config=lora, lr=5e-3, beta=0.3, desirable_weight=1.2)
    batches = [env.next_batch() for _ in range(3)]
    agent.learn(batches[0])
    if resumed:
        agent.save_checkpoint(str(tmp_path / "agent"))
        other = KTO.load(str(tmp_path / "agent"), actor_network=make_model())
        assert (other.beta, other.desirable_weight) == (0.3, 1.2)
    else:
        other = agent.clone(index=1)
    for batch in batches[1:]:
        agent.learn(batch)
        other.learn(batch)
    assert actor_bits(other) == actor_bits(agent)


def test_a_population_shares_one_reference_and_begins_within_its_bounds(make_model, lora) -> None:
    bounds = {"beta": RLParameter(min=0.05, max=0.5), "desirable_weight": RLParameter(min=0.5, max=2.0)}
    agents = KTO.population(3, actor_network=make_model(), lora_config=lora, hp_config=HyperparameterConfig(**bounds))
    assert len({agent.adapter("reference") for agent in agents}) == 1
    assert len({agent.beta for agent in agents}) == 3
    assert all(0.5 <= agent.desirable_weight <= 2.0 for agent in agents)


def test_rows_on_which_the_reference_is_not_finite_are_left_out_and_mismatched_ones_too(make_model, lora) -> None:
    """The embedding of token 5 is NaN: the row with it teaches nothing, and neither does its answer elsewhere."""
    network = make_model()
    with torch.no_grad():
        network.get_input_embeddings().weight[5] = torch.nan
    rng = np.random.default_rng(0)
    clean = [Sample.of(rng.integers(6, 30, 4), rng.integers(6, 30, 3), row=row) for row in range(4)]
    broken = Sample.of(np.array([7, 5, 8]), np.array([9, 10]), row=4)
    labelled = [replace(one, extras={LABEL: float(row % 2)}) for row, one in enumerate([*clean, broken])]
    agent, other = (KTO(actor_network=network, lora_config=lora, lr=1e-3, seed=seed) for seed in (1, 1))
    with pytest.warns(UserWarning, match="left out: train row 4"):
        metrics = agent.learn(Batch(labelled, "train"))
    assert other.learn(Batch(labelled[:4])) == metrics
    assert not agent.diverged
    assert actor_bits(agent) == actor_bits(other)


def test_a_mismatched_answer_on_which_the_reference_is_not_finite_is_not_in_the_divergence(monkeypatch) -> None:
    (agent,) = make_agents(VALUES[:1])
    agent.learn(make_batch())
    batch = make_batch(3)
    whole = kl_estimates([agent], batch, ReferenceCache())[0]
    known = kto_step.reference_logprobs

    def broken(agents: Any, others: Batch, **arguments: Any) -> Any:
        found = known(agents, others, **arguments)
        found[0].chosen[2] = torch.nan
        return found

    monkeypatch.setattr(kto_step, "reference_logprobs", broken)
    rest = kl_estimates([agent], batch, ReferenceCache())[0]
    assert np.isfinite(rest)
    assert rest != whole


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0.0}, "beta=0.0"),
        ({"desirable_weight": -1.0}, "desirable_weight=-1.0"),
        ({"undesirable_weight": "1"}, "undesirable_weight='1'"),
        ({"loss_type": "sigmoid"}, "loss_type='sigmoid'.*kto, apo_zero_unpaired.*for DPO"),
        ({"loss_type": "kot"}, "the nearest is 'kto'"),
        ({"loss_type": ["kto"]}, "loss_type="),
        ({"batch_size": 1}, "batch_size=1.*apo_zero_unpaired"),
        ({"hp_config": HyperparameterConfig(batch_size=RLParameter(min=1, max=4, dtype=int))}, "batch_size"),
    ],
)
def test_what_no_agent_can_have_is_refused_at_once(make_model, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        KTO(actor_network=make_model(), **values)


def test_batches_that_cannot_be_learnt_from_are_refused(make_model, tokenizer, lora) -> None:
    agent = KTO(actor_network=make_model(), lora_config=lora)
    batch = make_batch()
    assert KTO(actor_network=make_model(), batch_size=1, loss_type="apo_zero_unpaired").learn(batch)["kl"] == 0
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: agent.learn(Batch(batch.samples[:1])), "experiences='1 answer'.*at least 2"),
        (lambda: agent.learn(Batch([replace(one, extras={}) for one in batch])), r"labels'\]=None: must be 1"),
        (lambda: agent.learn(Batch([replace(one, extras={LABEL: -1.0}) for one in batch])), r"labels'\]=-1.0"),
        (
            lambda: agent.learn(Batch([replace(one, completions=one.completions * 2) for one in batch])),
            "two completions.*UnpairedGym",
        ),
    ]
    for learn, message in refused:
        with pytest.raises(DataError, match=message):
            learn()
    assert agent.steps == 0
    with pytest.raises(ConfigurationError, match="no UnpairedGym"):
        agent.evaluate(object())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="rejected side"):
        DPO(actor_network=make_model(), lora_config=lora).learn(batch)
