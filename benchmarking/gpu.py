"""Does sharing passes pay on a GPU? Random weights in published shapes, bf16, pairs as long as those of hh-rlhf.

    python benchmarking/gpu.py

For each shape and batch size, and each in a line of its own in `gpu.jsonl` as soon as it is known: eight members in
shared passes ("together"), the same eight one after the other ("in a loop": all steps of one member, then all of the
next, so that no step pays for switching adapters), one member, and, where the package trl is installed (extra
`benchmark`), its DPOTrainer with the reference computed beforehand. `--cases compiled` is "together" with compiled
layers; compilation falls into the steps that warm up, and takes a minute or more. All go through the same batches, each
step timed by itself: 20 after two that warm up. What is outside the steps (set-up, references, collation) is outside
the figures.

Each line says the member-pairs a second, the share of the floor (floor.py, with the rate of matrix products of this
card in the base's dtype, measured before and after the case), the busy share (steps.py), the kernels of a step, which
attention and head ran, why a fast path was not taken, and the peak memory. What does not fit is said and left out.
`--toy` runs everything at a tiny size on the CPU, to see that the script works; busy share and kernels are unknown
there.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from attention_used import network_attention, population_attention, population_head
from floor import Costs, gemm_rate
from peaks import peak_mib
from peft import LoraConfig
from result_lines import append
from steps import REPEATS, WARM, StepTimes
from synthetic import Shape, make_population
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config
from transformers.utils import logging as transformers_logging

from evollm import DPO
from evollm.algorithms.dpo_step import learn_together
from evollm.data.samples import Batch
from evollm.models.engine import Engine

Row = dict[str, Any]

USUAL = ("together", "in a loop", "one", "TRL")
CASES = (*USUAL, "compiled")
VOCABULARY = 151_936
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
# As published with Qwen2.5: hidden size, feed-forward size, layers, heads, key-value heads, tied head.
PUBLISHED = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
}
TOY = {"toy": (64, 128, 2, 4, 2, True)}


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share.

    Attributes:
        device: Where everything runs.
        members: Of a population.
        steps: Timed steps.
        limit: Seconds after which a case times no further step.
    """

    device: torch.device
    members: int = 8
    steps: int = 20
    limit: float = float("inf")

    @property
    def is_toy(self) -> bool:
        """Whether this is about the script rather than about a card."""
        return self.device.type == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Of the base."""
        return torch.float32 if self.is_toy else torch.bfloat16

    def batches(self, batch_size: int, vocabulary: int) -> list[Batch]:
        """Random pairs for all steps, of ids below 1000, so that a thousand words can spell them for TRL."""
        shape = Shape(8, 6, 7) if self.is_toy else Shape()
        return [shape.batch(batch_size, min(vocabulary, 1000), seed) for seed in range(WARM + self.steps)]


def main() -> None:
    """Measure every shape and print a table."""
    options = _parse()
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: --toy runs the script at a tiny size on the CPU")
    quiet()
    setting = Setting(torch.device("cpu" if options.toy else "cuda"), options.members, options.steps, options.limit)
    shapes = TOY if options.toy else {name: PUBLISHED[name] for name in options.shapes}
    print(f"{machine(setting.device)}, {date.today()}, torch {torch.__version__}, {options.members} members")
    print(HEADER)
    for shape in shapes:
        for batch_size in options.batch_sizes:
            for case in options.cases:
                if case == "TRL" and find_spec("trl") is None:
                    print("TRL is not installed", flush=True)
                    continue
                row = run_case(shape, batch_size, case, setting)
                append(options.out / "gpu.jsonl", {**row, "command": " ".join(sys.argv)})
                print(line(row), flush=True)


def run_case(shape: str, batch_size: int, case: str, setting: Setting) -> Row:
    """One row; a case that runs out of memory says so instead of a rate."""
    sizes = (TOY | PUBLISHED)[shape]
    vocabulary = 512 if setting.is_toy else VOCABULARY
    batches = setting.batches(batch_size, vocabulary)
    about = {**described(setting), "shape": shape, "batch_size": batch_size, "case": case}
    costs = Costs.of_network(random_model(sizes, vocabulary, torch.device("meta"), setting.dtype), LORA.r)
    try:
        model = random_model(sizes, vocabulary, setting.device, setting.dtype)
        if case == "TRL":
            return about | measured(costs, setting, lambda: run_trl(model, batches, setting))
        members = 1 if case == "one" else setting.members
        agents = make_population(model, members, gradient_checkpointing=False, device=model.device)
        # As with torch_compiler="default"; not at the tiny size, where compilation takes a minute all the same.
        if case == "compiled" and not setting.is_toy:
            agents[0].base.compile("default")
        return about | population_row(agents, batches, setting, costs, together=case != "in a loop")
    except torch.OutOfMemoryError:
        return about | {"error": "out of memory"}
    finally:
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def population_row(
    agents: Sequence[DPO], batches: Sequence[Batch], setting: Setting, costs: Costs, *, together: bool
) -> Row:
    """Evollm's row."""
    row = measured(costs, setting, lambda: run_population(agents, batches, setting, together=together))
    paths = Engine.of(agents[0].base).paths.values()
    # A figure of the slow path must not pass for one of the fast path.
    not_taken = [reason for known in paths for reason in known.reasons]
    return {**row, "head": population_head(agents[0]), "not_taken": not_taken}


