"""Commands in several processes, as torchrun and `accelerate launch` start them: all train, and the main one speaks."""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import timedelta
from typing import Any

from evollm.errors import ConfigurationError

# Seconds in which other processes may say how they have failed, before one ends and the launcher ends all others.
_PATIENCE = 10


def launched() -> int:
    """The number of processes that were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


def is_main() -> bool:
    """Whether this process prints."""
    return rank() == 0


def of_launch() -> dict[str, Any]:
    """The keyword argument `accelerator` for `evollm.tune` in processes that were launched together; {} in one."""
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    if launched() == 1 and not deepspeed:
        return {}
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true":
        return {"accelerator": Accelerator()}
    gloo = [InitProcessGroupKwargs(backend="gloo")]
    # With cpu=True accelerate would ignore DeepSpeed.
    return {"accelerator": Accelerator(kwargs_handlers=gloo) if deepspeed else Accelerator(True, kwargs_handlers=gloo)}


def leave() -> None:
    """Close the connections to the other processes, when all have done their part."""
    import torch.distributed as dist

    if launched() > 1 and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def check_launch(command: str, *, together: bool) -> None:
    """Refuse a command in several processes that do not carry it out together.

    Args:
        command: Its name.
        together: Whether several processes can.

    Raises:
        ConfigurationError: They cannot, and several were launched.
    """
    if launched() > 1 and not together:
        fix = f"evollm {command} runs in one process: start it without a launcher, which train and resume may have"
        raise ConfigurationError("WORLD_SIZE", launched(), fix)


def say_error(text: str) -> None:
    """Print an error to standard error, and what all processes say alike only once.

    The main process prints its own, each other one what differs from that. A process that ends makes the launcher end
    the others, so that all wait for each other for a while.
    """
    store = _store()
    if is_main():
        print(text, file=sys.stderr, flush=True)
    if store is None:
        # Before the processes are connected they know the command line alone, which is the same for all.
        return
    others = ["0"] if not is_main() else [str(number) for number in range(1, launched())]
    if is_main():
        store.set("0", text)
    with contextlib.suppress(RuntimeError):  # Some have not failed, or hang.
        store.wait(others, timedelta(seconds=_PATIENCE))
    if not is_main():
        if not store.check(others) or store.get("0").decode() != text:
            print(f"{text} (process {rank()})", file=sys.stderr, flush=True)
        store.set(str(rank()), text)


def say_warning(text: str) -> None:
    """Print a warning to standard error, and what several processes say alike only once.

    The main process prints its own: all do the same. But where processes have members of their own, what is said of
    these is said by nobody else, and is printed by the first process that says it.
    """
    processes = sys.modules.get("evollm.processes")
    if processes is not None and processes.has_own_members():
        store = _store()
        if store is not None and store.add(text, 1) > 1:
            return
    elif not is_main():
        return
    print(text if is_main() else f"{text} (process {rank()})", file=sys.stderr, flush=True)


def _store() -> Any:
    """What connected processes tell each other texts by, while some of them may have failed; None before they are."""
    if launched() == 1 or "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    from evollm.processes import launch_store

    return launch_store("evollm")
