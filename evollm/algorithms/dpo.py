"""Direct Preference Optimization (Rafailov et al., arXiv 2305.18290)."""

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
from evollm.algorithms.dpo_settings import DPOHyperparameters, DPOSettings, loss_settings, loss_terms
from evollm.algorithms.dpo_step import evaluate_together, learn_together, logratios_together, references_of
from evollm.algorithms.input_checks import batch_for, check_base, check_gym
from evollm.algorithms.losses import LossSettings
from evollm.algorithms.settings import Evolvable, Setting
from evollm.checks import boolean
from evollm.data.samples import Batch
from evollm.errors import DataError
from evollm.foreign import ACTION, AGENT, explains
from evollm.hpo.fitness import Evaluation
from evollm.hpo.scores import PREFERENCE_FITNESSES, WIN_RATE
from evollm.llm_envs import PreferenceGym
from evollm.llm_envs.observations import as_action, batch_of
from evollm.models.logprobs import CompletionSums
from evollm.runs.words import Score, Words

if TYPE_CHECKING:
    from gymnasium import spaces


WORDS = Words(
    name="DPO",
    noun="pair",
    title="tuned on preferences",
    method="Direct Preference Optimization",
    tags=("dpo", "preference-tuning"),
    scores=(
        Score("accuracy", "accuracy", "share of pairs", is_share=True, in_full="preference accuracy"),
        Score("mean_margin", "mean margin", "nats", digits=2, is_signed=True, heading="margin"),
    ),
    curves=(
        ("loss", "training loss"),
        ("nll_loss", "negative log-likelihood of chosen (nats per token)"),
        ("rewards/margins", "reward margin (beta x nats)"),
        ("rewards/accuracies", "accuracy on the batch"),
        ("grad_norm", "gradient norm before clipping"),
    ),
    on_scores="A pair counts as right when tuning has raised the chosen answer more than the rejected one, and a tie "
    "as half: the untuned model ties every pair.",
    on_training="Losses and rewards of agents with another loss, beta or nll_alpha cannot be compared.",
)


