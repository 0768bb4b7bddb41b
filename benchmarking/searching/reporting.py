"""Tables of what strategies chose and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from evollm.hpo import PREFERENCE_FITNESSES, Evaluation
from evollm.hpo.finalists import FinalCandidates, compare_pairwise, winning_candidate
from searching.contestants import HALVINGS, final_terms, of_kind, random_search, ranked, selection_fitness
from searching.figure import draw
from searching.outcomes import REFERENCE, Data, Outcome, mean_runs, measured_in, outcomes
from searching.records import Array, Record
from searching.statistics import hierarchical, rank_correlation, reaching

# The fitness of runs so far, which decides ties by the mean margin.
TODAY = "accuracy_mean_margin"
ENSEMBLES = (2, 3, 4)
Found: TypeAlias = Mapping[str, Mapping[int, Outcome]]


def strategies_table(found: Found) -> str:
    """One line for each contestant: what it costs, what it reaches, and how it compares with the best of eight runs."""
    heads = ("#", "contestant", "runs", *_compared("best of 8"))
    rows = []
    for number, (name, by_seed) in enumerate(found.items(), start=1):
        few = f", {len(by_seed)} seeds" if len(by_seed) < len(found[REFERENCE]) else ""
        rows.append([str(number), name + few, f"{mean_runs(by_seed):.2f}", *_cells(by_seed, found[REFERENCE])])
    return _table(heads, rows)


def founders_text(records: Sequence[Record]) -> str:
    """A remark where fewer configurations were recorded than some contestants begin with."""
    recorded, most = min(len(of_kind(record, "random")) for record in records), max(one.count for one in HALVINGS)
    if recorded >= most:
        return ""
    return f"Only {recorded} random configurations were recorded: contestants of more begin with {recorded}."


def reaching_text(found: Found) -> str:
    """At what price the contestants reach the final scores of the best of eight runs."""
    seeds = list(found[REFERENCE])
    complete = {name: by_seed for name, by_seed in found.items() if len(by_seed) == len(seeds)}
    runs, rival = np.array([mean_runs(by_seed) for by_seed in complete.values()]), list(complete).index(REFERENCE)
    told = []
    for score, sign in (("right", 1), ("losses", -1)):
        scores = [
            np.stack([sign * getattr(by_seed[seed], score).mean(axis=0) for by_seed in complete.values()], axis=1)
            for seed in seeds
        ]
        price, low, high = reaching(runs, scores, rival)
        told.append(f"{price:.2f} runs [{low:.2f}, {high:.2f}]")
    accuracy, log_loss = told
    return f"The best contestants reach the accuracy of {REFERENCE!r} at {accuracy}, its log-loss at {log_loss}."


def scores_table(records: Mapping[int, Record]) -> str:
    """How each score on the selection pairs ranks at each rung, and what it picks of eight runs at the end."""
    rungs = next(iter(records.values())).about["sizes"]["rungs"]
    strategies = {name: partial(random_search, count=8, score=name) for name in PREFERENCE_FITNESSES}
    picks = outcomes(Data(records, {}), strategies)
    rows = []
    for name, picked in picks.items():
        cells = []
        for record in records.values():
            founders = of_kind(record, "random")
            final = [final_terms(record, founder, "log_loss").mean() for founder in founders]
            scores = [[selection_fitness(record, f, rung, name) for f in founders] for rung in range(len(rungs))]
            cells.append([rank_correlation(_places(fitnesses), final) for fitnesses in scores])
        rows.append([name, *(f"{value:.2f}" for value in np.mean(cells, axis=0)), *_cells(picked, picks[TODAY])])
    best = [
        max(final_terms(record, f, "accuracy").mean() for f in of_kind(record, "random")) for record in records.values()
    ]
    rows.append(["the best there is", *[""] * len(rungs), f"{np.mean(best):.3f}", *[""] * 5])
    return _table(("score", *(f"{rung:.3g}" for rung in rungs), *_compared(TODAY)), rows)


def finalists_table(records: Sequence[Record]) -> str:
    """What ensembles, and candidates made without training, score against the best single configuration.

    The best single one is that with the best log-loss on the selection pairs at the end, of all that were trained.
    Ensembles are means of log-ratios, which need a pass of each member. "Tested" is what `evollm.hpo.FinalCandidates`
    decides: the best candidate by the log-loss of the selection pairs that is better by a paired test, else the single.
    """
    rows: dict[str, list[tuple[Evaluation, Evaluation, float]]] = {}
    singles, wins = [], 0
    for record in records:
        order = ranked(record, range(len(record.final)), -1, "log_loss")
        single = _founder(record, order[:1])
        singles.append(single)
        rows.setdefault("best single", []).append(single)
        for count in ENSEMBLES:
            rows.setdefault(f"ensemble of {count}", []).append(_founder(record, order[:count]))
        candidates = {}
        for number, candidate in enumerate(record.about["candidates"]):
            kind = _kind(candidate)
            kind += " again" * sum(known.startswith(kind) for known in candidates)
            candidates[kind] = (
                Evaluation(*record.candidates_selection[number]),
                Evaluation(*record.candidates_final[number]),
                float(record.candidates_kl[number].mean()),
            )
        for kind, one in candidates.items():
            rows.setdefault(kind, []).append(one)
        if candidates:
            terms = PREFERENCE_FITNESSES["log_loss"].terms
            compared = [compare_pairwise(terms(one[0]), terms(single[0])) for one in candidates.values()]
            winner = winning_candidate(compared, FinalCandidates.level)
            wins += winner is not None
            rows.setdefault("tested", []).append(single if winner is None else [*candidates.values()][winner])
            largest = int(np.argmax([one.difference for one in compared]))
            rows.setdefault("the best on the selection pairs", []).append([*candidates.values()][largest])
    cells = []
    for kind, found in rows.items():
        name = f"tested: {wins} of {len(records)} seeds take one" if kind == "tested" else kind
        right, losses = (
            [
                np.stack([PREFERENCE_FITNESSES[score].terms(one[1]) for one in pair])
                for pair in zip(found, singles, strict=True)
            ]
            for score in ("accuracy", "log_loss")
        )
        cells.append(
            [
                name,
                f"{np.mean([one[0].accuracy for one in found]):.3f}",
                _interval([both[:1] for both in right], ".3f"),
                _interval([both[:1] - both[1:] for both in right], "+.3f"),
                _interval([both[1:] - both[:1] for both in losses], "+.4f"),
                f"{np.mean([one[2] for one in found]):.2f}".replace("nan", ""),
            ]
        )
    single = "minus best single"
    heads = ("candidate", "selection accuracy", "final accuracy", single, f"log-loss {single}", "KL")
    return _table(heads, cells)


def lengths_table(records: Sequence[Record]) -> str:
    """Tokens of sampled answers; "" where none were recorded."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, lengths in record.about["answer_lengths"].items():
            kind = "best single" if name.startswith("founder") else name.split(" of ")[0]
            found.setdefault(kind, []).append(float(np.mean(lengths)))
    if not found:
        return ""
    return _table(("answers of", "tokens"), [[kind, f"{np.mean(means):.1f}"] for kind, means in found.items()])