@dataclass(frozen=True)
class Ran:
    """What a case did.

    Attributes:
        times: Of its steps.
        trained: For each timed step the number of members that learned, and what from.
        members: Of the whole case.
        attention: Which one ran.
        peak_mib: Peak memory.
    """

    times: StepTimes
    trained: Sequence[tuple[int, Batch]]
    members: int
    attention: str
    peak_mib: float


def measured(costs: Costs, setting: Setting, run: Callable[[], Ran]) -> Row:
    """The figures of a case, and how they compare with the floor, measured before and after it."""
    rates = [_floor_rate(costs, setting)]
    ran = run()
    rates.append(_floor_rate(costs, setting))
    rate, seconds = statistics.mean(rates), sum(ran.times.seconds)
    operations = sum(members * costs.training(batch) for members, batch in ran.trained)
    return {
        "members": ran.members,
        "steps": len(ran.trained),
        "rate": sum(members * len(batch) for members, batch in ran.trained) / seconds,
        "step_ms": 1e3 * statistics.median(ran.times.seconds),
        "tflops": operations / seconds / 1e12,
        "floor_tflops": rate / 1e12,
        "of_floor": operations / seconds / rate,
        "busy": ran.times.busy,
        "kernels": ran.times.kernels.count if ran.times.kernels else None,
        "attention": ran.attention,
        "peak_mib": ran.peak_mib,
    }


def run_population(agents: Sequence[DPO], batches: Sequence[Batch], setting: Setting, *, together: bool) -> Ran:
    """Let agents learn from the batches, all at once, or one after the other from all batches."""
    for agent in agents:
        for batch in batches:
            agent.reference_logprobs(batch)
    groups = [agents] if together else [[agent] for agent in agents]
    every, trained = StepTimes(setting.device), []
    _reset_peak(setting.device)
    for group in groups:
        times = StepTimes(setting.device, setting.steps, setting.limit / len(groups))
        times.run(lambda batch, group=group: learn_together(group, batch), batches)
        every.seconds += times.seconds
        trained += [(len(group), batch) for batch in batches[WARM : WARM + len(times.seconds)]]
    peak = peak_mib(setting.device.type)
    # Last, for the profiler goes on slowing the host once it has been used.
    every.fill(lambda batch: learn_together(groups[0], batch), batches[-1])
    return Ran(every, trained, len(agents), population_attention(agents[0]), peak)


