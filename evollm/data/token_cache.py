"""The token ids of a split, and the cache (`cache_dir`) that keeps them between runs, one file for each split.

The file's name is a digest of everything that the ids depend on, rendered texts included: a chat template that writes
the date gives another file on another day. A file is safetensors and JSON, so that loading it runs no code.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from evollm.data.chat_template import RenderedChat
from evollm.data.pairs import TextPair
from evollm.data.rows import DroppedRows
from evollm.data.samples import IntArray, Sample
from evollm.own_files import replace_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Raise it whenever the same texts get other ids, or the file's format changes.
FORMAT = 3
# Attributes of a tokenizer that ids depend on and its backend's own JSON lacks.
_ATTRIBUTES = (
    "bos_token_id",
    "eos_token_id",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
    "src_lang",
    "tgt_lang",
)


@dataclass
class TokenizedSplit:
    """The result of tokenising the rows of a split.

    Attributes:
        pairs: The pairs that fit, in the order of their rows.
        dropped: For each reason the positions of the dropped rows.
        noted: For each remark the positions of the kept rows that it is about.
        prompts_cut: Number of pairs whose prompt was cut from the left.
        shortest_overlong: The smallest `max_context_length` at which one of the pairs that were too long would fit;
            None if no pair was too long.
    """

    pairs: list[Sample] = field(default_factory=list)
    dropped: DroppedRows = field(default_factory=dict)
    prompts_cut: int = 0
    shortest_overlong: int | None = None
    noted: DroppedRows = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        """Record that a row is dropped."""
        self.dropped.setdefault(reason, []).append(row)

    def note(self, remark: str, row: int) -> None:
        """Record a remark on a row that is kept."""
        self.noted.setdefault(remark, []).append(row)


def cached(
    cache_dir: Path,
    texts: Sequence[TextPair | RenderedChat],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    make: Callable[[], TokenizedSplit],
) -> TokenizedSplit:
    """The token ids of these texts from the cache, else those that `make` gives, which are then added to it.

    A damaged file is made again, with a warning; a folder that cannot be written to costs a warning.

    Args:
        cache_dir: The cache's folder, from which nothing is ever removed.
        texts: The texts to tokenise.
        tokenizer: The tokenizer. Only a fast one of a transformers class is cached: no other describes itself fully.
        settings: The further arguments that the ids depend on, as JSON values.
        make: Tokenises the texts.
    """
    if type(tokenizer).__module__.partition(".")[0] != "transformers" or not hasattr(tokenizer, "backend_tokenizer"):
        kind = type(tokenizer).__name__
        _warn(f"cache_dir={str(cache_dir)!r} is not used: {kind} is not one of transformers' own fast tokenizers")
        return make()
    path = cache_dir / f"{_digest_of(texts, tokenizer, settings)}.safetensors"
    if path.exists():
        try:
            return _read(path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            _warn(f"{path} is damaged and is made again ({error})")
    split = make()
    try:
        _write(path, split)
    except OSError as error:
        _warn(f"tokens could not be kept in {cache_dir}: {error}")
    return split


def _digest_of(texts: Sequence[TextPair | RenderedChat], tokenizer: Any, settings: Mapping[str, Any]) -> str:
    of_tokenizer = {name: getattr(tokenizer, name, None) for name in _ATTRIBUTES}
    made_by = {name: version(name) for name in ("evollm", "transformers", "tokenizers")}
    of_class = type(tokenizer).__qualname__
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([FORMAT, made_by, of_class, of_tokenizer, dict(settings)], sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for text in texts:
        kind, sides = ("chat", text.wholes) if isinstance(text, RenderedChat) else ("text", text.completions)
        parts = [part.encode() for part in (text.prompt, *sides)]
        lengths = " ".join([*(str(len(part)) for part in parts), *map(str, text.scored)])
        digest.update(b"".join([f"{text.row} {kind} {lengths}:".encode(), *parts]))
    return digest.hexdigest()


def _write(path: Path, split: TokenizedSplit) -> None:
    sides: list[IntArray] = []
    for pair in split.pairs:
        # Three lengths for each row: an example has no second completion, whose length is 0.
        nothing = [np.zeros(0, np.int64)] * (2 - len(pair.completions))
        sides += [pair.prompt_ids, *(completion.ids for completion in pair.completions), *nothing]
    arrays: dict[str, NDArray[Any]] = {
        "ids": np.concatenate([*sides, np.zeros(0, np.int64)]).astype(np.int32),
        "lengths": np.array([len(side) for side in sides], np.int64),  # (3n,)
        "rows": np.array([pair.row for pair in split.pairs], np.int64),  # (n,)
        "unscored": _unscored(split.pairs),  # (u, 2) pairs, and places in their completions
    }
    rest = {name: getattr(split, name) for name in ("dropped", "prompts_cut", "shortest_overlong", "noted")}
    text = json.dumps(rest)
    content = save(arrays, metadata={"rest": text, "digest": _checksum(arrays, text)})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, content)


def _read(path: Path) -> TokenizedSplit:
    with safe_open(path, framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in ("ids", "lengths", "rows", "unscored")}
        metadata = file.metadata()
    if metadata["digest"] != _checksum(arrays, metadata["rest"]):
        raise ValueError("its content is not what was written")
    ends = np.cumsum(arrays["lengths"]).tolist()
    ids = arrays["ids"].astype(np.int64)
    sides = [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    rows = arrays["rows"].tolist()
    pairs = [
        Sample.of(*sides[3 * n : 3 * n + (3 if len(sides[3 * n + 2]) else 2)], row=row) for n, row in enumerate(rows)
    ]
    for number in np.unique(arrays["unscored"][:, 0]):
        pair = pairs[number]
        mask = np.ones(sum(map(len, pair.completions)), np.bool_)
        mask[arrays["unscored"][arrays["unscored"][:, 0] == number, 1]] = False
        pairs[number] = pair.with_mask(mask)
    return TokenizedSplit(pairs, **json.loads(metadata["rest"]))


def _unscored(pairs: Sequence[Sample]) -> NDArray[np.int64]:
    found = [
        (number, place)
        for number, pair in enumerate(pairs)
        if pair.has_mask
        for place in np.flatnonzero(~np.concatenate(pair.masks))
    ]
    return np.array(found, np.int64).reshape(-1, 2)


def _checksum(arrays: Mapping[str, NDArray[Any]], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
