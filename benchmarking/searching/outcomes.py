"""What was measured on a data set, and what each contestant reached there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evollm.hpo import PREFERENCE_FITNESSES, Evaluation
from searching.contestants import STRATEGIES, Strategy, final_terms, of_kind
from searching.records import Array, Record, Searched

# Orders of the random founders for each seed: which of them are the first eight is luck.
ORDERS = 32
# What the others are compared with: the best of eight runs, chosen as evollm did before it kept log-losses.
REFERENCE = "random, 8"


@dataclass(frozen=True)
class Data:
    """What was measured on one data set.

    Attributes:
        records: The recorded sweeps by seed.
        runs: Runs of strategies through the library's loop by label and seed, of seeds that were recorded.
    """

    records: Mapping[int, Record]
    runs: Mapping[str, Mapping[int, Searched]]

    @property
    def name(self) -> str:
        """Of the data set."""
        return str(next(iter(self.records.values())).about["data"])

    @property
    def title(self) -> str:
        """A heading."""
        about, seeds = next(iter(self.records.values())).about, list(self.records)
        parts = (self.name, about["model"], f"{len(seeds)} seeds {seeds}", about["machine"], about["date"])
        return f"### {', '.join(filter(None, parts))}"


def measured_in(folder: Path) -> list[Data]:
    """The records and runs of a folder, each data set by itself."""
    records: dict[str, dict[int, Record]] = {}
    for record in map(Record.load, sorted(folder.glob("record-*.npz"))):
        records.setdefault(record.about["data"], {})[record.about["seed"]] = record
    if not records:
        raise SystemExit(f"{folder} holds no record-*.npz: search.py record makes them")
    runs: dict[str, dict[str, dict[int, Searched]]] = {name: {} for name in records}
    for run in map(Searched.load, sorted(folder.glob("run-*.npz"))):
        about = run.about
        if about["seed"] in records.get(about["data"], {}):
            runs[about["data"]].setdefault(about["label"], {})[about["seed"]] = run
    return [Data(dict(sorted(by_seed.items())), runs[name]) for name, by_seed in sorted(records.items())]


@dataclass(frozen=True)
class Outcome:
    """What a contestant reached on the final pairs of one seed, for each order of the founders.

    Attributes:
        runs: (orders,) what it cost.
        right: (orders, pairs) 1 where the chosen completion is preferred, 0.5 for a tie.
        losses: (orders, pairs) the scale-free log-loss, in nats.
        chosen: (orders,) mean chosen log-ratio, in nats.
        kl: (orders,) mean KL(pi || ref) of a completion, in nats.
    """

    runs: Array
    right: Array
    losses: Array
    chosen: Array
    kl: Array


def replayed(strategy: Strategy, record: Record, orders: int = ORDERS) -> Outcome:
    """Replay a strategy on a seed."""
    founders = of_kind(record, "random")
    rng = np.random.default_rng([int(record.about["seed"]), 4])
    choices = [strategy(record, rng.permutation(founders).tolist()) for _ in range(orders)]
    picked = [choice.founder for choice in choices]
    return Outcome(
        runs=np.array([choice.runs for choice in choices]),
        right=np.stack([final_terms(record, founder, "accuracy") for founder in picked]),
        losses=-np.stack([final_terms(record, founder, "log_loss") for founder in picked]),
        chosen=record.final[picked, 0].mean(axis=-1),
        kl=record.kl[picked].mean(axis=-1),
    )


def reached(run: Searched) -> Outcome:
    """What a run of a strategy through the library's loop reached."""
    final = Evaluation(*run.final)
    right, log_loss = (PREFERENCE_FITNESSES[kind].terms(final)[None] for kind in ("accuracy", "log_loss"))
    return Outcome(np.array([run.about["runs"]]), right, -log_loss, run.final[:1].mean(axis=-1), run.kl.mean()[None])


def outcomes(data: Data, strategies: Mapping[str, Strategy] = STRATEGIES) -> dict[str, dict[int, Outcome]]:
    """Outcomes of the replayed strategies and of the runs, by name and seed."""
    records = data.records.items()
    names = [name for name in strategies if "grid" not in name or all(of_kind(record, "grid") for _, record in records)]
    found = {name: {seed: replayed(strategies[name], record) for seed, record in records} for name in names}
    return found | {label: {seed: reached(run) for seed, run in runs.items()} for label, runs in data.runs.items()}


def mean_runs(by_seed: Mapping[int, Outcome]) -> float:
    """The mean price over seeds."""
    return float(np.mean([one.runs.mean() for one in by_seed.values()]))
