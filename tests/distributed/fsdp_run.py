"""Train a small population under FSDP2, in however many processes; what `tests/distributed/test_fsdp.py` launches.

torchrun --nproc_per_node 2 tests/distributed/fsdp_run.py FOLDER MAX_STEPS
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from conftest import make_rows
from families import FAMILIES
from parallel_run import make_small_model, train
from peft import LoraConfig
from tokenizers_for_tests import make_tokenizer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Qwen3MoeConfig

from evollm import DPO, ConfigurationError, PreferenceGym, save_merged_model
from evollm.processes import Processes

FEW = {"vocab_size": 0, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
# Each with the modules that have adapters, and the precision.
BASES: dict[str, tuple[Callable[[], Any], Any, torch.dtype]] = {
    "gpt2": (FAMILIES["gpt2"], ["c_attn", "c_proj"], torch.float32),
    "t5": (FAMILIES["t5"], ["q", "wo"], torch.float32),
    "experts": (
        lambda: Qwen3MoeConfig(**FEW, **EXPERTS, initializer_range=0.1, output_router_logits=True),
        None,
        torch.float32,
    ),
    "bfloat16": (FAMILIES["gemma3"], ["q_proj", "down_proj", "lm_head"], torch.bfloat16),
}
# Steps; shorter runs go on in another launch, and do no more than train.
WHOLE_RUN = 6


def main() -> None:
    """Train, or resume, save what one agent holds, and add to what the process writes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    accelerator = Accelerator(
        cpu=True,
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    max_steps = int(sys.argv[2])
    agent = train(folder, max_steps, accelerator)[0]
    if max_steps < WHOLE_RUN:
        return
    written = folder / f"held-{accelerator.process_index}.json"
    found = {**json.loads(written.read_text()), "memory": memory(agent)}
    agent.save_checkpoint(str(folder / "saved"), lora_only=False)
    save_merged_model(agent, folder / "merged")
    found["memory after saving"] = memory(agent)
    found["loss"] = next_loss(agent)
    other = folder.parent / "one/saved"
    if accelerator.num_processes > 1 and other.exists():
        found["loss of one's"] = next_loss(DPO.load(str(other), accelerator=accelerator))
        found["bases"] = {name: differences(name, accelerator) for name in BASES}
        found["refusal"] = refusal(accelerator)
    written.write_text(json.dumps(found))


def memory(agent: DPO) -> dict[str, int]:
    """How many numbers the layers' own weights have, how many of them this process holds, and how many it can reach."""
    gc.collect()
    layers = agent.base.layers.modules
    own = [weight for layer in layers for name, weight in layer.named_parameters() if ".lora_" not in name]
    shapes = {weight.shape for weight in own if weight.ndim > 1}
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    reached = [one.to_local() if isinstance(one, DTensor) else one for one in tensors if one.shape in shapes]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in reached}
    held = getattr(agent.base.layers.gathered, "__self__", None)
    return {
        "weights": sum(weight.numel() for weight in own),
        "shards": 0 if held is None else sum(shard.numel() for shard in held.shards),
        "in matrices": sum(weight.numel() for weight in own if weight.ndim > 1),
        "reached": sum(storages.values()) // 4,
    }


def next_loss(agent: DPO) -> float:
    """The loss on a batch that is the same for all."""
    size = 4 // Processes.present().size
    env = PreferenceGym(make_rows(8, 40), None, make_tokenizer(adds_bos=True), data_batch_size_per_gpu=size)
    return float(agent.learn(env.next_batch())["loss"])


def make_base(name: str, vocabulary: int) -> Any:
    """A small base, the same in every process."""
    config, _, dtype = BASES[name]
    config = config()
    config.vocab_size = vocabulary
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).to(dtype)


def differences(name: str, accelerator: Accelerator) -> dict[str, float]:
    """How far FSDP's losses and adapters are from those of plain data parallelism in the same two processes."""
    tokenizer = make_tokenizer(adds_bos=True)
    found = []
    for used in (None, accelerator):
        base = make_base(name, len(tokenizer))
        env = PreferenceGym(
            make_rows(12), None, tokenizer, data_batch_size_per_gpu=2, encoder_decoder=base.config.is_encoder_decoder
        )
        lora = LoraConfig(r=2, target_modules=BASES[name][1]) if BASES[name][1] else None
        agent = DPO(actor_network=base, lora_config=lora, lr=1e-3, accelerator=used)
        assert agent.base.is_sharded == (used is not None)
        losses = [agent.learn(env.next_batch())["loss"] for _ in range(2)]
        values = torch.cat([parameter.detach().double().flatten() for parameter in agent.actor_parameters()])
        found.append((torch.tensor(losses, dtype=torch.float64), values))
    plain, sharded = found
    return {
        "losses": float((plain[0] - sharded[0]).abs().max()),
        "adapters": float((plain[1] - sharded[1]).abs().max()),
        "learnt": float((plain[0][-1] - plain[0][0]).abs()),
    }


def refusal(accelerator: Accelerator) -> str:
    """What evollm says to a base that has an agent without FSDP already."""
    model: nn.Module = make_small_model()
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    agent = DPO(actor_network=model, lora_config=lora)
    try:
        DPO(actor_network=model, lora_config=lora, accelerator=accelerator)
    except ConfigurationError as error:
        return str(error)
    finally:
        agent.release()
    return ""


if __name__ == "__main__":
    main()
