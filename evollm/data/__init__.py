"""Rows of preference pairs to token ids."""

from __future__ import annotations

from evollm.data.batch import PreferenceBatch, TokenizedPair
from evollm.data.report import DataReport
from evollm.data.sources import ChatPair, TextPair, read_pairs
from evollm.data.tokenization import load_pairs, tokenize_pairs

__all__ = [
    "ChatPair",
    "DataReport",
    "PreferenceBatch",
    "TextPair",
    "TokenizedPair",
    "load_pairs",
    "read_pairs",
    "tokenize_pairs",
]
