"""The agents that a population consists of."""

from evollm.algorithms.core import LLMAgent
from evollm.algorithms.dpo import DPO, DPOHyperparameters
from evollm.algorithms.settings import AgentSettings

__all__ = ["DPO", "AgentSettings", "DPOHyperparameters", "LLMAgent"]
