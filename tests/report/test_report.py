from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows
from report_runs import EVIL, LORA, evolve, small_model
from tokenizers_for_tests import chatml_tokenizer

from evollm import DPO, SFT, ConfigurationError, MissingExtraError, PreferenceGym, finetune_llm_preference
from evollm.cli import main
from evollm.hpo import Evaluation, preference_fitness
from evollm.report import RunRecord, Scored, read_run, write_report
from evollm.report.family_tree import DOT_CELL, tree_picture
from evollm.report.findings import Comparison, compare, headline
from evollm.report.hyperparameter_figures import _lanes, hyperparameter_pictures
from evollm.report.score_figures import held_out_pictures
from evollm.report.statistics import Interval
from evollm.report.style import Picture, add_legend, drawing, line_style, mark_diverged, new_panel
from evollm.report.training_figures import training_pictures

ACCURACY, LOSS = DPO.words.shown[0], SFT.words.shown[0]
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
        self.labels: list[str] = []
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
            if name == "aria-label":
                self.labels.append(value)
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
    gain = Comparison("pair", "before", "the untuned model", ACCURACY, difference)
    rival = Comparison("pair", "runner_up", "the runner-up", ACCURACY, Interval(0.1, -0.1, 0.2))
    text = " ".join(headline(record, [gain, rival]))
    assert words in text
    if split:
        assert "These pairs do not tell the two apart." in text


