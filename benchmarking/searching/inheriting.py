"""Run the strategies whose members inherit weights: they cannot be computed from a recorded sweep."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from evollm import Callback, Mutations, TournamentSelection, finetune_llm_preference
from searching.problem import Founder
from searching.records import Record
from searching.sweep import Judge, Sweep, described

MEMBERS = 8


def strategies(seed: int) -> dict[str, dict[str, Any]]:
    """By name what the loop is given."""
    return {
        "tournament": {
            "tournament": TournamentSelection(2, True, MEMBERS, rand_seed=seed),
            "mutation": Mutations(no_mutation=0.2, rl_hp=0.8, rand_seed=seed),
        },
    }


class Trace(Callback):
    """Keeps what each member scored on every selection pair, and who descends from whom."""

    def __init__(self) -> None:
        self.evaluated: list[dict[str, Any]] = []
        self.ratios: list[np.ndarray] = []
        self.births: list[list[dict[str, Any]]] = []

    def on_evaluation(self, event: Any) -> None:
        """Keep an evaluation."""
        found = {index: event.evaluations[index] for index in event.agents if index in event.evaluations}
        self.evaluated.append(
            {
                "step": event.step,
                "fitnesses": {str(index): list(fitness) for index, fitness in event.fitnesses.items()},
                "hyperparameters": {str(index): dict(values) for index, values in event.agents.items()},
            }
        )
        self.ratios.append(np.stack([[one.chosen_logratios, one.rejected_logratios] for one in found.values()]))

    def on_evolution(self, event: Any) -> None:
        """Keep the births."""
        self.births.append([birth.to_dict() for birth in event.plan.births])


def run(sweep: Sweep, founders: Sequence[Founder], path: Path, name: str, say: Callable[[str], None]) -> None:
    """Run a strategy with the first random founders, and score every member of the last population."""
    started = time.perf_counter()
    gym, sizes = sweep.gym(), sweep.sizes
    first = [founder for founder in founders if founder.kind == "random"][:MEMBERS]
    agents = [
        sweep.scheduled(founder.hyperparameters, index=number, hp_config=sweep.bounds)
        for number, founder in enumerate(first)
    ]
    trace = Trace()
    with tempfile.TemporaryDirectory() as folder:
        agents, _ = finetune_llm_preference(
            agents,
            gym,
            max_steps=sizes.steps,
            evo_steps=sizes.steps // 4,
            run_dir=Path(folder) / "run",
            checkpoint_steps=0,
            save_elite=False,
            num_sample_answers=0,
            verbose=False,
            callbacks=[trace],
            **strategies(sweep.seed)[name],
        )
    trained = time.perf_counter() - started
    judge = Judge(agents[0], gym, sizes, sweep.tokenizer)
    actors = [agent.actor_adapter for agent in agents]
    none = np.zeros((0, 2, 0), np.float32)
    Record(
        {
            **described(sweep),
            "strategy": name,
            "founders": [asdict(founder) for founder in first],
            "members": [agent.index for agent in agents],
            "evaluated": trace.evaluated,
            "births": trace.births,
            "seconds": {"training and selection": trained, "all": time.perf_counter() - started},
        },
        selection=np.stack(trace.ratios, axis=1).astype(np.float32),
        final=judge.logratios(actors, "final"),
        kl=judge.kl(actors),
        candidates_selection=none,
        candidates_final=none,
        candidates_kl=none[:, 0],
        losses=none[:, 0],
        step_operations=np.zeros((0, 2)),
        pair_operations=np.zeros(0),
    ).save(path)
    say(f"written, {time.perf_counter() - started:.0f} s")
