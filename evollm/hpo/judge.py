"""Judges of answers: the share of prompts at which an agent's answer is preferred to the reference's.

A judge may prefer whatever stands first (Zheng et al. 2023, arXiv 2306.05685, section 3.4), so each comparison is asked
a second time with the answers swapped, and the two are averaged: one that always prefers the first answer gives 0.5.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from evollm.checks import finite_number, positive_number, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import TIE, FloatArray
from evollm.hpo.guards import AnswerSampling
from evollm.names import row_name
from evollm.user_functions import as_list, as_number, first_failing, first_words, read_out

# (prompts, first, second) -> preferences for the first answers, or (prompts, completions) -> rewards; lists of equal
# lengths, by name.
JudgeFunction: TypeAlias = Callable[..., Sequence[Any]]

_COMPARES, _SCORES = frozenset({"first", "second"}), frozenset({"completions"})
_KINDS = "must be a function with the arguments prompts, first and second, or with prompts and completions"
_TRIAL = ("An answer.", "Another answer.")


@dataclass(frozen=True)
class AnswerPair:
    """An agent's answer to a held-out prompt, and the reference's; plain data.

    Attributes:
        row: Position of the row in the user's dataset.
        prompt: The prompt as the row has it: a string, or a list of messages.
        own: The agent's answer, without special tokens.
        reference: The reference's answer.
        place: Position of the prompt among the rows of the evaluation.
        set_name: Name of the row's set, where there are several.
    """

    row: int
    prompt: Any
    own: str
    reference: str
    place: int = 0
    set_name: str = ""


@dataclass(frozen=True)
class Judge:
    """Compares agents' answers to held-out prompts with the reference's answers.

    Args:
        function: Compares or scores answers; called with lists of n, by name. One with the arguments `prompts`, `first`
            and `second` returns n preferences: 1 where the first answer is better, 0 where the second is, 0.5 for a
            tie, or anything between. It is asked about each pair of answers in both orders. One with `prompts` and
            `completions`, as the reward functions of TRL, returns n rewards, and the answer with the larger one wins.
            Prompts, which it need not take, are as the rows have them: strings, or lists of messages; answers are
            strings.
        prompts: The first so many prompts of the evaluated rows are answered at each evaluation.
        max_new_tokens: Answers, also the reference's, are cut at this many tokens.
        temperature: 0: greedy decoding; above 0, answers are sampled.
        top_p: As of transformers, for sampled answers.
        seed: Seeds sampled answers, together with the row: all agents and the reference have the same random numbers,
            at every evaluation.

    Raises:
        ConfigurationError: The function takes other arguments, or a number is out of range.
    """

    function: JudgeFunction
    prompts: int = 64
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        _taken_by(self.function)
        for name, least in (("prompts", 1), ("max_new_tokens", 1), ("seed", 0)):
            object.__setattr__(self, name, whole_number(f"judge.{name}", getattr(self, name), least))
        temperature = finite_number("judge.temperature", self.temperature)
        if temperature < 0:
            raise ConfigurationError("judge.temperature", temperature, "must be at least 0")
        top_p = positive_number("judge.top_p", self.top_p)
        if top_p > 1:
            raise ConfigurationError("judge.top_p", top_p, "must be at most 1")
        if top_p < 1 and not temperature:
            fix = "has an effect only on sampled answers: give a temperature too, or leave this out"
            raise ConfigurationError("judge.top_p", top_p, fix)
        object.__setattr__(self, "temperature", float(temperature))
        object.__setattr__(self, "top_p", float(top_p))

    @property
    def name(self) -> str:
        """The function's name, for messages and records."""
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    @property
    def sampling(self) -> AnswerSampling:
        """The answers that are generated."""
        return AnswerSampling(self.prompts, self.max_new_tokens, self.temperature, self.top_p, self.seed)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, the function by its name."""
        return {"function": self.name, **vars(self.sampling)}

    def win_rates(self, pairs: Sequence[AnswerPair]) -> FloatArray:
        """How often each agent's answer is preferred to the reference's, in one call of the function.

        Args:
            pairs: n answers, each with that of the reference. Equal answers are a tie, and not judged.

        Returns:
            (n,) numbers in [0, 1].

        Raises:
            ConfigurationError: The function raises, or returns something else than the right numbers. The message names
                the function, and the row and first words of a prompt.
        """
        found = np.full(len(pairs), TIE)
        differing = [number for number, pair in enumerate(pairs) if pair.own != pair.reference]
        if differing:
            asked = [pairs[number] for number in differing]
            compares = _taken_by(self.function)[0] == _COMPARES
            found[differing] = self._compared(asked) if compares else self._scored(asked)
        return found

    def try_out(self, row: int, prompt: Any) -> None:
        """Judge two made-up answers to a prompt.

        Raises:
            ConfigurationError: As of `win_rates`.
        """
        self.win_rates([AnswerPair(row, prompt, *_TRIAL)])

    def _compared(self, pairs: Sequence[AnswerPair]) -> FloatArray:
        """The means of both orders, of a function that compares."""
        asked = [*((pair, pair.own, pair.reference) for pair in pairs)]
        asked += [(pair, pair.reference, pair.own) for pair in pairs]
        found = self._asked(asked, ("first", "second"), largest=1.0)
        count = len(pairs)
        return np.asarray((found[:count] + 1 - found[count:]) / 2)

    def _scored(self, pairs: Sequence[AnswerPair]) -> FloatArray:
        """1, 0.5 and 0 by the rewards of both answers, of a function that scores; each answer is scored once."""
        asked = [repr(pair.prompt) for pair in pairs]
        both = zip(asked, pairs, strict=True)
        texts = {(prompt, text): pair for prompt, pair in both for text in (pair.own, pair.reference)}
        rewards = self._asked([(pair, text) for (_, text), pair in texts.items()], ("completions",), largest=math.inf)
        of = dict(zip(texts, rewards, strict=True))
        both = zip(asked, pairs, strict=True)
        margins = np.array([of[prompt, pair.own] - of[prompt, pair.reference] for prompt, pair in both])
        return np.asarray(np.heaviside(margins, TIE))

    def _asked(self, asked: Sequence[tuple[Any, ...]], names: Sequence[str], largest: float) -> FloatArray:
        """The function's numbers (n,), for n pairs each with the texts of these arguments."""
        try:
            given = self._call(asked, names)
        except Exception as error:  # Whatever the user's function raises.
            what = f"{self.name} raised {type(error).__name__}: {error}"
            culprit = first_failing(asked, lambda one: self._call([one], names))
            raise _error(what, culprit[0], "correct it") from error
        values = as_list(given)
        if values is None or len(values) != len(asked):
            shown = type(given).__name__ if values is None else f"{len(values)} values"
            fix = "must return a list with a number for each"
            raise _error(f"{self.name} returned {shown} for {len(asked)} questions", asked[0][0], fix)
        numbers = [math.nan if (number := as_number(value)) is None else number for value in values]
        within = f"from 0 to {largest:.0f}" if math.isfinite(largest) else "that is finite"
        for number, value, (pair, *_) in zip(numbers, values, asked, strict=True):
            if not math.isfinite(number) or (math.isfinite(largest) and not 0 <= number <= largest):
                raise _error(f"{self.name} returned {value!r}", pair, f"must return a number {within} for each")
        return np.array(numbers)

    def _call(self, asked: Sequence[tuple[Any, ...]], names: Sequence[str]) -> Any:
        pairs, *texts = zip(*asked, strict=True)
        lists = {name: list(column) for name, column in zip(names, texts, strict=True)}
        if _taken_by(self.function)[1]:
            # Copies, since a function may change what it is given.
            lists["prompts"] = [copy.deepcopy(pair.prompt) for pair in pairs]
        return read_out(self.function(**lists))


