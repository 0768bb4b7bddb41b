"""Whatever is handed in, it works or raises an error of evollm's: seeded random cases over data and arguments.

A kind of case is a function that makes one from a random generator and a `Workshop`, and an entry of `KINDS`. A case
that cannot be made, since a library refuses to hold the junk, is made anew.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import random
import string
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import rich.console
import torch
from conftest import make_examples, make_rows
from peft import LoraConfig
from tokenizers_for_tests import chatml_tokenizer

from evollm import (
    DPO,
    SFT,
    EvoLLMError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    inspect_data,
)
from evollm.algorithms import algorithm_named
from evollm.config import read_config
from evollm.inspection import print_inspection
from evollm.tuning import validate
from evollm.tuning.parameters import parameters_of
from evollm.tuning.request import TUNE_PARAMETERS

Case = Callable[[], object]


@dataclass(frozen=True)
class Workshop:
    """What cases are made with; one of each for all of them.

    Attributes:
        folder: An empty folder.
        tokenizer: A tokenizer with a chat template.
        agents: A population of two.
        gym: Pairs that the population can learn from.
    """

    folder: Path
    tokenizer: Any
    agents: list[DPO]
    gym: PreferenceGym


# ----------------------------------------------------------------------------------------------------------------- junk

SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 10**400, -(10**400), 0.0, -0.5, 0.3, 1e-5, 1e308, 5e-324, 10**5000),
    *(float("nan"), float("inf"), float("-inf"), 1j, Decimal("0.1"), Decimal("nan"), np.float32(0.5), np.int64(3)),
    *(
        np.nan,
        np.bool_(True),
        np.datetime64("NaT"),
        pd.NA,
        pd.NaT,
        b"",
        b"\xff",
        "",
        " ",
        "\0",
        "\ud800",
        "nan",
        "1e-5",
    ),
    *(
        "yes",
        "sigmoid",
        "cpu",
        "cuda",
        "org/name",
        "/",
        "..",
        "~",
        "x" * 300,
        "y" * 20_000,
        "{{ 1/0 }}",
        "</s>",
        "\u202e",
    ),
    *(Path("absent"), object(), object, len, Ellipsis, NotImplemented, range(3), slice(None)),
)


def junk(rng: random.Random, depth: int = 2) -> Any:
    """Anything."""
    kind = rng.randrange(12) if depth else 0
    if kind < 7:
        return rng.choice(SCALARS)
    if kind < 9:
        return [junk(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 9:
        return {
            rng.choice(["role", "content", "a", "", 7, None]): junk(rng, depth - 1) for _ in range(rng.randrange(3))
        }
    return rng.choice(
        [lambda *_: 1 / 0, np.zeros((2, 0)), np.array([1.0, None]), torch.ones(2), set(), iter([1]), (1, 2)]
    )


MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Is it?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
    {"role": "tool", "content": "7", "name": "f"},
    {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
    {"from": "human", "value": "Is it so?"},
    {"from": "gpt", "value": "It is."},
]
GOOD_ROWS: dict[str, list[dict[str, Any]]] = {
    "pair": [
        {"prompt": "Is it?", "chosen": " Yes.", "rejected": " No."},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"prompt": MESSAGES[:2], "chosen": MESSAGES[2:3], "rejected": MESSAGES[3:4], "tools": [{"name": "f"}]},
        {"chosen": MESSAGES[1:3], "rejected": MESSAGES[1:2] + MESSAGES[5:6], "chat_template_kwargs": {"think": False}},
    ],
    "example": [
        {"prompt": "Is it?", "completion": " Yes.", "label": True},
        {"messages": MESSAGES[:3], "tools": '[{"name": "f"}]'},
        {"conversations": MESSAGES[6:]},
        {"text": "It is so."},
    ],
}


def spoilt(rng: random.Random, value: Any, times: int = 1) -> Any:
    """A copy of a nested value with something wrong in it."""
    value = copy.deepcopy(value)
    for _ in range(times):
        places = list(_places(value))
        holder, key = rng.choice(places)
        act = rng.randrange(6)
        if act == 0 and isinstance(holder, dict):
            holder[_misspelt(rng, key)] = holder.pop(key)
        elif act == 1:
            del holder[key]
        elif act == 2 and isinstance(holder[key], str):
            holder[key] = rng.choice(["", " \n", "\ud800", "\0", holder[key] * 5000, "<|im_end|>", json.dumps(value)])
        elif act == 3 and isinstance(holder[key], list):
            rng.shuffle(holder[key])
        else:
            holder[key] = junk(rng)
        if not list(_places(value)):
            break
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _misspelt(rng: random.Random, name: Any) -> Any:
    if not isinstance(name, str) or not name:
        return rng.choice([7, None, "x"])
    place = rng.randrange(len(name))
    return rng.choice([name[:place] + name[place + 1 :], name.upper(), name + "s", name[:place] + "x" + name[place:]])


# ----------------------------------------------------------------------------------------------------------------- data

CONTAINERS: tuple[Callable[[list[Any]], Any], ...] = (
    list,
    list,
    tuple,
    iter,
    lambda rows: {name: [row.get(name) for row in rows] for name in rows[0]},
    pd.DataFrame,
    # Arrow crashes on some objects, and holds none.
    lambda rows: datasets.Dataset.from_list(_plain(rows)),
    lambda rows: datasets.Dataset.from_list(_plain(rows)).to_iterable_dataset(),
    lambda rows: datasets.IterableDataset.from_generator(lambda: iter(rows)),
    lambda rows: pa.Table.from_pylist(_plain(rows)),
)


def _some_rows(rng: random.Random) -> tuple[type[PreferenceGym] | type[SFTGym], list[Any]]:
    noun = rng.choice(list(GOOD_ROWS))
    rows = [copy.deepcopy(rng.choice(GOOD_ROWS[noun])) for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.6:  # rows of one kind: otherwise most datasets fail by their columns
        rows = [rows[0]] * len(rows)
    gym = PreferenceGym if noun == "pair" else SFTGym
    if rng.random() < 0.05:
        gym = SFTGym if noun == "pair" else PreferenceGym
    rows[rng.randrange(len(rows))] = spoilt(rng, rows[0], rng.randrange(1, 4))
    return gym, rows if rng.random() < 0.97 else spoilt(rng, rows)


def rows_case(rng: random.Random, shop: Workshop) -> Case:
    gym, rows = _some_rows(rng)
    if rng.random() < 0.05:
        return lambda: gym(junk(rng), None, shop.tokenizer)
    data = rng.choice(CONTAINERS)(rows)
    test = rng.choice([None, None, None, rows, junk(rng)])
    return lambda: gym(data, test, shop.tokenizer)


SUFFIXES = (
    ".jsonl",
    ".jsonl",
    ".json",
    ".jsonl.gz",
    ".csv",
    ".parquet",
    ".txt",
    ".gz",
    "",
    ".JSONL",
    ".csv.gz",
    ".x" * 60,
)


def file_case(rng: random.Random, shop: Workshop) -> Case:
    gym, rows = _some_rows(rng)
    path = shop.folder / f"data{rng.choice(SUFFIXES)}"
    content = _file_content(rng, rows, path)
    if path.is_dir():
        path.rmdir()
    if rng.random() < 0.05:
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        path.write_bytes(content)
    name: Any = rng.choice([path, str(path), str(path), path.name, f"{path}:train", str(path) + "\0", "z" * 5000, b"a"])
    return lambda: gym(name, None, shop.tokenizer)


def _file_content(rng: random.Random, rows: list[Any], path: Path) -> bytes:
    kind = rng.choice([path.suffix, *SUFFIXES]) if rng.random() < 0.2 else path.suffix
    if kind == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(_plain(rows)), path)
        content = path.read_bytes()
    elif kind.startswith(".csv"):
        content = pd.DataFrame(rows).to_csv(index=False).encode("utf-8", "surrogatepass")
    else:
        content = "\n".join(map(_json, rows)).encode("utf-8", "surrogatepass")
    if path.suffix == ".gz":
        content = gzip.compress(content)
    act = rng.randrange(8)
    if act == 0:
        return content[: rng.randrange(len(content))]
    if act == 1:
        place = rng.randrange(len(content))
        return content[:place] + rng.randbytes(rng.randrange(1, 9)) + content[place + 3 :]
    if act == 2:
        return rng.choice(
            [b"", b"\n", b"{}", b"[" * 100_000, b"{" * 9, b"\x1f\x8b", b"PAR1", b"\xff\xfe", b"null", b"NaN\n"]
        )
    return content


def _plain(rows: list[Any]) -> list[Any]:
    return [json.loads(_json(row)) for row in rows]


def _json(row: Any) -> str:
    return json.dumps(row, default=str, skipkeys=True)


# ------------------------------------------------------------------------------------------------------------ arguments


def _with_junk(rng: random.Random, good: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of which one, two or three are not what they should be, or not what they were."""
    usual = (None, True, False, 0, 1, 2, 5, 0.3, 1.5)
    chosen = rng.sample(names, rng.randrange(1, 4))
    return {**good, **{name: rng.choice(usual) if rng.random() < 0.4 else junk(rng) for name in chosen}}


