"""The agents that a population consists of."""

from evollm.algorithms.core import LLMAgent
from evollm.algorithms.dpo import DPO, DPOHyperparameters
from evollm.algorithms.settings import AgentSettings
from evollm.algorithms.sft import SFT

__all__ = ["DPO", "SFT", "AgentSettings", "DPOHyperparameters", "LLMAgent"]
