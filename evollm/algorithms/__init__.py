"""The agents that a population consists of."""

from evollm.algorithms.core import LLMAgent
from evollm.algorithms.dpo import DPO
from evollm.algorithms.dpo_settings import DPOHyperparameters
from evollm.algorithms.settings import AgentSettings
from evollm.algorithms.sft import SFT

__all__ = ["DPO", "SFT", "AgentSettings", "DPOHyperparameters", "LLMAgent"]
