from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from tokenizers_for_tests import make_tokenizer

from evollm import ConfigurationError, DataError, PreferenceGym, SFTGym
from evollm.llm_envs.observations import batch_of


def rows(count: int, tag: str) -> list[dict[str, str]]:
    return [
        {"prompt": f"{tag} {n} the question?" * (1 + n % 3), "completion": " yes" * (1 + n % 4)} for n in range(count)
    ]


def make_gym(num_train: int = 10, **kwargs: Any) -> SFTGym:
    return SFTGym(
        rows(num_train, "train"), rows(7, "test"), make_tokenizer(), **{"data_batch_size_per_gpu": 4} | kwargs
    )


def test_gymnasiums_own_checker_passes_for_examples() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(make_gym())
    fine = ("infinity", "symmetric and normalized", "render modes")
    assert [str(w.message) for w in caught if not any(words in str(w.message) for words in fine)] == []


def test_examples_come_in_the_order_of_the_pairs_of_the_same_seed() -> None:
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " so"} for row in rows(10, "train")]
    env, other = make_gym(seed=3), PreferenceGym(pairs, None, make_tokenizer(), data_batch_size_per_gpu=4, seed=3)
    for _ in range(2 * len(env)):
        batch, theirs = env.next_batch(), other.next_batch()
        assert not batch.rejected_lengths.any()
        for row in range(len(batch)):
            assert batch[row].prompt_ids.tolist() == theirs[row].prompt_ids.tolist()
            assert batch[row].chosen_ids.tolist() == theirs[row].chosen_ids.tolist()


def test_the_reward_is_the_mean_log_probability_of_a_token() -> None:
    env = make_gym(num_train=6)
    observation, _ = env.reset()
    for count in (4, 2):
        tokens = observation["chosen_lengths"].sum()
        action = np.array([-1.0, -2.0, -3.0, -4.0], dtype=np.float32)
        assert action in env.action_space
        observation, reward, *_ = env.step(action)
        assert reward == pytest.approx(action[:count].sum() / tokens)
        assert type(reward) is float


def test_observations_of_examples_lie_in_the_space_and_hold_the_batch() -> None:
    env, twin = make_gym(), make_gym()
    observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    assert batch_of(observation).keys() == twin.next_batch().keys()


def test_a_position_among_examples_is_restored() -> None:
    env, restored = make_gym(seed=8), make_gym()
    for _ in range(4):
        env.next_batch()
    restored.load_state_dict(json.loads(json.dumps(env.state_dict())))
    assert [restored.next_batch().keys() for _ in range(5)] == [env.next_batch().keys() for _ in range(5)]


def test_each_gym_refuses_the_others_rows_and_names_the_argument() -> None:
    preferences = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(DataError, match=r"test_dataset=.*preference pairs; pass them to PreferenceGym"):
        SFTGym(rows(2, "train"), preferences, make_tokenizer())
    with pytest.raises(DataError, match=r"train_dataset=.*SFTGym"):
        PreferenceGym(rows(2, "train"), None, make_tokenizer())


def test_evaluation_without_examples_is_refused_and_dropped_rows_are_reported() -> None:
    env = SFTGym([*rows(2, "train"), {"prompt": "a", "completion": ""}], None, make_tokenizer())
    assert str(env.reports["train"]) == "train: 2 examples kept, 1 dropped (1 empty completion: row 2)"
    with pytest.raises(ConfigurationError, match="SFTGym needs a test_dataset"):
        env.eval_batches()


def test_examples_that_two_splits_share_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="2 of 2 examples of test_dataset are in train_dataset too"):
        SFTGym(rows(6, "a"), rows(2, "a"), make_tokenizer())
