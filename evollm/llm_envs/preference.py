"""Preference pairs as a gymnasium environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evollm.data.preference_rows import PAIRS
from evollm.data.samples import Sample
from evollm.llm_envs.dataset_gym import DatasetGym


class PreferenceGym(DatasetGym):
    """Serves preference pairs in batches; an action gives each pair a margin.

    An observation is a batch of B pairs, padded to fixed shapes: `input_ids` (B, L) with `prompt | chosen | rejected`
    in each row, and `prompt_lengths`, `chosen_lengths`, `rejected_lengths` (B,), which are 0 for rows without a pair.
    If some turns of a completion are not scored, `scored_mask` (B, L) is 1 at scored tokens. An action is the margin of
    each pair (B,), for example the log-ratio of chosen minus the log-ratio of rejected, in nats. The reward is the
    share of pairs with margin > 0; a margin of 0 counts half, and rows without a pair do not count. An episode is an
    epoch.

    The order of epoch e is `np.random.default_rng([seed, e]).permutation(n)`, so seed, epoch and index determine the
    position, and all agents that start from the same position see the same batches. Train with `reset` and `step`, or
    with `next_batch`, whose batches have no rows without a pair and which starts the next epoch automatically.

    Args:
        train_dataset: Pairs to train on; see [`evollm.data.preference_rows.read_pairs`][] for what may be passed.
        test_dataset: Pairs that agents are selected by, or None.
        tokenizer: The model's tokenizer.
        data_batch_size_per_gpu: Pairs in a batch for each process; B is this number times the number of processes.
        accelerator: An `accelerate.Accelerator`, or None.
        max_context_length: Most tokens of prompt + longer completion; None: the tokenizer's maximum.
        min_completion_length: Fewest tokens of a completion, its end tokens included; None: no bound.
        seed: Seed of the order.
        final_dataset: Pairs for the final score, which select no agent, or None.
        encoder_decoder: Whether the model is an encoder-decoder, such as T5: prompts and completions are then tokenised
            separately, as two sequences.
        cache_dir: Folder that caches token ids between runs with the same rows, tokenizer and lengths; None: no cache.
            Rows are read, and chat templates applied, in any case.
        columns: The column of each role, and the label value of each meaning, for rows in a format that is not
            recognised; None: the columns' names decide. See [`evollm.data.columns.mapping_of`][].
        written_at: The time that a chat template writes, as a datetime or in ISO 8601; None: now. A resumed run needs
            the time in its `config.json`.
        dataset_weights: With several sets to train on, `train_dataset={"a": rows, "b": rows}`, the weight of each,
            `{"a": 3, "b": 1}`: an epoch has as many rows as the sets together, of each set in proportion to its weight.
            See [`evollm.data.mixing.mixed_order`][]. The other datasets may be such sets too, whose rows are all used.

    Attributes:
        tokenizer, seed, data_batch_size_per_gpu: As given; `reset(seed=...)` sets another seed.
        batch_size: B, the pairs in a batch.
        reports: A `DataReport` of the rows of each split.
        longest_sequence: Most tokens of prompt + completion in any split; for an encoder-decoder model, of a prompt or
            a completion.

    Raises:
        ConfigurationError: An argument is out of range, or the processes do not match the accelerator or the launch.
        DataError: A dataset cannot be read or holds no usable pair.
    """

    row_format = PAIRS

    def _reward(self, numbers: NDArray[Any], pairs: Sequence[Sample]) -> float:
        del pairs
        return float(np.mean((numbers > 0) + 0.5 * (numbers == 0)))
