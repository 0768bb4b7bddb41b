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
    """Serves preference pairs in batches; an agent acts by giving each pair a margin.

    An observation is a batch of B pairs, padded to fixed shapes: `input_ids` (B, L) with `prompt | chosen | rejected`
    in each row, and `prompt_lengths`, `chosen_lengths`, `rejected_lengths` (B,), which are 0 for rows without a pair.
    Where turns of a completion are not scored there is `scored_mask` (B, L), 1 at the tokens that are. An action is the
    margin of each pair (B,), for example the log-ratio of chosen minus that of rejected, in nats. The reward is the
    share of the pairs present that it orders rightly: margin > 0, a margin of 0 counts half. An episode is an epoch.

    The order of epoch e is `np.random.default_rng([seed, e]).permutation(n)`, so that seed, epoch and index say
    everything about the position, and every agent that starts from the same position sees the same batches. Train
    either with `reset` and `step`, or with `next_batch`, which has no rows without a pair and starts epochs by itself.

    Args:
        train_dataset: Pairs to train on; see [`evollm.data.preference_rows.read_pairs`][] for what may be passed.
        test_dataset: Pairs that agents are selected by, or None.
        tokenizer: The model's tokenizer.
        data_batch_size_per_gpu: Pairs in a batch for each process; B is that times the processes.
        accelerator: An `accelerate.Accelerator`, or None.
        max_context_length: Most tokens of prompt + longer completion; None: what the tokenizer states.
        min_completion_length: Fewest tokens of a completion, with what ends it; None: no bound.
        seed: Seed of the order.
        final_dataset: Pairs for the final score, which nothing is selected by, or None.
        encoder_decoder: Whether the model is one, such as T5: prompts and completions are then tokenised apart, as two
            sequences.
        cache_dir: Folder that keeps token ids between runs, for rows, tokenizer and lengths that are the same; None:
            none. Rows are read, and chat templates applied, in any case.
        columns: Which column is what, and which value of a label means what, in rows of a shape that is not known by
            itself; None: what the columns' names say. See [`evollm.data.columns.mapping_of`][].
        written_at: The time that a chat template writes, as a datetime or in ISO 8601; None: now. A run that is
            resumed needs that of its beginning, which its `config.json` states.

    Attributes:
        tokenizer, seed, data_batch_size_per_gpu: As given; `reset(seed=...)` sets another seed.
        batch_size: B, the pairs in a batch.
        reports: For each split what became of its rows.
        longest_sequence: Most tokens of a prompt + completion in any split; for an encoder-decoder model, of either.

    Raises:
        ConfigurationError: An argument is out of range, or there are several processes.
        DataError: A dataset cannot be read or holds no usable pair.
    """

    row_format = PAIRS

    def _reward(self, numbers: NDArray[Any], pairs: Sequence[Sample]) -> float:
        del pairs
        return float(np.mean((numbers > 0) + 0.5 * (numbers == 0)))
