"""Answers that are sampled by vLLM, the extra `vllm`: the adapter of each member as a LoRA of its engine.

The engine runs in this process, with a copy of the base beside the one that is trained. An adapter travels as a PEFT
folder, under a new name and number whenever its weights have changed: by these vLLM knows what it has loaded and
computed.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from operator import ge
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from evollm.checkpoints.agent import write_adapter
from evollm.data.samples import Batch, Sample
from evollm.errors import ConfigurationError, MissingExtraError, brief
from evollm.models.adapters.adapter import AdapterState
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.fingerprints import adapter_fingerprint
from evollm.models.flops import TRAINING
from evollm.models.generation import GeneratedAnswer, Question, ending_tokens, stop_strings
from evollm.models.sampling import seed_of
from evollm.models.shared_base import SharedBase
from evollm.processes import Processes

# The ranks that an engine can be made for; an adapter of another rank takes the room of the next one.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Below the lowest one vLLM samples at another temperature than it is asked for; it refuses those above the highest.
_TEMPERATURES = (0.01, 2.0)
# Adapters that an engine computes at the same time.
_MOST_ADAPTERS = 8
# Mean difference, in nats a token, of an answer's log-probs under vLLM and under evollm's engine that is no rounding.
_MOST_DIFFERENCE = 0.5
_DTYPES = (torch.bfloat16, torch.float16)
_WITHOUT = "or leave out use_vllm"


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is made for, by vLLM's names: tokens of prompt and answer, rank, adapters, share of the GPU."""

    max_model_len: int
    max_lora_rank: int
    max_loras: int
    gpu_memory_utilization: float

    def serves(self, needed: EngineSettings) -> bool:
        """Whether an engine of these settings does where others are needed."""
        same = self.gpu_memory_utilization == needed.gpu_memory_utilization
        return same and all(map(ge, astuple(self), astuple(needed)))


class VllmEngine:
    """An engine of vLLM on a copy of a base.

    Args:
        base: The base, loaded from a name or folder.
        settings: What the engine is made for.

    Raises:
        ConfigurationError: vLLM cannot be started.
    """

    def __init__(self, base: SharedBase, settings: EngineSettings) -> None:
        # Else the engine is a process of its own that imports the user's script again, as TRL avoids, too.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        self.settings = settings
        self._vllm, self._request = import_module("vllm"), import_module("vllm.lora.request").LoRARequest
        self._numbers = count(1)
        self._folder = tempfile.TemporaryDirectory(prefix="evollm-vllm-")
        # By fingerprint, those that the last call asked for.
        self._requests: dict[str, Any] = {}
        try:
            self._llm = self._vllm.LLM(
                model=base.name,
                revision=base.model_config.get("revision"),
                dtype=str(base.network.dtype).removeprefix("torch."),
                # Token ids go in and come out, and only what a question says counts.
                skip_tokenizer_init=True,
                generation_config="vllm",
                enable_lora=True,
                # Of the distribution that is sampled, after the temperature.
                logprobs_mode="processed_logprobs",
                **asdict(settings),
            )
        except (RuntimeError, ValueError, NotImplementedError, OSError) as error:
            memory = f"vllm_gpu_memory_utilization={settings.gpu_memory_utilization}"
            fix = (
                f"vLLM cannot serve {base.name}: {brief(str(error))}; if it is the memory, change {memory}, {_WITHOUT}"
            )
            raise ConfigurationError("use_vllm", True, fix) from error

    def answers(
        self, base: SharedBase, questions: Sequence[Question], ends: Sequence[int], max_new_tokens: int
    ) -> tuple[list[GeneratedAnswer], list[float]]:
        """Answers, and for each the mean log-prob of its tokens."""
        requests = self._requests_of(base, [str(question.adapter) for question in questions])
        outputs = self._llm.generate(
            [{"prompt_token_ids": question.prompt.tolist()} for question in questions],
            [
                self._vllm.SamplingParams(
                    temperature=float(question.temperature),
                    seed=seed_of(question.key),
                    max_tokens=max_new_tokens,
                    stop_token_ids=list(ends),
                    ignore_eos=True,
                    detokenize=False,
                    logprobs=0,
                )
                for question in questions
            ],
            lora_request=requests,
            use_tqdm=False,
        )
        found, means = [], []
        for output in outputs:
            (one,) = output.outputs
            found.append(GeneratedAnswer(np.array(one.token_ids, dtype=np.int64), one.finish_reason == "stop"))
            means.append(
                float(np.mean([of[token].logprob for token, of in zip(one.token_ids, one.logprobs, strict=True)]))
            )
        return found, means

    def close(self) -> None:
        """Free its memory."""
        self._llm.llm_engine.engine_core.shutdown()
        self._folder.cleanup()

    def _requests_of(self, base: SharedBase, adapters: Sequence[str]) -> list[Any]:
        """The request of each adapter, a new one for weights that vLLM has not got."""
        before, self._requests = self._requests, {}
        prints = {}
        for name in dict.fromkeys(adapters):
            state = base.adapters.export(name)
            key = prints[name] = adapter_fingerprint(state.config, state.tensors)
            if key not in self._requests:
                self._requests[key] = before.get(key) or self._written(base, state)
        for key in before.keys() - self._requests.keys():
            shutil.rmtree(before[key].lora_path)
        return [self._requests[prints[name]] for name in adapters]

    def _written(self, base: SharedBase, state: AdapterState) -> Any:
        number = next(self._numbers)
        folder = Path(self._folder.name, str(number))
        write_adapter(folder, state, base.name)
        return self._request(f"evollm-{number}", number, str(folder))


