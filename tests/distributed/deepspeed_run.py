"""One launch of `tests/distributed/test_deepspeed.py`: save agents, or load them in a fresh process.

torchrun --nproc_per_node 2 tests/distributed/deepspeed_run.py KIND save|load FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from conftest import make_rows
from parallel_run import PAIRS_IN_A_BATCH, make_small_model, train
from peft import LoraConfig
from tokenizers_for_tests import make_tokenizer
from transformers import AutoModelForCausalLM

from evollm import DPO, PreferenceGym, save_merged_model

CELLS = [(lora_only, save_optimizer) for lora_only in (True, False) for save_optimizer in (True, False)]
STEPS_BEFORE, STEPS_AFTER = 3, 3


def make_accelerator(kind: str) -> Accelerator | None:
    """`plain`: none; `ddp`: plain data parallelism; `zero1` to `zero3`: DeepSpeed."""
    handlers = [InitProcessGroupKwargs(backend="gloo")]
    if kind == "plain":
        return None
    if kind == "ddp":
        return Accelerator(cpu=True, kwargs_handlers=handlers)
    config = {"zero_optimization": {"stage": int(kind[-1])}, "train_micro_batch_size_per_gpu": "auto"}
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), kwargs_handlers=handlers)


def make_agent(accelerator: Accelerator | None, model: torch.nn.Module) -> DPO:
    """An agent whose weights, cut in half, are cut in the middle of one."""
    modules = r".*layers\.0\.self_attn\.q_proj|.*layers\.1\.mlp\.down_proj"
    lora = LoraConfig(r=3, target_modules=modules, task_type="CAUSAL_LM")
    return DPO(
        actor_network=model, lora_config=lora, lr=1e-2, max_grad_norm=5.0, token_budget=128, accelerator=accelerator
    )


def batches(accelerator: Accelerator | None) -> list:
    """The same batches in every launch."""
    processes = 1 if accelerator is None else accelerator.num_processes
    tokenizer = make_tokenizer(adds_bos=True)
    size = PAIRS_IN_A_BATCH // processes
    env = PreferenceGym(make_rows(40), None, tokenizer, data_batch_size_per_gpu=size, accelerator=accelerator)
    return [env.next_batch() for _ in range(STEPS_BEFORE + STEPS_AFTER)]


def go_on(agent: DPO, accelerator: Accelerator | None) -> dict[str, list[float]]:
    """Log-ratios on the batch to come, and the losses from there."""
    coming = batches(accelerator)[STEPS_BEFORE:]
    chosen, rejected = agent.logratios(coming[0])
    return {"logratios": [*chosen, *rejected], "losses": [agent.learn(batch)["loss"] for batch in coming]}


def save(kind: str, folder: Path) -> dict:
    """Train an agent, save it in every way, and train on."""
    accelerator = make_accelerator(kind)
    agent = make_agent(accelerator, make_small_model())
    for batch in batches(accelerator)[:STEPS_BEFORE]:
        agent.learn(batch)
    for lora_only, save_optimizer in CELLS:
        agent.save_checkpoint(str(folder / name_of(lora_only, save_optimizer)), lora_only, save_optimizer)
    save_merged_model(agent, folder / "merged")
    clone = agent.clone(index=1)
    found = {"kind": kind, **go_on(agent, accelerator), "clone": go_on(clone, accelerator)["losses"]}
    found["moments"] = moments_held(agent)
    layers = [p for layer in agent.base.layers.modules for p in layer.parameters() if not p.requires_grad]
    # Shards of stage 3 are not among a module's own tensors.
    found["in_layers"] = sum(p.numel() for p in layers)
    found["in_shards"] = sum(p.ds_tensor.numel() for p in layers if hasattr(p, "ds_tensor"))
    agent.release()
    if kind != "plain":
        train(folder / "run", 6, accelerator)
    return found


def moments_held(agent: DPO) -> int:
    """How many numbers of Adam's first moments this process holds."""
    optimizer = getattr(agent.optimizer, "sharded", agent.optimizer)
    return sum(state["exp_avg"].numel() for state in optimizer.state.values())


def load(kind: str, folder: Path) -> dict:
    """Load every saved agent, also that of a plain process, and train on."""
    accelerator = make_accelerator(kind)
    paths = {name_of(*cell): folder / name_of(*cell) for cell in CELLS}
    paths["plain"] = folder.parent / "plain" / name_of(True, True)
    found = {}
    for name, path in paths.items():
        model = AutoModelForCausalLM.from_pretrained(path / "base") if (path / "base").exists() else make_small_model()
        agent = make_agent(accelerator, model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            agent.load_checkpoint(str(path))
        said = [str(warning.message) for warning in caught if "fresh optimizer" in str(warning.message)]
        found[name] = {**go_on(agent, accelerator), "warnings": said}
    return found


def name_of(lora_only: bool, save_optimizer: bool) -> str:
    """The folder of a cell."""
    return f"lora_only-{lora_only}-save_optimizer-{save_optimizer}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kind, what, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    result = (save if what == "save" else load)(kind, folder)
    (folder / f"{what}-{os.environ.get('WORLD_SIZE', '1')}-{os.environ.get('RANK', '0')}.json").write_text(
        json.dumps(result)
    )
