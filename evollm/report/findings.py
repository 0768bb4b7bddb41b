"""The result of a run as sentences: scores, differences, and whether they may be chance."""

from __future__ import annotations

from dataclasses import dataclass

from evollm.hpo import AnyEvaluation, rank
from evollm.report.statistics import Interval, few_rows, paired_difference, score_interval
from evollm.runs.record import RunRecord, Scored
from evollm.runs.words import Score, Words


@dataclass(frozen=True)
class Comparison:
    """The difference in one score between the winner and another model, on the same rows.

    Attributes:
        noun: The noun for a row.
        role: `before` for the untuned model, or `runner_up`.
        against: The other model's name in sentences.
        score: The score that is compared.
        difference: The winner's score minus the other's, with a 95 % bootstrap interval.
    """

    noun: str
    role: str
    against: str
    score: Score
    difference: Interval

    @property
    def verdict(self) -> str:
        """Whether the winner is better or worse, as far as the interval shows."""
        difference = self.difference
        if not difference.is_finite:
            return "not known"
        if difference.low == difference.high == 0:
            return f"the same on every {self.noun}"
        if difference.includes_zero:
            return "not told apart: the interval includes 0"
        return "better" if (difference.value < 0) == self.score.smaller_is_better else "worse"

    def written(self) -> tuple[str, str]:
        """The difference with its unit, and the interval, as text."""
        low, high = (signed(end, self.score) for end in (self.difference.low, self.difference.high))
        interval = f"{low} to {high}"
        if not self.difference.is_finite:
            interval = "not known"
        elif self.difference.low == self.difference.high:
            interval = f"every {self.noun} alike"
        unit = "points" if self.score.is_share else self.score.unit
        return f"{signed(self.difference.value, self.score)} {unit}", interval


def compare(record: RunRecord) -> list[Comparison]:
    """Compare the winner with the untuned model and with the runner-up, as far as their evaluations were recorded."""
    ended = record.ended
    if ended is None or "after" not in ended.pairs:
        return []
    second = "the best agent at the end" if ended.best_step < ended.step else "the runner-up"
    names = {"before": "the untuned model", "runner_up": f"{second}, agent {ended.runner_up}"}
    after, noun = ended.pairs["after"], record.words.noun
    return [
        Comparison(noun, role, against, score, paired_difference(after, ended.pairs[role], score.name))
        for role, against in names.items()
        if role in ended.pairs
        for score in record.words.shown
    ]


def headline(record: RunRecord, comparisons: list[Comparison]) -> list[str]:
    """Return the sentences at the top of the report: the result, and what it does not show."""
    ended = record.ended
    if ended is None:
        total = record.config["schedule"]["total"]
        sentences = [f"The run has not ended: {record.last_step} of {total} steps are done."]
        if record.winner is not None:
            sentences.append(
                f"The best agent so far is {record.winner}, judged on the {record.words.noun}s of the selection."
            )
        return [*sentences, *_best_step(record), *_few_rows(record)]
    if not ended.split:
        nothing = f"No held-out {record.words.noun}s were given, so nothing shows whether the model has become better."
        return [nothing, *_best_step(record)]
    sentences = [_result(record, record.words.shown[0], comparisons)]
    with_runner_up = [one for one in comparisons if one.role == "runner_up"]
    if with_runner_up:
        sentences.append(_against_runner_up(with_runner_up))
    if ended.split != "final" and len(record.lives) > 1:
        sentences.append(
            f"These are the {record.words.noun}s that agents were selected by, so the score is optimistic. "
            "A final_dataset gives one that nothing was selected by."
        )
    if ended.stopped:
        total = record.config["schedule"]["total"]
        sentences.append(f"The run stopped early, after step {ended.step} of {total}: {ended.stopped}.")
    return [*sentences, *_best_step(record), *_few_rows(record)]


def gain_of(words: Words, before: AnyEvaluation, after: AnyEvaluation) -> str:
    """Return the best agent's gain over the untuned model with its interval, and whether it may be chance."""
    score = words.shown[0]
    difference = paired_difference(after, before, score.name)
    return _gain(Comparison(words.noun, "before", "the start", score, difference), after)


def kind_of_rows(record: RunRecord) -> str:
    """Return the number and the kind of the rows of the final score."""
    assert record.ended is not None
    rows = f"{record.words.noun}s"
    after = record.ended.pairs.get("after")
    number = "" if after is None else f"{len(after)} "
    if record.ended.split == "final":
        return f"{number}{rows} that nothing was selected by"
    return f"{number}{rows} of the selection" if len(record.lives) > 1 else f"{number}held-out {rows}"


def _result(record: RunRecord, score: Score, comparisons: list[Comparison]) -> str:
    """The score before and after, and the gain."""
    assert record.ended is not None
    who = f" with agent {record.ended.best}" if len(record.lives) > 1 else ""
    before, after = (_value(record.ended.scores.get(role, {}).get(score.name), score) for role in ("before", "after"))
    unit = _unit(score)
    text = f"On {kind_of_rows(record)}, the {score.label} went from {before} to {after}{unit}{who}"
    gain = next((one for one in comparisons if one.role == "before" and one.score == score), None)
    if gain is None:
        return f"{text}. This folder does not hold the results row by row, so there are no intervals."
    return f"{text}: {_gain(gain, record.ended.pairs['after'])}"


