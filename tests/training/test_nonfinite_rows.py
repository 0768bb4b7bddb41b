"""Runs on data with rows on which the frozen base is not finite: neither the search nor its bits are at risk."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
from conftest import make_examples, make_rows
from nonfinite import MARK, break_token, marked
from snapshots import actor_bits

from evollm import (
    Callback,
    DataError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_sft,
    replay,
    tune,
)
from evollm.training import run as run_module

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-4, 1e-2))
LOOPS = {"dpo": finetune_llm_preference, "sft": finetune_llm_sft}


class StopAfter(Callback):
    """Fails when so many steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event) -> None:
        if event.step == self.step:
            raise RuntimeError("the machine fell over")


@pytest.fixture
def made(make_population, make_sft_population, make_model, tokenizer):
    """Agents, and a gym with rows in each split that are not finite under their base."""

    def make(kind: str, size: int, **agents):
        several, gym, rows = (
            (make_population, PreferenceGym, make_rows)
            if kind == "dpo"
            else (make_sft_population, SFTGym, make_examples)
        )
        env = gym(
            marked(rows(9), {2: "prompt", 6: "prompt"}),
            marked(rows(6, 12), {3: "prompt"}),
            tokenizer,
            data_batch_size_per_gpu=2,
            final_dataset=marked(rows(4, 20), {0: "prompt"}),
        )
        base = break_token(make_model(), tokenizer)
        return several(size, actor_network=base, hp_config=HP_CONFIG, **agents), env

    return make


@pytest.fixture
def run(made, tmp_path):
    """A run of such agents on such a gym: the population, its scores, and what was said of rows."""

    def start(kind: str, name: str, size: int = 3, resume: bool = False, agents=None, **changes):
        if size > 1:
            changes = {"evo_steps": 3, "tournament": TournamentSelection(2, True, size, rand_seed=3), **changes}
            changes["mutation"] = Mutations(0.2, 0.8, rand_seed=5)
        where = {"resume_from_checkpoint" if resume else "run_dir": tmp_path / name}
        settings = {"num_epochs": 2, "checkpoint_steps": 4, "verbose": False, "num_sample_answers": 0}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loop = LOOPS[kind]
            population, scores = loop(*made(kind, size, **(agents or {})), **{**settings, **where, **changes})
        said = [str(one.message).split(", for")[0] for one in caught if "left out" in str(one.message)]
        return population, scores, said

    return start


def lines_of(folder: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_row_that_is_not_finite_under_the_base_does_not_cost_the_search(kind, size, run, tmp_path) -> None:
    population, scores, said = run(kind, "run", size, num_sample_answers=4)
    assert all(map(math.isfinite, scores))
    assert not any(agent.diverged for agent in population)
    assert sorted(said) == [f"left out: {row}" for row in ("final row 0", "test row 3", "train row 2", "train row 6")]
    assert all(math.isfinite(float(line["loss"])) for line in lines_of(tmp_path / "run", "step"))
    (ended,) = lines_of(tmp_path / "run", "end")
    assert all(math.isfinite(value) for name, value in ended.items() if name.startswith(("before_", "after_")))


@pytest.mark.parametrize(
    ("kind", "changes"), [("dpo", {}), ("dpo", {"update_reference_each_epoch": True}), ("sft", {})]
)
def test_a_resumed_run_leaves_out_the_same_rows_and_ends_with_the_same_bits(kind, changes, run, tmp_path) -> None:
    whole, _, _ = run(kind, "whole", **changes)
    with pytest.raises(RuntimeError):
        run(kind, "cut", callbacks=[StopAfter(7)], **changes)
    resumed, _, said = run(kind, "cut", resume=True, **changes)
    assert [actor_bits(agent) for agent in resumed] == [actor_bits(agent) for agent in whole]
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()
    # A new process says it again, and refuses it if that is what it is now asked for.
    assert "left out: test row 3" in said


def test_what_a_run_refuses_may_change_when_it_is_resumed(run) -> None:
    refusing = {"drop_nonfinite_rows": False}
    with pytest.raises(DataError, match="on final row 0 the frozen base"):
        run("dpo", "strict", agents=refusing)
    with pytest.raises(RuntimeError):
        run("dpo", "cut", callbacks=[StopAfter(5)])
    with pytest.raises(DataError, match="on test row 3 the frozen base"):
        run("dpo", "cut", resume=True, agents=refusing)
    run("dpo", "cut", resume=True)


def test_replay_leaves_out_the_same_rows(run, made, tmp_path) -> None:
    run("dpo", "run")
    with pytest.warns(UserWarning, match="left out: train row"):
        result = replay(tmp_path / "run", *made("dpo", 1), run_dir=tmp_path / "replay", verbose=False)
    assert result.exact


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_step_without_a_finite_row_is_recorded_and_passed_over(
    kind, make_population, make_sft_population, make_model, tokenizer, tmp_path
) -> None:
    make, gym, rows = (
        (make_population, PreferenceGym, make_rows) if kind == "dpo" else (make_sft_population, SFTGym, make_examples)
    )
    env = gym(marked(rows(4), {1: "prompt", 2: "prompt"}), rows(6, 12), tokenizer, data_batch_size_per_gpu=1)
    population = make(2, actor_network=break_token(make_model(), tokenizer))
    with pytest.warns(UserWarning, match="left out: train row"):
        _, scores = LOOPS[kind](population, env, run_dir=tmp_path / "run", num_sample_answers=0)
    assert all(map(math.isfinite, scores))
    assert [float(line["loss"]) == float(line["loss"]) for line in lines_of(tmp_path / "run", "step")].count(False) == 4


@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize("patience", [2, 100])
def test_training_rows_that_are_all_not_finite_say_that_the_base_is_broken(
    kind, patience, make_agent, make_sft, make_model, tokenizer, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(run_module, "PATIENCE", patience)
    make, gym, rows = (make_agent, PreferenceGym, make_rows) if kind == "dpo" else (make_sft, SFTGym, make_examples)
    env = gym(marked(rows(6), dict.fromkeys(range(6), "prompt")), None, tokenizer, data_batch_size_per_gpu=2)
    agent = make(actor_network=break_token(make_model(), tokenizer))
    seen = min(2 * patience, 6)
    with (
        pytest.warns(UserWarning, match="left out: train rows"),
        pytest.raises(
            DataError, match=f"train_dataset='{seen} rows': on every one the frozen base.*the base is broken"
        ),
    ):
        LOOPS[kind]([agent], env, num_epochs=2, run_dir=tmp_path / "run", verbose=False)


def test_tune_names_rows_by_their_place_in_the_data_that_it_was_given(make_model, tokenizer, tmp_path) -> None:
    rows = marked(make_rows(30), dict.fromkeys((5, 29), "prompt"))
    rows[17]["chosen"] = rows[17]["rejected"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tune(
            break_token(make_model(), tokenizer),
            rows,
            tokenizer=tokenizer,
            population=1,
            num_epochs=1,
            num_sample_answers=0,
            run_dir=tmp_path / "run",
            verbose=False,
        )
    said = [str(one.message) for one in caught if "left out" in str(one.message)]
    numbers = {
        int(number)
        for text in said
        for number in text.partition(" row")[2].strip("s ").partition(", for")[0].split(", ")
    }
    assert numbers == {5, 29}
    reports = json.loads((tmp_path / "run/config.json").read_text())["data"]["reports"]
    assert "1 chosen == rejected: row 17" in reports[0]
    assert MARK in rows[5]["prompt"]