def gym_case(rng: random.Random, shop: Workshop) -> Case:
    names = ("train_dataset", "test_dataset", "tokenizer", "data_batch_size_per_gpu", "accelerator")
    names += ("max_context_length", "min_completion_length", "seed", "final_dataset", "dataset_weights")
    gym, rows = rng.choice([(PreferenceGym, make_rows(3)), (SFTGym, make_examples(3))])
    good = {"train_dataset": rows, "test_dataset": None, "tokenizer": shop.tokenizer}
    arguments = _with_junk(rng, good, names)
    return lambda: gym(**arguments)


def inspection_case(rng: random.Random, shop: Workshop) -> Case:
    names = ("data", "model", "split", "sft", "max_context_length", "min_completion_length", "against", "population")
    rows = rng.choice([make_rows(3), make_examples(3), _some_rows(rng)[1]])
    good = {"data": rows, "model": shop.tokenizer}
    arguments = _with_junk(rng, good, (*names, "epochs", "estimate")) if rng.random() < 0.7 else good
    console = rich.console.Console(file=io.StringIO())
    return lambda: print_inspection(inspect_data(**arguments), console)


AGENT_ARGUMENTS = (
    *("observation_space", "action_space", "pad_token_id", "pad_token", "model_name", "actor_network", "model_config"),
    *(
        "archive",
        "hp_config",
        "index",
        "batch_size",
        "lr",
        "max_grad_norm",
        "update_epochs",
        "calc_position_embeddings",
    ),
    *("micro_batch_size_per_gpu", "device", "lora_config", "accelerator", "wrap", "clone", "seed"),
    *("gradient_checkpointing", "torch_compiler", "token_budget"),
)
DPO_ARGUMENTS = (
    *("beta", "nll_alpha", "loss_type", "loss_weights", "label_smoothing", "discopop_tau", "simpo_gamma"),
    *("use_liger_loss", "use_separate_reference_adapter"),
)


