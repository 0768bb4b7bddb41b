"""The options of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from evollm.checks import boolean, finite_number, optional_whole_number, positive_number, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo import (
    FinalCandidates,
    Guards,
    Judge,
    Mutations,
    Search,
    TournamentSearch,
    TournamentSelection,
    final_candidates_of,
    guards_of,
    judge_of,
    search_of,
)
from evollm.hpo.search_checks import describe_search

_EARLY_STOPPING = ("early_stopping_patience", "early_stopping_threshold")
_LIMITS = ("budget", "max_member_steps", "max_hours")


@dataclass(frozen=True)
class RunOptions:
    """Arguments of `finetune_llm_preference` or `finetune_llm_sft`; these two functions document each field."""

    num_epochs: int | None
    max_steps: int | None
    budget: float | None
    max_member_steps: int | None
    max_hours: float | None
    evo_steps: int | None
    evaluation_interval: int | None
    checkpoint_steps: int | None
    keep_last: int | None
    tournament: TournamentSelection | None
    mutation: Mutations | None
    search: Search | str | None
    guards: Guards | Mapping[str, float] | None
    update_reference_each_epoch: bool
    save_elite: bool
    num_sample_answers: int
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    merge: FinalCandidates | Mapping[str, Any] | bool | None = None
    judge: Judge | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in ("update_reference_each_epoch", "save_elite"):
            boolean(name, getattr(self, name))
        for name, kind in (("tournament", TournamentSelection), ("mutation", Mutations)):
            if not isinstance(getattr(self, name), kind | None):
                raise ConfigurationError(name, getattr(self, name), f"must be {kind.__name__}(...) or None")
        if (self.tournament is None) != (self.mutation is None):
            name = "mutation" if self.mutation is None else "tournament"
            raise ConfigurationError(
                name,
                None,
                "evolution needs tournament=TournamentSelection(...) and mutation=Mutations(...), or neither",
            )
        if self.search is not None:
            if self.tournament is not None:
                fix = "is a search of its own, and so are tournament and mutation: leave one of the two out"
                raise ConfigurationError("search", self.search, fix)
            object.__setattr__(self, "search", search_of(self.search))
        if self.guards is not None:
            object.__setattr__(self, "guards", guards_of(self.guards))
        self._check_judge()
        object.__setattr__(self, "merge", final_candidates_of(self.merge))
        if self.evo_steps is not None and not self.evolves:
            raise ConfigurationError("evo_steps", self.evo_steps, "needs a tournament and a mutation, or a search")

    def _check_judge(self) -> None:
        if self.judge is not None:
            object.__setattr__(self, "judge", judge_of(self.judge))
        elif self.bounds.min_win_rate is not None:
            fix = "needs a judge, which compares answers: give judge=..., or leave this out"
            raise ConfigurationError("guards.min_win_rate", self.bounds.min_win_rate, fix)

    def _check_numbers(self) -> None:
        counts = ("num_epochs", "max_steps", "max_member_steps", "evo_steps", "evaluation_interval", "keep_last")
        for name in (*counts, "early_stopping_patience"):
            object.__setattr__(self, name, optional_whole_number(name, getattr(self, name), 1))
        object.__setattr__(
            self, "checkpoint_steps", optional_whole_number("checkpoint_steps", self.checkpoint_steps, 0)
        )
        object.__setattr__(self, "num_sample_answers", whole_number("num_sample_answers", self.num_sample_answers, 0))
        for name in ("budget", "max_hours"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive_number(name, getattr(self, name)))
        threshold = finite_number("early_stopping_threshold", self.early_stopping_threshold)
        object.__setattr__(self, "early_stopping_threshold", threshold)
        if threshold < 0:
            raise ConfigurationError("early_stopping_threshold", threshold, "must be at least 0")
        if threshold > 0 and self.early_stopping_patience is None:
            raise ConfigurationError("early_stopping_threshold", threshold, "needs an early_stopping_patience")

    @property
    def evolves(self) -> bool:
        """Whether the run has a search, which changes the population."""
        return self.tournament is not None or self.search is not None

    @property
    def bounds(self) -> Guards:
        """The guards of the run; without any, those that no agent breaks."""
        return self.guards if isinstance(self.guards, Guards) else Guards()

    @property
    def candidates(self) -> FinalCandidates | None:
        """The candidates after the last step; None: there are none."""
        return self.merge if isinstance(self.merge, FinalCandidates) else None

    @property
    def judging(self) -> Judge | None:
        """The judge of answers; None: there is none."""
        return self.judge if isinstance(self.judge, Judge) else None

    def strategy(self) -> Search | None:
        """The search of the run; None if there is none."""
        if self.tournament is not None and self.mutation is not None:
            return TournamentSearch(self.tournament, self.mutation)
        return None if self.search is None else search_of(self.search)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, without what is not asked for: search, guards, limits, merge, judge."""
        left_out = {"search", "guards", "merge", "judge", *(() if self.early_stopping_patience else _EARLY_STOPPING)}
        left_out |= {name for name in _LIMITS if getattr(self, name) is None}
        asked = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in left_out}
        if self.tournament is not None and self.mutation is not None:
            asked |= {"tournament": asdict(self.tournament), "mutation": self.mutation.to_dict()}
        if self.search is not None:
            asked["search"] = describe_search(self.search)
        if isinstance(self.guards, Guards):
            asked["guards"] = self.guards.to_dict()
        if self.candidates is not None:
            asked["merge"] = self.candidates.to_dict()
        if self.judging is not None:
            asked["judge"] = self.judging.to_dict()
        return asked