def run_trl(model: Any, batches: Sequence[Batch], setting: Setting) -> Ran:
    """Train one member with TRL on the same batches, as words, in the same order."""
    from trl_steps import train  # noqa: PLC0415 - TRL need not be there

    times = StepTimes(setting.device, setting.steps, setting.limit)
    peak: list[float] = []
    sequence = [*batches, *[batches[-1]] * (REPEATS + 1)]
    train(
        model,
        _thousand_words(),
        [_row(batch[number]) for batch in sequence for number in range(len(batch))],
        LORA,
        len(batches[0]),
        times,
        warmed=lambda: _reset_peak(setting.device),
        timed=lambda: peak.append(peak_mib(setting.device.type)),
    )
    trained = [(1, batch) for batch in batches[WARM : WARM + len(times.seconds)]]
    return Ran(times, trained, 1, network_attention(model), peak[0])


def random_model(
    sizes: tuple[int, int, int, int, int, bool], vocabulary: int, device: torch.device, dtype: torch.dtype
) -> Any:
    """A Qwen2 with random weights, made on the device."""
    hidden, intermediate, layers, heads, key_value_heads, tied = sizes
    config = Qwen2Config(
        vocab_size=vocabulary + 512,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def described(setting: Setting) -> Row:
    """What each row says of where it was measured."""
    dtype = str(setting.dtype).removeprefix("torch.")
    where = {"machine": machine(setting.device), "date": str(date.today())}
    return {**where, "torch": torch.__version__, "dtype": dtype}


def machine(device: torch.device) -> str:
    """Name of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, toy size"


def quiet() -> None:
    """Let nothing but results on the console; why a fast path is not taken stands in the rows."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")


HEADER = (
    f"{'shape':>6}{'batch':>6}{'':>10}{'member-pairs/s':>15}{'step ms':>9}{'busy':>6}{'of floor':>9}{'TFLOP/s':>9}"
    f"{'kernels':>8}{'peak MiB':>9}  attention"
)


def line(row: Row) -> str:
    """A row of the table on the console."""
    start = f"{row['shape']:>6}{row['batch_size']:>6}{row['case']:>10}"
    if "error" in row:
        return f"{start}  {row['error']}"
    kernels = "-" if row["kernels"] is None else row["kernels"]
    head = [f"head: {row['head']}"] if "head" in row else []
    reasons = "".join(f"; {reason}" for reason in (*head, *row.get("not_taken", ())))
    return (
        f"{start}{row['rate']:>15.2f}{row['step_ms']:>9.1f}{row['busy']:>6.0%}{row['of_floor']:>9.0%}"
        f"{row['tflops']:>9.2f}{kernels:>8}{row['peak_mib']:>9.0f}  {row['attention']}{reasons}"
    )


def _floor_rate(costs: Costs, setting: Setting) -> float:
    tokens, repeats = (256, 5) if setting.is_toy else (8192, 50)
    return gemm_rate(costs, tokens, setting.device, setting.dtype, repeats)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _thousand_words() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(1000)} | {"<eos>": 1000}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def _row(pair: Any) -> dict[str, str]:
    # TRL puts the end of the text behind each side by itself.
    sides = {"chosen": pair.chosen_ids[:-1], "rejected": pair.rejected_ids[:-1]}
    return {"prompt": _spell(pair.prompt_ids), **{side: " " + _spell(ids) for side, ids in sides.items()}}


def _spell(ids: Any) -> str:
    return " ".join(f"w{number}" for number in ids)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny size on the CPU")
    parser.add_argument("--shapes", nargs="+", choices=PUBLISHED, default=tuple(PUBLISHED))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=USUAL)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(2, 8))
    parser.add_argument("--steps", type=int, default=20, help="timed steps, after two that warm up")
    parser.add_argument("--limit", type=float, default=60, help="seconds after which a case times no further step")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
