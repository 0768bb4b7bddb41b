"""Tables of what strategies chose and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evollm.hpo import PREFERENCE_FITNESSES, Evaluation
from searching.contestants import STRATEGIES, Strategy, final_terms, of_kind, ranked, selection_fitness
from searching.records import Array, Record, Searched
from searching.statistics import hierarchical, rank_correlation

# Orders of the random founders for each seed: which of them are the first eight is luck.
ORDERS = 32
REFERENCE = "random, 8"
# The final scores.
BOTH = ("accuracy", "log_loss")


@dataclass(frozen=True)
class MeasuredData:
    """What was measured on one data set.

    Attributes:
        records: The recorded sweeps by seed.
        runs: Runs of strategies through the library's loop by label and seed, of seeds that were recorded.
    """

    records: Mapping[int, Record]
    runs: Mapping[str, Mapping[int, Searched]]

    @property
    def title(self) -> str:
        """A heading."""
        about = next(iter(self.records.values())).about
        seeds = list(self.records)
        return f"### {about['data']}, {about['model']}, {len(seeds)} seeds {seeds}, {about['machine']}, {about['date']}"


def measured_in(folder: Path) -> list[MeasuredData]:
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
    return [MeasuredData(dict(sorted(by_seed.items())), runs[name]) for name, by_seed in sorted(records.items())]


@dataclass(frozen=True)
class Outcome:
    """What a strategy reached on the final pairs of one seed, for each order of the founders.

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


def outcome(strategy: Strategy, record: Record, orders: int = ORDERS) -> Outcome:
    """Replay a strategy on a seed."""
    founders = of_kind(record, "random")
    rng = np.random.default_rng([int(record.about["seed"]), 4])
    choices = [strategy(record, rng.permutation(founders).tolist()) for _ in range(orders)]
    return _outcome(record, [choice.founder for choice in choices], [choice.runs for choice in choices])


def run_outcome(run: Searched) -> Outcome:
    """What a run of a strategy reached."""
    final = Evaluation(*run.final)
    right, log_loss = (PREFERENCE_FITNESSES[kind].terms(final)[None] for kind in BOTH)
    return Outcome(np.array([run.about["runs"]]), right, -log_loss, run.final[:1].mean(axis=-1), run.kl.mean()[None])


def _outcome(record: Record, picked: Sequence[int], runs: Sequence[float]) -> Outcome:
    return Outcome(
        runs=np.array(runs),
        right=np.stack([final_terms(record, founder, "accuracy") for founder in picked]),
        losses=-np.stack([final_terms(record, founder, "log_loss") for founder in picked]),
        chosen=record.final[picked, 0].mean(axis=-1),
        kl=record.kl[picked].mean(axis=-1),
    )


def outcomes_of(measured: MeasuredData) -> dict[str, dict[int, Outcome]]:
    """Outcomes of all strategies, by name and seed."""
    records = measured.records.items()
    names = [name for name in STRATEGIES if "grid" not in name or all(of_kind(record, "grid") for _, record in records)]
    replayed = {name: {seed: outcome(STRATEGIES[name], record) for seed, record in records} for name in names}
    return replayed | {
        label: {seed: run_outcome(run) for seed, run in runs.items()} for label, runs in measured.runs.items()
    }


