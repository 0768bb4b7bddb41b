from __future__ import annotations

from typing import Any

import pytest
from tokenizers_for_tests import (
    SENTENCES,
    bos_template_tokenizer,
    chatml_tokenizer,
    make_tokenizer,
    no_eos_template_tokenizer,
)

from evollm.data import load_pairs, read_examples, read_pairs
from evollm.data.cells import EMPTY_COMPLETION, MALFORMED_MESSAGES
from evollm.data.completion_rows import EXAMPLES, NO_ANSWER, NOT_AN_ANSWER
from evollm.data.pairs import ChatPair, TextPair
from evollm.data.rows import MIXED_KINDS, NO_PROMPT_MESSAGE
from evollm.errors import DataError


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


USER, BOT = message("user", "what is the answer?"), message("assistant", "yes or no")


def only_example(**row: Any) -> TextPair | ChatPair:
    examples, dropped = read_examples([row], "data")
    assert not dropped
    return examples[0]


def test_prompt_and_completion_become_an_example_without_a_rejected_side() -> None:
    assert only_example(prompt="Is it?", completion=" Yes.") == TextPair(0, "Is it?", " Yes.", None)
    assert only_example(prompt=[USER], completion=[BOT]) == ChatPair(0, [USER], [BOT], None)


def test_the_last_assistant_message_is_the_completion() -> None:
    later = message("assistant", "no")
    assert only_example(messages=[USER, BOT, USER, later]) == ChatPair(0, [USER, BOT, USER], [later])
    assert only_example(messages=[USER, BOT, USER]) == ChatPair(0, [USER], [BOT])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": " \n"}, EMPTY_COMPLETION),
        ({"prompt": [USER], "completion": []}, EMPTY_COMPLETION),
        ({"messages": [USER, message("assistant", "")]}, EMPTY_COMPLETION),
        ({"prompt": "a", "completion": 7}, "completion is neither text nor messages"),
        ({"prompt": 7, "completion": "a"}, "prompt is neither text nor messages"),
        ({"prompt": "a", "completion": None}, "completion is missing"),
        ({"prompt": [USER, BOT], "completion": "a"}, MIXED_KINDS),
        ({"prompt": [USER], "completion": [USER]}, NOT_AN_ANSWER),
        ({"prompt": [], "completion": [BOT]}, NO_PROMPT_MESSAGE),
        ({"messages": [BOT]}, NO_PROMPT_MESSAGE),
        ({"messages": [USER]}, NO_ANSWER),
        ({"messages": [USER, message("assistant", 7)]}, MALFORMED_MESSAGES),
        ({"messages": "a"}, "messages is text, not a list of messages"),
    ],
)
def test_a_row_that_is_no_example_is_dropped_with_its_reason(row: dict[str, Any], reason: str) -> None:
    good = {name: {"prompt": "a", "completion": "b", "messages": [USER, BOT]}[name] for name in row}
    examples, dropped = read_examples([row, good], "data")
    assert [example.row for example in examples] == [1]
    assert dropped == {reason: [0]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, r"\['prompt', 'chosen', 'rejected'\].*PreferenceGym"),
        ({"prompt": "a", "answer": "b"}, "lacks completion; rename its columns to prompt and completion, or messages"),
        ({"completion": "b"}, "lacks prompt"),
        ({"question": "a", "completion": "b"}, "'question' that would not be used; rename it to prompt"),
        ({"prompt": "a", "completion": "b", "messages": []}, "both messages and completion"),
    ],
)
def test_wrong_columns_are_refused_with_what_to_do(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"train_dataset=.*{message}"):
        read_examples([row], "train_dataset")


def test_examples_among_preferences_are_refused_with_the_gym_that_takes_them() -> None:
    for row in ({"prompt": "a", "completion": "b"}, {"messages": [USER, BOT]}):
        with pytest.raises(DataError, match=r"lacks chosen and rejected.*SFTGym"):
            read_pairs([row], "train_dataset")


def test_a_dataset_without_a_usable_example_says_why() -> None:
    rows = [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": 7}]
    with pytest.raises(
        DataError, match=r"no usable example.*1 empty completion: row 0.*neither text nor messages: row 1"
    ):
        load_pairs(rows, make_tokenizer(), name="train", row_format=EXAMPLES)


TEXT = [{"prompt": SENTENCES[n], "chosen": f" the answer {n}", "rejected": " so"} for n in range(3)]
CHAT = [
    {"prompt": [USER] * n, "chosen": [BOT], "rejected": [message("assistant", "another answer")]} for n in range(1, 4)
]


@pytest.mark.parametrize(("rows", "form"), [(TEXT, "completion"), (CHAT, "completion"), (CHAT, "messages")])
@pytest.mark.parametrize(
    "tokenizer",
    [chatml_tokenizer(), bos_template_tokenizer(), no_eos_template_tokenizer()],
    ids=["chatml", "bos", "plain"],
)
@pytest.mark.parametrize("max_context_length", [None, 24])
def test_an_example_has_the_token_ids_of_the_chosen_side_of_a_pair(
    rows, form: str, tokenizer, max_context_length: int | None
) -> None:
    pairs, _ = load_pairs(rows, tokenizer, name="train", max_context_length=max_context_length)
    if form == "messages":
        examples = [{"messages": [*row["prompt"], *row["chosen"]]} for row in rows]
    else:
        examples = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    found, report = load_pairs(
        examples, tokenizer, name="train", row_format=EXAMPLES, max_context_length=max_context_length
    )
    assert str(report).startswith("train: 3 examples kept")
    for pair, example in zip(pairs, found, strict=True):
        if max_context_length is None:
            assert example.prompt_ids.tolist() == pair.prompt_ids.tolist()
        assert example.chosen_ids.tolist() == pair.chosen_ids.tolist()
        assert rows is CHAT or example.chosen_ids[-1] == tokenizer.eos_token_id
        assert len(example.completions) == 1
        assert example.longest_sequence <= (max_context_length or 1000)
