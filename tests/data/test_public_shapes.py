"""Rows as public datasets have them, with invented texts: they load as they are, or by the line that is spelt out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pandas as pd
import pytest

from evollm import DataError
from evollm.config import parse_config
from evollm.data.completion_rows import EXAMPLES
from evollm.data.preference_rows import PAIRS
from evollm.data.rows import RowFormat, read_dataset

Json: TypeAlias = dict[str, Any]


def user(content: str) -> Json:
    return {"role": "user", "content": content}


def bot(content: str) -> Json:
    return {"role": "assistant", "content": content}


def says(value: str) -> Json:
    return {"from": "gpt", "value": value}


def twice(name: str, values: tuple[Any, ...], **row: Any) -> list[Json]:
    """Rows that differ in a column."""
    return [{**row, name: value} for value in values]


def both(row: Json) -> list[Json]:
    return [row, row]


YES_NO, NO_YES = ("Yes", "No"), ("No", "Yes")
HUMAN = {"from": "human", "value": "Is tea hot?"}
TALKS = {"conversation_a": [user("Is tea hot?"), bot("Yes")], "conversation_b": [user("Is tea hot?"), bot("No")]}
TWO = {"prompt": "Is tea hot?", "response_a": "Yes", "response_b": "No"}
# Rows, and the sides of the pairs, or the completions of the examples, that they become.
AS_THEY_ARE: dict[str, tuple[RowFormat, list[Json], list[Any]]] = {
    "Stanford Human Preferences": (
        PAIRS,
        twice(
            "labels",
            (1, 0),
            **{"post_id": "x", "domain": "tea_train", "upvote_ratio": 0.9, "history": "Is tea hot?"},
            **{"c_root_id_A": "x", "c_root_id_B": "y", "created_at_utc_A": 1, "created_at_utc_B": 2},
            **{"score_A": 3, "score_B": 1, "human_ref_A": "Yes", "human_ref_B": "No", "score_ratio": 3.0},
        ),
        [YES_NO, NO_YES],
    ),
    "UltraFeedback, binarized and cleaned": (
        PAIRS,
        both(
            {
                **{"source": "x", "prompt": "Is tea hot?", "chosen": [user("Is tea hot?"), bot("Yes")]},
                **{"chosen-rating": 5.0, "chosen-model": "a", "rejected": [user("Is tea hot?"), bot("No")]},
                **{"rejected-rating": 3.0, "rejected-model": "b"},
            }
        ),
        [YES_NO, YES_NO],
    ),
    "ShareGPT preferences": (
        PAIRS,
        both({"conversations": [HUMAN], "chosen": says("Yes"), "rejected": says("No")}),
        [YES_NO, YES_NO],
    ),
    "ShareGPT preferences, in lists": (
        PAIRS,
        both({"conversations": [HUMAN], "chosen": [says("Yes")], "rejected": [says("No")]}),
        [YES_NO, YES_NO],
    ),
    "HH-RLHF": (
        PAIRS,
        both(
            {
                f"{side}": f"\n\nHuman: Is tea hot?\n\nAssistant: {text}"
                for side, text in (("chosen", "Yes"), ("rejected", "No"))
            }
        ),
        [(" Yes", " No")] * 2,
    ),
    "Skywork": (
        PAIRS,
        both({"chosen": [user("Tea?"), bot("Yes")], "rejected": [user("Tea?"), bot("No")], "source": "x"}),
        [YES_NO, YES_NO],
    ),
    "truthy DPO": (
        PAIRS,
        both({"id": "x", "source": "y", "system": "Be kind.", "prompt": "Tea?", "chosen": "Yes", "rejected": "No"}),
        [YES_NO, YES_NO],
    ),
    "RewardBench": (
        PAIRS,
        both(
            {"prompt": "Tea?", "chosen": "Yes", "chosen_model": "a", "rejected": "No", "rejected_model": "b", "id": 1}
        ),
        [YES_NO, YES_NO],
    ),
    "KTO": (EXAMPLES, twice("label", (True, False), prompt="Tea?", completion="Yes"), [("Yes",)]),
    "UltraChat": (
        EXAMPLES,
        both({"prompt": "Tea?", "prompt_id": "x", "messages": [user("Tea?"), bot("Yes")]}),
        [("Yes",)] * 2,
    ),
    "SlimOrca": (
        EXAMPLES,
        both({"conversations": [{**HUMAN, "weight": 0.0}, {"from": "gpt", "value": "Yes", "weight": 1.0}]}),
        [("Yes",)] * 2,
    ),
}
BY_A_LINE: dict[str, tuple[RowFormat, list[Json], list[Any]]] = {
    "PandaLM": (
        PAIRS,
        twice(
            "annotator1",
            (1, 2, 0),
            **{"idx": 0, "motivation_app": "x", "cmp_key": "a_b", "instruction": "Is it?", "input": "tea"},
            **{"response1": "Yes", "response2": "No", "annotator2": 1, "annotator3": 2},
        ),
        [YES_NO, NO_YES],
    ),
    "LLMBar": (PAIRS, twice("label", (1, 2), input="Is it?", output_1="Yes", output_2="No"), [YES_NO, NO_YES]),
    "UltraFeedback, as distilabel has it": (
        PAIRS,
        both(
            {
                **{"source": "x", "instruction": "Tea?", "chosen_rating": 5.0, "rejected_rating": 3.0},
                **{"chosen_model": "a", "rejected_model": "b", "chosen_response": "Yes", "rejected_response": "No"},
            }
        ),
        [YES_NO, YES_NO],
    ),
    "HelpSteer2": (
        PAIRS,
        twice("preference_strength", (-3, 1, 0), prompt="Tea?", response_1="Yes", response_2="No", split="train"),
        [YES_NO, NO_YES],
    ),
    "HelpSteer3": (
        PAIRS,
        twice(
            "overall_preference",
            (-1, 2, 0),
            **{
                "domain": "tea",
                "language": "english",
                "context": [user("Tea?")],
                "response1": "Yes",
                "response2": "No",
            },
        ),
        [YES_NO, NO_YES],
    ),
    "Chatbot Arena": (
        PAIRS,
        twice("winner", ("model_a", "model_b", "tie", "tie (bothbad)"), model_a="x", model_b="y", turn=1, **TALKS),
        [YES_NO, NO_YES],
    ),
    "WSDM Cup": (PAIRS, twice("winner", ("model_a", "model_b"), model_a="x", model_b="y", **TWO), [YES_NO, NO_YES]),
    "Orca DPO": (
        PAIRS,
        both({"system": "Be kind.", "question": "Tea?", "chosen": "Yes", "rejected": "No"}),
        [YES_NO, YES_NO],
    ),
    "Orca DPO, as distilabel has it": (
        PAIRS,
        both({"system": "", "input": "Tea?", "chosen": "Yes", "rejected": "No", "rating": [9, 8], "chosen_score": 9.0}),
        [YES_NO, YES_NO],
    ),
    "stack-exchange-paired": (
        PAIRS,
        both({"qid": 1, "question": "Tea?", "date": "x", "response_j": "Yes", "response_k": "No"}),
        [YES_NO, YES_NO],
    ),
    "Preference Collection": (
        PAIRS,
        twice(
            "orig_preference",
            ("A", "B"),
            **{"orig_instruction": "Tea?", "orig_response_A": "Yes", "orig_response_B": "No", "instruction": "Judge!"},
        ),
        [YES_NO, NO_YES],
    ),
    "OffsetBias": (
        PAIRS,
        twice("label", (1, 2), instruction="Tea?", output_1="Yes", output_2="No", id="x"),
        [YES_NO, NO_YES],
    ),
    "code preferences": (PAIRS, both({"instruction": "Tea?", "accepted": "Yes", "rejected": "No"}), [YES_NO, YES_NO]),
    "Dolly": (
        EXAMPLES,
        both({"instruction": "Tea?", "context": "Cups", "response": "Yes", "category": "x"}),
        [("Yes",)] * 2,
    ),
    "OpenOrca": (
        EXAMPLES,
        both({"id": "x", "system_prompt": "S", "question": "Tea?", "response": "Yes"}),
        [("Yes",)] * 2,
    ),
    "GSM8K": (EXAMPLES, both({"question": "Tea?", "answer": "Yes"}), [("Yes",)] * 2),
    "BeaverTails": (EXAMPLES, twice("is_safe", (True, False), prompt="Tea?", response="Yes"), [("Yes",)]),
    "KTO, as LLaMA-Factory has it": (
        EXAMPLES,
        twice("kto_tag", (True, False), instruction="Tea?", input="", output="Yes"),
        [("Yes",)],
    ),
}
ANSWER = {"model": "a", "response": "Yes", "overall_score": 8.0}
NOT_PAIRS: dict[str, tuple[RowFormat, Json, str]] = {
    "UltraFeedback, raw": (
        PAIRS,
        {"instruction": "Tea?", "models": ["a"], "completions": [ANSWER]},
        "'completions' holds several",
    ),
    "Nectar": (
        PAIRS,
        {"prompt": "Tea?", "answers": [{"answer": "Yes", "rank": 1.0}], "turns": 1},
        "'answers' holds several",
    ),
    "stack-exchange-preferences": (
        PAIRS,
        {"qid": 1, "question": "Tea?", "answers": [{"text": "Yes", "pm_score": 3, "selected": True}]},
        "'answers' holds several",
    ),
    "summarize_from_feedback": (
        PAIRS,
        {"info": {"post": "Tea."}, "summaries": [{"text": "Yes"}, {"text": "No"}], "choice": 0},
        "'summaries' holds several",
    ),
    "WebGPT": (
        PAIRS,
        {
            "question": "Tea?",
            "quotes_0": "x",
            "answer_0": "Yes",
            "score_0": 1.0,
            "quotes_1": "y",
            "answer_1": "No",
            "score_1": -1.0,
        },
        "first: answer_0, second: answer_1, .*where LABEL is a column of yours that says which answer is better",
    ),
    "LMSYS": (
        PAIRS,
        {**TWO, "model_a": "x", "model_b": "y", "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        "where LABEL is a column of yours",
    ),
    "HelpSteer2, rated": (PAIRS, {"prompt": "Tea?", "response": "Yes", "helpfulness": 3}, "for SFTGym"),
    "KTO": (PAIRS, {"prompt": "Tea?", "completion": "Yes", "label": True}, "for SFTGym"),
    "Step-DPO": (
        PAIRS,
        {"prompt": "1 + 1?", "initial_reason_steps": "Let us add.", "chosen": "2", "rejected": "3"},
        "'initial_reason_steps' that would not be used",
    ),
    "OASST": (
        EXAMPLES,
        {"message_id": "x", "parent_id": None, "text": "Tea?", "role": "prompter", "labels": {}},
        "a row is one message",
    ),
}


def sides_of(pairs: list[Any]) -> list[tuple[str, ...]]:
    return [
        tuple(side if isinstance(side, str) else side[-1]["content"] for side in pair.completions) for pair in pairs
    ]


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_rows_of_public_datasets_load_as_they_are(name: str) -> None:
    row_format, rows, expected = AS_THEY_ARE[name]
    assert sides_of(read_dataset(rows, "data", row_format)[0]) == expected
    assert sides_of(read_dataset(datasets.Dataset.from_list(rows), "data", row_format)[0]) == expected


@pytest.mark.parametrize("name", BY_A_LINE)
def test_rows_of_public_datasets_load_by_the_line_of_the_message(name: str, tmp_path: Path) -> None:
    """The line as it stands, in YAML and in Python, for rows, a Dataset and a file of text cells."""
    row_format, rows, expected = BY_A_LINE[name]
    with pytest.raises(DataError) as error:
        read_dataset(rows, "data", row_format)
    line = re.search(r"columns: (\{.*?\}+)( or |, or | \(|$)", str(error.value))
    assert line is not None
    columns = parse_config(f"columns: {line[1]}", "message")["columns"]
    pd.DataFrame([{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]).to_csv(
        tmp_path / "a.csv", index=False
    )
    for data in (rows, datasets.Dataset.from_list(rows), tmp_path / "a.csv"):
        pairs, _ = read_dataset(data, "data", row_format.with_columns(columns))
        assert sides_of(pairs) == expected
        assert all(pair.question.startswith(("Tea?", "Is ")) for pair in pairs)


@pytest.mark.parametrize("name", NOT_PAIRS)
def test_rows_of_public_datasets_that_are_something_else_are_refused_and_it_is_said_what_they_are(name: str) -> None:
    row_format, row, message = NOT_PAIRS[name]
    with pytest.raises(DataError, match=message) as error:
        read_dataset([row, row], "data", row_format)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["conversations", "chosen"])
def test_texts_that_do_not_say_who_speaks_are_named_so(column: str) -> None:
    """LIMA's conversations, and sides of RewardBench 2."""
    rows = {
        "conversations": {"conversations": ["Tea?", "Yes"]},
        "chosen": {"prompt": "T", "chosen": ["Y"], "rejected": ["N"]},
    }
    _, dropped = read_dataset([rows[column]], "data", EXAMPLES if column == "conversations" else PAIRS)
    assert dropped == {"a list of texts that do not say who speaks (role and content)": [0]}
