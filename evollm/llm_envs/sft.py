"""Examples for supervised fine-tuning as a gymnasium environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from evollm.data.completion_rows import EXAMPLES
from evollm.data.samples import Sample
from evollm.llm_envs.dataset_gym import DatasetGym


class SFTGym(DatasetGym):
    """Serves examples in batches; an action gives each completion a log-probability.

    An observation is a batch of B examples, padded to fixed shapes: `input_ids` (B, L) with `prompt | completion` in
    each row, and `prompt_lengths`, `chosen_lengths` (of completions, end tokens included) and `rejected_lengths` (B,),
    which are 0 for rows without an example. An example has no rejected completion, so `rejected_lengths` is always 0.
    If some turns of a completion are not scored, `scored_mask` (B, L) is 1 at scored tokens. An action is the
    log-probability of each completion (B,), summed over its scored tokens, in nats. The reward is the mean
    log-probability of a scored token; rows without an example do not count. An episode is an epoch.

    Prompts and completions get the same token ids as in [`evollm.llm_envs.PreferenceGym`][], and batches come in the
    same order for the same seed, epoch and index.

    Args:
        train_dataset: Examples to train on; see [`evollm.data.completion_rows.read_examples`][] for what may be passed.
        test_dataset: Examples that agents are selected by, or None.
        tokenizer: The model's tokenizer.
        data_batch_size_per_gpu: Examples in a batch for each process; B is this number times the number of processes.
        accelerator: An `accelerate.Accelerator`, or None.
        max_context_length: Most tokens of prompt + completion; None: the tokenizer's maximum.
        min_completion_length: Fewest tokens of a completion, its end tokens included; None: no bound.
        seed: Seed of the order.
        final_dataset: Examples for the final score, which select no agent, or None.
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
        batch_size: B, the examples in a batch.
        reports: A `DataReport` of the rows of each split.
        longest_sequence: Most tokens of prompt + completion in any split; for an encoder-decoder model, of a prompt or
            a completion.

    Raises:
        ConfigurationError: An argument is out of range, or the processes do not match the accelerator or the launch.
        DataError: A dataset cannot be read, or holds preference pairs or no usable example.
    """

    row_format = EXAMPLES
    largest_action = 0.0

    def _reward(self, numbers: NDArray[Any], pairs: Sequence[Sample]) -> float:
        return float(numbers.sum() / sum(pair.num_scored[0] for pair in pairs))
