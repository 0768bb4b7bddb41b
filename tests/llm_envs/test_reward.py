from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from tokenizers_for_tests import CHATML, make_tokenizer

from evollm import ConfigurationError, DataError, RewardGym
from evollm.data.prompt_rows import ASKED, COLUMNS
from evollm.data.tokenization import prompt_ids

ROWS = [{"prompt": f"Question {number}:", "answer": str(number), "level": number % 2} for number in range(5)]
TURNS = [{"role": "user", "content": "what is the answer?"}]


def brevity(completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(completion)) for completion in completions]


def right(prompts: list[Any], completions: list[str], answer: list[str]) -> list[bool]:
    return [one in completion for one, completion in zip(answer, completions, strict=True)]


def make_env(tokenizer: Any, functions: Any = brevity, rows: Any = ROWS, **more: Any) -> RewardGym:
    return RewardGym(rows, None, tokenizer, functions, data_batch_size_per_gpu=3, **more)


def test_prompts_are_served_with_the_other_columns_of_their_rows(tokenizer) -> None:
    env = make_env(tokenizer)
    assert len(env) == 2
    batch = env.next_batch()
    for sample in batch:
        row = ROWS[sample.row]
        assert sample.completions == ()
        assert sample.extras == {ASKED: row["prompt"], COLUMNS: {"answer": row["answer"], "level": row["level"]}}
        assert sample.prompt_ids.tolist() == prompt_ids(row["prompt"], tokenizer).tolist()
    others = [{**row, "answer": "other"} for row in ROWS]
    assert make_env(tokenizer, rows=others).fingerprint != env.fingerprint


def test_chat_prompts_are_written_for_an_answer_and_functions_get_messages() -> None:
    seen: list[Any] = []

    def watching(prompts: list[Any], completions: list[str]) -> list[float]:
        seen.extend(prompts)
        return [0.0] * len(completions)

    tokenizer = make_tokenizer(chat_template=CHATML)
    env = make_env(tokenizer, watching, [{"prompt": TURNS}, {"prompt": TURNS * 2}])
    text = tokenizer.decode(env.train_pairs[0].prompt_ids)
    assert text == "<|im_start|>user\nwhat is the answer?<|im_end|>\n<|im_start|>assistant\n"
    assert seen[0] == TURNS
    asked = make_env(tokenizer, watching, [{"question": "what is the answer?"}], columns={"instruction": "question"})
    assert asked.train_pairs[0].prompt_ids.tolist() == env.train_pairs[0].prompt_ids.tolist()
    with pytest.warns(UserWarning, match="do not go through the chat template"):
        make_env(tokenizer, watching, [{"prompt": "what?"}])


def test_rows_that_cannot_be_asked_are_counted_and_a_missing_column_is_named(tokenizer) -> None:
    rows = [*ROWS, {"prompt": " "}, {"prompt": None}, {"prompt": [{"role": "assistant", "content": "yes"}]}]
    report = make_env(make_tokenizer(chat_template=CHATML), rows=[{"prompt": TURNS}, *rows[5:]]).reports["train"]
    assert (report.kept, report.num_dropped) == (1, 3)
    with pytest.raises(DataError, match=r"lacks prompt; .*columns: \{prompt: question\}"):
        make_env(tokenizer, rows=[{"question": "a"}])
    cut = make_env(tokenizer, max_context_length=4)
    assert cut.longest_sequence == 4
    assert cut.reports["train"].prompts_cut == 5


def test_it_is_a_gymnasium_environment_whose_reward_is_the_mean_of_its_functions(tokenizer) -> None:
    env = make_env(tokenizer, {"short": brevity, "right": right}, reward_weights={"short": 0.5, "right": 2.0})
    check_env(env, skip_render_check=True)
    observation, _ = env.reset(seed=3)
    assert observation.keys() == {"input_ids", "prompt_lengths"}
    batch = [env.train_pairs[row] for row in np.random.default_rng([3, 0]).permutation(5)[:3]]
    texts = [[str(sample.row), "yes"] for sample in batch]
    action = np.full((3, 2, 9), -1)
    for row, own in enumerate(texts):
        for place, text in enumerate(own):
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, 5]
            action[row, place, : len(ids)] = ids
    _, reward, ended, _, _ = env.step(action)
    points = [[-0.5 + 2.0, -1.5 + 2.0 * (str(sample.row) in "yes")] for sample in batch]
    assert reward == pytest.approx(np.mean(points))
    assert not ended
    with pytest.raises(ConfigurationError, match=r"pass token ids \(3, G, T\)"):
        env.step(np.zeros(3))