def _gain(gain: Comparison, after: AnyEvaluation) -> str:
    """The gain with its interval, and whether it may be chance."""
    unit = _unit(gain.score)
    difference, interval = gain.written()
    if not gain.difference.is_finite:
        return f"{difference}. That is not enough for an interval, and shows nothing."
    if gain.difference.low == gain.difference.high:
        own = score_interval(after, gain.score.name)
        ends = f"{_value(own.low, gain.score)} to {_value(own.high, gain.score)}{unit}"
        text = f"{difference} on every {gain.noun} (95 % interval of the {gain.score.label} itself: {ends})."
    else:
        text = f"{difference} (95 % interval {interval})."
    if gain.difference.includes_zero:
        return f"{text} The interval includes no gain: this does not show that tuning has helped."
    return f"{text} It has become worse." if gain.verdict == "worse" else text


def _against_runner_up(comparisons: list[Comparison]) -> str:
    """The differences up to the first score whose interval excludes 0."""
    parts = []
    for one in comparisons:
        difference, interval = one.written()
        if one.difference.low == one.difference.high == 0:
            parts.append(f"the same {one.score.label} on every {one.noun}")
        else:
            parts.append(f"{difference} {one.score.label} (95 % interval {interval})")
        if not one.difference.includes_zero:
            return f"Against {one.against}: {'; '.join(parts)}."
    against, noun = comparisons[0].against, comparisons[0].noun
    return f"Against {against}: {'; '.join(parts)}. These {noun}s do not tell the two apart."


def signed(value: float, score: Score) -> str:
    """Return a difference with its sign; that of a share is in percentage points, and a rounded 0 has no sign."""
    number = _number(value, score, "+")
    return number if float(number) != 0 else number[1:]


def _best_step(record: RunRecord) -> list[str]:
    """A sentence if an earlier evaluation than the last was the best: its advantage, and whether it may be chance."""
    best, latest = record.winning_evaluation, record.latest_evaluation
    if best is None or best.step == latest[0].step:
        return []
    last = latest[rank([scored.fitness for scored in latest])[0]]
    several = len(record.lives) > 1
    text = f"The best agent is that of step {best.step} of {last.step}"
    text += f", agent {best.agent}" if several and record.ended is None else ""
    when = f"{'of the best one ' if several else ''}{'now' if record.ended is None else 'at the end'}"
    found = _better_in(best, last, record.words)
    if found is None:
        return [f"{text}: a fitness of {best.fitness[0]:.4g} against {last.fitness[0]:.4g} {when}."]
    score, difference = found
    then, now = (_value(point.scores[score.name], score) for point in (best, last))
    text += f": its {score.label} on the {record.words.noun}s of the {'selection' if several else 'evaluations'}"
    text += f" was {then} against {now}{_unit(score)} {when}"
    if difference is None:
        return [f"{text}."]
    low, high = (signed(end, score) for end in (difference.low, difference.high))
    if difference.includes_zero:
        return [f"{text}, which may be chance (95 % interval of the difference {low} to {high})."]
    return [f"{text} (95 % interval of the difference {low} to {high}): fewer steps may be enough."]


def _better_in(best: Scored, last: Scored, words: Words) -> tuple[Score, Interval | None] | None:
    """The first score by which one evaluation is better than a later one, and its difference if it has an interval."""
    for score in words.shown:
        if score.name not in best.scores or score.name not in last.scores:
            continue
        difference = best.scores[score.name] - last.scores[score.name]
        if difference == 0 or (difference < 0) != score.smaller_is_better:
            continue
        if best.pairs is None or last.pairs is None or len(best.pairs) != len(last.pairs):
            return score, None
        interval = paired_difference(best.pairs, last.pairs, score.name)
        return score, interval if interval.is_finite else None
    return None


def _few_rows(record: RunRecord) -> list[str]:
    """The warning of `few_rows`, for the rows of this run."""
    after = None if record.ended is None or record.ended.split != "final" else record.ended.pairs.get("after")
    test = max((len(scored.pairs) for scored in record.evaluations if scored.pairs is not None), default=0)
    final = 0 if after is None else len(after)
    text = few_rows(record.words, agents=len(record.founders), test=test, final=final)
    return [text] if text else []


def _unit(score: Score) -> str:
    return " %" if score.is_share else f" {score.unit}"


def _value(value: float | None, score: Score) -> str:
    return "unknown" if value is None else _number(value, score)


def _number(value: float, score: Score, sign: str = "") -> str:
    """A number as text; a share is in percent."""
    if score.is_share:
        return f"{100 * value:{sign}.{score.digits - 2}f}"
    return f"{value:{sign}.{score.digits}f}"