def agent_case(rng: random.Random, shop: Workshop) -> Case:
    kind = rng.choice([DPO, DPO, SFT])
    names = AGENT_ARGUMENTS + (DPO_ARGUMENTS if kind is DPO else ())
    good = {"actor_network": shop.agents[0].base.network, "lora_config": LoraConfig(r=2, target_modules=["q_proj"])}
    arguments = _with_junk(rng, good, names)
    if rng.random() < 0.2:
        fields = {name: junk(rng) for name in rng.sample(["r", "lora_alpha", "target_modules", "lora_dropout"], 2)}
        arguments["lora_config"] = LoraConfig(**fields)
    size = rng.choice([None, None, 2, junk(rng)])
    if isinstance(size, int) and size > 3:
        size = 3  # it would be done

    def build() -> None:
        agents = [kind(**arguments)] if size is None else kind.population(size, **arguments)
        for agent in agents:
            agent.release()

    return build


def evolution_case(rng: random.Random, shop: Workshop) -> Case:
    del shop
    kind = rng.choice([RLParameter, RLParameter, HyperparameterConfig, TournamentSelection, Mutations])
    if kind is HyperparameterConfig:
        parameters = {name: rng.choice([RLParameter(1e-5, 1e-3), junk(rng)]) for name in ("lr", "beta", "x")}
        return lambda: HyperparameterConfig(**parameters)
    names = {
        RLParameter: ("min", "max", "shrink_factor", "grow_factor", "dtype", "choices"),
        TournamentSelection: ("tournament_size", "elitism", "population_size", "rand_seed"),
        Mutations: (
            *("no_mutation", "rl_hp", "rand_seed", "architecture", "new_layer_prob", "parameters"),
            *("activation", "mutation_sd", "mutate_elite", "device", "accelerator"),
        ),
    }[kind]
    good = {"min": 0.1, "max": 1.0} if kind is RLParameter else {}
    arguments = _with_junk(rng, good, names)
    return lambda: kind(**arguments)