def test_a_function_that_fails_is_named_with_the_prompt_before_any_training(tokenizer) -> None:
    def wrong(completions: list[str]) -> list[float]:
        return [1.0 / len(completion) for completion in completions]

    with pytest.raises(ConfigurationError, match=r"wrong raised ZeroDivisionError: .* on row 0, 'Question 0:'"):
        make_env(tokenizer, wrong)
    for given, message in (
        (lambda completions: 1.0, r"returned float for 2 completions"),
        (lambda completions: [1.0], r"returned 1 values for 2 completions"),
        (lambda completions: "ab", r"returned str for 2 completions"),
        (lambda completions: [1.0, "2"], r"returned '2'.*a number for each"),
        (lambda completions: {len(one) for one in completions}, r"returned set for 2 completions"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make_env(tokenizer, {"mine": given})


def test_a_column_of_some_sets_or_splits_is_given_everywhere_and_functions_are_tried_on_each(tokenizer) -> None:
    """Not only in a batch that happens to have such a row."""
    sets = {"sums": ROWS, "essays": [{"prompt": f"Write {number}."} for number in range(3)]}
    mixed: dict[str, Any] = {"rows": sets, "dataset_weights": {"sums": 1, "essays": 1}}
    seen: list[list[str | None]] = []

    def tolerant(completions: list[str], answer: list[str | None]) -> list[float]:
        seen.append(answer)
        return [0.0 if one is None else 1.0 for one in answer]

    env = make_env(tokenizer, tolerant, **mixed)
    assert seen == [["0", "0", None, None]]
    essays = [pair for pair in env.train_pairs if pair.set_name == "essays"]
    assert env.rewards.of_answers(essays, ["a"] * 3).tolist() == [[0.0]] * 3
    with pytest.raises(ConfigurationError, match=r"right raised TypeError: .* on row 0 of essays, 'Write 0.'"):
        make_env(tokenizer, right, **mixed)
    with pytest.raises(ConfigurationError, match=r"right raised TypeError: .* on row 0, 'Write 0.'"):
        RewardGym(ROWS, sets["essays"], tokenizer, right, data_batch_size_per_gpu=3)


def test_a_column_that_the_names_of_prompts_and_answers_hide_is_warned_of(tokenizer) -> None:
    rows = [row | {"completions": ["a", "b"]} for row in ROWS]
    with pytest.warns(UserWarning, match=r"not the columns \['completions'\] of the rows: rename these"):
        make_env(tokenizer, rows=rows)
    make_env(tokenizer, rows=rows, columns={"ignore": ["completions"]})


def test_the_prompt_on_which_a_function_raises_is_found(tokenizer) -> None:
    def picky(prompts: list[str], completions: list[str], level: list[int]) -> list[float]:
        if "Question 3:" in prompts:
            raise KeyError("no entry")
        return [0.0] * len(completions)

    env = make_env(tokenizer, picky)
    with pytest.raises(ConfigurationError, match=r"picky raised KeyError: 'no entry'.* on row 3, 'Question 3:'"):
        env.rewards.of_answers(env.train_pairs, ["a"] * 5)


def test_a_generator_runs_where_its_function_is_called(tokenizer) -> None:
    """What it raises, also a TypeError, is named with the prompt, and the time that it takes is the function's."""

    def picky(prompts: list[str], completions: list[str]) -> Iterator[float]:
        for prompt, completion in zip(prompts, completions, strict=True):
            yield 1.0 if "Question 3:" not in prompt else completion + 1  # type: ignore[operator]

    env = make_env(tokenizer, picky)
    assert env.rewards.of_answers(env.train_pairs[:3], ["a"] * 3).tolist() == [[1.0]] * 3
    with pytest.raises(ConfigurationError, match=r"picky raised TypeError: .* on row 3, 'Question 3:'"):
        env.rewards.of_answers(env.train_pairs, ["a"] * 5)
    never = threading.Event()

    def slow(completions: list[str]) -> Iterator[float]:
        for _ in completions:
            never.wait()
            yield 0.0

    with pytest.raises(ConfigurationError, match=r"slow has not returned within reward_timeout=0.05 s"):
        make_env(tokenizer, slow, reward_timeout=0.05)
    never.set()


def test_a_function_that_does_not_return_in_time_is_named(tokenizer) -> None:
    never = threading.Event()

    def slow(completions: list[str]) -> list[float]:
        never.wait()
        return [0.0] * len(completions)

    with pytest.raises(ConfigurationError, match=r"slow has not returned within reward_timeout=0.05 s.*row 0"):
        make_env(tokenizer, slow, reward_timeout=0.05)
    never.set()
    assert make_env(tokenizer, reward_timeout=60).rewards.timeout == 60


def test_none_says_nothing_and_numbers_may_be_of_any_type(tokenizer) -> None:
    env = make_env(tokenizer, [lambda completions: [None, True, np.float32(0.5)][: len(completions)]])
    assert env.rewards.of_answers(env.train_pairs[:3], ["a"] * 3).tolist() == [[0.0], [1.0], [0.5]]
    huge = make_env(tokenizer, [lambda completions: [10**400, -(10**400)]])
    assert huge.rewards.of_answers(huge.train_pairs[:2], ["a"] * 2).tolist() == [[np.inf], [-np.inf]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"functions": "module:function"}, r"if this is the name of a reward model, RewardModel\('module:function'\)"),
        ({"functions": []}, "must be a function"),
        ({"functions": {"a": 3}}, "must be a function"),
        ({"functions": [brevity, brevity]}, "have equal names"),
        ({"reward_weights": [1.0, 2.0]}, r"reward_weights=\[1.0, 2.0\]: must have a number for each of"),
        ({"reward_weights": {"other": 1.0}}, "must have a number for each of"),
        ({"reward_weights": [-0.0]}, r"reward_weights=\[-0.0\]: are all 0"),
        ({"reward_timeout": 0}, "reward_timeout=0"),
    ],
)
def test_functions_weights_and_times_that_make_no_sense_are_refused(tokenizer, arguments, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_env(tokenizer, **arguments)


def test_a_function_that_changes_what_it_is_given_changes_nothing() -> None:
    seen: list[list[int]] = []

    def grows(prompts: list[Any], completions: list[str], notes: list[list[int]]) -> list[float]:
        seen.append([len(prompt) + len(note) for prompt, note in zip(prompts, notes, strict=True)])
        for prompt, note in zip(prompts, notes, strict=True):
            prompt.append({"role": "assistant", "content": "more"})
            note.append(1)
        return [0.0] * len(completions)

    env = make_env(make_tokenizer(chat_template=CHATML), grows, [{"prompt": TURNS, "notes": [1, 2]}])
    prompt = env.train_pairs[0]
    env.rewards.of_answers([prompt] * 3, ["a", "b", "c"])
    assert seen == [[3, 3], [3, 3, 3]]
    assert prompt.extras[ASKED] == TURNS
    assert prompt.extras[COLUMNS] == {"notes": [1, 2]}


def test_a_function_that_is_only_watched_may_say_anything(tokenizer) -> None:
    def watched(completions: list[str]) -> list[float]:
        return [float("nan"), float("-inf")] * (len(completions) // 2)

    env = make_env(tokenizer, {"brevity": brevity, "watched": watched}, reward_weights=[2.0, 0.0])
    prompts = env.train_pairs[:1] * 2
    found = env.rewards.of_answers(prompts, ["abc", "abcd"])
    assert env.rewards.total(found).tolist() == [-6.0, -8.0]
    assert not np.isfinite(found[:, 1]).any()


def test_the_main_process_alone_is_asked_for_rewards(tokenizer, monkeypatch) -> None:
    class Second:
        size, is_main = 2, False

        def from_main(self, value: Any) -> Any:
            assert value == {}
            return {"value": [[1.0, float("nan")]]}

    calls: list[int] = []

    def counted(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return [0.0] * len(completions)

    env = make_env(tokenizer, counted)
    monkeypatch.setattr("evollm.llm_envs.rewards.Processes.present", Second)
    found = env.rewards.of_answers(env.train_pairs[:2], ["a", "b"])
    assert found[0, 0] == 1
    assert np.isnan(found[1, 0])
    assert calls == [2]
