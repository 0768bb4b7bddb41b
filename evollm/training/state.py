"""The progress of a run as plain data, and the comparison of a resumed run's settings with the saved ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evollm.errors import CheckpointError, ConfigurationError
from evollm.execution.executor import Member
from evollm.hpo import AnyEvaluation, Birth, EvolutionPlan, Fitness, Result
from evollm.runs.evaluations import VECTORS
from evollm.training.schedule import Decision
from evollm.training.spending import Account

# Settings that a resumed run may change: its length, what it saves, and whether it drops non-finite rows.
_MAY_CHANGE = {
    "settings": {"drop_nonfinite_rows"},
    "options": {
        "num_epochs",
        "max_steps",
        "max_member_steps",
        "max_hours",
        "checkpoint_steps",
        "keep_last",
        "save_elite",
        "merge",
        "early_stopping_patience",
        "early_stopping_threshold",
        "num_sample_answers",
    },
    "schedule": {"total", "checkpoint_every"},
    # The checkpoint restores the position. `fingerprint` is compared instead of `digests`, which locate a changed text.
    "data": {"position", "digests", "written_at", "form"},
}
# `base` is a name or path, which may change; `base_fingerprint` is compared instead.
_NOT_COMPARED = {"versions", "base", "words"}


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: its agent, the steps done and the fitness; the executor has a copy of the agent.

    `rows` are those of the evaluation, None: all. One on fewer rows is the best only until there is one on all rows,
    and wins if every member diverges before that.
    """

    index: int
    step: int
    fitness: Fitness
    rows: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        founders: The first generation.
        before: Evaluation of the first agent before training; None if there are no held-out rows.
        step: Steps done; a step is one batch for every agent.
        evolutions: Evolutions done, each with the step after which it was carried out.
        evaluated: The step of the last evaluation of all members; None: there was none.
        evaluated_rows: Rows of that evaluation, None: all.
        fitnesses: The last fitness of every agent.
        evaluations: The evaluations behind these fitnesses, for the search; none of diverged agents.
        due: The next decision of the search.
        best: The best evaluation so far, the later one of equals; None: there was none.
        stale: Evaluations since the best fitness last improved, for early stopping.
        account: What has been spent.
    """

    founders: list[Birth]
    before: AnyEvaluation | None = None
    step: int = 0
    evolutions: list[tuple[int, EvolutionPlan]] = field(default_factory=list)
    evaluated: int | None = None
    evaluated_rows: int | None = None
    fitnesses: dict[int, Fitness] = field(default_factory=dict)
    evaluations: dict[int, AnyEvaluation] = field(default_factory=dict)
    due: Decision = field(default_factory=Decision)
    best: Best | None = None
    stale: int = 0
    account: Account = field(default_factory=Account)

    @property
    def generation(self) -> int:
        """Number of evolutions done."""
        return len(self.evolutions)

    @property
    def births(self) -> Sequence[Birth]:
        """The births of the present population, in the order of the members."""
        return self.evolutions[-1][1].births if self.evolutions else self.founders

    def results(self, members: Sequence[Member]) -> list[Result]:
        """What a search is told of members that have a fitness."""
        return [
            Result(
                member.index,
                self.fitnesses[member.index],
                dict(member.hyperparameters),
                member.steps,
                self.evaluations.get(member.index),
            )
            for member in members
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the evaluations, as strict JSON values."""
        return {
            "step": self.step,
            "due": self.due.step,
            **({} if self.due.rows is None else {"due_rows": self.due.rows}),
            "evaluated": self.evaluated,
            **({} if self.evaluated_rows is None else {"evaluated_rows": self.evaluated_rows}),
            "spent": self.account.to_dict(),
            "founders": [birth.to_dict() for birth in self.founders],
            "evolutions": [{"step": step, **plan.to_dict()} for step, plan in self.evolutions],
            "fitnesses": {
                str(index): [part if math.isfinite(part) else str(part) for part in fitness]
                for index, fitness in self.fitnesses.items()
            },
            **({} if self.best is None else {"best": self.best.to_dict(), "stale": self.stale}),
        }

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The vectors of the evaluations, one number per row, to be saved as arrays instead of JSON."""
        named = {f"agent_{index}": evaluation for index, evaluation in self.evaluations.items()}
        if self.before is not None:
            named["before"] = self.before
        return {
            f"{name}_{field.name}": getattr(evaluation, field.name)
            for name, evaluation in named.items()
            for field in fields(evaluation)
            if getattr(evaluation, field.name) is not None
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], arrays: Mapping[str, NDArray[np.generic]]) -> Progress:
        """Read the results of `to_dict` and `arrays`.

        Raises:
            CheckpointError: A value is missing or of the wrong type.
        """
        try:
            return cls(
                founders=[Birth.from_dict(birth) for birth in data["founders"]],
                before=_read_evaluation(arrays, "before"),
                step=int(data["step"]),
                due=Decision(_whole(data["due"]), _whole(data.get("due_rows"))),
                evaluated=_whole(data["evaluated"]),
                evaluated_rows=_whole(data.get("evaluated_rows")),
                account=Account.from_dict(data["spent"]),
                evolutions=[(int(line["step"]), EvolutionPlan.from_dict(line)) for line in data["evolutions"]],
                fitnesses={
                    int(index): tuple(float(part) for part in fitness) for index, fitness in data["fitnesses"].items()
                },
                evaluations={
                    int(index): evaluation
                    for index in data["fitnesses"]
                    if (evaluation := _read_evaluation(arrays, f"agent_{index}")) is not None
                },
                best=_read_best(data.get("best")),
                stale=int(data.get("stale", 0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the progress of the run is incomplete or from elsewhere: {error!r}") from error


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _read_evaluation(arrays: Mapping[str, NDArray[np.generic]], name: str) -> AnyEvaluation | None:
    """The evaluation with this name among the results of `Progress.arrays`; None if there is none."""
    kind = next((kind for kind, (first, _) in VECTORS.items() if f"{name}_{first}" in arrays), None)
    if kind is None:
        return None
    known = [field.name for field in fields(kind) if f"{name}_{field.name}" in arrays]
    return kind(**{field: arrays[f"{name}_{field}"].astype(np.float64) for field in known})


def _read_best(best: Mapping[str, Any] | None) -> Best | None:
    if best is None:
        return None
    fitness = tuple(float(part) for part in best["fitness"])
    return Best(int(best["index"]), int(best["step"]), fitness, _whole(best.get("rows")))


def check_same_run(
    saved: Mapping[str, Any], current: Mapping[str, Any], changed_text: Callable[[Mapping[str, Any]], str] | None = None
) -> None:
    """Refuse to resume a run with settings, data, agents or a base other than at its beginning.

    Args:
        saved: `Run.config` when the run began.
        current: `Run.config` of the resuming run.
        changed_text: From `saved["data"]` to the first changed text, in words.

    Raises:
        ConfigurationError: `saved` and `current` differ in settings that may not change; the message lists each.
    """
    differing = [
        f"{name}: {before!r} then, {now!r} now"
        for name, before, now in differences(_comparable(saved), _comparable(current), "")
    ]
    if differing:
        data = saved.get("data")
        other_texts = any(name.startswith("data.fingerprint:") for name in differing)
        if changed_text is not None and other_texts and isinstance(data, Mapping) and data.get("digests"):
            differing.insert(0, changed_text(data))
        raise ConfigurationError(
            "resume_from_checkpoint",
            "other settings",
            f"the run began with others; give those, or start a new run ({'; '.join(differing)})",
        )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(config, default=str))
    # A budget is in runs of this length, and a search may have planned by both.
    fixed = {"total"} if "budget" in plain.get("options", {}) else set()
    return {
        section: {key: value for key, value in content.items() if key not in _MAY_CHANGE[section] - fixed}
        if section in _MAY_CHANGE and isinstance(content, dict)
        else content
        for section, content in plain.items()
        if section not in _NOT_COMPARED
    }


def differences(before: Any, now: Any, name: str) -> list[tuple[str, Any, Any]]:
    """The differences of two nested JSON values: for each a dotted key that starts with `name`, and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            difference
            for key in keys
            for difference in differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [(name, before, now)]
