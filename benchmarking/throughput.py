"""How many member-pairs a second do evollm, TRL and AgileRL train, on the same pairs, model, LoRA and batch?

    python benchmarking/peers/make_environments.py
    python benchmarking/throughput.py --pairs hh-rlhf/helpful-base-test.jsonl.gz

Every library runs in a process of its own, one after the other in each round, each round on other pairs, with the base
in the same dtype (`--dtype`). The peers use the settings that are fastest for them on two CPU cores (a pair at a time;
TRL with the reference computed beforehand); their workers say what they compute in bfloat16 and what in float32.
Counted is everything from the first reference pass to the last optimizer step; loading, tokenisation and evollm's probe
of its fast paths are not. Writes `throughput.json` and `throughput.png` (the picture with matplotlib, if it is there).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from evollm import DPO
from evollm.data import read_pairs
from evollm.demo import demo_model, demo_pairs
from evollm.models.loading.precision import AUTO, default_device, with_dtype

HERE = Path(__file__).resolve().parent
DTYPES = ("float32", "bfloat16", AUTO)
PEER_OPTIONS = {
    "trl": ["--micro-batch", "1", "--precompute"],
    "agilerl": ["--micro-batch", "1", "--call", "micro-batch"],
}
_BF16_UNITS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX"}


def main() -> None:
    """Run all rounds and report."""
    options = _parse()
    transformers_logging.disable_progress_bar()
    model = options.model or str(demo_model())
    dtype = chosen_dtype(options.dtype, model)
    rounds = sample_rows(options, model)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        DPO(actor_network=AutoModelForCausalLM.from_pretrained(model)).save_checkpoint(
            str(folder / "start"), save_optimizer=False
        )
        for number, rows in enumerate(rounds):
            held_out = rounds[number - 1]
            _write(folder / "rows.jsonl", rows)
            _write(folder / "test.jsonl", held_out)
            for label, command in commands(options, model, dtype, folder).items():
                print(f"round {number + 1} of {len(rounds)}: {label} ...", flush=True)
                subprocess.run([*command, "--out", str(folder / "out.json")], check=True, stdout=subprocess.DEVNULL)
                results.append({"label": label, "round": number, **json.loads((folder / "out.json").read_text())})
    options.out.mkdir(parents=True, exist_ok=True)
    described = {"machine": machine(), "date": str(date.today()), "dtype": dtype, "command": " ".join(sys.argv)}
    described["results"] = results
    (options.out / "throughput.json").write_text(json.dumps(described, indent=1))
    table = summarise(results)
    print(report(table, described))
    plot(table, dtype, options.out / "throughput.png")


def sample_rows(options: argparse.Namespace, model: str) -> list[list[dict[str, str]]]:
    """Pairs of at most 512 tokens a side, drawn with a fixed seed, the same number for each round."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    dataset: Any = options.pairs or [{side: row[side][0]["content"] for side in row} for row in demo_pairs("train")]
    if options.pairs is None:
        dataset = [{**row, "chosen": " " + row["chosen"], "rejected": " " + row["rejected"]} for row in dataset]
    pairs, _ = read_pairs(dataset, "--pairs")
    fitting = [
        {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in pairs
        if max(len(tokenizer(pair.prompt + side)["input_ids"]) for side in (pair.chosen, pair.rejected)) < 512
    ]
    chosen = np.random.default_rng(0).choice(len(fitting), options.num_pairs, replace=False)
    return [[fitting[i] for i in part] for part in np.array_split(chosen, options.rounds)]


def chosen_dtype(asked: str, model: str) -> str:
    """The name of the type in which evollm loads this model if it is asked for a type or for `auto`."""
    config = AutoConfig.from_pretrained(model)
    taken = with_dtype(None, asked, config, default_device()).get("dtype", config.dtype)
    return str(taken or torch.float32).removeprefix("torch.")


def commands(options: argparse.Namespace, model: str, dtype: str, folder: Path) -> dict[str, list[str]]:
    """The command of each contestant."""
    common = ["--model", model, "--rows", str(folder / "rows.jsonl"), "--batch-size", str(options.batch_size)]
    common += ["--epochs", str(options.epochs), "--threads", str(options.threads), "--dtype", dtype]
    evollm = [sys.executable, str(HERE / "train_evollm.py"), *common, "--test-rows", str(folder / "test.jsonl")]
    found = {f"evollm, {n} members": [*evollm, "--members", str(n)] for n in (options.population, 1)}
    for peer, extra in PEER_OPTIONS.items() if not options.without_peers else ():
        python = options.peers / peer / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{python} is not there: run benchmarking/peers/make_environments.py, or --without-peers")
        worker = str(HERE / "peers" / f"train_{peer}.py")
        found[peer] = [str(python), worker, *common, "--adapter", str(folder / "start" / "actor"), *extra]
    return found


def summarise(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """All rounds of each contestant as one line."""
    table: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(result["label"] for result in results):
        mine = [result for result in results if result["label"] == label]
        pairs, seconds = sum(r["member_pairs"] for r in mine), sum(r["seconds_total"] for r in mine)
        table[label] = {
            "member_pairs": pairs,
            "seconds": seconds,
            "rate": pairs / seconds,
            "peak_mib": max(r["peak_mib"] for r in mine),
        }
        if "share_of_floor" in mine[0]:
            table[label] |= {
                "share_of_floor": float(np.mean([r["share_of_floor"] for r in mine])),
                "gemm_gflops": float(np.mean([r["gemm_gflops"] for r in mine])),
                "probe": float(np.mean([r["seconds_probe"] for r in mine])),
                "phases": {name: sum(r["seconds_phases"][name] for r in mine) for name in mine[0]["seconds_phases"]},
            }
    return table


def report(table: dict[str, dict[str, Any]], described: dict[str, Any]) -> str:
    """The table for people."""
    ours = [line for label, line in table.items() if label.startswith("evollm")]
    peers = {label: line for label, line in table.items() if not label.startswith("evollm")}
    lines = [f"{described['machine']}, {described['date']}, {described['dtype']}", ""]
    ratios = "".join(f"{'x ' + peer:>11}" for peer in peers)
    lines.append(f"{'':<20}{'member-pairs':>13}{'seconds':>9}{'a second':>10}{'peak MiB':>10}{'of floor':>10}{ratios}")
    for label, line in table.items():
        share = f"{line['share_of_floor']:.0%}" if "share_of_floor" in line else ""
        cells = "".join(f"{line['rate'] / peer['rate']:>11.1f}" for peer in peers.values())
        lines.append(
            f"{label:<20}{line['member_pairs']:>13}{line['seconds']:>9.0f}{line['rate']:>10.3f}"
            f"{line['peak_mib']:>10.0f}{share:>10}{cells}"
        )
    for label, line in zip(table, ours, strict=False):
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in line["phases"].items())
        lines.append(f"{label}: seconds by phase: {phases}; matrix products {line['gemm_gflops']:.0f} GFLOP/s;")
        lines.append(f"{'':<{len(label)}}  the probe of the fast paths, once for each base: {line['probe']:.1f} s")
    return "\n".join(lines)


def plot(table: dict[str, dict[str, Any]], dtype: str, path: Path) -> None:
    """Bars of member-pairs a second."""
    try:
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(figsize=(7, 0.6 * len(table) + 1))
    labels = list(table)[::-1]
    bars = axes.barh(labels, [table[label]["rate"] for label in labels], color="#4c72b0")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlabel(f"member-pairs a second, {dtype}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def machine() -> str:
    """Processor with its units for bfloat16, cores, Python, and the allocator unless it is the C library's."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        names = [value.strip() for key, _, value in pairs if key.strip() == "model name"]
        flags = next((value.split() for key, _, value in pairs if key.strip() == "flags"), [])
        # The name alone does not tell those that have units for bfloat16 from those that have none.
        units = "".join(f", {title}" for flag, title in _BF16_UNITS.items() if flag in flags)
        name = f"{names[0]}{units}, {len(names)} cores" if names else name
    preloaded = os.environ.get("LD_PRELOAD")
    allocator = f", {Path(preloaded).name}" if preloaded else ""
    return f"{name}, Python {platform.python_version()}{allocator}"


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", help="JSONL file of preference pairs as strings (default: the demo's)")
    parser.add_argument("--model", help="model folder (default: the demo's)")
    parser.add_argument("--num-pairs", type=int, default=32, help="over all rounds")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--population", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of every base; auto: what evollm takes")
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder of the peers' environments")
    parser.add_argument("--without-peers", action="store_true", help="evollm alone")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), help="folder for the results")
    options = parser.parse_args()
    if options.num_pairs % (options.rounds * options.batch_size):
        parser.error("--num-pairs must be a multiple of --rounds times --batch-size")
    return options


if __name__ == "__main__":
    main()
