from __future__ import annotations

import io
import re
import time
from functools import partial

import pytest
import rich.console
from conftest import make_rows

from evollm import (
    Callback,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.models.attention import ONE_BY_ONE
from evollm.pace import Pace
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
    assert "…" not in text
    tables = [line for line in text.splitlines() if "accuracy" in line or re.match(r" +(\* )?\d+ ", line)]
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
