"""A reward model, a sequence classifier with one label, as a reward function and as a judge of answers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evollm.checks import boolean, located, optional_whole_number, whole_number
from evollm.data.chat_template import render_chat
from evollm.data.pairs import ChatPair
from evollm.data.tokenization import context_limit
from evollm.errors import ConfigurationError
from evollm.models.adapters.targets import text_config
from evollm.models.loading.base_source import checked_device
from evollm.models.loading.precision import default_device, with_dtype
from evollm.models.loading.pretrained import find_config, load_classifier, load_tokenizer
from evollm.models.rope import longest_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids: TypeAlias = tuple[int, ...]
_WHAT = "must be a reward model, a sequence classifier of transformers with one label (num_labels=1)"
# Arguments of `from_pretrained` that say where the weights are.
_PLACES = ("device_map", "quantization_config")


class RewardModel:
    """A reward model of transformers: `reward_functions=RewardModel("folder")`, or `judge=RewardModel("folder")`.

    The reward of an answer is the classifier's one logit for the prompt with the answer. Prompts that are messages go
    through the chat template of the reward model's own tokenizer, with the answer as the assistant's turn; the
    template's text is tokenised as it is. Prompts that are strings are followed by their answer and an EOS, as TRL's
    `RewardTrainer` learns them, with the tokens that the tokenizer adds to a text (BOS, or CLS and SEP).

    Configuration and tokenizer are loaded at once, so that what is wrong with them is said here. The weights are loaded
    once, at the first call, which in a run is before the training.

    The reward of a text does not depend on the other texts of a batch, but for rounding, and equal texts of a call have
    equal rewards.

    Args:
        model: Name or folder of the model, or a loaded `AutoModelForSequenceClassification`.
        tokenizer: Its tokenizer, or the name or folder of one. None: that of the model.
        batch_size: Texts in a forward pass.
        max_length: Most tokens of a prompt and an answer; of longer ones the beginning is left out, except a BOS, with
            a warning. None: the smaller one of the tokenizer's limit and the model's positions, if there is one.
        as_turns: Whether a prompt that is a string is a user's turn, and so goes through the chat template. None: it is
            not, and a warning says so where there is a template.
        dtype: The type of the weights, or its name; None: the one that they are stored in. In 16 bits rounding
            depends on the batch visibly.
        device: The device. None: the GPU if there is one, else the CPU; a loaded model stays where it is.
        model_config: Further keyword arguments for `from_pretrained`.

    Raises:
        ConfigurationError: An argument is invalid, the model or its tokenizer cannot be loaded, or it has more than one
            label.
        MissingExtraError: It needs a package that is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        as_turns: bool | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        model_config: Mapping[str, Any] | None = None,
    ) -> None:
        loaded: Any = model if isinstance(model, PreTrainedModel) else None
        if loaded is None and not isinstance(model, str | os.PathLike):
            raise ConfigurationError("model", model, f"{_WHAT}, loaded or by its name or folder")
        for field, value in (("dtype", dtype), ("model_config", model_config)):
            if loaded is not None and value is not None:
                raise ConfigurationError(field, value, "belongs to the name of a model; a loaded one has its own")
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self._as_turns = None if as_turns is None else boolean("as_turns", as_turns)
        self._device = None if device is None else checked_device(device)
        self._name = str(model) if loaded is None else str(loaded.name_or_path)
        self.__name__ = Path(self._name).name or type(model).__name__
        self.tokenizer: Any = self._tokenizer(tokenizer, model_config)
        self._network: Any = loaded
        self._is_by_name = loaded is None
        self.max_length = optional_whole_number("max_length", max_length, 2)
        self._model_config: dict[str, Any] = {}
        if loaded is not None:
            config: Any = loaded.config
            _check(config, self._name)
            self._network = (loaded if self._device is None else loaded.to(self._device)).eval()
        else:
            config = find_config(self._name, model_config)
            self._model_config = with_dtype(model_config, dtype, config, self._device or default_device())
            if config is None:  # Loading says why.
                config = self.network.config
            _check(config, self._name)
        positions = longest_sequence(text_config(config))
        if self.max_length is not None and positions is not None and self.max_length > positions:
            fix = f"{self.__name__} has {positions} positions: lower it, or leave it out"
            raise ConfigurationError("max_length", self.max_length, fix)
        known = [limit for limit in (context_limit(self.tokenizer), positions) if limit]
        self.max_length = self.max_length or min(known, default=None)
        self._shorten()
        self._padding = self._usable_padding(config)
        self._num_tokens: int = text_config(config).vocab_size
        if self._as_turns and not self.tokenizer.chat_template:
            fix = f"needs a chat template, which the tokenizer of {self.__name__} lacks: set tokenizer.chat_template"
            raise ConfigurationError("as_turns", True, fix)
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # A worker of a cluster loads the weights by itself, and is in another folder.
        if not self._is_by_name:
            return vars(self)
        return {**vars(self), "_network": None, "_name": located(self._name)}

    @property
    def network(self) -> PreTrainedModel:
        """The classifier, which the first call loads.

        Raises:
            ConfigurationError: It cannot be loaded, or its files lack the weights of the classifier.
        """
        if self._network is None:
            network: Any = load_classifier(self._name, self._model_config)
            placed = self._device is None and any(self._model_config.get(name) for name in _PLACES)
            self._network = (network if placed else network.to(self._device or default_device())).eval()
            self._shorten()
        return self._network  # type: ignore[no-any-return]

    def _shorten(self) -> None:
        """Lower `max_length` to the learned positions that the loaded model leaves to a text."""
        found = None if self._network is None else _positions_behind_padding(self._network)
        if found is not None and (self.max_length is None or self.max_length > found):
            self.max_length = found

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        """The rewards of answers.

        Args:
            prompts: n prompts, strings or lists of messages.
            completions: n answers, without special tokens.
            **columns: Further columns of the rows, which are ignored.

        Returns:
            n numbers.

        Raises:
            ConfigurationError: There are not as many prompts as answers, the prompts are messages and the tokenizer has
                no chat template, a text has no token, or the weights cannot be loaded.
        """
        if len(prompts) != len(completions):
            raise ConfigurationError("prompts", len(prompts), f"must be as many as the {len(completions)} completions")
        _ = self.network  # which may lower `max_length`
        texts = [self._ids(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        if self.max_length is not None and any(len(ids) > self.max_length for ids in texts):
            self._warn(f"prompts with their answers are longer than max_length={self.max_length}: it reads their ends")
        asked = [self._cut(ids) for ids in texts]
        known: dict[Ids, float] = {}
        for batch in _batches({*asked}, self.batch_size if self._padding is not None else 1):
            known |= zip(batch, self._scored(batch), strict=True)
        return [known[ids] for ids in asked]

    @torch.inference_mode()
    def _scored(self, batch: Sequence[Ids]) -> list[float]:
        """The logits of texts in one forward pass."""
        network = self.network
        config = network.config.get_text_config()
        if getattr(config, "pad_token_id", None) is None and self._padding is not None:
            # Heads of decoders read the last token that is none of padding.
            config.pad_token_id = self._padding
        ids, mask = _padded(batch, self._padding or 0)
        found = network(input_ids=ids.to(network.device), attention_mask=mask.to(network.device))
        return [float(value) for value in found.logits[:, 0].tolist()]

    def _ids(self, prompt: Any, answer: str) -> Ids:
        """The tokens of a prompt with its answer."""
        if isinstance(prompt, str) and self._as_turns is None and self.tokenizer.chat_template:
            said = "the prompts are strings, which do not go through its chat template"
            self._warn(f"{said}: pass as_turns=True to make them a user's turn, or False if this is meant")
        if isinstance(prompt, str) and not self._as_turns:
            ids = self.tokenizer(prompt + answer, verbose=False)["input_ids"]
            eos = self.tokenizer.eos_token_id
            ids = [*ids, *([eos] if eos is not None and ids[-1:] != [eos] else [])]
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if not self.tokenizer.chat_template:
                fix = (
                    f"the prompts are messages, which {self.__name__} cannot read without: set it, or pass a tokenizer"
                )
                raise ConfigurationError("tokenizer.chat_template", None, fix)
            text = render_chat(ChatPair(0, messages, [{"role": "assistant", "content": answer}]), self.tokenizer)
            ids = self.tokenizer(text.wholes[0], add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise ConfigurationError("completions", answer, "there is no token in this answer and its prompt")
        if max(ids) >= self._num_tokens:
            fix = f"gives token {max(ids)}, and {self.__name__} has {self._num_tokens}: pass the one that belongs to it"
            raise ConfigurationError("tokenizer", self.tokenizer.name_or_path or type(self.tokenizer).__name__, fix)
        return tuple(ids)

    def _cut(self, ids: Ids) -> Ids:
        """The last `max_length` tokens; a token that opens every text stays the first."""
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        opens = ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id)
        return (*ids[:opens], *ids[len(ids) - self.max_length + opens :])

    def _tokenizer(self, given: Any, model_config: Mapping[str, Any] | None) -> Any:
        if given is None and not self._name:
            raise ConfigurationError("tokenizer", None, "the model does not say where it came from: pass its tokenizer")
        if given is None:
            return load_tokenizer(self._name, model_config)
        if isinstance(given, str | os.PathLike):
            return load_tokenizer(given)
        if not callable(given) or not hasattr(given, "eos_token_id"):
            raise ConfigurationError("tokenizer", given, "must be a tokenizer of transformers, or the name of one")
        return given

    def _usable_padding(self, config: Any) -> int | None:
        """The token to pad with; None: there is none that the model would not read, and a warning says so."""
        own = text_config(config)
        found = getattr(own, "pad_token_id", None)
        if found is None and self.tokenizer.pad_token_id != self.tokenizer.eos_token_id:
            # An EOS ends a text, so that the head would read the token before it.
            found = self.tokenizer.pad_token_id
        if found is not None and 0 <= found < own.vocab_size:
            return int(found)
        if self.batch_size > 1:
            warnings.warn(
                f"{self.__name__} has no padding token, so that it reads one answer at a time: set pad_token_id in its "
                "configuration, or pad_token of its tokenizer to a token that ends no text",
                UserWarning,
                stacklevel=3,
            )
        return None

    def _warn(self, what: str) -> None:
        """Warn once."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"reward model {self.__name__}: {what}", UserWarning, stacklevel=3)


def _check(config: Any, name: str) -> None:
    if config.num_labels != 1:
        kinds = ", ".join(config.architectures or ()) or type(config).__name__
        raise ConfigurationError("model", name, f"{_WHAT}; this is {kinds} with {config.num_labels} labels")


def _positions_behind_padding(network: nn.Module) -> int | None:
    """How many learned positions there are behind the index of padding, at which RoBERTa begins to count; else None."""
    tables = [module for name, module in network.named_modules() if name.endswith("position_embeddings")]
    found = [
        table.num_embeddings - table.padding_idx - 1
        for table in tables
        if isinstance(table, nn.Embedding) and table.padding_idx is not None
    ]
    return min(found, default=None)


def _batches(texts: set[Ids], size: int) -> Iterator[list[Ids]]:
    """The texts in batches of about equal lengths, the longest first, in an order that the texts alone decide."""
    ordered = sorted(texts, key=lambda ids: (-len(ids), ids))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))


def _padded(batch: Sequence[Ids], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, L), padded on the right, and their mask."""
    longest = max(map(len, batch))
    ids = torch.tensor([[*one, *[padding] * (longest - len(one))] for one in batch])
    lengths = torch.tensor([[len(one)] for one in batch])
    return ids, (torch.arange(longest) < lengths).long()
