from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_family
from peft import LoraConfig
from snapshots import actor_bits
from torch import Tensor

from evollm import GRPO, SFT, ConfigurationError, DataError
from evollm.algorithms.grpo_step import learn_each, learn_together
from evollm.algorithms.policy_losses import TOKEN_WEIGHTS, clipped_surrogate, divergence_estimates, group_advantages
from evollm.algorithms.rollouts import ROLLOUT, Rollout
from evollm.data.samples import Batch, Completion, Sample
from evollm.models.runner import Runner

# Prompt, then the answers of a group.
SHAPES = [(9, 5, 1, 7), (3, 12, 4, 4), (6, 2, 11, 3)]
REWARDS = [(1.0, 0.0, 0.5), (2.0, 2.0, 2.0), (-1.0, 0.25, 3.0)]
MOST = 12
VALUES: list[dict[str, Any]] = [
    {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "temperature": 0.7},
    {"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.08, "beta": 0.1, "temperature": 1.6},
    {"loss_type": "dapo", "scale_rewards": "batch", "mask_truncated_completions": True},
    {"loss_type": "bnpo", "beta": 0.0, "micro_batch_size_per_gpu": 1},
]


def make_agent(values: dict[str, Any], **more: Any) -> GRPO:
    """A float64 agent on a small Llama, with weights as after some training."""
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    settings = {"lr": 1e-2, "max_completion_length": MOST, "group_size": 3, **values, **more}
    agent = GRPO(actor_network=make_family("llama"), lora_config=lora, **settings)
    agent.base.adapters.restore_trainability(agent.actor_adapter)
    return agent


def make_batch(agent: GRPO, seed: int = 0, rewards: Sequence[Sequence[float]] = REWARDS) -> Batch:
    rng = np.random.default_rng(seed)
    table = np.array(rewards)
    advantages = np.full(table.shape, np.nan)
    usable = np.isfinite(table).all(axis=1)
    if usable.any():
        advantages[usable] = group_advantages(table[usable], agent.scale_rewards)
    samples = []
    for row, (prompt, *answers) in enumerate(SHAPES):
        completions = tuple(Completion(rng.integers(VOCABULARY, size=size)) for size in answers)
        ended = np.array([size < 11 for size in answers])
        own = Rollout(table[row], table[row][:, None], ("points",), advantages[row], ended)
        samples.append(Sample(rng.integers(VOCABULARY, size=prompt), completions, row, {ROLLOUT: own}))
    return Batch(samples, "train")


def plain_logprobs(agent: GRPO, role: str, sample: Sample) -> list[Tensor]:
    """For each answer log softmax(logits / temperature) of its tokens, by transformers' own passes."""
    found = []
    for answer in sample.completions:
        ids = torch.from_numpy(np.concatenate([sample.prompt_ids, answer.ids]))
        with agent.select_adapter(role):
            logits = agent.base.adapters.peft_model(input_ids=ids[None]).logits[0, :-1].double()
        logprobs = (logits / agent.temperature).log_softmax(dim=-1).gather(1, ids[1:, None])[:, 0]
        found.append(logprobs[len(sample.prompt_ids) - 1 :])
    return found


def plain_loss(agent: GRPO, batch: Batch, old: list[list[Tensor]], reference: list[list[Tensor]]) -> Tensor:
    """The loss as papers and TRL write it: (answers, tokens) tables with a mask."""
    rewards = torch.tensor([sample.extras[ROLLOUT].rewards.tolist() for sample in batch], dtype=torch.float64)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = {
        "group": rewards.std(dim=1, keepdim=True) + 1e-4,
        "batch": rewards.std() + 1e-4,
        "none": torch.ones(1, dtype=torch.float64),
    }[agent.scale_rewards]
    advantages = (centred / spread).flatten()[:, None]
    current = [one for sample in batch for one in plain_logprobs(agent, "actor", sample)]
    lengths = torch.tensor([len(one) for one in current])
    ended = torch.tensor([bool(one) for sample in batch for one in sample.extras[ROLLOUT].ended])
    mask = torch.arange(MOST)[None] < lengths[:, None]
    if agent.mask_truncated_completions:
        mask = mask & ended[:, None]

    def table(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([torch.nn.functional.pad(one, (0, MOST - len(one))) for one in parts])

    logprobs = table(current)
    ratio = torch.exp(logprobs - table([one for own in old for one in own]))
    clipped = torch.clamp(ratio, 1 - agent.epsilon, 1 + agent.epsilon_high)
    losses = -torch.min(ratio * advantages, clipped * advantages)
    if agent.beta:
        apart = table([one for own in reference for one in own]) - logprobs
        weight = ratio if agent.use_bias_correction_kl else 1.0
        losses = losses + agent.beta * weight * (torch.exp(apart) - apart - 1)
    if agent.loss_type == "grpo":
        return ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    if agent.loss_type == "dr_grpo":
        return (losses * mask).sum() / (len(losses) * MOST)
    return (losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("values", VALUES)
def test_steps_on_the_same_answers_are_those_of_a_plain_computation(values: dict[str, Any]) -> None:
    agent = make_agent({**values, "update_epochs": 1})
    batch = make_batch(agent)
    with torch.no_grad():
        old, reference = ([plain_logprobs(agent, role, one) for one in batch] for role in ("actor", "reference"))
    clipped = 0.0
    for number in range(4):
        loss = plain_loss(agent, batch, old, reference)
        gradients = torch.autograd.grad(loss, agent.actor_parameters())
        norm = torch.stack([one.square().sum() for one in gradients]).sum().sqrt().item()
        # As in `update_epochs`: the policy that gave the answers is the one before the first step.
        known = [
            replace(one, extras={ROLLOUT: replace(one.extras[ROLLOUT], old=tuple(then))})
            for one, then in zip(batch, old, strict=True)
        ]
        metrics = agent.learn(Batch(batch.samples if number == 0 else known, "train"))
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-9)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
        clipped += metrics["clip_ratio/region_mean"]
    assert (metrics["kl"] > 0) == (agent.beta > 0)
    assert clipped > 0
    assert metrics["reward"] == pytest.approx(np.mean(REWARDS))
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)


def test_several_optimizer_steps_use_the_policy_that_gave_the_answers() -> None:
    """Epochs over one batch, and optimizer steps on its parts, are steps with known old log-probs."""
    values = {"loss_type": "grpo", "beta": 0.0, "scale_rewards": "none"}
    for more, parts in (({"update_epochs": 2}, [(0, 1, 2)] * 2), ({"batch_size": 2}, [(0, 1), (2,)])):
        agent, twin = make_agent(values, **more), make_agent(values)
        batch = make_batch(agent)
        with torch.no_grad():
            old = [plain_logprobs(agent, "actor", one) for one in batch]
        agent.learn(batch)
        known = [
            replace(one, extras={ROLLOUT: replace(one.extras[ROLLOUT], old=tuple(then))})
            for one, then in zip(batch, old, strict=True)
        ]
        for rows in parts:
            twin.learn(Batch([known[row] for row in rows], "train"))
        mine, theirs = ([one.detach() for one in each.actor_parameters()] for each in (agent, twin))
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_equal_rewards_teach_nothing_and_a_reward_that_is_not_finite_leaves_out_its_group() -> None:
    equal = [(0.1, 0.1, 0.1), (0.7, 0.7, 0.7), (0.3, 0.3, 0.3)]
    agent = make_agent({"beta": 0.0})
    before = actor_bits(agent)
    metrics = agent.learn(make_batch(agent, rewards=equal))
    assert metrics["grad_norm"] == 0
    assert metrics["frac_reward_zero_std"] == 1
    assert actor_bits(agent) == before

    broken = [(1.0, 0.0, 0.5), (np.nan, 1.0, 2.0), (np.inf, 0.0, 0.0)]
    agent, alone = make_agent({}), make_agent({})
    metrics = agent.learn(make_batch(agent, rewards=broken))
    expected = alone.learn(make_batch(alone, rewards=broken).select([0]))
    assert metrics == expected
    assert actor_bits(agent) == actor_bits(alone)
    assert not agent.diverged
    metrics = agent.learn(make_batch(agent, rewards=broken).select([1, 2]))
    assert metrics.keys() == expected.keys()
    assert np.isnan(metrics["reward"])
    assert agent.steps == 2
    assert actor_bits(agent) == actor_bits(alone)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_a_function_without_weight_says_is_reported_without_a_warning() -> None:
    """It may be infinite in both directions, whose mean is NaN, and teaches nothing."""
    agent, twin = make_agent({"beta": 0.0}), make_agent({"beta": 0.0})
    plain, samples = make_batch(agent), []
    for sample in plain:
        own = sample.extras[ROLLOUT]
        watched = np.array([[np.inf], [-np.inf], [0.0]])
        both = replace(own, by_function=np.hstack([own.by_function, watched]), names=("points", "watched"))
        samples.append(replace(sample, extras={ROLLOUT: both}))
    metrics, expected = agent.learn(Batch(samples, "train")), twin.learn(plain)
    assert np.isnan([metrics.pop("rewards/watched/mean"), metrics.pop("rewards/watched/std")]).all()
    assert metrics == expected
    assert actor_bits(agent) == actor_bits(twin)


# Of one member each, beside what all have in common.
MEMBERS: list[dict[str, Any]] = [
    {"lr": 1e-2, "beta": 0.2},
    {"lr": 3e-3, "beta": 0.0, "loss_type": "dr_grpo", "scale_rewards": "none"},
    {"lr": 2e-2, "beta": 0.05, "loss_type": "grpo", "temperature": 1.5},
    {"lr": 1e-2, "beta": 0.5, "loss_type": "bnpo", "epsilon": 0.05},
]


def make_members(**shared: Any) -> tuple[list[GRPO], list[Batch]]:
    """Members of one base with answers of their own: other tokens, lengths, numbers of answers and of prompts."""
    model = make_family("llama")
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    fixed = {"max_completion_length": MOST, "actor_network": model, "lora_config": lora, **shared}
    agents = [GRPO(index=index, seed=index, **own, **fixed) for index, own in enumerate(MEMBERS)]
    batches = [make_batch(agent, seed) for seed, agent in enumerate(agents)]
    # A reward of member 0 is not finite, member 1 has but one prompt, and member 3 two answers to each.
    batches[0] = make_batch(agents[0], 0, [REWARDS[0], (np.nan, 0.0, 1.0), REWARDS[2]])
    batches[1] = batches[1].select([2])
    batches[3] = Batch([cut(sample, 2) for sample in batches[3]], "train")
    return agents, batches


def cut(sample: Sample, size: int) -> Sample:
    """A sample with the first answers alone."""
    own = sample.extras[ROLLOUT]
    parts = {name: getattr(own, name)[:size] for name in ("rewards", "by_function", "advantages", "ended")}
    return replace(sample, completions=sample.completions[:size], extras={ROLLOUT: replace(own, **parts)})


@pytest.mark.parametrize("values", [{}, {"batch_size": 2, "update_epochs": 2, "micro_batch_size_per_gpu": 1}])
def test_members_learn_from_answers_of_their_own_in_shared_passes_as_one_after_the_other(monkeypatch, values) -> None:
    passes: list[int] = []
    original = Runner._pass

    def record(self: Runner, few: Any, numbers: Sequence[int], *others: Any) -> Any:
        passes.append(len(numbers))
        return original(self, few, numbers, *others)

    monkeypatch.setattr(Runner, "_pass", record)
    (agents, batches), (twins, _) = make_members(**values), make_members(**values)
    found, expected = [], []
    for _ in range(3):
        found += learn_each(agents, batches)
    together = [*passes]
    passes.clear()
    for _ in range(3):
        expected += [learn_together([twin], batch)[0] for twin, batch in zip(twins, batches, strict=True)]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=0, abs=1e-10)
    mine, theirs = ([one.detach() for each in some for one in each.actor_parameters()] for some in (agents, twins))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert max(together) > 1
    assert len(together) < len(passes)
    # Member 0 learnt from two prompts, member 1 from one.
    assert [metrics["num_tokens"] > 0 for metrics in found] == [True] * 12


