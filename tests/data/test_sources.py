from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from evollm.data.cells import EMPTY_COMPLETION, INVALID_UNICODE, MALFORMED_MESSAGES, WITHOUT_ROLES
from evollm.data.pairs import ChatPair, TextPair
from evollm.data.preference_rows import DIFFERENT_PROMPTS, SAME_COMPLETIONS, read_pairs
from evollm.data.rows import MIXED_KINDS, NO_PROMPT_MESSAGE
from evollm.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "Is it?", "chosen": " Yes.", "rejected": " No.", "id": 1},
    {"prompt": "Or else?", "chosen": " Then so.", "rejected": " Not so.", "id": 2},
]
TEXT_PAIRS = [TextPair(0, "Is it?", " Yes.", " No."), TextPair(1, "Or else?", " Then so.", " Not so.")]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def bot(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


CHAT_ROW = {"chosen": [user("Is it?"), bot("Yes.")], "rejected": [user("Is it?"), bot("No.")]}
CHAT_PAIR = ChatPair(0, [user("Is it?")], [bot("Yes.")], [bot("No.")])


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "Dataset": datasets.Dataset.from_list,
    "Dataset in pandas format": lambda rows: datasets.Dataset.from_list(rows).with_format("pandas"),
    "IterableDataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "IterableDataset of unknown columns": lambda rows: datasets.IterableDataset.from_generator(lambda: iter(rows)),
    "list": list,
    "generator": iter,
    "columns": columns,
    "DataFrame": pd.DataFrame,
    "DataFrame of arrays": lambda rows: pd.DataFrame(
        [{k: np.array(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    ),
    "Table": pa.Table.from_pylist,
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_pairs(container: str) -> None:
    assert read_pairs(CONTAINERS[container](ROWS), "data") == (TEXT_PAIRS, {})
    assert read_pairs(CONTAINERS[container]([CHAT_ROW]), "data") == ([CHAT_PAIR], {})


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
@pytest.mark.parametrize("as_type", [str, Path])
def test_json_lines_files_are_read(tmp_path: Path, suffix: str, as_type: type) -> None:
    path = tmp_path / f"pairs{suffix}"
    text = "\ufeff" + "\n\n".join(map(json.dumps, ROWS))  # blank lines and a byte-order mark do no harm
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    assert read_pairs(as_type(path), "data") == (TEXT_PAIRS, {})


@pytest.mark.parametrize("bad", ['{"chosen": "a"', '["a", "b"]', b'{"chosen": "\xff"}'])
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, bad: str | bytes) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n")
    with pytest.raises(DataError, match="line 2 "):
        read_pairs(path, "data")


def test_several_files_are_one_dataset_in_their_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number}?", "chosen": " Yes.", "rejected": " No."} for number in range(6)]
    write_lines(tmp_path / "c.jsonl", rows[:2])
    pd.DataFrame(rows[2:4]).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame(rows[4:]).to_parquet(tmp_path / "b.parquet")
    files = [tmp_path / "c.jsonl", str(tmp_path / "a.csv"), tmp_path / "b.parquet"]
    for several in (files, tuple(files)):
        assert read_pairs(several, "data") == read_pairs(rows, "data")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"', r"data='.*/bad\.jsonl': line 1 is not valid JSON"),
        ('{"prompt": "a", "answer": "b"}', r"data=.*lacks chosen and rejected.*\(in .*/bad\.jsonl\)"),
        ("", r"data='.*/bad\.jsonl': is empty \(0 bytes\)"),
        ("\n", r"data='.*/bad\.jsonl': has no rows"),
        (None, r"data='.*/bad\.jsonl': no such file"),
    ],
)
def test_the_file_of_several_that_is_at_fault_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    write_lines(tmp_path / "good.jsonl", ROWS)
    if content is not None:
        (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_pairs([tmp_path / "good.jsonl", tmp_path / "bad.jsonl"], "data")


def test_an_incomplete_gzip_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())[:-9])
    with pytest.raises(DataError, match="not a whole gzip file"):
        read_pairs(path, "data")


