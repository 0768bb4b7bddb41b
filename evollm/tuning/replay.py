"""`replay`: train one agent on the hyperparameter schedule of a run's best agent."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evollm.algorithms import Algorithm, algorithm_named
from evollm.algorithms.agent import ACTOR
from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import newest_population, read_population
from evollm.checkpoints.agent import read_agent_folder
from evollm.checkpoints.steps import STATE
from evollm.checks import usable_path
from evollm.data import clock
from evollm.errors import CheckpointError, ConfigurationError
from evollm.execution.executor import Executor
from evollm.execution.local import LocalExecutor
from evollm.hpo.hyperparameters import Value
from evollm.llm_envs import DatasetGym
from evollm.models import SharedBase
from evollm.models.engine import BatchSlot, Engine
from evollm.models.fingerprints import computing_settings
from evollm.models.reference_cache import ReferenceCache
from evollm.names import ALIASES, check_known
from evollm.own_files import inside, read_bytes
from evollm.runs import HyperparameterSchedule, RunRecord, read_run
from evollm.runs.events import Callback, RunEnded, RunStarted, StepDone
from evollm.training.state import differences
from evollm.tuning.arguments_file import known_of, place_of, read_tune_arguments, resume_of
from evollm.tuning.parameters import loop_of, parameters_of, taken_by
from evollm.tuning.replayed_family import Family, FamilyExecutor, slots_of
from evollm.tuning.request import EVOLUTION, TUNE_PARAMETERS, request_of
from evollm.tuning.setup import make_agents, make_env, prepare_settings

_HELD_OUT = frozenset({"test_data", "final_data"})


@dataclass(frozen=True)
class ReplayResult:
    """The result of `replay`.

    Attributes:
        agent: The trained agent.
        run_dir: The run folder of the replay.
        schedule: The agent's hyperparameters, as (step of the replay, values) at each change.
        exact: Whether the agent's adapter is bit-identical to that of the run's best agent; None: not compared.
        reason: Why the adapters were not compared: other data, another number of steps, or no saved best agent; else
            "".
    """

    agent: SavableAgent
    run_dir: Path
    schedule: HyperparameterSchedule
    exact: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Script:
    """The hyperparameters and batch slots of a replayed agent, step by step.

    Attributes:
        total: Steps of the replay.
        values: Hyperparameters by the step after which they hold; 0: from the start.
        slots: By step, counted from 1, the agent's place among the agents that shared its passes; empty if the schedule
            is stretched.
        skipped: Steps of the run before the best agent's line began with a fresh agent, else 0. The steps of the
            replay are counted from there.
        num_training_steps: Steps that the agent's learning rate schedule is over, which may be more than `total`; None:
            its schedule does not depend on their number.
        family: All ancestors, if one of them has two parents: they are replayed together, each in slots of its own.
    """

    total: int
    values: Mapping[int, Mapping[str, Value]]
    slots: Mapping[int, BatchSlot]
    skipped: int = 0
    num_training_steps: int | None = None
    family: Family | None = None

    @classmethod
    def of(cls, record: RunRecord) -> Script:
        """The script of a run's best agent up to its best evaluation, for a replay on the data of the run."""
        slot, family = slots_of(record), Family.of(record)
        scheduled = record.config.get("lr_schedule")
        over = None if scheduled is None else int(scheduled["num_training_steps"])
        if family is not None:
            return cls(record.winner_step, dict(record.schedule), {}, num_training_steps=over, family=family)
        slots, skipped = {}, record.line[0].steps[0]
        for step in range(skipped + 1, record.winner_step + 1):
            index = next(life.birth.index for life in reversed(record.line) if life.steps[0] < step)
            slots[step - skipped] = slot(step, index)
        values = {step - skipped: values for step, values in record.schedule}
        return cls(record.winner_step - skipped, values, slots, skipped, None if over is None else over - skipped)

    def stretched(self, total: int) -> Script:
        """The script over another number of steps: each change comes at the same fraction of the run."""
        values = {round(step * total / self.total): values for step, values in self.values.items()}
        over = None if self.num_training_steps is None else round(self.num_training_steps * total / self.total)
        family = None if self.family is None else self.family.stretched(total)
        return Script(total, values, {}, num_training_steps=over, family=family)

    def executor(self, agents: Sequence[SavableAgent], env: DatasetGym) -> Executor:
        """An executor of agents whose learning rate schedule is that of the run, not one over the replay's steps."""
        if self.num_training_steps is not None:
            for agent in agents:
                agent.num_training_steps = self.num_training_steps
        return LocalExecutor(agents, env) if self.family is None else FamilyExecutor(agents, env, self.family.slots)

    @property
    def schedule(self) -> HyperparameterSchedule:
        """The hyperparameters as (step, values)."""
        return [(step, dict(values)) for step, values in self.values.items()]