RUN_ARGUMENTS = (
    *("pop", "env", "num_epochs", "max_steps", "evo_steps", "evaluation_interval", "tournament", "mutation", "fitness"),
    *("update_reference_each_epoch", "run_dir", "checkpoint_steps", "keep_last", "checkpoint_path", "save_elite"),
    *("elite_path", "resume_from_checkpoint", "num_sample_answers", "callbacks", "accelerator", "verbose"),
)


def run_case(rng: random.Random, shop: Workshop) -> Case:
    run_dir = shop.folder / "".join(rng.choices(string.ascii_lowercase, k=12))
    good = {"pop": shop.agents[:1], "env": shop.gym, "max_steps": 1, "run_dir": run_dir, "checkpoint_steps": 0}
    good |= {"save_elite": False, "num_sample_answers": 0, "verbose": False}
    arguments = _with_junk(rng, good, RUN_ARGUMENTS)
    for name in ("num_epochs", "max_steps"):  # a run of 1e400 steps would be done
        if isinstance(arguments.get(name), int):
            arguments[name] = min(arguments[name], 2)
    return lambda: finetune_llm_preference(**arguments)


def method_case(rng: random.Random, shop: Workshop) -> Case:
    agent, gym = shop.agents[1], shop.gym
    observation, _ = gym.reset(seed=0)
    if rng.random() < 0.5:
        observation = {**observation, rng.choice(list(observation)): junk(rng)}
    thing = rng.choice([junk(rng), observation])
    state = spoilt(rng, gym.state_dict())
    values = {rng.choice(["lr", "beta", "batch_size", "loss_type", "x"]): junk(rng)}
    calls: tuple[Case, ...] = (
        lambda: agent.learn(thing, training=False),
        lambda: agent.get_action(thing),
        lambda: agent.test(gym, loop=rng.choice([1, 0, None, 1.5, "x"])),
        lambda: agent.evaluate(gym, split=junk(rng)),
        lambda: agent.clone().set_hyperparameters(values),
        lambda: agent.adapter(junk(rng)),
        lambda: agent.save_checkpoint(rng.choice([shop.folder / "agent", 7, "\0", "x" * 300])),
        lambda: agent.load_checkpoint(junk(rng)),
        lambda: gym.load_state_dict(state),
        lambda: gym.load_state_dict(junk(rng)),
        lambda: gym.step(junk(rng)),
        lambda: gym.reset(seed=junk(rng)),
        lambda: list(gym.eval_batches(junk(rng), junk(rng))),
    )
    return rng.choice(calls)


GOOD_CONFIG: dict[str, Any] = {
    **{"model": "model", "data": "rows.jsonl", "population": 2, "generations": 2, "num_epochs": 2, "lr": 1e-5},
    **{"data_batch_size_per_gpu": 4, "hp_config": {"lr": [1e-6, 1e-3], "loss_type": ["sigmoid", "ipo"]}},
    **{"lora_config": {"r": 2, "target_modules": ["q_proj"]}, "device": "cpu", "seed": 1},
}
CONFIG_KEYS = sorted(
    {*TUNE_PARAMETERS, *parameters_of(algorithm_named("dpo"))} - {"run_dir", "accelerator", "population"}
)
YAML_JUNK = (
    *(
        "",
        "null",
        "~",
        "true",
        "no",
        "on",
        "1",
        "-1",
        "0",
        "1e-5",
        "1e400",
        ".nan",
        "-.inf",
        "010",
        "1:30",
        "2026-01-01",
    ),
    *("[]", "{}", "[1, 2", "{a: b", "[1e-5]", "[1e-3, 1e-5]", "[a, b]", "{min: 1, max: 2}", "{min: x}", "{a: {b: c}}"),
    *("&a 1", "*a", "!!python/object/apply:os.getcwd []", "!!binary x", "'", '"', "\t", "|", "> x", "- a", "a: b: c"),
    *("\u2028", "\ud83d", "x" * 3000, "[" * 2000, "? a", "%", "@", "`", "cuda:99", "rows.jsonl", "absent", "sigmoid"),
)


