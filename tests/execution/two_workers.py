"""Workers of one's own in one file: members spread over two workers, here on one base in one process."""

from __future__ import annotations

import copy
import os

from evollm.execution.spread import SpreadExecutor, first_places
from evollm.execution.worker import Worker
from evollm.processes import Processes
from evollm.runs.events import WorkerHome


class TwoInOneProcess:
    """What `SpreadExecutor` needs of workers; see `evollm.execution.workers.Workers`."""

    count = 2

    def __init__(self, agents, env):
        self.processes = Processes.present()
        places = first_places([agent.index for agent in agents], self.count)
        shares = [[agent for agent, one in zip(agents, places, strict=True) if one == place] for place in (0, 1)]
        # Each worker has its own position in the gym, and one without members an agent to make members of.
        self.workers = [Worker(share, copy.copy(env), like=agents[0]) for share in shares]

    def describe(self):
        return self.workers[0].describe()

    def open(self):
        """Nothing to start: these workers are here already."""

    def call(self, method, arguments):
        return [
            None if given is None else getattr(worker, method)(**given)
            for worker, given in zip(self.workers, arguments, strict=True)
        ]

    def agents(self, places):
        # Elsewhere: `call("exports", ...)`, and `load_folder` on agents of the caller's own base.
        return [self.workers[place].agent(index) for index, place in places.items()]

    def homes(self):
        return [WorkerHome(place, "here", os.getpid()) for place in (0, 1)]

    def close(self):
        for worker in self.workers:
            worker.close()


def TwoWorkers(agents, env):  # noqa: N802 - takes the place of an executor's class
    return SpreadExecutor(TwoInOneProcess(agents, env), [agent.index for agent in agents])