def test_parquet_and_csv_files_are_read(tmp_path: Path) -> None:
    pd.DataFrame(ROWS).to_parquet(tmp_path / "pairs.parquet")
    pd.DataFrame(ROWS).to_csv(tmp_path / "pairs.csv", index=False)
    for name in ("pairs.parquet", "pairs.csv"):
        assert read_pairs(tmp_path / name, "data") == (TEXT_PAIRS, {})
    pa.parquet.write_table(pa.Table.from_pylist([CHAT_ROW]), tmp_path / "chat.parquet")
    assert read_pairs(str(tmp_path / "chat.parquet"), "data") == ([CHAT_PAIR], {})


def test_the_cells_of_a_csv_file_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text('prompt,chosen,rejected\n6 times 7?,42,NA\n"a, b\nand c?",1e5,\n')
    pairs, dropped = read_pairs(tmp_path / "pairs.csv", "data")
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [("6 times 7?", "42", "NA")]
    assert dropped == {"rejected is missing": [1]}


def test_a_name_on_the_hub_is_loaded_with_its_split(monkeypatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:  # the hub cannot be reached by tests
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_pairs("org/some-pairs", "data") == read_pairs("org/some-pairs:test_prefs", "data") == (TEXT_PAIRS, {})
    assert asked == [("org/some-pairs", "train"), ("org/some-pairs", "test_prefs")]


def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"data='org/nothing-of-that-name': is no file here and not in the cache of datasets"
    ):
        read_pairs("org/nothing-of-that-name", "data")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "no such file"),
        ("absent", "no such file"),
        ("folder", "is a folder without data files"),
        ("pairs.txt", "is of no kind that is read"),
        ("pairs.parquet", "is not a whole Parquet file"),
        ("blank.csv", "is not a CSV file with a header"),
        ("empty.csv", r"is empty \(0 bytes\)"),
        ("empty.parquet", r"is empty \(0 bytes\)"),
        ("empty.json", r"is empty \(0 bytes\)"),
        ("lfs.jsonl", "is a pointer of Git LFS and not the data; run git lfs pull"),
        ("lfs.parquet", "is a pointer of Git LFS and not the data; run git lfs pull"),
        ("lfs.csv", "is a pointer of Git LFS and not the data; run git lfs pull"),
    ],
)
def test_a_path_that_cannot_be_read_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    for file in ("pairs.txt", "empty.csv", "empty.parquet", "empty.json"):
        (tmp_path / file).touch()
    for file in ("pairs.parquet", "blank.csv"):
        (tmp_path / file).write_text("\n")
    for file in ("lfs.jsonl", "lfs.parquet", "lfs.csv"):
        (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=rf"train_dataset='.*{name}': {message}"):
        read_pairs(tmp_path / name, "train_dataset")


def test_a_dataset_dict_is_refused_with_the_names_of_its_splits() -> None:
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS))
    with pytest.raises(DataError, match=r"\['test', 'train'\]"):
        read_pairs(splits, "data")


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_missing_column_is_reported_with_the_columns_seen(container: str) -> None:
    rows = [{"question": "a", "chosen": "b"}]
    with pytest.raises(DataError, match=r"data=.*'question', 'chosen'.*lacks rejected"):
        read_pairs(CONTAINERS[container](rows), "data")


