"""What differs between a run on preferences and one on completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from evollm.algorithms import dpo_step, sft_step
from evollm.algorithms.dpo import DPO
from evollm.algorithms.saving import SavableAgent
from evollm.algorithms.sft import SFT
from evollm.data.batch import PreferenceBatch
from evollm.hpo import AnyEvaluation, Evaluation, LikelihoodEvaluation
from evollm.llm_envs import DatasetGym, PreferenceGym, SFTGym

Learn: TypeAlias = Callable[[Sequence[Any], PreferenceBatch], list[dict[str, float]]]
# Agents, environment, split, and what log-ratios are to.
Evaluate: TypeAlias = Callable[[Sequence[Any], DatasetGym, str, "str | None"], Sequence[AnyEvaluation]]


@dataclass(frozen=True)
class Stage:
    """A kind of run.

    Attributes:
        agent: Its agents.
        env: What serves their batches.
        learn: One batch for some of them.
        evaluate: Scores some of them on a split.
        trial: The evaluation of an agent that has learnt nothing, to try a fitness function on.
        has_reference: Whether agents are compared with a reference; else with the base.
        loop: The function that runs it, for messages.
    """

    agent: type[SavableAgent]
    env: type[DatasetGym]
    learn: Learn
    evaluate: Evaluate
    trial: AnyEvaluation
    has_reference: bool
    loop: str


PREFERENCE = Stage(
    agent=DPO,
    env=PreferenceGym,
    learn=dpo_step.learn_together,
    evaluate=dpo_step.evaluate_together,
    trial=Evaluation(np.zeros(2), np.zeros(2)),
    has_reference=True,
    loop="finetune_llm_preference",
)
COMPLETION = Stage(
    agent=SFT,
    env=SFTGym,
    learn=sft_step.learn_together,
    evaluate=lambda agents, env, split, reference: sft_step.evaluate_together(agents, env, split),
    trial=LikelihoodEvaluation(-np.ones(2), np.ones(2)),
    has_reference=False,
    loop="finetune_llm_sft",
)


def stage_of(agent: SavableAgent) -> Stage:
    """The stage that an agent is for."""
    return next(stage for stage in (PREFERENCE, COMPLETION) if isinstance(agent, stage.agent))
