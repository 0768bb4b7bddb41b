from __future__ import annotations

import json
import warnings
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tokenizers_for_tests import make_tokenizer

from evollm.data import Batch
from evollm.errors import ConfigurationError, DataError
from evollm.llm_envs import PreferenceGym
from evollm.llm_envs.observations import batch_of

WORDS = ["yes", "no", "answer", "question", "system", "user", "other"]


def rows(count: int, tag: str) -> list[dict[str, str]]:
    """Pairs of different lengths and contents."""
    return [
        {
            "prompt": f"{tag} {n} the question?" * (1 + n % 3),
            "chosen": f" {WORDS[n % 7]}" * (1 + n % 4),
            "rejected": " so",
        }
        for n in range(count)
    ]


def make_gym(num_train: int = 10, num_test: int | None = 7, **kwargs: Any) -> PreferenceGym:
    test = None if num_test is None else rows(num_test, "test")
    return PreferenceGym(rows(num_train, "train"), test, make_tokenizer(), **{"data_batch_size_per_gpu": 4} | kwargs)


def batches(env: PreferenceGym, count: int) -> list[list[bytes]]:
    return [env.next_batch().keys() for _ in range(count)]


def margins(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_gymnasiums_own_checker_passes() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(make_gym())
    # Margins have no bounds, and without a registered spec there is nothing to render.
    fine = ("infinity", "symmetric and normalized", "render modes")
    assert [str(w.message) for w in caught if not any(words in str(w.message) for words in fine)] == []


def test_observations_lie_in_the_space_and_hold_the_batch_of_next_batch() -> None:
    env, twin = make_gym(), make_gym()
    observation, info = env.reset()
    for index in range(len(env)):
        assert env.observation_space.contains(observation)
        assert info == {"epoch": 0, "index": index}
        assert batch_of(observation).keys() == twin.next_batch().keys()
        observation, _, terminated, truncated, info = env.step(margins(0, 0, 0, 0))
        assert terminated is (index == len(env) - 1)
        assert truncated is False
    assert env.observation_space.contains(observation)
    assert not any(array.any() for array in observation.values())


def test_reward_is_the_share_ordered_rightly_with_ties_half_and_absent_rows_ignored() -> None:
    env = make_gym(num_train=6)
    env.reset()
    assert env.step(margins(2.0, -1.0, 0.0, 0.5))[1] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    reward = env.step(margins(1.0, -1.0, -1.0, -1.0))[1]
    assert reward == pytest.approx(1 / 2)
    assert type(reward) is float


def test_a_nan_margin_is_not_ordered_rightly() -> None:
    env = make_gym()
    env.reset()
    assert env.step(margins(np.nan, 1, 1, 1))[1] == pytest.approx(3 / 4)


def test_an_epoch_serves_every_pair_once_in_the_documented_order() -> None:
    env = make_gym(seed=5)
    for epoch in range(2):
        served = [key for batch in batches(env, len(env)) for key in batch]
        order = np.random.default_rng([5, epoch]).permutation(10)
        assert served == Batch([env.train_pairs[row] for row in order]).keys()
        assert env.num_epochs == epoch + 1


def test_the_same_seed_gives_the_same_batches_and_another_seed_others() -> None:
    assert batches(make_gym(), 9) == batches(make_gym(), 9)
    assert batches(make_gym(), 9) != batches(make_gym(seed=1), 9)


def test_the_last_batch_of_an_epoch_is_the_smaller_one() -> None:
    env = make_gym()
    assert len(env) == 3
    assert [len(batch) for batch in batches(env, 6)] == [4, 4, 2, 4, 4, 2]


def test_reset_starts_the_next_epoch_only_if_the_current_one_was_begun() -> None:
    env = make_gym()
    assert env.reset()[1] == {"epoch": 0, "index": 0}
    assert env.reset()[1] == {"epoch": 1, "index": 0}
    env.next_batch()
    assert env.reset()[1] == {"epoch": 2, "index": 0}


def test_reset_with_a_seed_starts_over_with_it() -> None:
    env = make_gym()
    batches(env, 5)
    observation, info = env.reset(seed=9)
    assert (info, env.seed, env.num_epochs) == ({"epoch": 0, "index": 0}, 9, 0)
    assert batch_of(observation).keys() == make_gym(seed=9).next_batch().keys()


def test_num_epochs_counts_an_epoch_once_its_last_batch_is_scored() -> None:
    env = make_gym()
    env.reset()
    counts = []
    for _ in range(len(env)):
        counts.append(env.num_epochs)
        env.step(margins(0, 0, 0, 0))
    assert [*counts, env.num_epochs] == [0, 0, 0, 1]


def test_step_needs_a_reset_first_and_after_an_epochs_end() -> None:
    env = make_gym(num_train=3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(margins(0, 0, 0, 0))
    env.reset()
    env.step(margins(0, 0, 0, 0))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(margins(0, 0, 0, 0))


@pytest.mark.parametrize(
    "action",
    [margins(1, 2), np.zeros((4, 1)), "abcd", ["a"] * 4, [[1], [1, 2]], None, torch.ones(4, requires_grad=True)],
)
def test_an_action_that_is_not_one_number_for_each_row_is_refused(action: Any) -> None:
    env = make_gym()
    env.reset()
    with pytest.raises(ConfigurationError, match=r"^action="):
        env.step(action)
    env.step(margins(0, 0, 0, 0))  # the refused action changed nothing


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_eval_mode_serves_the_selection_pairs_in_their_own_order() -> None:
    env = make_gym()
    keys = Batch(env.test_pairs).keys()
    with env.eval_mode():
        assert len(env) == 2
        assert batches(env, 4) == [keys[:4], keys[4:]] * 2
        observation, _ = env.reset()
        assert batch_of(observation).keys() == keys[:4]


@pytest.mark.parametrize("fails", [True, False])
def test_eval_mode_leaves_the_training_position_as_it_was(fails: bool) -> None:
    env, undisturbed = make_gym(), make_gym()
    for each in (env, undisturbed):
        each.reset()
        each.step(margins(0, 0, 0, 0))
    try:
        with env.eval_mode():
            env.reset(seed=3)
            env.step(margins(0, 0, 0, 0))
            with env.eval_mode():
                batches(env, 3)
            assert env.step(margins(0, 0, 0, 0))[2]
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert env.state_dict() == undisturbed.state_dict()
    np.testing.assert_equal(env.step(margins(1, 0, 0, 0)), undisturbed.step(margins(1, 0, 0, 0)))
    assert batches(env, 5) == batches(undisturbed, 5)


@pytest.mark.parametrize("split", ["test", "final"])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 100])
def test_eval_batches_hold_every_pair_once_at_its_index(split: str, batch_size: int | None) -> None:
    env = make_gym(final_dataset=rows(9, "final"))
    pairs = {"test": env.test_pairs, "final": env.final_pairs}[split]
    seen = []
    for indices, batch in env.eval_batches(split, batch_size):
        assert 1 <= len(batch) <= (batch_size or 4)
        assert batch.keys() == Batch([pairs[index] for index in indices]).keys()
        seen.extend(indices.tolist())
    assert sorted(seen) == list(range(len(pairs)))


