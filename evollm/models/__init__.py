"""The frozen base model, the LoRA adapters on it, and the log-probs that they give.

- `shared_base`: one base for a whole population, and what its forward passes have in common
- `adapters/`: LoRA adapters: configurations, target layers, the registry of owners, routing several through one forward
  pass, merging into the base, combining and scaling
- `loading/`: a base by name, from an adapter's folder or a policy archive; its type and device
- `engine`: log-probs of a batch for any number of adapters, with or without gradients
- `layouts/`: how samples are laid out in a forward pass: packed, plain, for an encoder-decoder, or each by itself;
  `attention`, `flash`, `grouping` are for them
- `logprobs`, `head`: log-probs of tokens, and their sums; `reference_cache` keeps those of frozen adapters
- `layers`, `rope`, `quantised`: what is changed in the modules of the base
- `load_balancing`, `loss_scaling`: the loss of routers, and backward passes in float16
- `probe`, `rounding`, `fast_paths`: trials that compare faster ways with the model's own forward pass
- `budget`, `pass_budgets`, `slow_settings`: what follows the free memory, and warnings about slow settings
- `fingerprints`: digests of adapters and bases
- `generation`, `sampling`: answers of all members at once, greedy or sampled with a key for each answer
- `reward_model`: a sequence classifier that scores answers, as a reward function or a judge
"""

from evollm.models.adapters.adapter import AdapterState
from evollm.models.adapters.shares import AdapterShares
from evollm.models.layouts import completion_logprobs
from evollm.models.loading.base_source import load_policy_archive
from evollm.models.loading.policy_archive import PolicyArchive
from evollm.models.loading.pretrained import load_base_model
from evollm.models.reference_cache import ReferenceCache
from evollm.models.reward_model import RewardModel
from evollm.models.shared_base import SharedBase

__all__ = [
    "AdapterShares",
    "AdapterState",
    "PolicyArchive",
    "ReferenceCache",
    "RewardModel",
    "SharedBase",
    "completion_logprobs",
    "load_base_model",
    "load_policy_archive",
]
