"""Rows of preference pairs, or of examples, to token ids."""

from __future__ import annotations

from evollm.data.batch import PreferenceBatch, TokenizedPair
from evollm.data.completion_rows import read_examples
from evollm.data.preference_rows import read_pairs
from evollm.data.row_report import DataReport
from evollm.data.rows import ChatPair, TextPair
from evollm.data.tokenization import load_pairs, tokenize_pairs

__all__ = [
    "ChatPair",
    "DataReport",
    "PreferenceBatch",
    "TextPair",
    "TokenizedPair",
    "load_pairs",
    "read_examples",
    "read_pairs",
    "tokenize_pairs",
]
