"""Prompts and reward functions as a gymnasium environment."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from evollm.data.prompt_rows import PROMPTS, load_prompts
from evollm.data.samples import Batch, IntArray, Sample
from evollm.errors import ConfigurationError
from evollm.foreign import GYM, explains
from evollm.llm_envs.dataset_gym import DatasetGym
from evollm.llm_envs.observations import IDS, LENGTHS, Observation, ObservationShape
from evollm.llm_envs.rewards import Rewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# G and T of the declared action space; an action may have others.
_USUAL_ANSWERS, _USUAL_TOKENS = 1, 256
_AXES = 3


@dataclass(frozen=True)
class PromptShape(ObservationShape):
    """The shapes of observations of prompts alone: `input_ids` (num_rows, row_length), `prompt_lengths` (num_rows,)."""

    def space(self, largest_id: int) -> spaces.Space[Observation]:
        """The space of observations with ids up to `largest_id`."""
        found = cast("spaces.Dict", super().space(largest_id))
        kept = {name: space for name, space in found.spaces.items() if name in (IDS, LENGTHS[0])}
        return cast("spaces.Space[Observation]", spaces.Dict(kept))

    def observation(self, batch: Batch) -> Observation:
        """Pad prompts with zeros."""
        found = super().observation(batch)
        return {name: found[name] for name in (IDS, LENGTHS[0])}


class RewardGym(DatasetGym):
    """Serves prompts in batches; an action answers them, and reward functions score the answers.

    An observation is a batch of B prompts, padded to fixed shapes: `input_ids` (B, L) and `prompt_lengths` (B,), which
    are 0 for rows without a prompt. An action is the token ids of G answers to each prompt, (B, G, T), padded with
    negative ids; ids after an answer's first EOS are ignored, and so are rows without a prompt. The declared action
    space has G = 1 and T = 256, and actions may have other sizes. The reward is the mean reward of the answers. An
    episode is an epoch. Batches come in the same order as in [`evollm.llm_envs.SFTGym`][] for the same seed.

    A reward function is plain Python, called once for the answers of all agents to a batch, with TRL's arguments by
    name: `prompts`, as the rows have them (strings, or lists of messages), `completions`, the answers as strings
    without special tokens, and every further column of the rows as a list, such as a column `answer`; where only some
    splits, sets or rows have a column, it holds None for the others. It gets those of them that its signature takes,
    and returns a number for each completion; None says nothing of a completion and counts as 0.
    Before any training every function is called with the first prompt of each split and set, and two made-up answers to
    it, one of them empty. Where members are divided among processes or workers, each of these calls its own function
    for its own members' answers.

    Args:
        train_dataset: Prompts to learn from; see [`evollm.data.prompt_rows.load_prompts`][] for what may be passed.
        test_dataset: Prompts that agents are selected by, or None.
        tokenizer: The model's tokenizer.
        reward_functions: A function, a list of functions, or a mapping of names to functions.
        data_batch_size_per_gpu: Prompts in a batch for each process; B is this number times the number of processes.
        accelerator: An `accelerate.Accelerator`, or None. Of processes that divide batches the main one calls the
            functions.
        max_context_length: Most tokens of a prompt; longer ones are cut from the left. None: the tokenizer's maximum.
        seed: Seed of the order, and of the random numbers with which answers are sampled.
        reward_weights: A number for each function, as a list or by name: the reward of an answer is the weighted sum.
            None: 1 each.
        reward_timeout: Most seconds of a call of a function, after which an error names the function; None: no limit.
        final_dataset: Prompts for the final score, which select no agent, or None.
        encoder_decoder: Whether the model is an encoder-decoder, such as T5.
        columns: The column of each role, for rows in a format that is not recognised, such as `{"prompt": "question"}`;
            None: the columns' names decide. See [`evollm.data.columns.mapping_of`][].
        written_at: The time that a chat template writes, as a datetime or in ISO 8601; None: now. A resumed run needs
            the time in its `config.json`.
        dataset_weights: As for [`evollm.llm_envs.PreferenceGym`][]. All sets have the same reward functions, which may
            tell them apart by a column.

    Attributes:
        tokenizer, seed, data_batch_size_per_gpu: As given; `reset(seed=...)` sets another seed.
        batch_size: B, the prompts in a batch.
        reports: A `DataReport` of the rows of each split.
        longest_sequence: Most tokens of a prompt in any split.
        rewards: The checked reward functions.

    Raises:
        ConfigurationError: An argument is out of range, the processes do not match the accelerator or the launch, or a
            reward function fails; the message names it.
        DataError: A dataset cannot be read, or holds no usable prompt.
    """

    row_format = PROMPTS
    _load = staticmethod(load_prompts)

    @explains(GYM)
    def __init__(
        self,
        train_dataset: object,
        test_dataset: object | None,
        tokenizer: PreTrainedTokenizerBase,
        reward_functions: object,
        data_batch_size_per_gpu: int = 8,
        accelerator: Any | None = None,
        max_context_length: int | None = None,
        seed: int = 42,
        *,
        reward_weights: Mapping[str, float] | Sequence[float] | None = None,
        reward_timeout: float | None = None,
        final_dataset: object | None = None,
        encoder_decoder: bool = False,
        columns: Mapping[str, Any] | None = None,
        written_at: datetime | str | None = None,
        dataset_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.rewards = Rewards.of(reward_functions, reward_weights, reward_timeout)
        super().__init__(
            train_dataset,
            test_dataset,
            tokenizer,
            data_batch_size_per_gpu,
            accelerator,
            max_context_length,
            seed=seed,
            final_dataset=final_dataset,
            encoder_decoder=encoder_decoder,
            columns=columns,
            written_at=written_at,
            dataset_weights=dataset_weights,
        )
        largest_id = max(len(tokenizer) - 1, self.largest_id)
        self._shape = PromptShape(self._shape.num_rows, self._shape.row_length)
        self.observation_space = self._shape.space(largest_id)
        shape = self.batch_size, _USUAL_ANSWERS, _USUAL_TOKENS
        # gymnasium's annotation of the base class says that actions are numbers per row.
        self.action_space = spaces.Box(-1, largest_id, shape, np.int64)  # type: ignore[arg-type]
        self.rewards = self.rewards.with_columns(self.all_pairs)
        if hidden := self.rewards.hidden_columns:
            warnings.warn(
                f"reward functions get prompts and answers as prompts and completions, not the columns {hidden} of the "
                f"rows: rename these, or say columns={{'ignore': {hidden}}}",
                UserWarning,
                stacklevel=3,
            )
        self.try_out()

    def try_out(self) -> None:
        """Call every reward function once; see `DatasetGym.try_out`."""
        # Splits and sets may have other columns.
        first: dict[tuple[str, str], Sample] = {}
        for split, pairs in self._pairs.items():
            for one in pairs:
                first.setdefault((split, one.set_name), one)
        self.rewards.try_out(list(first.values()))

    @property
    def own_settings(self) -> dict[str, Any]:
        """The reward functions by name, with their weights; what they do cannot be compared."""
        return {**super().own_settings, "rewards": dict(zip(self.rewards.names, self.rewards.weights, strict=True))}

    def text_of(self, answer: IntArray) -> str:
        """The text of an answer's token ids (T,), without special tokens, as reward functions get it."""
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def _numbers(self, action: object) -> NDArray[Any]:
        ids = np.asarray(action)
        if ids.dtype.kind not in "iu" or ids.ndim != _AXES or len(ids) != self.batch_size or not ids.size:
            fix = f"pass token ids ({self.batch_size}, G, T), G answers to each prompt, padded with -1"
            raise ConfigurationError("action", f"{ids.dtype} of shape {ids.shape}", fix)
        return ids

    def _reward(self, numbers: NDArray[Any], pairs: Sequence[Sample]) -> float:
        prompts = [pair for pair in pairs for _ in range(numbers.shape[1])]
        answers = [self.text_of(self._up_to_end(ids)) for own in numbers for ids in own]
        return float(self.rewards.total(self.rewards.of_answers(prompts, answers)).mean())

    def _up_to_end(self, ids: IntArray) -> IntArray:
        ids = ids[ids >= 0]
        ends = np.flatnonzero(ids == self.tokenizer.eos_token_id)
        return ids[: ends[0] + 1] if len(ends) else ids
