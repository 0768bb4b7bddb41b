"""Gymnasium environments that serve batches."""

from __future__ import annotations

from evollm.llm_envs.dataset_gym import DatasetGym
from evollm.llm_envs.preference import PreferenceGym
from evollm.llm_envs.reward import RewardGym
from evollm.llm_envs.sft import SFTGym
from evollm.llm_envs.unpaired import UnpairedGym

__all__ = ["DatasetGym", "PreferenceGym", "RewardGym", "SFTGym", "UnpairedGym"]
