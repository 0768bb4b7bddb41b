"""Supervised fine-tuning on completions, the usual stage before preferences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig
from transformers import PreTrainedModel

from evollm.algorithms.agilerl import EvolvableAlgorithm
from evollm.algorithms.algorithm import Algorithm, register
from evollm.algorithms.fit import batch_for, check_base, check_gym
from evollm.algorithms.settings import AgentSettings, Hyperparameters
from evollm.algorithms.sft_step import evaluate_together, learn_together
from evollm.algorithms.step import policy_logprobs
from evollm.checks import boolean
from evollm.data.batch import PreferenceBatch
from evollm.foreign import ACTION, SFT_AGENT, explains
from evollm.hpo.fitness import LikelihoodEvaluation, likelihood_fitness
from evollm.hpo.hyperparameters import HyperparameterConfig
from evollm.llm_envs import SFTGym
from evollm.models.loading import BaseSource, usable_device
from evollm.runs.words import Score, Words

if TYPE_CHECKING:
    from accelerate import Accelerator
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
    """An agent that learns completions: an `actor` adapter on a base that it shares with others, and no reference.

    Agents built on the same model object share it, whatever their algorithm; `SFT.population` builds several at once.
    The model is put into evaluation mode and stays there. A DPO agent takes an SFT agent's checkpoint as its next
    stage: see `load_checkpoint`.

    Args:
        observation_space: That of the environment; kept as an attribute.
        action_space: That of the environment; kept as an attribute.
        pad_token_id: Kept for compatibility; padding is recognised by lengths.
        pad_token: Likewise.
        model_name: Hub name or folder of the base, instead of `actor_network`; see `load_base_model`.
        actor_network: The base as a loaded language model, causal or encoder-decoder, without adapters. LoRA layers are
            put into it.
        model_config: Keyword arguments for `from_pretrained`, with `model_name`.
        archive: A `policy.pt` of the original DPO repository: its weights become the base's; see `load_policy_archive`.
        hp_config: Which hyperparameters mutate, and within which bounds; None: none.
        index: Number of the agent in its population.
        batch_size: At most so many examples for one optimizer step; a larger batch, of all processes, makes several
            steps.
        lr: Learning rate of AdamW (weight decay 0).
        max_grad_norm: 2-norm to which a longer gradient is scaled down.
        update_epochs: Passes over each batch that `learn` is given.
        calc_position_embeddings: Pass explicit position ids rather than leave them to the model.
        micro_batch_size_per_gpu: At most so many examples in one forward pass; gradients accumulate to the same update.
        device: `cpu`, `cuda`, ...; an accelerator's device comes first. None: a card if there is one, and where it is
            for an `actor_network`.
        dtype: Type that a base is loaded in by its name: `float32`, `bfloat16`, ...; `auto`: bfloat16 on a card that is
            fast at it and on a CPU that multiplies it at least 1.5 times as fast as float32 (measured), else float32;
            None: what it is stored in. Adapters and sums of log-probs are float32 at least.
        lora_config: `peft.LoraConfig`; by default rank 16, alpha 32, on all linear layers.
        accelerator: Of one process, or of several that each compute a share of every batch.
        wrap: Accepted for compatibility; nothing is wrapped in a single process.
        clone: Accepted for compatibility; use the method `clone`.
        seed: Seeds the adapter's initialisation and the agent's own generator.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time. None:
            where the free memory does not hold enough of them for full speed, found at the first training pass.
        torch_compiler: A mode of `torch.compile` for the base's layers, such as `default`.
        token_budget: Most tokens in one forward pass, of all members that share it. None: what the device and its free
            memory suggest. The update is the same up to rounding; give it for the same bits on another machine.
        drop_nonfinite_rows: Leave out rows on which the frozen base gives log-probs that are not finite, with a
            warning that names them. False: raise `DataError` when the first is found.

    Raises:
        ConfigurationError: An argument cannot work; the message names it, its value and the fix.
    """

    algorithm: ClassVar[str] = WORDS.name
    words: ClassVar[Words] = WORDS

    @explains(SFT_AGENT)
    def __init__(
        self,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        *,
        pad_token_id: int | None = None,
        pad_token: str | None = None,
        model_name: str | None = None,
        actor_network: PreTrainedModel | None = None,
        model_config: Mapping[str, Any] | None = None,
        archive: str | Path | None = None,
        hp_config: HyperparameterConfig | None = None,
        index: int = 0,
        batch_size: int = 16,
        lr: float = 5e-5,
        max_grad_norm: float = 1.0,
        update_epochs: int = 1,
        calc_position_embeddings: bool = True,
        micro_batch_size_per_gpu: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        lora_config: LoraConfig | None = None,
        accelerator: Accelerator | None = None,
        wrap: bool = True,
        clone: bool = False,
        seed: int = 42,
        gradient_checkpointing: bool | None = None,
        torch_compiler: str | None = None,
        token_budget: int | None = None,
        drop_nonfinite_rows: bool = True,
    ) -> None:
        boolean("wrap", wrap)
        boolean("clone", clone)
        settings = AgentSettings(
            seed=seed,
            micro_batch_size_per_gpu=micro_batch_size_per_gpu,
            gradient_checkpointing=gradient_checkpointing,
            calc_position_embeddings=calc_position_embeddings,
            pad_token_id=pad_token_id,
            pad_token=pad_token,
            torch_compiler=torch_compiler,
            token_budget=token_budget,
            drop_nonfinite_rows=drop_nonfinite_rows,
        )
        hyperparameters = Hyperparameters(
            lr=lr, max_grad_norm=max_grad_norm, batch_size=batch_size, update_epochs=update_epochs
        )
        super().__init__(
            source=BaseSource(model_name, actor_network, model_config, archive, dtype),
            device=usable_device(accelerator, device, actor_network),
            lora_config=lora_config,
            settings=settings,
            hyperparameters=hyperparameters,
            hp_config=hp_config,
            index=index,
            observation_space=observation_space,
            action_space=action_space,
            accelerator=accelerator,
        )

    def learn(self, experiences: PreferenceBatch | Mapping[str, Any], training: bool = True) -> dict[str, float]:
        """Update the actor on a batch of examples, `update_epochs` times.

        The loss is the mean negative log-likelihood of the completions' tokens, with what ends them, given all tokens
        before them: a mean over all completion tokens of the optimizer batch, whatever the micro-batch and however
        many processes, so that a token of a long completion weighs what one of a short completion weighs.

        Args:
            experiences: A batch, or an observation of `SFTGym`. Rejected sides play no part.
            training: False computes the metrics and changes nothing.

        Returns:
            `mean_loss`, and by the names of TRL `loss`, `grad_norm`, `learning_rate`: means over the optimizer steps,
            by their completion tokens, of the policy before each; losses in nats per token. `num_tokens`: the tokens
            that the agent has learnt from so far, those of prompts included.
        """
        return learn_together([self], batch_for(self.base, experiences), training=boolean("training", training))[0]

    @explains(ACTION)
    def get_action(self, obs: PreferenceBatch | Mapping[str, Any]) -> NDArray[np.float32]:
        """The log-probability of each completion of an observation, (num_rows,) in nats, 0 for absent rows."""
        (policy,) = policy_logprobs([self], batch_for(self.base, obs))
        logprobs = policy.chosen.float().cpu().numpy()
        if isinstance(obs, PreferenceBatch):
            return logprobs
        present = np.asarray(obs["prompt_lengths"]) > 0
        action = np.zeros(len(present), dtype=np.float32)
        action[present] = logprobs
        return action

    def evaluate(self, env: SFTGym, split: str = "test") -> LikelihoodEvaluation:
        """Score the agent on every example of a fixed split.

        Args:
            env: The environment.
            split: `test` (the selection examples) or `final`.

        Returns:
            The log-probability of each completion, in the order of the split, but for those on which the base by itself
            is not finite.

        Raises:
            DataError: The base is not finite on any example, or on one and `drop_nonfinite_rows` is False.
        """
        check_gym(env, SFTGym, "SFT.evaluate")
        check_base(self.base, env)
        return evaluate_together([self], env, split)[0]


register(
    Algorithm(
        agent=SFT,
        gym=SFTGym,
        learn=learn_together,
        evaluate=lambda agents, env, split, reference: evaluate_together(agents, env, split),
        fitness=likelihood_fitness,
        trial=LikelihoodEvaluation(-np.ones(2), np.ones(2)),
        has_reference=False,
        loop="finetune_llm_sft",
    )
)
