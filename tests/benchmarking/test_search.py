"""Recorded searches at a toy size: a seed gives one record, a damaged file is refused, splits share no dialogue."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import search
from searching import tiny
from searching.contestants import HALVINGS, Prices, Rung, halving, ranked
from searching.problem import read_dialogues, split_by_dialogue
from searching.records import Record, Searched
from searching.statistics import reaching

from evollm.hpo import PREFERENCE_FITNESSES, Evaluation

PAIRS = {"train": 64, "selection": 6, "final": 10}
# Eight steps, so that the rungs are different steps.
BATCH_SIZE = 4
SMALL = [part for name, count in PAIRS.items() for part in (f"--{name}", str(count))]
SMALL += ["--batch-size", str(BATCH_SIZE)]


@pytest.fixture(autouse=True, scope="module")
def untrained() -> Iterator[None]:
    """Few steps of pretraining."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "PRETRAINING_STEPS", 2)
        tiny.network.cache_clear()
        yield
    tiny.network.cache_clear()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, untrained: None) -> Path:
    """A sweep of three random configurations, and random search through the loop from the same."""
    folder = tmp_path_factory.mktemp("measured")
    recorded(folder, "--founders", "3")
    ran(folder, "random-members=3", "--members", "3")
    return folder


def searched(what: str, out: Path, *more: str) -> None:
    search.main([what, "--data", "tiny", "--dtype", "float32", "--seeds", "3", "--out", str(out), *SMALL, *more])


def recorded(out: Path, *more: str) -> Record:
    searched("record", out, *more)
    return Record.load(out / "record-tiny-3.npz")


def ran(out: Path, label: str, *more: str) -> Searched:
    searched("run", out, "--strategies", label.split("-", maxsplit=1)[0], *more)
    return Searched.load(out / f"run-{label}-tiny-3.npz")


def bits(record: Record) -> dict[str, bytes]:
    """All but when and how fast."""
    arrays = {name: value.tobytes() for name, value in vars(record).items() if name != "about"}
    about = {name: value for name, value in record.about.items() if name not in {"seconds", "date"}}
    return {**arrays, "about": json.dumps(about).encode()}


