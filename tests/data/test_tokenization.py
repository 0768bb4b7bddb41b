from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tokenizers_for_tests import (
    SENTENCES,
    bos_template_tokenizer,
    chatml_tokenizer,
    make_tokenizer,
    no_eos_template_tokenizer,
)
from transformers import PreTrainedTokenizerFast

from evollm.data import DataReport, Sample, load_pairs
from evollm.data.row_report import count_rows
from evollm.errors import ConfigurationError, DataError

QUESTION = "what is the answer?"
CHAT = {
    "prompt": [{"role": "user", "content": QUESTION}],
    "chosen": [{"role": "assistant", "content": "yes or no"}],
    "rejected": [{"role": "assistant", "content": "no answer"}],
}


def load(tokenizer: PreTrainedTokenizerFast, *rows: dict[str, Any], **limits: Any) -> list[Sample]:
    return load_pairs(list(rows), tokenizer, name="train", **limits)[0]


def text_row(prompt: str = QUESTION, chosen: str = " yes", rejected: str = " no") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def sides(pair: Sample) -> tuple[list[int], list[int]]:
    return [*pair.prompt_ids, *pair.chosen_ids], [*pair.prompt_ids, *pair.rejected_ids]


# -------------------------------------------------------------------------------------------------------- the boundary


def test_a_token_that_merges_across_the_boundary_belongs_to_the_completions() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.tokenize("the answer") == ["the", "Ġanswer"]
    (pair,) = load(tokenizer, text_row("the ans", "wer is yes", "k is no"))
    assert tokenizer.decode(pair.prompt_ids) == "the"
    assert tokenizer.decode(pair.chosen_ids) == " answer is yes</s>"
    assert tokenizer.decode(pair.rejected_ids) == " ansk is no</s>"


def test_ids_are_those_of_the_whole_text_wherever_the_boundary_lies() -> None:
    tokenizer, rng = make_tokenizer(), random.Random(0)
    rows = []
    for _ in range(200):
        first, second = rng.choice(SENTENCES), rng.choice(SENTENCES)[::-1]
        cut = rng.randrange(6, len(first) - 1)
        rows.append(text_row(first[:cut], first[cut:], second))
    for row, pair in zip(rows, load(tokenizer, *rows), strict=True):
        for ids, completion in zip(sides(pair), (row["chosen"], row["rejected"]), strict=True):
            assert ids == [*tokenizer(row["prompt"] + completion).input_ids, tokenizer.eos_token_id]


def test_a_prompt_whose_only_token_would_merge_is_tokenised_on_its_own() -> None:
    tokenizer = make_tokenizer()
    (pair,) = load(tokenizer, text_row("th", "e answer", "at"))
    assert tokenizer.decode(pair.prompt_ids) == "th"
    assert tokenizer.decode(pair.chosen_ids) == "e answer</s>"


def test_an_empty_prompt_is_a_lone_bos_or_drops_the_pair() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    (pair,) = load(tokenizer, text_row(""))
    assert pair.prompt_ids.tolist() == [tokenizer.bos_token_id]
    with pytest.raises(DataError, match="1 no prompt token: row 0"):
        load(make_tokenizer(), text_row(""))


# ---------------------------------------------------------------------------------------------------------- BOS and EOS


@pytest.mark.parametrize(("adds_bos", "count"), [(True, 1), (False, 0)])
def test_text_gets_a_bos_exactly_when_the_tokenizer_adds_one(adds_bos: bool, count: int) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    (pair,) = load(tokenizer, text_row())
    for ids in sides(pair):
        assert ids.count(tokenizer.bos_token_id) == count
        assert bool(ids[0] == tokenizer.bos_token_id) is adds_bos


@pytest.mark.parametrize("prompt", ["<s>" + QUESTION, "<s><s>" + QUESTION])
def test_a_bos_in_the_text_is_not_doubled(prompt: str) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    (pair,) = load(tokenizer, text_row(prompt))
    assert tokenizer.decode(pair.prompt_ids) == "<s>" + QUESTION


def test_a_bos_is_the_one_that_the_template_brings() -> None:
    tokenizer = bos_template_tokenizer()
    (pair,) = load(tokenizer, CHAT)
    assert tokenizer.decode(sides(pair)[0]) == f"<s>[{QUESTION}]yes or no</s>"
    assert tokenizer.decode(sides(pair)[1]) == f"<s>[{QUESTION}]no answer</s>"


@pytest.mark.parametrize("end", ["", "</s>", "</s></s>", "</s>\n", "</s> \n</s>\n"])
def test_a_completion_ends_with_exactly_one_eos(end: str) -> None:
    tokenizer = make_tokenizer()
    (pair,) = load(tokenizer, text_row(chosen=" yes" + end))
    assert tokenizer.decode(pair.chosen_ids) == " yes</s>"
    assert tokenizer.decode(pair.rejected_ids) == " no</s>"


