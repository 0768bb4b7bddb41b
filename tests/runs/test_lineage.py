from __future__ import annotations

from evollm.hpo import Birth, EvolutionPlan, Mutation
from evollm.runs import Lineage
from evollm.runs.events import Evolved

FOUNDERS = [Birth(index, None, (), False, {"lr": 1e-5 * (index + 1)}) for index in range(2)]
KEPT = Birth(1, 1, (), True, FOUNDERS[1].hyperparameters)
CHILD = Birth(2, 1, (Mutation("lr", 2e-5, 2.4e-5, 1.2),), False, {"lr": 2.4e-5})
ELITE = Birth(2, 2, (), True, CHILD.hyperparameters)
GENERATIONS = {3: (KEPT,), 6: (KEPT, CHILD), 9: (ELITE,)}
LINEAGE = Lineage(
    FOUNDERS,
    [Evolved(step, EvolutionPlan(step // 3 - 1, 1, {}, births)) for step, births in GENERATIONS.items()],
)


def test_a_line_has_one_birth_for_each_generation_and_a_schedule_one_entry_for_each_change() -> None:
    assert [(step, birth.index) for step, birth in LINEAGE.ancestry(2)] == [(0, 1), (3, 1), (6, 2), (9, 2)]
    assert LINEAGE.schedule(2) == [(0, {"lr": 2e-5}), (6, {"lr": 2.4e-5})]
    assert Lineage(FOUNDERS, []).schedule(0) == [(0, {"lr": 1e-5})]