def _founder(record: Record, members: Sequence[int]) -> tuple[Evaluation, Evaluation, float]:
    """Selection, final score and KL of a configuration, or of an ensemble, whose KL is not known."""
    kl = float(record.kl[members[0]].mean()) if len(members) == 1 else float("nan")
    both = record.selection[list(members), -1], record.final[list(members)]
    selection, final = (Evaluation(*ratios.mean(axis=0)) for ratios in both)
    return selection, final, kl


def _kind(candidate: Mapping[str, object]) -> str:
    factor = f" x {candidate['factor']:g}" if "factor" in candidate else ""
    return f"{candidate['kind']} of {len(candidate['members'])}{factor}"  # type: ignore[arg-type]


def _places(fitnesses: Sequence[tuple[float, ...]]) -> list[int]:
    """The place of each from the worst up; equal ones share it."""
    known = sorted(set(fitnesses))
    return [known.index(fitness) for fitness in fitnesses]


def _compared(rival: str) -> tuple[str, ...]:
    return "final accuracy", f"minus {rival}", "log-loss", f"minus {rival}", "chosen", "KL"


def _cells(by_seed: Mapping[int, Outcome], rivals: Mapping[int, Outcome]) -> list[str]:
    """Final scores, compared with a rival's on the same pairs."""
    both = [(one, rivals[seed]) for seed, one in by_seed.items()]
    return [
        _interval([one.right for one, _ in both], ".3f"),
        _interval([one.right - other.right for one, other in both], "+.3f"),
        _interval([one.losses for one, _ in both], ".4f"),
        _interval([one.losses - other.losses for one, other in both], "+.4f"),
        f"{np.mean([one.chosen.mean() for one, _ in both]):+.2f}",
        f"{np.mean([one.kl.mean() for one, _ in both]):.2f}",
    ]


def _interval(per_seed: Sequence[Array], form: str) -> str:
    mean, low, high = hierarchical([values.mean(axis=0) for values in per_seed])
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in (heads, *rows))
    return "\n".join([head, "|---" * len(heads) + "|", *body])


def replay(folder: Path) -> str:
    """The table of strategies without inheritance."""
    found = (replace(data, runs={}) for data in measured_in(folder))
    parts = [
        [data.title, founders_text(list(data.records.values())), strategies_table(outcomes(data))] for data in found
    ]
    return "\n\n".join(part for few in parts for part in few if part)


def report(folder: Path, figure: Path | None = None) -> str:
    """All tables of a folder's records and runs, each data set by itself.

    Args:
        folder: Of the records and runs.
        figure: Of the pictures of final scores against compute, to whose name that of the data set is added.
    """
    parts = []
    for data in measured_in(folder):
        found, records = outcomes(data), list(data.records.values())
        with_candidates = [record for record in records if record.about["candidates"]]
        parts += [data.title, founders_text(records), strategies_table(found), reaching_text(found)]
        parts += [scores_table(data.records)]
        parts += [finalists_table(with_candidates or records), lengths_table(records)]
        if figure is not None:
            path = figure.with_stem(f"{figure.stem}-{data.name}")
            draw(found, data.title.removeprefix("### "), path)
    return "\n\n".join(filter(None, parts))
