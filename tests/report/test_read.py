from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from evollm import ConfigurationError, EvoLLMError
from evollm.hpo import EvolutionPlan, ancestry
from evollm.report import read_run
from evollm.report.family_tree import family_tree
from evollm.report.findings import compare, headline
from evollm.report.style import drawn_lines


@pytest.fixture
def copy(evolved, tmp_path) -> Path:
    shutil.copytree(evolved, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_is_read_back_as_it_was(evolved) -> None:
    record = read_run(evolved)
    assert record.last_step == 8
    assert record.boundaries == (0, 2, 4, 6, 8)
    assert [len(births) for births in record.generations] == [4] * 4
    assert {timing.kind for timing in record.timings} == {"start", "baseline", "step", "evaluation", "evolution", "end"}
    assert record.ended is not None
    assert record.ended.split == "final"
    assert record.ended.pairs["before"].accuracy == record.ended.scores["before"]["accuracy"] == 0.5
    for scored in record.evaluations:
        if scored.pairs is not None:
            assert scored.pairs.mean_margin == pytest.approx(scored.scores["mean_margin"])
    assert [scored.agent for scored in record.evaluations if scored.pairs is None] == [1]
    assert np.isnan(next(line for line in record.steps if line.agent == 1 and line.step == 2).metrics["loss"])


def test_the_winners_line_is_the_lineages(evolved) -> None:
    record = read_run(evolved)
    lines = [json.loads(line) for line in (evolved / "lineage.jsonl").read_text().splitlines()]
    births = ancestry([EvolutionPlan.from_dict(line) for line in lines[1:]], record.winner)
    assert [life.birth.index for life in record.line] == list(dict.fromkeys(birth.index for birth in births))
    starts = {birth.index: 2 * generation for generation, birth in reversed(list(enumerate(births)))}
    assert {life.birth.index: life.steps[0] for life in record.line} == starts
    assert len(starts) > 1
    assert list(record.line_ends.values()) == [*sorted(starts.values())[1:], 8]
    lines = drawn_lines(record, {i: range(1, 9) for i in record.lives}, lambda s: s)
    (line,) = [line for line in lines if line.on_line]
    assert list(line.points) == list(range(1, 9))


def test_the_tree_shows_who_diverged_and_who_was_culled_without_crossing_lines(evolved) -> None:
    nodes = family_tree(read_run(evolved))
    assert len(nodes) == 16
    assert [node.row for node in nodes if node.on_line] == [0, 0, 0, 0]
    (diverged,) = [node for node in nodes if node.diverged]
    assert (diverged.birth.index, diverged.generation, diverged.culled) == (1, 0, True)
    for generation in (1, 2, 3):
        column = sorted((node for node in nodes if node.generation == generation), key=lambda node: node.row)
        assert [node.parent_row for node in column] == sorted(node.parent_row for node in column)
    kept = {node.birth.parent for node in nodes}
    for node in nodes:
        if node.generation < 3 and node.birth.index not in kept:
            assert node.culled


def test_a_run_that_has_not_ended_and_a_last_line_that_was_cut_are_read(copy) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:50])
    record = read_run(copy)
    assert record.ended is None
    best = max(record.latest_evaluation, key=lambda scored: scored.fitness)
    assert record.winner == best.agent


def edit(name: str, change) -> object:
    def act(folder: Path) -> None:
        path = folder / name
        content = change(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)

    return act


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("config.json", lambda _: None), "no run folder"),
        (edit("config.json", lambda content: content[:100]), "config.json is damaged"),
        (edit("config.json", lambda _: b"[]"), "config.json is damaged"),
        (edit("metrics.jsonl", lambda _: None), "metrics.jsonl cannot be read"),
        (edit("metrics.jsonl", lambda _: b""), "has not done a step"),
        (edit("metrics.jsonl", lambda content: content.replace(b'"best": ', b'"best": 99')), "does not know agent 99"),
        (edit("lineage.jsonl", lambda _: b""), "which agents the run began with"),
        (edit("lineage.jsonl", lambda content: content.replace(b"births", b"birds")), "not of a run"),
        (edit("lineage.jsonl", lambda content: content.replace(b'"lr"', b'"l/../r"')), "not of a run"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_file_that_is(copy, damage, message) -> None:
    damage(copy)
    with pytest.raises(EvoLLMError, match=message):
        read_run(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("metrics.jsonl", lambda content: content[7:]), "metrics.jsonl is damaged in line 1"),
        (edit("metrics.jsonl", lambda content: b"\xff" + content), "metrics.jsonl is damaged in line 1"),
        (edit("metrics.jsonl", lambda content: b"3\n[]\n{}\n" + content), "metrics.jsonl is damaged in line 1, 2, 3"),
        (edit("metrics.jsonl", lambda content: content.replace(b'"agent"', b'"agnt"', 1)), "1 records of kind 'step'"),
        (edit("metrics.jsonl", lambda content: content.replace(b"}\n{", b'}\n{"kind": "st{', 1)), "damaged in line 2"),
        (edit("timing.jsonl", lambda content: content.replace(b"{", b"(", 1)), "timing.jsonl is damaged in line 1"),
        (edit("final.safetensors", lambda content: content[:-3]), "final.safetensors cannot be read"),
        (edit("evaluations/step-000004.safetensors", lambda _: b"?"), "step-000004.safetensors cannot be read"),
    ],
)
def test_damage_costs_a_record_and_is_said(copy, damage, message) -> None:
    whole = read_run(copy)
    damage(copy)
    with pytest.warns(UserWarning, match=message):
        record = read_run(copy)
    assert len(whole.steps) - len(record.steps) <= 1
    assert record.ended is not None
    assert headline(record, compare(record))


def test_what_the_lineage_has_lost_is_taken_from_the_newest_checkpoint(copy) -> None:
    whole = read_run(copy)
    assert len(whole.evolutions) > 1
    lines = (copy / "lineage.jsonl").read_bytes().splitlines(keepends=True)
    checkpoint = copy / "checkpoints" / "step-000008"
    checkpoint.mkdir(parents=True)
    evolutions = [{"step": evolution.step, **evolution.plan.to_dict()} for evolution in whole.evolutions]
    state = {"founders": [birth.to_dict() for birth in whole.founders], "evolutions": evolutions[:2]}
    (checkpoint / "population.json").write_text(json.dumps(state))
    for kept in (lines[1:], [lines[0], *lines[2:]], lines[2:]):
        (copy / "lineage.jsonl").write_bytes(b"".join(kept))
        record = read_run(copy)
        assert str((record.founders, record.evolutions)) == str((whole.founders, whole.evolutions))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_is_damaged_is_read_or_refused_but_never_a_traceback(copy) -> None:
    """Cuts and changed bytes at random places of every file."""
    rng = random.Random(0)
    names = ["config.json", "metrics.jsonl", "lineage.jsonl", "timing.jsonl", "final.safetensors"]
    for round_ in range(150):
        path = copy / names[round_ % len(names)]
        whole = path.read_bytes()
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(1, 4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.choice(b'0x9"{}[],:\xff')
        path.write_bytes(bytes(damaged))
        try:
            record = read_run(copy)
            assert family_tree(record)
            assert headline(record, compare(record))
        except EvoLLMError:
            pass
        path.write_bytes(whole)


def test_what_is_no_folder_of_a_run_is_refused(tmp_path) -> None:
    for wrong in (tmp_path, tmp_path / "nowhere", None, 3):
        with pytest.raises(ConfigurationError, match="run_dir="):
            read_run(wrong)