def test_whitespace_before_the_eos_is_kept() -> None:
    tokenizer = make_tokenizer()
    pairs = load(tokenizer, text_row(chosen=" yes \n"), text_row(chosen=" yes \n</s>\n"))
    assert [tokenizer.decode(pair.chosen_ids) for pair in pairs] == [" yes \n</s>"] * 2


def test_what_follows_the_end_of_a_chat_turn_is_kept_as_the_template_has_it() -> None:
    tokenizer = chatml_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (pair,) = load(tokenizer, CHAT)
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(pair.prompt_ids) == prompt
    assert tokenizer.decode(pair.chosen_ids) == "yes or no<|im_end|>\n"
    assert tokenizer.decode(pair.rejected_ids) == "no answer<|im_end|>\n"


def test_text_ends_with_one_eos_when_it_is_the_padding_too() -> None:
    tokenizer = make_tokenizer(pad_token="</s>")
    (pair,) = load(tokenizer, text_row())
    assert tokenizer.decode(pair.chosen_ids) == " yes</s>"


def test_no_eos_is_appended_when_the_template_has_none() -> None:
    tokenizer = no_eos_template_tokenizer()
    (pair,) = load(tokenizer, CHAT)
    # The generation prompt's space merges with the completion's first word.
    assert tokenizer.decode(pair.prompt_ids) == f"user: {QUESTION}\nassistant:"
    assert tokenizer.decode(pair.chosen_ids) == " yes or no\n"


def test_a_generation_prompt_unlike_a_real_turn_costs_no_text() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"
    )
    assert "<think>" in tokenizer.apply_chat_template(CHAT["prompt"], tokenize=False, add_generation_prompt=True)
    assert sides(load(tokenizer, CHAT)[0]) == sides(load(chatml_tokenizer(), CHAT)[0])


def test_earlier_turns_of_a_completion_keep_their_eos() -> None:
    tokenizer = chatml_tokenizer()
    more = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}]
    (pair,) = load(tokenizer, CHAT | {"chosen": CHAT["chosen"] + more})
    assert pair.chosen_ids.tolist().count(tokenizer.eos_token_id) == 3


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"tokenizer\.eos_token=None: .*set tokenizer\.eos_token"):
        load(make_tokenizer(eos_token=None), text_row())


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(DataError, match=r"tokenizer\.chat_template=None: .*set tokenizer\.chat_template"):
        load(make_tokenizer(), CHAT)