def padded(batch: Batch) -> int:
    """Tokens of a batch whose samples are padded to its longest."""
    return len(batch) * int(batch.num_tokens.max())


def test_eval_batches_pad_no_more_than_the_order_of_the_rows_would() -> None:
    env = make_gym(num_test=40)
    grouped = sum(padded(batch) for _, batch in env.eval_batches())
    with env.eval_mode():
        as_they_come = sum(padded(env.next_batch()) for _ in range(len(env)))
    assert grouped < as_they_come


def test_upcoming_samples_are_those_of_the_epochs_next_batches() -> None:
    env = make_gym()
    env.next_batch()
    soon = Batch(env.upcoming(6)).keys()
    assert (len(soon), env.upcoming(0)) == (6, [])
    assert [*env.next_batch().keys(), *env.next_batch().keys()][:6] == soon
    while env.state_dict()["index"] < len(env):
        env.next_batch()
    assert env.upcoming(6) == [], "the order of the next epoch is not part of this one"


def test_eval_batches_do_not_move_the_training_position() -> None:
    env = make_gym()
    env.next_batch()
    list(env.eval_batches())
    assert env.state_dict()["index"] == 1


def test_evaluation_without_pairs_is_refused() -> None:
    env = make_gym(num_test=None)
    assert (env.test_pairs, env.final_pairs, list(env.reports)) == ([], [], ["train"])
    with pytest.raises(ConfigurationError, match="test_dataset=None"), env.eval_mode():
        pass
    with pytest.raises(ConfigurationError, match="test_dataset=None"):
        env.eval_batches()
    with pytest.raises(ConfigurationError, match="final_dataset=None"):
        env.eval_batches("final")
    with pytest.raises(ConfigurationError, match="split='train'"):
        env.eval_batches("train")


