"""Prompts of different lengths are answered in one call where that is right for the model, and are not elsewhere."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import ROTARY, VOCABULARY, make_family
from members import make_agents
from models.test_engine import TARGETS
from transformers import AutoModelForCausalLM, JambaConfig, RwkvConfig

from evollm import DPO
from evollm.models.calls import ALONE, Room, divided
from evollm.models.engine import Engine
from evollm.models.generation import Question, answers_to
from evollm.models.padding import PADDED, AnswerWays

pytestmark = pytest.mark.usefixtures("every_probe")
HYBRID: dict[str, Any] = {name: value for name, value in ROTARY.items() if name != "head_dim"}
OTHERS = {
    "jamba": lambda: JambaConfig(**HYBRID, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, num_experts=4),
    "rwkv": lambda: RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=256),
}
MODULES: dict[str, Any] = {**TARGETS, "t5": ["q", "v"], "rwkv": ["key", "value"]}
NO_END = SimpleNamespace(eos_token_id=None)
LIMIT = 8


def make_model(name: str) -> Any:
    if name not in OTHERS:
        return make_family(name)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[name]()).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 3
    return model


def asked_of(agents: list[DPO], lengths: tuple[int, ...] = (3, 30, 9, 41)) -> list[Question]:
    """Greedy questions and samples of the base and of each agent, which are not asked the same."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, VOCABULARY, size=size) for size in lengths]
    return [
        Question(adapter, prompt, temperature, (row,))
        for number, adapter in enumerate([None, *(agent.actor_adapter for agent in agents)])
        for row, prompt in enumerate(prompts[number % 2 :])
        for temperature in (0.0, 1.0)
    ]


def answers(agents: list[DPO], asked: list[Question], monkeypatch: Any) -> tuple[list[Any], list[tuple[int, int]]]:
    """Token ids of the answers, and rows and columns of each call of `generate` that gives them."""
    base, calls = agents[0].base, []
    own = base.network.generate

    def generate(**inputs: Any) -> Any:
        if not inputs.get("return_dict_in_generate"):  # not the trial
            calls.append(tuple(inputs["input_ids"].shape))
        return own(**inputs)

    with monkeypatch.context() as patched:
        patched.setattr(base.network, "generate", generate)
        found = answers_to(base, asked, NO_END, LIMIT)
    return [answer.ids.tolist() for answer in found], calls


def alone(agents: list[DPO], asked: list[Question]) -> list[Any]:
    return [answers_to(agents[0].base, [question], NO_END, LIMIT)[0].ids.tolist() for question in asked]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "t5", "jamba"])
def test_prompts_of_different_lengths_answer_together_what_each_answers_alone(family: str, monkeypatch) -> None:
    agents = make_agents(make_model(family), [{"rank": 4, "alpha": 8}, {"rank": 2, "alpha": 16}], MODULES.get(family))
    asked = asked_of(agents)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?!.*only prompts of one length)")
        found, calls = answers(agents, asked, monkeypatch)
    assert found == alone(agents, asked)
    assert len({tuple(ids) for ids in found}) > len(asked) / 4
    # Greedy and sampled, of the base and of the members, which share a pass or not.
    assert len(calls) <= 6


def with_fault(model: Any, fault: str) -> Any:
    """A model's `forward` with a fault.

    The mask is ignored, always or in the passes of one token; or positions are counted from the first column.
    """
    own = model.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        mask = inputs.get("attention_mask")
        first = inputs.get("input_ids") is None or inputs["input_ids"].shape[1] > 1
        if mask is not None and (fault == "mask" or (fault == "cache" and not first)):
            inputs["attention_mask"] = torch.ones_like(mask)
        if mask is not None and fault == "positions":
            count = inputs["input_ids"].shape[1]
            inputs["position_ids"] = torch.arange(mask.shape[1] - count, mask.shape[1]).expand(len(mask), -1)
        return own(*args, **inputs)

    return forward


