"""evollm: tune language models with a population of SFT, DPO, KTO or GRPO agents on one shared base.

Importing this package is quick: torch, transformers and others are imported when the first public name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evollm.quiet import KERNEL, hold_back

if TYPE_CHECKING:
    from evollm.public import (
        DPO,
        GRPO,
        KTO,
        SFT,
        Callback,
        CheckpointError,
        ConfigurationError,
        DataError,
        DivergedError,
        EvoLLMError,
        HyperparameterConfig,
        Inspection,
        Judge,
        MissingExtraError,
        Mutations,
        PolicyArchive,
        PreferenceGym,
        ReplayResult,
        RewardGym,
        RewardModel,
        RLParameter,
        Search,
        SearchPlan,
        SFTGym,
        TournamentSelection,
        TuneResult,
        UnpairedGym,
        WorkerError,
        finetune_llm_kto,
        finetune_llm_preference,
        finetune_llm_reasoning,
        finetune_llm_sft,
        inspect_data,
        load_policy_archive,
        replay,
        save_llm_checkpoint,
        save_merged_model,
        save_policy_archive,
        tune,
    )

from evollm.version import __version__ as __version__

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

hold_back(KERNEL)

# Packages and modules that `evollm.public` imports, so that after `import evollm` the name `evollm.hpo` is found.
_SUBMODULES = frozenset(
    {
        "algorithms",
        "checkpoints",
        "checks",
        "data",
        "errors",
        "execution",
        "foreign",
        "hpo",
        "inspection",
        "llm_envs",
        "models",
    }
    | {"own_files", "processes", "report", "runs", "safe_load", "tracking", "training", "tuning"}
)


# Hidden from type checkers, which would accept any name as an attribute of the package.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Return a public name or a submodule; the first call imports `evollm.public`."""
        if name not in __all__ and name not in _SUBMODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = import_module("evollm.public")
        # Python calls this function only for missing attributes; importing a submodule has set its attribute.
        globals().update({name: getattr(public, name) for name in __all__})
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
