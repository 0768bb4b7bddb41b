"""Hashes of what small runs of every kind end with, to see whether a change of the code changed a bit of them.

Each run takes some seconds on one thread. Equal hashes are meant of the same machine, versions and processor:

    python tests/run_hashes.py --write before.json
    python tests/run_hashes.py --compare before.json
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_examples, make_rows
from families import make_family
from peft import LoraConfig
from tokenizers_for_tests import chatml_tokenizer, make_tokenizer, t5_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from evollm import DPO, replay, save_merged_model, save_policy_archive, tune
from evollm.checkpoints import newest_population, read_population
from evollm.report import write_report

Hashes = dict[str, str]
STEPS = 6
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def make_model(tokenizer: PreTrainedTokenizerBase, config: type = LlamaConfig, **changes: Any) -> PreTrainedModel:
    """A model with random weights, always the same."""
    torch.manual_seed(0)
    shape = {"max_position_embeddings": 256, **SHAPE, **changes}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **shape))
    return model.float().eval()


def turns(row: dict[str, str], *, several: bool = False) -> dict[str, Any]:
    """A row of strings as a conversation; with `several` turns in its sides, too."""

    def side(text: str) -> list[dict[str, str]]:
        more = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": text[::-1]}] if several else []
        return [{"role": "assistant", "content": text}, *more]

    prompt = [{"role": "user", "content": row["prompt"]}]
    return {"prompt": prompt, **{name: side(row[name]) for name in ("chosen", "rejected")}}


def train(folder: Path, model: Any = None, rows: Any = None, **changes: Any) -> Path:
    """A short search with evaluations, evolutions and checkpoints; returns the run folder."""
    random.seed(0)
    np.random.seed(0)
    tokenizer = changes.pop("tokenizer", None) or make_tokenizer(adds_bos=True)
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "test_data": make_rows(6, 10),
        "final_data": make_rows(4, 20),
        "population": 4,
        "lora_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        "lr": 1e-2,
        "gradient_checkpointing": False,
        "data_batch_size_per_gpu": 4,
        "max_steps": STEPS,
        "evo_steps": 2,
        "checkpoint_steps": 2,
        "num_sample_answers": 1,
        "dtype": None,
        "written_at": "2026-01-01T00:00:00",
        "verbose": False,
        "run_dir": folder,
        **({} if changes.get("population") == 1 else {"search": "tournament", "sampling": "random"}),
        **({} if changes.get("algorithm") == "sft" else {"fitness": "accuracy_mean_margin"}),
        **changes,
    }
    return tune(make_model(tokenizer) if model is None else model, rows or make_rows(10), **arguments).run_dir


def hashes_of(folder: Path) -> Hashes:
    """Of everything that a run folder ends with, apart from times and settings."""
    newest = newest_population(folder / "checkpoints")
    assert newest is not None
    saved = read_population(newest)
    state = {key: value for key, value in saved.state.items() if key not in ("config", "engine", "spent", "evaluated")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [line.pop("samples", None) for line in lines]
    return {
        "adapters": digest([{role: one.tensors for role, one in agent.adapters.items()} for agent in saved.agents]),
        "moments": digest([agent.optimizer for agent in saved.agents]),
        "state": digest(state),
        "metrics": digest(lines),
        "answers": digest(answers),
        "lineage": digest((folder / "lineage.jsonl").read_bytes()),
        "evaluations": digest([path.read_bytes() for path in sorted((folder / "evaluations").glob("*"))]),
        "report": digest(page_of(folder)),
    }


def page_of(folder: Path) -> str:
    """The report without what depends on the clock and the folder's place."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / folder.name
        shutil.copytree(folder, copy)
        (copy / "timing.jsonl").unlink(missing_ok=True)
        page = write_report(copy, pictures=False).read_text(encoding="utf-8")
        return page.replace(place, "").replace(str(folder.parent), "")


