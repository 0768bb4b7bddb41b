"""The worker: live agents, their base and their gym. Everything of a run that needs torch is here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from evollm.algorithms import algorithm_of
from evollm.algorithms.agent import ACTOR, OWN, REFERENCE
from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import AgentFolder, Population
from evollm.checkpoints.lora_merge import differing_fields
from evollm.data.samples import Batch
from evollm.errors import CheckpointError, ConfigurationError
from evollm.execution.answer_lengths import AnswerLengths
from evollm.execution.carry_out import carry_out
from evollm.execution.compared_answers import ComparedAnswers
from evollm.execution.crossover import crossed
from evollm.execution.description import describe
from evollm.execution.executor import BEST_SO_FAR, Description, Member
from evollm.execution.generators import global_generators, set_global_generators
from evollm.hpo import AnswerPair, AnswerSampling, AnyEvaluation, Birth, Recipe
from evollm.llm_envs import DatasetGym
from evollm.models import AdapterShares
from evollm.models.adapters.combining import combined, scaled
from evollm.models.budget import rows_at_a_time
from evollm.models.engine import Engine
from evollm.models.fingerprints import adapter_fingerprint
from evollm.models.generation import greedy_answers
from evollm.processes import Processes
from evollm.runs.events import SampleAnswer, StepDone

A = TypeVar("A", bound=SavableAgent)
_NOBODY: Mapping[int, AgentFolder] = MappingProxyType({})


@dataclass(frozen=True)
class Learnt:
    """What a worker did in one step, in one piece, since each call of a worker elsewhere takes its time.

    Attributes:
        done: The step.
        members: The worker's members after it.
        spent: The floating-point operations since the last step or call of `Worker.spent`.
    """

    done: StepDone
    members: Sequence[Member]
    spent: Mapping[str, int]


class Worker:
    """Some agents of a run on one base, and the gym that serves their batches.

    An executor may have several workers. Only members of the same worker share passes through the base, so the shapes
    of passes, and with the shapes the rounding, depend on how members are divided among workers.

    Args:
        agents: The agents. A worker that has no members keeps one agent to clone new members from.
        env: Serves the batches. Each worker needs its own position in the gym, for which a shallow copy is enough.
        like: An agent on the same base, needed if there are no agents.
    """

    def __init__(self, agents: Sequence[SavableAgent], env: DatasetGym, like: SavableAgent | None = None) -> None:
        self.agents = list(agents)
        self.env = env
        # A worker without members keeps one agent here, to clone new members from.
        self._spare: list[SavableAgent] = [] if agents or like is None else [_without_index(like.clone())]
        first = (self.agents or self._spare)[0]
        self.base = first.base
        self._algorithm = algorithm_of(first)
        self._engine = Engine.of(self.base)
        self._shares = AdapterShares(self.base.adapters)
        # The reference of all scores. If references move, scores of all agents and epochs need one fixed reference.
        self._fixed_reference: str | None = OWN
        self._moving_references = False
        # The run's first agent, which fresh agents copy, and the fingerprint of its adapter when the run began.
        self._beginning: AgentFolder | None = None
        self._began_as: str | None = None
        # Steps of the run that are done.
        self._done = 0
        # The best agent of the run so far, as plain data on the CPU, and as a live agent once that is asked for.
        self.best_so_far: AgentFolder | None = None
        self._live_best: SavableAgent | None = None
        self._answer_lengths = AnswerLengths(self.base, env)
        self._compared_answers = ComparedAnswers(self.base, env)
        # Agents that were made of members after the last step, by index.
        self._candidates: dict[int, SavableAgent] = {}

    def describe(self) -> Description:
        """Describe the agents and their data; see `Executor.describe`."""
        return describe(self.agents[0], self.env)

    def members(self) -> list[Member]:
        """Return the agents as plain data."""
        return [
            Member(agent.index, agent.hyperparameter_values(), agent.steps, agent.num_tokens, agent.diverged)
            for agent in self.agents
        ]

    def agent(self, index: int) -> SavableAgent:
        """The agent with an index; `BEST_SO_FAR`: the copy that `keep_best` made; below: a candidate."""
        if index in self._candidates:
            return self._candidates[index]
        if index == BEST_SO_FAR and self.best_so_far is not None:
            if self._live_best is None:
                self._live_best = self.copy_of(self.best_so_far)
            return self._live_best
        return next(agent for agent in self.agents if agent.index == index)

    def copy_of(self, folder: AgentFolder, like: SavableAgent | None = None) -> SavableAgent:
        """A live agent on this worker's base, made of an export, that is no member; `like`: for a closed worker."""
        agents = self.agents or self._spare or ([] if like is None else [like])
        return live_copy(folder, agents[0])

    def spare(self) -> SavableAgent:
        """A new agent that is no member, to make others of."""
        return _without_index((self.agents or self._spare)[0].clone())

    def begin(
        self,
        births: Sequence[Birth] | None,
        *,
        moving_references: bool,
        first: AgentFolder | None = None,
        arriving: Mapping[int, AgentFolder] = _NOBODY,
    ) -> None:
        """Begin a run; see `Executor.begin`.

        Args:
            births: Births of the members that this worker holds.
            moving_references: Whether references move.
            first: The export of the run's first agent, needed if another worker may hold that agent.
            arriving: As for `apply`.
        """
        self._moving_references = moving_references
        if moving_references:
            self._fixed_reference = (
                self.base.adapters.retain(str(self.agents[0].adapter(REFERENCE)))
                if first is None
                else self.base.adapters.frozen(first.adapter(REFERENCE), REFERENCE)
            )
            self._shares["fixed_reference"] = self._fixed_reference
        if births is not None:
            self._beginning = first or self.export(self.agents[0].index)
            self._began_as = _fingerprint(self._beginning)
            self.apply(births, arriving)
        # Cached log-probs carry the rounding of the batches that they were computed in. An empty cache makes a run's
        # bits independent of earlier runs on the same base.
        self.base.reference_cache.clear()
        self._engine.begin((self.agents or self._spare)[0].actor_adapter)

    def learn(self, done: int, until: int) -> Iterator[StepDone]:
        """Learn step by step; see `Executor.learn`."""
        for step in range(done + 1, until + 1):
            yield self._step(step)

    def learn_step(self, step: int) -> Learnt:
        """Do one step of `learn`, the run's step of this number."""
        done = self._step(step)
        return Learnt(done, self.members(), self.spent())

    def _step(self, step: int) -> StepDone:
        if self._moving_references and step > 1 and (step - 1) % len(self.env) == 0:
            for agent in self.agents:
                agent.set_reference_policy(agent.reference_update_tracker + 1)
        batch = self.env.next_batch()
        ahead = rows_at_a_time(self.base.device.type, len(batch)) - len(batch)
        with self.base.reference_cache.expecting(self.env.upcoming(ahead)):
            metrics = self._learn(batch)
        self._done = step
        return StepDone(step, self.env.num_epochs, metrics, self._engine.attention)

    def _learn(self, batch: Batch) -> dict[int, dict[str, float]]:
        """The metrics of agents that learn from the gym's batch, or each from what is collected for it."""
        collect = self._algorithm.collect
        going = [agent for agent in self.agents if not agent.diverged]
        if collect is None or not going:
            return learn_all(self.agents, batch)
        batches = collect(going, batch, self.env)
        if self._algorithm.learn_each is not None and all(agent.slot is None for agent in going):
            learnt = self._algorithm.learn_each(going, batches)
            return {agent.index: metrics for agent, metrics in zip(going, learnt, strict=True)}
        found: dict[int, dict[str, float]] = {}
        for agent, own in zip(going, batches, strict=True):
            found |= learn_all([agent], own)
        return found

    def evaluate(
        self,
        split: str,
        indices: Sequence[int] | None = None,
        *,
        kl: bool = False,
        answers: AnswerSampling | None = None,
        rows: int | None = None,
    ) -> dict[int, AnyEvaluation]:
        """Evaluate this worker's agents on a split, ignoring `indices` of other workers; see `Executor.evaluate`."""
        going = [agent.index for agent in self.agents if not agent.diverged]
        here = self._present(going if indices is None else indices)
        if not here:
            return {}
        asked = ({"kl": True} if kl else {}) | ({} if rows is None else {"rows": rows})
        agents = [self.agent(index) for index in here]
        found = self._algorithm.evaluate(agents, self.env, split, self._fixed_reference, **asked)
        if answers is not None:
            adapters = [(agent.actor_adapter, self._reference_of(agent)) for agent in agents]
            found = self._answer_lengths.added(found, adapters, split, rows, answers)
        return dict(zip(here, found, strict=True))

    def compared_answers(
        self, split: str, indices: Sequence[int], asked: AnswerSampling, *, rows: int | None = None
    ) -> dict[int, list[AnswerPair]]:
        """The answers of this worker's agents and of their references; see `Judges.compared_answers`."""
        here = self._present(indices)
        adapters = [(agent.actor_adapter, self._reference_of(agent)) for agent in map(self.agent, here)]
        return dict(zip(here, self._compared_answers.of(adapters, split, rows, asked), strict=True)) if here else {}

    def _present(self, indices: Sequence[int]) -> list[int]:
        """Those of the indices that this worker's agents have, the copy of the best one and candidates included."""
        best = {BEST_SO_FAR} if self.best_so_far is not None else set()
        present = {agent.index for agent in self.agents} | self._candidates.keys() | best
        return [index for index in indices if index in present]

    def _reference_of(self, agent: SavableAgent) -> str | None:
        """The adapter that an agent's scores are relative to; None: the base without adapter."""
        if self._fixed_reference != OWN:
            return self._fixed_reference
        return agent.adapter(REFERENCE) if self._algorithm.has_reference else None

    def keep_best(self, index: int) -> None:
        """Copy an agent as the best so far; forget the copy before, also if another worker has the agent."""
        here = any(agent.index == index for agent in self.agents)
        self.best_so_far = on_cpu(self.agent(index).to_folder()) if here else None
        self._live_best = None

    def hold_best(self, folder: AgentFolder) -> None:
        """Hold the copy of the best agent so far, which another worker has held."""
        self.best_so_far, self._live_best = on_cpu(folder), None

    def combine(self, index: int, recipe: Recipe, arriving: Mapping[int, AgentFolder] = _NOBODY) -> None:
        """Make a candidate of members; see `Combines.combine`.

        Args:
            index: The candidate's index.
            recipe: How it is made.
            arriving: Exports of the recipe's agents that other workers hold, all but the first, by index.
        """
        with ExitStack() as stack:
            visitors = {}
            for number, folder in arriving.items():
                visitors[number] = self.copy_of(folder)
                stack.callback(visitors[number].release)
            agents = [visitors.get(number) or self.agent(number) for number in recipe.agents]
            names = [agent.actor_adapter for agent in agents]
            if recipe.combination:
                state = combined(self.base, names, None, recipe.combination, density=recipe.density, seed=recipe.seed)
            else:
                state = scaled(self.base, names[0], recipe.factor, self._reference_of(agents[0]))
        candidate = agents[0].clone()
        candidate.replace_actor(state)
        self._candidates[index] = candidate

    def discard(self, indices: Sequence[int]) -> None:
        """Free candidates; see `Combines.discard`."""
        for index in indices:
            self._candidates.pop(index).release()

    def spent(self) -> dict[str, int]:
        """The operations since the last call; see `Executor.spent`. Workers on one base count together."""
        return self.base.flops.take()

    def note_scores(self, scores: Mapping[int, float]) -> None:
        """Add each agent's score to its history; see `Executor.note_scores`."""
        for agent in self.agents:
            agent.fitness.append(scores[agent.index])

    def check(self, births: Sequence[Birth]) -> None:
        """Refuse hyperparameters that no agent can have.

        Raises:
            ConfigurationError: A birth has such hyperparameters.
        """
        for birth in births:
            (self.agents or self._spare)[0].check_hyperparameters(birth.hyperparameters)

    def apply(
        self,
        births: Sequence[Birth],
        arriving: Mapping[int, AgentFolder] = _NOBODY,
        second_parents: Mapping[int, AgentFolder] = _NOBODY,
    ) -> None:
        """Replace the agents with those of a plan; see `Executor.apply`.

        Args:
            births: Births of the members that this worker holds from now on.
            arriving: Exports of the parents that other workers hold, by the index of the birth.
            second_parents: The same of second parents.

        Raises:
            ConfigurationError: A birth has hyperparameters that no agent can have, or two parents whose adapters have
                no mean, or a second parent that is not here and not exported. No agent has been changed.
        """

        def make(agent: SavableAgent, birth: Birth) -> None:
            """Load a folder into an agent: weights, reference, optimizer moments, counters."""
            folder = arriving[birth.index] if birth.index in arriving else copy.deepcopy(self._first())
            agent.load_folder(folder, overwrite_reference_adapter=False)
            if birth.index not in arriving and agent.num_training_steps is not None:
                # The schedule of a fresh agent is over the steps that the run has left, as a replay's is.
                agent.num_training_steps -= self._done

        self.check(births)
        arriving = {**arriving, **self._crossed(births, arriving, second_parents)}
        here = [
            replace(birth, parent=None, second_parent=None) if birth.index in arriving else birth for birth in births
        ]
        if births:
            self.agents, self._spare = carry_out(here, self.agents or self._spare, make), []
        elif self.agents:
            for agent in self.agents[1:]:
                agent.release()
            self.agents, self._spare = [], self.agents[:1]
            _without_index(self._spare[0])
        for agent, birth in zip(self.agents, here, strict=True):
            # Kept agents need this too: the first plan may change the hyperparameters of a given agent.
            agent.set_hyperparameters(birth.hyperparameters)

    def _crossed(
        self,
        births: Sequence[Birth],
        arriving: Mapping[int, AgentFolder],
        second_parents: Mapping[int, AgentFolder],
    ) -> dict[int, AgentFolder]:
        """The exports of the children with two parents, made before any parent changes."""
        present = {agent.index for agent in self.agents}
        children = {}
        for birth in births:
            if birth.parent is None or birth.second_parent is None:
                continue
            if birth.second_parent not in present and birth.index not in second_parents:
                fix = f"of agent {birth.index} is with another worker: pass its export in second_parents"
                raise ConfigurationError("second_parent", birth.second_parent, fix)
            first = arriving[birth.index] if birth.index in arriving else self.export(birth.parent)
            second = second_parents.get(birth.index) or self.export(birth.second_parent)
            children[birth.index] = crossed(first, second, birth.weight)
        return children

    def export(self, index: int) -> AgentFolder:
        """A deep copy of an agent as plain data, for another worker or for later."""
        return copy.deepcopy(self.agent(index).to_folder())

    def exports(self, indices: Sequence[int]) -> dict[int, AgentFolder]:
        """The exports of several agents by index."""
        return {index: self.export(index) for index in indices}

    def changed_text(self, noted: Mapping[str, Any]) -> str:
        """Say which text has changed; see `Executor.changed_text`."""
        return self.env.changed_text(noted)

    def _first(self) -> AgentFolder:
        """The export of the run's first agent when the run began."""
        assert self._beginning is not None
        if _fingerprint(self._beginning) != self._began_as:
            fix = "begin with other weights than those that the run began with, and the search wants a fresh agent: "
            raise ConfigurationError("pop", "the agents", f"{fix}make them as they were made then")
        return self._beginning

    def saved(self) -> Population:
        """Return the agents, and all other state that later steps depend on."""
        state = {
            "env": self.env.state_dict(),
            "began_as": self._began_as,
            "step": self._done,
            "engine": self._engine.state_dict(),
            "generators": global_generators(),
        }
        moves = self._fixed_reference is not None and self._fixed_reference != OWN
        return Population(
            [agent.to_folder() for agent in self.agents],
            state,
            fixed_reference=self.base.adapters.export(str(self._fixed_reference)) if moves else None,
            reference_logprobs=self.base.reference_cache,
            best_so_far=self.best_so_far,
        )

    def restore(self, saved: Population) -> None:
        """Restore the result of `saved`.

        Raises:
            CheckpointError: The state is incomplete or damaged.
        """
        missing = {"env", "began_as", "generators"} - saved.state.keys()
        if missing:
            raise CheckpointError(f"the checkpoint is none of this run: it lacks {sorted(missing)}")
        known = self.agents or self._spare
        for agent in known[max(1, len(saved.agents)) :]:
            agent.release()
        self.agents = known[: len(saved.agents)]
        self._spare = [] if saved.agents else [_without_index(known[0])]
        self.agents += [known[0].clone() for _ in saved.agents[len(self.agents) :]]
        for agent, folder in zip(self.agents, saved.agents, strict=True):
            agent.load_folder(folder, overwrite_reference_adapter=False)
        if saved.fixed_reference is not None:
            self._shares.release()
            self._fixed_reference = self.base.adapters.frozen(saved.fixed_reference, REFERENCE)
            self._shares["fixed_reference"] = self._fixed_reference
        self.best_so_far, self._live_best = saved.best_so_far, None
        self._began_as = saved.state["began_as"]
        self._done = saved.state.get("step", 0)
        self.env.load_state_dict(saved.state["env"])
        self._engine.load_state_dict(saved.state.get("engine"))
        self.base.reference_cache.update(saved.reference_logprobs)
        set_global_generators(saved.state["generators"])

    def answers(self, index: int, split: str, count: int) -> list[SampleAnswer]:
        """Answer prompts before and after tuning; see `Executor.answers`."""
        # A forward pass through a sharded base needs all processes.
        if not (Processes.present().is_main or self.base.is_sharded):
            return []
        examples = self.env.reports[split].previews
        wanted = min(count, len(examples))
        examples = tuple(examples[number * len(examples) // wanted] for number in range(wanted))
        pairs = self.env.evaluation_pairs(split)
        prompts = [pairs[example.position].prompt_ids for example in examples]
        agent = self.agent(index)
        # One after the other, since answers before and after tuning differ in length, and the shorter would wait.
        before, after = (
            greedy_answers(self.base, [adapter], prompts, self.env.tokenizer, cut_mark="…")[0]
            for adapter in (self._reference_of(agent), agent.actor_adapter)
        )
        return [
            SampleAnswer(example.question, first, second, example.turns)
            for example, first, second in zip(examples, before, after, strict=True)
        ]

    def close(self) -> None:
        """Free the fixed reference, the spare agent and the copy of the best agent; live agents stay usable."""
        self._shares.release()
        self.best_so_far = self._live_best = None
        self._candidates.clear()
        for agent in self._spare:
            agent.release()
        self._spare = []


def live_copy(folder: AgentFolder, like: A) -> A:
    """A new agent, made of an export, on the base of another agent."""
    agent, actor = like.clone(), folder.adapter(ACTOR)
    if differing_fields(agent.base.adapters.config(agent.actor_adapter), actor.config):
        # A candidate that was combined of members may have another rank.
        agent.replace_actor(actor)
    agent.load_folder(folder, overwrite_reference_adapter=False)
    return agent


def _without_index(spare: SavableAgent) -> SavableAgent:
    """The agent; a spare one must not keep a member's index: that member may come back from another worker."""
    spare.index = -1
    return spare


def _fingerprint(folder: AgentFolder) -> str:
    actor = folder.adapter(ACTOR)
    return adapter_fingerprint(actor.config, actor.tensors)


def on_cpu(folder: AgentFolder) -> AgentFolder:
    """A copy with the moments on the CPU; the adapters of a folder are copies on the CPU already."""

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, Mapping):
            return {key: copied(one) for key, one in value.items()}
        return [copied(one) for one in value] if isinstance(value, list) else copy.deepcopy(value)

    return replace(folder, attributes=copy.deepcopy(folder.attributes), optimizer=copied(folder.optimizer))


def learn_all(agents: Sequence[SavableAgent], batch: Any) -> dict[int, dict[str, float]]:
    """Let every agent that has not diverged learn from the same batch; agents of a replay with slots one by one.

    Returns:
        The metrics of `learn` by the index of the agent.
    """
    going = [agent for agent in agents if not agent.diverged]
    groups = [going] if all(agent.slot is None for agent in going) else [[agent] for agent in going]
    learnt = [metrics for group in groups if group for metrics in algorithm_of(group[0]).learn(group, batch)]
    return {agent.index: found for agent, found in zip(going, learnt, strict=True)}
