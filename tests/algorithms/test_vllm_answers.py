"""Answers by vLLM where it is installed (`make test-vllm`, on a CPU), by a stand-in elsewhere.

The stand-in has the signatures of vLLM 0.32 and computes with transformers and PEFT what it reads from the folders.
"""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import make_rows
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from evollm import GRPO, ConfigurationError, MissingExtraError, RewardGym, finetune_llm_reasoning
from evollm.algorithms import vllm_answers
from evollm.algorithms.vllm_answers import check_vllm
from evollm.models.generation import Question, ending_tokens

INSTALLED = find_spec("vllm") is not None
SETTINGS = {"gpu_memory_utilization": 0.3, "longest": 100}


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class SamplingParams:
    temperature: float
    seed: int
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool
    logprobs: int


class LLM:
    """As vLLM does, it seeds the global generators, reads an adapter once, and knows it by its number from then on."""

    def __init__(self, model: str, **_: Any) -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        self.base = AutoModelForCausalLM.from_pretrained(model)
        self.known: dict[int, Any] = {}
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.known.clear))

    def generate(
        self, prompts: list[Any], sampling_params: list[SamplingParams], *, use_tqdm: bool, lora_request: list[Any]
    ) -> list[Any]:
        assert not use_tqdm
        for request in lora_request:
            if request.lora_int_id not in self.known:
                own = PeftModel.from_pretrained(copy.deepcopy(self.base), request.lora_path)
                self.known[request.lora_int_id] = own
        return [self._answer(*one) for one in zip(prompts, sampling_params, lora_request, strict=True)]

    @torch.no_grad()
    def _answer(self, prompt: Any, asked: SamplingParams, lora: LoRARequest) -> Any:
        network, ids = self.known[lora.lora_int_id], list(prompt["prompt_token_ids"])
        generator, start, logprobs = torch.Generator().manual_seed(asked.seed), len(ids), []
        while len(ids) - start < asked.max_tokens and ids[-1] not in asked.stop_token_ids:
            own = (network(input_ids=torch.tensor([ids])).logits[0, -1] / asked.temperature).log_softmax(-1)
            token = int(torch.multinomial(own.exp(), 1, generator=generator))
            logprobs.append({token: SimpleNamespace(logprob=float(own[token]))})
            ids.append(token)
        reason = "stop" if ids[-1] in asked.stop_token_ids else "length"
        answer = SimpleNamespace(token_ids=ids[start:], finish_reason=reason, logprobs=logprobs)
        return SimpleNamespace(outputs=[answer])


@pytest.fixture
def engines(monkeypatch) -> list[Any]:
    """The engines that are made, with the calls of each."""
    if not INSTALLED:
        package, requests = ModuleType("vllm"), ModuleType("vllm.lora.request")
        package.LLM, package.SamplingParams, requests.LoRARequest = LLM, SamplingParams, LoRARequest  # type: ignore[attr-defined]
        for module in (package, ModuleType("vllm.lora"), requests):
            monkeypatch.setitem(sys.modules, module.__name__, module)
    # For the build for CPUs: a cache of 1 GiB, and the threads that this process has.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    package = import_module("vllm")
    made = []

    class Recorded(package.LLM):  # type: ignore[name-defined, misc]
        def __init__(self, **settings: Any) -> None:
            super().__init__(enforce_eager=True, **settings)
            self.settings, self.calls = settings, []
            made.append(self)

        def generate(self, prompts: Any, sampling_params: Any, **others: Any) -> Any:
            self.calls.append((sampling_params, others["lora_request"]))
            return super().generate(prompts, sampling_params, **others)

    monkeypatch.setattr(package, "LLM", Recorded)
    return made


