from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import make_rows
from tokenizers_for_tests import chatml_tokenizer

from evollm import DataError, SFTGym, UnpairedGym
from evollm.data.unpaired_rows import UNPAIRED, Balance, read_unpaired
from evollm.llm_envs import DatasetGym
from evollm.llm_envs.observations import batch_of

GOOD, BAD = {"prompt": "Tea?", "completion": " Yes"}, {"prompt": "Milk?", "completion": " No"}


def labelled(*labels: object, **changes: Any) -> list[dict[str, Any]]:
    return [{**(GOOD, BAD)[number % 2], "label": label, **changes} for number, label in enumerate(labels)]


def labels_of(env: DatasetGym) -> list[float | None]:
    return [pair.label for pair in env.train_pairs]


@pytest.mark.parametrize(
    ("labels", "found"), [((True, False), [1, 0]), ((0, 1), [0, 1]), ((1.0, 0.0), [1, 0]), (("true", "0"), [1, 0])]
)
def test_labels_are_booleans_or_1_and_0(tokenizer, labels: tuple[object, ...], found: list[int]) -> None:
    assert labels_of(UnpairedGym(labelled(*labels), None, tokenizer)) == found


def test_labels_of_frames_and_csv_files_are_read(tokenizer, tmp_path: Path) -> None:
    frame = pd.DataFrame(labelled(True, False, False))
    frame.to_csv(tmp_path / "rows.csv", index=False)
    for data in (frame, str(tmp_path / "rows.csv")):
        assert labels_of(UnpairedGym(data, None, tokenizer)) == [1, 0, 0]


@pytest.mark.parametrize("label", ["good", 2, -1, 0.5, "yes", [True]])
def test_a_label_that_says_neither_is_refused_with_its_row(tokenizer, label: object) -> None:
    with pytest.raises(DataError) as caught:
        UnpairedGym(labelled(True, False, label), None, tokenizer)
    assert (caught.value.field, caught.value.value) == ("train_dataset", f"label {label!r} in row 2")
    message = str(caught.value)
    assert "good: true, 1; bad: false, 0" in message
    assert "columns.label.good" in message


def test_values_of_a_label_can_be_said(tokenizer) -> None:
    columns = {"label": {"column": "verdict", "good": ["up", 5], "bad": "down"}}
    rows = [{**GOOD, "verdict": verdict} for verdict in ("up", "down", 5)]
    assert labels_of(UnpairedGym(rows, None, tokenizer, columns=columns)) == [1, 0, 1]
    with pytest.raises(DataError, match="verdict 'sideways' in row 3"):
        UnpairedGym([*rows, {**GOOD, "verdict": "sideways"}], None, tokenizer, columns=columns)