@pytest.mark.parametrize("empty", [[], datasets.Dataset.from_dict({"chosen": [], "rejected": []})])
def test_a_dataset_without_rows_is_refused(empty: object) -> None:
    with pytest.raises(DataError, match="has no rows"):
        read_pairs(empty, "data")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (7, "is not a dataset"),
        ([3, 4], "row 0 is a int"),
        (["a", "b"], "data='a': no such file"),
        ({"chosen": ["a"], "rejected": ["b", "c"]}, "differ in length"),
        ({"chosen": "a", "rejected": "b"}, "one list for each column"),
    ],
)
def test_what_is_no_dataset_is_refused(bad: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(bad, "data")


def only_pair(**row: Any) -> TextPair | ChatPair:
    pairs, dropped = read_pairs([row], "data")
    assert not dropped
    return pairs[0]


def only_reason(**row: Any) -> str:
    pairs, dropped = read_pairs([row], "data")
    assert not pairs
    assert list(dropped.values()) == [[0]]
    return next(iter(dropped))


def test_dialogue_prompt_ends_with_the_last_assistant_marker() -> None:
    prompt = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair = only_pair(chosen=prompt + " yes indeed", rejected=prompt + " yes")
    assert pair == TextPair(0, prompt, " yes indeed", " yes")


@pytest.mark.parametrize(
    "rejected", ["\n\nHuman: b\n\nAssistant: c", "\n\nHuman: a\n\nAssistant: c\n\nHuman: d\n\nAssistant: e", "a c"]
)
def test_dialogues_with_different_prompts_are_dropped(rejected: str) -> None:
    assert only_reason(chosen="\n\nHuman: a\n\nAssistant: b", rejected=rejected) == DIFFERENT_PROMPTS


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is above", "The sky is"),  # a trailing space goes to the completions
        ("Is it? yes", "Is it? yeah", "Is it?"),  # not "Is it? ye"
        ("Answer:yes", "Answer:no", "Answer:"),
        ("Answer:\nyes", "Answer:\nno", "Answer:\n"),
        ("It is so", "It is so, yes", "It is"),  # a completion is never empty
        ("Yes", "No", ""),
        ("Yes", "Yes, sir", ""),
    ],
)
def test_implicit_prompt_of_plain_text_is_the_common_prefix_in_whole_words(
    chosen: str, rejected: str, prompt: str
) -> None:
    for first, second in ((chosen, rejected), (rejected, chosen)):
        pair = only_pair(chosen=first, rejected=second)
        assert pair == TextPair(0, prompt, first[len(prompt) :], second[len(prompt) :])


def test_implicit_prompt_of_messages_is_the_common_prefix() -> None:
    talk = [{"role": "system", "content": "s"}, user("a"), bot("b"), user("c")]
    pair = only_pair(chosen=[*talk, bot("d")], rejected=[*talk, bot("e")])
    assert pair == ChatPair(0, talk, [bot("d")], [bot("e")])


def test_a_conversation_that_goes_on_where_the_other_ends_keeps_its_answer() -> None:
    pair = only_pair(chosen=[user("a"), bot("b")], rejected=[user("a"), bot("b"), user("c"), bot("d")])
    assert pair == ChatPair(0, [user("a")], [bot("b")], [bot("b"), user("c"), bot("d")])


@pytest.mark.parametrize("repeated", [[], [user("a"), bot("b"), user("c")]])
def test_explicit_prompt_messages_are_not_repeated(repeated: list[dict[str, str]]) -> None:
    prompt = [user("a"), bot("b"), user("c")]
    pair = only_pair(prompt=prompt, chosen=[*repeated, bot("d")], rejected=[*repeated, bot("e")])
    assert pair == ChatPair(0, prompt, [bot("d")], [bot("e")])


def test_user_turn_behind_an_explicit_system_prompt_belongs_to_the_prompt() -> None:
    system = {"role": "system", "content": "s"}
    pair = only_pair(prompt=[system], chosen=[user("a"), bot("b")], rejected=[user("a"), bot("c")])
    assert pair == ChatPair(0, [system, user("a")], [bot("b")], [bot("c")])


def test_an_answer_that_both_sides_give_stays_behind_an_explicit_prompt() -> None:
    pair = only_pair(
        prompt=[user("a")], chosen=[bot("b"), user("c"), bot("d")], rejected=[bot("b"), user("c"), bot("e")]
    )
    assert pair == ChatPair(0, [user("a")], [bot("b"), user("c"), bot("d")], [bot("b"), user("c"), bot("e")])


