"""An executor of one's own in one file: members spread over two workers, here on one base in one process."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

from evollm.checkpoints import read_population, write_population
from evollm.execution.executor import BEST_SO_FAR
from evollm.execution.worker import Worker
from evollm.processes import Processes


class TwoWorkers:
    def __init__(self, agents, env):
        self.processes = Processes.present()
        self.order = [agent.index for agent in agents]
        self.workers = [Worker(agents[place::2], copy.copy(env)) for place in (0, 1)]

    def where(self, index):
        if index == BEST_SO_FAR:
            return next(worker for worker in self.workers if worker.best_so_far is not None)
        return next(worker for worker in self.workers if index in [agent.index for agent in worker.agents])

    def spread(self, births):
        """The births of each worker, and what it is sent for those whose parents the other one has."""
        found = []
        for place, worker in enumerate(self.workers):
            part = births[place::2]
            first, second = (
                {
                    index: self.where(parent).export(parent)
                    for index, parent in parents
                    if parent is not None and self.where(parent) is not worker
                }
                for parents in (
                    [(one.index, one.parent) for one in part],
                    [(one.index, one.second_parent) for one in part],
                )
            )
            found.append((part, first, second))
        self.order = [birth.index for birth in births]
        return found

    def describe(self):
        return self.workers[0].describe()

    def changed_text(self, noted):
        return self.workers[0].env.changed_text(noted)

    def members(self):
        found = {member.index: member for worker in self.workers for member in worker.members()}
        return [found[index] for index in self.order]

    def begin(self, births, *, moving_references):
        first = self.where(self.order[0]).export(self.order[0])
        parts = [(None, {}, {})] * 2 if births is None else self.spread(births)
        for worker, (part, arriving, _) in zip(self.workers, parts, strict=True):
            worker.begin(part, moving_references=moving_references, first=first, arriving=arriving)

    def learn(self, done, until):
        for first, second in zip(*(worker.learn(done, until) for worker in self.workers), strict=True):
            found = {**first.metrics, **second.metrics}
            yield replace(first, metrics={index: found[index] for index in self.order if index in found})

    def evaluate(self, split, indices=None):
        found = [worker.evaluate(split, indices) for worker in self.workers]
        return {index: part[index] for index in indices or self.order for part in found if index in part}

    def keep_best(self, index):
        for worker in self.workers:
            worker.keep_best(index)

    def spent(self):
        return sum((Counter(worker.spent()) for worker in self.workers), Counter())

    def note_scores(self, scores):
        for worker in self.workers:
            worker.note_scores(scores)

    def apply(self, births):
        self.workers[0].check(births)
        for worker, parts in zip(self.workers, self.spread(births), strict=True):
            worker.apply(*parts)

    def save(self, folder, state, arrays):
        first, second = (worker.saved() for worker in self.workers)
        agents = sorted([*first.agents, *second.agents], key=lambda one: self.order.index(one.attributes["index"]))
        # On one base and in one process all but the agents is the same for both.
        best = first.best_so_far or second.best_so_far
        saved = replace(first, agents=agents, state={**state, **first.state}, arrays=arrays, best_so_far=best)
        write_population(folder, saved, self.workers[0].base.name)

    def load(self, folder):
        saved = read_population(folder)
        self.order = [agent.attributes["index"] for agent in saved.agents]
        for place, worker in enumerate(self.workers):
            best = None if place else saved.best_so_far
            worker.restore(replace(saved, agents=saved.agents[place::2], best_so_far=best))

    def save_agent(self, index, folder):
        self.where(index).agent(index).save_checkpoint(str(folder))

    def answers(self, index, split, count):
        return self.where(index).answers(index, split, count)

    def agent(self, index):
        return self.where(index).agent(index)

    def population(self):
        return [self.where(index).agent(index) for index in self.order]

    def close(self):
        for worker in self.workers:
            worker.close()
