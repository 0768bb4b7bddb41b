"""Write a search strategy of your own, and let it drive a run.

    python tutorials/own_search.py --out own-search
    python tutorials/own_search.py --out own-search --resume --steps 24

You learn what a search is told, what its plans may hold (members that are kept, children, fresh agents, members that
leave), and that a run with it goes on bit for bit after it was stopped, is replayed, and has its family tree in the
report. `Truncation` uses `evollm.hpo` alone: copy it and change `tell`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evollm import replay, tune
from evollm.demo import demo_model, demo_pairs
from evollm.hpo import Birth, Result, SearchPlan, SearchStart, rank


@dataclass
class Truncation:
    """Truncation selection (Jaderberg et al. 2017, arXiv 1711.09846) that also begins agents afresh.

    The worse members leave. The best one has a child with other values, and one agent begins afresh, so that the search
    does not end in one family. After `patience` decisions nobody begins any more, and members only leave.

    Args:
        share: Of the members, how many leave at a decision.
        patience: Decisions at which agents are born.
        seed: Of the draws.
    """

    share: float = 0.5
    patience: int = 2
    seed: int = 0

    def start(self, start: SearchStart) -> SearchPlan:
        """Begin with the agents that there are."""
        self._hp_config, self._interval = start.hp_config or {}, start.interval
        self._rng = np.random.default_rng(self.seed)
        self._next_index = start.next_index
        self._decisions = 0
        return SearchPlan(tuple(start.founders), self._interval)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Keep the better members, and let two new ones begin."""
        best_first = [results[place] for place in rank([result.fitness for result in results])]
        best = best_first[0]
        births = [one.kept(elite=one is best) for one in best_first[: max(1, int(len(results) * (1 - self.share)))]]
        if self._decisions < self.patience:
            mutated = {
                name: parameter.mutate(best.hyperparameters[name], self._rng)[0]
                for name, parameter in self._hp_config.items()
            }
            births.append(best.child(self._next_index, mutated))
            drawn = {name: parameter.sample(self._rng) for name, parameter in self._hp_config.items()}
            births.append(Birth.fresh(self._next_index + 1, {**best.hyperparameters, **drawn}))
        self._next_index += 2
        self._decisions += 1
        return SearchPlan(tuple(births), self._interval)

    def state_dict(self) -> dict[str, Any]:
        """All that later plans depend on; a checkpoint keeps it."""
        rng = self._rng.bit_generator.state
        return {"next_index": self._next_index, "decisions": self._decisions, "rng": rng}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._next_index, self._decisions = state["next_index"], state["decisions"]
        self._rng.bit_generator.state = state["rng"]


def main() -> None:
    """Search, or go on with a search, and replay the best agent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of the base")
    parser.add_argument("--train", help="JSONL of preference pairs to train on")
    parser.add_argument("--test", help="JSONL of preference pairs to select by")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--evo-steps", type=int, default=4, help="steps between two decisions")
    parser.add_argument("--population", type=int, default=4, help="agents at the beginning")
    parser.add_argument("--out", default="own-search", help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    arguments = parser.parse_args()

    rows = {
        "data": arguments.train or demo_pairs("train"),
        "test_data": arguments.test or demo_pairs("selection")[:16],
    }
    result = tune(
        arguments.model or str(demo_model()),
        **rows,
        final_data=False,
        data_batch_size_per_gpu=4,
        population=arguments.population,
        search=Truncation(),
        evo_steps=arguments.evo_steps,
        max_steps=arguments.steps,
        checkpoint_steps=1,
        **{"resume_from_checkpoint" if arguments.resume else "run_dir": arguments.out},
    )
    print(f"\nReport: {result.report}")
    again = replay(arguments.out, **rows, verbose=False)
    found = "the same bits" if again.exact else again.reason or "other bits"
    print(f"Agent {result.best.index} again by itself: {found}")


if __name__ == "__main__":
    main()
