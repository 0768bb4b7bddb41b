"""Supervised fine-tuning on completions, the usual stage before preferences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from evollm.algorithms.agilerl import EvolvableAlgorithm
from evollm.algorithms.algorithm import Algorithm, register
from evollm.algorithms.arguments import AgentArguments
from evollm.algorithms.input_checks import batch_for, check_base, check_gym
from evollm.algorithms.sft_step import evaluate_together, learn_together
from evollm.algorithms.step import policy_logprobs
from evollm.checks import boolean
from evollm.data.samples import Batch
from evollm.foreign import ACTION, SFT_AGENT, explains
from evollm.hpo.fitness import LikelihoodEvaluation
from evollm.hpo.scores import LIKELIHOOD_FITNESSES, WIN_RATE
from evollm.llm_envs import SFTGym
from evollm.llm_envs.observations import as_action
from evollm.runs.words import Score, Words

if TYPE_CHECKING:
    from gymnasium import spaces


WORDS = Words(
    name="SFT",
    noun="example",
    title="tuned on completions",
    method="supervised fine-tuning",
    tags=("sft",),
    scores=(
        Score(
            "loss",
            "loss",
            "nats per token",
            digits=4,
            smaller_is_better=True,
            heading="held-out loss",
            in_full="loss (nats per completion token)",
        ),
        Score("perplexity", "perplexity", digits=2, is_shown=False),
    ),
    curves=(("loss", "training loss"), ("grad_norm", "gradient norm before clipping")),
)


class SFT(EvolvableAlgorithm):
    """An SFT agent: an `actor` adapter on a base that several agents may share, and no reference.

    Agents built on the same model object share the model, whatever their algorithm; `SFT.population` builds several at
    once. The model is set to evaluation mode for good. A DPO agent can start from an SFT agent's checkpoint: see
    `load_checkpoint`.

    Args:
        observation_space: Observation space of the environment; kept as an attribute.
        action_space: Action space of the environment; kept as an attribute.
        lr: Learning rate of AdamW.
        max_grad_norm: Largest 2-norm of the gradient; a larger gradient is scaled down to this norm.
        **shared: Those of [`AgentArguments`][evollm.algorithms.AgentArguments].

    Raises:
        ConfigurationError: An argument is invalid; the message names the argument, its value and the fix.
    """

    algorithm: ClassVar[str] = WORDS.name
    words: ClassVar[Words] = WORDS

    @explains(SFT_AGENT)
    def __init__(
        self,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        *,
        lr: float = 5e-5,
        max_grad_norm: float = 1.0,
        **shared: Unpack[AgentArguments],
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr=lr,
            max_grad_norm=max_grad_norm,
            **shared,
        )

    def learn(self, experiences: Batch | Mapping[str, Any], training: bool = True) -> dict[str, float]:
        """Update the actor on a batch of examples, `update_epochs` times.

        The loss is the mean negative log-likelihood of the completions' tokens, end tokens included, given all tokens
        before. The mean is over all completion tokens of the optimizer batch, whatever the micro-batch and the number
        of processes, so that all tokens have the same weight.

        Args:
            experiences: A batch, or an observation of `SFTGym`. Rejected sides are not used.
            training: False computes the metrics and changes nothing.

        Returns:
            `mean_loss`, and under TRL's names `loss`, `grad_norm`, `learning_rate`: means over the optimizer steps,
            weighted by completion tokens, of the policy before each step; losses in nats per token. `num_tokens`: the
            number of tokens, prompts included, on which the agent has been trained so far.
        """
        return learn_together([self], batch_for(self.base, experiences), training=boolean("training", training))[0]

    @explains(ACTION)
    def get_action(self, obs: Batch | Mapping[str, Any]) -> NDArray[np.float32]:
        """The log-probability of each completion of an observation, (num_rows,) in nats; 0 for absent rows."""
        (policy,) = policy_logprobs([self], batch_for(self.base, obs))
        return as_action(policy.chosen.float().cpu().numpy(), obs)

    def evaluate(self, env: SFTGym, split: str = "test", *, rows: int | None = None) -> LikelihoodEvaluation:
        """Score the agent on the examples of a fixed split.

        Args:
            env: The environment.
            split: `test` (the selection examples) or `final`.
            rows: Score this many examples, drawn by the seed of `env`; None: all.

        Returns:
            The log-probability of each completion in the order of the split, without completions whose log-probability
            under the base without adapter is not finite.

        Raises:
            DataError: No example has a finite log-prob under the base, or, with `drop_nonfinite_rows=False`, not every
                example.
        """
        check_gym(env, SFTGym, "SFT.evaluate")
        check_base(self.base, env)
        return evaluate_together([self], env, split, rows=rows)[0]


register(
    Algorithm(
        agent=SFT,
        gym=SFTGym,
        learn=learn_together,
        evaluate=lambda agents, env, split, reference, *, rows=None: evaluate_together(agents, env, split, rows=rows),
        fitness=LIKELIHOOD_FITNESSES["loss"],
        fitnesses={**LIKELIHOOD_FITNESSES, WIN_RATE.name: WIN_RATE},
        trial=LikelihoodEvaluation(-np.ones(2), np.ones(2)),
        has_reference=False,
        loop="finetune_llm_sft",
    )
)