def test_messages_that_the_template_refuses_are_dropped_with_its_words() -> None:
    system = [{"role": "system", "content": "be kind"}]
    _, report = load_pairs(
        [CHAT, CHAT | {"prompt": system + CHAT["prompt"]}], no_eos_template_tokenizer(), name="train"
    )
    assert report.dropped == {"refused by the chat template (no system role)": (1, (1,))}


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("adds_bos", [True, False])
def test_long_prompts_are_cut_from_the_left_behind_the_bos(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    row = text_row("yes or no " * 20 + QUESTION, " yes or no", " no")
    (whole,) = load(tokenizer, row)
    pairs, report = load_pairs([row], tokenizer, name="train", max_context_length=10)
    (cut,) = pairs
    assert cut.longest_sequence == 10
    assert report.prompts_cut == 1
    np.testing.assert_array_equal(cut.chosen_ids, whole.chosen_ids)
    np.testing.assert_array_equal(cut.rejected_ids, whole.rejected_ids)
    kept = cut.prompt_ids[int(adds_bos) :]
    np.testing.assert_array_equal(kept, whole.prompt_ids[-len(kept) :])
    assert bool(cut.prompt_ids[0] == tokenizer.bos_token_id) is adds_bos


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("prompt", [QUESTION, "the"])
def test_the_shortest_length_that_the_error_names_is_the_shortest_that_works(adds_bos: bool, prompt: str) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    rows = [text_row(prompt, " yes or no" * 2), text_row(prompt, " yes or no" * 3), text_row(prompt, "", " no")]
    shortest = 7 + 1 + int(adds_bos)  # six words and EOS, one prompt token, BOS
    with pytest.raises(DataError, match=rf"^max_context_length=4: .*2 longer than .*rows 0, 1.* {shortest}$"):
        load(tokenizer, *rows, max_context_length=4)
    with pytest.raises(DataError, match=rf"^max_context_length={shortest - 1}: "):
        load(tokenizer, *rows, max_context_length=shortest - 1)
    assert len(load(tokenizer, *rows, max_context_length=shortest)) == 1


def test_a_lone_bos_is_prompt_enough_for_the_shortest_length() -> None:
    tokenizer, row = make_tokenizer(adds_bos=True), text_row("", " yes or no")
    assert load(tokenizer, row, max_context_length=5)[0].longest_sequence == 5
    with pytest.raises(DataError, match=r"would do for one of them is 5$"):
        load(tokenizer, row, max_context_length=4)


def test_a_pair_whose_completion_does_not_fit_is_dropped_and_counted() -> None:
    rows = [text_row(), text_row(rejected=" no" * 30)]
    pairs, report = load_pairs(rows, make_tokenizer(), name="train", max_context_length=12)
    assert len(pairs) == 1
    assert report.dropped == {"longer than max_context_length": (1, (1,))}


def test_the_limit_that_the_tokenizer_states_holds_unless_one_is_given() -> None:
    tokenizer, row = make_tokenizer(model_max_length=8), text_row("yes or no " * 20)
    assert load(tokenizer, row)[0].longest_sequence == 8
    assert load(tokenizer, row, max_context_length=20)[0].longest_sequence == 20
    assert load(make_tokenizer(), row)[0].longest_sequence > 20
    with pytest.raises(DataError, match=r"max_context_length=2: .*tokenizer\.model_max_length"):
        load(make_tokenizer(model_max_length=2), row)


def test_completions_below_the_minimum_are_dropped_and_counted() -> None:
    rows = [text_row(), text_row(chosen=" yes or no", rejected=" no answer")]
    pairs, report = load_pairs(rows, make_tokenizer(), name="train", min_completion_length=3)
    assert [min(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs] == [3]
    assert report.dropped == {"shorter than min_completion_length": (1, (0,))}


@pytest.mark.parametrize(
    "limits", [{"max_context_length": 1}, {"min_completion_length": 0}, {"max_context_length": 9.5}]
)
def test_lengths_out_of_range_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(limits))}="):
        load(make_tokenizer(), text_row(), **limits)


def test_sides_of_equal_ids_count_as_equal() -> None:
    with pytest.raises(DataError, match="1 chosen == rejected: row 0"):
        load(make_tokenizer(lowercase=True), text_row(chosen=" Yes", rejected=" yes"))


def test_a_completion_that_is_nothing_but_eos_counts_as_empty() -> None:
    with pytest.raises(DataError, match="1 empty completion: row 0"):
        load(make_tokenizer(), text_row(chosen="</s>"))


# --------------------------------------------------------------------------------------------------------------- report


def test_without_a_usable_row_the_error_counts_the_reasons() -> None:
    rows = [text_row(chosen=" no")] * 7 + [text_row(chosen=" ")]
    message = r"train_dataset='8 rows': .*7 chosen == rejected: rows 0, 1, 2, 3, 4, \.\.\.; 1 empty completion: row 7"
    with pytest.raises(DataError, match=message):
        load(make_tokenizer(), *rows)


def test_rows_dropped_before_and_after_tokenisation_are_counted_together() -> None:
    rows = [text_row(chosen=" Yes", rejected=" yes"), text_row(), text_row(chosen=" no")]
    _, report = load_pairs(rows, make_tokenizer(lowercase=True), name="train")
    assert report.dropped == {"chosen == rejected": (2, (0, 2))}


def test_a_report_reads_as_a_sentence() -> None:
    rows = {"chosen == rejected": [17, 99], "empty completion": [5], "malformed messages": [8, 3, 1, 2, 9, 4]}
    assert str(DataReport("train", 2343, count_rows(rows), prompts_cut=1)) == (
        "train: 2343 pairs kept, 9 dropped (2 chosen == rejected: rows 17, 99; 1 empty completion: row 5; "
        "6 malformed messages: rows 1, 2, 3, 4, 8, ...), 1 prompt cut"
    )
    assert str(DataReport("test", 1, {})) == "test: 1 pair kept"


def test_examples_are_spread_over_the_kept_pairs_and_name_their_positions() -> None:
    rows = [{"prompt": f"Question {n}?", "chosen": " yes", "rejected": " no" if n % 2 else " yes"} for n in range(100)]
    pairs, report = load_pairs(rows, make_tokenizer(), name="train")
    assert len(pairs) == 50
    assert [example.question for example in report.previews[:3]] == ["Question 1?", "Question 9?", "Question 17?"]
    assert [example.position for example in report.previews] == [number * 50 // 12 for number in range(12)]
    few = load_pairs(rows[:4], make_tokenizer(), name="train")[1]
    assert [example.position for example in few.previews] == [0, 1]
