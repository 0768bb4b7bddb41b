from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import EVIL

from evollm import ConfigurationError, MissingExtraError
from evollm.cli import main
from evollm.report import read_run, write_report
from evollm.report.findings import Comparison, compare, headline
from evollm.report.statistics import Interval

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """A page's tags, ids, addresses and text; tags that are not closed in their order are refused."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value)
            assert not name.startswith("on"), name

    def handle_startendtag(self, tag, attributes) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def report(evolved, tmp_path_factory) -> Path:
    return write_report(evolved, tmp_path_factory.mktemp("out") / "page.html")


def test_the_page_is_well_formed_and_needs_nothing_but_itself(report) -> None:
    page = Page(report)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "svg" in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    style = report.read_text()
    assert not re.search(r"url\((?!#)|@import", style)


def test_what_a_model_or_user_wrote_is_escaped(report) -> None:
    assert EVIL in Page(report).words
    assert "<script" not in report.read_text()


def test_every_section_is_there_with_its_pictures(report) -> None:
    page = Page(report)
    for section in ("score", "answers", "family", "schedules", "held-out", "training", "resources", "settings"):
        assert section in page.ids
    names = {path.stem for path in report.with_suffix("").iterdir()}
    assert {"family-tree", "schedule-lr", "schedule-loss_type", "held-out-accuracy", "final-accuracy", "time"} <= names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.with_suffix("").iterdir())
    for words in ("On 6 pairs that nothing was selected by, the accuracy went from 50.0", "diverged", "the runner-up"):
        assert words in page.words


def test_equal_folders_give_equal_pages(report, evolved, tmp_path) -> None:
    again = write_report(evolved, tmp_path / "again.html", pictures=False)
    assert again.read_bytes() == report.read_bytes()
    assert not (tmp_path / "again").exists()


def test_a_run_of_one_sft_agent_has_no_tree_and_no_rivals(alone, tmp_path) -> None:
    page = Page(write_report(alone, tmp_path / "page.html", pictures=False))
    assert not {"family", "schedules"} & set(page.ids)
    assert re.search(r"On 6 held-out examples, the loss went from \d\.\d{4} to \d\.\d{4} nats per token: ", page.words)
    assert "runner-up" not in page.words
    assert "optimistic" not in page.words


def test_a_run_that_died_of_an_earlier_version_is_reported_without_intervals(evolved, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    shutil.copytree(evolved, folder, ignore=shutil.ignore_patterns("timing.jsonl", "*.safetensors"))
    assert headline(read_run(folder), [])[0].endswith("so there are no intervals.")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert main(["report", str(folder), "--no-pictures"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = Page(folder / "report.html")
    assert not {"score", "answers", "resources"} & set(page.ids)
    assert "The run has not ended: 8 of 8 steps are done." in page.words


@pytest.mark.parametrize(
    ("split", "difference", "words"),
    [
        ("final", Interval(0.2, 0.1, 0.3), "20.0 points (95 % interval +10.0 to +30.0)."),
        ("final", Interval(0.2, -0.1, 0.3), "does not show that tuning has helped"),
        ("final", Interval(-0.2, -0.3, -0.1), "It has become worse"),
        ("final", Interval(0.5, 0.5, 0.5), "+50.0 points on every pair (95 % interval of the accuracy itself: "),
        ("final", Interval(0, 0, 0), "does not show that tuning has helped"),
        ("final", Interval(0.5, float("nan"), float("nan")), "That is not enough for an interval, and shows nothing."),
        ("test", Interval(0.2, 0.1, 0.3), "so the score is optimistic"),
        ("", Interval(0.2, 0.1, 0.3), "No held-out pairs were given"),
    ],
)
def test_the_headline_says_no_more_than_the_intervals_do(evolved, split, difference, words) -> None:
    record = read_run(evolved)
    object.__setattr__(record.ended, "split", split)
    gain = Comparison("pair", "before", "the untuned model", "accuracy", difference)
    rival = Comparison("pair", "runner_up", "the runner-up", "accuracy", Interval(0.1, -0.1, 0.2))
    text = " ".join(headline(record, [gain, rival]))
    assert words in text
    if split:
        assert "These pairs do not tell the two apart." in text


def test_less_loss_is_better_and_more_accuracy_is(evolved) -> None:
    down, up = Interval(-0.2, -0.3, -0.1), Interval(0.2, 0.1, 0.3)
    verdicts = [
        Comparison("pair", "before", "", score, one).verdict for score in ("loss", "accuracy") for one in (down, up)
    ]
    assert verdicts == ["better", "worse", "worse", "better"]
    assert {one.role for one in compare(read_run(evolved))} == {"before", "runner_up"}


def test_wrong_places_are_named(evolved, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"must be the path of a page and end in \.html"):
        write_report(evolved, tmp_path / "page")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_report(evolved, tmp_path / "file" / "page.html", pictures=False)
    assert main(["report", str(tmp_path)]) == 1


def test_without_matplotlib_the_extra_is_named(evolved, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r'pip install "evollm\[report\]"'):
        write_report(evolved, tmp_path / "page.html")


def test_nothing_imports_matplotlib_before_a_report_is_written() -> None:
    code = "import evollm.cli, evollm.report, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
