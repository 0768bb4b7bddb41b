"""The end of a run: choose the best agent, save it, and compute the final scores and answers."""

from __future__ import annotations

import secrets
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from evollm.checkpoints.steps import newest_population
from evollm.errors import DivergedError, EvoLLMError
from evollm.execution.executor import BEST_SO_FAR, Executor, Member
from evollm.hpo import Fitness, is_finite, rank
from evollm.hpo.guards import BROKEN
from evollm.runs.events import Callback, Candidate, RunEnded
from evollm.training.finalists import Contest
from evollm.training.limits import Limits
from evollm.training.options import RunOptions
from evollm.training.paths import RunPaths
from evollm.training.state import Best, Progress


def final_split(rows: Mapping[str, int]) -> str:
    """The split for the scores before and after training: "final", else "test"; "" if both are empty."""
    return next((split for split in ("final", "test") if rows[split]), "")


def best_of(members: Sequence[Member], fitnesses: Mapping[int, Fitness]) -> int:
    """Index of the fittest member.

    Raises:
        DivergedError: No member has a finite fitness.
    """
    best = members[rank([fitnesses[member.index] for member in members])[0]].index
    if not is_finite(fitnesses[best]):
        raise DivergedError(f"no agent has a finite fitness: {dict(fitnesses)}")
    return best


def second_of(members: Sequence[Member], fitnesses: Mapping[int, Fitness], best: int) -> int | None:
    """Index of the fittest member except `best`; None if no other member has a finite fitness."""
    others = [member.index for member in members if member.index != best and member.index in fitnesses]
    second = [others[position] for position in rank([fitnesses[index] for index in others])[:1]]
    return next((index for index in second if is_finite(fitnesses[index])), None)


def finalists_of(members: Sequence[Member], fitnesses: Mapping[int, Fitness], best: int) -> list[int]:
    """The best agent, and the other members that may be combined with it, fittest first."""
    sound = [index for index in (member.index for member in members) if index != best and index in fitnesses]
    sound = [index for index in sound if is_finite(fitnesses[index]) and fitnesses[index][0] != BROKEN]
    return [best, *(sound[place] for place in rank([fitnesses[index] for index in sound]))]


def end(
    executor: Executor,
    progress: Progress,
    options: RunOptions,
    paths: RunPaths,
    rows: Mapping[str, int],
    contest: Contest | None,
    limits: Limits,
) -> tuple[int, RunEnded]:
    """Save the best agent, score the best and the second-best agent, and generate the best agent's answers.

    The best agent is that of the best evaluation of the run; without any, the first that has not diverged.
    Unless it is the last evaluation, the second-best agent is the best one of the last population. If a candidate of
    the contest is better, it takes the best agent's place. A second-best agent whose final score does not fit in the
    budget is left out.

    Returns:
        Index by which the executor knows the result, and the event.
    """
    members = executor.members()
    winner = progress.best or Best(next(one.index for one in members if not one.diverged), progress.step, ())
    best = winner.index if winner.step == progress.step else BEST_SO_FAR
    second = second_of(members, progress.fitnesses, best)
    candidates: Sequence[Candidate] = ()
    if contest is not None:
        single = best
        best, candidates = contest.hold(finalists_of(members, progress.fitnesses, best))
        progress.account.add(executor.spent())
        if best != single != BEST_SO_FAR:
            second = single
    if winner.fitness[:1] == (BROKEN,) and not any(candidate.won for candidate in candidates):
        fix = "take a weaker bound, or lower lr; the agent that is nearest to its bounds is taken"
        warnings.warn(f"every agent breaks a guard: {fix}", UserWarning, stacklevel=2)
    best_path = _save_elite(executor, best, paths) if options.save_elite else None
    split = final_split(rows)
    learners = [member.hyperparameters for member in members if not member.diverged]
    if not limits.fits_runner_up(progress.account, progress.step, learners):
        second = None
    podium = [index for index in (best, second) if index is not None]
    scores = executor.evaluate(split, podium) if split else {}
    event = RunEnded(
        step=progress.step,
        best=winner.index,
        best_step=winner.step,
        best_path=best_path,
        split=split,
        before=progress.before,
        after=scores.get(best),
        samples=executor.answers(best, split, options.num_sample_answers) if split else [],
        runner_up=second,
        runner_up_score=None if second is None else scores.get(second),
        candidates=candidates,
    )
    return best, event


def _save_elite(executor: Executor, best: int, paths: RunPaths) -> Path | None:
    """Save the best agent, in the temporary folder if `paths.elite` cannot be written; None if neither can."""
    error = _try_to_save(executor, best, paths.elite)
    if not error:
        return paths.elite
    # Each process draws its own name, but only the main process writes, so the main process's name counts.
    elsewhere = Path(tempfile.gettempdir()) / f"evollm-elite-{secrets.token_hex(4)}"
    again = ""
    if newest_population(paths.checkpoints) is not None:
        again = ", or resume the run once there is room"
    failed = f"the best agent could not be saved to {paths.elite} ({error})"
    if not _try_to_save(executor, best, elsewhere):
        fix = f"it was saved to {elsewhere} instead: move it there{again}"
        warnings.warn(f"{failed}; {fix}", UserWarning, stacklevel=2)
        return elsewhere
    fix = f"it is in memory alone: call save_checkpoint with a path where there is room{again}"
    warnings.warn(f"{failed}; {fix}", UserWarning, stacklevel=2)
    return None


def _try_to_save(executor: Executor, index: int, path: Path) -> str:
    """Save an agent; return the main process's error message to all processes, "" if the agent was saved."""
    reason = ""
    try:
        executor.save_agent(index, path)
    except (OSError, EvoLLMError) as error:
        reason = str(error)
    return str(executor.processes.from_main(reason))


def close_callbacks(callbacks: Sequence[Callback]) -> None:
    """Close all callbacks; a failing callback only warns, to keep the run's result or the run's own error."""
    for callback in callbacks:
        try:
            callback.close()
        except Exception as error:  # Whatever a user's callback, or a tracker's library, raises.
            warnings.warn(f"{type(callback).__name__} could not be closed: {error!r}", UserWarning, stacklevel=3)
