"""Scores of margins on held-out pairs, larger is better; the candidates for a fitness."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from searching.records import Array

Score = Callable[[Array], float]


def accuracy(margins: Array) -> float:
    """The share of pairs with a margin above 0, a tie counting half."""
    return float(np.heaviside(margins, 0.5).mean())


def mean_margin(margins: Array) -> float:
    """In nats."""
    return float(margins.mean())


def margin_over_std(margins: Array) -> float:
    """The mean in standard deviations."""
    spread = float(margins.std())
    return float(margins.mean()) / spread if spread > 0 else 0.0


def log_loss(margins: Array) -> float:
    """Minus the smallest mean of log(1 + exp(-t margin)) over t >= 0."""
    return -float(np.logaddexp(0.0, -best_temperature(margins) * margins).mean())


def best_temperature(margins: Array) -> float:
    """The t of `log_loss`, by bisection on the derivative."""
    scaled = margins.astype(float)
    spread = float(np.abs(scaled).max())
    if spread == 0 or scaled.mean() <= 0:
        return 0.0
    low, high = 0.0, 100.0 / spread
    for _ in range(60):
        middle = (low + high) / 2
        slope = float((scaled / (1 + np.exp(np.clip(middle * scaled, -500, 500)))).mean())
        low, high = (middle, high) if slope > 0 else (low, middle)
    return low


SCORES: Mapping[str, Score] = {
    "accuracy": accuracy,
    "mean margin": mean_margin,
    "margin / std": margin_over_std,
    "log_loss": log_loss,
}
