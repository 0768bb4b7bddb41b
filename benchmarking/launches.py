"""Kernels and blocking copies of a training step, counted without a card.

    python benchmarking/launches.py

Eight DPO members learn from eight pairs as gpu.py makes them (210 tokens a pair), with LoRA rank 16 on all linear
layers of models in bfloat16: the second step of a population, through `learn_together`, its references known. What is
counted stands in pretended_card.py. Everything is evollm's own code with the default settings, but for what needs
values or a card: the probe and the trials of the flash kernel and of the head's Triton kernel count as passed, a launch
of the latter is one kernel, and free memory is that of a card of 80 GB beside the base.

The parts: `forward`, the network without its head; `head`, both ways; `backward`, of all but the head; `loss`, from
log-probs of tokens to losses and metrics; `update`, gradients, clipping and optimizer. `blocking` are copies that the
host waits for, `queued` those that it does not wait for. `switched` is how often one of PEFT's layers was told which
adapter is active. `references` and `scoring` are the kernels for the log-probs of 64 further pairs, under the one
reference and under all members.

`--compiled` adds what a step with `torch_compiler="default"` launches: `compiled`, the kernels above without those of
the layers and with those of compiled layers; see compiled_launches.py. Inductor needs a C++ compiler and a minute.
"""

from __future__ import annotations

import argparse
import subprocess
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from datetime import date
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from compiled_launches import compiled_layer
from gpu import PUBLISHED, TOY, VOCABULARY, random_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pretended_card import CARD, Counts, pretended_card
from result_lines import append
from synthetic import Shape, make_population

from evollm.algorithms.dpo_step import learn_together
from evollm.algorithms.step import policy_logprobs
from evollm.models.budget import rows_at_a_time
from evollm.models.engine import Engine
from evollm.models.fast_paths import FastPaths

Row = dict[str, Any]

# Sizes as in gpu.py, and the vocabulary less the 512 ids that gpu.py adds; 135M as published with SmolLM2.
SHAPES = {"toy": (TOY["toy"], 512), "135M": ((576, 1536, 30, 9, 3, True), 49_152 - 512)}
SHAPES |= {name: (sizes, VOCABULARY) for name, sizes in PUBLISHED.items()}
# Of a card of 80 GB.
CARD_BYTES = 79 * 2**30
PARTS = ("forward", "head", "backward", "loss", "update", "other")
# Files that decide what a kernel belongs to, wherever they are among the callers; the first that is found decides.
_ANYWHERE = {
    "evollm/models/head.py": "head",
    "torch/autograd/graph.py": "backward",
    "evollm/models/layouts/": "forward",
}
# Without one of these: the innermost caller in one of these decides, or in another file of the algorithms.
_UPDATES = "evollm/algorithms/"
_INNERMOST = {
    "evollm/models/passes.py": "forward",
    "evollm/models/engine.py": "loss",
    "evollm/models/runner.py": "loss",
    "evollm/models/logprobs.py": "loss",
    "evollm/algorithms/dpo_step.py": "loss",
    "evollm/algorithms/losses.py": "loss",
}


def main() -> None:
    """Count a step of each shape, and print a table."""
    options = _parse()
    warnings.simplefilter("ignore")
    layer = compiled_layer() if options.compiled else None
    if layer is not None:
        print("a compiled layer:", ", ".join(f"{number} {name}" for name, number in layer.items()))
    of = f"{options.members} members x {options.pairs} pairs"
    print(f"{date.today()}, torch {torch.__version__}, commit {_commit()}, {of}")
    print(HEADER)
    rows = []
    for shape in options.shapes:
        rows.append(count_step(shape, options.members, options.pairs))
        rows[-1]["compiled"] = None if layer is None else with_compiled_layers(rows[-1], layer["layer"])
        append(options.out / "launches.jsonl", rows[-1])
        print(line(rows[-1]), flush=True)
    for row in rows:
        print(f"blocking copies, {row['shape']}:", ", ".join(f"{n} {what}" for what, n in row["copies"].items()))