def test_less_loss_is_better_and_more_accuracy_is(evolved) -> None:
    down, up = Interval(-0.2, -0.3, -0.1), Interval(0.2, 0.1, 0.3)
    verdicts = [
        Comparison("pair", "before", "", score, one).verdict for score in (LOSS, ACCURACY) for one in (down, up)
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


@pytest.fixture(scope="module")
def drawn(evolved) -> dict[str, Picture]:
    record = read_run(evolved)
    with drawing():
        pictures = [*held_out_pictures(record), *training_pictures(record)[:1], *hyperparameter_pictures(record)]
    return {picture.name: picture for picture in pictures}


def legend(picture: Picture) -> list[str]:
    return [text.get_text() for found in picture.figure.legends for text in found.get_texts()]


def test_a_legend_names_what_can_be_seen_and_nothing_else(drawn) -> None:
    # Agent 1 diverges before it is scored, so that no panel of scores has a cross.
    for name in ("held-out-accuracy", "held-out-mean-margin"):
        assert "diverged" not in legend(drawn[name])
        assert "winner's line, 95 %" in legend(drawn[name])
    assert legend(drawn["training-loss"]) == ["winner's line", "runner-up", "others", "diverged"]
    for picture in drawn.values():
        lines = [line for axes in picture.figure.axes for line in axes.get_lines() if len(line.get_xdata())]
        for name in set(legend(picture)) & {"runner-up", "others", "diverged"}:
            assert any(line.get_label() == name for line in lines), (picture.name, name)


def test_what_lies_outside_a_panel_is_not_in_its_legend(evolved) -> None:
    record = read_run(evolved)
    with drawing():
        figure, axes = new_panel("loss")
        axes.plot([1, 2], [1, 2], **line_style(record, record.line[-1], on_line=True))
        mark_diverged(axes, 1, 1e6)
        add_legend(axes, record)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["winner's line", "diverged"]
        axes.set_ylim(0, 3)
        add_legend(axes, record)
        assert [text.get_text() for text in figure.legends[1].get_texts()] == ["winner's line"]


def test_nothing_that_is_read_has_an_arrow_of_hyphens(report) -> None:
    page = Page(report)
    assert not [text for text in (page.words, *page.labels) if "->" in text or "<-" in text]
    assert re.search(r"It is agent \d+.*, then agent \d+ \(\w+ from \S+ to \S+\)", page.words)


@pytest.fixture(scope="module")
def long_run(tokenizer, tmp_path_factory) -> Path:
    """A run of more generations than have boxes."""
    return evolve(tokenizer, tmp_path_factory.mktemp("long") / "run", agents=3, generations=20)


def test_the_winner_of_many_generations_has_a_star_and_its_number(long_run) -> None:
    record = read_run(long_run)
    with drawing():
        tree = tree_picture(record)
    axes = tree.figure.axes[0]
    (star,) = [line for line in axes.get_lines() if line.get_marker() == "*"]
    assert str(record.winner) in [text.get_text() for text in axes.texts]
    assert star.get_xdata()[0] == pytest.approx(0.05 + (record.winner_generation + 0.5) * DOT_CELL[0])


def test_agents_that_live_at_the_same_time_have_lanes_of_their_own(long_run) -> None:
    lives = list(read_run(long_run).lives.values())
    lanes = _lanes(lives)
    assert max(lanes.values()) < 3
    for one in lives:
        for other in lives:
            together = one.steps[0] < other.steps[1] and other.steps[0] < one.steps[1]
            if one is not other and together:
                assert lanes[one.birth.index] != lanes[other.birth.index]


def scored(margins: list[float], at: Scored) -> Scored:
    """An evaluation with other results."""
    evaluation = Evaluation(np.array(margins), np.zeros(len(margins)))
    return replace(at, pairs=evaluation, scores=evaluation.scores, fitness=preference_fitness(evaluation))


def with_best(record: RunRecord, best: list[float], last: list[float]) -> RunRecord:
    """The run as if its first agent had won by the first evaluation, with worse results between that and the last."""
    first = record.evaluations[0]
    new = [scored(last if one.step == record.last_step else [-9.0] * len(last), one) for one in record.evaluations]
    ended = replace(record.ended, best=first.agent, best_step=first.step)
    return replace(record, evaluations=[scored(best, first), *new[1:]], ended=ended)


@pytest.mark.parametrize(
    ("best", "last", "words"),
    [
        ([1.0] * 120, [1.0] * 60 + [-1.0] * 60, "on the pairs of the selection was 100.0 against 50.0 % of the best"),
        ([1.0] * 120, [1.0] * 60 + [-1.0] * 60, "difference +40.8 to +59.2): fewer steps may be enough"),
        ([1.0] * 60 + [-1.0] * 60, [1.0] * 59 + [-1.0] * 61, "which may be chance (95 % interval of the difference"),
        ([2.0] * 120, [1.0] * 120, "its mean margin on the pairs of the selection was 2.00 against 1.00 nats"),
    ],
)  # fmt: skip
def test_a_best_evaluation_before_the_last_is_named_with_its_advantage(evolved, best, last, words) -> None:
    record = with_best(read_run(evolved), best, last)
    (said,) = [
        sentence for sentence in headline(record, []) if sentence.startswith("The best agent is that of step 2 of")
    ]
    assert words in said
    (said,) = [
        sentence for sentence in headline(replace(record, ended=None), []) if "is that of step 2 of 8" in sentence
    ]
    assert said.startswith(f"The best agent is that of step 2 of 8, agent {record.winner}: its ")


def test_of_a_run_that_was_best_at_its_end_no_step_is_named(evolved) -> None:
    record = read_run(evolved)
    assert record.ended.best_step == record.last_step
    assert "The best agent is that of" not in " ".join(headline(record, []))
    for best, last in (([1.0] * 9, [1.0] * 9), ([1.0] * 9, [2.0] * 9)):
        running = replace(with_best(record, best, last), ended=None)
        assert running.winner_step == running.last_step
        assert "The best agent is that of" not in " ".join(headline(running, []))


def test_few_held_out_pairs_are_said_to_be_few(evolved) -> None:
    record = read_run(evolved)
    text = " ".join(headline(record, compare(record)))
    assert "Few held-out pairs: 6 for the selection and 6 for the final score." in text
    assert "An accuracy on 6 pairs is known to within about 31 points." in text
    enough = with_best(record, [1.0] * 100, [1.0] * 100)
    assert "Few" not in " ".join(headline(replace(enough, ended=None), []))


def test_conversations_have_roles_and_answers_that_were_cut_an_ellipsis(tmp_path) -> None:
    tokenizer = chatml_tokenizer()
    turns = [("system", "Be brief."), ("user", "<b>hi</b>"), ("assistant", "yes"), ("user", "ما هي عاصمة مصر؟")]
    messages = [{"role": role, "content": text} for role, text in turns]
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [{"prompt": [*messages[:-1], {"role": "user", "content": f"{n} {turns[-1][1]}"}], **sides} for n in range(8)]
    env = PreferenceGym(rows[:4], rows[4:], tokenizer, data_batch_size_per_gpu=4)
    agent = DPO(actor_network=small_model(tokenizer), lora_config=LORA, lr=1e-3)
    run = tmp_path / "run"
    finetune_llm_preference([agent], env, run_dir=run, checkpoint_steps=0, save_elite=False, verbose=False)
    page = write_report(run, tmp_path / "page.html", pictures=False)
    html, words = page.read_text(), Page(page).words
    for role, text in (*turns[:1], *turns[2:3]):
        assert f'<dt>{role}</dt><dd dir="auto">{text}</dd>' in html
    assert f'<dd dir="auto">4 {turns[-1][1]}</dd>' in html
    assert "&lt;b&gt;hi" in html
    assert re.search("…", words)
    assert "An answer that ends in … was cut." in words


def test_a_prompt_of_text_has_no_roles_and_old_runs_are_read(evolved, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(evolved, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for sample in lines[-1]["samples"]:
        assert sample.pop("turns") == []
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(run).ended.samples[1].prompt == make_rows(6, 40)[2]["prompt"].strip()
    assert read_run(run).ended.samples[1].turns == ()