def judge_of(value: object) -> Judge:
    """Return `value`, or the judge with this function and the default settings.

    Raises:
        ConfigurationError: It is neither a `Judge` nor a suitable function.
    """
    return value if isinstance(value, Judge) else Judge(value)  # type: ignore[arg-type]


def _taken_by(function: object) -> tuple[frozenset[str], bool]:
    """`_COMPARES` or `_SCORES`, by the names of a function's arguments, and whether it takes prompts too."""
    if not callable(function):
        hint = (
            f"; if this is the name of a reward model, RewardModel({function!r})" if isinstance(function, str) else ""
        )
        raise ConfigurationError("judge", function, _KINDS + hint)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ConfigurationError("judge", function, f"{_KINDS}, and those of this one cannot be read") from None
    names = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    takes_more = any(one.kind is one.VAR_KEYWORD for one in parameters)
    required = {one.name for one in parameters if one.name in names and one.default is one.empty}
    for kind in (_COMPARES, _SCORES):
        if kind <= names and required <= kind | {"prompts"}:
            return kind, takes_more or "prompts" in names
    raise ConfigurationError("judge", function, f"{_KINDS}, and this one takes {', '.join(sorted(names)) or 'none'}")


def _error(what: str, pair: AnswerPair, fix: str) -> ConfigurationError:
    words = first_words(pair.prompt)
    where = row_name(pair.row, pair.set_name)
    return ConfigurationError("judge", what, f"on {where}, {words!r}: {fix}")
