"""Examples for supervised fine-tuning as a gymnasium environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from evollm.data.completion_rows import EXAMPLES
from evollm.data.samples import Sample
from evollm.llm_envs.dataset_gym import DatasetGym


class SFTGym(DatasetGym):
    """Serves examples in batches; an agent acts by giving each completion a log-probability.

    An observation is a batch of B examples, padded to fixed shapes: `input_ids` (B, L) with `prompt | completion` in
    each row, and `prompt_lengths`, `chosen_lengths` (those of completions, with what ends them) and `rejected_lengths`
    (B,), which are 0 for rows without an example; an example has no rejected completion, so that the last are always
    0. Where turns of a completion are not scored there is `scored_mask` (B, L), 1 at the tokens that are. An
    action is the log-probability of each completion (B,), summed over its scored tokens, in nats. The reward is the
    mean log-probability of a scored token of the examples present. An episode is an epoch.

    Prompts and completions get the token ids that [`evollm.llm_envs.PreferenceGym`][] gives to the same texts. The
    order of the batches is the same function of seed, epoch and index.

    Args:
        train_dataset: Examples to train on; see [`evollm.data.completion_rows.read_examples`][] for what may be passed.
        test_dataset: Examples that agents are selected by, or None.
        tokenizer: The model's tokenizer.
        data_batch_size_per_gpu: Examples in a batch for each process; B is that times the processes.
        accelerator: An `accelerate.Accelerator`, or None.
        max_context_length: Most tokens of prompt + completion; None: what the tokenizer states.
        min_completion_length: Fewest tokens of a completion, with what ends it; None: no bound.
        seed: Seed of the order.
        final_dataset: Examples for the final score, which nothing is selected by, or None.
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
        batch_size: B, the examples in a batch.
        reports: For each split what became of its rows.
        longest_sequence: Most tokens of a prompt + completion in any split; for an encoder-decoder model, of either.

    Raises:
        ConfigurationError: An argument is out of range, or the processes were not launched as they seem to be.
        DataError: A dataset cannot be read, or holds preference pairs or no usable example.
    """

    row_format = EXAMPLES
    largest_action = 0.0

    def _reward(self, numbers: NDArray[Any], pairs: Sequence[Sample]) -> float:
        return float(numbers.sum() / sum(pair.num_scored[0] for pair in pairs))
