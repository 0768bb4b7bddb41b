"""Bases that give log-probs that are not finite on rows that hold one token, and on no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# In no row of `make_rows` and `make_examples`.
MARK = "~"
KINDS = ("nan embedding", "inf embedding", "-inf logit")


def break_token(model: Any, tokenizer: Any, kind: str = KINDS[0]) -> Any:
    """The same model; whatever reads MARK, or is to say it, is not finite."""
    (token,) = tokenizer(MARK, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        if kind == "-inf logit":
            head = nn.Linear(*reversed(model.lm_head.weight.shape), bias=True, dtype=model.dtype)
            head.weight.copy_(model.lm_head.weight)
            head.bias.zero_()[token] = -torch.inf
            model.lm_head = head
        else:
            model.get_input_embeddings().weight[token] = float(kind.partition(" ")[0])
    return model


def marked(rows: list[dict[str, str]], numbers: dict[int, str]) -> list[dict[str, str]]:
    """The rows, with MARK at the end of these columns of these rows."""
    found = [dict(row) for row in rows]
    for number, column in numbers.items():
        found[number][column] += MARK
    return found
