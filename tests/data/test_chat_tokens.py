"""The tokens of chat rows: those of `apply_chat_template`, whatever the template writes."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import FAMILIES, ROWS, WITH_TOOLS, family_tokenizer

from evollm.data import TokenizedPair, load_pairs
from evollm.data.examples import EXAMPLES
from evollm.data.rows import RowFormat
from evollm.data.sources import PAIRS

CASES = [(family, case) for family in FAMILIES for case in ROWS if "tool" not in case or family in WITH_TOOLS]


def template_ids(tokenizer: Any, row: dict[str, Any], *side: dict[str, Any], generation: bool = False) -> list[int]:
    """What the model is given at inference, by the tokenizer's own method."""
    encoding = tokenizer.apply_chat_template(
        [*row["prompt"], *side],
        tools=row.get("tools"),
        add_generation_prompt=generation,
        return_dict=True,
        **row.get("chat_template_kwargs", {}),
    )
    return list(encoding["input_ids"])


def only(tokenizer: Any, row: dict[str, Any], row_format: RowFormat = PAIRS, **limits: Any) -> TokenizedPair:
    (pair,), _ = load_pairs([row], tokenizer, name="train", row_format=row_format, **limits)
    return pair


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(("family", "case"), CASES)
def test_both_sides_are_the_tokens_of_apply_chat_template(family: str, case: str, adds_bos: bool) -> None:
    tokenizer, row = family_tokenizer(family, adds_bos), ROWS[case]
    pair = only(tokenizer, row)
    prompt = pair.prompt_ids.tolist()
    assert prompt + pair.chosen_ids.tolist() == template_ids(tokenizer, row, *row["chosen"])
    assert prompt + pair.rejected_ids.tolist() == template_ids(tokenizer, row, *row["rejected"])
    given = template_ids(tokenizer, row, generation=True)
    assert prompt == given[: len(prompt)]
    # R1's generation prompt opens a thought, which its conversations have not.
    assert (prompt == given) is (family != "DeepSeek-R1")


@pytest.mark.parametrize(("family", "case"), CASES)
def test_an_example_has_the_tokens_of_apply_chat_template(family: str, case: str) -> None:
    tokenizer, row = family_tokenizer(family), ROWS[case]
    other = {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
    pair = only(tokenizer, other | {"completion": row["chosen"]}, EXAMPLES)
    assert pair.token_ids.tolist() == template_ids(tokenizer, row, *row["chosen"])


def test_a_cut_prompt_keeps_the_bos_of_the_template_and_the_end_of_the_conversation() -> None:
    tokenizer, row = family_tokenizer("Llama 3"), ROWS["turns"]
    whole = only(tokenizer, row)
    cut = only(tokenizer, row, max_context_length=whole.longest_sequence - 20)
    assert cut.prompt_ids.tolist() == [tokenizer.bos_token_id, *whole.prompt_ids[21:].tolist()]
    assert (cut.chosen_ids.tolist(), cut.rejected_ids.tolist()) == (
        whole.chosen_ids.tolist(),
        whole.rejected_ids.tolist(),
    )


def test_an_encoder_decoder_is_given_its_own_marks() -> None:
    tokenizer = family_tokenizer("Zephyr")
    pair = only(tokenizer, ROWS["one turn"], encoder_decoder=True)
    assert tokenizer.decode(pair.prompt_ids).startswith("<s><|user|>")
    assert tokenizer.decode(pair.chosen_ids) == "<s>Blue.</s>"