def test_a_member_that_diverges_in_a_shared_pass_harms_nobody_else() -> None:
    results = []
    for broken in (False, True):
        agents, batches = make_members()
        learn_each(agents, batches)
        if broken:
            with torch.no_grad():
                agents[1].actor_parameters()[0].fill_(float("nan"))
        learn_each(agents, batches)
        assert [agent.diverged for agent in agents] == [False, broken, False, False]
        results.append([actor_bits(agent) for agent in agents if agent.index != 1])
    assert results[0] == results[1]


def test_losses_by_hand() -> None:
    """Ratios e^0.5 and e^-0.5 with advantages 1 and -2, clipped to [0.8, 1.3]."""
    logprobs, old = torch.tensor([0.5, -0.5, 0.5]), torch.zeros(3)
    losses = clipped_surrogate(logprobs, old, torch.tensor([1.0, -2.0, -2.0]), 0.2, 0.3)
    assert losses.tolist() == pytest.approx([-1.3, 1.6, 2 * np.exp(0.5)], rel=1e-6)
    estimates = divergence_estimates(torch.tensor([0.5, 0.0]), torch.zeros(2))
    assert estimates.tolist() == pytest.approx([np.exp(-0.5) - 0.5, 0.0], abs=1e-6)
    lengths = np.array([1.0, 4.0, 0.0])
    assert TOKEN_WEIGHTS["grpo"](lengths, 10).tolist() == pytest.approx([1 / 3, 1 / 12, 1 / 3])
    assert TOKEN_WEIGHTS["dr_grpo"](lengths, 10).tolist() == pytest.approx([1 / 30] * 3)
    assert TOKEN_WEIGHTS["dapo"](lengths, 10).tolist() == pytest.approx([0.2] * 3)
    assert group_advantages(np.array([[0.1] * 3, [0.0, 1.0, 2.0]]), "group").tolist() == [
        [0.0] * 3,
        pytest.approx([-1 / 1.0001, 0.0, 1 / 1.0001]),
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 1}, "group_size=1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"epsilon": 1.0}, r"epsilon=1.0: must be below 1"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"loss_type": "drgrpo"}, "nearest is 'dr_grpo'"),
        ({"scale_rewards": True}, "scale_rewards=True: must be one of group, batch, none"),
        ({"evaluation_answers": 4}, "evaluation_answers=4: greedy answers"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
    ],
)
def test_values_that_no_agent_can_have_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_agent(values)


def test_only_scored_answers_are_learnt_and_prompts_alone_by_no_algorithm() -> None:
    agent = make_agent({})
    answered = Batch([replace(one, extras={}) for one in make_batch(agent)])
    with pytest.raises(DataError, match=r"without rewards.: .*agent.collect"):
        agent.learn(answered)
    prompts = Batch([replace(one, completions=()) for one in answered])
    for other in (agent, SFT(actor_network=make_family("llama"))):
        with pytest.raises(DataError, match="a prompt without completion"):
            other.learn(prompts)
