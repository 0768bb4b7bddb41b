from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import make_examples, make_rows
from families import RELATIVE
from tokenizers_for_tests import chatml_tokenizer, make_tokenizer, t5_tokenizer
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from evollm import DPO, DataError, PreferenceGym, RewardGym, SFTGym, UnpairedGym, inspect_data
from evollm.cli import main
from evollm.errors import ConfigurationError
from evollm.inspection import Fit, Lengths, RenderedRow


def row(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_kept_and_dropped_rows_and_lengths_are_those_of_the_gym(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*make_rows(8), row("a", " b", " b"), row("a", " ", " b")]
    found = inspect_data(rows, tokenizer)
    gym = PreferenceGym(rows, None, tokenizer)
    assert (found.report.kept, found.report.dropped) == (8, gym.reports["train"].dropped)
    assert found.num_tokens == sum(pair.num_tokens for pair in gym.train_pairs)
    assert found.lengths["whole"].longest == max(pair.num_tokens for pair in gym.train_pairs)
    prompts = sum(len(pair.prompt_ids) for pair in gym.train_pairs)
    assert found.prompt_share == prompts / found.num_tokens


@pytest.mark.parametrize("limit", [14, 18, 20, 24])
def test_what_a_length_would_do_is_what_it_does_in_the_gym(tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
    rows = make_rows(12)
    found = inspect_data(rows, tokenizer, max_context_length=limit)
    (fit,) = [fit for fit in found.fits if fit.limit == limit]
    if not found.report.kept:
        with pytest.raises(DataError):
            PreferenceGym(rows, None, tokenizer, max_context_length=limit)
        assert fit == Fit(limit, 0, 12)
        return
    report = PreferenceGym(rows, None, tokenizer, max_context_length=limit).reports["train"]
    assert (found.report.kept, found.report.dropped) == (report.kept, report.dropped)
    assert found.report.prompts_cut == report.prompts_cut == fit.prompts_cut
    assert fit.too_long == report.num_dropped
    assert found.fits[-1].too_long == 0


def test_percentiles_are_lengths_that_there_are() -> None:
    assert Lengths.of(range(1, 101)) == Lengths(51, 91, 100, 100)
    assert Lengths.of([7]) == Lengths(7, 7, 7, 7)


def test_repetitions_contradictions_and_overlap_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row("a?", " b", " c"), row("a?", " b", " c"), row("a?", " c", " b"), row("d?", " b", " c")]
    found = inspect_data(rows, tokenizer, against=[row("d?", " b", " c")])
    assert (found.duplicates, found.repeated_prompts, found.contradictions, found.overlap) == (1, 2, 1, 1)
    assert inspect_data(rows, tokenizer).overlap is None


def test_the_longer_side_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        row("a?", " yes or no", " yes"),
        row("b?", " yes", " no"),
        row("c?", " yes or", " no"),
        row("d?", " a", " b c"),
    ]
    found = inspect_data(rows, tokenizer)
    assert (found.chosen_longer, found.rejected_longer) == (0.5, 0.25)


