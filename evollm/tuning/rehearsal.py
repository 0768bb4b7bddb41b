"""Checks before a run: that its checkpoint loads, if it resumes, and about how long the run takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import only_writer
from evollm.data.samples import Batch, Sample
from evollm.errors import DivergedError
from evollm.execution.executor import check_going
from evollm.execution.generators import global_generators, set_global_generators
from evollm.execution.worker import learn_all
from evollm.hpo import Result
from evollm.inspection.forecast import REFERENCE_SHARE, TIMED_TOKENS, usual_pairs
from evollm.inspection.printing import rough_duration
from evollm.training.run import Run
from evollm.training.schedule import Decision
from evollm.tuning.setup import Setup

# A step on a full batch is timed only if its estimate is at most this many seconds.
QUICK = 5.0
_MOST_TIMED_STEPS = 4


def rehearse(setup: Setup) -> str:
    """Load the checkpoint of a run to resume, and time a few steps.

    Args:
        setup: The run; do not use its agents afterwards, since the timed steps train them.

    Returns:
        A line of text about the run's time.

    Raises:
        CheckpointError: No checkpoint of the run to resume can be read.
        ConfigurationError: The run to resume began with other settings.
    """
    if setup.algorithm.collect is not None:
        return f"time: not measured, since {setup.algorithm.name} learns from answers that are still to be sampled"
    run = setup.run
    run.begin()
    if run.paths.resumes:
        with only_writer(run.paths.run_dir, what=run.paths.run_dir):
            run.resume()
    generators = global_generators()
    try:
        per_token, how = _seconds_per_token(run.executor.population(), setup.env.train_pairs, setup.env.batch_size)
        check_going(run.executor.members())
    except DivergedError as error:
        return f"time: not measured, since the first steps failed: {error}"
    finally:
        set_global_generators(generators)
    left = setup.schedule.total - run.step
    going_on = f", of which {left} steps are left" if run.step else ""
    account, members = run.progress.account, run.executor.members()
    learners = [member.hyperparameters for member in members]
    # Of all members, while a search may drop some.
    most = left * len(members)
    fitting = _cut(_spans(run), len(members) * run.limits.steps_that_fit(account, run.step, learners, most))
    steps = sum(span.steps for span in fitting)
    going_on += f", for the {steps} steps that fit in its limits" if steps < left else ""
    seconds = min(per_token * _passes(setup, fitting) / len(members), run.limits.seconds_left(account))
    return f"time: about {rough_duration(seconds)} on this machine{going_on}, without sample answers and saving ({how})"


def _seconds_per_token(
    population: Sequence[SavableAgent], pairs: Sequence[Sample], batch_size: int
) -> tuple[float, str]:
    """Seconds in which all agents learn from one token, and a text on the measurement."""
    for agent in population:
        # A run may have fewer steps left than are timed.
        agent.num_training_steps = _MOST_TIMED_STEPS
    rows = usual_pairs(pairs, TIMED_TOKENS)
    seconds = _timed(population, rows)
    tokens = sum(pair.num_tokens for pair in rows)
    batch = usual_pairs(pairs, batch_size * max(pair.num_tokens for pair in pairs))[:batch_size]
    batch_tokens = sum(pair.num_tokens for pair in batch)
    if len(batch) > len(rows) and seconds * batch_tokens / tokens <= QUICK:
        # A token takes less time in a large batch than in a small batch.
        rows, tokens, seconds = batch, batch_tokens, _timed(population, batch)
    agents = f"{len(population)} agent{'' if len(population) == 1 else 's'}"
    return seconds / tokens, f"{agents} learnt from {tokens} tokens in {seconds:.2g} s"


def _timed(population: Sequence[SavableAgent], rows: Sequence[Sample]) -> float:
    """Seconds of a step, timed after a warm-up step."""
    batch = Batch(list(rows))
    learn_all(population, batch)
    start = time.perf_counter()
    learn_all(population, batch)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Span:
    """Steps between two decisions: how many members make how many, and on which share of the rows they are compared."""

    members: int
    steps: int
    share: float = 1.0


def _spans(run: Run) -> list[Span]:
    """The steps that are left, with the members of each plan that the search makes of results of no meaning.

    A search that cannot plan from such results is taken to keep its members.
    """
    progress, step, total, all_rows = run.progress, run.step, run.schedule.total, max(1, run.rows["test"])
    births, due = progress.births, progress.due
    spans = []
    while run.search is not None and due.step is not None and due.step < total:
        spans.append(Span(len(births), due.step - step, min(1.0, (due.rows or all_rows) / all_rows)))
        step = due.step
        results = [
            Result(birth.index, (-float(place),), birth.hyperparameters, step) for place, birth in enumerate(births)
        ]
        try:
            plan = run.search.tell(results)
        except Exception:  # Whatever a user's search raises.
            break
        births, due = plan.births, Decision.of(plan, step)
    return [*spans, Span(len(births), total - step)]


def _cut(spans: Sequence[Span], member_steps: int) -> list[Span]:
    """As much of the spans as fits in so many steps of members."""
    found = []
    for span in spans:
        fitting = replace(span, steps=min(span.steps, member_steps // span.members))
        found.append(fitting)
        if fitting.steps < span.steps:
            break
        member_steps -= span.members * span.steps
    return found


def _passes(setup: Setup, spans: Sequence[Span]) -> float:
    """Tokens that members learn from, plus forward-only tokens weighted by the relative cost of a forward pass."""
    env, schedule = setup.env, setup.schedule
    train, test, final = (_tokens(pairs) for pairs in (env.epoch_pairs(0), env.test_pairs, env.final_pairs))
    learnt = train * sum(span.members * span.steps for span in spans) / schedule.epoch
    evaluations, step = 0.0, schedule.total - sum(span.steps for span in spans)
    for span in spans:
        asked = [schedule.evaluates_at(one, decides=False) for one in range(step + 1, step + span.steps)]
        evaluations += span.members * (sum(asked) + span.share)
        step += span.steps
    # Three agents are scored once: the first before training, the best and the second-best after training.
    scored_once = 3 * (final or test)
    references = train + test + final if setup.algorithm.has_reference else 0
    forward = evaluations * test + scored_once + references
    return learnt + REFERENCE_SHARE / int(setup.agents[0].update_epochs) * forward


def _tokens(pairs: Sequence[Sample]) -> int:
    return sum(pair.num_tokens for pair in pairs)
