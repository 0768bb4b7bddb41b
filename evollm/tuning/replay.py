"""One agent trained on the schedule of hyperparameters that a run has found."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evollm.algorithms import algorithm_named
from evollm.algorithms.agent import ACTOR
from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import newest_population, read_population
from evollm.checkpoints.agent import read_agent_folder
from evollm.checkpoints.steps import STATE
from evollm.checks import usable_path
from evollm.data import clock
from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo.hyperparameters import Value
from evollm.llm_envs import DatasetGym
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
from evollm.tuning.setup import EVOLUTION, TUNE_PARAMETERS, make_agents, make_env, prepare_settings, request_of

# What decides in which steps, and so beside whom, an agent goes through a batch.
_STRIDE = ("batch_size", "update_epochs")
_HELD_OUT = frozenset({"test_data", "final_data"})


@dataclass(frozen=True)
class ReplayResult:
    """What a replay has made.

    Attributes:
        agent: The agent.
        run_dir: The run folder of the replay.
        schedule: The hyperparameters that it learnt with: (step of the replay, values) wherever they changed.
        exact: Whether its adapter is that of the run's best agent, bit for bit. None: there is nothing to compare with.
        reason: Why there is nothing: other data, another number of steps, or no best agent was kept; else empty.
    """

    agent: SavableAgent
    run_dir: Path
    schedule: HyperparameterSchedule
    exact: bool | None
    reason: str = ""


@dataclass(frozen=True)
class Script:
    """What happens to an agent that is trained anew.

    Attributes:
        total: Steps that it learns.
        values: Hyperparameters by the step after which they hold; 0: from the start.
        slots: By step, counted from 1, its place among those that learnt in the same passes; none on other data.
        skipped: Steps of the run before the line began: those before the birth of a fresh agent. All others count from
            there.
    """

    total: int
    values: Mapping[int, Mapping[str, Value]]
    slots: Mapping[int, BatchSlot]
    skipped: int = 0

    @classmethod
    def of(cls, record: RunRecord) -> Script:
        """That of a run's best agent, on the data of the run."""
        strides = {index: _stride(life.birth.hyperparameters) for index, life in record.lives.items()}
        skipped = record.line[0].steps[0]
        learners: dict[int, list[int]] = {}
        for entry in record.steps:
            learners.setdefault(entry.step, []).append(entry.agent)
        slots = {}
        for step, present in learners.items():
            if step <= skipped:
                continue
            index = next(life.birth.index for life in reversed(record.line) if life.steps[0] < step)
            beside = [other for other in present if strides[other] == strides[index]]
            slots[step - skipped] = BatchSlot(beside.index(index), len(beside))
        values = {step - skipped: values for step, values in record.schedule}
        return cls(record.config["schedule"]["total"] - skipped, values, slots, skipped)

    def stretched(self, total: int) -> Script:
        """The same over another number of steps: each change comes at the same share of the run."""
        return Script(total, {round(step * total / self.total): values for step, values in self.values.items()}, {})

    @property
    def schedule(self) -> HyperparameterSchedule:
        """The hyperparameters by step."""
        return [(step, dict(values)) for step, values in self.values.items()]


def _stride(values: Mapping[str, Value]) -> tuple[Value | None, ...]:
    return tuple(values.get(name) for name in _STRIDE)


