"""How do building, saving, evolving and re-referencing a population grow with the number of agents?

    python benchmarking/growth.py

A Llama of 30 layers, so narrow that its matrix products take no time: 210 LoRA modules of rank 4. What is timed is the
work around the passes, in seconds of processor time for the whole population:

- building: `DPO.population`
- checkpoint: all agents' weights and moments in one folder, as a run saves them
- evolution: a plan, and carrying it out with its clones
- references: every agent's actor, each another one, becomes its reference

Each size is measured in a process of its own. Time that the disk takes is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from peft import LoraConfig
from throughput import machine
from transformers import LlamaConfig, LlamaForCausalLM

from evollm import DPO, HyperparameterConfig, Mutations, RLParameter, TournamentSelection
from evollm.checkpoints import Population, write_population
from evollm.hpo import Birth, Result, SearchStart, TournamentSearch
from evollm.training import carry_out

COLUMNS = ("building", "checkpoint", "evolution", "references")


def main() -> None:
    """Measure every size in a fresh process and print a table."""
    options = _parse()
    if options.measure:
        print(json.dumps(measure(options.measure, options.layers)))
        return
    print(f"{machine()}, {date.today()}, {options.layers} layers")
    print(f"{'agents':>8}" + "".join(f"{column:>13}" for column in COLUMNS))
    for agents in options.agents:
        command = [sys.executable, __file__, "--measure", str(agents), "--layers", str(options.layers)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds = json.loads(output.splitlines()[-1])
        print(f"{agents:>8}" + "".join(f"{seconds[column]:>13.2f}" for column in COLUMNS), flush=True)


def measure(size: int, layers: int) -> dict[str, float]:
    """Seconds that each of the four takes with a population of this size."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[what] = time.process_time() - start

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )
    bounds = HyperparameterConfig(lr=RLParameter(min=1e-6, max=1e-2))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with timed("building"):
        population = DPO.population(size, actor_network=model, lora_config=lora, lr=1e-3, hp_config=bounds)
    _learn(population)
    with timed("checkpoint"), tempfile.TemporaryDirectory() as folder:
        saved = Population([agent.to_folder() for agent in population], {"step": 1})
        write_population(Path(folder) / "step-1", saved, base_name="")
    with timed("evolution"):
        search = TournamentSearch(TournamentSelection(2, elitism=True, population_size=size), Mutations(rl_hp=1.0))
        results = [Result(agent.index, (float(agent.index),), agent.hyperparameter_values()) for agent in population]
        founders = [Birth.fresh(one.index, one.hyperparameters) for one in results]
        search.start(SearchStart(founders, bounds, interval=1))
        population = carry_out(search.tell(results).births, population)
    _learn(population)
    with timed("references"):
        for agent in population:
            agent.set_reference_policy(1)
    return seconds


def _learn(population: list[DPO]) -> None:
    """A step of AdamW with random gradients, so that actors differ and have moments."""
    generator = torch.Generator().manual_seed(0)
    for agent in population:
        for parameter in agent.actor_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        agent.optimizer.step()
        agent.optimizer.zero_grad()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
