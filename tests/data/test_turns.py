"""Of completions in which others speak too, the assistant's turns are scored, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chat_templates import (
    AGAIN,
    BLUE,
    CALL,
    FAMILIES,
    GREEN,
    LOOK,
    RESULT,
    USER,
    family_tokenizer,
    only,
    said,
    template_ids,
)
from tokenizers_for_tests import make_tokenizer

from evollm import DataError, PreferenceGym, SFTGym, inspect_data
from evollm.data import load_pairs
from evollm.data.cells import NOT_TO_BE_LEARNT
from evollm.data.chat_template import TURNS_NOT_FOUND
from evollm.data.completion_rows import EXAMPLES
from evollm.data.prompts import OTHERS_IN_COMPLETION
from evollm.data.samples import Sample
from evollm.llm_envs.observations import batch_of

# What each family's template writes of a turn: of Blue, of Green, and before an answer that ends the conversation.
WRITTEN = {
    "ChatML": ("Blue.<|im_end|>\n", "  Green,\nmaybe. <|im_end|>\n"),
    "Llama 3": ("Blue.<|eot_id|>", "Green,\nmaybe.<|eot_id|>"),
    "Mistral": (" Blue.</s>", " Green,\nmaybe.</s>"),
    "Gemma": ("Blue.<end_of_turn>\n", "Green,\nmaybe.<end_of_turn>\n"),
    "Qwen3": ("Blue.<|im_end|>\n", "  Green,\nmaybe. <|im_end|>\n"),
    "Phi": ("Blue.<|end|>\n", "  Green,\nmaybe. <|end|>\n"),
    "Zephyr": ("Blue.</s>\n", "  Green,\nmaybe. </s>\n"),
    "DeepSeek-R1": ("Blue.</s>", "  Green,\nmaybe. </s>"),
}
# What only the end of a conversation has, before its last answer and behind it.
LAST = {"Qwen3": ("<think>\n\n</think>\n\n", ""), "Phi": ("", "<|endoftext|>")}
TURNS: dict[str, Any] = {
    "prompt": [USER],
    "chosen": [BLUE, AGAIN, GREEN],
    "rejected": [GREEN, AGAIN, BLUE, said("user", "Yes?"), BLUE],
}


def runs(ids: np.ndarray, mask: np.ndarray, tokenizer: Any) -> list[str]:
    """The texts that are scored, one for each run of scored tokens."""
    cuts = np.flatnonzero(np.diff(mask)) + 1
    parts = zip(np.split(ids, cuts), np.split(mask, cuts), strict=True)
    return [tokenizer.decode(part) for part, scored in parts if scored.all()]


def scored_texts(pair: Sample, tokenizer: Any) -> list[list[str]]:
    return [runs(side.ids, side.scored, tokenizer) for side in pair.completions]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_assistants_turns_alone_are_scored_with_what_ends_them(family: str) -> None:
    tokenizer = family_tokenizer(family)
    pair = only(tokenizer, TURNS)
    blue, green = WRITTEN[family]
    before, behind = LAST.get(family, ("", ""))
    assert scored_texts(pair, tokenizer) == [
        [blue, f"{before}{green}{behind}"],
        [green, blue, f"{before}{blue}{behind}"],
    ]
    # The tokens, scored or not, are the template's.
    assert [*pair.prompt_ids, *pair.chosen_ids] == template_ids(tokenizer, TURNS, *TURNS["chosen"])


@pytest.mark.parametrize("family", ["Llama 3", "Mistral", "Qwen3"])
def test_results_of_tools_are_not_scored_and_calls_are(family: str) -> None:
    tokenizer = family_tokenizer(family)
    row = {"prompt": [USER], "chosen": [CALL, RESULT, BLUE], "rejected": [BLUE], "tools": [LOOK]}
    (call, answer), (other,) = scored_texts(only(tokenizer, row), tokenizer)
    assert "look_up" in call
    assert "north" in call
    assert "clear" not in call
    assert answer == other == LAST.get(family, ("", ""))[0] + WRITTEN[family][0]


def test_reasoning_that_the_template_leaves_out_of_earlier_turns_does_not_hide_where_they_end() -> None:
    tokenizer = family_tokenizer("Qwen3")
    thoughtful = [said("assistant", text, reasoning_content=f"Hm, {text}") for text in ("Red.", "Pink.")]
    row = {"prompt": [USER], "chosen": [thoughtful[0], AGAIN, thoughtful[1]], "rejected": [BLUE]}
    assert scored_texts(only(tokenizer, row), tokenizer)[0] == [
        "Red.<|im_end|>\n",
        "<think>\nHm, Pink.\n</think>\n\nPink.<|im_end|>\n",
    ]


def test_an_answer_that_begins_as_the_thought_does_that_is_asked_for_is_scored_from_its_beginning() -> None:
    tokenizer = family_tokenizer("DeepSeek-R1")
    row = {"prompt": [USER], "chosen": [BLUE, AGAIN, said("assistant", "<thin> ice")], "rejected": [BLUE]}
    assert scored_texts(only(tokenizer, row), tokenizer)[0] == ["Blue.</s>", "<thin> ice</s>"]


def test_a_completion_that_ends_with_others_is_scored_up_to_them_and_one_side_may_have_them_alone() -> None:
    tokenizer = family_tokenizer("ChatML")
    pair = only(tokenizer, {"prompt": [USER], "chosen": [BLUE, AGAIN], "rejected": [GREEN]})
    assert scored_texts(pair, tokenizer) == [["Blue.<|im_end|>\n"], ["  Green,\nmaybe. <|im_end|>\n"]]
    assert pair.completions[1].mask is None


def test_a_completion_of_the_assistants_alone_is_scored_whole() -> None:
    pair = only(family_tokenizer("ChatML"), {"prompt": [USER], "chosen": [BLUE, GREEN], "rejected": [GREEN]})
    assert pair.completions[0].mask is None
    assert pair.completions[1].mask is None


def test_an_example_is_scored_likewise_and_of_messages_the_last_answer_alone() -> None:
    tokenizer = family_tokenizer("ChatML")
    pair = only(tokenizer, {"prompt": [USER], "completion": [BLUE, AGAIN, GREEN]}, EXAMPLES)
    assert scored_texts(pair, tokenizer) == [["Blue.<|im_end|>\n", "  Green,\nmaybe. <|im_end|>\n"]]
    whole = only(tokenizer, {"messages": [USER, BLUE, AGAIN, GREEN]}, EXAMPLES)
    assert whole.completions[0].mask is None
    assert tokenizer.decode(whole.chosen_ids) == "  Green,\nmaybe. <|im_end|>\n"


def test_an_encoder_decoder_scores_the_same_turns() -> None:
    tokenizer = family_tokenizer("Zephyr")
    pair = only(tokenizer, TURNS, encoder_decoder=True)
    assert scored_texts(pair, tokenizer) == [
        ["<s>Blue.</s>\n", "  Green,\nmaybe. </s>"],
        ["<s>  Green,\nmaybe. </s>\n", "Blue.</s>\n", "Blue.</s>"],
    ]


REWRITES = "{{ bos_token }}{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}"


def test_turns_that_cannot_be_told_apart_are_dropped_and_counted() -> None:
    tokenizer = make_tokenizer(chat_template=REWRITES)
    simple = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}
    _, report = load_pairs([TURNS, simple], tokenizer, name="train")
    assert report.dropped == {TURNS_NOT_FOUND: (1, (0,))}
    with pytest.raises(DataError, match=r"no usable pair .*cannot be told from the assistant's"):
        load_pairs([TURNS], tokenizer, name="train")


def test_mistrals_tools_move_to_the_last_question_so_that_earlier_turns_cannot_be_told() -> None:
    row = {"prompt": [USER], "chosen": [BLUE, AGAIN, GREEN], "rejected": [BLUE], "tools": [LOOK]}
    with pytest.raises(DataError, match="cannot be told from the assistant's"):
        only(family_tokenizer("Mistral"), row)


def test_such_rows_are_counted_and_inspect_shows_what_is_not_scored() -> None:
    tokenizer = family_tokenizer("ChatML")
    simple = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}
    result = inspect_data([simple, TURNS], tokenizer)
    assert result.report.warning == f"1 with {OTHERS_IN_COMPLETION}: row 1"
    other = "<|im_start|>user\nAre you sure?<|im_end|>\n<|im_start|>assistant\n"
    example = result.examples[1]
    assert example.chosen == f"Blue.<|im_end|>\n▐{other}▌  Green,\nmaybe. <|im_end|>\n"
    assert example.num_scored == sum(only(tokenizer, TURNS).num_scored)


def test_fewest_tokens_are_of_what_is_scored() -> None:
    tokenizer = family_tokenizer("ChatML")
    fewest = min(only(tokenizer, TURNS).num_scored)
    assert only(tokenizer, TURNS, min_completion_length=fewest).num_scored
    with pytest.raises(DataError, match="shorter than min_completion_length"):
        only(tokenizer, TURNS, min_completion_length=fewest + 1)


def test_pairs_are_the_same_after_a_batch_an_observation_and_a_file(tmp_path) -> None:
    tokenizer = family_tokenizer("Llama 3")
    rows = [{"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, TURNS]
    gyms = [PreferenceGym(rows, None, tokenizer, 2, cache_dir=tmp_path / "tokens") for _ in range(2)]
    keys = {pair.key for pair in gyms[0].train_pairs}
    assert {pair.key for pair in gyms[1].train_pairs} == keys == set(gyms[0].next_batch().keys())
    observation, _ = gyms[0].reset()
    assert gyms[0].observation_space.contains(observation)
    batch = batch_of(observation)
    assert set(batch.keys()) == keys
    assert batch.chosen_scored.tolist() == [batch[row].num_scored[0] for row in range(2)]
    assert {key for part in batch.split(1) for key in part.keys()} == keys  # noqa: SIM118
    assert gyms[0].observation_space.contains(gyms[0].step(np.zeros(2, np.float32))[0])


def test_pairs_without_such_turns_are_what_they_were() -> None:
    """Their keys, observations and spaces do not know of masks, and a neighbour's mask does not change their key."""
    tokenizer = family_tokenizer("Llama 3")
    simple = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}
    env = PreferenceGym([simple], None, tokenizer, 1)
    assert (
        set(env.reset()[0])
        == set(env.observation_space)
        == {
            "input_ids",
            "prompt_lengths",
            "chosen_lengths",
            "rejected_lengths",
        }
    )
    (alone,), beside = env.train_pairs, PreferenceGym([simple, TURNS], None, tokenizer, 2).next_batch()
    assert not alone.has_mask
    assert alone.key in beside.keys()  # noqa: SIM118