class DPO(EvolvableAlgorithm):
    """A DPO agent: an `actor` and a `reference` adapter on a base that several agents may share.

    Agents built on the same model object share the model; `DPO.population` builds several at once. The model is set to
    evaluation mode for good, because dropout would make policy and reference differ.

    Args:
        observation_space: Observation space of the environment; kept as an attribute.
        action_space: Action space of the environment; kept as an attribute.
        lr: Learning rate of AdamW.
        beta: DPO's beta, the strength of the regularisation towards the reference.
        nll_alpha: Weight of the negative log-likelihood on chosen completions; 0 leaves it out.
        loss_type: Name of the loss (`evollm.algorithms.losses.LOSSES`), or a list of names whose losses are
            added up; `simpo` and `orpo` do not use the reference.
        loss_weights: The weight of each loss in a list; None: 1 for each.
        label_smoothing: Assumed share of wrong labels, from 0 to below 0.5, for the losses `sigmoid`, `robust`,
            `exo_pair` (must be above 0), `aot`, `aot_unpaired`.
        discopop_tau: Temperature of the loss `discopop`.
        simpo_gamma: Margin of the loss `simpo`, in the units of beta times a mean log-prob.
        ld_alpha: Weight, from 0 to 1, of the tokens beyond the length of the pair's shorter completion (LD-DPO, arXiv
            2409.06411), in the sums of policy and reference that losses compare and metrics report. Likelihoods
            (`nll_alpha`, the loss `sft`), lengths and the fitness count all tokens alike. None: plain sums.
        max_grad_norm: Largest 2-norm of the gradient; a larger gradient is scaled down to this norm.
        use_liger_loss: Not supported in this version: True warns and uses the standard loss.
        use_separate_reference_adapter: False uses the base without adapter as the reference.
        **shared: Those of [`AgentArguments`][evollm.algorithms.AgentArguments].

    Raises:
        ConfigurationError: An argument is invalid; the message names the argument, its value and the fix.
    """

    algorithm: ClassVar[str] = WORDS.name
    words: ClassVar[Words] = WORDS
    settings_class = DPOSettings
    hyperparameters_class = DPOHyperparameters

    beta = Evolvable[float]()
    nll_alpha = Evolvable[float]()
    loss_type = Evolvable["str | Sequence[str]"]()
    label_smoothing = Evolvable[float]()
    loss_weights = Setting["Sequence[float] | None"]()
    discopop_tau = Setting[float]()
    simpo_gamma = Setting[float]()
    ld_alpha = Setting["float | None"]()
    use_separate_reference_adapter = Setting[bool]()
    settings: DPOSettings
    hyperparameters: DPOHyperparameters

    @explains(AGENT)
    def __init__(
        self,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        *,
        lr: float = 5e-6,
        beta: float = 0.1,
        nll_alpha: float = 1.0,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        simpo_gamma: float = 0.5,
        ld_alpha: float | None = None,
        max_grad_norm: float = 0.1,
        use_liger_loss: bool = False,
        use_separate_reference_adapter: bool = True,
        **shared: Unpack[AgentArguments],
    ) -> None:
        if boolean("use_liger_loss", use_liger_loss):
            warnings.warn("use_liger_loss=True has no effect in this version: standard loss", UserWarning, stacklevel=3)
        super().__init__(
            observation_space,
            action_space,
            lr=lr,
            beta=beta,
            nll_alpha=nll_alpha,
            loss_type=loss_type,
            loss_weights=loss_weights,
            label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
            simpo_gamma=simpo_gamma,
            ld_alpha=ld_alpha,
            max_grad_norm=max_grad_norm,
            use_separate_reference_adapter=use_separate_reference_adapter,
            **shared,
        )

    @property
    def loss_terms(self) -> tuple[tuple[str, float], ...]:
        """Name and weight of each loss in the sum."""
        return loss_terms(self.hyperparameters, self.settings)

    @property
    def loss_settings(self) -> LossSettings:
        """The parameters of the losses."""
        return loss_settings(self.hyperparameters, self.settings)

    def _frozen_adapters(self, actor: str) -> dict[str, str | None]:
        if not self.settings.use_separate_reference_adapter:
            return {REFERENCE: None}
        return {REFERENCE: self.base.adapters.copy(actor, REFERENCE, trainable=False)}

    def learn(self, experiences: Batch | Mapping[str, Any], training: bool = True) -> dict[str, float]:
        """Update the actor on a batch of pairs, `update_epochs` times.

        The loss is the mean over pairs of -log sigmoid(beta * margin), plus `nll_alpha` times the mean negative
        log-likelihood of the chosen tokens. Both means are over the whole optimizer batch, whatever the micro-batch.

        Args:
            experiences: A batch, or an observation of `PreferenceGym`.
            training: False computes the metrics and changes nothing.

        Returns:
            Means over the optimizer steps, of the policy before each step: `mean_loss`, `mean_chosen_reward`,
            `mean_rejected_reward`, and under TRL's names `loss`, `grad_norm`, `learning_rate`, `nll_loss`,
            `logps/chosen`, `logps/rejected`, `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`,
            `rewards/margins`, `num_tokens`. Log-probs are sums over tokens in nats; a reward is beta times a log-ratio.
        """
        return learn_together([self], self._pairs(experiences), training=boolean("training", training))[0]

    def _pairs(self, experiences: Batch | Mapping[str, Any]) -> Batch:
        """The batch in `experiences`, in which each row must have two completions."""
        batch = batch_for(self.base, experiences)
        if not all(len(sample.completions) > 1 for sample in batch):
            fix = "DPO compares two completions: pass an observation of PreferenceGym, or train an SFT agent"
            raise DataError("experiences", "a row without a rejected side", fix)
        return batch

    def reference_logprobs(self, batch: Batch, reference: str | None = OWN) -> CompletionSums:
        """Log-probs of the batch's pairs under a reference, cached for each reference and pair.

        Args:
            batch: B pairs.
            reference: Name of a frozen adapter; None: the base without adapter; by default the agent's reference.

        Returns:
            (B,) float64 tensors on the CPU.
        """
        return references_of([self], self._pairs(batch), reference)[0]

    def logratios(self, batch: Batch, reference: str | None = OWN) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Log-ratios of the chosen and of the rejected completions without beta, (B,) and (B,)."""
        chosen, rejected = logratios_together([self], self._pairs(batch), reference)[0]
        return chosen.numpy(), rejected.numpy()

    @explains(ACTION)
    def get_action(self, obs: Batch | Mapping[str, Any]) -> NDArray[np.float32]:
        """The margin, a difference of log-ratios, of each pair of an observation, (num_rows,); 0 for absent rows."""
        chosen, rejected = self.logratios(batch_of(obs))
        return as_action(chosen - rejected, obs)

    def evaluate(
        self,
        env: PreferenceGym,
        split: str = "test",
        reference: str | None = OWN,
        *,
        kl: bool = False,
        rows: int | None = None,
    ) -> Evaluation:
        """Score the agent on the pairs of a fixed split.

        Args:
            env: The environment.
            split: `test` (the selection pairs) or `final`.
            reference: Name of the frozen adapter in the log-ratios, by default the agent's reference.
            kl: Measure `Evaluation.kl` too, at the price of another pass of the policy and one of the reference.
            rows: Score this many pairs, drawn by the seed of `env`; None: all.

        Returns:
            The log-ratios of each pair in the order of the split, without pairs with a non-finite reference log-prob.

        Raises:
            DataError: No pair has finite reference log-probs, or, with `drop_nonfinite_rows=False`, not every pair.
        """
        check_gym(env, PreferenceGym, "DPO.evaluate")
        check_base(self.base, env)
        return evaluate_together([self], env, split, reference, kl=kl, rows=rows)[0]


register(
    Algorithm(
        agent=DPO,
        gym=PreferenceGym,
        learn=learn_together,
        evaluate=evaluate_together,
        fitness=PREFERENCE_FITNESSES["accuracy_mean_margin"],
        fitnesses={**PREFERENCE_FITNESSES, WIN_RATE.name: WIN_RATE},
        trial=Evaluation(np.zeros(2), np.zeros(2)),
        has_reference=True,
        evolves=("lr", "beta", "nll_alpha"),
        defaults={"nll_alpha": 0.2, "fitness": "margin_over_std"},
        loop="finetune_llm_preference",
    )
)
