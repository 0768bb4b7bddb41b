"""Kahneman-Tversky Optimization on answers with labels (Ethayarajh et al., arXiv 2402.01306)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from evollm.algorithms.agent import OWN, REFERENCE
from evollm.algorithms.agilerl import EvolvableAlgorithm
from evollm.algorithms.algorithm import Algorithm, register
from evollm.algorithms.arguments import AgentArguments
from evollm.algorithms.input_checks import batch_for, check_base, check_gym
from evollm.algorithms.kto_settings import FEWEST_ANSWERS, KTOHyperparameters, needs_two
from evollm.algorithms.kto_step import evaluate_together, learn_together, logratios_together
from evollm.algorithms.settings import Evolvable, Setting
from evollm.algorithms.unpaired_losses import WITH_KL
from evollm.checks import boolean
from evollm.data.samples import Batch
from evollm.data.unpaired_rows import DESIRABLE, UNDESIRABLE
from evollm.errors import ConfigurationError, DataError
from evollm.foreign import ACTION, AGENT, explains
from evollm.hpo.fitness import UnpairedEvaluation
from evollm.hpo.scores import UNPAIRED_FITNESSES, WIN_RATE
from evollm.llm_envs import UnpairedGym
from evollm.llm_envs.observations import as_action, batch_of
from evollm.runs.words import Score, Words

if TYPE_CHECKING:
    from gymnasium import spaces


WORDS = Words(
    name="KTO",
    noun="answer",
    title="tuned on labelled answers",
    method="Kahneman-Tversky Optimization",
    tags=("kto", "preference-tuning"),
    scores=(
        Score("auc", "AUC", in_full="AUC of the log-ratio, desirable against undesirable answers"),
        Score("mean_margin", "mean margin", "nats", digits=2, is_signed=True, heading="margin"),
    ),
    curves=(
        ("loss", "training loss"),
        ("kl", "estimated divergence from the reference (nats)"),
        ("rewards/margins", "reward margin (beta x nats)"),
        ("grad_norm", "gradient norm before clipping"),
    ),
    on_scores="The AUC is the probability that tuning has raised a desirable answer more than an undesirable one. "
    "A tie counts half: the untuned model has 0.5.",
    on_training="Losses and rewards of agents with another loss, beta or weight cannot be compared.",
)


class KTO(EvolvableAlgorithm):
    """A KTO agent: an `actor` and a `reference` adapter on a base that several agents may share.

    It learns from answers that are labelled desirable or undesirable, and needs no pairs of them. Agents built on the
    same model object share the model, whatever their algorithm; `KTO.population` builds several at once. The model is
    set to evaluation mode for good, because dropout would make policy and reference differ.

    Args:
        observation_space: Observation space of the environment; kept as an attribute.
        action_space: Action space of the environment; kept as an attribute.
        lr: Learning rate of AdamW.
        beta: KTO's beta, the strength of the regularisation towards the reference.
        desirable_weight: Weight of the losses of desirable answers. The paper recommends weights with which desirable
            answers count 1 to 4/3 times as much in all as undesirable ones.
        undesirable_weight: Weight of the losses of undesirable answers.
        loss_type: `kto`, or `apo_zero_unpaired`, which has no divergence and so takes a forward pass less.
        max_grad_norm: Largest 2-norm of the gradient; a larger gradient is scaled down to this norm.
        use_separate_reference_adapter: False uses the base without adapter as the reference.
        **shared: Those of [`AgentArguments`][evollm.algorithms.AgentArguments].

    Raises:
        ConfigurationError: An argument is invalid; the message names the argument, its value and the fix.
    """

    algorithm: ClassVar[str] = WORDS.name
    words: ClassVar[Words] = WORDS
    hyperparameters_class = KTOHyperparameters

    beta = Evolvable[float]()
    desirable_weight = Evolvable[float]()
    undesirable_weight = Evolvable[float]()
    loss_type = Evolvable[str]()
    use_separate_reference_adapter = Setting[bool]()
    hyperparameters: KTOHyperparameters

    @explains(AGENT)
    def __init__(
        self,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        *,
        lr: float = 5e-6,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: str = "kto",
        max_grad_norm: float = 1.0,
        use_separate_reference_adapter: bool = True,
        **shared: Unpack[AgentArguments],
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr=lr,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            loss_type=loss_type,
            max_grad_norm=max_grad_norm,
            use_separate_reference_adapter=use_separate_reference_adapter,
            **shared,
        )

    def _frozen_adapters(self, actor: str) -> dict[str, str | None]:
        if not self.settings.use_separate_reference_adapter:
            return {REFERENCE: None}
        return {REFERENCE: self.base.adapters.copy(actor, REFERENCE, trainable=False)}

    def learn(self, experiences: Batch | Mapping[str, Any], training: bool = True) -> dict[str, float]:
        """Update the actor on a batch of answers with labels, `update_epochs` times.

        With the log-ratio r and the divergence z the loss of a desirable answer is `desirable_weight` times
        1 - sigmoid(beta (r - z)), that of an undesirable one `undesirable_weight` times 1 - sigmoid(beta (z - r)). The
        mean is over the answers of the whole optimizer batch, whatever the micro-batch. z is the mean log-ratio of each
        prompt with the answer of the row before, and at least 0, as TRL estimates it.

        Args:
            experiences: A batch, or an observation of `UnpairedGym`; at least two answers for the loss `kto`.
            training: False computes the metrics and changes nothing.

        Returns:
            Means over the optimizer steps, of the policy before each step: `mean_loss`, and under TRL's names `loss`,
            `grad_norm`, `learning_rate`, `kl` (z), `logps/chosen`, `logps/rejected`, `rewards/chosen`,
            `rewards/rejected`, `rewards/margins`, `num_tokens`: chosen are the desirable answers, and NaN where a
            batch has none. Log-probs are sums over tokens in nats; a reward is beta times a log-ratio.

        Raises:
            DataError: A row has no label or two answers, a label is neither 1 nor 0, or there is one answer only.
        """
        batch = self._answers(experiences)
        if len(batch) < FEWEST_ANSWERS and self.loss_type in WITH_KL:
            raise DataError("experiences", f"{len(batch)} answer", needs_two(self.loss_type))
        return learn_together([self], batch, training=boolean("training", training))[0]

    def _answers(self, experiences: Batch | Mapping[str, Any]) -> Batch:
        """The batch in `experiences`, in which each row must have one completion and a label."""
        batch = batch_for(self.base, experiences)
        for sample in batch:
            if len(sample.completions) > 1:
                fix = "KTO takes answers one by one: pass an observation of UnpairedGym, which divides pairs"
                raise DataError("experiences", "a row with two completions", fix)
            if sample.label not in (DESIRABLE, UNDESIRABLE):
                fix = "must be 1 for a desirable answer or 0 for an undesirable one: pass an observation of UnpairedGym"
                raise DataError("experiences['labels']", sample.label, fix)
        return batch

    def logratios(self, batch: Batch, reference: str | None = OWN) -> NDArray[np.float64]:
        """Log-ratios of the answers without beta, (B,)."""
        found: NDArray[np.float64] = logratios_together([self], batch_for(self.base, batch), reference)[0].numpy()
        return found

    @explains(ACTION)
    def get_action(self, obs: Batch | Mapping[str, Any]) -> NDArray[np.float32]:
        """The log-ratio of each answer of an observation, (num_rows,) in nats; 0 for absent rows."""
        return as_action(self.logratios(batch_of(obs)), obs)

    def evaluate(
        self, env: UnpairedGym, split: str = "test", reference: str | None = OWN, *, rows: int | None = None
    ) -> UnpairedEvaluation:
        """Score the agent on the answers of a fixed split.

        Args:
            env: The environment.
            split: `test` (the selection answers) or `final`.
            reference: Name of the frozen adapter in the log-ratios, by default the agent's reference.
            rows: Score this many answers, drawn by the seed of `env`; None: all.

        Returns:
            The log-ratio and the label of each answer in the order of the split, without answers with a non-finite
            reference log-prob.

        Raises:
            DataError: No answer has finite reference log-probs, or, with `drop_nonfinite_rows=False`, not every one.
        """
        check_gym(env, UnpairedGym, "KTO.evaluate")
        check_base(self.base, env)
        return evaluate_together([self], env, split, reference, rows=rows)[0]


def check_answers(agents: Sequence[KTO], env: UnpairedGym) -> None:
    """Refuse batches of one answer for a loss with a divergence; warn of labels that no weights balance.

    Raises:
        ConfigurationError: The batches of the environment have a single answer, and a loss needs two.
    """
    with_kl = next((agent for agent in agents if agent.loss_type in WITH_KL), None)
    if with_kl is not None and env.batch_size < FEWEST_ANSWERS:
        raise ConfigurationError("data_batch_size_per_gpu", env.batch_size, needs_two(with_kl.loss_type))
    balance, first = env.balance, agents[0]
    weights = [(agent.desirable_weight, agent.undesirable_weight) for agent in agents]
    # Of labels in balance no weights are worth a warning: they may have been evolved.
    if balance.is_strong() and all(balance.is_strong(*both) for both in weights):
        given = f"desirable_weight={first.desirable_weight:g} and undesirable_weight={first.undesirable_weight:g}"
        advice = balance.advice(first.desirable_weight, first.undesirable_weight)
        warnings.warn(
            f"{balance} are far from balance with {given}: the paper of KTO recommends {advice}",
            UserWarning,
            stacklevel=2,
        )


register(
    Algorithm(
        agent=KTO,
        gym=UnpairedGym,
        learn=learn_together,
        evaluate=evaluate_together,
        fitness=UNPAIRED_FITNESSES["auc"],
        fitnesses={**UNPAIRED_FITNESSES, WIN_RATE.name: WIN_RATE},
        trial=UnpairedEvaluation(np.zeros(2), np.array([1.0, 0.0])),
        has_reference=True,
        evolves=("lr", "beta", "desirable_weight", "undesirable_weight"),
        loop="finetune_llm_kto",
        check=check_answers,
        compares=lambda agent: agent.loss_type in WITH_KL,
    )
)
