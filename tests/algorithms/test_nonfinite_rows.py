"""Rows on which the frozen base, or the reference, gives NaN or infinite log-probs: named, and left out or refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from conftest import make_examples, make_rows
from nonfinite import KINDS, MARK, break_token, marked
from snapshots import actor_bits

from evollm import DataError, PreferenceGym, SFTGym
from evollm.algorithms import dpo_step, sft_step
from evollm.data.samples import Batch, Sample
from evollm.models.engine import Engine

LEFT_OUT = "left out: train row"


def pairs_of(rows: list[dict[str, str]], tokenizer: Any, gym: Any = PreferenceGym) -> Batch:
    """All rows in their order, as a batch of the gym's training split."""
    env = gym(rows, None, tokenizer, data_batch_size_per_gpu=len(rows))
    return Batch(env.train_pairs, "train")


def others(batch: Batch, left_out: int) -> Batch:
    return batch.select([row for row in range(len(batch)) if row != left_out])


@pytest.mark.parametrize(
    ("kind", "column", "arguments"),
    [
        *(
            (kind, column, {})
            for kind in KINDS
            for column in ("prompt", "chosen", "rejected")
            if (kind, column) != (KINDS[2], "prompt")
        ),
        *(
            (KINDS[0], "chosen", arguments)
            for arguments in (
                {"loss_type": "aot"},
                {"ld_alpha": 0.5},
                {"micro_batch_size_per_gpu": 2},
                {"update_epochs": 2},
                {"token_budget": 40},
                {"use_separate_reference_adapter": False},
                {"calc_position_embeddings": False},
            )
        ),
    ],
)
def test_a_row_that_is_not_finite_under_the_reference_changes_no_bit_of_what_the_others_teach(
    kind, column, arguments, make_population, make_model, tokenizer
) -> None:
    batch = pairs_of(marked(make_rows(6), {4: column}), tokenizer)
    learnt = []
    for served in (batch, others(batch, 4)):
        agents = make_population(2, actor_network=break_token(make_model(), tokenizer, kind), **arguments)
        agents[1].beta = 0.3
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            metrics = dpo_step.learn_together(agents, served)
        said = [str(one.message) for one in caught if LEFT_OUT in str(one.message)]
        assert [text.split(",")[0] for text in said] == ([f"{LEFT_OUT} 4"] if served is batch else [])
        assert not any(agent.diverged for agent in agents)
        learnt.append(
            ([actor_bits(agent) for agent in agents], metrics, dpo_step.learn_together(agents, others(batch, 4)))
        )
    assert learnt[0] == learnt[1]
    assert all(math.isfinite(value) for metrics in learnt[0][1] for value in metrics.values())


def test_references_of_other_rows_have_the_bits_that_they_have_without_such_a_row(
    make_agent, make_model, tokenizer
) -> None:
    # Padded to the longest of a pass, whose length the roundings depend on.
    agent = make_agent(actor_network=break_token(make_model(), tokenizer), calc_position_embeddings=False)
    rng, (token,) = np.random.default_rng(0), tokenizer(MARK, add_special_tokens=False)["input_ids"]
    short, long = (
        Sample.of(*(rng.integers(5, token, size=size) for size in sizes)) for sizes in ((3, 4, 5), (90, 60, 60))
    )
    long.prompt_ids[0] = token
    both = agent.reference_logprobs(Batch([short, long])).columns
    agent.base.reference_cache.clear()
    alone = agent.reference_logprobs(Batch([short])).columns
    assert [column[0] for column in both] == [column[0] for column in alone]
    assert not any(column[1].isfinite() for column in both)


@pytest.mark.parametrize("column", ["prompt", "completion"])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_row_that_is_not_finite_under_the_base_changes_no_bit_of_what_sft_learns_from_the_others(
    kind, column, make_sft_population, make_model, tokenizer
) -> None:
    batch = pairs_of(marked(make_examples(6), {4: column}), tokenizer, SFTGym)
    learnt = []
    for served in (batch, others(batch, 4)):
        agents = make_sft_population(2, actor_network=break_token(make_model(), tokenizer, kind))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # The second time the row is known, and is not tried.
            metrics = [sft_step.learn_together(agents, served) for _ in range(2)]
        said = [str(one.message) for one in caught if LEFT_OUT in str(one.message)]
        assert [text.split(",")[0] for text in said] == ([f"{LEFT_OUT} 4"] if served is batch else [])
        learnt.append(([actor_bits(agent) for agent in agents], metrics))
    assert learnt[0] == learnt[1]


def test_a_batch_of_such_rows_alone_teaches_nothing_and_costs_nothing(make_agent, make_model, tokenizer) -> None:
    agent = make_agent(actor_network=break_token(make_model(), tokenizer))
    batch = pairs_of(marked(make_rows(4), {0: "chosen", 1: "rejected"}), tokenizer)
    before, usual = actor_bits(agent), agent.learn(batch.select([2, 3]), training=False)
    with pytest.warns(UserWarning, match="train rows 0, 1, for there the frozen base"):
        nothing = agent.learn(batch.select([0, 1]))
    assert nothing.keys() == usual.keys()
    assert math.isnan(nothing["loss"])
    assert math.isnan(nothing["rewards/accuracies"])
    assert (actor_bits(agent), agent.steps, agent.num_tokens, agent.diverged) == (before, 1, 0, False)
    assert math.isfinite(agent.learn(batch)["loss"])


