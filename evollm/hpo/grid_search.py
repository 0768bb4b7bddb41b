"""Grid search: the founders are laid out over the bounds and trained to the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from evollm.checks import whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.hyperparameters import HyperparameterConfig, Value
from evollm.hpo.lineage import Birth
from evollm.hpo.random_search import RandomSearch
from evollm.hpo.search import SearchPlan, SearchStart, require_config


@dataclass
class GridSearch(RandomSearch):
    """An `evollm.hpo.Search` that gives the founders the values of a grid over the bounds, and changes nothing later.

    The values of a number lie at equal distances on a logarithmic scale, the bounds included. Founders without a
    place on the grid leave.

    Args:
        points: Values of each number, by name or the same for all. None: as many as the population holds; the
            hyperparameters that are declared first have more.

    Raises:
        ConfigurationError: A number of points is below 1 or not an integer.
    """

    points: Mapping[str, int] | int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.points, Mapping):
            self.points = {name: whole_number(f"points.{name}", count, 1) for name, count in self.points.items()}
        elif self.points is not None:
            self.points = whole_number("points", self.points, 1)

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders at the points of the grid.

        Raises:
            ConfigurationError: No hyperparameter may change, `points` names another one, or the population is smaller
                than the grid.
        """
        config = require_config(start.hp_config, "a grid has nothing to lay out")
        values = {name: list(_values(config, name, count)) for name, count in self._counts(config, start).items()}
        cells = [dict(zip(values, cell, strict=True)) for cell in product(*values.values())]
        if len(cells) > len(start.founders):
            fix = f"is smaller than the grid of {len(cells)} points: give as many agents, or fewer points"
            raise ConfigurationError("population", len(start.founders), fix)
        founders = zip(start.founders, cells, strict=False)
        births = (Birth.fresh(one.index, {**one.hyperparameters, **cell}) for one, cell in founders)
        return SearchPlan(tuple(births), None)

    def _counts(self, config: HyperparameterConfig, start: SearchStart) -> dict[str, int]:
        """How many values each hyperparameter has."""
        counts = {name: 1 if one.choices is None else len(one.choices) for name, one in config.items()}
        numbers = [name for name, one in config.items() if one.choices is None]
        if isinstance(self.points, Mapping):
            unknown = sorted(self.points.keys() - set(numbers))
            if unknown:
                fix = f"must have names of hp_config with bounds: {', '.join(numbers) or 'none'}; drop {unknown}"
                raise ConfigurationError("points", self.points, fix)
            return {**counts, **self.points}
        if self.points is not None:
            return counts | dict.fromkeys(numbers, self.points)
        grows = True
        while grows:
            grows = False
            for name in sorted(numbers, key=counts.__getitem__):
                larger = {**counts, name: counts[name] + 1}
                if prod(larger.values()) <= len(start.founders):
                    counts, grows = larger, True
                    break
        return counts


def _values(config: HyperparameterConfig, name: str, count: int) -> dict[Value, None]:
    """The different values of one hyperparameter on the grid, in order; an int may have fewer than `count`."""
    one = config[name]
    if one.choices is not None:
        return dict.fromkeys(one.choices)
    fractions = [0.5] if count == 1 else [place / (count - 1) for place in range(count)]
    return dict.fromkeys(one.at(fraction) for fraction in fractions)
