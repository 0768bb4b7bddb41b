"""A launch that seems to train together and does not; prints what evollm says to it.

torchrun --nproc_per_node 2 tests/distributed/trap_run.py TRAP
"""

from __future__ import annotations

import sys

from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

from evollm import ConfigurationError
from evollm.processes import check_processes


def make_accelerator(trap: str) -> Accelerator:
    """As a user might well write it."""
    gloo = [InitProcessGroupKwargs(backend="gloo")]
    if trap in ("cpu-and-deepspeed", "no-gloo"):
        plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}})
        if trap == "no-gloo":
            return Accelerator(deepspeed_plugin=plugin)
        return Accelerator(cpu=True, deepspeed_plugin=plugin, kwargs_handlers=gloo)
    return Accelerator()


if __name__ == "__main__":
    try:
        check_processes(make_accelerator(sys.argv[1]))
        print("REFUSED: no")
    except ConfigurationError as error:
        print(f"REFUSED: {error}")
