"""The data, the model and the founders of a search, each drawn from the search's seed."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from evollm import HyperparameterConfig, RLParameter

Message = dict[str, str]
Row = dict[str, list[Message]]

# Where founders are drawn; log-uniformly.
BOUNDS = HyperparameterConfig(lr=RLParameter(1e-5, 2e-3), beta=RLParameter(0.03, 0.5), nll_alpha=RLParameter(0.01, 1.0))


@dataclass(frozen=True)
class Sizes:
    """How large a search is.

    Attributes:
        train: Pairs that a run learns from, each once.
        selection: Pairs that members are compared on.
        final: Pairs that score what a search has chosen; they select nothing.
        batch_size: Pairs in a step.
        rungs: Parts of a run after which members are evaluated; the last is the whole run.
        longest: Most tokens of a pair's prompt and longer completion.
        measured_kl: Pairs of `final` on which the KL to the reference is measured.
    """

    train: int = 512
    selection: int = 256
    final: int = 800
    batch_size: int = 8
    rungs: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    longest: int = 320
    measured_kl: int = 64

    @property
    def splits(self) -> tuple[int, int, int]:
        """Pairs of training, selection and final score."""
        return self.train, self.selection, self.final

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return self.train // self.batch_size

    @property
    def rung_steps(self) -> list[int]:
        """Steps after which members are evaluated."""
        return [max(1, round(part * self.steps)) for part in self.rungs]


@dataclass(frozen=True)
class Founder:
    """A configuration that is trained to the end.

    Attributes:
        kind: `default`, `random`, `grid`, ...: the contestants that it belongs to.
        hyperparameters: Its values.
    """

    kind: str
    hyperparameters: Mapping[str, Any]


def founders(seed: int, bounds: HyperparameterConfig, count: int, *, grid: bool = False) -> list[Founder]:
    """The default settings, then `count` random ones, the same for all contestants of a seed, then those of a grid."""
    rng = np.random.default_rng([seed, 1])
    drawn = [Founder("random", bounds.sample(rng)) for _ in range(count)]
    found = [Founder("default", {"lr": 5e-6, "beta": 0.1, "nll_alpha": 1.0}), *drawn]
    return [*found, *(_grid(bounds) if grid else [])]


def _grid(bounds: HyperparameterConfig) -> list[Founder]:
    """Four learning rates and two betas, evenly spaced inside the bounds on a logarithmic scale."""

    def between(name: str, count: int) -> list[float]:
        return [float(bounds[name].at((number + 0.5) / count)) for number in range(count)]

    (nll_alpha,) = between("nll_alpha", 1)
    pairs = product(between("lr", 4), between("beta", 2))
    return [Founder("grid", {"lr": lr, "beta": beta, "nll_alpha": nll_alpha}) for lr, beta in pairs]


def read_dialogues(path: Path) -> list[Row]:
    """The pairs of a file in the form of hh-rlhf, as messages; only those that differ in the last answer alone."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        rows = [{side: _messages(text) for side, text in json.loads(line).items()} for line in file]
    return [row for row in rows if _is_pair(row["chosen"], row["rejected"])]


def split_by_dialogue(rows: Sequence[Row], sizes: Sequence[int], seed: int) -> list[list[Row]]:
    """Disjoint parts of these sizes in random order; dialogues that begin alike are in one part."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["chosen"][0]["content"], []).append(row)
    shuffled = list(groups.values())
    order = np.random.default_rng([seed, 2]).permutation(len(shuffled))
    waiting = [shuffled[number] for number in order]
    parts: list[list[Row]] = []
    for size in sizes:
        part: list[Row] = []
        while len(part) < size:
            if not waiting:
                raise SystemExit(f"{len(rows)} pairs do not suffice for {list(sizes)}")
            part += waiting.pop()
        parts.append(part[:size])
    return parts


def short_enough(rows: Sequence[Row], tokenizer: Any, longest: int) -> list[Row]:
    """The pairs whose sides have at most `longest` tokens each in the tokenizer's chat template."""
    texts = [
        tokenizer.apply_chat_template(row[side], tokenize=False) for row in rows for side in ("chosen", "rejected")
    ]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    pairs = zip(lengths[::2], lengths[1::2], strict=True)
    return [row for row, both in zip(rows, pairs, strict=True) if max(both) <= longest]


def _messages(text: str) -> list[Message]:
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[role], "content": content.strip()} for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _is_pair(chosen: Sequence[Message], rejected: Sequence[Message]) -> bool:
    return (
        len(chosen) > 1
        and chosen[:-1] == rejected[:-1]
        and chosen[-1] != rejected[-1]
        and all(side[-1]["role"] == "assistant" and side[-1]["content"] for side in (chosen, rejected))
        and all(one["role"] == ("user", "assistant")[number % 2] for number, one in enumerate(chosen))
    )