@pytest.mark.parametrize(("family", "fault"), [("llama", "mask"), ("llama", "cache"), ("t5", "mask")])
def test_a_fault_with_padding_is_found(family: str, fault: str, monkeypatch) -> None:
    model = make_family(family)
    agents = make_agents(model, [{"rank": 4, "alpha": 8}], MODULES.get(family))
    names, engine = [agents[0].actor_adapter], Engine.of(agents[0].base)
    engine.prepare(names, 40)
    monkeypatch.setattr(model, "forward", with_fault(model, fault))
    with pytest.warns(UserWarning, match="only prompts of one length are answered together"):
        assert not engine.answers(PADDED, names, 40)
    monkeypatch.undo()
    # Kept, as every verdict is for the rest of a run.
    assert not engine.answers(PADDED, names, 40)
    engine.begin(names[0])
    assert engine.answers(PADDED, names, 40)


def test_a_model_that_counts_padding_answers_one_length_at_a_time(monkeypatch) -> None:
    model = make_family("gpt2")
    agents = make_agents(model, [{"rank": 4, "alpha": 8}, {"rank": 4, "alpha": 16}], MODULES["gpt2"])
    asked = asked_of(agents)
    Engine.of(agents[0].base).prepare([agent.actor_adapter for agent in agents], 41 + LIMIT)
    monkeypatch.setattr(model, "forward", with_fault(model, "positions"))
    with pytest.warns(UserWarning, match="only prompts of one length are answered together"):
        found, calls = answers(agents, asked, monkeypatch)
    assert found == alone(agents, asked)
    assert {width for _, width in calls} == {3, 9, 30, 41}
    assert {rows for rows, _ in calls} == {1, 2}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_whose_batches_answer_wrongly_answers_one_prompt_at_a_time(monkeypatch) -> None:
    """RWKV's state of several sequences is wrong from the second token on, whatever the lengths of their prompts."""
    agents = make_agents(make_model("rwkv"), [{"rank": 4, "alpha": 8}], MODULES["rwkv"])
    asked = asked_of(agents, (9, 9))
    with pytest.warns(UserWarning, match="prompts are answered one by one"):
        found, calls = answers(agents, asked, monkeypatch)
    assert found == alone(agents, asked)
    assert {rows for rows, _ in calls} == {1}


def test_wrong_adapters_of_rows_are_found(monkeypatch) -> None:
    agents = make_agents(make_family("llama"), [{"rank": 4, "alpha": 8}])
    names, engine = [agents[0].actor_adapter], Engine.of(agents[0].base)
    engine.prepare(names, 40)
    routed = agents[0].base.routed
    stack = agents[0].base.adapters.stack
    monkeypatch.setattr(agents[0].base, "routed", lambda members: routed(stack(members.names[::-1])))
    with pytest.warns(UserWarning, match="only prompts of one length are answered together"):
        assert not engine.answers(PADDED, names, 40)


@pytest.mark.parametrize(
    ("settings", "pads"),
    [({"repetition_penalty": 5.0}, True), ({"no_repeat_ngram_size": 2}, False), ({"min_length": 9}, False)],
)
def test_settings_that_look_at_prompts_do_not_see_padding(settings, pads: bool, monkeypatch) -> None:
    agents = make_agents(make_family("llama"), [{"rank": 4, "alpha": 8}])
    agents[0].base.network.generation_config.update(**settings)
    asked = [question for question in asked_of(agents) if question.temperature == 0]
    found, calls = answers(agents, asked, monkeypatch)
    assert found == alone(agents, asked)
    assert (len(calls) <= 4) is pads


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True, "output_logits": True},
        {"do_sample": True, "num_return_sequences": 3, "num_beams": 3},
        {"max_time": 1e-9, "max_length": 12},
        {"prompt_lookup_num_tokens": 3},
        {"dola_layers": "high"},
        {"force_words_ids": [[5]]},
    ],
)
def test_what_a_base_asks_of_generate_beside_logits_and_ends_does_not_count(settings, monkeypatch, caplog) -> None:
    """Ways to decode, limits and outputs, which would fail or cut answers without a word."""
    agents = make_agents(make_family("llama"), [{"rank": 4, "alpha": 8}])
    asked = asked_of(agents)
    expected, calls = answers(agents, asked, monkeypatch)
    Engine.of(agents[0].base).begin(agents[0].actor_adapter)
    for name, value in settings.items():
        setattr(agents[0].base.network.generation_config, name, value)
    assert answers(agents, asked, monkeypatch) == (expected, calls)
    assert "seem to have been set" not in caplog.text


