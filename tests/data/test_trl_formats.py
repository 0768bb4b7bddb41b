"""Rows as TRL's documentation of its preference and SFT formats has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from tokenizers_for_tests import chatml_tokenizer, make_tokenizer

from evollm.data import Sample, load_pairs
from evollm.data.cells import (
    EMPTY_COMPLETION,
    MALFORMED_MESSAGES,
    MALFORMED_TEMPLATE_KWARGS,
    MALFORMED_TOOLS,
    NOT_TEXT,
    OWN_TEMPLATE,
    UNREADABLE_MESSAGES,
)
from evollm.data.completion_rows import EXAMPLES, NOT_PREFERRED, read_examples
from evollm.data.pairs import ChatPair, TextPair
from evollm.data.preference_rows import PAIRS, read_pairs
from evollm.data.rows import NESTED_TOO_DEEPLY, RowFormat
from evollm.errors import DataError

# Hermes' manner of tools, and Qwen 3's switch for thinking; what a message lacks is undefined.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def tool_tokenizer() -> Any:
    return make_tokenizer(chat_template=TOOL_TEMPLATE, bos_token="<|im_start|>", eos_token="<|im_end|>")


def schema(name: str, *arguments: str) -> dict[str, Any]:
    properties = {argument: {"type": "string"} for argument in arguments}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


USER = {"role": "user", "content": "Turn on the lights."}
DONE = {"role": "assistant", "content": "Done!"}
LIGHT, RADIO = schema("control_light", "room"), schema("control_radio", "station")
PAIR = {
    "prompt": [USER],
    "chosen": [call("control_light", room="hall"), {"role": "tool", "name": "control_light", "content": "on"}, DONE],
    "rejected": [call("control_radio", station="five")],
    "tools": [LIGHT, RADIO],
}
LIGHT_CALL = '<call>{"name": "control_light", "arguments": {"room": "hall"}}<|im_end|>\n'
CONTAINERS: dict[str, Callable[[list[dict[str, Any]], Path], object]] = {
    "rows": lambda rows, _: rows,
    "Dataset": lambda rows, _: datasets.Dataset.from_list(rows),
    "stream": lambda rows, _: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "JSONL": lambda rows, path: _write(path / "a.jsonl", "\n".join(map(json.dumps, rows))),
    "stream of JSONL": lambda rows, path: datasets.load_dataset(
        "json",
        data_files=str(_write(path / "a.jsonl", "\n".join(map(json.dumps, rows)))),
        streaming=True,
        split="train",
        cache_dir=str(path),
    ),
    "Parquet": lambda rows, path: _parquet(path / "a.parquet", rows),
    "DataFrame of Parquet": lambda rows, path: pd.read_parquet(_parquet(path / "a.parquet", rows)),
    "CSV of JSON": lambda rows, path: _csv(path / "a.csv", rows, json.dumps),
    "CSV of Python": lambda rows, path: _csv(path / "a.csv", rows, repr),
}


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def _csv(path: Path, rows: list[dict[str, Any]], write: Callable[[object], str]) -> Path:
    pd.DataFrame([{name: write(value) for name, value in row.items()} for row in rows]).to_csv(path, index=False)
    return path


def texts(row_format: RowFormat, *rows: dict[str, Any], data: object = None) -> list[tuple[str, ...]]:
    tokenizer = tool_tokenizer()
    pairs, _ = load_pairs(list(rows) if data is None else data, tokenizer, name="train", row_format=row_format)
    return [tuple(tokenizer.decode(ids) for ids in _parts(pair) if len(ids)) for pair in pairs]


def _parts(pair: Sample) -> tuple[Any, ...]:
    return pair.prompt_ids, *(completion.ids for completion in pair.completions)


# --------------------------------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize("container", CONTAINERS)
def test_tools_and_tool_calls_go_through_the_chat_template_from_every_container(container: str, tmp_path: Path) -> None:
    other = PAIR | {"chosen": PAIR["rejected"], "rejected": PAIR["chosen"], "tools": [RADIO, LIGHT]}
    (first, second) = texts(PAIRS, data=CONTAINERS[container]([PAIR, other], tmp_path))
    # Nothing of what Arrow adds to tools and calls: each has the arguments of its own.
    given = (
        f"<|im_start|>tools {json.dumps([LIGHT, RADIO])}<|im_end|>\n<|im_start|>user\nTurn on the lights.<|im_end|>\n"
    )
    chosen = LIGHT_CALL + "<|im_start|>tool\non<|im_end|>\n<|im_start|>assistant\nDone!<|im_end|>\n"
    rejected = '<call>{"name": "control_radio", "arguments": {"station": "five"}}<|im_end|>\n'
    assert _sorted_keys(first[0]) == _sorted_keys(given + "<|im_start|>assistant\n")
    assert first[1:] == (chosen, rejected)
    assert second[1:] == (rejected, chosen)


def _sorted_keys(text: str) -> str:
    """Arrow keeps the keys of a mapping in an order of its own."""
    start, end = text.index("["), text.index("]<") + 1
    return text[:start] + json.dumps(json.loads(text[start:end]), sort_keys=True) + text[end:]


@pytest.mark.parametrize("tools", [[LIGHT], json.dumps([LIGHT]), (LIGHT,)])
def test_tools_are_schemas_or_json_text_of_them(tools: Any) -> None:
    assert texts(PAIRS, PAIR | {"tools": tools}) == texts(PAIRS, PAIR | {"tools": [LIGHT]})


def test_tools_may_be_functions() -> None:
    def control_light(room: str) -> str:
        """Controls a light.

        Args:
            room: Where.
        """
        return room

    ((prompt, *_),) = texts(PAIRS, PAIR | {"tools": [control_light]})
    assert '"description": "Controls a light."' in prompt


@pytest.mark.parametrize("tools", [None, [], "[]", float("nan")])
def test_no_tools_are_no_tools(tools: Any) -> None:
    plain = {name: PAIR[name] for name in ("prompt", "chosen", "rejected")}
    assert texts(PAIRS, PAIR | {"tools": tools}) == texts(PAIRS, plain)


def test_an_example_has_tools_and_ends_in_a_tool_call() -> None:
    row = {"messages": [USER, call("control_light", room="hall")], "tools": [LIGHT]}
    ((prompt, completion),) = texts(EXAMPLES, row)
    assert prompt.startswith(f"<|im_start|>tools {json.dumps([LIGHT])}<|im_end|>\n")
    assert completion == LIGHT_CALL
    split = {"prompt": [USER], "completion": row["messages"][1:], "tools": json.dumps([LIGHT])}
    assert texts(EXAMPLES, split) == [(prompt, completion)]


# ------------------------------------------------------------------------------------------------- chat_template_kwargs


@pytest.mark.parametrize("container", CONTAINERS)
def test_each_row_has_its_own_arguments_for_the_chat_template(container: str, tmp_path: Path) -> None:
    answer = "<think></think>Yes."
    rows = [
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": answer}], "rejected": [DONE]}
        | {"chat_template_kwargs": kwargs}
        for kwargs in ({"enable_thinking": False}, {"another": "x"})
    ]
    found = texts(PAIRS, data=CONTAINERS[container](rows, tmp_path))
    prompt = "<|im_start|>user\nTurn on the lights.<|im_end|>\n<|im_start|>assistant\n"
    # The prompt ends where the three renderings cease to agree; a template whose sides are equal makes no pair.
    assert found == [(prompt, answer + "<|im_end|>\n", "Done!<|im_end|>\n")] * 2


def test_a_switch_of_the_template_reaches_the_prompt_of_an_example() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "<think></think>Yes."}]}
    assert texts(EXAMPLES, row | {"chat_template_kwargs": {"enable_thinking": False}})[0][0].endswith("<think></think>")
    assert not texts(EXAMPLES, row)[0][0].endswith("<think></think>")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tools": "control_light"}, MALFORMED_TOOLS),
        ({"tools": {"name": "control_light"}}, MALFORMED_TOOLS),
        ({"tools": ["control_light"]}, MALFORMED_TOOLS),
        ({"tools": 7}, MALFORMED_TOOLS),
        ({"tools": [len]}, "refused by the chat template (Tools should either be a JSON schema, or a callable"),
        ({"chat_template_kwargs": ["enable_thinking"]}, MALFORMED_TEMPLATE_KWARGS),
        ({"chat_template_kwargs": "enable_thinking"}, MALFORMED_TEMPLATE_KWARGS),
        ({"chat_template_kwargs": {7: 7}}, MALFORMED_TEMPLATE_KWARGS),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs sets tokenize"),
        ({"chat_template_kwargs": {"chat_template": "{{ messages | length }}"}}, OWN_TEMPLATE),
        ({"chat_template_kwargs": '{"chat_template": "{% for a in range(99999) %}{% endfor %}"}'}, OWN_TEMPLATE),
        ({"chosen": [{"role": "assistant"}]}, MALFORMED_MESSAGES),
        ({"chosen": [{"role": "assistant", "content": None, "tool_calls": []}]}, MALFORMED_MESSAGES),
        ({"chosen": [{"role": "assistant", "tool_calls": "control_light"}]}, MALFORMED_MESSAGES),
        ({"chosen": [{"role": "assistant", "content": "", "tool_calls": []}]}, EMPTY_COMPLETION),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, NOT_TEXT),
    ],
)
def test_what_no_template_takes_is_dropped_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    _, report = load_pairs([PAIR, PAIR | changes], tool_tokenizer(), name="train")
    ((found, where),) = report.dropped.items()
    assert found.startswith(reason)
    assert where == (1, (1,))


def test_tools_that_no_tokenizer_can_take_are_dropped() -> None:
    tools = [{"type": "function", "function": {"name": "\ud800"}}]
    template = TOOL_TEMPLATE.replace("tools | tojson", "tools[0].function.name")
    tokenizer = make_tokenizer(chat_template=template, bos_token="<|im_start|>", eos_token="<|im_end|>")
    _, report = load_pairs([PAIR, PAIR | {"tools": tools}], tokenizer, name="train")
    assert report.dropped == {"text that is not valid Unicode": (1, (1,))}


def test_a_row_without_end_is_dropped() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    first, second = ([USER, {"role": "assistant", "content": "a", "extra": item}] for item in ([deep], [[deep]]))
    assert read_pairs([{"chosen": first, "rejected": second}], "data") == ([], {NESTED_TOO_DEEPLY: [0]})


# ------------------------------------------------------------------------------------------------------------- messages


def test_content_in_blocks_of_text_is_their_text() -> None:
    blocks = {
        "role": "user",
        "content": [{"type": "text", "text": "Turn on "}, {"type": "text", "text": "the lights."}],
    }
    (pair,), _ = read_pairs([PAIR | {"prompt": [blocks]}], "data")
    assert pair.prompt == [USER]


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_sharegpt_conversations_are_messages(name: str) -> None:
    row = {name: [{"from": "human", "value": "Turn on the lights."}, {"from": "gpt", "value": "Done!"}]}
    assert read_examples([row], "data") == ([ChatPair(0, [USER], [DONE])], {})


def test_whole_text_is_learnt_from_its_first_token_on() -> None:
    assert read_examples([{"text": "yes or no"}], "data") == ([TextPair(0, "", "yes or no")], {})
    for adds_bos, first in ((True, "<s>"), (False, "yes")):
        tokenizer = make_tokenizer(adds_bos=adds_bos)
        ((example,), _) = load_pairs([{"text": "yes or no"}], tokenizer, name="train", row_format=EXAMPLES)
        assert tokenizer.decode(example.prompt_ids) == first
        assert tokenizer.decode(example.token_ids) == ("<s>" if adds_bos else "") + "yes or no</s>"


def test_completions_that_are_labelled_as_bad_are_not_learnt() -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False, "False", None)]
    examples, dropped = read_examples(rows, "data")
    assert [example.row for example in examples] == [0, 3]
    assert dropped == {NOT_PREFERRED: [1, 2]}


@pytest.mark.parametrize("text", ["[{'role': 'user', 'content': array(7)}]", '[{"role": "user", "content": "a'])
def test_messages_in_a_csv_cell_that_cannot_be_read_are_not_taken_for_text(tmp_path: Path, text: str) -> None:
    pd.DataFrame([{"prompt": text, "chosen": "a", "rejected": "b"}]).to_csv(tmp_path / "a.csv", index=False)
    assert read_pairs(tmp_path / "a.csv", "data") == ([], {UNREADABLE_MESSAGES: [0]})


def test_text_of_a_csv_cell_that_merely_begins_like_a_list_is_text(tmp_path: Path) -> None:
    row = {"prompt": "[1] says", "chosen": " [{}]", "rejected": ' {"role": 7}'}
    pd.DataFrame([row]).to_csv(tmp_path / "a.csv", index=False)
    assert read_pairs(tmp_path / "a.csv", "data") == ([TextPair(0, *row.values())], {})


# -------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("prompt", "choosen", "rejected"), r"lacks chosen \(is 'choosen' meant to be 'chosen'\?\)"),
        (("prompt", "Chosen", "Reject"), r"is 'Chosen' meant to be 'chosen'\? is 'Reject' meant to be 'rejected'\?"),
        (("promt", "chosen", "rejected"), "has a column 'promt' that would not be used; rename it to prompt"),
        (("prompt", "chosen", "rejected", "tool"), "has a column 'tool' .* rename it to tools, or leave it out"),
        (("chosen", "rejected", "chat_template_kwarg"), "rename it to chat_template_kwargs"),
        (("prompt", "chosen", "rejected", "images"), "has a column 'images', and evollm tunes on text alone"),
    ],
)
def test_a_misspelt_column_of_pairs_is_named_with_the_one_that_is_like_it(columns: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"train_dataset=.*{message}"):
        read_pairs([dict.fromkeys(columns, "a")], "train_dataset")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("prompt", "completon"), r"lacks completion \(is 'completon' meant to be 'completion'\?\)"),
        (("promtp", "completion"), r"lacks prompt \(is 'promtp' meant to be 'prompt'\?\)"),
        (("mesages",), r"is 'mesages' meant to be 'messages'\?"),
        (("messages", "Tools"), "has a column 'Tools' that would not be used; rename it to tools"),
        (("messages", "image"), "has a column 'image'"),
    ],
)
def test_a_misspelt_column_of_examples_is_named_with_the_one_that_is_like_it(columns: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"train_dataset=.*{message}"):
        read_examples([dict.fromkeys(columns, "a")], "train_dataset")


def test_columns_that_published_datasets_have_beside_the_pairs_do_no_harm() -> None:
    more = {"prompt_id": "a", "messages": [], "score_chosen": 1, "chosen_model": "m", "source": "s", "margin": 1.0}
    assert len(read_pairs([PAIR | more], "data")[0]) == 1
    assert len(read_pairs([{"chosen": "It is a", "rejected": "It is b", "prompt_id": "a"}], "data")[0]) == 1
    assert len(read_examples([{"messages": [USER, DONE], "prompt": USER["content"], "prompt_id": "a"}], "data")[0]) == 1


def test_a_dataset_of_text_and_of_chat_messages_is_reported() -> None:
    text = {"prompt": "Is it?", "chosen": " Yes.", "rejected": " No."}
    chat = {"prompt": [USER], "chosen": [DONE], "rejected": [{"role": "assistant", "content": "No."}]}
    _, report = load_pairs([text, chat, chat, text, text], chatml_tokenizer(), name="train")
    assert str(report) == (
        "train: 5 pairs kept; warning: 3 are plain text (rows 0, 3, 4) and 2 are chat messages (rows 1, 2), and only "
        "these go through the chat template"
    )
    assert not load_pairs([chat], chatml_tokenizer(), name="train")[1].warning
