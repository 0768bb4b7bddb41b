from __future__ import annotations

import json
import re

import pytest
from conftest import make_rows
from snapshots import actor_bits

from evollm import (
    Callback,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.report.findings import headline
from evollm.runs import read_run
from evollm.tuning import validate

# The first component of the best fitness at the evaluations after steps 1 to 8.
SCORES = [1.0, 3.0, 3.0, 3.05, 2.0, 4.0, 1.0, 1.0]


class Script(Callback):
    """Gives every agent the fitness of its step; fails where it is told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.step = fails_at, 0

    def __call__(self, evaluation) -> float:
        return SCORES[self.step - 1]

    def on_step(self, event) -> None:
        self.step = event.step

    def on_evaluation(self, event) -> None:
        if event.step == self.fails_at:
            raise RuntimeError("the machine fell over")

    def on_end(self, event) -> None:
        self.ended = event


@pytest.fixture
def run(make_population, tokenizer, tmp_path):
    def start(script: Script, name: str = "run", *, size: int = 1, resume: bool = False, test: bool = True, **changes):
        rows = make_rows(6, 12) if test else None
        env = PreferenceGym(make_rows(12), rows, tokenizer, data_batch_size_per_gpu=4)
        arguments = {
            "tournament": TournamentSelection(2, True, max(size, 2)),
            "mutation": Mutations(0.2, 0.8),
            "evo_steps": 2,
        }
        population = make_population(size, hp_config=HyperparameterConfig(lr=RLParameter(1e-4, 1e-2)))
        where = {"resume_from_checkpoint" if resume else "run_dir": tmp_path / name}
        return finetune_llm_preference(
            population,
            env,
            max_steps=8,
            evaluation_interval=1,
            checkpoint_steps=2,
            num_sample_answers=0,
            callbacks=[script],
            **({"fitness": script} if test else {}),
            **where,
            **(arguments if size > 1 else {}),
            **changes,
        )[0]

    return start


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("patience", "threshold", "last", "best"),
    [(1, 0.0, 3, 3), (2, 0.0, 8, 6), (2, 0.1, 4, 4), (3, 0.1, 5, 4), (4, 0.1, 8, 6), (None, 0.0, 8, 6)],
)
def test_a_run_stops_when_the_best_fitness_no_longer_grows(
    run, tmp_path, capsys, size, patience, threshold, last, best
) -> None:
    script = Script()
    run(script, size=size, early_stopping_patience=patience, early_stopping_threshold=threshold)
    assert (script.ended.step, script.ended.best_step) == (last, best)
    said = capsys.readouterr().out
    record = read_run(tmp_path / "run")
    assert record.last_step == last
    if last == 8:
        assert script.ended.stopped == record.ended.stopped == ""
        assert "Stopped" not in said
        return
    reason = rf"no better fitness in {patience} evaluations? \(early_stopping_patience\)"
    assert re.fullmatch(reason, record.ended.stopped)
    assert re.search(rf"Stopped after step {last} of 8: {reason}", said)
    assert re.search(rf"The run stopped early, after step {last} of 8: {reason}", " ".join(headline(record, [])))
    assert (tmp_path / f"run/checkpoints/step-{last:06d}").is_dir()


def test_a_run_that_died_stops_where_it_would_have_and_goes_on_with_more_patience(run, tmp_path) -> None:
    patience = {"early_stopping_patience": 3, "early_stopping_threshold": 0.1, "verbose": False}
    whole = [actor_bits(agent) for agent in run(Script(), "whole", size=3, **patience)]
    with pytest.raises(RuntimeError, match="fell over"):
        run(Script(4), "died", size=3, **patience)
    script = Script()
    assert [actor_bits(agent) for agent in run(script, "died", size=3, resume=True, **patience)] == whole
    assert (script.ended.step, script.ended.best_step) == (5, 4)
    for name in ("metrics.jsonl", "lineage.jsonl"):
        assert (tmp_path / "died" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # It stays at its end, until it has more patience.
    run(script, "died", size=3, resume=True, **patience)
    assert script.ended.step == 5
    run(script, "died", size=3, resume=True, **{**patience, "early_stopping_patience": 4})
    assert (script.ended.step, script.ended.best_step, script.ended.stopped) == (8, 6, "")
    assert json.loads((tmp_path / "died/metrics.jsonl").read_text().splitlines()[-1])["best_step"] == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"early_stopping_patience": 0}, "early_stopping_patience=0"),
        ({"early_stopping_threshold": 0.1}, "needs an early_stopping_patience"),
        ({"early_stopping_patience": 1, "early_stopping_threshold": -1}, "must be at least 0"),
        ({"early_stopping_patience": 1, "test": False}, "early stopping needs held-out rows"),
    ],
)
def test_early_stopping_that_cannot_work_is_refused(run, changes, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run(Script(), **changes)


def test_validate_names_the_patience(make_model, tokenizer) -> None:
    text = validate(make_model(), make_rows(40), tokenizer=tokenizer, population=1, early_stopping_patience=2)
    assert "early stopping: after 2 evaluations without a better fitness" in text


def test_of_equal_evaluations_before_the_end_the_later_one_wins(run, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "SCORES", [1.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    script = Script()
    run(script, verbose=False)
    assert script.ended.best_step == 3


# As guards make it of agents that break one, the nearer to the bounds the better.
BROKEN = [(-1e9, -excess, 0.5) for excess in (5.0, 4.0, 3.5, 3.5, 3.0, 3.0, 3.0, 3.0)]


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_agents_that_break_a_guard_improve_while_they_come_nearer_to_it(run, monkeypatch, threshold) -> None:
    monkeypatch.setitem(globals(), "SCORES", BROKEN)
    script = Script()
    with pytest.warns(UserWarning, match="every agent breaks a guard"):
        run(script, early_stopping_patience=1, early_stopping_threshold=threshold, verbose=False)
    assert script.ended.step == 4


def test_a_run_whose_best_evaluation_holds_its_guards_is_not_warned_of_the_last_one(run, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "SCORES", [*BROKEN[:3], (0.1,), *BROKEN[4:]])
    script = Script()
    run(script, early_stopping_patience=2, verbose=False)
    assert (script.ended.step, script.ended.best_step) == (6, 4)
