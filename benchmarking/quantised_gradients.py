"""Are gradients through a quantised base right? Each adapter parameter's against those through its dequantised weights.

    python benchmarking/quantised_gradients.py --model FOLDER

computes the same loss of the same random pairs for two agents on the quantised base and on a float32 base of the same
weights, on the fast and on the plain path, and prints the relative errors over the parameters. `int8, inputs kept` is
int8 with the layers' inputs left as they are, as bitsandbytes computes in training mode on a CPU: what is left without
LLM.int8()'s rounding of the inputs. Without `--model` a small Llama with random weights is taken. Exits with 1 where a
4-bit base is off by more than 1e-3.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from synthetic import Shape
from throughput import machine
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from evollm import DPO
from evollm.data.samples import Batch
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.fast_paths import FastPaths
from evollm.models.logprobs import TokenLogprobs
from evollm.models.quantised import quantised_layers

BOUND = 1e-3
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4-double": {**NF4, "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "int8, inputs kept": {"load_in_8bit": True},
}


def gradients(model: Any, batch: Batch, *, plain: bool) -> dict[str, Tensor]:
    """Of a weighted sum of log-probs of two agents, by each adapter parameter."""
    agents = DPO.population(2, actor_network=model, gradient_checkpointing=False)
    engine = Engine.of(agents[0].base)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for agent in agents:
            for parameter in agent.actor_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    if plain:
        engine.prepare = lambda members, length: FastPaths(False, False, False, length)  # type: ignore[method-assign]

    def loss(members: Sequence[int], rows: Sequence[int], found: TokenLogprobs) -> Tensor:
        del members
        weights = torch.tensor(rows) + 1.0
        return torch.stack([(weights * (p.chosen - 0.3 * p.rejected)).sum() for p in found.members]).sum()

    engine.backward(Item.on(batch, [agent.actor_adapter for agent in agents]), PassOptions(), loss)
    return {
        f"{agent.index}.{name}": parameter.grad.clone()
        for agent in agents
        for name, parameter in agent.base.adapters.parameters(agent.actor_adapter).items()
        if parameter.grad is not None
    }


def load(folder: str, kind: str, *, dequantised: bool) -> Any:
    """A base of this kind, or one in float32 with the same weights."""
    config = BitsAndBytesConfig(**KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    if dequantised:
        return model.dequantize(torch.float32)
    if kind.endswith("inputs kept"):
        for _, layer in quantised_layers(model):
            layer.train()
            # evollm puts the whole base into evaluation mode.
            layer.train = lambda mode=True, layer=layer: layer
    return model


def relative_errors(folder: str, kind: str, batch: Batch, *, plain: bool) -> Tensor:
    """Of each adapter parameter's gradient."""
    found = gradients(load(folder, kind, dequantised=False), batch, plain=plain)
    expected = gradients(load(folder, kind, dequantised=True), batch, plain=plain)
    assert found.keys() == expected.keys()
    return torch.stack([(found[name] - expected[name]).norm() / expected[name].norm() for name in expected])


def make_model(folder: str) -> None:
    """A small Llama whose layers bitsandbytes quantises in whole blocks."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1)).save_pretrained(folder)


def main() -> int:
    """Print the table; 1 where a 4-bit base is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--pairs", type=int, default=4)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            make_model(folder)
        name = options.model or folder
        vocabulary = AutoModelForCausalLM.from_pretrained(name).config.vocab_size
        batch = Shape(prompt=20, chosen=12, rejected=15).batch(options.pairs, vocabulary)
        print(f"{machine()}; relative errors of adapter gradients against the dequantised base")
        print(f"{'base':<20}{'path':<8}{'parameters':>11}{'median':>10}{'largest':>10}")
        for kind in KINDS:
            for path in ("fast", "plain"):
                errors = relative_errors(name, kind, batch, plain=path == "plain")
                print(f"{kind:<20}{path:<8}{len(errors):>11}{errors.median():>10.1e}{errors.max():>10.1e}")
                failed |= not kind.startswith("int8") and not bool((errors <= BOUND).all())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
