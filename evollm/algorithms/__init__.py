"""The agents that a population consists of."""

from evollm.algorithms.agent import LLMAgent
from evollm.algorithms.algorithm import ALGORITHMS, Algorithm, algorithm_named, algorithm_of, register
from evollm.algorithms.arguments import AgentArguments
from evollm.algorithms.dpo import DPO
from evollm.algorithms.dpo_settings import DPOHyperparameters
from evollm.algorithms.settings import AgentSettings
from evollm.algorithms.sft import SFT

__all__ = [
    "ALGORITHMS",
    "DPO",
    "SFT",
    "AgentArguments",
    "AgentSettings",
    "Algorithm",
    "DPOHyperparameters",
    "LLMAgent",
    "algorithm_named",
    "algorithm_of",
    "register",
]