class _Restorer(Callback):
    """Restores what passes depended on in the original run.

    Args:
        base: The base.
        engine: State of the run's engine, so that batches are divided and computed as in the run; None: no state.
        references: Reference log-probs that the run computed; None: no log-probs.
    """

    def __init__(self, base: SharedBase, engine: object = None, references: ReferenceCache | None = None) -> None:
        self.run_dir = Path()
        self._base = base
        self._engine = engine
        self._references = references

    def on_start(self, event: RunStarted) -> None:
        """Restore the state of the run's engine and cache."""
        self.run_dir = event.run_dir
        if self._engine is not None:
            # Loaded only now, because the beginning of a run clears this state.
            Engine.of(self._base).load_state_dict(self._engine)
        if self._references is not None:
            self._base.reference_cache.update(self._references)


class _Prompter(Callback):
    """Sets an agent's hyperparameters and batch slot for each next step.

    Args:
        agent: The agent.
        script: Hyperparameters and batch slots of the agent.
    """

    def __init__(self, agent: SavableAgent, script: Script) -> None:
        self._agent = agent
        self._script = script

    def on_start(self, event: RunStarted) -> None:
        """Set the slot of the first step."""
        self._agent.slot = self._script.slots.get(event.step + 1)

    def on_step(self, event: StepDone) -> None:
        """Set the hyperparameters and the slot of the next step."""
        self._agent.set_hyperparameters(self._script.values.get(event.step, {}))
        self._agent.slot = self._script.slots.get(event.step + 1)

    def on_end(self, event: RunEnded) -> None:
        """Remove the slot, so that later passes of the agent compute no other slots."""
        self._agent.slot = None


