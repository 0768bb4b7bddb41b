from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from report_runs import evolve

import evollm
from evollm import DPO, SFT, CheckpointError
from evollm.report import write_report
from evollm.runs import read_config, read_run
from evollm.runs.words import Score, Words


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory) -> Path:
    """The folder of a small run; to be read only."""
    return evolve(tokenizer, tmp_path_factory.mktemp("words") / "run", agents=2, generations=2)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def put(run: Path, words: object) -> None:
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "words": words}))


@pytest.mark.parametrize("algorithm", [DPO, SFT])
def test_words_come_back_from_json_as_they_were(algorithm) -> None:
    assert Words.from_dict(json.loads(json.dumps(asdict(algorithm.words)))) == algorithm.words
    assert algorithm.words.name == algorithm.algorithm


def test_what_reads_and_shows_a_run_names_no_algorithm() -> None:
    package = Path(evollm.__file__).parent
    files = [path for name in ("report", "runs", "tracking") for path in (package / name).rglob("*.*")]
    assert len([path for path in files if path.suffix in (".py", ".html")]) > 20
    for path in files:
        if path.suffix in (".py", ".html"):
            assert not re.search(r"\b(dpo|sft)\b", path.read_text(encoding="utf-8"), re.IGNORECASE), path


@pytest.mark.usefixtures("drawn_reports")
def test_the_report_speaks_in_the_words_of_the_run(run) -> None:
    accuracy = replace(DPO.words.scores[0], label="hit <b>rate</b>", unit="share of $x$", smaller_is_better=True)
    words = replace(DPO.words, name="KTO", noun="verdict", scores=(accuracy, *DPO.words.scores[1:]), on_scores="Read!")
    put(run, asdict(words))
    page = write_report(run, pictures=False).read_text()
    for text in ("KTO by a population of 2", "steps of 4 verdicts", "the hit &lt;b&gt;rate&lt;/b&gt; went", " Read! "):
        assert text in page
    assert "share of $x$" in page
    assert not re.search("<b>rate|accuracy \\(|pairs that", page)


def test_a_folder_without_words_is_refused_in_one_line(run) -> None:
    path = run / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "words"}))
    for reader in (read_config, read_run):
        with pytest.raises(CheckpointError, match=r"^\S+config\.json lacks the words of its algorithm: .*$"):
            reader(run)


SCORE = {"name": "s", "label": "s"}


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"name": "x\n# y"},
        {"title": "x\x1b[31m"},
        {"method": "\u202eevil"},
        {"noun": "x" * 500},
        {"tags": ["x]\nlicense: mine"]},
        {"tags": ["a"] * 20},
        {"scores": []},
        {"scores": [{**SCORE, "is_shown": False}]},
        {"scores": [{**SCORE, "name": "../../precious"}]},
        {"scores": [{**SCORE, "digits": 10**9}]},
        {"scores": [{**SCORE, "digits": True}]},
        {"scores": [{**SCORE, "digits": 1, "is_share": True}]},
        {"scores": [{**SCORE, "is_share": "yes"}]},
        {"scores": [{**SCORE, "more": 1}]},
        {"scores": "accuracy"},
        {"curves": [["/etc/x", "y"]]},
        {"curves": [["loss", ["y"]]]},
        {"curves": {"loss": "y"}},
        {"more": 1},
    ],
    ids=str,
)
def test_words_that_could_do_harm_are_refused(run, change) -> None:
    put(run, {**asdict(DPO.words), **change})
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        read_config(run)


@pytest.mark.usefixtures("drawn_reports")
def test_a_score_that_no_evaluation_has_is_an_error_of_evollm(run) -> None:
    put(run, asdict(replace(DPO.words, scores=(Score("joy", "joy"),))))
    with pytest.raises(CheckpointError, match="joy"):
        write_report(run, pictures=False)
