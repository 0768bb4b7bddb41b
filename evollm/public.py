"""The public names of `evollm`; this module takes seconds to import, and `evollm` imports it at the first use."""

from evollm.algorithms import DPO, GRPO, KTO, SFT
from evollm.checkpoints import save_llm_checkpoint, save_merged_model, save_policy_archive
from evollm.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    DivergedError,
    EvoLLMError,
    MissingExtraError,
    WorkerError,
)
from evollm.hpo import HyperparameterConfig, Judge, Mutations, RLParameter, Search, SearchPlan, TournamentSelection
from evollm.inspection import Inspection, inspect_data
from evollm.llm_envs import PreferenceGym, RewardGym, SFTGym, UnpairedGym
from evollm.models import PolicyArchive, RewardModel, load_policy_archive
from evollm.training import (
    Callback,
    finetune_llm_kto,
    finetune_llm_preference,
    finetune_llm_reasoning,
    finetune_llm_sft,
)
from evollm.tuning import ReplayResult, TuneResult, replay, tune

__all__ = [
    "DPO",
    "GRPO",
    "KTO",
    "SFT",
    "Callback",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DivergedError",
    "EvoLLMError",
    "HyperparameterConfig",
    "Inspection",
    "Judge",
    "MissingExtraError",
    "Mutations",
    "PolicyArchive",
    "PreferenceGym",
    "RLParameter",
    "ReplayResult",
    "RewardGym",
    "RewardModel",
    "SFTGym",
    "Search",
    "SearchPlan",
    "TournamentSelection",
    "TuneResult",
    "UnpairedGym",
    "WorkerError",
    "finetune_llm_kto",
    "finetune_llm_preference",
    "finetune_llm_reasoning",
    "finetune_llm_sft",
    "inspect_data",
    "load_policy_archive",
    "replay",
    "save_llm_checkpoint",
    "save_merged_model",
    "save_policy_archive",
    "tune",
]
