"""Train populations whose members are spread over groups of two of the four processes that this was launched with.

torchrun --nproc_per_node 4 tests/groups_run.py FOLDER MAX_STEPS
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from members_run import refused, train

from evollm.execution.worker import Worker

NAME = "tournament"


def main() -> None:
    """Train and resume in groups, and try what cannot work; in a folder `sharded` train under FSDP2."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    sharded = folder.name == "sharded"
    plugin = {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2)} if sharded else {}
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **plugin)
    held = train_sharded(folder, steps, accelerator) if sharded else train_in_groups(folder, steps, accelerator)
    (folder / f"held-{accelerator.process_index}.json").write_text(json.dumps(held))


def train_sharded(folder: Path, steps: int, accelerator: Accelerator) -> dict[str, Any]:
    """What a process holds after a run under FSDP2, and what is said to one without groups."""
    whole = train(folder, NAME, steps, accelerator, processes_per_worker=2)
    return {"whole": whole, "refused": refused(folder, accelerator)}


def train_in_groups(folder: Path, steps: int, accelerator: Accelerator) -> dict[str, Any]:
    """What a process holds after a run, and after its second half again, in the same groups and in none."""
    held: dict[str, Any] = {
        "whole": train(folder, NAME, steps, accelerator, processes_per_worker=2, keep_last=None),
    }
    for name, size in (("again", 2), ("by itself", 1)):
        if accelerator.is_main_process:
            cut(folder, folder / name, steps // 2)
        accelerator.wait_for_everyone()
        held[name] = train(folder / name, NAME, steps, accelerator, processes_per_worker=size)
    held["refused"] = [
        refused(folder, accelerator, processes_per_worker=3),
        refused(folder, accelerator, processes_per_worker=2, parallel="data"),
    ]
    held["failed"] = failure(folder, accelerator)
    return held


def cut(whole: Path, folder: Path, step: int) -> None:
    """Copy a run as it would be if it had been cut after a step."""
    shutil.copytree(whole / NAME, folder / NAME)
    for checkpoint in (folder / NAME / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:06d}":
            shutil.rmtree(checkpoint)


def failure(folder: Path, accelerator: Accelerator) -> str:
    """The error of a run in which one process fails that is not the first one of its group."""
    learn_step = Worker.learn_step

    def fall_over(worker: Worker, step: int) -> Any:
        learnt = learn_step(worker, step)
        if accelerator.process_index == 3 and step == 2:
            raise RuntimeError("the card fell off")
        return learnt

    Worker.learn_step = fall_over
    found = refused(folder / "failed", accelerator, processes_per_worker=2)
    Worker.learn_step = learn_step
    return found


if __name__ == "__main__":
    main()
