from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from probe_memory import ProbeMemory
from quick_page import quick_page
from tokenizers_for_tests import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from warm_python import install

from evollm import DPO, SFT, PreferenceGym, SFTGym

torch.set_num_threads(1)
# So have the programs that tests start, beside the other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The tests write and remove some 80,000 small files, with an fsync of most: in memory where there is room.
MEMORY, ROOM = Path("/dev/shm"), 4 << 30
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
WARM_PYTHON = pytest.StashKey[str]()
PROBES = pytest.StashKey[ProbeMemory]()
# Of what probes have found, in all processes of this run of the tests.
FOUND, FOUND_BY_PROBES = pytest.StashKey[str](), "EVOLLM_FOUND_BY_PROBES"
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    if FOUND_BY_PROBES not in os.environ:
        os.environ[FOUND_BY_PROBES] = config.stash[FOUND] = tempfile.mkdtemp(prefix="evollm-probes-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if FOUND in config.stash:
        shutil.rmtree(os.environ.pop(FOUND_BY_PROBES))


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[PROBES] = ProbeMemory(Path(os.environ[FOUND_BY_PROBES]))
    session.config.stash[PROBES].install()
    # Before a test has changed anything, and before libraries have started threads.
    session.config.stash[WARM_PYTHON] = install(Path(tempfile.mkdtemp(prefix="evollm-")))


def pytest_sessionfinish(session: pytest.Session) -> None:
    shutil.rmtree(Path(session.config.stash[WARM_PYTHON]).parent)


@pytest.fixture
def drawn_reports() -> None:
    """Reports are drawn as for users, which takes longer than the small runs of the tests."""


@pytest.fixture(autouse=True)
def quick_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with a page that is drawn at once, unless `drawn_reports` is asked for."""
    if "drawn_reports" not in request.fixturenames:
        monkeypatch.setattr("evollm.report.write.render", quick_page)


@pytest.fixture
def every_probe(request: pytest.FixtureRequest) -> Iterator[None]:
    """All probes run: what other tests have found is not taken over."""
    with request.config.stash[PROBES].unused():
        yield


@pytest.fixture(scope="session")
def warm_python(request: pytest.FixtureRequest) -> str:
    """A Python for programs that a test starts; it has imported the libraries already."""
    return request.config.stash[WARM_PYTHON]


@pytest.fixture(scope="session")
def launch(warm_python: str) -> Callable[..., list[dict[str, Any]]]:
    def launch(
        processes: int,
        folder: Path,
        max_steps: int = 6,
        script: Path = HERE / "parallel_run.py",
    ) -> list[dict[str, Any]]:
        """Run a script; returns what each process held at the end."""
        command = [warm_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        python_path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*command, str(script), str(folder), str(max_steps)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path},
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads((folder / f"held-{rank}.json").read_text()) for rank in range(processes)]

    return launch


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(adds_bos=True)


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """A small Llama with random weights, the same ones for the same seed."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            # Larger than usual, so that different weights give clearly different log-probs.
            "initializer_range": 0.2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype)

    return make


@pytest.fixture
def model_folder(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    """A folder with a small model and its tokenizer."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


NAMES = ["Ann", "Ben", "Cem", "Dora", "Eli", "Fay", "Gus", "Hana", "Ivo", "Jo", "Kim", "Leo"]


def make_rows(count: int, skip: int = 0) -> list[dict[str, str]]:
    """Pairs of several lengths; no two are the same."""
    rows = []
    for number in range(skip, skip + count):
        name = NAMES[number % len(NAMES)]
        rows.append(
            {
                "prompt": f"Question {number} by {name}:" + " please" * (number % 4),
                "chosen": f" yes, {name}" + "." * (number % 3),
                "rejected": f" no {name}, that is much too long" + " and more" * (number % 5),
            }
        )
    return rows


def make_examples(count: int, skip: int = 0) -> list[dict[str, str]]:
    """The prompts and chosen completions of `make_rows`."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in make_rows(count, skip)]


@pytest.fixture
def sft_gym(tokenizer: PreTrainedTokenizerFast) -> SFTGym:
    return SFTGym(make_examples(12), make_examples(6, 12), tokenizer, data_batch_size_per_gpu=4)


@pytest.fixture
def make_sft(make_model: Callable[..., LlamaForCausalLM], lora: LoraConfig) -> Callable[..., SFT]:
    """An agent on a base of its own, unless `actor_network` says otherwise."""

    def make(**arguments: Any) -> SFT:
        arguments.setdefault("actor_network", make_model())
        return SFT(**{"lora_config": lora, "lr": 1e-3, **arguments})

    return make


@pytest.fixture
def make_sft_population(make_model: Callable[..., LlamaForCausalLM], lora: LoraConfig) -> Callable[..., list[SFT]]:
    """Agents on one base."""

    def make(size: int, **arguments: Any) -> list[SFT]:
        arguments.setdefault("actor_network", make_model())
        return SFT.population(size, **{"lora_config": lora, "lr": 1e-3, **arguments})

    return make


@pytest.fixture
def gym(tokenizer: PreTrainedTokenizerFast) -> PreferenceGym:
    return PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4)


@pytest.fixture
def make_agent(make_model: Callable[..., LlamaForCausalLM], lora: LoraConfig) -> Callable[..., DPO]:
    """An agent on a base of its own, unless `actor_network` says otherwise."""

    def make(**arguments: Any) -> DPO:
        defaults = {"lora_config": lora, "lr": 1e-3, "nll_alpha": 0.5, "max_grad_norm": 1.0}
        arguments.setdefault("actor_network", make_model())
        return DPO(**{**defaults, **arguments})

    return make


@pytest.fixture
def make_population(make_model: Callable[..., LlamaForCausalLM], lora: LoraConfig) -> Callable[..., list[DPO]]:
    """Agents on one base."""

    def make(size: int, **arguments: Any) -> list[DPO]:
        defaults = {"lora_config": lora, "lr": 1e-3, "nll_alpha": 0.5, "max_grad_norm": 1.0}
        arguments.setdefault("actor_network", make_model())
        return DPO.population(size, **{**defaults, **arguments})

    return make
