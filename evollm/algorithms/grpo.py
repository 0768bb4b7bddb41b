"""Group Relative Policy Optimization on an agent's own answers (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from typing_extensions import Unpack

from evollm.algorithms.agent import OWN, REFERENCE
from evollm.algorithms.agilerl import EvolvableAlgorithm
from evollm.algorithms.algorithm import Algorithm, register
from evollm.algorithms.arguments import AgentArguments
from evollm.algorithms.grpo_settings import GRPOHyperparameters, GRPOSettings
from evollm.algorithms.grpo_step import learn_each, learn_together
from evollm.algorithms.input_checks import batch_for, check_base, check_gym
from evollm.algorithms.rollouts import ROLLOUT, collect, evaluate_together
from evollm.algorithms.settings import Evolvable, Setting
from evollm.algorithms.vllm_answers import check_vllm
from evollm.checks import boolean
from evollm.data.samples import Batch
from evollm.errors import ConfigurationError, DataError
from evollm.foreign import GRPO_AGENT, explains
from evollm.hpo.fitness import RewardEvaluation
from evollm.hpo.scores import REWARD_FITNESSES, WIN_RATE
from evollm.llm_envs import RewardGym
from evollm.models.engine import PassOptions
from evollm.runs.words import Score, Words

if TYPE_CHECKING:
    from gymnasium import spaces


WORDS = Words(
    name="GRPO",
    noun="prompt",
    title="tuned on rewards of its own answers",
    method="Group Relative Policy Optimization",
    tags=("grpo", "reinforcement-learning"),
    scores=(
        Score("reward", "mean reward", heading="reward", in_full="mean reward of an answer"),
        Score("mean_length", "answer length", "tokens", digits=1, is_shown=False),
    ),
    curves=(
        ("reward", "mean reward of the sampled answers"),
        ("reward_std", "standard deviation of rewards in a group"),
        ("kl", "estimated divergence from the reference (nats per token)"),
        ("completions/mean_length", "tokens of a sampled answer"),
        ("loss", "training loss"),
        ("grad_norm", "gradient norm before clipping"),
    ),
    on_scores="A held-out prompt is answered in the same way by every agent, whatever its own temperature.",
    on_training="Losses of agents with other rewards, clipping or beta cannot be compared, and the loss of a first "
    "optimizer step on new answers says nothing: its gradient does.",
)


class GRPO(EvolvableAlgorithm):
    """A GRPO agent: an `actor` and a `reference` adapter on a base that several agents may share, and no critic.

    It answers each prompt several times, and learns what the better answers have in common with the rest subtracted.
    Agents built on the same model object share the model, whatever their algorithm; `GRPO.population` builds several at
    once. The model is set to evaluation mode for good, because dropout would make policy and reference differ.

    Args:
        observation_space: Observation space of the environment; kept as an attribute.
        action_space: Action space of the environment; kept as an attribute.
        lr: Learning rate of AdamW.
        beta: Weight of the estimated divergence from the reference in the loss; 0: none, and no passes of it.
        epsilon: A token's probability ratio to the policy that gave the answer is clipped below 1 - `epsilon`.
        epsilon_high: It is clipped above 1 + `epsilon_high`; DAPO (arXiv 2503.14476) recommends 0.28.
        temperature: Divides the logits where answers are sampled, and in all log-probs of the loss. Not evaluation's.
        group_size: Number of answers to each prompt, at least 2.
        loss_type: How tokens are weighted, by TRL's names: `dapo`, the mean over the tokens of all answers of the
            optimizer batch; `dr_grpo` (arXiv 2503.20783), their sum by the constant answers x `max_completion_length`;
            `grpo`, the mean over answers of the mean over an answer's tokens, which makes long bad answers cheap;
            `bnpo`, here the same as `dapo`.
        scale_rewards: What advantages are divided by: the standard deviation of the rewards of the `group` or of the
            whole `batch` of prompts, or `none` (Dr. GRPO).
        max_completion_length: Most tokens of an answer.
        mask_truncated_completions: Whether answers that were cut at that length are left out of the loss. Their
            rewards are in the group's mean in any case.
        use_bias_correction_kl: Multiply the estimated divergence by the probability ratio, as DeepSeek-V3.2 (arXiv
            2512.02556) and TRL do: its gradient is then that of the divergence. False: the estimate alone, as in GRPO.
        evaluation_answers: Answers to each held-out prompt.
        evaluation_temperature: Temperature of these; 0: greedy. It is not evolved, so that scores can be compared.
        use_vllm: Sample the answers that are learnt from by vLLM (extra `vllm`, a CUDA GPU; experimental), which has a
            copy of the base beside this one. A resumed run is then not one that was never interrupted, bit for bit.
        vllm_gpu_memory_utilization: The share of the GPU's memory that vLLM takes.
        max_grad_norm: Largest 2-norm of the gradient; a larger gradient is scaled down to this norm.
        use_separate_reference_adapter: False uses the base without adapter as the reference.
        **shared: Those of [`AgentArguments`][evollm.algorithms.AgentArguments].

    Raises:
        ConfigurationError: An argument is invalid; the message names the argument, its value and the fix.
    """

    algorithm: ClassVar[str] = WORDS.name
    words: ClassVar[Words] = WORDS
    settings_class = GRPOSettings
    hyperparameters_class = GRPOHyperparameters

    beta = Evolvable[float]()
    epsilon = Evolvable[float]()
    epsilon_high = Evolvable[float]()
    temperature = Evolvable[float]()
    group_size = Evolvable[int]()
    loss_type = Setting[str]()
    scale_rewards = Setting[str]()
    max_completion_length = Setting[int]()
    mask_truncated_completions = Setting[bool]()
    use_bias_correction_kl = Setting[bool]()
    evaluation_answers = Setting[int]()
    evaluation_temperature = Setting[float]()
    use_vllm = Setting[bool]()
    vllm_gpu_memory_utilization = Setting[float]()
    use_separate_reference_adapter = Setting[bool]()
    hyperparameters: GRPOHyperparameters
    settings: GRPOSettings

    @explains(GRPO_AGENT)
    def __init__(
        self,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        *,
        lr: float = 5e-6,
        beta: float = 0.04,
        epsilon: float = 0.2,
        epsilon_high: float = 0.2,
        temperature: float = 1.0,
        group_size: int = 8,
        loss_type: str = "dapo",
        scale_rewards: str = "group",
        max_completion_length: int = 256,
        mask_truncated_completions: bool = False,
        use_bias_correction_kl: bool = True,
        evaluation_answers: int = 1,
        evaluation_temperature: float = 0.0,
        use_vllm: bool = False,
        vllm_gpu_memory_utilization: float = 0.3,
        max_grad_norm: float = 1.0,
        use_separate_reference_adapter: bool = True,
        **shared: Unpack[AgentArguments],
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr=lr,
            beta=beta,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            temperature=temperature,
            group_size=group_size,
            loss_type=loss_type,
            scale_rewards=scale_rewards,
            max_completion_length=max_completion_length,
            mask_truncated_completions=mask_truncated_completions,
            use_bias_correction_kl=use_bias_correction_kl,
            evaluation_answers=evaluation_answers,
            evaluation_temperature=evaluation_temperature,
            use_vllm=use_vllm,
            vllm_gpu_memory_utilization=vllm_gpu_memory_utilization,
            max_grad_norm=max_grad_norm,
            use_separate_reference_adapter=use_separate_reference_adapter,
            **shared,
        )

    def _frozen_adapters(self, actor: str) -> dict[str, str | None]:
        if not self.settings.use_separate_reference_adapter:
            return {REFERENCE: None}
        return {REFERENCE: self.base.adapters.copy(actor, REFERENCE, trainable=False)}

    @property
    def pass_options(self) -> PassOptions:
        """Options of the agent's passes, whose log-probs are those of the distribution that it samples from."""
        return replace(super().pass_options, temperature=self.temperature)

    def collect(self, batch: Batch, env: RewardGym) -> Batch:
        """Answer a batch of prompts and score the answers, for `learn`.

        Args:
            batch: Prompts that `env.next_batch()` has just served. The answers are the same for the same seed, epoch
                and rows.
            env: The environment.
        """
        check_gym(env, RewardGym, "GRPO.collect")
        return collect([self], batch, env)[0]

    def learn(self, experiences: Batch | Mapping[str, Any], training: bool = True) -> dict[str, float]:
        """Update the actor on answers of its own, `update_epochs` times.

        With the probability ratio r of a token to the policy that gave the answer and the advantage A of the answer,
        the loss of a token is -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), plus beta times the estimate
        exp(d) - d - 1 of the divergence from the reference, where d is the reference's log-prob minus the policy's, and
        times r with `use_bias_correction_kl`.
        `loss_type` says how tokens are weighted, over the whole optimizer batch whatever the micro-batch. A batch of
        more prompts than `batch_size` makes several optimizer steps, as `update_epochs` does.

        Args:
            experiences: What `collect` returned. Prompts with a reward that is NaN or infinite are left out.
            training: False computes the metrics and changes nothing.

        Returns:
            Means over the optimizer steps, of the policy before each step, under TRL's names: `loss`, `grad_norm`,
            `learning_rate`, `num_tokens`, `reward`, `reward_std` (mean over groups), `frac_reward_zero_std`, `kl` (nats
            per token), `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean` (shares of tokens),
            `rewards/NAME/mean` and `/std` of each function, `completions/mean_length`, `min_length`, `max_length`,
            `clipped_ratio` (cut at the limit) and `mean_terminated_length`. NaN where all prompts are left out.

        Raises:
            DivergedError: The agent diverged in an earlier step.
            DataError: A row is not of `collect`.
        """
        batch = batch_for(self.base, experiences)
        if not all(ROLLOUT in sample.extras for sample in batch):
            fix = "GRPO learns from scored answers of its own: pass what agent.collect(batch, env) returns"
            raise DataError("experiences", "a row without rewards", fix)
        return learn_together([self], batch, training=boolean("training", training))[0]

    def evaluate(
        self, env: RewardGym, split: str = "test", reference: str | None = OWN, *, rows: int | None = None
    ) -> RewardEvaluation:
        """Score the agent by its answers to the prompts of a fixed split.

        Args:
            env: The environment.
            split: `test` (the selection prompts) or `final`.
            reference: No effect: rewards are relative to nothing.
            rows: Answer this many prompts, drawn by the seed of `env`; None: all.

        Returns:
            The mean reward and length of the answers to each prompt in the order of the split. A reward that is NaN or
            infinite stays so, and the agent's mean with it.
        """
        del reference
        check_gym(env, RewardGym, "GRPO.evaluate")
        check_base(self.base, env)
        return evaluate_together([self], env, split, rows=rows)[0]