_ENGINES: weakref.WeakKeyDictionary[SharedBase, VllmEngine] = weakref.WeakKeyDictionary()


def vllm_answers_to(
    base: SharedBase,
    questions: Sequence[Question],
    tokenizer: Any,
    max_new_tokens: int,
    *,
    longest: int,
    gpu_memory_utilization: float,
) -> list[GeneratedAnswer]:
    """Sampled answers as of `evollm.models.generation.answers_to`, by vLLM, whose random numbers are others.

    An answer is a function of its key, the logits, and the rounding of whatever else vLLM computes at the time.

    Args:
        base: The base, after `check_vllm`; the engine is made at the first call for it, and anew where it does not fit.
        questions: What to answer, each under an adapter.
        tokenizer: Its EOS ends an answer, and so do the tokens of the base's `generation_config`.
        max_new_tokens: Length limit of an answer, in tokens.
        longest: Most tokens of a prompt and its answer, in this call and in later ones.
        gpu_memory_utilization: The share of the GPU's memory that vLLM takes.

    Raises:
        ConfigurationError: vLLM cannot be started, does not sample at a temperature, or computes something else than
            the base and its adapters in this process.
    """
    low, high = _TEMPERATURES
    for question in questions:
        if not low <= question.temperature <= high:
            fix = f"vLLM samples at {low} to {high}: keep within, where it evolves, too, {_WITHOUT}"
            raise ConfigurationError("temperature", question.temperature, fix)
    adapters = {str(question.adapter) for question in questions}
    rank = max(_highest_rank(base.adapters.config(name)) for name in adapters)
    settings = EngineSettings(
        longest,
        next(one for one in _RANKS if one >= rank),
        min(len(adapters), _MOST_ADAPTERS),
        gpu_memory_utilization,
    )
    with _generators_as_they_are(base.device):
        engine = _ENGINES.get(base)
        if engine is None or not engine.settings.serves(settings):
            # Its memory has to be free before there is another one.
            if engine is not None:
                _ENGINES.pop(base).close()
            engine = _ENGINES[base] = VllmEngine(base, settings)
        found, means = engine.answers(base, questions, ending_tokens(base, tokenizer), max_new_tokens)
    _compare(base, questions, found, means)
    return found


def _compare(
    base: SharedBase, questions: Sequence[Question], answers: Sequence[GeneratedAnswer], means: Sequence[float]
) -> None:
    """Compare the log-probs of one answer of each adapter with those of evollm's engine.

    Raises:
        ConfigurationError: They differ by more than rounding.
    """
    first = {question.adapter: number for number, question in reversed(list(enumerate(questions)))}
    for adapter, number in first.items():
        question, answer = questions[number], answers[number]
        batch = Batch([Sample.of(question.prompt, answer.ids)])
        options = PassOptions(temperature=question.temperature)
        (own,) = Engine.of(base).logprobs([Item(adapter, batch)], options, TRAINING)
        mean = float(own.values.double().mean())
        # Weights that are not finite are for the step to notice.
        if math.isfinite(mean) and not abs(mean - means[number]) <= _MOST_DIFFERENCE:
            by = f"{abs(mean - means[number]):.2f} nats a token"
            what = f"its log-probs of an answer differ by {by} from those of the base here"
            fix = f"{what}: save the base as it is to a folder and load it from there, {_WITHOUT}"
            raise ConfigurationError("use_vllm", True, fix)


def check_vllm(base: SharedBase, adapters: Sequence[str]) -> None:
    """Refuse what vLLM cannot serve.

    Raises:
        ConfigurationError: The base or an adapter; the message names the setting.
        MissingExtraError: vLLM is not installed.
    """
    network = base.network
    for is_wrong, fix in (
        # vLLM takes the first one.
        (
            base.device.type != "cuda" or bool(base.device.index),
            f"needs a base on the first CUDA GPU that is visible, and this one is on {base.device}",
        ),
        (Processes.present().size > 1, "works in one process"),
        (not base.name or base.archive is not None, "loads the base by itself: save it to a folder and name that"),
        (
            getattr(network, "is_quantized", False),
            "would serve another base than the quantised one: load it in bfloat16",
        ),
        (network.dtype not in _DTYPES, f"serves bfloat16 or float16, and the base is in {network.dtype}: load it so"),
        (bool(stop_strings(base)), "gets token ids: remove stop_strings from the base's generation_config"),
    ):
        if is_wrong:
            raise ConfigurationError("use_vllm", True, f"{fix}, {_WITHOUT}")
    for config in map(base.adapters.config, adapters):
        for option in ("use_dora", "lora_bias", "use_qalora", "target_parameters", "fan_in_fan_out"):
            if value := getattr(config, option, None):
                fix = f"vLLM does not serve such adapters: leave it out, {_WITHOUT}"
                raise ConfigurationError(f"lora_config.{option}", value, fix)
        if (rank := _highest_rank(config)) > _RANKS[-1]:
            fix = f"vLLM serves ranks up to {_RANKS[-1]}: lower it, {_WITHOUT}"
            raise ConfigurationError("lora_config.r", rank, fix)
    if find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm", "use_vllm=True")


def _highest_rank(config: LoraConfig) -> int:
    """The highest rank of an adapter's modules."""
    return max(config.r, *config.rank_pattern.values()) if config.rank_pattern else int(config.r)


@contextmanager
def _generators_as_they_are(device: torch.device) -> Iterator[None]:
    """Leave the global random generators as they are, which an engine in this process seeds and draws from."""
    python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
