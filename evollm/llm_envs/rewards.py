"""Reward functions: plain Python that gives each answer a number."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evollm.by_main import computed_by_main
from evollm.checks import finite_number, positive_number
from evollm.data.prompt_rows import ASKED, COLUMNS
from evollm.data.samples import Sample
from evollm.errors import ConfigurationError
from evollm.names import row_name
from evollm.processes import Processes
from evollm.user_functions import as_list, as_number, first_failing, first_words, read_out

# (prompts, completions, **columns) -> a number for each completion, or None where the function says nothing of it.
RewardFunction: TypeAlias = Callable[..., Sequence[Any]]
# What functions get beside columns.
_PROMPTS, _COMPLETIONS = "prompts", "completions"
_FIX = "must be a function, a list of functions, or a mapping of names to functions"


@dataclass(frozen=True)
class Rewards:
    """Reward functions with their weights.

    Attributes:
        functions: The functions by name.
        weights: A weight for each function, in their order.
        timeout: Most seconds of a call; None: no limit.
        columns: The columns that functions are given, beside those of the prompts of a call.
    """

    functions: Mapping[str, RewardFunction]
    weights: tuple[float, ...]
    timeout: float | None = None
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, functions: object, weights: object = None, timeout: object = None) -> Rewards:
        """Check a user's arguments; see `evollm.llm_envs.RewardGym`.

        Raises:
            ConfigurationError: An argument is invalid.
        """
        named = _named(functions)
        return cls(
            named,
            _weights_of(weights, list(named)),
            None if timeout is None else float(positive_number("reward_timeout", timeout)),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the functions."""
        return tuple(self.functions)

    def with_columns(self, prompts: Iterable[Sample]) -> Rewards:
        """A copy whose functions get the columns of all these prompts in every call, None where one lacks a column."""
        return replace(self, columns=tuple(_columns_of(prompts)))

    @property
    def hidden_columns(self) -> list[str]:
        """Columns that no function can get, since their names stand for prompts and answers."""
        return [name for name in (_PROMPTS, _COMPLETIONS) if name in self.columns]

    def of_answers(self, prompts: Sequence[Sample], answers: Sequence[str]) -> NDArray[np.float64]:
        """What each function says of each answer, in one call of each function in the main process.

        Args:
            prompts: For each answer its prompt, a sample of `RewardGym`.
            answers: n texts.

        Returns:
            (n, F) numbers, which may be NaN or infinite; 0 for None.

        Raises:
            ConfigurationError: A function raises, takes longer than `timeout`, or returns something else than n
                numbers. The message names the function, and the row and the first words of a prompt.
        """
        columns = computed_by_main(
            Processes.present(),
            lambda: [self._column(name, prompts, answers).tolist() for name in self.functions],
            "a reward function",
        )
        by_answer: NDArray[np.float64] = np.array(columns, dtype=np.float64).T
        return by_answer

    def total(self, found: NDArray[np.float64]) -> NDArray[np.float64]:
        """The weighted sums (n,) of what `of_answers` gave, (n, F)."""
        weights = np.array(self.weights)
        # A function with a weight of 0 is watched, and may say NaN.
        counts = weights != 0
        with np.errstate(invalid="ignore"):
            total: NDArray[np.float64] = (found[:, counts] * weights[counts]).sum(axis=1)
        return total

    def try_out(self, prompts: Sequence[Sample]) -> None:
        """Call every function once on prompts, with an empty answer and one with words to each.

        Raises:
            ConfigurationError: As of `of_answers`.
        """
        self.of_answers([one for prompt in prompts for one in (prompt, prompt)], ["", "An answer."] * len(prompts))

    def _column(self, name: str, prompts: Sequence[Sample], answers: Sequence[str]) -> NDArray[np.float64]:
        function = self.functions[name]
        try:
            given = self._called(function, prompts, answers)
        except TimeoutError:
            what = f"{name} has not returned within reward_timeout={self.timeout:g} s"
            raise _error(what, prompts[0], "let it stop by itself, or give it more time") from None
        except Exception as error:
            asked = list(zip(prompts, answers, strict=True))
            culprit, _ = first_failing(asked, lambda one: self._called(function, one[:1], one[1:]))
            raise _error(f"{name} raised {type(error).__name__}: {error}", culprit, "correct it") from error
        values = as_list(given)
        if values is None or len(values) != len(answers):
            shown = type(given).__name__ if values is None else f"{len(values)} values"
            what = f"{name} returned {shown} for {len(answers)} completions"
            raise _error(what, prompts[0], "must return a list with a number for each")
        return np.array([_number(name, value, prompt) for value, prompt in zip(values, prompts, strict=True)])

    def _called(self, function: RewardFunction, prompts: Sequence[Sample], answers: Sequence[str]) -> Any:
        columns = dict.fromkeys([*self.columns, *_columns_of(prompts)])
        # Copies, since a function may change what it is given.
        handed: dict[str, Any] = {
            name: [copy.deepcopy(sample.extras.get(COLUMNS, {}).get(name)) for sample in prompts] for name in columns
        }
        asked = [copy.deepcopy(sample.extras.get(ASKED)) for sample in prompts]
        handed |= {_PROMPTS: asked, _COMPLETIONS: list(answers)}
        taken = _taken_by(function, handed)

        def call() -> Any:
            return read_out(function(**taken))

        return call() if self.timeout is None else _within(self.timeout, call)