def check_answers(agents: Sequence[GRPO], env: RewardGym) -> None:
    """Refuse prompts that leave no room for answers, and models that no agent of GRPO has answered with.

    Raises:
        ConfigurationError: The base is an encoder-decoder model, or has too few positions.
    """
    first = agents[0]
    if first.base.is_encoder_decoder:
        raise ConfigurationError("encoder_decoder", True, "GRPO is for decoder-only models: take one of these")
    limit, needed = first.base.max_positions, env.longest_sequence + first.max_completion_length
    if limit is not None and needed > limit:
        fix = (
            f"and the longest prompt, of {env.longest_sequence} tokens, do not fit into the base's {limit} positions: "
            "lower it, or give the gym a max_context_length"
        )
        raise ConfigurationError("max_completion_length", first.max_completion_length, fix)
    if first.use_vllm:
        check_vllm(first.base, [agent.actor_adapter for agent in agents])


def _evaluate(
    agents: Sequence[GRPO], env: RewardGym, split: str, reference: str | None, *, rows: int | None = None
) -> list[RewardEvaluation]:
    del reference
    return evaluate_together(agents, env, split, rows=rows)


register(
    Algorithm(
        agent=GRPO,
        gym=RewardGym,
        learn=learn_together,
        evaluate=_evaluate,
        fitness=REWARD_FITNESSES["reward"],
        fitnesses={**REWARD_FITNESSES, WIN_RATE.name: WIN_RATE},
        trial=RewardEvaluation(np.zeros(2), np.ones(2)),
        has_reference=True,
        evolves=("lr", "beta"),
        loop="finetune_llm_reasoning",
        check=check_answers,
        collect=collect,
        learn_each=learn_each,
    )
)
