"""The base class of the gyms: serves rows of up to three datasets in batches, ordered by seed, epoch and index."""

from __future__ import annotations

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray
from typing_extensions import Self

from evollm.checks import boolean, optional_whole_number, whole_number
from evollm.data import clock
from evollm.data.digests import digests_of, first_change
from evollm.data.loading import load_pairs, load_sets
from evollm.data.mixing import FIELD, Weights, check_names, check_sets, checked_weights, mixed_order, shares
from evollm.data.row_report import DataReport
from evollm.data.rows import RowFormat
from evollm.data.samples import Batch, IntArray, Sample
from evollm.data.split_warnings import warn_of_overlap, warn_of_plain_text, warn_of_templates
from evollm.errors import ConfigurationError
from evollm.foreign import GYM, RESET, RESET_ORDER, explains
from evollm.llm_envs.observations import Observation, ObservationShape
from evollm.llm_envs.position import Position, check_state
from evollm.processes import check_processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Info: TypeAlias = dict[str, Any]
FloatArray: TypeAlias = NDArray[np.float32]
# Of a dataset, the tokenizer and settings.
Load: TypeAlias = Callable[..., tuple[list[Sample], DataReport]]

SPLITS = ("train", "test", "final")
NO_PAIRS = Batch(())


class DatasetGym(gymnasium.Env[Observation, FloatArray]):
    """Serves the rows of datasets as batches of pairs; a subclass defines the row format and the reward.

    The subclasses document arguments, further attributes and errors.
    The order of epoch e is `np.random.default_rng([seed, e]).permutation(n)`, so seed, epoch and index determine the
    position. With `dataset_weights` it is [`evollm.data.mixing.mixed_order`][].

    Attributes:
        row_format: Format of the rows of the datasets.
        sets: With `dataset_weights`, for each set its `weight`, its `rows` and how many of them an epoch has, `drawn`;
            otherwise empty.
        largest_action: Upper bound of the numbers in an action.
        largest_id: The largest token id in any split.
    """

    row_format: RowFormat
    largest_action: ClassVar[float] = np.inf
    # Reads and tokenises a split: a hook for subclasses.
    _load: ClassVar[Load] = staticmethod(load_pairs)

    metadata = {"render_modes": []}  # noqa: RUF012 - gymnasium declares it so

    @explains(GYM)
    def __init__(
        self,
        train_dataset: object,
        test_dataset: object | None,
        tokenizer: PreTrainedTokenizerBase,
        data_batch_size_per_gpu: int = 8,
        accelerator: Any | None = None,
        max_context_length: int | None = None,
        min_completion_length: int | None = None,
        seed: int = 42,
        *,
        final_dataset: object | None = None,
        encoder_decoder: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        columns: Mapping[str, Any] | None = None,
        written_at: datetime | str | None = None,
        dataset_weights: Mapping[str, float] | None = None,
    ) -> None:
        processes = check_processes(accelerator)
        if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
            raise ConfigurationError("tokenizer", tokenizer, "must be the model's tokenizer, loaded by AutoTokenizer")
        self.tokenizer = tokenizer
        self.data_batch_size_per_gpu = whole_number("data_batch_size_per_gpu", data_batch_size_per_gpu, 1)
        # Every process serves the whole batch; the agents divide the batch among processes.
        self.batch_size = self.data_batch_size_per_gpu * processes.size
        self.seed = whole_number("seed", seed, 0)
        self.row_format = type(self).row_format.with_columns(columns)
        self.encoder_decoder = boolean("encoder_decoder", encoder_decoder)
        self.reports: dict[str, DataReport] = {}
        self._pairs: dict[str, list[Sample]] = {}
        self.written_at = clock.given_moment("written_at", written_at)
        weights = checked_weights(dataset_weights)
        if weights is not None:
            check_sets("train_dataset", train_dataset, weights)
        for split, dataset in zip(SPLITS, (train_dataset, test_dataset, final_dataset), strict=True):
            self._pairs[split] = []
            if dataset is not None or split == "train":
                with clock.at(self.written_at):
                    self._pairs[split], self.reports[split] = _loaded(
                        type(self)._load,
                        dataset,
                        weights,
                        tokenizer,
                        name=split,
                        max_context_length=max_context_length,
                        min_completion_length=min_completion_length,
                        row_format=self.row_format,
                        encoder_decoder=encoder_decoder,
                        cache_dir=cache_dir,
                    )
        self.sets: dict[str, dict[str, float]] = {}
        if weights is not None:
            sizes = {name: report.kept for name, report in self.reports["train"].sets.items()}
            drawn = shares(sizes, weights)
            self.sets = {
                name: {"weight": weights[name], "rows": size, "drawn": drawn[name]} for name, size in sizes.items()
            }
        self._check_rows()
        warn_of_plain_text(self.reports["train"])
        warn_of_templates(self.reports)
        warn_of_overlap(self._pairs, self.row_format.noun)
        all_pairs = self.all_pairs
        self.longest_sequence = max(
            max(len(pair.prompt_ids), *map(len, pair.completions)) if encoder_decoder else pair.longest_sequence
            for pair in all_pairs
        )
        self._training = Position()
        self._evaluation: Position | None = None
        self.largest_id = max(pair.id_range[1] for pair in all_pairs)
        largest_id = max(len(tokenizer) - 1, self.largest_id)
        self._shape = ObservationShape.of(Batch(all_pairs), self.batch_size)
        self.observation_space = self._shape.space(largest_id)
        self.action_space = spaces.Box(-np.inf, self.largest_action, (self.batch_size,), np.float32)

    @property
    def train_pairs(self) -> list[Sample]:
        """The tokenised training pairs."""
        return self._pairs["train"]

    @property
    def test_pairs(self) -> list[Sample]:
        """The tokenised pairs that agents are selected by; empty without a `test_dataset`."""
        return self._pairs["test"]

    @property
    def final_pairs(self) -> list[Sample]:
        """The tokenised pairs of the final score; empty without a `final_dataset`."""
        return self._pairs["final"]

    @property
    def all_pairs(self) -> list[Sample]:
        """The tokenised pairs of all splits."""
        return [pair for pairs in self._pairs.values() for pair in pairs]

    @property
    def form(self) -> str:
        """The form in which all splits are learnt: `chat`, `text` or `mixed`; see `DataReport.form`."""
        forms = {report.form for report in self.reports.values()} - {""}
        return forms.pop() if len(forms) == 1 else "mixed"

    @property
    def fingerprint(self) -> str:
        """Digest of the sets and of the keys of all pairs in their order: token ids, masks of scored tokens, extras."""
        digest = hashlib.blake2b(digest_size=16)
        if self.sets:
            digest.update(json.dumps(self.sets).encode())
        for split, pairs in self._pairs.items():
            digest.update(f"{split} {len(pairs)}".encode())
            for pair in pairs:
                digest.update(pair.key)
        return digest.hexdigest()

    @property
    def digests(self) -> dict[str, list[str]]:
        """For each split, digests of up to 256 equal parts of the pairs in their order; see `changed_text`."""
        return {split: digests_of(pairs) for split, pairs in self._pairs.items() if pairs}

    def changed_text(self, before: Mapping[str, Any]) -> str:
        """Say in words which text is the first that has changed since a run began.

        Args:
            before: The run's saved `config["data"]`: `digests`, and `written_at` as text.
        """
        rest = f"the sets or {FIELD}" if self.sets else "the number of rows in a split"
        noted: Mapping[str, list[str]] = before["digests"]
        changed = first_change(self._pairs, noted, self.tokenizer.decode, self.row_format.noun) or rest
        then = before.get("written_at")
        if then == self.written_at.isoformat() or not clock.writes_time(self.tokenizer.chat_template):
            return changed
        return f"{changed}; the chat template writes the date: build the gym with written_at={then!r}"

    def epoch_pairs(self, epoch: int) -> list[Sample]:
        """The training pairs of an epoch in their order; those of all epochs are the same without `dataset_weights`."""
        return [self.train_pairs[row] for row in self._training_order(epoch)]

    @property
    def own_settings(self) -> dict[str, Any]:
        """Settings of this kind of gym that a resumed run must share, as JSON values."""
        return {"sets": self.sets} if self.sets else {}

    @property
    def num_epochs(self) -> int:
        """Completed training epochs; the current epoch counts after its last batch (and after that batch's `step`)."""
        position = self._training
        whole = position.index == self._num_batches("train") and not position.awaiting_action
        return position.epoch + int(whole)

    def __len__(self) -> int:
        """Batches in an epoch of the training pairs; in `eval_mode`, of the `test_dataset` pairs."""
        return self._num_batches(self._split)

    def try_out(self) -> None:
        """Call users' functions once, in a process that will call them; gyms that have some do.

        Raises:
            ConfigurationError: One of them fails.
        """

    # ----------------------------------------------------------------------------------------------- gymnasium's API

    @explains(RESET, RESET_ORDER)
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """Start an epoch: the next epoch if the current epoch has begun, or epoch 0 of `seed` if a seed is given.

        Args:
            seed: New seed of the order. In `eval_mode` the order is fixed, so the gym's seed stays.
            options: Not used.

        Returns:
            The first observation, and `{"epoch", "index"}` of the observed batch.
        """
        seed = optional_whole_number("seed", seed, 0)
        super().reset(seed=seed)
        if seed is not None:
            self._position = Position()
            if self._evaluation is None:
                self.seed = seed
        elif self._position.index:
            self._position = Position(self._position.epoch + 1)
        return self._observe_next()

    def step(self, action: FloatArray) -> tuple[Observation, float, bool, bool, Info]:
        """Compute the reward of the current batch and serve the next batch.

        Args:
            action: (B,) numbers; numbers of rows without a pair are ignored.

        Returns:
            The next observation (without any pair at the epoch's end), the reward of the current pairs, whether the
            epoch has ended, False, and `{"epoch", "index"}` of the next batch.

        Raises:
            ResetNeeded: No batch waits for an action.
            ConfigurationError: The action is not B numbers.
        """
        position = self._position
        if not position.awaiting_action:
            raise ResetNeeded("No batch waits for an action: call reset() first, and again after an epoch's end")
        rows = self._rows(position.epoch, position.index - 1)
        numbers = self._numbers(action)[: len(rows)]
        reward = self._reward(numbers, [self._pairs[self._split][row] for row in rows])
        if position.index < len(self):
            observation, info = self._observe_next()
            return observation, reward, False, False, info
        self._position = replace(position, awaiting_action=False)
        info = {"epoch": position.epoch, "index": position.index}
        return self._shape.observation(NO_PAIRS), reward, True, False, info

    # ------------------------------------------------------------------------------------------------------- batches

    def next_batch(self) -> Batch:
        """Serve the next batch, starting a new epoch after the last batch; an epoch's last batch may be smaller.

        In `eval_mode` the batches come from the `test_dataset` pairs.
        """
        return self._serve(awaiting_action=False)

    def upcoming(self, rows: int) -> list[Sample]:
        """The samples of this epoch's next batches, at most so many; the position does not change."""
        pairs, position = self._pairs[self._split], self._position
        start = position.index * self.batch_size
        return [pairs[row] for row in self._order(position.epoch)[start : start + rows]]

    @contextmanager
    def eval_mode(self) -> Iterator[Self]:
        """Serve the `test_dataset` pairs, in dataset order, inside the block; the training position does not change.

        Raises:
            ConfigurationError: There are no `test_dataset` pairs.
        """
        self.evaluation_pairs("test")
        before = self._evaluation
        self._evaluation = Position()
        try:
            yield self
        finally:
            self._evaluation = before

    def eval_batches(
        self, split: str = "test", batch_size: int | None = None, rows: int | None = None
    ) -> Iterator[tuple[IntArray, Batch]]:
        """Iterate once over the pairs of a split, sorted by length; the order is always the same.

        Args:
            split: "test" or "final".
            batch_size: Most pairs in a batch; None: the batch size of training.
            rows: The number of pairs; None, or as many as there are: all of them. Fewer are drawn by the seed of the
                environment, each subset from the next larger one.

        Returns:
            An iterator over (positions of the batch's pairs in the split, the batch).

        Raises:
            ConfigurationError: There is no such split, the split is empty, or the size is below 1.
        """
        pairs = self.evaluation_pairs(split)
        size = optional_whole_number("batch_size", batch_size, 1) or self.batch_size
        chosen = np.arange(len(pairs))
        if rows is not None and whole_number("rows", rows, 1) < len(pairs):
            drawn = np.random.default_rng([self.seed, len(pairs)]).permutation(len(pairs))
            chosen = np.sort(self._spread(drawn, pairs)[:rows])
        order = chosen[np.argsort([pairs[row].num_tokens for row in chosen], kind="stable")]
        chunks = (order[start : start + size] for start in range(0, len(order), size))
        return ((rows, Batch([pairs[row] for row in rows], split)) for rows in chunks)

    # ------------------------------------------------------------------------------------------------------ position

    def state_dict(self) -> dict[str, Any]:
        """The training position, with the seed, the number of pairs and the batch size, as JSON values."""
        position = self._training
        return {
            "seed": self.seed,
            "epoch": position.epoch,
            "index": position.index,
            "awaiting_action": position.awaiting_action,
            "num_pairs": len(self.train_pairs),
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a position: the next batch is the batch that followed when `state_dict` was called.

        Raises:
            ConfigurationError: The state lacks or adds a key, holds a value out of range, or belongs to another number
                of pairs or another batch size.
        """
        check_state(state, self.state_dict(), self._num_batches("train"))
        self.seed = int(state["seed"])
        self._training = Position(int(state["epoch"]), int(state["index"]), bool(state["awaiting_action"]))

    # ------------------------------------------------------------------------------------------------------- private

    @property
    def _split(self) -> str:
        return "train" if self._evaluation is None else "test"

    @property
    def _position(self) -> Position:
        return self._training if self._evaluation is None else self._evaluation

    @_position.setter
    def _position(self, position: Position) -> None:
        if self._evaluation is None:
            self._training = position
        else:
            self._evaluation = position

    def _num_batches(self, split: str) -> int:
        return -(-len(self._pairs[split]) // self.batch_size)

    def _rows(self, epoch: int, index: int) -> IntArray:
        """Positions, in the served split, of the pairs in batch `index` of an epoch."""
        return self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def _order(self, epoch: int) -> IntArray:
        """Positions, in the served split, of the pairs of an epoch."""
        return self._training_order(epoch) if self._evaluation is None else np.arange(len(self.test_pairs))

    def _training_order(self, epoch: int) -> IntArray:
        if not self.sets:
            return _epoch_order(self.seed, epoch, len(self.train_pairs))
        sizes, drawn = (tuple(int(one[key]) for one in self.sets.values()) for key in ("rows", "drawn"))
        return mixed_order(self.seed, epoch, sizes, drawn)

    def _serve(self, awaiting_action: bool) -> Batch:
        position = self._position
        if position.index == len(self):
            position = Position(position.epoch + 1)
        self._position = Position(position.epoch, position.index + 1, awaiting_action)
        pairs, rows = self._pairs[self._split], self._rows(position.epoch, position.index)
        return Batch([pairs[row] for row in rows], self._split)

    def _observe_next(self) -> tuple[Observation, Info]:
        batch = self._serve(awaiting_action=True)
        info = {"epoch": self._position.epoch, "index": self._position.index - 1}
        return self._shape.observation(batch), info

    def evaluation_pairs(self, split: str) -> list[Sample]:
        """The tokenised pairs of a held-out split, in dataset order.

        Raises:
            ConfigurationError: There is no such split, or the split is empty.
        """
        if not isinstance(split, str) or split not in SPLITS[1:]:
            raise ConfigurationError("split", split, f"evaluate on one of {SPLITS[1:]}")
        if not self._pairs[split]:
            raise ConfigurationError(
                f"{split}_dataset", None, f"{type(self).__name__} needs a {split}_dataset to evaluate on it"
            )
        return self._pairs[split]

    def _spread(self, drawn: IntArray, pairs: Sequence[Sample]) -> IntArray:
        """The rows of a split in the order in which a part of them is scored: a hook for subclasses."""
        del pairs
        return drawn

    def _check_rows(self) -> None:
        """Refuse rows that cannot be learnt from together: a hook for subclasses."""

    @abstractmethod
    def _reward(self, numbers: NDArray[Any], pairs: Sequence[Sample]) -> float:
        """The reward of an action that gives `numbers`, one for each of `pairs`."""

    def _numbers(self, action: object) -> NDArray[Any]:
        fix = f"pass {self.batch_size} numbers, one for each {self.row_format.noun}"
        try:
            numbers = np.asarray(action)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError("action", type(action).__name__, f"{fix} ({error})") from None
        if numbers.dtype.kind not in "iuf" or numbers.shape != (self.batch_size,):
            raise ConfigurationError("action", f"{numbers.dtype} of shape {numbers.shape}", fix)
        return numbers


def _loaded(
    load: Load, dataset: object, weights: Weights | None, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> tuple[list[Sample], DataReport]:
    """The samples of a split and their report; with weights a mapping of names of sets is loaded as sets."""
    if weights is not None and isinstance(dataset, Mapping):
        columns = dataset.keys() & set(settings["row_format"].names)
        if not columns or dataset.keys() & weights.keys():
            check_names(f"{settings['name']}_dataset", dataset, weights)
            return load_sets(load, dataset, tokenizer, **settings)
    return load(dataset, tokenizer, **settings)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> IntArray:
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False
    return order
