"""The frozen base model, the adapters on it, and the log-probabilities that they give."""

from evollm.models.adapters import AdapterState
from evollm.models.loading import load_policy_archive
from evollm.models.logprobs import completion_logprobs
from evollm.models.policy_archive import PolicyArchive
from evollm.models.pretrained import load_base_model
from evollm.models.reference_cache import ReferenceCache
from evollm.models.registry import AdapterShares
from evollm.models.shared_base import SharedBase

__all__ = [
    "AdapterShares",
    "AdapterState",
    "PolicyArchive",
    "ReferenceCache",
    "SharedBase",
    "completion_logprobs",
    "load_base_model",
    "load_policy_archive",
]