def test_rows_are_rendered_with_what_is_scored_and_their_special_tokens() -> None:
    chat = {
        "prompt": [{"role": "user", "content": "Is it?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    found = inspect_data([chat | {"chosen": []}, chat], chatml_tokenizer())
    prompt = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
    assert found.examples == (RenderedRow(1, prompt, "yes<|im_end|>\n", "no<|im_end|>\n", 6),)


@pytest.mark.parametrize("wrap", [list, iter])
@pytest.mark.parametrize("sft", [None, True])
def test_examples_are_known_by_their_columns(tokenizer: PreTrainedTokenizerFast, wrap: Any, sft: bool | None) -> None:
    found = inspect_data(wrap(make_examples(6)), tokenizer, sft=sft)
    gym = SFTGym(make_examples(6), None, tokenizer)
    assert (found.report.noun, found.report.kept) == ("example", 6)
    assert list(found.lengths) == ["prompt", "completion", "whole"]
    assert found.num_tokens == sum(pair.num_tokens for pair in gym.train_pairs)
    assert found.chosen_longer is None
    assert found.examples[0].rejected is None


def test_rows_that_are_all_dropped_are_a_finding(tokenizer: PreTrainedTokenizerFast) -> None:
    found = inspect_data([row("a", " b", " b")], tokenizer)
    assert (found.report.kept, found.report.num_dropped, found.examples) == (0, 1, ())


def test_the_forecast_counts_the_adapters_that_agents_have(make_model, model_folder: Path) -> None:
    found = inspect_data(make_rows(4), str(model_folder), population=3).forecast
    assert found is not None
    model = make_model()
    assert found.base_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    agent = DPO(actor_network=model)
    assert found.adapter_parameters == sum(p.numel() for p in agent.actor_parameters())
    trained, reference = 16 * found.adapter_parameters * 3, 4 * found.adapter_parameters
    assert found.memory_bytes == found.base_bytes + trained + reference + found.activation_bytes
    assert found.seconds is None


def test_the_forecast_recomputes_where_a_run_would(model_folder: Path, monkeypatch) -> None:
    found = []
    for free in (2**40, 2**20):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        forecast = inspect_data(make_rows(4), str(model_folder)).forecast
        assert forecast is not None
        found.append(forecast.activation_bytes)
    assert found[0] > 4 * found[1]


@pytest.mark.parametrize("rows", [make_rows(4), make_examples(4)])
def test_an_estimate_times_the_model_itself(model_folder: Path, rows: list[Any]) -> None:
    found = inspect_data(rows, model_folder, epochs=2, estimate=True).forecast
    assert found is not None
    assert (found.seconds or 0) > 0
    assert found.activation_bytes > 0


def test_an_encoder_decoder_is_read_as_its_gym_reads_it(tmp_path: Path) -> None:
    tokenizer = t5_tokenizer()
    T5ForConditionalGeneration(T5Config(**{**RELATIVE, "vocab_size": len(tokenizer)})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [{"prompt": f"say {number}", "chosen": "yes", "rejected": "no"} for number in range(4)]
    found = inspect_data(rows, tmp_path)
    gym = PreferenceGym(rows, None, tokenizer, encoder_decoder=True)
    assert found.num_tokens == sum(pair.num_tokens for pair in gym.train_pairs)
    assert found.examples[0].prompt == "say 0</s>"
    assert found.forecast is not None


def test_a_tokenizer_alone_is_enough(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert inspect_data(make_rows(2), tmp_path).forecast is None
    with pytest.raises(ConfigurationError, match="model_name="):
        inspect_data(make_rows(2), tmp_path, estimate=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "/absent"}, "model='/absent': no such folder"),
        ({"model": 7}, "model=7: must be the name"),
        ({"data": "/absent.jsonl"}, "data='/absent.jsonl': no such file"),
        ({"data": [{"a": 1}]}, "lacks chosen and rejected"),
        ({"data": [{"completion": "a"}]}, "lacks prompt"),
        ({"split": "test"}, "split='test': is for a dataset on the hub"),
        ({"population": 0}, "population=0"),
        ({"max_context_length": 1}, "max_context_length=1"),
        ({"sft": "yes"}, "sft='yes'"),
    ],
)
def test_what_cannot_be_inspected_is_refused(arguments: dict[str, Any], message: str) -> None:
    good = {"data": make_rows(2), "model": make_tokenizer()}
    with pytest.raises(ConfigurationError, match=message):
        inspect_data(**{**good, **arguments})


def test_the_command_prints_what_was_understood(model_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = [*make_rows(5), row("[bold]a[/]", " b", " b")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["inspect", str(tmp_path / "pairs.jsonl"), "--model", str(model_folder), "--population", "8"]) == 0
    out = capsys.readouterr().out
    for line in (
        "5 pairs kept, 1 dropped",
        "  1 chosen == rejected: row 5",
        "at max_context_length 256: 0 prompts cut, 0 too long",
        "0 are repetitions",
        "▌ yes, Ann</s>▐",
        "Estimate for 8 agents",
    ):
        assert line in out


PAIR = {"prompt": "Is it?", "chosen": " yes", "rejected": " no"}


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ([PAIR | {"id": 1, "source": "s"}], ["Columns read: prompt, chosen, rejected", "Columns not used: id, source"]),
        (
            [{"instruction": "Is it?", "output": "yes", "category": "c", "text": "x"}],
            ["Columns read: instruction as prompt, output as completion", "Columns not used: category, text"],
        ),
        ([PAIR], ["Columns read: prompt, chosen, rejected", "1 pair kept, 0 dropped"]),
    ],
)
def test_the_command_lists_what_each_column_is_and_every_column_that_is_not_used(
    rows: list[Any], lines: list[str], model_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["inspect", str(tmp_path / "a.jsonl"), "--model", str(model_folder)]) == 0
    assert capsys.readouterr().out.splitlines()[: len(lines)] == lines


@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        ([{"prompt": "Is it?", "completion": " yes", "label": label} for label in (True, False)], ["--sft"]),
        ([{"text": text, "label": label} for text, label in (("It is so.", 1), ("It is not.", 0))], []),
    ],
)
def test_rows_of_unpaired_preferences_are_said_to_be_used_for_sft(
    rows: list[Any], flags: list[str], model_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert main(["inspect", str(tmp_path / "a.json"), "--model", str(model_folder), *flags]) == 0
    out = capsys.readouterr().out
    assert "unpaired preferences): used for SFT" in out
    assert "1 example kept, 1 dropped\n  1 labelled as not preferred: row 1\n" in out


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (
            (1, 1, 1, 0),
            "3 desirable and 1 undesirable answers; recommended are either desirable_weight from 0.333 to 0.444 or "
            "undesirable_weight from 2.25 to 3",
        ),
        ((True, True), "2 desirable and 0 undesirable answers: KTO needs both; --sft reads"),
    ],
)
def test_labels_are_counted_and_weights_recommended(
    labels: tuple[object, ...], said: str, model_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = [{"prompt": "Is it?", "completion": f" yes {label}", "label": label} for label in labels]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert main(["inspect", str(tmp_path / "a.json"), "--model", str(model_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Columns read: prompt, completion, label"
    assert lines[1].startswith(f"Rows with a label (unpaired preferences): for KTO, algorithm: kto; {said}")
    assert lines[2] == f"{len(labels)} answers kept, 0 dropped"


@pytest.mark.parametrize(
    "rows", [[row("a", " b", " b")], [PAIR | {"chosen": None}], [{"messages": [{"role": "user", "content": "a"}]}] * 2]
)
def test_the_command_fails_when_no_row_is_kept(rows: list[Any], model_folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["inspect", str(tmp_path / "a.jsonl"), "--model", str(model_folder)]) == 1
    said = capsys.readouterr()
    assert " kept, " in said.out
    assert said.err.startswith("evollm: data=")
    assert "no row can be used" in said.err


@pytest.mark.parametrize(
    ("mapping", "status"),
    [("{prompt: question}", 0), ("prompt: question", 0), ("[question]", 1), ("{prompt: answer}", 1)],
)
def test_the_command_takes_a_mapping_of_columns(
    mapping: str, status: int, model_folder: Path, tmp_path: Path, capsys
) -> None:
    rows = [{"question": "Is it?", "chosen": " yes", "rejected": " no"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["inspect", str(tmp_path / "a.jsonl"), "--model", str(model_folder), "--columns", mapping]
    assert main(command) == status
    assert ("question as prompt" in capsys.readouterr().out) is (status == 0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"first": "a"}, "names one of two answers: say second too"),
        ({"promt": "a"}, r"columns\.promt='a': is none of"),
        ({"prompt": "question", "completion": "anser"}, "has no column 'anser'.*perhaps 'answer'"),
        ({"first": "question", "second": "ansr", "label": "l"}, "has no column 'ansr'"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused_as_the_format_that_takes_it_does(
    columns: Any, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        inspect_data([{"question": "a", "answer": "b"}], tokenizer, columns=columns)


def test_rows_of_examples_under_other_names_are_told_which_they_could_be(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question": "a", "answer": "b"}]
    with pytest.raises(DataError, match=r"lacks completion.*columns: \{prompt: question, completion: answer\}"):
        inspect_data(rows, tokenizer)
    columns = {"prompt": "question", "completion": "answer"}
    assert inspect_data(rows, tokenizer, columns=columns).report.kept == 1
    with pytest.raises(DataError, match=r"algorithm: sft, or --sft"):
        inspect_data([{"prompt": "a", "completion": "b"}], tokenizer, sft=False)


def test_the_command_says_in_a_line_what_is_wrong(tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    assert main(["inspect", str(tmp_path / "broken.jsonl"), "--model", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("evollm: ")


def test_prompts_alone_are_counted_as_their_gym_counts_them(tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[Any] = [{"prompt": f"Question {number % 5}:" + " please" * number, "answer": "a"} for number in range(9)]
    rows += [rows[0] | {"answer": "b"}, {"prompt": " "}, {"prompt": None}]
    found = inspect_data(rows, tokenizer, grpo=True, max_context_length=9, against=rows[:2])
    gym = RewardGym(rows, None, tokenizer, lambda completions: [0] * len(completions), max_context_length=9)
    report = gym.reports["train"]
    assert (found.report.noun, found.report.kept, found.report.dropped) == ("prompt", 10, report.dropped)
    assert found.report.prompts_cut == report.prompts_cut > 0
    (fit,) = [fit for fit in found.fits if fit.limit == 9]
    assert fit == Fit(9, report.prompts_cut, 0)
    whole = RewardGym(rows, None, tokenizer, lambda completions: [0] * len(completions))
    assert list(found.lengths) == ["prompt"]
    assert found.num_tokens == sum(len(prompt.prompt_ids) for prompt in whole.train_pairs)
    assert (found.duplicates, found.repeated_prompts, found.overlap) == (0, 1, 2)
    assert found.unused == ("answer",)
    assert (found.examples[0].chosen, found.examples[0].num_scored) == (None, 0)


def test_shares_of_sets_are_those_of_the_gym_and_the_time_is_that_of_its_epochs(
    make_model, tokenizer, tmp_path
) -> None:
    sets = {"helpful": [*make_rows(12), row("a", " b", " b")], "harmless": make_rows(6, 100)}
    weights = {"helpful": 1, "harmless": 3}
    found = inspect_data(sets, tokenizer, dataset_weights=weights, against=make_rows(2))
    gym = PreferenceGym(sets, None, tokenizer, dataset_weights=weights)
    shown = {name: {"weight": one.weight, "rows": one.rows, "drawn": one.drawn} for name, one in found.sets.items()}
    assert shown == gym.sets
    assert found.report.dropped == gym.reports["train"].dropped
    assert {name: one.num_dropped for name, one in found.sets.items()} == {"helpful": 1, "harmless": 0}
    assert (found.report.kept, found.overlap) == (18, 2)
    assert [one.set_name for one in found.examples] == ["helpful", "helpful", "harmless"]
    # An average over epochs, of which each has other rows.
    epochs = [sum(pair.num_tokens for pair in gym.epoch_pairs(epoch)) for epoch in range(12)]
    assert sum(one.epoch_tokens for one in found.sets.values()) == pytest.approx(np.mean(epochs))
    labelled = {
        name: [
            {"prompt": one["prompt"], "completion": one["chosen"], "label": number % place == 0}
            for number, one in enumerate(rows)
        ]
        for place, (name, rows) in enumerate((("helpful", make_rows(12)), ("harmless", make_rows(6, 100))), 2)
    }
    answers = UnpairedGym(labelled, None, tokenizer, dataset_weights=weights)
    assert inspect_data(labelled, tokenizer, dataset_weights=weights).balance == answers.balance
    empty = inspect_data({**sets, "empty": [row("a", " b", " b")]}, tokenizer, dataset_weights={**weights, "empty": 1})
    assert [one.drawn for one in empty.sets.values()] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grpo": True, "sft": True}, "sft=True: examples have completions"),
        ({"grpo": True, "min_completion_length": 2}, "min_completion_length=2: prompts alone have no completion"),
        ({"grpo": True, "estimate": True}, "estimate=True: what GRPO takes is known from its answers"),
        ({"grpo": "yes"}, "grpo='yes': must be True or False"),
        ({"data": [{"prompt": "a", "answer": "b"}]}, "are read with --grpo"),
        ({"dataset_weights": {"a": 1}}, "data='list': with dataset_weights it must map names to rows"),
        ({"data": {"a": make_rows(2)}, "dataset_weights": {"b": 1}}, "dataset_weights.b=1.0: is the weight of no set"),
        ({"data": {"a": make_rows(2)}, "dataset_weights": {"a": 0}}, "dataset_weights.a=0: must be a number above 0"),
        ({"data": {"a": "x/y"}, "dataset_weights": {"a": 1}, "split": "test"}, "split='test': is for one dataset"),
        (
            {"data": {"a": make_rows(2), "b": make_examples(2)}, "dataset_weights": {"a": 1, "b": 1}},
            r"data\.b=.*lacks",
        ),
    ],
)
def test_what_says_nothing_of_prompts_or_sets_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        inspect_data(**{"data": make_rows(2), "model": make_tokenizer(), **arguments})


def test_the_command_reads_prompts_and_sets(model_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for name, rows in (
        ("asked", [{"prompt": "Is it?", "answer": "yes"}] * 2),
        ("a", make_rows(6)),
        ("b", make_rows(2, 100)),
        ("none", [row("a", " b", " b")]),
    ):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["inspect", "--model", str(model_folder)]
    assert main([*command, "asked.jsonl", "--grpo"]) == 0
    out = capsys.readouterr().out
    for line in (
        "Columns read: prompt\nColumns for the reward functions: answer\n2 prompts kept, 0 dropped",
        "tokens of prompts\n",
        "at max_context_length 256: 0 prompts cut\n",
        "1 are a prompt that was there before",
        "row 0, as it is answered\n    <s>Is it?",
        "No estimate: what GRPO takes depends on its answers",
    ):
        assert line in out
    weights = ["--dataset-weights", "{a: 1, b: 3}"]
    assert main([*command, "a=a.jsonl", "b=b.jsonl", *weights]) == 0
    out = capsys.readouterr().out
    (line,) = [line.split() for line in out.splitlines() if line.split()[:2] == ["b", "3"]]
    assert line[:6] == ["b", "3", "2", "0", "6", "75.0%"]
    assert line[-1] == "3.00"
    assert "8 pairs kept, 0 dropped" in out
    assert "row 0 of a, " in out
    for files, message in (
        (["a.jsonl", "b=b.jsonl"], "data='a.jsonl': with --dataset-weights write name=data"),
        (["a=a.jsonl", "a=b.jsonl"], "has a name twice"),
        (["a=a.jsonl", "b=none.jsonl"], "data.b='none.jsonl': no row can be used"),
    ):
        assert main([*command, *files, *weights]) == 1
        assert message in capsys.readouterr().err