def test_a_penalty_of_length_that_needs_an_end_does_not_stop_padding(monkeypatch) -> None:
    agents = make_agents(make_family("llama"), [{"rank": 4, "alpha": 8}])
    asked = [question for question in asked_of(agents) if question.temperature == 0]
    config = agents[0].base.network.generation_config
    config.update(eos_token_id=7, exponential_decay_length_penalty=(2, 1.5))
    found, calls = answers(agents, asked, monkeypatch)
    assert found == alone(agents, asked)
    assert any(len(ids) < LIMIT for ids in found)
    assert len(calls) <= 4


def test_answers_with_ends_are_the_same_and_verdicts_are_kept(monkeypatch) -> None:
    agents = make_agents(make_family("llama"), [{"rank": 4, "alpha": 8}])
    engine, asked = Engine.of(agents[0].base), asked_of(agents)
    agents[0].base.network.generation_config.eos_token_id = list(range(0, VOCABULARY, 9))
    found, _ = answers(agents, asked, monkeypatch)
    assert found == alone(agents, asked)
    assert len({*map(len, found)}) > 2
    # With the verdict that a checkpoint holds, whatever a new trial would say.
    state = engine.state_dict()
    (verdict,) = state["answers"]
    assert verdict[0] == PADDED
    assert verdict[2:] == [64, ""]
    with pytest.warns(UserWarning, match="once found"):
        engine.load_state_dict({**state, "answers": [[*verdict[:3], "only prompts of one length (once found)"]]})
    found, calls = answers(agents, asked, monkeypatch)
    assert found == alone(agents, asked)
    assert {width for _, width in calls} == {3, 9, 30, 41}
    for damaged in (1, [1], [["", "", 64, ""]], [[PADDED, 1, 64, ""]], [[PADDED, "", "64", ""]], [[PADDED, "", 64, 1]]):
        with pytest.raises((TypeError, ValueError)):
            AnswerWays.from_state(agents[0].base, damaged)


def rows_of(room: Room, asked: dict[str, list[int]], lengths: list[int]) -> list[dict[str, list[int]]]:
    return list(divided(asked, lengths, 10, room))


def test_calls_have_a_bound_on_tokens_and_on_padding() -> None:
    rng = np.random.default_rng(0)
    for trial in range(200):
        lengths = rng.integers(1, 60, size=40).tolist()
        asked = {name: rng.permutation(40)[: rng.integers(1, 40)].tolist() for name in "abc"[: trial % 3 + 1]}
        room = Room(int(rng.integers(0, 2000)), int(rng.integers(0, 400)), bool(trial % 2))
        calls = rows_of(room, asked, lengths)
        for name, own in asked.items():
            answered = [row for call in calls for row in call.get(name, [])]
            assert sorted(answered) == sorted(own)
            assert [lengths[row] for row in answered] == sorted((lengths[row] for row in own), reverse=True)
        for call in calls:
            every = [lengths[row] for own in call.values() for row in own]
            rows = len(call) * max(map(len, call.values()))
            assert rows == 1 or rows * (max(every) + 10) <= room.tokens
            assert sum(max(every) - length for length in every) <= room.padding
            assert len(call) == 1 or room.stacking


def test_calls_are_as_few_as_their_bounds_allow() -> None:
    lengths, every = [3, 5, 3, 7, 3], list(range(5))
    assert rows_of(ALONE, {"a": [0, 1], "b": [1]}, lengths) == [{"a": [1]}, {"b": [1]}, {"a": [0]}]
    both, sorted_ones = {"a": every, "b": every}, [3, 1, 0, 2, 4]
    assert rows_of(Room(1000, 1000, True), both, lengths) == [{"a": sorted_ones, "b": sorted_ones}]
    parts = [[3], [1], [0, 2, 4]]
    assert rows_of(Room(1000, 0, True), both, lengths) == [{"a": part, "b": part} for part in parts]
    # Two tokens for each member to pad 5 to 7, and none left for the next length.
    parts = [[3, 1], [0, 2, 4]]
    assert rows_of(Room(1000, 5, True), both, lengths) == [{"a": part, "b": part} for part in parts]
