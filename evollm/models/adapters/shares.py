"""The adapters of one owner, which are released with it."""

from __future__ import annotations

from evollm.models.adapters.registry import AdapterRegistry


class AdapterShares(dict[str, "str | None"]):
    """The adapters of one owner by their role; None: the base without adapter.

    The owner puts an adapter in as soon as it owns it (after `add`, `copy`, `frozen` or `retain`) and calls `release`
    at its end. If the owner is garbage-collected without that, the registry releases its adapters before it adds the
    next adapter and before the next forward pass.

    Args:
        registry: The registry of the adapters.
    """

    def __init__(self, registry: AdapterRegistry) -> None:
        super().__init__()
        self._registry = registry
        self._handed_out = False

    def hand_out(self) -> None:
        """Keep the adapters until `release` is called: somebody else now has the PEFT model that holds them."""
        self._handed_out = True

    def release(self) -> None:
        """Release all adapters."""
        while self:
            name = self.pop(next(iter(self)))
            if name is not None:
                self._registry.release(name)

    def __del__(self) -> None:
        # The garbage collector may run in any thread and during a forward pass, so no adapter is deleted here.
        if not self._handed_out:
            self._registry.lost.extend(name for name in self.values() if name is not None)
