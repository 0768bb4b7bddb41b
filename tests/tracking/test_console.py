from __future__ import annotations

import io
import re
import time
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import rich.console
from conftest import make_rows

from evollm import (
    DPO,
    SFT,
    Callback,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.hpo import Birth, Evaluation, LikelihoodEvaluation
from evollm.models.attention import ONE_BY_ONE
from evollm.pace import Pace
from evollm.report import few_rows, gain_of, read_run
from evollm.report.findings import headline
from evollm.runs.events import RunStarted
from evollm.tracking import Console

WIDTH = 80


def run(make_population, tokenizer, tmp_path, **changes) -> str:
    """What a run of four prints on a terminal of 80 columns."""
    output = io.StringIO()
    console = Console(rich.console.Console(file=output, width=WIDTH, force_terminal=False))
    splits = {"final_dataset": make_rows(5, 30), **changes}
    env = PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4, **splits)
    hp_config = HyperparameterConfig(
        lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5), nll_alpha=RLParameter(0.01, 1.0)
    )
    finetune_llm_preference(
        make_population(4, hp_config=hp_config),
        env,
        num_epochs=3,
        tournament=TournamentSelection(2, True, 4),
        mutation=Mutations(0.0, 1.0),
        run_dir=tmp_path / "run",
        callbacks=[console],
        verbose=False,
        num_sample_answers=2,
    )
    return output.getvalue()


def test_a_person_sees_tables_mutations_the_score_and_how_to_load_the_best(
    make_population, tokenizer, tmp_path
) -> None:
    text = run(make_population, tokenizer, tmp_path)
    assert text.count("generation ") >= 3
    for column in ("agent", "parent", "lr", "beta", "nll_alpha", "accuracy", "margin", "loss"):
        assert column in text
    assert len(re.findall(r"^ +\* \d+ ", text, re.MULTILINE)) == 3
    assert re.search(r"agent \d+ <- \d+  (lr|beta|nll_alpha): \S+ -\(x[\d.]+\)-> \S+", text)
    assert re.search(r"Held-out accuracy on 5 final pairs: 0\.500 -> \d\.\d+", text)
    assert f"Best adapter: {tmp_path / 'run' / 'elite' / 'actor'}" in text
    assert f'PeftModel.from_pretrained(base_model, "{tmp_path / "run" / "elite" / "actor"}")' in text
    assert text.count("before:") == text.count("after:") == 2
    assert "Question 30 by" in text


def test_tables_fit_a_terminal_of_80_columns_uncut(make_population, tokenizer, tmp_path) -> None:
    text = run(make_population, tokenizer, tmp_path)
    # Sample answers that are cut end in one.
    assert "…" not in text.partition("Held-out accuracy")[0]
    tables = [line for line in text.splitlines() if re.match(r" +(agent|(\* )?\d+) ", line)]
    assert max(map(len, tables)) <= WIDTH


def test_a_score_on_the_selection_pairs_says_that_it_is_one(make_population, tokenizer, tmp_path) -> None:
    text = run(make_population, tokenizer, tmp_path, final_dataset=None)
    assert "selection pairs" in text
    assert "pass final_dataset" in text


def test_one_line_says_what_attention_is_computed_by(make_population, tokenizer, tmp_path) -> None:
    lines = run(make_population, tokenizer, tmp_path).splitlines()
    said = [number for number, line in enumerate(lines) if "attention" in line]
    assert [lines[number] for number in said] == [f"attention: {ONE_BY_ONE}"]
    # Before the first table.
    assert not any("generation" in line for line in lines[: said[0]])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time in which half a minute goes by whenever somebody looks."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 30
        return self.now


class Waiting(Callback):
    """Takes as long as a bar needs to be drawn."""

    def on_step(self, event: object) -> None:
        time.sleep(0.15)


@pytest.fixture
def slow(monkeypatch) -> None:
    """Steps seem to take half a minute and more."""
    monkeypatch.setattr("evollm.tracking.console.Pace", partial(Pace, clock=Clock()))


def test_a_log_says_how_far_the_run_is_now_and_then(make_population, tokenizer, tmp_path, slow) -> None:
    text = run(make_population, tokenizer, tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("step ") and "loss" in line]
    shape = r"step (\d) of 9 \(\d+%\): lowest loss -?\d+\.\d{3}, best accuracy [01]\.\d\d; about \d+ (s|min) left"
    steps = [re.fullmatch(shape, line)[1] for line in lines]
    assert steps == ["1", "3", "5", "7"]
    # Nor what an answer of an untrained model would have a terminal do.
    assert "\x1b" not in text


def test_quick_runs_have_no_such_lines(make_population, tokenizer, tmp_path) -> None:
    assert "of 9 (" not in run(make_population, tokenizer, tmp_path)


def test_in_a_terminal_the_bar_shows_the_loss_and_there_are_no_such_lines(make_agent, gym, tmp_path, slow) -> None:
    screen = Terminal()
    console = Console(rich.console.Console(file=screen, width=WIDTH, force_terminal=True))
    callbacks = [console, Waiting()]
    finetune_llm_preference([make_agent()], gym, run_dir=tmp_path / "run", callbacks=callbacks, verbose=False)
    shown = screen.getvalue()
    assert re.search(r"loss \d+\.\d{3}, accuracy [01]\.\d\d", shown)
    assert "of 3 (" not in shown
    assert "training ..." not in shown


