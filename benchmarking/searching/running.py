"""Run a strategy through the library's own loop: one whose members inherit weights cannot be computed from a record."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from evollm import DPO, Callback, PreferenceGym, finetune_llm_preference
from evollm.checkpoints.agent import read_agent_folder
from evollm.execution.local import LocalExecutor
from evollm.hpo import STRATEGIES, Search
from evollm.runs.spent import Spent
from searching.problem import Founder
from searching.records import Searched
from searching.sweep import Judge, Sweep, described

# Decisions that a strategy makes in a run, if it is not 4: of the rungs of halving, and of mf_pbt's fastest members.
DECISIONS = {"successive_halving": 8, "asha": 8, "mf_pbt": 8}
# What a run costs; the probe and the scores before and after training are left out for all strategies.
COUNTED = ("training", "evaluation", "references")


@dataclass(frozen=True)
class Plan:
    """A strategy and how it is run.

    Attributes:
        strategy: A name of `evollm.hpo.STRATEGIES`.
        members: Founders: the first random configurations of the seed.
        budget: Most compute, in runs of `Prices.run`, but for half a step and the probe; None: all members' steps.
        evo_steps: Steps before the first decision; None: as many as `DECISIONS` says.
        fitness: By name; None: the library's default.
        settings: Arguments of the strategy; by default its seed is that of the search.
    """

    strategy: str
    members: int = 8
    budget: float | None = None
    evo_steps: int | None = None
    fitness: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name of the contestant, and of its files: what differs from the defaults."""
        changed = {"members": self.members if self.members != Plan.members else None}
        changed |= {name: getattr(self, name) for name in ("budget", "evo_steps", "fitness")} | dict(self.settings)
        return "-".join([self.strategy, *(f"{name}={value}" for name, value in changed.items() if value is not None)])

    def search(self, seed: int) -> Search:
        """The strategy, whose draws come from the seed if it draws."""
        found = STRATEGIES[self.strategy]
        seeds = {"rand_seed": seed} if "rand_seed" in {one.name for one in fields(found)} else {}
        return found(**seeds | dict(self.settings))  # type: ignore[no-any-return]


class Trace(Callback):
    """Keeps every evaluation, who descends from whom, and the end."""

    def __init__(self) -> None:
        self.evaluated: list[dict[str, Any]] = []
        self.births: list[list[dict[str, Any]]] = []
        self.ended: Any = None

    def on_evaluation(self, event: Any) -> None:
        """Keep an evaluation."""
        self.evaluated.append(
            {
                "step": event.step,
                "runs": runs_of(event.spent),
                "fitnesses": {str(index): list(fitness) for index, fitness in event.fitnesses.items()},
                "hyperparameters": {str(index): dict(values) for index, values in event.agents.items()},
            }
        )

    def on_evolution(self, event: Any) -> None:
        """Keep the births."""
        self.births.append([birth.to_dict() for birth in event.plan.births])

    def on_end(self, event: Any) -> None:
        """Keep the end."""
        self.ended = event


def runs_of(spent: Spent) -> float:
    """What was spent, in runs of `searching.contestants.Prices`."""
    return _counted(spent.operations) / _counted(spent.one_run)


def run(sweep: Sweep, founders: Sequence[Founder], path: Path, plan: Plan, say: Callable[[str], None]) -> None:
    """Run a strategy from the first random founders, and score the agent of its best evaluation."""
    started = time.perf_counter()
    # Without final pairs, so that the run's account of references has none.
    gym, steps = sweep.gym(final=False), sweep.sizes.steps
    first = [founder for founder in founders if founder.kind == "random"][: plan.members]
    agents = [
        sweep.scheduled(founder.hyperparameters, index=number, hp_config=sweep.bounds)
        for number, founder in enumerate(first)
    ]
    trace = Trace()
    with tempfile.TemporaryDirectory() as folder:
        elite = Path(folder) / "elite"
        population, _ = finetune_llm_preference(
            agents,
            gym,
            max_steps=steps,
            budget=plan.budget and _budget(plan.budget, agents, gym),
            evo_steps=plan.evo_steps or steps // DECISIONS.get(plan.strategy, 4),
            # One agent by itself is evaluated once; strategies are evaluated before each decision, too.
            evaluation_interval=steps,
            search=plan.search(sweep.seed),
            fitness=plan.fitness,
            run_dir=Path(folder) / "run",
            checkpoint_steps=0,
            elite_path=elite,
            num_sample_answers=0,
            verbose=False,
            callbacks=[trace],
        )
        actor = read_agent_folder(elite).adapter("actor")
    trained = time.perf_counter() - started
    judge = Judge(population[0], sweep.gym(), sweep.sizes, sweep.tokenizer)
    winner = [population[0].base.adapters.frozen(actor, "reference")]
    end = trace.ended
    about = {
        **described(sweep),
        "label": plan.label,
        "plan": asdict(plan),
        "founders": [asdict(founder) for founder in first],
        "best": {"agent": end.best, "step": end.best_step},
        "runs": runs_of(end.spent),
        "spent": end.spent.to_dict(),
        "evaluated": trace.evaluated,
        "births": trace.births,
        "seconds": {"training and selection": trained, "all": time.perf_counter() - started},
    }
    selection, final = (judge.logratios(winner, split)[0] for split in ("selection", "final"))
    Searched(about, selection=selection, final=final, kl=judge.kl(winner)[0]).save(path)
    say(f"{about['runs']:.2f} runs, written, {time.perf_counter() - started:.0f} s")


def _budget(runs: float, agents: Sequence[DPO], gym: PreferenceGym) -> float:
    """The loop's budget, whose runs hold two evaluations before and after training; a search has three of them."""
    costs = LocalExecutor(agents, gym).describe().costs
    evaluation = costs.evaluation["test"]
    one_run = costs.training + sum(costs.references.values()) + evaluation
    return (runs * one_run + 3 * evaluation) / (one_run + 2 * evaluation)


def _counted(operations: Mapping[str, float]) -> float:
    return sum(operations.get(kind, 0) for kind in COUNTED)
