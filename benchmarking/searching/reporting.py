"""Tables of what strategies chose and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evollm.hpo import PREFERENCE_FITNESSES, Evaluation
from searching.contestants import STRATEGIES, Prices, Strategy, final_terms, of_kind, ranked, selection_fitness
from searching.records import Array, Record
from searching.statistics import hierarchical, rank_correlation

# Orders of the random founders for each seed: which of them are the first eight is luck.
ORDERS = 32
REFERENCE = "random, 8"
INHERITING = ("tournament",)
# The final scores.
BOTH = ("accuracy", "log_loss")


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


def inherited_outcome(run: Record, sweep: Record, score: str) -> Outcome:
    """What a run of a strategy with inheritance reached: the best of its last population.

    Args:
        run: The run.
        sweep: The recorded sweep of the same seed, for what its steps cost.
        score: By which the best is chosen.
    """
    members, evaluations = run.selection.shape[:2]
    prices, pairs = Prices.of(sweep), run.selection.shape[-1]
    spent = prices.runs([len(prices.steps)] * members, [pairs] * members * evaluations)
    return _outcome(run, [ranked(run, range(members), -1, score)[0]], [spent])


def _outcome(record: Record, picked: Sequence[int], runs: Sequence[float]) -> Outcome:
    return Outcome(
        runs=np.array(runs),
        right=np.stack([final_terms(record, founder, "accuracy") for founder in picked]),
        losses=-np.stack([final_terms(record, founder, "log_loss") for founder in picked]),
        chosen=record.final[picked, 0].mean(axis=-1),
        kl=record.kl[picked].mean(axis=-1),
    )


def strategies_table(records: Sequence[Record], runs: Mapping[str, Sequence[Record]]) -> str:
    """One line for each strategy: what it costs, what it reaches, and how it compares with the best of eight runs.

    Args:
        records: The recorded sweeps.
        runs: For each strategy with inheritance its runs, of the same seeds in the same order.
    """
    names = [name for name in STRATEGIES if "grid" not in name or all(of_kind(record, "grid") for record in records)]
    found = {name: [outcome(STRATEGIES[name], record) for record in records] for name in names}
    for name, own in runs.items():
        for score in ("accuracy_mean_margin", "margin_over_std"):
            pairs = zip(own, records, strict=True)
            found[f"{name}, {score}"] = [inherited_outcome(run, record, score) for run, record in pairs]
    lines = [
        "| strategy | runs | final accuracy | minus best of 8 | log-loss | minus best of 8 | chosen | KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, outcomes in found.items():
        both = list(zip(outcomes, found[REFERENCE], strict=True))
        cells = [
            f"{np.mean([one.runs.mean() for one in outcomes]):.2f}",
            _interval([one.right for one in outcomes], ".3f"),
            _interval([one.right - other.right for one, other in both], "+.3f"),
            _interval([one.losses for one in outcomes], ".4f"),
            _interval([one.losses - other.losses for one, other in both], "+.4f"),
            f"{np.mean([one.chosen.mean() for one in outcomes]):+.2f}",
            f"{np.mean([one.kl.mean() for one in outcomes]):.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
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


def report(folder: Path) -> str:
    """All tables of a folder's records, each data set by itself."""
    records = [Record.load(path) for path in sorted(folder.glob("record-*.npz"))]
    if not records:
        raise SystemExit(f"{folder} holds no record-*.npz: search.py record makes them")
    parts = []
    for name in sorted({str(record.about["data"]) for record in records}):
        own = [record for record in records if record.about["data"] == name]
        seeds = [record.about["seed"] for record in own]
        about = own[0].about
        paths = {strategy: [folder / f"{strategy}-{name}-{seed}.npz" for seed in seeds] for strategy in INHERITING}
        runs = {
            strategy: [Record.load(path) for path in found]
            for strategy, found in paths.items()
            if all(path.exists() for path in found)
        }
        parts.append(f"### {name}, {about['model']}, {len(own)} seeds {seeds}, {about['machine']}, {about['date']}")
        parts += [strategies_table(own, runs), scores_table(own)]
        with_candidates = [record for record in own if record.about["candidates"]]
        parts += [finalists_table(with_candidates)] if with_candidates else []
    return "\n\n".join(parts)
