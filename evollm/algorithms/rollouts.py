"""Answers of agents to prompts with their rewards: what agents learn from, and what they are evaluated by."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evollm.algorithms.policy_losses import FloatArray, group_advantages
from evollm.algorithms.vllm_answers import vllm_answers_to
from evollm.data.samples import Batch, Completion, Sample
from evollm.hpo.fitness import RewardEvaluation
from evollm.models.flops import EVALUATION, TRAINING
from evollm.models.generation import GeneratedAnswer, Question, answers_to
from evollm.processes import Processes

if TYPE_CHECKING:
    from evollm.algorithms.grpo import GRPO
    from evollm.llm_envs import RewardGym

# The key of a sample's `extras`.
ROLLOUT = "rollout"
# The first numbers of keys of random numbers, so that answers that are learnt have others than those that are scored.
_TRAINING, _EVALUATION = 0, 1
_SPLITS = ("test", "final")


@dataclass(frozen=True, eq=False)
class Rollout:
    """G answers to a prompt, whose token ids are the completions of a sample.

    Attributes:
        rewards: (G,) rewards; not finite if a function returned such a number.
        by_function: (G, F) what each reward function says.
        names: Names of the F functions.
        advantages: (G,) advantages; NaN if a reward is not finite.
        ended: (G,) whether an answer ended by itself.
        old: For each answer (C,) log-probs of its tokens under the policy that gave them; None: they are those of the
            policy that learns.
        reference: For each answer (C,) log-probs of its tokens under the reference; None: not needed.
    """

    rewards: FloatArray
    by_function: FloatArray
    names: tuple[str, ...]
    advantages: FloatArray
    ended: NDArray[np.bool_]
    old: tuple[Tensor, ...] | None = None
    reference: tuple[Tensor, ...] | None = None

    @property
    def is_usable(self) -> bool:
        """Whether all rewards are finite."""
        return bool(np.isfinite(self.rewards).all())


def rollout_of(sample: Sample) -> Rollout:
    """The rewards of a sample that `collect` made."""
    found = sample.extras[ROLLOUT]
    assert isinstance(found, Rollout)
    return found


def collect(agents: Sequence[GRPO], batch: Batch, env: RewardGym) -> list[Batch]:
    """Let each agent answer the prompts of a batch, `group_size` times each, and score all answers.

    The random numbers of an answer are a function of the gym's seed, the epoch, the row and the number of the answer,
    and not of the agent: agents that are equal give equal answers, and differences between agents are not those of
    their luck. Of several sets, whose rows may come twice in an epoch, the place in the epoch counts for the row. All
    answers of all agents are given to the reward functions in one call.

    Args:
        agents: Agents of one base.
        batch: Prompts that the gym has just served.
        env: The gym.

    Returns:
        For each agent the batch that it learns from: samples whose completions are the answers and whose `extras` have
        a `Rollout`.
    """
    state = env.state_dict()
    epoch, index = int(state["epoch"]), int(state["index"])
    rows = [(index, place) if env.sets else (sample.row or 0,) for place, sample in enumerate(batch)]
    asked = [
        (place, sample, row, number)
        for place, agent in enumerate(agents)
        for sample, row in zip(batch, rows, strict=True)
        for number in range(agent.group_size)
    ]
    questions = [
        Question(
            agents[place].actor_adapter,
            sample.prompt_ids,
            agents[place].temperature,
            (_TRAINING, env.seed, epoch, *row, number),
        )
        for place, sample, row, number in asked
    ]
    answers = _sampled(agents[0], questions, env)
    found = env.rewards.of_answers([sample for _, sample, *_ in asked], [env.text_of(one.ids) for one in answers])
    batches, start = [], 0
    for agent in agents:
        end = start + len(batch) * agent.group_size
        batches.append(_collected(agent, batch, answers[start:end], found[start:end], env))
        start = end
    return batches


def _sampled(agent: GRPO, questions: Sequence[Question], env: RewardGym) -> list[GeneratedAnswer]:
    """The answers to learn from, by transformers or vLLM; those that agents are compared by are transformers'."""
    if not agent.use_vllm:
        return _answers_of_main(agent, questions, env)
    return vllm_answers_to(
        agent.base,
        questions,
        env.tokenizer,
        agent.max_completion_length,
        longest=env.longest_sequence + agent.max_completion_length,
        gpu_memory_utilization=agent.vllm_gpu_memory_utilization,
    )


