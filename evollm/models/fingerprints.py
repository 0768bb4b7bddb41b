"""What makes two adapters or two bases the same: settings that compute the same, and digests of weights."""

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


def lora_settings(config: LoraConfig) -> dict[str, Any]:
    """A LoRA configuration as JSON values; sets become sorted lists."""
    settings: dict[str, Any] = json.loads(json.dumps(cast(Any, config).to_dict(), default=_jsonable))
    return settings


def computing_settings(config: LoraConfig) -> dict[str, Any]:
    """The settings that decide what an adapter computes."""
    return {key: value for key, value in lora_settings(config).items() if key not in LORA_PROVENANCE}


def canonical_settings(config: LoraConfig) -> str:
    """The settings that decide what an adapter computes, as JSON that is equal for equal ones."""
    return json.dumps(computing_settings(config), sort_keys=True)


def _jsonable(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def adapter_fingerprint(config: LoraConfig, tensors: Mapping[str, Tensor]) -> str:
    """Digest of an adapter's weights, by their names in a saved adapter, and of the settings that they compute with."""
    digest = hashlib.sha256(canonical_settings(config).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + _bytes_of(tensor))
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Digest that tells a model from others: name, shape, type and every value of each tensor.

    XXH3 reads some gigabytes a second, several times what SHA-256 does. It finds whatever has changed, and is no seal
    against somebody who looks for other weights with the same digest.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if not tensor.is_meta:
                digest.update(_flat_bytes(tensor).data)
    return digest.hexdigest()


def _flat_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor on the CPU, not copied where it lies there in one piece."""
    found: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def _bytes_of(tensor: Tensor) -> bytes:
    return _flat_bytes(tensor).tobytes()
