"""The arguments of `tune`, and what can be refused of them at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from evollm.algorithms import Algorithm, algorithm_named
from evollm.checkpoints.find import check_is_base
from evollm.checks import optional_whole_number, whole_number
from evollm.data.mixing import FIELD
from evollm.errors import ConfigurationError
from evollm.hpo import STRATEGIES, TournamentSearch
from evollm.models.shared_base import check_plain_model
from evollm.names import ALIASES, check_known
from evollm.tuning.parameters import Settings, check_types, parameters_of, strategy_parameters

# An upper bound far above useful population sizes, since every agent takes memory.
MOST_AGENTS = 4096


@dataclass(frozen=True)
class Request:
    """The arguments of `tune`, which documents each field.

    Attributes:
        settings: Further keyword arguments, for the gym, the agents, the search and the loop.
    """

    model: Any
    data: Any
    tokenizer: Any = None
    test_data: Any = None
    final_data: Any = None
    algorithm: str = "dpo"
    population: int = 4
    generations: int | None = None
    start_from: Any = None
    settings: Settings = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.model, PeftModel):
            check_plain_model("model", self.model)
        if not isinstance(self.model, str | os.PathLike | PreTrainedModel):
            fix = "must be a hub name, a folder, or a loaded language model of transformers without adapters"
            raise ConfigurationError("model", self.model, fix)
        check_is_base("model", self.model)
        sets = self.settings.get(FIELD) is not None
        _check_rows("data", self.data, "must be rows, the path of a file, or a list of paths", sets)
        for name in ("test_data", "final_data"):
            value = getattr(self, name)
            if value is not False:
                fix = "must be rows, the path of a file, null for a tenth of data's rows, or false for none"
                _check_rows(name, value, fix, sets)
        whole_number("population", self.population, 1)
        if self.population > MOST_AGENTS:
            raise ConfigurationError("population", self.population, f"must be at most {MOST_AGENTS}")
        optional_whole_number("generations", self.generations, 2)
        if self.start_from is not None and not isinstance(self.start_from, str | os.PathLike):
            raise ConfigurationError("start_from", self.start_from, "must be the folder of an agent, or of a run")
        annotations = parameters_of(self.kind)
        check_known(self.settings, [*TUNE_PARAMETERS, *annotations], ALIASES)
        check_types(self.settings, annotations)
        if self.population == 1:
            for name, value in (("generations", self.generations), *self.settings.items()):
                if name in EVOLUTION and value is not None:
                    raise ConfigurationError(name, value, "one agent does not evolve: leave it out, or population > 1")

    @property
    def kind(self) -> Algorithm:
        """The `Algorithm` that `algorithm` names."""
        return algorithm_named(self.algorithm)


def _check_rows(name: str, value: object, fix: str, sets: bool) -> None:
    """Refuse a value that can be neither rows nor a file; with `sets`, each of a mapping's."""
    if sets and isinstance(value, Mapping):
        for key, rows in value.items():
            _check_rows(f"{name}.{key}", rows, "must be rows, the path of a file, or a list of paths", False)
        return
    is_word = name != "data" and isinstance(value, str) and value.lower() in ("no", "none", "off", "yes", "on")
    if is_word or isinstance(value, bool | int | float):
        raise ConfigurationError(name, value, fix)
    if isinstance(value, Mapping) and value and all(isinstance(path, str | os.PathLike) for path in value.values()):
        fix = f"must be the path of a file; the others are test_data and final_data, and several sets need {FIELD}"
        raise ConfigurationError(name, value, fix)


# Settings that have an effect only with more than one agent.
EVOLUTION = frozenset(
    {
        "generations",
        "evo_steps",
        "hp_config",
        "sample_hyperparameters",
        "sampling",
        "tournament_size",
        "elitism",
        "no_mutation",
        "crossover",
    }
    | {"rl_hp", "search"}
    | {
        name
        for one in STRATEGIES.values()
        for name in strategy_parameters(one).keys() - strategy_parameters(TournamentSearch).keys()
    }
)
TUNE_PARAMETERS = tuple(name for name in Request.__dataclass_fields__ if name != "settings")


def request_of(model: Any, data: Any, **arguments: Any) -> Request:
    """The arguments of `tune` as a checked `Request`, with the defaults of `tune`."""
    own = {name: arguments.pop(name) for name in TUNE_PARAMETERS if name in arguments}
    return Request(model=model, data=data, **own, settings=arguments)