def replay(
    run: str | os.PathLike[str],
    agents: Sequence[SavableAgent] | None = None,
    env: DatasetGym | None = None,
    *,
    data: Any | None = None,
    num_epochs: int | None = None,
    max_steps: int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume_from_checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_path: str | os.PathLike[str] | None = None,
    elite_path: str | os.PathLike[str] | None = None,
    verbose: bool = True,
    trust_remote_code: bool = False,
    **handed_in: Any,
) -> ReplayResult:
    """Train one agent on the hyperparameter schedule of a run's best agent, without selection or mutation.

    The replay ends at the step of the best agent's evaluation, which may be earlier than the end of the run.

    On the data of the run and with one process, the agent's adapter becomes bit-identical to the best agent's adapter.
    Rounding depends on the shapes of passes, so each pass keeps the shape that it had with the other agents; their
    slots are computed, but nothing is learnt from these slots. The adapters may differ if references moved
    (`update_reference_each_epoch`), or if losses over whole batches evolved with other losses; `ReplayResult.exact`
    says whether the adapters are identical.

    If an ancestor of the best agent has two parents, all its ancestors are trained, as the members of one run.

    If the best agent descends from a fresh agent, training starts at the birth of the fresh agent, without the batches
    before this birth.

    On other data, or with another number of epochs or steps, the schedule is stretched: each change comes at the same
    fraction of the run.

    Args:
        run: Folder of a run that has ended.
        agents: Agents made as for the run, of which one is trained. None: agents as `tune` made them.
        env: A gym made as for the run, or with other data. None: a gym as `tune` made it.
        data: Rows to learn from, for a run of `tune`: other rows, or the run's rows if they were Python objects, which
            the run folder does not hold.
        num_epochs: Passes over the data; None: as many as the best agent made.
        max_steps: Most steps.
        run_dir: Run folder of the replay, by default a new folder in `evollm-runs`.
        resume_from_checkpoint: Folder of an interrupted replay with the same arguments, to resume.
        checkpoint_path: Folder of the run's checkpoints, if outside the run folder.
        elite_path: Folder of the run's best agent, if outside the run folder.
        verbose: Show progress and the result in the terminal.
        trust_remote_code: Run code that comes with the base of a run of `tune`; only this argument can allow that, not
            the run folder.
        **handed_in: Further arguments of `tune` that the run folder does not hold: `model`, `tokenizer`, `test_data`...

    Raises:
        ConfigurationError: `run` is no run folder, or of agents that learn from their own answers; the run was begun by
            a script and `agents` or `env` is missing, or agents or gym differ from those of the run.
        CheckpointError: The run has not ended, or its files are damaged.
    """
    record = read_run(run, rows=False)
    if record.ended is None:
        raise CheckpointError(f"{record.path}: the run has not ended; go on with it first: {resume_of(run)}")
    algorithm = _replayable(record)
    script = Script.of(record)
    if data is not None:
        handed_in["data"] = data
    if (agents is None) != (env is None) or (agents is not None and handed_in):
        raise ConfigurationError("agents", None, "pass agents and env together, and then no data, or neither")
    if agents is None or env is None:
        # A chat template that writes the date must write the date of the run.
        with clock.at(clock.read_moment(record.config["data"].get("written_at"))):
            agents, env = _as_tuned(run, handed_in, trust_remote_code)
    agent = _founder(agents, record)
    config = record.config
    stretched = _why_stretched(env.fingerprint == config["data"]["fingerprint"], num_epochs, max_steps)
    checkpoints = _place(run, "checkpoint_path", checkpoint_path)
    elite = _place(run, "elite_path", elite_path)
    options: dict[str, Any] = {"max_steps": script.total}
    engine = references = None
    if not stretched:
        _check_same(agent, env, config)
        env.load_state_dict(config["data"]["position"])
        engine = _engine_of(checkpoints)
        if script.skipped:
            # In the run, other agents cached these log-probs in skipped batches, whose rounding the log-probs carry.
            references = _references_of(checkpoints)
        for _ in range(script.skipped):
            env.next_batch()
        options |= {"evaluation_interval": config["schedule"]["evaluate_every"] or script.total}
    else:
        epochs = script.total / config["schedule"]["epoch"]
        limits = [max_steps, num_epochs and num_epochs * len(env)]
        found = min([limit for limit in limits if limit is not None], default=max(1, round(epochs * len(env))))
        script = script.stretched(found)
        options["max_steps"] = found
    if config["options"]["update_reference_each_epoch"]:
        options["update_reference_each_epoch"] = True
    restorer = _Restorer(agent.base, engine, references)
    if script.family is None:
        agent.set_hyperparameters(script.values[0])
        options["callbacks"] = [restorer, _Prompter(agent, script)]
    else:
        options |= {"callbacks": [restorer], **script.family.options()}
    population = [agent] if script.family is None else script.family.population(agents)
    options |= {"run_dir": run_dir, "resume_from_checkpoint": resume_from_checkpoint, "verbose": verbose}
    options["executor"] = script.executor
    tuned, _ = loop_of(algorithm)(population, env, **options)
    agent, reason = tuned[0], stretched or _why_no_elite(elite, record)
    return ReplayResult(agent, restorer.run_dir, script.schedule, None if reason else _is_exact(agent, elite), reason)


def _replayable(record: RunRecord) -> Algorithm:
    """The algorithm of a run.

    Raises:
        ConfigurationError: Its agents learn from what they sample.
    """
    algorithm = algorithm_named(record.config["algorithm"].lower())
    if algorithm.collect is not None:
        fix = f"is of {algorithm.name}: answers that one agent samples alone may be others than those in the run"
        raise ConfigurationError("run", str(record.path), fix)
    return algorithm


def _place(run: str | os.PathLike[str], name: str, given: str | os.PathLike[str] | None) -> Path:
    """The folder of a run's checkpoints (`checkpoint_path`) or best agent (`elite_path`)."""
    if given is not None:
        return usable_path(name, given)
    known = known_of(run)
    option = {"checkpoint_path": "--checkpoints", "elite_path": "--elite"}[name]
    known.require_places([name], run, lambda _, path: f"{name}={path!r}, or {option} {shlex.quote(path)}")
    return place_of(usable_path("run", run), known, name)


