"""The hyperparameters and settings of a GRPO agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from evollm.algorithms.policy_losses import SCALES, TOKEN_WEIGHTS
from evollm.algorithms.settings import AgentSettings, Hyperparameters
from evollm.checks import boolean, finite_number, nearest_name, positive_number, whole_number
from evollm.errors import ConfigurationError

# Fewest answers of which one can be better than the others.
FEWEST_ANSWERS = 2


@dataclass(frozen=True)
class GRPOHyperparameters(Hyperparameters):
    """The values of a GRPO agent that evolution may change.

    Attributes:
        beta: Weight of the divergence from the reference; 0: none, and no passes of the reference.
        epsilon: How far the probability ratio may fall below 1.
        epsilon_high: How far it may rise above 1.
        temperature: Divides the logits where answers are sampled, and where their probabilities are computed.
        group_size: Number of answers to each prompt.
    """

    beta: float = 0.04
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    temperature: float = 1.0
    group_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "beta", float(finite_number("beta", self.beta)))
        if self.beta < 0:
            raise ConfigurationError("beta", self.beta, "must not be negative; 0 leaves the reference out")
        for name in ("epsilon", "epsilon_high", "temperature"):
            object.__setattr__(self, name, float(positive_number(name, getattr(self, name))))
        if self.epsilon >= 1:
            raise ConfigurationError("epsilon", self.epsilon, "must be below 1: a ratio is above 0 anyway")
        object.__setattr__(self, "group_size", whole_number("group_size", self.group_size, FEWEST_ANSWERS))


@dataclass(frozen=True)
class GRPOSettings(AgentSettings):
    """Settings that no mutation changes, equal for all GRPO agents of a population; `GRPO` documents each field."""

    added: ClassVar[frozenset[str]] = AgentSettings.added | {"use_vllm", "vllm_gpu_memory_utilization"}
    loss_type: str = "dapo"
    scale_rewards: str = "group"
    max_completion_length: int = 256
    mask_truncated_completions: bool = False
    use_bias_correction_kl: bool = True
    evaluation_answers: int = 1
    evaluation_temperature: float = 0.0
    use_vllm: bool = False
    vllm_gpu_memory_utilization: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("loss_type", TOKEN_WEIGHTS), ("scale_rewards", SCALES)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                nearest = nearest_name(value, known) if isinstance(value, str) else None
                hint = f"; the nearest is {nearest!r}" if nearest else ""
                raise ConfigurationError(name, value, f"must be one of {', '.join(known)}{hint}")
        object.__setattr__(self, "max_completion_length", _count("max_completion_length", self.max_completion_length))
        for name in ("mask_truncated_completions", "use_bias_correction_kl"):
            boolean(name, getattr(self, name))
        object.__setattr__(self, "evaluation_answers", _count("evaluation_answers", self.evaluation_answers))
        temperature = float(finite_number("evaluation_temperature", self.evaluation_temperature))
        object.__setattr__(self, "evaluation_temperature", temperature)
        if temperature < 0:
            raise ConfigurationError("evaluation_temperature", temperature, "must not be negative; 0 answers greedily")
        if temperature == 0 and self.evaluation_answers > 1:
            fix = "greedy answers to a prompt are all alike: give an evaluation_temperature above 0, or leave it out"
            raise ConfigurationError("evaluation_answers", self.evaluation_answers, fix)
        boolean("use_vllm", self.use_vllm)
        share = float(positive_number("vllm_gpu_memory_utilization", self.vllm_gpu_memory_utilization))
        object.__setattr__(self, "vllm_gpu_memory_utilization", share)
        if share >= 1:
            fix = "must be below 1: it is vLLM's share of the GPU's memory, and training needs some, too"
            raise ConfigurationError("vllm_gpu_memory_utilization", share, fix)


def _count(name: str, value: object) -> int:
    return whole_number(name, value, 1)