def test_rows_without_a_label_or_an_answer_are_dropped_and_counted(tokenizer) -> None:
    rows = [*labelled(True, False, None, float("nan")), {**GOOD, "completion": "", "label": True}]
    env = UnpairedGym(rows, None, tokenizer)
    assert env.reports["train"].dropped == {"label is missing": (2, (2, 3)), "empty completion": (1, (4,))}
    assert len(env.train_pairs) == env.reports["train"].kept == 2
    with pytest.raises(DataError, match=r"no usable answer.*2 label is missing"):
        UnpairedGym(labelled(None, None), None, tokenizer)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD], r"lacks label; rename its columns to prompt, completion and label .*SFTGym"),
        ([{**GOOD, "kto_tag": True}], r"label: \{column: kto_tag, good: \[true, 1\], bad: \[false, 0\]\}"),
        ([{"prompt": "a", "answer": "b", "label": True}], "lacks completion.*completion: answer"),
        ([{"prompt": "a", "label": True}], "lacks completion"),
        ([{"completion": "a", "label": True}], "lacks prompt"),
        ([{"question": "a", "completion": "b", "label": True}], "lacks prompt.*prompt: question"),
        ([{"chosen": "a", "prompt": "b"}], "lacks completion.*those of pairs"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "label": 1}], "column 'label' that would not be used"),
    ],
)
def test_missing_columns_are_named_with_what_to_do(tokenizer, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        UnpairedGym(rows, None, tokenizer)


def test_a_pair_is_a_desirable_and_an_undesirable_answer(tokenizer, tmp_path: Path) -> None:
    rows = make_rows(4)
    for _ in range(2):  # then from the cache
        env = UnpairedGym(rows, make_rows(2, 4), tokenizer, cache_dir=tmp_path)
        assert labels_of(env) == [1.0, 0.0] * 4
        assert [pair.row for pair in env.train_pairs] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert env.reports["train"].kept == 8
        assert str(env.reports["train"]).startswith("train: 8 answers kept")
    chosen = SFTGym([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows], None, tokenizer)
    ours, theirs = env.train_pairs[::2], chosen.train_pairs
    assert [pair.token_ids.tolist() for pair in ours] == [pair.token_ids.tolist() for pair in theirs]
    for preview in env.reports["train"].previews:
        assert preview.question in tokenizer.decode(env.train_pairs[preview.position].prompt_ids)
        assert env.train_pairs[preview.position].label == 1


def test_pairs_and_labelled_rows_of_several_files_are_read_together(tokenizer, tmp_path: Path) -> None:
    pd.DataFrame(make_rows(2)).to_json(tmp_path / "pairs.jsonl", orient="records", lines=True)
    pd.DataFrame(labelled(False, True)).to_json(tmp_path / "labels.jsonl", orient="records", lines=True)
    env = UnpairedGym([str(tmp_path / "pairs.jsonl"), str(tmp_path / "labels.jsonl")], None, tokenizer)
    assert labels_of(env) == [1, 0, 1, 0, 0, 1]


def test_prompts_that_sides_repeat_are_taken_off(tokenizer) -> None:
    repeated = [{**row, "completion": row["prompt"] + row["completion"]} for row in labelled(True, False)]
    plain = UnpairedGym(labelled(True, False), None, tokenizer).train_pairs
    found = UnpairedGym(repeated, None, tokenizer).train_pairs
    assert [pair.token_ids.tolist() for pair in found] == [pair.token_ids.tolist() for pair in plain]


def test_messages_go_through_the_chat_template() -> None:
    said = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes"}]
    prompted = {"prompt": said[:1], "completion": said[1:]}
    rows = [{"messages": said, "label": True}, {"messages": said, "label": False}]
    twins = [{**prompted, "label": True}, {**prompted, "label": False}]
    first, second = (UnpairedGym(one, None, chatml_tokenizer()) for one in (rows, twins))
    assert first.form == second.form == "chat"
    assert [one.key for one in first.train_pairs] == [one.key for one in second.train_pairs]
    assert labels_of(first) == [1, 0]


@pytest.mark.parametrize("split", ["train", "test", "final"])
def test_answers_of_one_label_are_refused(tokenizer, split: str) -> None:
    splits = {f"{name}_dataset": labelled(True, False) for name in ("train", "test", "final")}
    splits[f"{split}_dataset"] = labelled(True, True, 1)
    message = rf"{split}_dataset='3 desirable and 0 undesirable answers': .*both.*SFTGym"
    with pytest.raises(DataError, match=message):
        UnpairedGym(**splits, tokenizer=tokenizer)


def test_weights_of_the_paper() -> None:
    """Equation 8: desirable answers times their weight are 1 to 4/3 times the undesirable ones times theirs."""
    balance = Balance.of([1.0] * 30 + [0.0] * 10)
    assert str(balance) == "30 desirable and 10 undesirable answers"
    assert balance.advice() == "either desirable_weight from 0.333 to 0.444 or undesirable_weight from 2.25 to 3"
    assert balance.advice(1.0, 2.0).startswith("either desirable_weight from 0.667 to 0.889 or")
    assert balance.is_strong()
    assert not balance.is_strong(0.4)
    assert not balance.is_strong(1.0, 2.5)
    assert not Balance(12, 10).is_strong()
    assert Balance(10, 30).is_strong()
    assert Balance(3, 0).lacks_a_class
    assert not Balance(3, 1).lacks_a_class


def test_rows_are_read_without_a_tokenizer() -> None:
    found, dropped = read_unpaired([*labelled(True, False), {**GOOD, "label": None}], "data")
    assert [pair.label for pair in found] == [1.0, 0.0]
    assert dropped == {"label is missing": [2]}
    assert UNPAIRED.noun == "answer"


def test_an_observation_has_labels_and_a_reward_by_their_sign(tokenizer) -> None:
    env = UnpairedGym(labelled(True, False, False), None, tokenizer, data_batch_size_per_gpu=4)
    observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    wanted = [pair.label for pair in batch_of(observation)]
    assert observation["labels"].tolist() == [*wanted, 0.0]
    action = [2.0 if label else -1.0 for label in wanted]
    assert env.step([*action, 0.0])[1] == 1.0
    env.reset()
    assert env.step([0.0] * 4)[1] == 0.5