def strategies_table(found: Mapping[str, Mapping[int, Outcome]]) -> str:
    """One line for each strategy: what it costs, what it reaches, and how it compares with the best of eight runs."""
    lines = [
        "| strategy | runs | final accuracy | minus best of 8 | log-loss | minus best of 8 | chosen | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, by_seed in found.items():
        outcomes = list(by_seed.values())
        both = [(one, found[REFERENCE][seed]) for seed, one in by_seed.items()]
        cells = [
            f"{np.mean([one.runs.mean() for one in outcomes]):.2f}",
            _interval([one.right for one in outcomes], ".3f"),
            _interval([one.right - other.right for one, other in both], "+.3f"),
            _interval([one.losses for one in outcomes], ".4f"),
            _interval([one.losses - other.losses for one, other in both], "+.4f"),
            f"{np.mean([one.chosen.mean() for one in outcomes]):+.2f}",
            f"{np.mean([one.kl.mean() for one in outcomes]):.2f}",
        ]
        short = f", {len(outcomes)} seeds" if len(outcomes) < len(found[REFERENCE]) else ""
        lines.append(f"| {name}{short} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scores_table(records: Sequence[Record]) -> str:
    """Rank correlation of each score on the selection pairs, at each rung, with the final accuracy and log-loss."""
    rungs = records[0].about["sizes"]["rungs"]
    lines = [
        f"| score | {' | '.join(f'{rung:.3g}' for rung in rungs)} | its pick, accuracy | its pick, log-loss |",
        "|---" * (len(rungs) + 3) + "|",
    ]
    reached = [[final_terms(record, f, "log_loss").mean() for f in of_kind(record, "random")] for record in records]
    for name in PREFERENCE_FITNESSES:
        cells, picks = [], []
        for record, final in zip(records, reached, strict=True):
            founders = of_kind(record, "random")
            scores = [[selection_fitness(record, f, rung, name) for f in founders] for rung in range(len(rungs))]
            cells.append([rank_correlation(_places(fitnesses), final) for fitnesses in scores])
            picks.append(ranked(record, founders, -1, name)[0])
        means = [f"{value:.2f}" for value in np.mean(cells, axis=0)]
        both = [
            np.mean([final_terms(*pick, kind).mean() for pick in zip(records, picks, strict=True)]) for kind in BOTH
        ]
        lines.append(f"| {name} | {' | '.join(means)} | {both[0]:.3f} | {-both[1]:.4f} |")
    best = [max(final_terms(record, f, "accuracy").mean() for f in of_kind(record, "random")) for record in records]
    lines.append(f"| the best there is |{' |' * len(rungs)} {np.mean(best):.3f} | |")
    return "\n".join(lines)


def finalists_table(records: Sequence[Record]) -> str:
    """What candidates made without training score, against the best configuration by the log-loss of the selection."""
    lines = [
        "| candidate | selection accuracy | final accuracy | minus best single | log-loss minus best single | KL |"
    ]
    lines.append("|---|---|---|---|---|---|")
    kinds = [_kind(candidate) for candidate in records[0].about["candidates"]]
    for number, kind in enumerate(kinds):
        right, losses, selected, kl = [], [], [], []
        for record in records:
            single = record.about["candidates"][0]["members"][0]
            ours = Evaluation(*record.candidates_final[number])
            accuracy, log_loss = (PREFERENCE_FITNESSES[kind].terms(ours) for kind in BOTH)
            right.append(np.stack([accuracy, final_terms(record, single, "accuracy")]))
            losses.append((final_terms(record, single, "log_loss") - log_loss)[None])
            selected.append(Evaluation(*record.candidates_selection[number]).accuracy)
            kl.append(record.candidates_kl[number].mean())
        cells = [
            f"{np.mean(selected):.3f}",
            _interval([both[:1] for both in right], ".3f"),
            _interval([both[:1] - both[1:] for both in right], "+.3f"),
            _interval(losses, "+.4f"),
            f"{np.mean(kl):.2f}",
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kind(candidate: Mapping[str, object]) -> str:
    factor = f" x {candidate['factor']:g}" if "factor" in candidate else ""
    return f"{candidate['kind']} of {len(candidate['members'])}{factor}"  # type: ignore[arg-type]


def _places(fitnesses: Sequence[tuple[float, ...]]) -> list[int]:
    """The place of each from the worst up; equal ones share it."""
    known = sorted(set(fitnesses))
    return [known.index(fitness) for fitness in fitnesses]


def _interval(per_seed: Sequence[Array], form: str) -> str:
    mean, low, high = hierarchical([values.mean(axis=0) for values in per_seed])
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def replay(folder: Path) -> str:
    """The table of strategies without inheritance."""
    return "\n\n".join(
        f"{one.title}\n\n{strategies_table(outcomes_of(replace(one, runs={})))}" for one in measured_in(folder)
    )


def report(folder: Path) -> str:
    """All tables of a folder's records and runs, each data set by itself."""
    parts = []
    for one in measured_in(folder):
        records = list(one.records.values())
        parts += [one.title, strategies_table(outcomes_of(one)), scores_table(records)]
        with_candidates = [record for record in records if record.about["candidates"]]
        parts += [finalists_table(with_candidates)] if with_candidates else []
    return "\n\n".join(parts)
