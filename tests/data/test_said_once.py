"""What is wrong with every row is said once, with a count and the first rows."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from conftest import make_examples, make_rows
from tokenizers_for_tests import chatml_tokenizer

from evollm import PreferenceGym, SFTGym
from evollm.data.row_report import FIRST_ROWS
from evollm.llm_envs import DatasetGym

ROWS = 60
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]


def turns(row: dict[str, str], **more: Any) -> dict[str, Any]:
    """The row as messages; `more` goes to the messages of its sides."""
    sides = {name: [{"role": "assistant", "content": text, **more}] for name, text in row.items() if name != "prompt"}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **sides}


def with_user_turn(row: dict[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "chosen": [*row["chosen"], {"role": "user", "content": "and?"}, {"role": "assistant", "content": "x"}],
    }


PAIRS = make_rows(ROWS)
# Of each kind all rows have the fault.
FAULTS: dict[str, tuple[type[DatasetGym], list[dict[str, Any]], dict[str, Any]]] = {
    "strings": (PreferenceGym, PAIRS, {}),
    "strings of examples": (SFTGym, make_examples(ROWS), {}),
    "reasoning left out": (PreferenceGym, [turns(row, reasoning_content="Because.") for row in PAIRS], {}),
    "tools left out": (PreferenceGym, [turns(row) | {"tools": TOOLS} for row in PAIRS], {}),
    "an argument of no use": (
        PreferenceGym,
        [turns(row) | {"chat_template_kwargs": {"thin": 1}} for row in PAIRS],
        {},
    ),
    "a user's turn in an answer": (PreferenceGym, [with_user_turn(turns(row)) for row in PAIRS], {}),
    "scores the other way round": (
        PreferenceGym,
        [turns(row) | {"score_chosen": 1, "score_rejected": 2} for row in PAIRS],
        {},
    ),
    "prompts that are cut": (
        PreferenceGym,
        [turns({**row, "prompt": row["prompt"] * 20}) for row in PAIRS],
        {"max_context_length": 150},
    ),
    "prompts that are repeated": (
        PreferenceGym,
        [{side: f"{row['prompt']}{text}" if side != "prompt" else text for side, text in row.items()} for row in PAIRS],
        {},
    ),
    "half of them empty": (PreferenceGym, [turns({**row, "chosen": ""}) for row in PAIRS] + [turns(PAIRS[0])], {}),
}


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_wrong_with_every_row_is_said_once(kind, capfd) -> None:
    gym, rows, settings = FAULTS[kind]
    tokenizer = chatml_tokenizer()
    tokenizer.model_max_length = 100  # which transformers would warn of, too
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = gym(rows, rows, tokenizer, **{"max_context_length": 1000, **settings})
    said = [str(warning.message) for warning in caught]
    # Both splits are the same rows here: of that there is one warning too.
    overlap = [message for message in said if "are in train_dataset too" in message]
    assert len(overlap) == 1
    assert len(said) <= 2
    report = str(env.reports["train"])
    assert said != overlap or "warning: " in report or "cut" in report or "dropped" in report
    for text in (*said, report):
        assert len(text) < 700
        assert all(listed.count(",") <= FIRST_ROWS for listed in re.findall(r"rows ((?:\d+, )+)", text))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