class _Prompter(Callback):
    """Gives an agent the values and the slot that its script has for the next step.

    Args:
        agent: The agent.
        script: Its script.
        engine: What the run's engine had found, to divide batches as the run did and take its paths; None: nothing.
        references: Reference log-probs that the run had found.
    """

    def __init__(
        self, agent: SavableAgent, script: Script, engine: object = None, references: ReferenceCache | None = None
    ) -> None:
        self.run_dir = Path()
        self._agent = agent
        self._script = script
        self._engine = engine
        self._references = references

    def on_start(self, event: RunStarted) -> None:
        """The first step is next."""
        self.run_dir = event.run_dir
        if self._engine is not None:
            # Only now: a run begins with nothing.
            Engine.of(self._agent.base).load_state_dict(self._engine)
        if self._references is not None:
            self._agent.base.reference_cache.update(self._references)
        self._agent.slot = self._script.slots.get(event.step + 1)

    def on_step(self, event: StepDone) -> None:
        """The step after this one is next."""
        self._agent.set_hyperparameters(self._script.values.get(event.step, {}))
        self._agent.slot = self._script.slots.get(event.step + 1)

    def on_end(self, event: RunEnded) -> None:
        """Whatever the agent learns from now on, it learns by itself."""
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
    """Train one agent on the schedule of hyperparameters of a run's best agent; nothing is selected or mutated.

    On the data of the run and with one process its adapter becomes the best agent's, bit for bit. The passes through
    the base have the shapes that they had, as if the others were still beside it, since roundings depend on shapes;
    nothing is learnt or kept for the others. This does not hold where references moved (`update_reference_each_epoch`)
    or losses over whole batches evolved together with others; the result says whether it did.

    A line that began with a fresh agent is trained from its birth on: the batches before are left out.

    On other data, or with another number of epochs or steps, the schedule is stretched: each change comes at the same
    share of the run.

    Args:
        run: Folder of a run that has ended.
        agents: Agents made as for the run, of which one is trained. None: as `tune` made them.
        env: A gym made as for the run, or with other data. None: as `tune` made it.
        data: Rows to learn from, for a run of `tune`: others, or the same again where the run was given Python objects,
            which its folder does not hold.
        num_epochs: Passes over the data; None: as many as the run made.
        max_steps: Steps at most.
        run_dir: Run folder of the replay, by default a new one in `evollm-runs`.
        resume_from_checkpoint: Folder of a replay with the same arguments that was interrupted, to go on with it.
        checkpoint_path: The run's checkpoints, of a run that keeps them outside its folder.
        elite_path: The run's best agent, likewise.
        verbose: Show progress and the result in the terminal.
        trust_remote_code: Run code that comes with the base of a run of `tune`. A run folder cannot ask for it.
        **handed_in: Further arguments of `tune` that its folder does not hold: `model`, `tokenizer`, `test_data`, ...

    Raises:
        ConfigurationError: This is no run folder, the run was begun by a script and agents or env are missing, or they
            are others than the run's.
        CheckpointError: The run has not ended, or its files are damaged.
    """
    record = read_run(run, rows=False)
    if record.ended is None:
        raise CheckpointError(f"{record.path}: the run has not ended; go on with it first: {resume_of(run)}")
    script = Script.of(record)
    if data is not None:
        handed_in["data"] = data
    if (agents is None) != (env is None) or (agents is not None and handed_in):
        raise ConfigurationError("agents", None, "pass agents and env together, and then no data, or neither")
    if agents is None or env is None:
        # A template that writes the date writes that of the run.
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
            # Others had found them in the batches of earlier steps, whose rounding they carry.
            references = _references_of(checkpoints)
        for _ in range(script.skipped):
            env.next_batch()
        options |= {"evaluation_interval": config["schedule"]["evaluate_every"]}
    else:
        epochs = script.total / config["schedule"]["epoch"]
        limits = [max_steps, num_epochs and num_epochs * len(env)]
        found = min([limit for limit in limits if limit is not None], default=max(1, round(epochs * len(env))))
        script = script.stretched(found)
        options["max_steps"] = found
    if config["options"]["update_reference_each_epoch"]:
        options["update_reference_each_epoch"] = True
    agent.set_hyperparameters(script.values[0])
    prompter = _Prompter(agent, script, engine, references)
    options |= {"run_dir": run_dir, "resume_from_checkpoint": resume_from_checkpoint, "verbose": verbose}
    loop_of(algorithm_named(config["algorithm"].lower()))([agent], env, callbacks=[prompter], **options)
    reason = stretched or _why_no_elite(elite, config)
    return ReplayResult(agent, prompter.run_dir, script.schedule, None if reason else _is_exact(agent, elite), reason)