def count_step(shape: str, members: int, pairs: int, fewer_layers: int = 0) -> Row:
    """What a step launches, by parts, and the copies that it waits for."""
    (hidden, intermediate, layers, *others), vocabulary = SHAPES[shape]
    sizes = hidden, intermediate, layers - fewer_layers, *others
    tokens = Shape(8, 6, 7) if shape == "toy" else Shape()
    batch = tokens.batch(pairs, min(vocabulary, 1000))
    with a_card() as counts:
        model = random_model(sizes, vocabulary, CARD, torch.bfloat16)
        free = CARD_BYTES - sum(parameter.nbytes for parameter in model.parameters())
        with patch("evollm.models.budget._free_memory", lambda device: free):
            agents = make_population(model, members, device=CARD)
            for agent in agents:
                agent.reference_logprobs(batch)
            learn_together(agents, batch)
            counts.clear()
            with _switches() as switched:
                learn_together(agents, batch)
            step = deepcopy(counts)
            rows = tokens.batch(rows_at_a_time(CARD.type, pairs), min(vocabulary, 1000), seed=1)
            counts.clear()
            agents[0].reference_logprobs(rows)
            references = counts.kernels.total()
            counts.clear()
            policy_logprobs(agents, rows)
            scoring = counts.kernels.total()
    calls = step.kernels.items()
    parts = {part: sum(number for call, number in calls if call.part == part) for part in PARTS}
    attention = sum(number for call, number in calls if call.what == "_flash_attention_backward")
    copies: Counter[str] = Counter()
    for call, number in step.copies.items():
        copies[f"{call.what} in {call.where}"] += number
    return {
        "shape": shape,
        "members": members,
        "pairs": pairs,
        "tokens": int(batch.num_tokens.sum()),
        "passes": attention // model.config.num_hidden_layers,
        **parts,
        "kernels": step.kernels.total(),
        "blocking": step.copies.total(),
        "queued": step.queued.total(),
        "switched": len(switched),
        "rows": len(rows),
        "references": references,
        "scoring": scoring,
        "copies": dict(copies.most_common()),
        "attention": Engine.of(agents[0].base).attention,
    }


def with_compiled_layers(row: Row, layer: int) -> int:
    """The kernels of a step if a pass takes so many for each layer."""
    layers = SHAPES[row["shape"]][0][2]
    own = row["kernels"] - count_step(row["shape"], row["members"], row["pairs"], fewer_layers=1)["kernels"]
    return int(row["kernels"] + layers * (row["passes"] * layer - own))


def place(frame: FrameType | None) -> tuple[str, str]:
    """The part of a step to which a call belongs, and the function of evollm that made it."""
    codes = []
    while frame is not None:
        codes.append(frame.f_code)
        frame = frame.f_back
    paths = [_path(code) for code in codes]
    own = (f"{path}, {code.co_name}" for path, code in zip(paths, codes, strict=True) if path.startswith("evollm/"))
    where = next(own, "")
    for name, part in _ANYWHERE.items():
        if any(path.startswith(name) for path in paths):
            return part, where
    found = (_INNERMOST.get(path, "update") for path in paths if path in _INNERMOST or path.startswith(_UPDATES))
    return next(found, "other"), where


@cache
def _path(code: CodeType) -> str:
    """The path of a function's file, from the package evollm or torch on."""
    parts = Path(code.co_filename).parts
    packages = [number for number, part in enumerate(parts[:-1]) if part in ("evollm", "torch")]
    return "/".join(parts[packages[-1] :]) if packages else parts[-1]


@contextmanager
def a_card() -> Iterator[Counts]:
    """A pretended card on which evollm's trials have passed."""
    with ExitStack() as stack:
        passed = {
            "evollm.models.engine.probe": lambda base, config, longest: FastPaths(longest=longest),
            "evollm.models.attention.why_not_flash": lambda *args: "",
            "evollm.models.head.takes_kernel": lambda logits: True,
            # Torch does not see what Triton launches: one operator of torch stands for it.
            "evollm.models.head.log_softmax_rows": lambda logits, targets, logprobs, *, overwrite: logprobs.zero_(),
            "torch.cuda.get_device_properties": lambda device: SimpleNamespace(total_memory=CARD_BYTES),
            # A digest of values that are not there would bring all weights to the host.
            "evollm.models.fingerprints._flat_bytes": lambda tensor: np.zeros(0, np.uint8),
        }
        for name, value in passed.items():
            stack.enter_context(patch(name, value))
        yield stack.enter_context(pretended_card(place))


@contextmanager
def _switches() -> Iterator[list[object]]:
    """The adapters that PEFT's layers are told to use inside the block, each layer by itself."""
    told: list[object] = []

    def noticed(layer: BaseTunerLayer, name: str, value: object) -> None:
        if name == "_active_adapter":
            told.append(value)
        object.__setattr__(layer, name, value)

    # nn.Module's own __setattr__ calls this one, next in the order of a layer's classes.
    with patch.object(BaseTunerLayer, "__setattr__", noticed):
        yield told


_COLUMNS = ("passes", *PARTS, "kernels", "blocking", "queued", "switched", "references", "scoring", "compiled")
HEADER = f"{'shape':>6}" + "".join(f"{name:>11}" for name in _COLUMNS)


def line(row: Row) -> str:
    """A row of the table on the console."""
    return f"{row['shape']:>6}" + "".join(f"{'-' if row[name] is None else row[name]:>11}" for name in _COLUMNS)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=("135M", *PUBLISHED))
    parser.add_argument("--compiled", action="store_true", help="count a step of compiled layers too")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
