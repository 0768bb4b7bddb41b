"""Rows as LLaMA-Factory, axolotl, UltraFeedback, PKU-SafeRLHF, PandaLM and LLMBar have them, from every container."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from tokenizers_for_tests import chatml_tokenizer, make_tokenizer

from evollm import ConfigurationError, DataError, PreferenceGym, SFTGym
from evollm.config import parse_config
from evollm.data import read_examples, read_pairs
from evollm.data.completion_rows import EXAMPLES, UNKNOWN_LABEL
from evollm.data.loading import load_pairs
from evollm.data.pairs import ChatPair, TextPair
from evollm.data.preference_rows import PAIRS
from evollm.data.prompts import ENDS_WITH_ANSWER, OTHERS_IN_COMPLETION, TWO_SYSTEMS
from evollm.data.rows import NO_SIDE_IS_BETTER, PROMPT_TWICE, REPEATED_PROMPT, RowFormat, read_dataset

Json = dict[str, Any]


def user(content: str) -> Json:
    return {"role": "user", "content": content}


def bot(content: str) -> Json:
    return {"role": "assistant", "content": content}


def system(content: str) -> Json:
    return {"role": "system", "content": content}


def says(who: str, value: str) -> Json:
    return {"from": who, "value": value}


def _written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _as_text(rows: list[Json]) -> list[Json]:
    return [
        {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in row.items()}
        for row in rows
    ]


def _frame_file(rows: list[Json], path: Path, write: str) -> Path:
    getattr(pd.DataFrame(_as_text(rows)), write)(path, index=False)
    return path


def _parquet(rows: list[Json], path: Path) -> Path:
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


CONTAINERS: dict[str, Callable[[list[Json], Path], object]] = {
    "rows": lambda rows, _: rows,
    "generator": lambda rows, _: iter(rows),
    "dictionary of columns": lambda rows, _: {name: [row.get(name) for row in rows] for name in rows[0]},
    "Dataset": lambda rows, _: datasets.Dataset.from_list(rows),
    "IterableDataset": lambda rows, _: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "stream of unknown columns": lambda rows, _: datasets.IterableDataset.from_generator(lambda: iter(rows)),
    "DataFrame": lambda rows, _: pd.DataFrame(rows),
    "Table": lambda rows, _: pa.Table.from_pylist(rows),
    "JSONL": lambda rows, path: _written(path / "a.jsonl", "\n".join(map(json.dumps, rows))),
    "JSON array": lambda rows, path: _written(path / "a.json", json.dumps(rows, indent=2)),
    "JSON array on one line": lambda rows, path: _written(path / "a.jsonl", "\ufeff" + json.dumps(rows)),
    "JSON array, compressed": lambda rows, path: _written(path / "a.json.gz", gzip.compress(json.dumps(rows).encode())),
    "Parquet": lambda rows, path: _parquet(rows, path / "a.parquet"),
    "CSV": lambda rows, path: _frame_file(rows, path / "a.csv", "to_csv"),
    "Parquet of JSON text": lambda rows, path: _frame_file(rows, path / "a.parquet", "to_parquet"),
    "rows of JSON text": lambda rows, _: _as_text(rows),
    "JSONL of JSON text": lambda rows, path: _written(path / "a.jsonl", "\n".join(map(json.dumps, _as_text(rows)))),
    "list of files": lambda rows, path: [
        _written(path / "a.json", json.dumps(rows[:1])),
        _written(path / "b.jsonl", "\n".join(map(json.dumps, rows[1:]))),
    ],
}

# For each shape two rows, and what the second of them is.
ALPACA = [
    {"instruction": "Translate.", "input": "tea", "output": "Tee", "history": [["Hi", "Hello"]], "system": "Be brief."},
    {"instruction": "Sum up.", "input": "It rains.", "output": "Rain", "history": [["a", "b"]], "system": "Be kind."},
]
ALPACA_GIVEN = [system("Be kind."), user("a"), bot("b"), user("Sum up.\nIt rains.")]
ALPACA_PAIRS = [
    {**{name: value for name, value in row.items() if name != "output"}, "chosen": row["output"], "rejected": "No"}
    for row in ALPACA
]
TALK = [says("human", "Hi"), says("gpt", "Hello"), says("human", "Tea?")]
TALK_READ = [user("Hi"), bot("Hello"), user("Tea?")]
FIRST_TALK = [says("human", "Coffee?")]
FEEDBACK = [
    {
        "prompt": prompt,
        "prompt_id": "x",
        "chosen": [user(prompt), bot("Yes")],
        "rejected": [user(prompt), bot("No")],
        "messages": [user(prompt), bot("Yes")],
        "score_chosen": score,
        "score_rejected": 5.0,
    }
    for prompt, score in (("Coffee?", 8.5), ("Tea?", 2.0))
]
SAFE = [
    {"prompt": "Coffee?", "response_0": " yes", "response_1": " no", "better_response_id": 0, "safer_response_id": 0},
    {"prompt": "Tea?", "response_0": " yes", "response_1": " no", "better_response_id": 1, "safer_response_id": 0},
]
SHAPES: dict[str, tuple[RowFormat, list[Json], TextPair | ChatPair]] = {
    "alpaca": (EXAMPLES, ALPACA, ChatPair(1, ALPACA_GIVEN, [bot("Rain")])),
    "alpaca without system": (
        EXAMPLES,
        [
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Hail.", "input": "", "output": "Hi"},
        ],
        ChatPair(1, [user("Hail.")], [bot("Hi")]),
    ),
    "alpaca pairs": (PAIRS, ALPACA_PAIRS, ChatPair(1, ALPACA_GIVEN, [bot("Rain")], [bot("No")])),
    "ShareGPT, sides as one message": (
        PAIRS,
        [{"conversations": t, "chosen": says("gpt", "Yes"), "rejected": says("gpt", "No")} for t in (FIRST_TALK, TALK)],
        ChatPair(1, TALK_READ, [bot("Yes")], [bot("No")]),
    ),
    "ShareGPT, sides as lists": (
        PAIRS,
        [
            {"conversations": t, "chosen": [says("gpt", "Y")], "rejected": [says("gpt", "N")]}
            for t in (FIRST_TALK, TALK)
        ],
        ChatPair(1, TALK_READ, [bot("Y")], [bot("N")]),
    ),
    "ShareGPT, sides as text": (
        PAIRS,
        [{"conversations": t, "chosen": "So it is", "rejected": "So it was"} for t in (FIRST_TALK, TALK)],
        ChatPair(1, TALK_READ, [bot("So it is")], [bot("So it was")]),
    ),
    "ShareGPT with a system column": (
        PAIRS,
        [{"conversations": t, "system": "Be kind.", "chosen": "Y", "rejected": "N"} for t in (FIRST_TALK, TALK)],
        ChatPair(1, [system("Be kind."), *TALK_READ], [bot("Y")], [bot("N")]),
    ),
    "messages and sides": (
        PAIRS,
        [{"messages": t, "chosen": bot("Y"), "rejected": bot("N")} for t in ([user("Coffee?")], TALK_READ)],
        ChatPair(1, TALK_READ, [bot("Y")], [bot("N")]),
    ),
    "ShareGPT": (
        EXAMPLES,
        [{"conversations": [*t, says("gpt", "Y")], "system": "Be kind."} for t in (FIRST_TALK, TALK)],
        ChatPair(1, [system("Be kind."), *TALK_READ], [bot("Y")]),
    ),
    "messages": (
        EXAMPLES,
        [{"messages": [*t, bot("Y")], "prompt": "Tea?"} for t in ([user("Tea?")], TALK_READ)],
        ChatPair(1, TALK_READ, [bot("Y")]),
    ),
    "system beside strings": (
        PAIRS,
        [{"system": "Be kind.", "prompt": p, "chosen": "Y", "rejected": "N"} for p in ("Coffee?", "Tea?")],
        ChatPair(1, [system("Be kind."), user("Tea?")], [bot("Y")], [bot("N")]),
    ),
    "system beside whole conversations": (
        PAIRS,
        [{"system": "S", "chosen": [user(p), bot("Y")], "rejected": [user(p), bot("N")]} for p in ("Coffee?", "Tea?")],
        ChatPair(1, [system("S"), user("Tea?")], [bot("Y")], [bot("N")]),
    ),
    "UltraFeedback": (PAIRS, FEEDBACK, ChatPair(1, [user("Tea?")], [bot("Yes")], [bot("No")])),
    "the better of two": (PAIRS, SAFE, TextPair(1, "Tea?", " no", " yes")),
    "the safer of two": (
        PAIRS,
        [{name: value for name, value in row.items() if name != "better_response_id"} for row in SAFE],
        TextPair(1, "Tea?", " yes", " no"),
    ),
    "text prompt and answers as messages": (
        PAIRS,
        [{"prompt": p, "chosen": [bot("Y")], "rejected": [bot("N")]} for p in ("Coffee?", "Tea?")],
        ChatPair(1, [user("Tea?")], [bot("Y")], [bot("N")]),
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_understood_in_every_container(shape: str, container: str, tmp_path: Path) -> None:
    row_format, rows, second = SHAPES[shape]
    pairs, dropped = read_dataset(CONTAINERS[container](rows, tmp_path), "data", row_format)
    assert not dropped
    assert [pair.row for pair in pairs] == [0, 1]
    assert pairs[1] == second


def test_home_is_found_in_lists_of_files_too(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _written(tmp_path / "a.json", json.dumps(SAFE))
    assert read_pairs(["~/a.json", "~/a.json"], "data")[0][2:] == [
        TextPair(2, "Coffee?", " yes", " no"),
        TextPair(3, "Tea?", " no", " yes"),
    ]


def test_files_of_several_shapes_are_one_dataset(tmp_path: Path) -> None:
    rows = [SHAPES[shape][1][0] for shape in ("ShareGPT, sides as text", "alpaca pairs", "the better of two")]
    files = [_written(tmp_path / f"{n}.json", json.dumps([row])) for n, row in enumerate(rows)]
    pairs, dropped = read_pairs(files, "data")
    assert [pair.question for pair in pairs] == ["Coffee?", "Translate.\ntea", "Coffee?"]
    assert not dropped


# -------------------------------------------------------------------------------------------- what rows are turned into


def test_an_instruction_is_a_turn_where_there_is_a_template_and_lines_of_text_where_there_is_none() -> None:
    tokenizer = chatml_tokenizer()
    ((pair,), _) = load_pairs(ALPACA[:1], tokenizer, name="train", row_format=EXAMPLES)
    turns = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Translate.\ntea"))
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    assert (tokenizer.decode(pair.prompt_ids), tokenizer.decode(pair.chosen_ids)) == (prompt, "Tee<|im_end|>\n")
    plain = make_tokenizer()
    ((pair,), _) = load_pairs(ALPACA[:1], plain, name="train", row_format=EXAMPLES)
    assert plain.decode(pair.token_ids) == "Be brief.\nHi\nHello\nTranslate.\ntea\nTee</s>"
    ((pair,), _) = load_pairs(ALPACA_PAIRS[:1], plain, name="train")
    assert plain.decode([*pair.prompt_ids, *pair.rejected_ids]) == "Be brief.\nHi\nHello\nTranslate.\ntea\nNo</s>"


def test_a_completion_that_begins_with_a_space_is_not_put_on_a_new_line() -> None:
    tokenizer = make_tokenizer()
    row = {"instruction": "Is it", "output": " so"}
    ((pair,), _) = load_pairs([row], tokenizer, name="train", row_format=EXAMPLES)
    assert tokenizer.decode(pair.token_ids) == "Is it so</s>"


@pytest.mark.parametrize("history", [[["a", "b"]], '[["a", "b"]]', [[user("a")][0], bot("b")], (("a", "b"),)])
def test_history_is_pairs_of_turns_or_messages(history: Any) -> None:
    row = {"instruction": "c", "output": "d", "history": history}
    assert read_examples([row], "data")[0] == [ChatPair(0, [user("a"), bot("b"), user("c")], [bot("d")])]


@pytest.mark.parametrize("history", [None, [], "", "[]", float("nan")])
def test_no_history_is_no_turn(history: Any) -> None:
    row = {"instruction": "c", "output": "d", "history": history}
    assert read_examples([row], "data")[0] == [ChatPair(0, [user("c")], [bot("d")])]


@pytest.mark.parametrize("history", ["a", [["a"]], [["a", 7]], 7, [["a", "b", "c"]]])
def test_what_is_no_history_costs_its_row_and_is_counted(history: Any) -> None:
    rows = [{"instruction": "c", "output": "d", "history": history}, {"instruction": "c", "output": "d"}]
    examples, dropped = read_examples(rows, "data")
    assert (len(examples), list(dropped)) == (1, ["history is not a list of [question, answer]"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"system": "a", "prompt": [system("b"), user("c")], "chosen": [bot("d")], "rejected": [bot("e")]},
            TWO_SYSTEMS,
        ),
        ({"conversations": [*TALK, says("gpt", "a")], "chosen": "b", "rejected": "c"}, ENDS_WITH_ANSWER),
        ({"system": "a", "chosen": "It is b", "rejected": "It is c"}, "no message before the completion"),
        ({"conversations": "Tea?", "chosen": "b", "rejected": "c"}, "text and messages mixed"),
        ({"system": 7, "prompt": "a", "chosen": "b", "rejected": "c"}, "system is not text"),
    ],
)
def test_rows_that_do_not_fit_together_are_dropped_and_counted(row: Json, reason: str) -> None:
    assert read_pairs([row], "data") == ([], {reason: [0]})


def test_a_system_text_that_is_there_twice_is_there_once() -> None:
    row = {"system": "a", "prompt": [system("a"), user("c")], "chosen": [bot("d")], "rejected": [bot("e")]}
    assert read_pairs([row], "data")[0] == [ChatPair(0, [system("a"), user("c")], [bot("d")], [bot("e")])]


def test_a_conversation_that_ends_with_the_chosen_side_is_the_prompt_without_it() -> None:
    row = {"conversations": [*TALK, says("gpt", "b")], "chosen": "b", "rejected": "c"}
    assert read_pairs([row], "data")[0] == [ChatPair(0, TALK_READ, [bot("b")], [bot("c")])]


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "get_weather", "arguments": {"city": "Rome"}}]',
        '[{"content": "a"}]',
        '{"name": "x"}',
        '{"from": 7}',
        "[1, 2]",
    ],
)
def test_an_answer_that_is_json_and_no_messages_is_text(text: str) -> None:
    row = {"prompt": "Call:", "chosen": text, "rejected": "no"}
    assert read_pairs([row], "data") == ([TextPair(0, "Call:", text, "no")], {})


# ------------------------------------------------------------------------------------------------ sides and the prompt


@pytest.mark.parametrize("container", ["rows", "CSV", "Parquet", "stream of unknown columns"])
def test_the_prompt_is_taken_off_string_sides_that_repeat_it_in_all_rows(container: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": p, "chosen": f"{p} yes", "rejected": f"{p} no"} for p in ("Is it?", "Human: a\n\nAssistant:", "x")
    ]
    (first, second, _), dropped = read_pairs(CONTAINERS[container](rows, tmp_path), "data")
    assert (first, second) == (TextPair(0, "Is it?", " yes", " no"), TextPair(1, rows[1]["prompt"], " yes", " no"))
    assert not dropped
    _, report = load_pairs(rows, make_tokenizer(), name="train")
    assert report.warning == f"3 with {REPEATED_PROMPT}: rows 0, 1, 2"
    examples, _ = read_examples([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows], "data")
    assert examples[0] == TextPair(0, "Is it?", " yes")


@pytest.mark.parametrize("other", [{"chosen": "yes", "rejected": "Is it? no"}, {"chosen": " a", "rejected": " b"}])
def test_sides_that_repeat_the_prompt_in_some_rows_stay_as_they_are(other: Json) -> None:
    rows = [{"prompt": "Is it?", "chosen": "Is it? yes", "rejected": "Is it? no"}, {"prompt": "Is it?", **other}]
    assert read_pairs(rows, "data")[0][0] == TextPair(0, "Is it?", "Is it? yes", "Is it? no")


def test_rows_that_are_missing_something_do_not_hide_that_the_prompt_is_repeated() -> None:
    rows = [{"prompt": "Is it?", "chosen": "Is it? yes", "rejected": r} for r in ("Is it? no", None)]
    assert read_pairs(rows, "data") == ([TextPair(0, "Is it?", " yes", " no")], {"rejected is missing": [1]})


def test_turns_of_others_in_a_completion_are_said() -> None:
    rows = [
        {"prompt": [user("a")], "chosen": [bot("b"), *more, bot("c")], "rejected": [bot("d")]}
        for more in ([user("e")], [{"role": "tool", "content": "x"}])
    ]
    _, report = load_pairs(rows, chatml_tokenizer(), name="train")
    assert report.warning == f"2 with {OTHERS_IN_COMPLETION}: rows 0, 1"


@pytest.mark.parametrize(
    ("names", "low"),
    [
        (("score_chosen", "score_rejected"), 2),
        (("chosen_score", "rejected_score"), "2.5"),
        (("chosen-rating", "rejected-rating"), 2.0),
        (("rating_chosen", "rating_rejected"), -1),
    ],
)
def test_pairs_whose_scores_say_the_reverse_are_kept_counted_and_said(names: Any, low: Any) -> None:
    rows = [
        {"prompt": f"{n}?", "chosen": " yes", "rejected": " no", names[0]: score, names[1]: 5}
        for n, score in enumerate((8, low, 5, None, low, "unknown"))
    ]
    pairs, report = load_pairs(rows, make_tokenizer(), name="train")
    assert len(pairs) == 6
    assert report.warning == "2 with a score of the chosen side below that of the rejected one: rows 1, 4"


def test_two_ids_that_disagree_are_said() -> None:
    _, report = load_pairs(SAFE, make_tokenizer(), name="train")
    assert report.warning == "1 with safer_response_id for the other side than better_response_id: row 1"
    assert read_dataset(SAFE, "data", PAIRS.with_columns({"label": "safer_response_id"}))[0][1] == TextPair(
        1, "Tea?", " yes", " no"
    )


# -------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        *((1, True), (0, False), ("1", True), ("0", False), (1.0, True), (0.0, False)),
        *(("TRUE", True), ("False", False), (" true ", True), (None, True), (float("nan"), True)),
    ],
)
def test_labels_of_examples_are_0_1_true_and_false(label: Any, kept: bool) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label}]
    examples, dropped = read_examples(rows, "data")
    assert (len(examples), list(dropped)) == ((1, []) if kept else (0, ["labelled as not preferred"]))


@pytest.mark.parametrize("label", ["bad", "good", 2, -1, 0.5, "yes", [True]])
def test_other_labels_of_examples_are_dropped_and_counted(label: Any) -> None:
    row = {"messages": [user("a"), bot("b")], "label": label}
    assert read_examples([row], "data") == ([], {UNKNOWN_LABEL: [0]})


def test_a_mapping_says_which_labels_of_examples_are_good() -> None:
    rows = [{"prompt": "a", "completion": "b", "rating": rating} for rating in ("up", "down", "UP", "sideways", 5)]
    columns = {"label": {"column": "rating", "good": ["up", 5], "bad": "down"}}
    examples, dropped = read_dataset(rows, "data", EXAMPLES.with_columns(columns))
    assert [example.row for example in examples] == [0, 2, 4]
    assert dropped == {"labelled as not preferred": [1], UNKNOWN_LABEL: [3]}


# ------------------------------------------------------------------------------------------------- what a mapping says

PANDA = [
    {"idx": n, "instruction": "Name it.", "input": "x", "response1": " a", "response2": " b", "annotator1": label}
    for n, label in enumerate((1, 2, 0))
]
BAR = [{"input": "Is it?", "output_1": " a", "output_2": " b", "label": label} for label in (1, 2)]
LETTERS = [{"query": "Is it?", "answer_a": " a", "answer_b": " b", "winner": label} for label in ("a", "B", "Tie")]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (PANDA, "prompt: instruction, input: input, first: response1, second: response2, label: {column: annotator1, "),
        (BAR, "prompt: input, first: output_1, second: output_2, label: {column: label, first: 1, second: 2, tie: 0}"),
        (
            LETTERS,
            "prompt: query, first: answer_a, second: answer_b, label: {column: winner, first: a, ",
        ),
    ],
)
def test_the_line_that_a_message_spells_out_loads_the_rows(
    rows: list[Json], line: str, container: str, tmp_path: Path
) -> None:
    data = CONTAINERS[container](rows, tmp_path)
    with pytest.raises(DataError, match="lacks chosen and rejected") as error:
        read_pairs(data, "data")
    assert line in str(error.value)
    spelt = str(error.value).split("as in ")[1].split(" (in ")[0]
    columns = parse_config(spelt, "message")["columns"]
    data = CONTAINERS[container](rows, tmp_path)
    pairs, dropped = read_dataset(data, "data", PAIRS.with_columns(columns))
    assert [pair.completions for pair in pairs] in (
        [(" a", " b"), (" b", " a")],
        [([bot(" a")], [bot(" b")]), ([bot(" b")], [bot(" a")])],
    )
    assert dropped == ({NO_SIDE_IS_BETTER: [2]} if len(rows) == 3 else {})


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"history": "Post.", "c_root_id_A": 1, "c_root_id_B": 2, "ref_A": "a", "ref_B": "b", "labels": 1},
            "{prompt: history, first: ref_A, second: ref_B, label: {column: labels,",
        ),
        (
            {"prompt": "a", "created_at_1": 1, "created_at_2": 2, "answer_1": "b", "answer_2": "c", "verdict": 1},
            "{first: answer_1, second: answer_2, label: {column: verdict,",
        ),
        (
            {"model_a": "x", "model_b": "y", "winner": "model_a", "conversation_a": TALK, "conversation_b": TALK},
            "{first: conversation_a, second: conversation_b, label: {column: winner,",
        ),
        (
            {"prompt": "a", "annotator_1": 1, "annotator_2": 2, "reply_1": "b", "reply_2": "c"},
            "{first: reply_1, second:",
        ),
    ],
)
def test_what_comes_in_twos_and_is_no_answer_is_not_taken_for_one(row: Json, line: str) -> None:
    with pytest.raises(DataError, match="lacks chosen and rejected") as error:
        read_pairs([row], "data")
    assert f"columns: {line}" in str(error.value)


def test_names_that_yaml_would_take_for_something_else_are_quoted() -> None:
    row = {"question": "a", "answer: 1": " b", "answer: 2": " c", "label": 1}
    with pytest.raises(DataError, match="as in columns") as error:
        read_pairs([row], "data")
    columns = parse_config(str(error.value).split("as in ")[1], "message")["columns"]
    assert read_dataset([row], "data", PAIRS.with_columns(columns))[0] == [TextPair(0, "a", " b", " c")]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question": "a", "accepted": "b", "rejected": "c"}, "{prompt: question, chosen: accepted}"),
        ({"query": "a", "context": "x", "chosen": "b", "dispreferred": "c"}, "input: context, rejected: dispreferred}"),
    ],
)
def test_sides_with_other_names_are_spelt_out(row: Json, line: str) -> None:
    with pytest.raises(DataError, match="lacks") as error:
        read_pairs([row], "data")
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question": "a", "answer": "b"}, "columns: {prompt: question, completion: answer}"),
        (
            {"instruction": "a", "context": "x", "response": "b", "category": "c"},
            "columns: {prompt: instruction, input: context, completion: response}",
        ),
    ],
)
def test_examples_with_other_names_are_spelt_out_and_load(row: Json, line: str) -> None:
    with pytest.raises(DataError, match="lacks completion") as error:
        read_examples([row], "data")
    assert line in str(error.value)
    columns = parse_config(line, "message")["columns"]
    (example,), _ = read_dataset([row], "data", EXAMPLES.with_columns(columns))
    assert example.question == "\n".join(filter(None, ("a", row.get("context"))))


def test_a_label_that_means_no_side_is_refused_with_its_column_value_and_row() -> None:
    columns = {"first": "output_1", "second": "output_2", "label": {"column": "label", "first": 1, "second": 2}}
    rows = [*BAR, {**BAR[0], "label": "both"}]
    with pytest.raises(DataError, match=r"label 'both' in row 2.*first: 1; second: 2.*columns\.label\.first") as error:
        read_dataset(rows, "data", PAIRS.with_columns({"prompt": "input", **columns}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [1, "1", 1.0, " 1 "])
def test_a_label_is_the_same_whatever_its_container_made_of_it(label: Any) -> None:
    columns = {
        "prompt": "input",
        "first": "output_1",
        "second": "output_2",
        "label": {"column": "label", "first": 2, "second": 1},
    }
    (pair,), _ = read_dataset([{**BAR[0], "label": label}], "data", PAIRS.with_columns(columns))
    assert pair == TextPair(0, "Is it?", " b", " a")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("prompt", "columns='prompt': must be a mapping"),
        ({"promt": "a"}, r"columns\.promt='a': is none of .*the nearest is 'prompt'"),
        ({"prompt": 7}, r"columns\.prompt=7: must be the name of a column"),
        ({"completion": "a"}, r"columns\.completion='a': is none of"),
        ({"ignore": 7}, r"columns\.ignore=7: must be a list"),
        ({"first": "a"}, "names one of two answers: say second too"),
        ({"first": "a", "second": "b"}, r"columns\.label=None: must say which answer is better"),
        ({"first": "a", "second": "b", "label": {"first": 1}}, r"columns\.label\.column=None"),
        (
            {"first": "a", "second": "b", "label": {"column": "l", "first": 1}},
            r"columns\.label\.second=None: say which value",
        ),
        (
            {"first": "a", "second": "b", "label": {"column": "l", "first": 1, "second": "1"}},
            r"columns\.label\.second='1': must be a value of the label that means nothing else",
        ),
        (
            {"first": "a", "second": "b", "label": {"column": "l", "third": 1}},
            r"columns\.label\.third=1: is none of column, first, second, tie",
        ),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(columns: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PreferenceGym(SAFE, None, make_tokenizer(), columns=columns)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "promt"}, r"has no column 'promt', which columns\.prompt names, perhaps 'prompt'"),
        (
            {"first": "response_0", "second": "response_1", "label": "better_response_id"},
            "which value of 'better_response_id' means what",
        ),
        ({"chosen": "response_0", "rejected": "response_1", "label": "better_response_id"}, "has no place in rows"),
    ],
)
def test_a_mapping_that_does_not_fit_the_columns_is_refused(columns: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PreferenceGym(SAFE, None, make_tokenizer(), columns=columns)


# ------------------------------------------------------------------------------------------------ columns that matter

PAIR = {"prompt": "Is it?", "chosen": " yes", "rejected": " no"}


@pytest.mark.parametrize("container", ["rows", "Dataset", "JSONL", "CSV", "stream of unknown columns"])
@pytest.mark.parametrize(
    ("row", "column", "fix"),
    [
        ({**PAIR, "input": "x"}, "input", "{input: input} or {ignore: [input]}"),
        ({**PAIR, "context": "x"}, "context", "{input: context} or {ignore: [context]}"),
        ({**PAIR, "Passage": "x"}, "Passage", "{input: Passage} or {ignore: [Passage]}"),
        ({**PAIR, "system_prompt": "x"}, "system_prompt", "{system: system_prompt} or"),
        ({**PAIR, "chat_history": "x"}, "chat_history", "{history: chat_history} or"),
        ({**PAIR, "dialogue": "x"}, "dialogue", "{prompt: dialogue} or"),
        ({**PAIR, "trajectory": "x"}, "trajectory", "{prompt: trajectory} or"),
        ({**PAIR, "instruction": "x"}, "instruction", "{prompt: instruction} or"),
        ({**PAIR, "functions": "x"}, "functions", "{tools: functions} or"),
        ({**PAIR, "winner": "model_b"}, "winner", "{ignore: [winner]}"),
        ({"instruction": "a", "chosen": "b", "rejected": "c", "context": "x"}, "context", "{input: context}"),
        ({"chosen": "It is a", "rejected": "It is b", "question": "x"}, "question", "{prompt: question}"),
    ],
)
def test_a_column_that_matters_and_is_not_used_is_refused_with_the_line_to_write(
    row: Json, column: str, fix: str, container: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        read_pairs(CONTAINERS[container]([row, row], tmp_path), "train_dataset")
    said = str(error.value)
    assert f"has a column {column!r} that would not be used" in said
    assert fix in said
    assert "\n" not in said
    ignoring = PAIRS.with_columns({"ignore": [column]})
    assert len(read_dataset(CONTAINERS[container]([row, row], tmp_path), "train_dataset", ignoring)[0]) == 2


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "a", "completion": "b", "input": "x"}, "input"),
        ({"messages": [user("a"), bot("b")], "system_message": "x"}, "system_message"),
        ({"messages": [user("a"), bot("b")], "chat_history": "x"}, "chat_history"),
        ({"text": "a", "context": "x"}, "context"),
        ({"text": "a", "system": "x"}, "system"),
        ({"text": "a", "tools": [{"name": "x"}]}, "tools"),
        ({"prompt": "a", "completion": "b", "passage": "x"}, "passage"),
    ],
)
def test_a_column_of_examples_that_matters_is_refused_too(row: Json, column: str) -> None:
    with pytest.raises(DataError, match=f"has a column '{column}' that would not be used"):
        read_examples([row], "train_dataset")
    assert len(read_dataset([row], "data", EXAMPLES.with_columns({"ignore": column}))[0]) == 1


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({**PAIR, "messages": [user("Something else?")]}, "messages"),
        ({**PAIR, "conversations": [says("human", "Hi"), says("gpt", "Hi"), says("human", "Is it?")]}, "conversations"),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")], "messages": [user("d")]}, "messages"),
        ({**PAIR, "tools": [{"name": "x"}]}, "tools"),
        ({**PAIR, "chat_template_kwargs": '{"enable_thinking": false}'}, "chat_template_kwargs"),
        ({"prompt": "Be a pirate.", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]}, "prompt"),
    ],
)
def test_a_row_that_says_more_than_is_used_is_refused_with_its_column(row: Json, column: str) -> None:
    with pytest.raises(DataError, match=rf"data='row 0': '{column}' .*ignore: \[{column}\]"):
        read_pairs([row], "data")
    assert len(read_dataset([row], "data", PAIRS.with_columns({"ignore": [column]}))[0]) == 1


ODD_PAIRS: list[tuple[Json, Json, str]] = [
    ({**PAIR, "messages": [user("Is it?")]}, {**PAIR, "messages": [user("Something else?")]}, "messages"),
    ({**PAIR, "tools": None}, {**PAIR, "tools": [{"name": "x"}]}, "tools"),
    (
        {"prompt": "a", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        {"prompt": "Be a pirate.", "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]},
        "prompt",
    ),
]


@pytest.mark.parametrize(("row", "odd", "column"), ODD_PAIRS)
def test_a_few_rows_that_say_more_than_is_used_are_dropped_and_counted_and_most_are_refused(
    row: Json, odd: Json, column: str
) -> None:
    pairs, dropped = read_pairs([row, odd, row], "data")
    assert [pair.row for pair in pairs] == [0, 2]
    ((reason, rows),) = dropped.items()
    assert rows == [1]
    assert reason.startswith(f"whose {column!r} ")
    report = load_pairs([row, odd, row], chatml_tokenizer(), name="train")[1]
    assert f"1 {reason}: row 1" in str(report)
    with pytest.raises(DataError, match=rf"data='row 0': '{column}' .*in 2 of 3 rows.*ignore: \[{column}\]"):
        read_pairs([odd, odd, row], "data")


def test_a_few_conversations_that_lack_their_prompt_are_dropped_and_counted_too() -> None:
    rows = [{"messages": [user("a"), bot("b")], "prompt": prompt} for prompt in ("a", "other", "a")]
    examples, dropped = read_examples(rows, "data")
    assert ([example.row for example in examples], list(dropped.values())) == ([0, 2], [[1]])


@pytest.mark.parametrize("tools", [None, [], "[]", float("nan")])
def test_no_tools_beside_text_are_no_tools(tools: Any) -> None:
    assert read_pairs([{**PAIR, "tools": tools}], "data") == ([TextPair(0, "Is it?", " yes", " no")], {})


def test_tools_beside_an_instruction_need_a_template() -> None:
    row = {**ALPACA[0], "tools": '[{"name": "x"}]'}
    with pytest.raises(DataError, match=r"tokenizer\.chat_template=None"):
        load_pairs([row], make_tokenizer(), name="train", row_format=EXAMPLES)


def test_a_prompt_that_is_not_in_its_messages_is_refused() -> None:
    row = {"messages": [user("a"), bot("b")], "prompt": "c"}
    with pytest.raises(DataError, match=r"data='row 0': 'prompt' is not what the messages say"):
        read_examples([row], "data")


# ---------------------------------------------------------------------------------------------------------------- gyms


def test_a_mapping_reaches_all_splits_of_a_gym_and_its_tokens_are_kept_for_it_alone(tmp_path: Path) -> None:
    columns = {
        "prompt": "input",
        "first": "output_1",
        "second": "output_2",
        "label": {"column": "label", "first": 1, "second": 2},
    }
    turned = {**columns, "label": {"column": "label", "first": 2, "second": 1}}
    other = [{**row, "input": "Or not?"} for row in BAR]

    def made(mapping: Json) -> tuple[str, int]:
        gym = PreferenceGym(BAR, other, make_tokenizer(), cache_dir=tmp_path, columns=mapping)
        assert (len(gym.train_pairs), len(gym.test_pairs)) == (2, 2)
        return gym.fingerprint, len(list(tmp_path.iterdir()))

    first, second, again = made(columns), made(turned), made(columns)
    assert first[0] == again[0] != second[0]
    assert (first[1], second[1], again[1]) == (2, 4, 4)


def test_the_mapping_of_one_gym_is_not_that_of_the_next() -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    SFTGym(rows, None, make_tokenizer(), columns={"prompt": "question", "completion": "answer"})
    with pytest.raises(DataError, match="lacks completion"):
        SFTGym(rows, None, make_tokenizer())


def test_nothing_is_said_once_for_each_row() -> None:
    rows = [{**row, "prompt": f"{n}?"} for n in range(40) for row in SAFE]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gym = PreferenceGym(rows, None, make_tokenizer())
    assert caught == []
    assert len(str(gym.reports["train"])) < 300


@pytest.mark.parametrize("container", ["rows", "JSONL", "Dataset", "stream of unknown columns"])
def test_a_row_that_leaves_out_what_others_have_is_dropped_and_counted(container: str, tmp_path: Path) -> None:
    rows = [PAIR, {"chosen": "It is a", "rejected": "It is b"}]
    pairs, dropped = read_pairs(CONTAINERS[container](rows, tmp_path), "data")
    assert ([pair.row for pair in pairs], dropped) == ([0], {"prompt is missing": [1]})
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}]
    assert read_examples(CONTAINERS[container](rows, tmp_path), "data")[1] == {"completion is missing": [1]}


# --------------------------------------------------------------------------------------- messages that are written out

WRITTEN_OUT = [
    json.dumps([{"id": 1, "content": "Tea?", "role": "user"}, {"id": 2, "content": "Yes", "role": "assistant"}]),
    json.dumps(json.dumps([user("Tea?"), bot("Yes")])),
    json.dumps(json.dumps([{"weight": 1, **says("human", "Tea?")}, {"weight": 1, **says("gpt", "Yes")}])),
    str([{"id": 1, **user("Tea?")}, {"id": None, **bot("Yes")}]),
]


@pytest.mark.parametrize("text", WRITTEN_OUT)
def test_messages_in_other_orders_or_written_out_twice_are_messages(text: str) -> None:
    (example,), _ = read_examples([{"messages": text}], "data")
    assert (example.prompt[0]["content"], example.chosen[0]["content"]) == ("Tea?", "Yes")


@pytest.mark.parametrize(
    "answer",
    [
        '[{"id": 1, "from": "Paris", "to": "Rome"}]',
        '"{quoted}"',
        '"[{"',
        "[{x}]",
        '[{"a": 1}]',
        '"a" and "b"',
    ],
)
def test_answers_that_are_json_or_in_quotation_marks_stay_text(answer: str) -> None:
    row = {"prompt": "a", "completion": answer}
    assert read_examples([row], "data") == ([TextPair(0, "a", answer)], {})


def test_a_prompt_that_only_some_rows_repeat_is_said_to_be_there_twice() -> None:
    rows = [{"prompt": "Is it?", "chosen": f"{p} yes", "rejected": f"{p} no"} for p in ("Is it?", "Is it?", "")]
    pairs, report = load_pairs(rows, make_tokenizer(), name="train")
    assert report.warning == f"2 with {PROMPT_TWICE}: rows 0, 1"
    assert len(pairs) == 3


def test_a_prompt_that_sides_repeat_but_for_the_space_around_it_is_said_to_be_there_twice() -> None:
    rows = [{"prompt": "Is it?\n", "chosen": "Is it? yes", "rejected": " Is it? no"}, {**PAIR, "prompt": "So"}]
    pairs, report = load_pairs(rows, make_tokenizer(), name="train")
    assert report.warning == f"1 with {PROMPT_TWICE}: row 0"
    assert len(pairs) == 2


@pytest.mark.parametrize("column", ["documents", "choices", "options", "knowledge"])
def test_what_a_question_is_asked_about_is_not_left_unused(column: str) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", column: "d"}
    with pytest.raises(DataError, match=rf"would not be used; say columns: {{input: {column}}} or {{ignore"):
        read_pairs([row], "data")
    (pair,), _ = read_dataset([row], "data", PAIRS.with_columns({"input": column}))
    assert pair.prompt == "a\nd"


@pytest.mark.parametrize("column", ["kto_tag", "is_safe", "desirable", "labels"])
def test_what_says_that_a_completion_is_good_is_not_left_unused(column: str) -> None:
    rows = [{"prompt": "a", "completion": f"b{value}", column: value} for value in (True, False, 1, 0)]
    with pytest.raises(DataError, match=f"column '{column}' that would not be used") as error:
        read_examples(rows, "data")
    line = str(error.value).split("say ")[1].split(", or {")[0]
    columns = parse_config(line, "message")["columns"]
    assert [e.row for e in read_dataset(rows, "data", EXAMPLES.with_columns(columns))[0]] == [0, 2]