def _place(run: str | os.PathLike[str], name: str, given: str | os.PathLike[str] | None) -> Path:
    """Where a run has its checkpoints, or its best agent."""
    if given is not None:
        return usable_path(name, given)
    known = known_of(run)
    option = {"checkpoint_path": "--checkpoints", "elite_path": "--elite"}[name]
    known.require_places([name], run, lambda _, path: f"{name}={path!r}, or {option} {shlex.quote(path)}")
    return place_of(usable_path("run", run), known, name)


def _why_stretched(same_data: bool, num_epochs: int | None, max_steps: int | None) -> str:
    """Why the schedule does not hold step by step; empty where it does."""
    if not same_data:
        return "the schedule was stretched over other data, or held-out rows are others than the run's"
    asked = num_epochs is not None or max_steps is not None
    return "the schedule was stretched over a number of epochs or steps of your own" if asked else ""


def _why_no_elite(elite: Path, config: Mapping[str, Any]) -> str:
    """Why the best agent of a run cannot be compared with; empty where it can."""
    if not config["options"]["save_elite"]:
        return "the run was not to save its best agent (save_elite=False)"
    return "" if elite.is_dir() else f"the run's best agent is not at {elite}"


def _as_tuned(
    run: str | os.PathLike[str], handed_in: Mapping[str, Any], trust_remote_code: bool
) -> tuple[list[SavableAgent], DatasetGym]:
    """One agent and the gym as `tune` made them for a run, with what is handed in instead of what the folder holds."""
    asked = read_tune_arguments(run)
    algorithm = algorithm_named(asked.settings.get("algorithm", "dpo"))
    parameters = parameters_of(algorithm)
    # Neither callbacks, nor a fitness, nor bounds have a part in what one agent learns from a schedule.
    shaping = {
        *TUNE_PARAMETERS,
        *taken_by(algorithm.gym, parameters),
        *taken_by(algorithm.agent, parameters),
    } - EVOLUTION
    check_known(handed_in, sorted(shaping), ALIASES)
    missing = shaping - handed_in.keys()
    found = {name: value for name, value in asked.settings.items() if name in shaping} | dict(handed_in)
    if "data" in handed_in:
        # Nothing is selected by them.
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
    """The agent that the line begins with; all agents of a population begin with the same weights."""
    index = record.line[0].birth.index
    return next((agent for agent in agents if agent.index == index), agents[0])


def _check_same(agent: SavableAgent, env: DatasetGym, config: Mapping[str, Any]) -> None:
    """Refuse another base, other adapters or other settings than the run's: the result would be another."""
    now = {
        "algorithm": agent.algorithm,
        "base_fingerprint": agent.base.weights_fingerprint,
        "lora": computing_settings(agent.base.adapters.config(agent.actor_adapter)),
        "settings": asdict(agent.settings),
        "batch_size": env.batch_size,
    }
    then = {**config, "batch_size": config["data"]["batch_size"]}
    found = differences({name: then[name] for name in now}, json.loads(json.dumps(now, default=str)), "")
    if found:
        listed = "; ".join(f"{name}: {before!r} then, {after!r} now" for name, before, after in found)
        raise ConfigurationError("agents", "others", f"make agents and env as they were for the run ({listed})")


def _engine_of(checkpoints: Path) -> object:
    """What a run's engine had found when it ended: it lies in the checkpoints. None without any."""
    newest = newest_population(checkpoints)
    return None if newest is None else json.loads(read_bytes(inside(newest, STATE))).get("engine")


def _references_of(checkpoints: Path) -> ReferenceCache | None:
    """The reference log-probs that a run had found when it ended; None without a checkpoint."""
    newest = newest_population(checkpoints)
    return None if newest is None else read_population(newest).reference_logprobs


def _is_exact(agent: SavableAgent, elite: Path) -> bool:
    then, now = read_agent_folder(elite).adapter(ACTOR).tensors, agent.base.adapters.export(agent.actor_adapter).tensors
    return then.keys() == now.keys() and all(torch.equal(then[name], now[name].cpu()) for name in then)