def digest(value: Any) -> str:
    """Of tensors, and of plain data."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, bytes):
            found.update(value)
        elif hasattr(value, "items"):
            for key in sorted(value, key=str):
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(value)
    return found.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- the kinds of runs


def searched(**changes: Any) -> Callable[[Path], Hashes]:
    """A search whose arguments differ from the usual ones."""

    def run(folder: Path) -> Hashes:
        given = {name: value() if name in ("model", "tokenizer") else value for name, value in changes.items()}
        return hashes_of(train(folder / "run", **given))

    return run


def resumed(folder: Path) -> Hashes:
    """A search that was longer than it was first meant to be."""
    train(folder / "run", max_steps=STEPS // 2)
    return hashes_of(train(folder / "run", run_dir=None, resume_from_checkpoint=folder / "run"))


def replayed(folder: Path) -> Hashes:
    """The winner of a search, again by itself."""
    rows: dict[str, Any] = {"data": make_rows(10), "test_data": make_rows(6, 10), "final_data": make_rows(4, 20)}
    tokenizer = make_tokenizer(adds_bos=True)
    again = {"model": make_model(tokenizer), "tokenizer": tokenizer, "run_dir": folder / "again", "verbose": False}
    found = replay(train(folder / "run"), **rows, **again)
    return {"exact": str(found.exact), **hashes_of(folder / "again")}


def chained(folder: Path) -> Hashes:
    """DPO after SFT, and the winner as files for other programs."""
    base = folder / "base"
    tokenizer = make_tokenizer(adds_bos=True)
    make_model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    examples = {"rows": make_examples(10), "test_data": make_examples(6, 10), "final_data": make_examples(4, 20)}
    first = train(folder / "sft", str(base), algorithm="sft", **examples)
    second = train(folder / "dpo", str(base), start_from=first / "elite")
    agent = DPO.load(second / "elite")
    save_policy_archive(agent, folder / "policy.pt")
    save_merged_model(agent, folder / "merged", tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    return {
        **{f"sft {name}": value for name, value in hashes_of(first).items()},
        **hashes_of(second),
        "archive": digest(torch.load(folder / "policy.pt", weights_only=True)["state"]),
        "merged": digest(merged),
    }


KINDS: dict[str, Callable[[Path], Hashes]] = {
    "search": searched(),
    "moving references": searched(update_reference_each_epoch=True, max_steps=8),
    "one agent": searched(population=1, evo_steps=None, test_data=None, final_data=None),
    "base as reference": searched(use_separate_reference_adapter=False),
    "small budget": searched(token_budget=60, micro_batch_size_per_gpu=2),
    "several optimizer steps": searched(data_batch_size_per_gpu=6, batch_size=2),
    "evolving losses": searched(hp_config={"loss_type": {"choices": ["sigmoid", "ipo", "hinge"]}, "lr": [1e-3, 1e-1]}),
    "several losses": searched(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]),
    "length-desensitised": searched(ld_alpha=0.5),
    "sft": searched(
        algorithm="sft", rows=make_examples(10), test_data=make_examples(6, 10), final_data=make_examples(4, 20)
    ),
    "conversations": searched(
        tokenizer=chatml_tokenizer,
        model=lambda: make_model(chatml_tokenizer()),
        rows=[turns(row, several=number % 3 == 0) for number, row in enumerate(make_rows(10))],
        test_data=[turns(row) for row in make_rows(6, 10)],
        final_data=[turns(row) for row in make_rows(4, 20)],
    ),
    "experts": searched(
        model=lambda: make_model(make_tokenizer(), MixtralConfig, num_local_experts=2, num_key_value_heads=2),
        lora_config=LoraConfig(r=2, target_modules="all-linear"),
    ),
    "states": searched(
        model=lambda: make_model(make_tokenizer(), MambaConfig, state_size=4),
        lora_config=LoraConfig(r=2, target_modules=["in_proj"]),
    ),
    "bfloat16": searched(model=lambda: make_model(make_tokenizer()).bfloat16()),
    "learned positions": searched(
        model=lambda: widened(make_family("gpt2").float()), lora_config=LoraConfig(r=2, target_modules=["c_attn"])
    ),
    "encoder-decoder": searched(
        tokenizer=t5_tokenizer,
        encoder_decoder=True,
        model=lambda: widened(make_family("t5").float()),
        lora_config=LoraConfig(r=2, target_modules=["q", "v"]),
    ),
    "resumed": resumed,
    "replayed": replayed,
    "chained": chained,
}


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """A family's model with a vocabulary as large as the tokenizer's."""
    torch.manual_seed(0)
    model.resize_token_embeddings(len(make_tokenizer()))
    return model


def main() -> None:
    """Run each kind, and write or compare the hashes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the hashes go")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="the hashes of another state of the code")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Drawing takes longer than a run: each is drawn once, by `page_of`.
    importlib.import_module("evollm.tuning.tune").write_report = lambda run_dir: run_dir  # type: ignore[attr-defined]
    before = json.loads(arguments.compare.read_text()) if arguments.compare else {}
    found, differing = {}, 0
    for kind in arguments.only:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = KINDS[kind](Path(folder))
        then = before.get(kind, found[kind])
        changed = [name for name in {**then, **found[kind]} if then.get(name) != found[kind].get(name)]
        differing += bool(changed)
        verdict = f"DIFFERS: {', '.join(changed)}" if changed else "same" if kind in before else "new"
        print(f"{kind:24} {time.perf_counter() - began:5.1f} s  {verdict}", flush=True)
    if arguments.write:
        arguments.write.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} kinds of runs, {differing} differ")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
