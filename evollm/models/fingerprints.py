"""Digests that tell adapters and bases apart, and the LoRA settings that decide what an adapter computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from peft import LoraConfig
from torch import Tensor, nn

# Fields of a configuration that say where an adapter came from, not what it computes.
LORA_PROVENANCE = frozenset(
    {"base_model_name_or_path", "inference_mode", "revision", "peft_version", "init_lora_weights"}
)


def computing_settings(config: LoraConfig) -> dict[str, Any]:
    """The settings that decide what an adapter computes, as JSON values; sets become sorted lists."""
    settings = json.loads(json.dumps(cast(Any, config).to_dict(), default=_jsonable))
    return {key: value for key, value in settings.items() if key not in LORA_PROVENANCE}


def canonical_settings(config: LoraConfig) -> str:
    """`computing_settings` as JSON text; equal settings give equal text."""
    return json.dumps(computing_settings(config), sort_keys=True)


def _jsonable(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def adapter_fingerprint(config: LoraConfig, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of an adapter's weights, under the names of PEFT's saved adapters, and of its computing settings."""
    digest = hashlib.sha256(canonical_settings(config).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + _flat_bytes(tensor).tobytes())
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """XXH3 digest of a model: name, shape, type and all values of each tensor.

    XXH3 reads some gigabytes per second, several times as many as SHA-256. It detects accidental changes; it is not
    secure against weights that were constructed to have the same digest.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if not tensor.is_meta:
                digest.update(_flat_bytes(tensor).data)
    return digest.hexdigest()


def _flat_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor; without a copy if the tensor is contiguous and on the CPU."""
    found: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found