def test_a_record_holds_every_configuration_at_every_rung_and_the_same_seed_gives_it_again(tmp_path: Path) -> None:
    first = recorded(tmp_path / "first", "--founders", "2")
    kinds = [founder["kind"] for founder in first.about["founders"]]
    assert kinds == ["default", "random", "random", *["grid"] * 8]
    founders, rungs, candidates = len(kinds), 5, len(first.about["candidates"])
    assert first.selection.shape == (founders, rungs, 2, PAIRS["selection"])
    assert first.final.shape == (founders, 2, PAIRS["final"])
    assert first.candidates_final.shape == (candidates, 2, PAIRS["final"])
    assert candidates > 0
    assert first.losses.shape == (founders, PAIRS["train"] // BATCH_SIZE)
    assert first.about["sizes"]["rung_steps"] == [1, 2, 4, 8, 16]
    assert not np.array_equal(first.final[1], first.final[2]), "configurations differ"
    assert bits(first) == bits(recorded(tmp_path / "second", "--founders", "2"))
    other = tmp_path / "first" / "record-tiny-3.npz"
    before = other.stat().st_mtime_ns
    searched("record", tmp_path / "first")
    assert other.stat().st_mtime_ns == before, "a record that is there is not made again"


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    none = np.zeros(0)
    path = tmp_path / "record.npz"
    Record({"seed": 1}, *[none] * 9).save(path)
    assert Record.load(path).about == {"seed": 1}
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(SystemExit, match="damaged"):
        Record.load(path)


def test_records_of_a_bfloat16_base_are_kept_in_half_precision(tmp_path: Path) -> None:
    values = np.array([0.1, -51.3], np.float32)
    for dtype, error in (("float32", 0.0), ("bfloat16", 0.02)):
        path = tmp_path / f"{dtype}.npz"
        Searched({"dtype": dtype}, *[values] * 3).save(path)
        loaded = Searched.load(path).final
        assert loaded.dtype == np.float32
        assert np.array_equal(loaded, values) == (error == 0)
        assert np.abs(loaded - values).max() <= error


def test_random_search_through_the_loop_is_what_is_replayed_from_the_record_at_the_same_price(measured: Path) -> None:
    record = Record.load(measured / "record-tiny-3.npz")
    run = Searched.load(measured / "run-random-members=3-tiny-3.npz")
    best = ranked(record, [1, 2, 3], -1, "accuracy_mean_margin")[0]
    assert run.about["best"] == {"agent": best - 1, "step": 16}
    assert np.array_equal(run.final, record.final[best])
    assert np.array_equal(run.selection, record.selection[best, -1])
    assert np.array_equal(run.kl, record.kl[best])
    replayed = Prices.of(record).runs([16] * 3, [PAIRS["selection"]] * 3)
    assert run.about["runs"] == pytest.approx(replayed, rel=1e-3)


def test_a_report_tells_and_draws_all_that_was_measured(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search.main(["report", "--out", str(measured), "--figure", str(measured / "scores.svg")])
    told = capsys.readouterr().out
    for name in ("random, 8", HALVINGS[0].name, "random-members=3", "ensemble of 2", "scaled of 1 x 0.5", "tested"):
        assert f" {name}" in told
    assert "The best contestants reach the accuracy of 'random, 8' at" in told
    assert "nan" not in told
    picture = (measured / "scores-tiny.svg").read_text(encoding="utf-8")
    assert all(text in picture for text in ("compute, in runs of one agent", HALVINGS[0].name, "random-members=3"))
    search.main(["replay", "--out", str(measured)])
    replayed = capsys.readouterr().out
    assert HALVINGS[0].name in replayed
    assert "random-members=3" not in replayed
    for text in (told, replayed):
        assert "Only 3 random configurations were recorded: contestants of more begin with 3." in text
        assert "| random, 8 | 3.00 |" in text


STEPS, SELECTION = 16, 64


def made_up(*members: tuple[float, float]) -> Record:
    """A record of random configurations with the mean margin and chosen log-ratio of each, the same at every rung."""
    noise = np.random.default_rng(0).normal(size=SELECTION)
    ratios = [[np.full(SELECTION, chosen), chosen - (margin + noise)] for margin, chosen in members]
    selection = np.repeat(np.array(ratios)[:, None], 3, axis=1)
    about = {"founders": [{"kind": "random"}] * len(members), "sizes": {"rungs": [0.25, 0.5, 1.0]}}
    none = np.zeros(0)
    steps = np.array([[4.0, 2.0]] * STEPS)
    return Record(about, selection, selection[:, -1], none, none, none, none, none, steps, np.ones(SELECTION))


def test_halving_keeps_the_best_and_is_charged_for_steps_pairs_and_references() -> None:
    """A run: 16 x 4 of training, 16 x 2 of references, 2 x 64 of the selection pairs, 224 in all.

    Of four members three end at a quarter: (3 x 4 + 16) x 4 = 112 of training, 4 x 16 + 64 = 128 of evaluations, 96 of
    references.
    """
    record = made_up((0.1, 0.0), (0.2, 0.0), (2.0, -5.0), (1.0, -1.0))
    rungs = [Rung(0.25, 1, 16)]
    found = halving(record, [0, 1, 2, 3], 4, rungs)
    assert found.founder == 2
    assert found.runs == pytest.approx((112 + 128 + 96) / 224)
    assert halving(record, [0, 1, 3, 2], 3, rungs).founder == 3, "only the first ones begin"
    assert halving(record, [0, 1, 2, 3], 4, rungs, least=-3.0).founder == 3


def test_a_race_finds_the_same_winner_on_fewer_pairs() -> None:
    record = made_up((-2.0, 0.0), (-2.1, 0.0), (2.0, 0.0), (1.9, 0.0))
    everybody = [Rung(part, 4) for part in (0.25, 0.5)]
    whole, raced = (halving(record, [0, 1, 2, 3], 4, everybody, error_rate=rate) for rate in (0.0, 0.2))
    assert whole.founder == raced.founder == 2
    assert raced.runs < 0.8 * whole.runs


def test_the_price_at_which_a_score_is_reached_lies_between_the_contestants_around_it() -> None:
    scores = np.tile([0.5, 0.4, 0.6, 0.55], (30, 1))
    assert reaching(np.array([1.0, 1.5, 2.0, 8.0]), [scores], 3) == pytest.approx((1.5, 1.5, 1.5))
    assert reaching(np.array([1.0, 1.5, 2.0, 8.0]), [scores], 0) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("strategy", ["tournament", "pbt", "pb2", "mf_pbt"])
def test_a_strategy_is_run_by_its_name(tmp_path: Path, strategy: str) -> None:
    run = ran(tmp_path, f"{strategy}-members=4", "--members", "4")
    assert run.about["births"]
    assert np.isfinite(run.final).all()
    assert run.about["evaluated"][-1]["runs"] == run.about["runs"], "final scores are not counted"
    best = max(fitness for one in run.about["evaluated"] for fitness in one["fitnesses"].values())
    found = PREFERENCE_FITNESSES["accuracy_mean_margin"](Evaluation(*run.selection))
    assert found == pytest.approx(best, rel=1e-5), "the agent of the best evaluation"


def test_members_that_left_cost_nothing_and_a_budget_is_kept(tmp_path: Path) -> None:
    halving = ran(tmp_path, "successive_halving-members=4", "--members", "4")
    everybody = ran(tmp_path, "tournament-members=4", "--members", "4")
    assert halving.about["runs"] < 0.6 * everybody.about["runs"]
    settings = ["--members", "4", "--settings", '{"reduction_factor": 4}']
    quarters = ran(tmp_path, "successive_halving-members=4-reduction_factor=4", *settings)
    assert quarters.about["runs"] < halving.about["runs"]
    cut = ran(tmp_path, "random-members=2-budget=1.0", "--members", "2", "--budget", "1", "--selection", "48")
    # Half a step may be too much; what the references of the selection pairs cost is set aside, a sixth of this run.
    assert 0.8 < cut.about["runs"] < 1.05, "although the library's runs hold final scores"


def dialogue(question: str, *turns: str) -> str:
    speakers = ["Human", "Assistant"] * len(turns)
    return "".join(f"\n\n{who}: {text}" for who, text in zip(speakers, [question, *turns], strict=False))


def test_splits_share_no_dialogue_and_pairs_that_differ_earlier_are_left_out(tmp_path: Path) -> None:
    rows = []
    for number in range(30):
        question = f"question {number}?"
        # Two pairs of one dialogue, the second a turn further on.
        rows.append((dialogue(question, "good"), dialogue(question, "bad")))
        rows.append((dialogue(question, "good", "and?", "fine"), dialogue(question, "good", "and?", "no")))
    kept = len(rows)
    rows.append((dialogue("where?", "here", "sure?", "yes"), dialogue("where?", "there", "sure?", "no")))
    rows.append((dialogue("same?", "yes"), dialogue("same?", "yes")))
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"chosen": good, "rejected": bad}) + "\n" for good, bad in rows)

    found = read_dialogues(path)
    assert len(found) == kept
    assert found[1]["rejected"] == [
        {"role": "user", "content": "question 0?"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "no"},
    ]
    sizes = (20, 11, 9)
    parts = split_by_dialogue(found, sizes, seed=1)
    assert tuple(map(len, parts)) == sizes
    questions = [{row["chosen"][0]["content"] for row in part} for part in parts]
    assert all(not first & second for first, second in combinations(questions, 2))
    assert parts == split_by_dialogue(found, sizes, seed=1)
    assert parts != split_by_dialogue(found, sizes, seed=2)
    with pytest.raises(SystemExit, match="do not suffice"):
        split_by_dialogue(found, (50, 20), seed=1)


def agreement(rows: Sequence[dict[str, str]]) -> float:
    """The share of pairs whose label agrees with the sum of the words' values, without the bonus for the prompt."""
    words = [[[int(word[1:]) for word in row[side].split()] for side in ("chosen", "rejected")] for row in rows]
    width = tiny.COMPLETION[1]
    sides = [np.array([[*pair[side], *[tiny.WORDS] * (width - len(pair[side]))] for pair in words]) for side in (0, 1)]
    nowhere = np.full(len(rows), -1)
    good, bad = (tiny._worth(side, nowhere) for side in sides)
    return float((good > bad).mean())


def test_rule_made_pairs_depend_on_the_seed_alone_and_their_labels_are_noisy() -> None:
    rows = tiny.rows(2000, 0)
    assert rows == tiny.rows(2000, 0)
    assert rows[:50] != tiny.rows(50, 1)
    assert 0.65 < agreement(rows) < 0.85
