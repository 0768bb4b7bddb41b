"""The best evaluation of a run so far, and whether later evaluations have stopped to improve on it."""

from __future__ import annotations

from evollm.hpo import Fitness, is_finite
from evollm.hpo.guards import BROKEN
from evollm.training.state import Best, Progress


def has_improved(fitness: Fitness, best: Fitness, threshold: float) -> bool:
    """Whether a fitness counts as better than the best one so far, for early stopping.

    Its first component is larger by more than the threshold. Of two that break a guard, the excess of the first is
    smaller by anything, since the threshold is in units of the score.
    """
    if fitness[0] == best[0] == BROKEN:
        return fitness[1] > best[1]
    return fitness[0] > best[0] + threshold


def compare(best: Best | None, stale: int, found: Best, threshold: float) -> tuple[Best | None, int]:
    """Compare the best agent of an evaluation with the best so far; any on all rows beats those on fewer.

    Args:
        best: The best evaluation so far, None: there was none.
        stale: Evaluations on all rows since the best fitness last improved.
        found: The evaluation.
        threshold: `early_stopping_threshold`.

    Returns:
        `best`, `found` if it is at least as good, and `stale` after this evaluation.
    """
    compared = best if best is not None and best.rows is None else None
    if not is_finite(found.fitness) or (compared is not None and found.rows is not None):
        return best, stale
    if found.rows is None:
        improved = compared is None or has_improved(found.fitness, compared.fitness, threshold)
        stale = 0 if improved else stale + 1
    return found if compared is None or found.fitness >= compared.fitness else compared, stale


def out_of_patience(progress: Progress, total: int, patience: int | None) -> str:
    """Why a run of so many steps ends after its last evaluation, if that was on all rows; "" if it does not."""
    fresh = progress.evaluated == progress.step < total and progress.evaluated_rows is None
    if patience is None or progress.stale < patience or not fresh:
        return ""
    return f"no better fitness in {patience} evaluation{'s' if patience > 1 else ''} (early_stopping_patience)"
