"""Checks that a gym or a batch suits an agent's algorithm and its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evollm.data.samples import Batch
from evollm.errors import ConfigurationError, DataError
from evollm.llm_envs import DatasetGym
from evollm.llm_envs.observations import batch_of
from evollm.models import SharedBase


def check_gym(env: object, kind: type[DatasetGym], purpose: str) -> None:
    """Check that `env` is a gym of this class, and not rows, a wrapper, or the gym of another algorithm.

    Args:
        env: The argument to check.
        kind: The gym's class.
        purpose: The function that needs the gym, for the message.

    Raises:
        ConfigurationError: The argument is something else.
    """
    if not isinstance(env, kind):
        fix = f"is no {kind.__name__}, which {purpose} needs: build one from the rows; of a wrapper pass what it wraps"
        raise ConfigurationError("env", type(env).__name__, fix)


def check_base(base: SharedBase, env: DatasetGym) -> None:
    """Check that the base can take a gym's token ids.

    Raises:
        ConfigurationError: The gym is for the other kind of model (decoder-only or encoder-decoder), has ids beyond the
            base's vocabulary, or texts longer than its positions.
    """
    if base.is_encoder_decoder != env.encoder_decoder:
        fix = f"the base {'is' if base.is_encoder_decoder else 'is not'} an encoder-decoder model: build the gym anew"
        raise ConfigurationError("encoder_decoder", env.encoder_decoder, fix)
    longest, limit = env.longest_sequence, base.max_positions
    if limit is not None and longest > limit:
        fix = f"texts are longer than the base's {limit} positions: pass {limit} to the gym"
        raise ConfigurationError("max_context_length", longest, fix)
    vocabulary = base.num_embeddings
    if env.largest_id >= vocabulary:
        fix = f"the base knows {vocabulary} tokens and the data hold id {env.largest_id}: use the base's own tokenizer"
        raise ConfigurationError("tokenizer", getattr(env.tokenizer, "name_or_path", type(env.tokenizer).__name__), fix)


def batch_for(base: SharedBase, experiences: Batch | Mapping[str, Any]) -> Batch:
    """The batch in `experiences`, a batch or an observation, checked against the base.

    Raises:
        DataError: `experiences` is neither, is empty, has a prompt without completions, ids beyond the base's
            vocabulary, or a text longer than the base's positions.
    """
    batch = batch_of(experiences)
    if not len(batch):
        raise DataError("experiences", "no row", "pass a batch with at least one")
    if not all(sample.completions for sample in batch):
        raise DataError("experiences", "a prompt without completion", "there is nothing to learn from or to score")
    smallest, largest = min(sample.id_range[0] for sample in batch), max(sample.id_range[1] for sample in batch)
    vocabulary = base.num_embeddings
    if smallest < 0 or largest >= vocabulary:
        fix = f"is no token of the base, which knows {vocabulary}: use the base's own tokenizer"
        raise DataError("experiences['input_ids']", smallest if smallest < 0 else largest, fix)
    longest, limit = batch.longest_sequence, base.max_positions
    if limit is not None and longest > limit and not base.is_encoder_decoder:
        fix = f"is longer than the base's {limit} positions: pass max_context_length={limit} to the gym"
        raise DataError("experiences", f"a text of {longest} tokens", fix)
    return batch