def _answers_of_main(first: GRPO, questions: Sequence[Question], env: RewardGym) -> list[GeneratedAnswer]:
    """The main process's answers, in every process that learns from them or scores them.

    On another device, whose last bits differ, another process may sample others: it would learn from its own answers by
    the rewards of the main process's.
    """
    own = answers_to(first.base, questions, env.tokenizer, first.max_completion_length)
    processes = Processes.present()
    if processes.size == 1:
        return own
    told = processes.from_main([[one.ids.tolist(), one.ended] for one in own])
    return [GeneratedAnswer(np.array(ids, dtype=np.int64), ended) for ids, ended in told]


def _collected(
    agent: GRPO, batch: Batch, answers: Sequence[GeneratedAnswer], found: FloatArray, env: RewardGym
) -> Batch:
    """One agent's answers, those to one prompt after the other, and what the functions say of them, as a batch."""
    size = agent.group_size
    rewards = env.rewards.total(found).reshape(len(batch), size)
    usable = np.array([bool(np.isfinite(own).all()) for own in rewards])
    advantages = np.full(rewards.shape, np.nan)
    if usable.any():
        advantages[usable] = group_advantages(rewards[usable], agent.scale_rewards)
    samples = []
    for number, sample in enumerate(batch):
        part = slice(number * size, (number + 1) * size)
        ended = np.array([one.ended for one in answers[part]])
        rollout = Rollout(rewards[number], found[part], env.rewards.names, advantages[number], ended)
        completions = tuple(Completion(one.ids) for one in answers[part])
        samples.append(replace(sample, completions=completions, extras={ROLLOUT: rollout}))
    if not usable.all():
        _warn(agent, [sample for sample, one in zip(batch, usable, strict=True) if not one])
    collected = replace(batch, samples=samples)
    # What a step takes of an agent is all counted as training, so that runs are compared by what they really take.
    agent.base.flops.add(TRAINING, collected, [agent.actor_adapter])
    return collected


def _warn(agent: GRPO, left_out: Sequence[Sample]) -> None:
    """Warn once for each base that prompts are left out."""
    told_of = agent.base.reference_cache.told_of
    if (ROLLOUT, b"") in told_of or not Processes.present().is_main:
        return
    told_of.add((ROLLOUT, b""))
    rows = ", ".join(str(sample.row) for sample in left_out)
    warnings.warn(
        f"left out for agent {agent.index}: its answers to row {rows}, since a reward is NaN or infinite (further ones "
        "are left out without a warning)",
        UserWarning,
        stacklevel=2,
    )


def evaluate_together(
    agents: Sequence[GRPO], env: RewardGym, split: str = "test", *, rows: int | None = None
) -> list[RewardEvaluation]:
    """Score each agent by its answers to the prompts of a fixed split; see `GRPO.evaluate`."""
    prompts, first = env.evaluation_pairs(split), agents[0]
    chosen = sorted(int(position) for positions, _ in env.eval_batches(split, rows=rows) for position in positions)
    numbers, temperature = range(first.evaluation_answers), first.evaluation_temperature
    asked = [(agent, position, number) for agent in agents for position in chosen for number in numbers]
    questions = [
        Question(
            agent.actor_adapter,
            prompts[position].prompt_ids,
            temperature,
            (_EVALUATION, env.seed, _SPLITS.index(split), position, number),
        )
        for agent, position, number in asked
    ]
    answers = _answers_of_main(first, questions, env)
    texts = [env.text_of(one.ids) for one in answers]
    found = env.rewards.total(env.rewards.of_answers([prompts[position] for _, position, _ in asked], texts))
    shape = len(agents), len(chosen), len(numbers)
    lengths = np.array([len(one.ids) for one in answers], np.float64).reshape(shape).mean(axis=2)
    with np.errstate(invalid="ignore"):
        rewards = found.reshape(shape).mean(axis=2)
    # As the forecast counts it: the pass of the prompts.
    first.base.flops.add(EVALUATION, Batch([prompts[row] for row in chosen]), [one.actor_adapter for one in agents])
    return [RewardEvaluation(own, length) for own, length in zip(rewards, lengths, strict=True)]
