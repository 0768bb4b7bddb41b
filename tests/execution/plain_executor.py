"""An executor of one's own that has the methods of `Executor` alone, and measures nothing on request."""

from __future__ import annotations

from evollm.execution.local import LocalExecutor


class PlainExecutor(LocalExecutor):
    combine = discard = None

    def evaluate(self, split, indices=None):
        return super().evaluate(split, indices)