def _why_stretched(same_data: bool, num_epochs: int | None, max_steps: int | None) -> str:
    """Why the schedule is stretched; "" if each change keeps its step."""
    if not same_data:
        return "the schedule was stretched over other data, or held-out rows are others than the run's"
    asked = num_epochs is not None or max_steps is not None
    return "the schedule was stretched over a number of epochs or steps of your own" if asked else ""


def _why_no_elite(elite: Path, record: RunRecord) -> str:
    """Why the replayed agent cannot be compared with the run's best agent; "" if it can."""
    if record.ended is not None and record.ended.made_of is not None:
        return f"the run's result was made of trained agents ({record.ended.made_of}), of which this is the first"
    if not record.config["options"]["save_elite"]:
        return "the run was not to save its best agent (save_elite=False)"
    return "" if elite.is_dir() else f"the run's best agent is not at {elite}"


def _as_tuned(
    run: str | os.PathLike[str], handed_in: Mapping[str, Any], trust_remote_code: bool
) -> tuple[list[SavableAgent], DatasetGym]:
    """One agent and the gym as `tune` made them for a run; `handed_in` overrides arguments saved in the run folder."""
    asked = read_tune_arguments(run)
    algorithm = algorithm_named(asked.settings.get("algorithm", "dpo"))
    parameters = parameters_of(algorithm)
    # Callbacks, fitness and bounds have no effect on what one agent learns from a schedule.
    shaping = {
        *TUNE_PARAMETERS,
        *taken_by(algorithm.gym, parameters),
        *taken_by(algorithm.agent, parameters),
    } - EVOLUTION
    check_known(handed_in, sorted(shaping), ALIASES)
    missing = shaping - handed_in.keys()
    found = {name: value for name, value in asked.settings.items() if name in shaping} | dict(handed_in)
    if "data" in handed_in:
        # A replay selects no agent, so held-out rows that the folder does not hold are left out.
        found |= dict.fromkeys(asked.objects & _HELD_OUT & missing, False)
        missing -= _HELD_OUT
    asked.require(missing, run, "hand the same in again: evollm.replay(run, data=..., ...), or rows in a file: --data")
    if trust_remote_code:
        found["model_config"] = {**(found.get("model_config") or {}), "trust_remote_code": True}
    request = request_of(**found)
    settings = prepare_settings(request)
    env = make_env(request, settings)
    one = replace(request, population=1)
    return make_agents(one, prepare_settings(one), env), env


def _founder(agents: Sequence[SavableAgent], record: RunRecord) -> SavableAgent:
    """The first agent of the best agent's line, or any agent, since all begin with the same weights."""
    index = record.line[0].birth.index
    return next((agent for agent in agents if agent.index == index), agents[0])


def _check_same(agent: SavableAgent, env: DatasetGym, config: Mapping[str, Any]) -> None:
    """Refuse a base, adapters or settings that differ from the run's, since the trained adapter would differ too."""
    now = {
        "algorithm": agent.algorithm,
        "base_fingerprint": agent.base.weights_fingerprint,
        "lora": computing_settings(agent.base.adapters.config(agent.actor_adapter)),
        "settings": agent.settings.to_dict(),
        "batch_size": env.batch_size,
    }
    then = {**config, "batch_size": config["data"]["batch_size"]}
    found = differences({name: then[name] for name in now}, json.loads(json.dumps(now, default=str)), "")
    if found:
        listed = "; ".join(f"{name}: {before!r} then, {after!r} now" for name, before, after in found)
        raise ConfigurationError("agents", "others", f"make agents and env as they were for the run ({listed})")


def _engine_of(checkpoints: Path) -> object:
    """The state of a run's engine, from the newest checkpoint; None without a checkpoint."""
    newest = newest_population(checkpoints)
    return None if newest is None else json.loads(read_bytes(inside(newest, STATE))).get("engine")


def _references_of(checkpoints: Path) -> ReferenceCache | None:
    """The reference log-probs that a run cached, from the newest checkpoint; None without a checkpoint."""
    newest = newest_population(checkpoints)
    return None if newest is None else read_population(newest).reference_logprobs


def _is_exact(agent: SavableAgent, elite: Path) -> bool:
    then, now = read_agent_folder(elite).adapter(ACTOR).tensors, agent.base.adapters.export(agent.actor_adapter).tensors
    return then.keys() == now.keys() and all(torch.equal(then[name], now[name].cpu()) for name in then)