def _columns_of(prompts: Iterable[Sample]) -> dict[str, None]:
    return dict.fromkeys(column for sample in prompts for column in sample.extras.get(COLUMNS, {}))


def _named(functions: object) -> dict[str, RewardFunction]:
    if isinstance(functions, str):
        fix = f"{_FIX}; if this is the name of a reward model, RewardModel({functions!r})"
        raise ConfigurationError("reward_functions", functions, fix)
    if callable(functions):
        functions = [functions]
    if isinstance(functions, Mapping):
        named = {str(name): one for name, one in functions.items()}
    elif isinstance(functions, Sequence):
        names = [getattr(one, "__name__", type(one).__name__) for one in functions]
        named = dict(zip(names, functions, strict=True))
        if len(named) < len(names):
            fix = "have equal names: give a mapping of names to functions"
            raise ConfigurationError("reward_functions", names, fix)
    else:
        raise ConfigurationError("reward_functions", functions, _FIX)
    if not named or not all(callable(one) for one in named.values()):
        raise ConfigurationError("reward_functions", functions, _FIX)
    return named


def _weights_of(weights: object, names: Sequence[str]) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * len(names)
    fix = f"must have a number for each of {list(names)}"
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ConfigurationError("reward_weights", dict(weights), fix)
        weights = [weights[name] for name in names]
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != len(names):
        raise ConfigurationError("reward_weights", weights, fix)
    found = tuple(float(finite_number("reward_weights", weight)) for weight in weights)
    if not any(found):
        fix = "are all 0, so that every reward would be 0 too: raise one of them"
        raise ConfigurationError("reward_weights", weights, fix)
    return found


def _taken_by(function: RewardFunction, handed: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function's signature takes; all of them if it has none to read."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return dict(handed)
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return dict(handed)
    return {name: value for name, value in handed.items() if name in parameters}


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call in a thread of its own.

    Raises:
        TimeoutError: It takes longer; the thread is left behind, since Python cannot end it.
    """
    found: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if raised:
        if isinstance(raised[0], TimeoutError):
            raise RuntimeError(f"TimeoutError: {raised[0]}") from raised[0]
        raise raised[0]
    return found[0]


def _number(name: str, value: Any, prompt: Sample) -> float:
    """A value as a number; 0 for None, with which a function says nothing of an answer."""
    if value is None:
        return 0.0
    number = as_number(value)
    if number is None:
        raise _error(f"{name} returned {value!r}", prompt, "must return a number for each completion")
    return number


def _error(what: str, prompt: Sample, fix: str) -> ConfigurationError:
    words = first_words(prompt.extras.get(ASKED))
    where = row_name(prompt.row, prompt.set_name)
    return ConfigurationError("reward_functions", what, f"on {where}, {words!r}: {fix}")