@pytest.fixture
def agents(make_model, tokenizer, lora, tmp_path) -> list[GRPO]:
    """Two that differ clearly, with heads of a size that vLLM computes."""
    folder = tmp_path / "model"
    make_model(head_dim=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = GRPO.population(
        2, model_name=str(folder), lora_config=lora, lr=1e-2, group_size=3, max_completion_length=6, use_vllm=True
    )
    torch.manual_seed(0)
    for agent in made:
        change(agent)
    return made


def change(agent: GRPO) -> None:
    for parameter in agent.actor_parameters():
        parameter.data.normal_(std=0.2)


def answers_to(agent: GRPO, questions: list[Question], tokenizer: Any, **changes: Any) -> list[Any]:
    return vllm_answers.vllm_answers_to(agent.base, questions, tokenizer, 6, **{**SETTINGS, **changes})


def questions_to(agents: list[GRPO], tokenizer: Any) -> list[Question]:
    prompts = [np.array(tokenizer(row["prompt"])["input_ids"]) for row in make_rows(3)]
    return [
        Question(agent.actor_adapter, prompt, 0.5, (1, number))
        for agent in agents
        for number, prompt in enumerate(prompts)
    ]


def tokens_of(answers: list[Any]) -> list[list[int]]:
    return [one.ids.tolist() for one in answers]


@pytest.fixture
def exactly(monkeypatch) -> None:
    """The comparison of each call lets pass what float32 rounds, and nothing else."""
    monkeypatch.setattr(vllm_answers, "_MOST_DIFFERENCE", 1e-4)


def test_each_member_answers_by_its_own_adapter_with_seeds_of_the_keys(engines, exactly, agents, tokenizer) -> None:
    questions, ends = questions_to(agents, tokenizer), ending_tokens(agents[0].base, tokenizer)
    drawn = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    found = answers_to(agents[0], questions, tokenizer)
    assert [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()] == drawn
    assert tokens_of(found[:3]) != tokens_of(found[3:])
    for one in found:
        assert one.ended == (one.ids[-1] in ends)
        assert len(one.ids) == 6 or one.ended
    assert tokens_of(answers_to(agents[0], questions, tokenizer)) == tokens_of(found)
    (engine,) = engines
    parameters, requests = engine.calls[0]
    assert len({one.seed for one in parameters[:3]}) == 3
    assert [one.seed for one in parameters[:3]] == [one.seed for one in parameters[3:]]
    assert engine.settings["max_lora_rank"] == 8
    assert engine.settings["max_loras"] == 2
    # Each answers by the adapter of the other one.
    swapped = requests[3:] + requests[:3]
    with (
        mock.patch.object(vllm_answers.VllmEngine, "_requests_of", return_value=swapped),
        pytest.raises(ConfigurationError, match=r"use_vllm=True: its log-probs of an answer differ by .* nats a token"),
    ):
        answers_to(agents[0], questions, tokenizer)
    with pytest.raises(ConfigurationError, match=r"temperature=0.0: vLLM samples at 0.01 to 2.0"):
        answers_to(agents[0], [questions[0]._replace(temperature=0.0)], tokenizer)


def test_weights_that_have_changed_are_another_adapter_to_vllm_and_equal_ones_the_same(
    engines, exactly, agents, tokenizer, monkeypatch
) -> None:
    questions = questions_to(agents, tokenizer)
    first = answers_to(agents[0], questions, tokenizer)
    change(agents[1])
    second = answers_to(agents[0], questions, tokenizer)
    assert tokens_of(second[:3]) == tokens_of(first[:3])
    assert tokens_of(second[3:]) != tokens_of(first[3:])
    (engine,) = engines
    numbers = [[requests[0].lora_int_id, requests[3].lora_int_id] for _, requests in engine.calls]
    assert numbers == [[1, 2], [1, 3]]
    # Folders of weights that nobody has any more are gone.
    folders = [Path(requests[3].lora_path) for _, requests in engine.calls]
    assert [folder.exists() for folder in folders] == [False, True]
    answers_to(agents[0], questions[:3], tokenizer)
    assert len(engines) == 1
    # Longer prompts need another engine, here one that computes one adapter at a time.
    monkeypatch.setattr(vllm_answers, "_MOST_ADAPTERS", 1)
    answers_to(agents[0], questions, tokenizer, longest=200)
    assert [one.settings["max_model_len"] for one in engines] == [100, 200]
    assert not folders[1].exists()


def test_a_population_learns_from_answers_of_vllm(engines, agents, tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("evollm.algorithms.grpo.check_vllm", lambda base, adapters: None)
    asked = []

    def brevity(completions: list[str]) -> list[float]:
        asked.append(len(completions))
        return [-float(len(one)) for one in completions]

    prompts = [{"prompt": row["prompt"]} for row in make_rows(8)]
    env = RewardGym(prompts[:6], prompts[6:], tokenizer, brevity, data_batch_size_per_gpu=3)
    before = [[one.clone() for one in agent.actor_parameters()] for agent in agents]
    trained, _ = finetune_llm_reasoning(
        agents, env, max_steps=2, run_dir=tmp_path / "run", num_sample_answers=0, verbose=False
    )
    (engine,) = engines
    # Evaluations are transformers', so that scores can be compared.
    assert len(engine.calls) == 2
    assert asked.count(2 * 3 * 3) == 2
    assert engine.settings["max_model_len"] == env.longest_sequence + 6
    for agent, own in zip(trained, before, strict=True):
        assert not all(map(torch.equal, agent.actor_parameters(), own))


def test_another_model_than_the_one_that_is_trained_is_noticed(engines, agents, tokenizer) -> None:
    questions = questions_to(agents, tokenizer)
    answers_to(agents[0], questions, tokenizer)
    agents[0].base.network.lm_head.weight.data.mul_(-1)
    with pytest.raises(
        ConfigurationError, match=r"use_vllm=True: its log-probs of an answer differ by .* nats a token"
    ):
        answers_to(agents[0], questions, tokenizer)


def test_what_vllm_cannot_serve_is_refused_before_the_run(make_model, lora, tokenizer, tmp_path, monkeypatch) -> None:
    env = RewardGym([{"prompt": "One:"}, {"prompt": "Two:"}], None, tokenizer, zeros, data_batch_size_per_gpu=2)
    agents = GRPO.population(2, actor_network=make_model(), lora_config=lora, use_vllm=True, max_completion_length=6)
    with pytest.raises(ConfigurationError, match=r"use_vllm=True: needs a base on .* CUDA GPU.* or leave out use_vllm"):
        finetune_llm_reasoning(agents, env, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for value in (0, 1.0, "half"):
        with pytest.raises(ConfigurationError, match="vllm_gpu_memory_utilization="):
            GRPO(actor_network=make_model(), lora_config=lora, vllm_gpu_memory_utilization=value)

    def base_with(config: LoraConfig = lora, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
        network = SimpleNamespace(
            dtype=dtype, generation_config=SimpleNamespace(stop_strings=changes.pop("stops", None))
        )
        network.is_quantized = changes.pop("is_quantized", False)
        found = {"device": torch.device("cuda", 0), "name": "a-model", "archive": None, "network": network}
        return SimpleNamespace(**{**found, **changes}, adapters=SimpleNamespace(config=lambda name: config))

    for base, said in [
        (base_with(device=torch.device("cuda", 1)), "first CUDA GPU that is visible, and this one is on cuda:1"),
        (base_with(name=""), "save it to a folder"),
        (base_with(archive="a.tar"), "save it to a folder"),
        (base_with(dtype=torch.float32), "bfloat16 or float16"),
        (base_with(is_quantized=True), "quantised"),
        (base_with(stops=["\n"]), "remove stop_strings"),
        (base_with(LoraConfig(use_dora=True)), r"lora_config.use_dora=True: vLLM does not serve"),
        (base_with(LoraConfig(r=600)), r"lora_config.r=600: vLLM serves ranks up to 512"),
        (base_with(LoraConfig(rank_pattern={"q_proj": 513})), r"lora_config.r=513"),
    ]:
        with pytest.raises(ConfigurationError, match=said):
            check_vllm(base, ["actor"])
    monkeypatch.setattr(vllm_answers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'use_vllm=True needs the package vllm: pip install "evollm\[vllm\]"'):
        check_vllm(base_with(), ["actor"])
    monkeypatch.setattr(vllm_answers, "find_spec", lambda name: True)
    check_vllm(base_with(), ["actor"])


def zeros(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)
