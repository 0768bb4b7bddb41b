"""A run of some seconds with everything that a run can have, for scripts that break it at every moment."""

from __future__ import annotations

import hashlib
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_rows
from peft import LoraConfig
from quick_page import quick_page
from tokenizers_for_tests import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from evollm import ConfigurationError, tune
from evollm.checkpoints import newest_population, read_population
from evollm.report import write

STEPS = 8
# What takes long to import, for a process from which runs are forked.
LIBRARIES = ["evollm.public", "matplotlib.figure", "pytest", "transformers.models.llama.modeling_llama"]


def train(folder: Path, room: Any, **changes: Any) -> Path:
    """Run to the end as a user would: begin, or go on where the message says that there is a run; returns the elite.

    Args:
        folder: The run folder.
        room: A context in which the run is made, such as one in which the disk is full.
        **changes: Other arguments of `tune`.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tokenizer = make_tokenizer(adds_bos=True)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **shape, max_position_embeddings=128, initializer_range=0.2)
    model = LlamaForCausalLM(config)
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "test_data": make_rows(6, 10),
        "final_data": make_rows(4, 20),
        "population": 4,
        "lora_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "lr": 1e-3,
        "gradient_checkpointing": False,
        "data_batch_size_per_gpu": 4,
        "max_steps": STEPS,
        "evo_steps": 2,
        "checkpoint_steps": 1,
        "update_reference_each_epoch": True,
        "num_sample_answers": 1,
        "verbose": False,
        **changes,
    }
    model = arguments.pop("model", model)
    # Drawing takes longer than all the rest.
    write.render = quick_page
    with room:
        try:
            result = tune(model, make_rows(10), run_dir=folder, **arguments)
        except ConfigurationError as error:
            if "resume it" not in str(error) and "checkpoints of another run" not in str(error):
                raise
            result = tune(model, make_rows(10), resume_from_checkpoint=folder, **arguments)
    return result.run_dir


def digest(folder: Path, steps: int = STEPS) -> str:
    """Of everything that a run ends with."""
    newest = newest_population(folder / "checkpoints")
    assert newest is not None
    population = read_population(newest)
    assert population.state["step"] == steps
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    for agent in [*population.agents, population.best_so_far]:
        add({role: dict(state.tensors) for role, state in agent.adapters.items()})
        add(dict(agent.attributes))
        add(agent.optimizer)
    add({key: value for key, value in population.state.items() if key != "config"})
    for name in ("lineage.jsonl", "metrics.jsonl"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