def test_equal_tokens_of_which_others_are_scored_are_not_the_same_pair() -> None:
    ids = np.arange(5)
    whole = Sample.of(ids, ids, ids)
    keys = {whole.with_mask(np.array(mask, np.bool_)).key for mask in ([1] * 10, [0] + [1] * 9, [1] * 9 + [0])}
    assert len(keys) == 3
    assert whole.key in keys


@pytest.mark.parametrize("mask", [np.zeros((2, 40), np.int8), np.ones((2, 3), np.int8)], ids=["nothing", "shape"])
def test_a_mask_that_leaves_nothing_or_does_not_fit_is_refused(mask: np.ndarray) -> None:
    ids = np.zeros((2, 40), np.int64)
    lengths = {name: np.array([3, 4]) for name in ("prompt_lengths", "chosen_lengths", "rejected_lengths")}
    with pytest.raises(DataError, match="scored_mask"):
        batch_of({"input_ids": ids, **lengths, "scored_mask": mask})


def test_a_score_of_examples_is_a_mean_over_scored_tokens() -> None:
    env = SFTGym([{"prompt": [USER], "completion": [BLUE, AGAIN, GREEN]}], None, family_tokenizer("ChatML"), 1)
    env.reset()
    (pair,) = env.train_pairs
    reward = env.step(np.array([-6.0], np.float32))[1]
    assert reward == pytest.approx(-6 / pair.num_scored[0])
    assert pair.num_scored[0] < len(pair.chosen_ids)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}])
