"""What a run would do, in words."""

from __future__ import annotations

from evollm.hpo import format_value
from evollm.hpo.search_checks import describe_search
from evollm.report import few_rows
from evollm.tuning.setup import Setup


def describe(setup: Setup) -> str:
    """Pairs, agents, steps, generations and bounds of a run that is set up; one line each."""
    schedule, env, first = setup.schedule, setup.env, setup.agents[0]
    lines = [str(report) for report in env.reports.values()]
    values = ", ".join(
        f"{name} {format_value(first.hyperparameter_values()[name])}"
        for name in (*setup.algorithm.evolves, "max_grad_norm")
    )
    lines.append(f"base: {first.base.name or 'a loaded model'}, {first.base.network.dtype}, on {first.device}")
    lines.append(f"agents: {len(setup.agents)} of {first.algorithm}, the first with {values}")
    epochs = schedule.total / schedule.epoch
    lines.append(f"steps: {schedule.total} of {env.batch_size} {env.row_format.noun}s, {epochs:.3g} epochs")
    limits = {"budget": "runs of one agent", "max_member_steps": "steps of all members", "max_hours": "hours"}
    for name, unit in limits.items():
        if setup.loop.get(name) is not None:
            lines.append(f"{name}: at most {format_value(setup.loop[name])} {unit}, which may end the run earlier")
    if schedule.evolve_every is not None:
        generations = -(-schedule.total // schedule.evolve_every)
        if "search" in setup.loop:
            lines.append(f"search: {_search(setup)}")
        else:
            each = f"{generations} of {schedule.evolve_every} steps"
            lines.append(f"generations: {each}, with an evolution between each two")
        evolving = first.hp_config.items() if first.hp_config is not None else ()
        lines += [f"  {name}: {_bounds(parameter)}" for name, parameter in evolving]
        lines += [] if evolving else ["  no hyperparameter evolves: there is no hp_config"]
    if schedule.evaluate_every is not None:
        every = f"every {schedule.evaluate_every} steps, on"
        when = every if schedule.evaluate_every else "for decisions of the search, on up to"
        lines.append(f"evaluations: {when} {len(env.test_pairs)} held-out rows")
    patience = setup.loop.get("early_stopping_patience")
    lines += [f"early stopping: after {patience} evaluations without a better fitness"] if patience else []
    few = few_rows(first.words, agents=len(setup.agents), test=len(env.test_pairs), final=len(env.final_pairs))
    lines += [f"warning: {few}"] if few else []
    saves = f"every {schedule.checkpoint_every} steps" if schedule.checkpoint_every else "none"
    lines.append(f"checkpoints: {saves}")
    return "\n".join(lines)


def _search(setup: Setup) -> str:
    name, plan = describe_search(setup.loop["search"])["name"], setup.run.first_plan()
    assert plan is not None
    fewer = f", with {len(plan.births)} of the agents" if len(plan.births) < len(setup.agents) else ""
    decides = plan.steps is not None and plan.steps < setup.schedule.total
    return f"{name}{fewer}, which {f'first decides after {plan.steps} steps' if decides else 'never decides'}"


def _bounds(parameter: object) -> str:
    choices = getattr(parameter, "choices", None)
    if choices is not None:
        return ", ".join(choices)
    lowest, highest = parameter.bounds  # type: ignore[attr-defined]
    return f"{format_value(lowest)} to {format_value(highest)}"
