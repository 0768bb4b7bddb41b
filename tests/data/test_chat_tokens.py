"""The tokens of chat rows: those of `apply_chat_template`, whatever the template writes."""

from __future__ import annotations

import pytest
from chat_templates import FAMILIES, ROWS, WITH_TOOLS, family_tokenizer, only, template_ids

from evollm.data.completion_rows import EXAMPLES

CASES = [(family, case) for family in FAMILIES for case in ROWS if "tool" not in case or family in WITH_TOOLS]


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