def test_answers_that_say_that_they_are_not_to_be_learnt_are_not_scored(mark: dict[str, Any]) -> None:
    tokenizer = family_tokenizer("ChatML")
    blue, green = "Blue.<|im_end|>\n", "  Green,\nmaybe. <|im_end|>\n"
    row = {"prompt": [USER], "chosen": [{**BLUE, **mark}, AGAIN, GREEN], "rejected": [BLUE, {**GREEN, **mark}]}
    assert scored_texts(only(tokenizer, row), tokenizer) == [[green], [blue]]
    learnt = {"messages": [USER, {**BLUE, "weight": 1.0, "train": True}]}
    silent = {"messages": [USER, {**BLUE, **mark}]}
    (pair,), report = load_pairs([learnt, silent], tokenizer, name="train", row_format=EXAMPLES)
    assert pair.completions[0].mask is None
    assert report.dropped == {NOT_TO_BE_LEARNT: (1, (1,))}


def test_a_first_answer_that_is_not_learnt_is_all_left_out_with_its_header_and_end() -> None:
    tokenizer = family_tokenizer("Mistral")
    row = {"prompt": [USER], "completion": [{**BLUE, "weight": 0}, AGAIN, GREEN]}
    assert scored_texts(only(tokenizer, row, EXAMPLES), tokenizer) == [[" Green,\nmaybe.</s>"]]
