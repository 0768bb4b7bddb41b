"""Checks of single numbers, shared by the settings classes of this package."""

from __future__ import annotations

import math
from numbers import Integral, Real

from evollm.errors import ConfigurationError


def finite_number(field: str, value: object) -> float:
    """Return `value` as a Python float; int stays int.

    Raises:
        ConfigurationError: If it is not a number, a bool, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        hint = "; YAML reads 1e-5 as text, write 1.0e-5" if isinstance(value, str) else ""
        raise ConfigurationError(field, value, f"must be a number{hint}")
    if not math.isfinite(value):
        raise ConfigurationError(field, value, "must be finite")
    return int(value) if isinstance(value, Integral) else float(value)


def whole_number(field: str, value: object, minimum: int) -> int:
    """Return `value` as a Python int.

    Raises:
        ConfigurationError: If it is not an integer or lies below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ConfigurationError(field, value, f"must be an integer of at least {minimum}")
    return int(value)