def config_case(rng: random.Random, shop: Workshop) -> Case:
    """A file, read and validated as `evollm validate` does, with keys and text that are not what they should be."""
    lines = [f"{key}: {json.dumps(value)}" for key, value in GOOD_CONFIG.items()]
    for _ in range(rng.randrange(4)):
        key = rng.choice([*CONFIG_KEYS, *GOOD_CONFIG, "learning_rate", "lora_confg", "x"])
        lines = [line for line in lines if rng.random() < 0.05 or not line.startswith(f"{key}:")]
        lines.insert(rng.randrange(len(lines) + 1), f"{key}: {rng.choice(YAML_JUNK)}")
    text = "\n".join(lines)
    if rng.random() < 0.2:
        place = rng.randrange(len(text))
        text = (
            text[:place] + rng.choice(["", "\0", ":", "\n", "\t", "  ", "\xff", "#", "---\n", "{"]) + text[place + 1 :]
        )
    overrides = [
        f"{rng.choice([*CONFIG_KEYS, 'lora_config.r', 'hp_config.beta', 'lr.x', '.', ''])}={rng.choice(YAML_JUNK)}"
        for _ in range(rng.choice([0, 0, 1, 2]))
    ]
    path = shop.folder / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")

    def build() -> None:
        config = read_config(path, overrides)
        for name in ("generations", "num_epochs", "max_steps"):  # a run of 1e400 steps would be done
            if isinstance(config.get(name), int):
                config[name] = min(config[name], 4)
        config.setdefault("model", "model")
        config.setdefault("data", "rows.jsonl")
        validate(**config)

    return build


# ----------------------------------------------------------------------------------------------------------------- test

# Each kind of case, and how many of it.
KINDS: dict[str, tuple[Callable[[random.Random, Workshop], Case], int]] = {
    "rows": (rows_case, 500),
    "files": (file_case, 250),
    "gym": (gym_case, 150),
    "inspection": (inspection_case, 150),
    "agent": (agent_case, 300),
    "evolution": (evolution_case, 250),
    "run": (run_case, 80),
    "methods": (method_case, 120),
    "config": (config_case, 200),
}


@pytest.fixture
def shop(
    tmp_path: Path,
    make_model: Callable[..., Any],
    make_population: Callable[..., list[DPO]],
    monkeypatch: pytest.MonkeyPatch,
) -> Workshop:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    tokenizer = chatml_tokenizer()
    gym = PreferenceGym(make_rows(4), make_rows(2, 4), tokenizer, data_batch_size_per_gpu=2)
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(30)))
    return Workshop(tmp_path, tokenizer, make_population(2), gym)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_handed_in_works_or_raises_an_error_of_evollm(kind: str, shop: Workshop) -> None:
    make, count = KINDS[kind]
    ends: Counter[str] = Counter()
    for seed in range(count):
        case = _make(make, f"{kind} {seed}", shop)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case()
            ends["worked"] += 1
        except EvoLLMError as error:
            ends["refused" if str(error).strip() else f"{type(error).__name__} without a word, seed {seed}"] += 1
        except BaseException as error:
            place = traceback.format_exc()[-2500:]
            ends[f"{type(error).__name__}, for example seed {seed}:\n{place}"] += 1
    foreign = {end: times for end, times in ends.items() if end not in ("worked", "refused")}
    assert not foreign, "\n".join(f"{times} x {end}" for end, times in foreign.items())
    # Cases that all end alike would try one thing a thousand times.
    assert min(ends["worked"], ends["refused"]) > count / 50, ends


def _make(make: Callable[[random.Random, Workshop], Case], seed: str, shop: Workshop) -> Case:
    for attempt in range(100):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return make(random.Random(f"{seed} {attempt}"), shop)
        except (
            *(pa.ArrowException, ValueError, TypeError, AttributeError, OverflowError, KeyError),
            *(RecursionError, OSError),
        ):
            continue  # of the library that was to hold the junk
    raise AssertionError(f"{seed}: no case could be made")
