"""Does sharing passes pay on a GPU? Random weights in published shapes, bf16, pairs as long as those of hh-rlhf.

    python benchmarking/gpu.py

For each shape: member-pairs a second of eight members in shared passes and one after the other, peak memory of eight
members and of one, and, where the package trl is installed (extra `benchmark`), the rate of its DPOTrainer on the same
pairs with the reference computed beforehand. Runs unattended in a few minutes on one card; what does not fit is said
and left out. `--toy` runs everything at a tiny size on the CPU, to see that the script works. Writes `gpu.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from synthetic import Measured, Shape, make_population, measure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers.utils import logging as transformers_logging

from evollm.data.batch import PreferenceBatch
from evollm.models.engine import Engine

VOCABULARY = 151_936
# As published with Qwen2.5: hidden size, feed-forward size, layers, heads, key-value heads, tied head.
PUBLISHED = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
}
TOY = {"toy": (64, 128, 2, 4, 2, True)}


def main() -> None:
    """Measure every shape and print a table."""
    options = _parse()
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: --toy runs the script at a tiny size on the CPU")
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    device = torch.device("cpu" if options.toy else "cuda")
    name = "CPU, toy size" if options.toy else torch.cuda.get_device_name(device)
    print(f"{name}, {date.today()}, torch {torch.__version__}, {options.members} members")
    print(f"{'shape':>6}{'batch':>7}{'':>12}{'member-pairs/s':>16}{'TFLOP/s':>9}{'peak MiB':>10}")
    results = []
    for shape, sizes in (TOY if options.toy else PUBLISHED).items():
        for batch_size in options.batch_sizes:
            for case, result in run(sizes, batch_size, options, device):
                results.append({"shape": shape, "batch_size": batch_size, "case": case, **asdict(result)})
                print(
                    f"{shape:>6}{batch_size:>7}{case:>12}{result.rate:>16.2f}{result.gflops / 1e3:>9.2f}"
                    f"{result.peak_mib:>10.0f}",
                    flush=True,
                )
    options.out.mkdir(parents=True, exist_ok=True)
    described = {"machine": name, "date": str(date.today()), "command": " ".join(sys.argv), "results": results}
    (options.out / "gpu.json").write_text(json.dumps(described, indent=1))


def run(
    sizes: tuple[int, int, int, int, int, bool], batch_size: int, options: argparse.Namespace, device: torch.device
) -> Sequence[tuple[str, Measured]]:
    """All cases of a shape and batch size; one that runs out of memory is said and left out."""
    vocabulary = 512 if options.toy else VOCABULARY
    # Ids below 1000, so that a tokenizer of a thousand words can spell the same pairs for TRL.
    batches = [Shape().batch(batch_size, min(vocabulary, 1000), seed) for seed in range(options.steps)]
    cases = {
        "together": lambda model: population_rate(model, options.members, batches, together=True),
        "in a loop": lambda model: population_rate(model, options.members, batches, together=False),
        "one": lambda model: population_rate(model, 1, batches, together=True),
    }
    if find_spec("trl") is not None:
        cases["TRL"] = lambda model: trl_rate(model, batches, device)
    found = []
    for case, compute in cases.items():
        try:
            found.append((case, compute(random_model(sizes, vocabulary, device))))
        except torch.OutOfMemoryError:
            print(f"{case}: out of memory")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def population_rate(model: Any, members: int, batches: Sequence[PreferenceBatch], *, together: bool) -> Measured:
    """Evollm's."""
    agents = make_population(model, members, gradient_checkpointing=False, device=model.device)
    result = measure(agents, batches, together=together)
    for paths in Engine.of(agents[0].base).paths.values():
        if paths.reasons:
            # A figure of the slow path must not pass for one of the fast path.
            print(f"not on the fast paths: {paths.reasons}")
    return result


def trl_rate(model: Any, batches: Sequence[PreferenceBatch], device: torch.device) -> Measured:
    """TRL's, for one member, with the same pairs as words."""
    from datasets import Dataset  # noqa: PLC0415
    from trl import DPOConfig, DPOTrainer  # noqa: PLC0415

    words = {f"w{number}": number for number in range(1000)} | {"<eos>": 1000}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    pairs = [batch.pair(row) for batch in batches for row in range(len(batch))]
    rows = [
        {
            "prompt": _spell(pair.prompt_ids),
            "chosen": " " + _spell(pair.chosen_ids[:-1]),
            "rejected": " " + _spell(pair.rejected_ids[:-1]),
        }
        for pair in pairs
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=folder,
                use_cpu=device.type == "cpu",
                bf16=device.type == "cuda",
                gradient_checkpointing=False,
                max_length=None,
                per_device_train_batch_size=len(batches[0]),
                num_train_epochs=2,
                precompute_ref_log_probs=True,
                learning_rate=1e-4,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.args.num_train_epochs = 1
        trainer.train()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else float("nan")
    return Measured(len(rows) / seconds, peak, float("nan"))


def random_model(sizes: tuple[int, int, int, int, int, bool], vocabulary: int, device: torch.device) -> Any:
    """A Qwen2 with random weights, made on the device."""
    hidden, intermediate, layers, heads, key_value_heads, tied = sizes
    config = Qwen2Config(
        vocab_size=vocabulary + 512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16
        ).eval()


def _spell(ids: Any) -> str:
    return " ".join(f"w{number}" for number in ids)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny size on the CPU")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(2, 8))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
