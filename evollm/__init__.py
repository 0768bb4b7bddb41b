"""evollm: tune language models with a population of SFT or DPO agents on one shared base.

Importing it is quick: torch and the like are imported when the first of its names is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evollm.quiet import KERNEL, hold_back

if TYPE_CHECKING:
    from evollm.public import (
        DPO,
        SFT,
        Callback,
        CheckpointError,
        ConfigurationError,
        DataError,
        DivergedError,
        EvoLLMError,
        HyperparameterConfig,
        Inspection,
        MissingExtraError,
        Mutations,
        PolicyArchive,
        PreferenceGym,
        ReplayResult,
        RLParameter,
        Search,
        SearchPlan,
        SFTGym,
        TournamentSelection,
        TuneResult,
        finetune_llm_preference,
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
    "SFT",
    "Callback",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DivergedError",
    "EvoLLMError",
    "HyperparameterConfig",
    "Inspection",
    "MissingExtraError",
    "Mutations",
    "PolicyArchive",
    "PreferenceGym",
    "RLParameter",
    "ReplayResult",
    "SFTGym",
    "Search",
    "SearchPlan",
    "TournamentSelection",
    "TuneResult",
    "finetune_llm_preference",
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

# Packages and modules that these names come from, or are made with: `import evollm` is enough to write `evollm.hpo`.
_PARTS = frozenset(
    {
        *{
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
        },
        *{"own_files", "processes", "report", "runs", "safe_load", "tracking", "training", "tuning"},
    }
)


# Type checkers would take any name for one of evollm's.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name or a part of the library, which is imported whole at the first of them."""
        if name not in __all__ and name not in _PARTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = import_module("evollm.public")
        # From now on they are found without coming here; importing a part has made it an attribute.
        globals().update({name: getattr(public, name) for name in __all__})
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