def test_part_of_a_batch_that_teaches_nothing_leaves_the_means_to_the_other_parts(
    make_agent, make_model, tokenizer
) -> None:
    batch = pairs_of(marked(make_rows(4), {0: "chosen", 1: "rejected"}), tokenizer)
    agents = [make_agent(actor_network=break_token(make_model(), tokenizer), batch_size=2) for _ in range(2)]
    with pytest.warns(UserWarning, match=LEFT_OUT):
        assert agents[0].learn(batch) == agents[1].learn(batch.select([2, 3]))
    assert actor_bits(agents[0]) == actor_bits(agents[1])


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_such_rows_are_refused_when_asked_for_before_anything_is_learnt_from_their_batch(
    kind, make_agent, make_sft, make_model, tokenizer
) -> None:
    make, gym, rows = (make_agent, PreferenceGym, make_rows) if kind == "dpo" else (make_sft, SFTGym, make_examples)
    column = "chosen" if kind == "dpo" else "completion"
    agent = make(actor_network=break_token(make_model(), tokenizer), drop_nonfinite_rows=False)
    before = actor_bits(agent)
    batch = pairs_of(marked(rows(4), {1: column, 3: "prompt"}), tokenizer, gym)
    with pytest.raises(DataError, match=r"drop_nonfinite_rows=False: on train rows 1, 3 the frozen base"):
        agent.learn(batch)
    assert actor_bits(agent) == before
    env = gym(rows(4), marked(rows(6, 4), {2: "prompt"}), tokenizer)
    with pytest.raises(DataError, match="on test row 2 the frozen base"):
        agent.evaluate(env)


def test_a_row_keeps_the_number_that_it_has_in_the_users_dataset(make_agent, make_model, tokenizer) -> None:
    rows = make_rows(6)
    rows[0]["chosen"] = rows[0]["rejected"]
    batch = pairs_of(marked(rows, {4: "prompt"}), tokenizer)
    agent = make_agent(actor_network=break_token(make_model(), tokenizer))
    assert len(batch) == 5
    with pytest.warns(UserWarning, match="train row 4,"):
        agent.learn(batch)


def test_without_a_dataset_a_row_has_its_number_in_the_batch(make_agent, make_model, tokenizer) -> None:
    agent = make_agent(actor_network=break_token(make_model(), tokenizer))
    env = PreferenceGym(marked(make_rows(6), {4: "prompt"}), None, tokenizer, data_batch_size_per_gpu=6)
    observation, _ = env.reset()
    place = 6 - 1 - int(np.flatnonzero(env._rows(0, 0)[::-1] == 4)[0])
    with pytest.warns(UserWarning, match=f"batch row {place},"):
        agent.learn(observation)


@pytest.mark.parametrize("kind", ["dpo", "sft"])
@pytest.mark.parametrize("split", ["test", "final"])
def test_scores_are_those_of_the_split_without_such_rows(
    kind, split, make_agent, make_sft, make_model, tokenizer
) -> None:
    make, gym, rows = (make_agent, PreferenceGym, make_rows) if kind == "dpo" else (make_sft, SFTGym, make_examples)
    held_out = marked(rows(6, 4), {2: "prompt", 5: "prompt"})
    agent = make(actor_network=break_token(make_model(), tokenizer))
    agent.learn(pairs_of(rows(4), tokenizer, gym))
    found = []
    for scored in (held_out, [row for number, row in enumerate(held_out) if number not in (2, 5)]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            evaluation = agent.evaluate(
                gym(rows(4), tokenizer=tokenizer, **{"test_dataset": None, f"{split}_dataset": scored}), split
            )
        said = [str(one.message).split(",")[:2] for one in caught]
        assert said == ([[f"left out: {split} rows 2", " 5"]] if scored is held_out else [])
        found.append((len(evaluation), evaluation.scores))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["dpo", "sft"])
def test_a_split_without_any_finite_row_is_an_error_that_says_so(
    kind, make_agent, make_sft, make_model, tokenizer
) -> None:
    make, gym, rows = (make_agent, PreferenceGym, make_rows) if kind == "dpo" else (make_sft, SFTGym, make_examples)
    agent = make(actor_network=break_token(make_model(), tokenizer))
    env = gym(rows(4), marked(rows(2, 4), {0: "prompt", 1: "prompt"}), tokenizer)
    with pytest.raises(DataError, match=r"test_dataset='2 rows': on every one the frozen base.*the base is broken"):
        agent.evaluate(env)


def test_the_fast_paths_are_taken_in_spite_of_a_token_that_is_not_finite(make_agent, make_model, tokenizer) -> None:
    model = make_model()
    # Random tokens would hit one of so many.
    model.get_input_embeddings().weight.data[100:300] = math.nan
    agent = make_agent(actor_network=model)
    paths = Engine.of(agent.base).prepare([agent.actor_adapter], 60)
    assert (paths.shared_prompt, paths.tiled_head, paths.stacking) == (True, True, True)