def test_text_prompt_beside_messages_with_the_user_turn_gives_way_to_them() -> None:
    assert only_pair(prompt="Is it?", **CHAT_ROW) == CHAT_PAIR


def test_keys_that_arrow_filled_with_none_are_not_part_of_a_message() -> None:
    extra = user("a") | {"name": "Ann"}
    data = datasets.Dataset.from_list([{"chosen": [extra, bot("b")], "rejected": [extra, bot("c")]}])
    assert read_pairs(data, "data")[0] == [ChatPair(0, [extra], [bot("b")], [bot("c")])]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": None, "rejected": "a"}, "chosen is missing"),
        ({"chosen": "a", "rejected": float("nan")}, "rejected is missing"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt is missing"),
        ({"chosen": 1, "rejected": "b"}, "chosen is neither text nor messages"),
        ({"prompt": "p", "chosen": " \n", "rejected": "b"}, EMPTY_COMPLETION),
        ({"chosen": "\n\nAssistant: ", "rejected": "\n\nAssistant: a"}, EMPTY_COMPLETION),
        ({"chosen": [user("a"), bot(" ")], "rejected": [user("a"), bot("b")]}, EMPTY_COMPLETION),
        ({"prompt": [user("a")], "chosen": [], "rejected": [bot("b")]}, EMPTY_COMPLETION),
        ({"chosen": "a", "rejected": "a"}, SAME_COMPLETIONS),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("b")]}, SAME_COMPLETIONS),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("c"), bot("d")]}, DIFFERENT_PROMPTS),
        ({"prompt": [user("a")], "chosen": [user("b"), bot("c")], "rejected": [bot("d")]}, DIFFERENT_PROMPTS),
        ({"chosen": [{"role": "user"}], "rejected": [bot("a")]}, MALFORMED_MESSAGES),
        ({"chosen": ["a"], "rejected": [bot("a")]}, WITHOUT_ROLES),
        ({"chosen": [bot("a")], "rejected": [bot("b")]}, NO_PROMPT_MESSAGE),
        ({"chosen": "a", "rejected": [user("b"), bot("c")]}, MIXED_KINDS),
        ({"prompt": [user("a"), bot("b")], "chosen": "c", "rejected": "d"}, MIXED_KINDS),
        ({"prompt": "p", "chosen": "\ud800", "rejected": "b"}, INVALID_UNICODE),
    ],
)
def test_unusable_rows_are_dropped_with_their_reason(row: dict[str, Any], reason: str) -> None:
    assert only_reason(**row) == reason


@pytest.mark.parametrize("dtype", [object, "string", "str"])
def test_every_missing_value_of_pandas_is_missing(dtype: Any) -> None:
    frame = pd.DataFrame({"chosen": ["is a", None], "rejected": ["is b", "is c"]}, dtype=dtype)
    assert read_pairs(frame, "data") == ([TextPair(0, "is", " a", " b")], {"chosen is missing": [1]})


@pytest.mark.parametrize("container", ["list", "Dataset", "DataFrame", "Table"])
def test_dropped_rows_are_numbered_by_their_position(container: str) -> None:
    rows = [ROWS[0], ROWS[0] | {"chosen": None}, ROWS[1], ROWS[1] | {"rejected": None}, ROWS[0] | {"rejected": " "}]
    pairs, dropped = read_pairs(CONTAINERS[container](rows), "data")
    assert [pair.row for pair in pairs] == [0, 2]
    assert dropped == {"chosen is missing": [1], "rejected is missing": [3], EMPTY_COMPLETION: [4]}


@pytest.mark.parametrize("alias", ["question", "query"])
@pytest.mark.parametrize("prompt", [{}, {"prompt": "Is it really?"}])
def test_a_prompt_under_another_name_is_not_left_out_silently(alias: str, prompt: dict[str, str]) -> None:
    row = {alias: "Is it?", "chosen": "yes", "rejected": "no", **prompt}
    with pytest.raises(DataError, match=f"column '{alias}' that would not be used; rename it to prompt"):
        read_pairs([row], "train_dataset")
