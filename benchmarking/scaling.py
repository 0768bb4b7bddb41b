"""How do cost and peak memory grow with the population, the prompt's share and the length?

    python benchmarking/scaling.py

Each line is measured in a process of its own, so that its peak memory is its own. "in a loop" is the same engine with
one member at a time. Random pairs; `--model` takes another model folder (default: the demo's). Writes `scaling.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from synthetic import Shape, make_population, measure
from throughput import DTYPES, chosen_dtype, machine
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from evollm.demo import demo_model

POPULATIONS = (1, 2, 4, 8, 16)
# Prompt, chosen, rejected: the same 215 tokens a pair with less and less prompt, then other lengths.
SHAPES = ((185, 14, 16), (125, 40, 50), (65, 70, 80), (31, 10, 13), (250, 80, 100))


def main() -> None:
    """Measure every case in a process of its own, and print a table."""
    options = _parse()
    if options.case:
        print(json.dumps(run(options, json.loads(options.case))))
        return
    options.model = options.model or str(demo_model())
    options.dtype = chosen_dtype(options.dtype, options.model)
    cases = [{"members": n, "together": together} for n in options.populations for together in (True, False)]
    cases += [{"members": 4, "together": True, "shape": shape} for shape in SHAPES if not options.populations_only]
    results = []
    print(f"{machine()}, {date.today()}, {options.dtype}, batch {options.batch_size}")
    print(f"{'members':>8}{'':>12}{'prompt/chosen/rejected':>24}{'member-pairs/s':>16}{'GFLOP/s':>9}{'peak MiB':>10}")
    for case in cases:
        command = [sys.executable, __file__, "--model", options.model, "--batch-size", str(options.batch_size)]
        command += ["--steps", str(options.steps), "--threads", str(options.threads), "--dtype", options.dtype]
        command += ["--case", json.dumps(case)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        results.append(result)
        parts = "/".join(str(size) for size in result["shape"])
        how = "together" if result["together"] else "in a loop"
        print(
            f"{result['members']:>8}{how:>12}{parts:>24}{result['rate']:>16.3f}{result['gflops']:>9.0f}"
            f"{result['peak_mib']:>10.0f}",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    described = {"machine": machine(), "date": str(date.today()), "dtype": options.dtype, "command": " ".join(sys.argv)}
    described["results"] = results
    (options.out / "scaling.json").write_text(json.dumps(described, indent=1))


def run(options: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    """Measure one case in this process."""
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    shape = case.get("shape", [125, 40, 50])
    batches = [
        Shape(*shape).batch(options.batch_size, model.config.vocab_size, seed=seed) for seed in range(options.steps)
    ]
    agents = make_population(model, case["members"], gradient_checkpointing=False)
    return {**case, "shape": shape, **asdict(measure(agents, batches, together=case["together"]))}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the demo's)")
    parser.add_argument("--populations", type=int, nargs="+", default=POPULATIONS)
    parser.add_argument("--populations-only", action="store_true", help="leave the other lengths out")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base; auto: what evollm takes")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