# ------------------------------------------------------------------------------------------------------------- position


@pytest.mark.parametrize("moved", [0, 2, 3, 7])
def test_a_restored_position_goes_on_with_the_same_batches(moved: int) -> None:
    env, restored = make_gym(seed=8), make_gym()
    batches(env, moved)
    restored.load_state_dict(json.loads(json.dumps(env.state_dict())))
    assert restored.num_epochs == env.num_epochs
    assert batches(restored, 5) == batches(env, 5)


def test_a_position_restored_between_steps_still_takes_the_action() -> None:
    env, restored = make_gym(), make_gym()
    env.reset()
    env.step(margins(0, 0, 0, 0))
    env.step(margins(0, 0, 0, 0))
    restored.load_state_dict(json.loads(json.dumps(env.state_dict())))
    np.testing.assert_equal(restored.step(margins(1, 0, 0, 0)), env.step(margins(1, 0, 0, 0)))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"extra": 1}, "state"),
        ({"epoch": -1}, "epoch"),
        ({"index": 4}, "index"),
        ({"seed": "x"}, "seed"),
        ({"awaiting_action": True}, "awaiting_action"),
        ({"num_pairs": 11}, "num_pairs"),
        ({"batch_size": 2}, "batch_size"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: dict[str, Any], field: str) -> None:
    env = make_gym()
    before = env.state_dict()
    with pytest.raises(ConfigurationError, match=field):
        env.load_state_dict(before | change)
    with pytest.raises(ConfigurationError, match="state="):
        env.load_state_dict({"epoch": 0})
    assert env.state_dict() == before


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"data_batch_size_per_gpu": 0},
        {"data_batch_size_per_gpu": True},
        {"max_context_length": 1},
        {"min_completion_length": 0},
        {"seed": -1},
        {"seed": None},
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments: dict[str, Any]) -> None:
    (field,) = arguments
    with pytest.raises(ConfigurationError, match=f"^{field}="):
        make_gym(**arguments)


def test_a_process_that_is_not_connected_to_the_others_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"accelerator\.num_processes=2"):
        make_gym(accelerator=SimpleNamespace(num_processes=2))
    make_gym(accelerator=SimpleNamespace(num_processes=1))


def test_an_unusable_dataset_is_named_as_the_argument_it_was() -> None:
    with pytest.raises(DataError, match=r"^final_dataset="):
        make_gym(final_dataset=[{"prompt": "a", "chosen": "b", "rejected": "b"}])


def test_the_space_and_longest_sequence_cover_every_split() -> None:
    long = [{"prompt": "the question " * 50, "chosen": " yes", "rejected": " no no no"}]
    env = make_gym(final_dataset=long)
    assert env.longest_sequence == env.final_pairs[0].longest_sequence
    assert env.observation_space["input_ids"].shape == (4, env.final_pairs[0].num_tokens)
    assert env.observation_space["input_ids"].high.max() == len(env.tokenizer) - 1


def test_pairs_that_two_splits_share_are_warned_of_with_their_count() -> None:
    train = rows(6, "train")
    with pytest.warns(UserWarning, match="_dataset too") as caught:
        PreferenceGym(train, rows(3, "test") + train[:2], make_tokenizer(), final_dataset=train[1:2])
    messages = [str(warning.message) for warning in caught]
    assert [message.split(":")[0] for message in messages] == [
        "2 of 5 pairs of test_dataset are in train_dataset too",
        "1 of 1 pairs of final_dataset are in train_dataset too",
        "1 of 1 pairs of final_dataset are in test_dataset too",
    ]


def test_disjoint_splits_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_gym(final_dataset=rows(4, "final"))
