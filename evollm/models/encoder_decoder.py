"""Configuration of encoder-decoder models such as T5 and BART; see `evollm.models.layouts.encoder_decoder`."""

from __future__ import annotations

from typing import Any

from evollm.errors import ConfigurationError


def is_encoder_decoder(config: Any) -> bool:
    """Whether a configuration is that of an encoder-decoder model."""
    return bool(getattr(config, "is_encoder_decoder", False))


def start_token(network: Any) -> int:
    """The id of the decoder's first input.

    Raises:
        ConfigurationError: Neither the model's configuration nor its generation configuration has one.
    """
    for config in (network.config, getattr(network, "generation_config", None)):
        found = getattr(config, "decoder_start_token_id", None)
        if found is not None:
            return int(found)
    fix = "the decoder needs a first input: set model.config.decoder_start_token_id (T5's is its pad_token_id)"
    raise ConfigurationError("actor_network.config.decoder_start_token_id", None, fix)
