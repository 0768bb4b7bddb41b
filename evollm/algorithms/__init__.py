"""The agents that a population consists of."""

from evollm.algorithms.agent import LLMAgent
from evollm.algorithms.algorithm import ALGORITHMS, Algorithm, algorithm_named, algorithm_of, register
from evollm.algorithms.arguments import AgentArguments
from evollm.algorithms.dpo import DPO
from evollm.algorithms.dpo_settings import DPOHyperparameters
from evollm.algorithms.grpo import GRPO
from evollm.algorithms.grpo_settings import GRPOHyperparameters
from evollm.algorithms.kto import KTO
from evollm.algorithms.kto_settings import KTOHyperparameters
from evollm.algorithms.settings import AgentSettings
from evollm.algorithms.sft import SFT

__all__ = [
    "ALGORITHMS",
    "DPO",
    "GRPO",
    "KTO",
    "SFT",
    "AgentArguments",
    "AgentSettings",
    "Algorithm",
    "DPOHyperparameters",
    "GRPOHyperparameters",
    "KTOHyperparameters",
    "LLMAgent",
    "algorithm_named",
    "algorithm_of",
    "register",
]
