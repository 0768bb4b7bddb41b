"""Completions with labels as a gymnasium environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evollm.data.samples import Batch, IntArray, Sample
from evollm.data.unpaired_rows import DESIRABLE, UNDESIRABLE, UNPAIRED, Balance
from evollm.errors import DataError
from evollm.llm_envs.dataset_gym import DatasetGym


class UnpairedGym(DatasetGym):
    """Serves desirable and undesirable answers in batches; an action gives each answer a log-ratio.

    An observation is a batch of B answers, padded to fixed shapes: `input_ids` (B, L) with `prompt | answer` in each
    row, `prompt_lengths`, `chosen_lengths` (of answers, end tokens included) and `rejected_lengths` (B,), which are 0
    for rows without an answer, and `labels` (B,): 1 for a desirable answer, 0 for an undesirable one. An answer stands
    alone, so `rejected_lengths` is always 0. If some turns of an answer are not scored, `scored_mask` (B, L) is 1 at
    scored tokens. An action is a number for each answer (B,), for example its log-ratio in nats. The reward is the
    share of answers whose number has the sign of its label; 0 counts half. An episode is an epoch.

    Prompts and completions get the same token ids as in [`evollm.llm_envs.SFTGym`][], and batches come in the same
    order for the same seed, epoch and index. Of a pair the chosen side is a desirable answer, the rejected side an
    undesirable one; both have the pair's row.

    Args:
        train_dataset: Answers to train on; see [`evollm.data.unpaired_rows.read_unpaired`][] for what may be passed.
        test_dataset: Answers that agents are selected by, or None.
        tokenizer: The model's tokenizer.
        data_batch_size_per_gpu: Answers in a batch for each process; B is this number times the number of processes.
        accelerator: An `accelerate.Accelerator`, or None.
        max_context_length: Most tokens of prompt + answer; None: the tokenizer's maximum.
        min_completion_length: Fewest tokens of an answer, its end tokens included; None: no bound.
        seed: Seed of the order.
        final_dataset: Answers for the final score, which select no agent, or None.
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
        batch_size: B, the answers in a batch.
        reports: A `DataReport` of the rows of each split.
        longest_sequence: Most tokens of prompt + answer in any split; for an encoder-decoder model, of a prompt or an
            answer.

    Raises:
        ConfigurationError: An argument is out of range, or the processes do not match the accelerator or the launch.
        DataError: A dataset cannot be read, holds no usable answer, a label that says neither, or answers of one label
            only.
    """

    row_format = UNPAIRED

    def _check_rows(self) -> None:
        for split, pairs in self._pairs.items():
            balance = Balance.of([pair.label for pair in pairs])
            if pairs and balance.lacks_a_class:
                used = "it learns from" if split == "train" else "its score compares"
                fix = f"{used} both: hand in rows with the other label too, or use SFTGym (algorithm: sft) for "
                fix += "completions that are all good"
                raise DataError(f"{split}_dataset", str(balance), fix)

    def _spread(self, drawn: IntArray, pairs: Sequence[Sample]) -> IntArray:
        """Both labels from the first two rows on, and in any larger part about as often as in all rows."""
        labels = np.array([pairs[row].label for row in drawn])
        places = np.empty(len(drawn))
        for label in (DESIRABLE, UNDESIRABLE):
            alike = np.flatnonzero(labels == label)
            places[alike] = np.arange(len(alike)) / max(1, len(alike))
        return drawn[np.argsort(places, kind="stable")]

    @property
    def balance(self) -> Balance:
        """How many of an epoch's answers are desirable, with weighted sets on average over the epochs."""
        sizes = Counter(pair.set_name for pair in self.train_pairs)
        found = dict.fromkeys((DESIRABLE, UNDESIRABLE), 0.0)
        for (name, label), count in Counter((pair.set_name, pair.label) for pair in self.train_pairs).items():
            drawn = self.sets[name]["drawn"] if self.sets else sizes[name]
            found[DESIRABLE if label == DESIRABLE else UNDESIRABLE] += count * drawn / sizes[name]
        return Balance(found[DESIRABLE], found[UNDESIRABLE])

    def _reward(self, numbers: NDArray[Any], pairs: Sequence[Sample]) -> float:
        labels = Batch(pairs).labels
        signed = np.where(labels == DESIRABLE, numbers, -numbers)
        return float(np.mean((signed > 0) + 0.5 * (signed == 0)))
