"""TPE and CMA-ES through Optuna: trials of equal length, whose hyperparameters Optuna proposes from those before.

Tree-structured Parzen estimators are by Bergstra et al. 2011, CMA-ES is by Hansen (arXiv 1604.00772), and Optuna by
Akiba et al. 2019 (arXiv 1907.10902). A trial is an agent that begins afresh and is trained for `evo_steps` steps; the
members of a population are trials at the same time. The agent of the best trial so far is kept and trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from evollm.checks import whole_number
from evollm.errors import CheckpointError, ConfigurationError, MissingExtraError
from evollm.hpo.fitness import Fitness, is_finite
from evollm.hpo.hyperparameters import HyperparameterConfig, RLParameter, Value
from evollm.hpo.lineage import Birth
from evollm.hpo.search import Result, SearchPlan, SearchStart, best_first, reading_state, require_config

SAMPLERS = ("tpe", "cmaes")


@dataclass
class OptunaSearch:
    """A sampler of Optuna as an `evollm.hpo.Search`; the founders are the first trials. Needs the extra `optuna`.

    Optuna gets the first component of a trial's fitness, and of a diverged agent that the trial was pruned. CMA-ES
    draws categorical hyperparameters at random, and needs two numbers.

    Args:
        sampler: `tpe` or `cmaes`.
        rand_seed: Seed of the sampler.

    Raises:
        ConfigurationError: There is no such sampler, or the seed is not an integer of at least 0.
        MissingExtraError: Optuna is not installed.
    """

    sampler: str = "tpe"
    rand_seed: int = 42

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigurationError("sampler", self.sampler, f"must be one of {', '.join(SAMPLERS)}")
        self.rand_seed = whole_number("rand_seed", self.rand_seed, 0)
        _optuna(self.sampler)

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the founders, unchanged.

        Raises:
            ConfigurationError: No hyperparameter may change, or there is one founder, whose place the best trial keeps.
        """
        self._config = require_config(start.hp_config, "Optuna has nothing to propose")
        if len(start.founders) == 1:
            raise ConfigurationError("search", self, "there is one agent: give several, since the best one is kept")
        self._founders, self._interval = list(start.founders), start.interval
        self._next_index = start.next_index
        self._begin()
        return SearchPlan(tuple(start.founders), self._interval)

    def _begin(self) -> None:
        """A study with the founders as its running trials."""
        optuna = _optuna(self.sampler)
        with _quiet(optuna):
            self._study = optuna.create_study(direction="maximize", sampler=_sampler(optuna, self))
            for birth in self._founders:
                self._study.enqueue_trial({name: birth.hyperparameters[name] for name in self._config})
        # The index of the kept agent, None before the first decision, and the fitness of its trial.
        self._best: tuple[int, Fitness] | None = None
        # How all trials ended that have ended, as Optuna was told: for each decision, in the order of the trials.
        self._told: list[list[float | None]] = []
        self._ask(len(self._founders))
        self._indices = [birth.index for birth in self._founders]

    def _ask(self, count: int) -> None:
        """Ask Optuna for the values of the next trials, which run then."""
        optuna = _optuna(self.sampler)
        with _quiet(optuna):
            self._running = [self._study.ask(_distributions(optuna, self._config)) for _ in range(count)]
        self._proposed = [
            {name: _within(self._config[name], trial.params[name]) for name in self._config} for trial in self._running
        ]

    def _end_trials(self, values: Sequence[float | None]) -> None:
        """Tell Optuna how the running trials ended; None: the agent diverged."""
        optuna = _optuna(self.sampler)
        with _quiet(optuna):
            for trial, value in zip(self._running, values, strict=True):
                self._study.tell(trial, value, state=optuna.trial.TrialState.PRUNED if value is None else None)
        self._told.append(list(values))

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Keep the agent of the best trial so far, and begin as many trials as there are other places.

        Raises:
            DivergedError: No member has a finite fitness.
        """
        fittest = best_first(results)[0]
        finite = {result.index: result for result in results if is_finite(result.fitness)}
        fitnesses = {index: finite[index].fitness for index in self._indices if index in finite}
        if self._best is not None and self._best[0] in finite:
            # First, since it is the best among equals.
            fitnesses = {self._best[0]: self._best[1], **fitnesses}
        self._end_trials([finite[index].fitness[0] if index in finite else None for index in self._indices])
        best = max(fitnesses, key=fitnesses.__getitem__)
        self._best = best, fitnesses[best]
        births = [finite[best].kept(elite=finite[best] is fittest)]
        self._ask(len(self._founders) - 1)
        self._indices = []
        for place, values in enumerate(self._proposed):
            # Equal trials are one agent.
            first = self._proposed.index(values)
            if first < place:
                self._indices.append(self._indices[first])
                continue
            births.append(Birth.fresh(self._next_index, {**self._founders[0].hyperparameters, **values}))
            self._indices.append(self._next_index)
            self._next_index += 1
        return SearchPlan(tuple(births), self._interval)

    def state_dict(self) -> dict[str, Any]:
        """How all trials ended, from which the study is made again, and the running trials."""
        return {
            "next_index": self._next_index,
            "best": None if self._best is None else [self._best[0], list(self._best[1])],
            "told": [list(values) for values in self._told],
            "indices": list(self._indices),
            "proposed": [dict(values) for values in self._proposed],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`: the study is asked and told again.

        Raises:
            CheckpointError: `state` is not such a state, or was made by a version of Optuna with other proposals.
        """
        with reading_state():
            next_index, indices = int(state["next_index"]), [int(index) for index in state["indices"]]
            told = [[None if value is None else float(value) for value in values] for values in state["told"]]
            best = state["best"] and (int(state["best"][0]), tuple(map(float, state["best"][1])))
            proposed = [dict(values) for values in state["proposed"]]
        with reading_state():
            self._begin()
            for values in told:
                self._end_trials(values)
                self._ask(len(self._founders) - 1)
        if self._proposed != proposed:
            raise CheckpointError("Optuna proposes other values than before: use the version that the run began with")
        self._next_index, self._indices, self._best = next_index, indices, best


def _optuna(sampler: str) -> Any:
    """The package, with what the sampler needs.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import optuna  # noqa: PLC0415

        if sampler == "cmaes":
            import cmaes  # noqa: F401, PLC0415
    except ImportError as error:
        raise MissingExtraError(error.name or "optuna", "optuna", f"sampler={sampler!r}") from error
    return optuna


def _sampler(optuna: Any, search: OptunaSearch) -> Any:
    if search.sampler == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=search.rand_seed, warn_independent_sampling=False)
    # Trials that run at the same time keep away from one another.
    return optuna.samplers.TPESampler(seed=search.rand_seed, constant_liar=True)


def _distributions(optuna: Any, config: HyperparameterConfig) -> dict[str, Any]:
    found = {}
    for name, one in config.items():
        if one.choices is not None:
            found[name] = optuna.distributions.CategoricalDistribution(one.choices)
        else:
            kind = optuna.distributions.IntDistribution if one.dtype is int else optuna.distributions.FloatDistribution
            found[name] = kind(*one.bounds, log=True)
    return found


def _within(one: RLParameter, value: Any) -> Value:
    return str(value) if one.choices is not None else one.clip(value)


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without a line for each trial and without warnings of experimental features."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