def test_a_file_that_is_made_to_look_like_a_terminal_gets_no_bar(make_agent, gym, tmp_path, slow) -> None:
    file = io.StringIO()
    console = Console(rich.console.Console(file=file, width=WIDTH, force_terminal=True))
    finetune_llm_preference([make_agent()], gym, run_dir=tmp_path / "run", callbacks=[console], verbose=False)
    assert "of 3 (" in file.getvalue()
    assert "━" not in file.getvalue()


def test_texts_are_printed_as_they_are(make_agent, tokenizer, tmp_path) -> None:
    rows = [{**row, "prompt": "[b]:smile: " + row["prompt"]} for row in make_rows(12)]
    env = PreferenceGym(rows[:8], rows[8:], tokenizer, data_batch_size_per_gpu=4)
    output = io.StringIO()
    console = Console(rich.console.Console(file=output, width=300))
    folder = tmp_path / '[b]:smile: "run"'
    finetune_llm_preference([make_agent()], env, run_dir=folder, callbacks=[console], verbose=False)
    said = output.getvalue()
    for line in (f"; folder {folder}\n", f"saved in {folder}/", f"Best adapter: {folder}/", "\n[b]:smile: Question"):
        assert line in said
    assert r':smile: \"run\"/elite/actor")' in said


def test_the_last_score_has_its_interval_and_few_pairs_are_warned_of_before_training(
    make_population, tokenizer, tmp_path
) -> None:
    text = run(make_population, tokenizer, tmp_path, final_dataset=make_rows(8, 30))
    lines = text.splitlines()
    gain = next(line for line in lines if line.startswith("The best agent against the start: "))
    assert re.search(r": [+-]?\d+\.\d points (\(95 % interval |on every pair \(95 % interval of the accuracy)", gain)
    assert lines[lines.index(gain) - 1].startswith("Held-out accuracy on 8 final pairs: ")
    warned = [number for number, line in enumerate(lines) if "Few held-out pairs" in line]
    assert [lines[number] for number in warned] == [f"Warning: {few_rows(DPO.words, agents=4, test=6, final=8)}"]
    assert not any("training" in line for line in lines[: warned[0]])
    # The report says the same.
    record = read_run(tmp_path / "run")
    assert few_rows(DPO.words, agents=4, test=6, final=8) in headline(record, [])
    assert gain.partition(": ")[2] == gain_of(DPO.words, record.ended.pairs["before"], record.ended.pairs["after"])


@pytest.mark.parametrize(
    ("margins", "said"),
    [
        ([1.0] * 130 + [-1.0] * 70, r"\+15\.0 points \(95 % interval \+8\.\d to \+21\.\d\)\.$"),
        ([1.0] * 102 + [-1.0] * 98, r"\+1\.0 points \(95 % interval -\d\.\d to .* The interval includes no gain: "),
        ([-1.0] * 130 + [1.0] * 70, "It has become worse"),
        ([1.0] * 5, "not enough for an interval, and shows nothing"),
        ([0.0] * 200, "The interval includes no gain"),
        ([float("nan")] * 200, "shows nothing"),
    ],
)  # fmt: skip
def test_a_gain_is_said_with_what_its_interval_allows(margins, said) -> None:
    none = np.zeros(len(margins))
    assert re.search(said, gain_of(DPO.words, Evaluation(none, none), Evaluation(np.array(margins), none)))


def test_a_loss_that_falls_is_a_gain() -> None:
    tokens, rng = np.full(200, 10.0), np.random.default_rng(0)
    before = LikelihoodEvaluation(-20 - rng.random(200), tokens)
    after = LikelihoodEvaluation(before.logprobs + 5 + rng.random(200), tokens)
    assert re.search(
        r"-0\.5\d+ nats per token \(95 % interval -0\.\d+ to -0\.\d+\)\.$", gain_of(SFT.words, before, after)
    )
    assert "It has become worse" in gain_of(SFT.words, after, before)


def test_enough_rows_are_not_warned_of() -> None:
    assert few_rows(DPO.words, agents=4, test=100, final=0) == few_rows(SFT.words, agents=1, test=0, final=0) == ""
    assert "10 for the evaluations." in few_rows(SFT.words, agents=1, test=10, final=300)
    assert "accuracy" not in few_rows(SFT.words, agents=1, test=10, final=300)
    assert "known to within about 10 points" in few_rows(DPO.words, agents=2, test=99, final=300)


@pytest.mark.parametrize(("step", "times"), [(0, 1), (3, 0)])
def test_a_resumed_run_is_not_warned_of_few_rows_again(tmp_path, step, times) -> None:
    output = io.StringIO()
    console = Console(rich.console.Console(file=output, width=WIDTH))
    config = {"data": {"reports": [], "batch_size": 4}, "base_dtype": "torch.float32", "device": "cpu"}
    config["words"] = asdict(DPO.words)
    founders = [Birth(index, None, (), elite=False, hyperparameters={}) for index in range(2)]
    console.on_start(RunStarted(tmp_path, config, founders, 8, step, held_out={"test": 6, "final": 300}))
    console.close()
    assert output.getvalue().count("Few held-out pairs: 6 for the selection.") == times
