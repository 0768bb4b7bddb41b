"""Gymnasium environments that serve batches."""

from __future__ import annotations

from evollm.llm_envs.preference import PreferenceGym

__all__ = ["PreferenceGym"]
