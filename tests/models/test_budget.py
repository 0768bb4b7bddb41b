"""How much goes into a pass, and whether activations are recomputed, where the user does not say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_family
from peft import LoraConfig

from evollm import DPO, SFT
from evollm.data.samples import Batch, Sample
from evollm.errors import CheckpointError
from evollm.models import attention, budget, layers, slow_settings
from evollm.models.budget import count_saved_bytes, should_recompute
from evollm.models.engine import Engine
from evollm.models.fast_paths import FastPaths
from evollm.models.slow_settings import needless_checkpointing, slow_compile_mode, slow_dtype
from evollm.processes import Processes

MUCH, LITTLE = 2**40, 2**20
TARGETS = {"t5": ["q", "wo"], "bart": ["q_proj", "fc2"]}


def make_batch(shape: tuple[int, int, int] = (9, 5, 3)) -> Batch:
    rng = np.random.default_rng(0)
    return Batch([Sample.of(*(rng.integers(VOCABULARY, size=size) for size in shape)) for _ in range(4)])


def make_agent(family: str = "llama", algorithm: Any = DPO, **settings: Any) -> Any:
    targets = TARGETS.get(family, ["q_proj", "v_proj"])
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return algorithm(actor_network=make_family(family), lora_config=lora, lr=1e-3, **settings)


@pytest.fixture
def recomputed(monkeypatch) -> list[int]:
    """One entry for each layer that was checkpointed."""
    calls, plain = [], layers.checkpoint
    monkeypatch.setattr(layers, "checkpoint", lambda *args, **settings: calls.append(1) or plain(*args, **settings))
    return calls


@pytest.fixture
def free(monkeypatch):
    """Set the bytes that seem to be free."""
    return lambda amount: monkeypatch.setattr(budget, "_free_memory", lambda device: amount)


@pytest.mark.parametrize(
    ("affordable", "on_a_cpu", "on_a_card"),
    # A card of 80 GB affords 5525 tokens of a model of 7B: three members with 8 pairs of 210 tokens, not two.
    [
        (0, 256, 256),
        (1000, 512, 512),
        (1024, 1024, 1024),
        (5525, 1024, 5120),
        (14_299, 1024, 13_312),
        (10**6, 1024, 16_384),
    ],
)
def test_a_budget_on_a_card_is_a_multiple_of_1024_and_on_a_cpu_a_power_of_two(
    affordable: int, on_a_cpu: int, on_a_card: int
) -> None:
    assert budget.tokens_in_flight(affordable, "cpu", training=True) == on_a_cpu
    assert budget.tokens_in_flight(affordable, "cuda", training=True) == on_a_card


def test_a_head_in_tiles_leaves_less_memory_to_the_activations_of_a_card(monkeypatch, free) -> None:
    free(2**30)
    base = make_agent().base
    tokens = [budget.affordable_tokens(base, 1000.0, tiled=True)]
    monkeypatch.setattr(budget, "extra_bytes", lambda device: 2**29)
    tokens += [budget.affordable_tokens(base, 1000.0, tiled=True)]
    assert tokens[1] == pytest.approx(tokens[0] / 2, rel=0.01)
    monkeypatch.setattr(budget, "extra_bytes", lambda device: 2**31)
    assert budget.affordable_tokens(base, 1000.0, tiled=True) == 0


@pytest.mark.parametrize(
    ("affordable", "device", "token_budget", "longest", "recompute"),
    [
        # A quarter of what is enough there.
        (256, "cpu", None, 100, False),
        (255, "cpu", None, 100, True),
        (4096, "cuda", None, 100, False),
        (4095, "cuda", None, 100, True),
        # A pair is not divided.
        (4096, "cuda", None, 4097, True),
        # As many as the user wants in a pass.
        (4096, "cuda", 8192, 100, True),
        (64, "cuda", 32, 64, False),
    ],
)
def test_activations_are_recomputed_where_memory_does_not_hold_enough_of_them(
    affordable: int, device: str, token_budget: int | None, longest: int, recompute: bool
) -> None:
    assert should_recompute(affordable, device, token_budget, longest) is recompute


def test_a_remark_on_a_slow_setting_names_the_fix_and_is_for_cards_alone() -> None:
    assert slow_dtype("cuda", torch.float32).endswith("load it with dtype='bfloat16'")
    assert "float64" in slow_dtype("cuda", torch.float64)
    assert [slow_dtype("cuda", dtype) for dtype in (torch.bfloat16, torch.float16)] == ["", ""]
    assert slow_compile_mode("cuda", "reduce-overhead").endswith("use 'default'")
    assert slow_compile_mode("cuda", "max-autotune").endswith("use 'max-autotune-no-cudagraphs'")
    assert [slow_compile_mode("cuda", mode) for mode in ("default", "max-autotune-no-cudagraphs")] == ["", ""]
    assert "9000 tokens fit into what is free, and 4096 are enough" in needless_checkpointing("cuda", 9000, None, 50)
    assert needless_checkpointing("cuda", 4095, None, 50) == ""
    on_a_cpu = (
        slow_dtype("cpu", torch.float32),
        slow_compile_mode("cpu", "max-autotune"),
        needless_checkpointing("cpu", 9000, None, 50),
    )
    assert on_a_cpu == ("", "", "")


@pytest.mark.filterwarnings("ignore:the base. all logits are computed at once:UserWarning")
@pytest.mark.parametrize("algorithm", [DPO, SFT])
@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_a_base_recomputes_only_where_memory_is_short_and_learns_the_same_bits(
    family: str, algorithm, recomputed, free
) -> None:
    results = []
    for amount in (MUCH, LITTLE):
        free(amount)
        recomputed.clear()
        agent = make_agent(family, algorithm)
        metrics = [agent.learn(make_batch()) for _ in range(3)]
        assert (len(recomputed) > 0) is (amount == LITTLE)
        results.append((metrics, [p.detach() for p in agent.actor_parameters()]))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("asked", [False, True])
def test_who_says_whether_to_recompute_is_obeyed(asked: bool, recomputed, free) -> None:
    free(LITTLE if asked is False else MUCH)
    agent = make_agent(gradient_checkpointing=asked)
    agent.learn(make_batch())
    assert (len(recomputed) > 0) is asked
    assert Engine.of(agent.base).state_dict()["affordable"] == []


def test_sequences_that_go_by_themselves_recompute_where_memory_is_short(recomputed, free) -> None:
    alone = FastPaths(False, False, False, 64, explicit_positions=False, implicit_positions=False)
    for amount in (MUCH, LITTLE):
        free(amount)
        recomputed.clear()
        agent = make_agent()
        Engine.of(agent.base).prepare = lambda members, length: alone  # type: ignore
        agent.learn(make_batch())
        assert (len(recomputed) > 0) is (amount == LITTLE)


def test_a_pair_that_memory_has_no_room_for_is_recomputed_when_it_comes(recomputed, free) -> None:
    agent = make_agent(token_budget=64)
    free(2**22)
    agent.learn(make_batch())
    assert not recomputed
    ((_, room),) = Engine.of(agent.base).state_dict()["affordable"]
    assert 64 < room < 200
    # Whatever is free now.
    free(MUCH)
    agent.learn(make_batch((room, 5, 3)))
    assert recomputed


def test_evaluations_decide_nothing(free) -> None:
    agent = make_agent()
    agent.learn(make_batch(), training=False)
    assert Engine.of(agent.base).state_dict()["affordable"] == []


def test_a_resumed_run_decides_as_it_did_whatever_memory_is_free(recomputed, free) -> None:
    free(LITTLE)
    first = make_agent()
    first.learn(make_batch())
    state = json.loads(json.dumps(Engine.of(first.base).state_dict()))
    free(MUCH)
    resumed = make_agent()
    Engine.of(resumed.base).load_state_dict(state)
    recomputed.clear()
    resumed.learn(make_batch())
    assert recomputed
    # A run begins with nothing.
    Engine.of(resumed.base).begin(resumed.actor_adapter)
    recomputed.clear()
    resumed.learn(make_batch())
    assert not recomputed


def test_a_state_without_or_with_damaged_room_is_read_or_refused() -> None:
    engine = Engine.of(make_agent().base)
    state = engine.state_dict()
    engine.load_state_dict({name: part for name, part in state.items() if name != "affordable"})
    for damaged in ([[1, 5]], [[True, "5"]], [[True, -1]], [[True]], 5):
        with pytest.raises(CheckpointError):
            engine.load_state_dict(state | {"affordable": damaged})


def test_all_processes_decide_by_the_one_that_has_least(monkeypatch, recomputed, free) -> None:
    free(MUCH)
    monkeypatch.setattr(Processes, "smallest", lambda self, value: min(value, 255))
    agent = make_agent()
    agent.learn(make_batch())
    assert recomputed


def test_bytes_are_counted_alike_whether_or_not_they_are_kept(free) -> None:
    totals = []
    for keep in (True, False):
        agent = make_agent()
        engine, options = Engine.of(agent.base), agent.pass_options
        engine.prepare([agent.actor_adapter], 20)
        with count_saved_bytes(keep=keep) as saved, agent.base.active(agent.actor_adapter) as network:
            network(torch.arange(60).view(2, 30)).logits.sum()
        totals.append(saved.total)
    assert options.gradient_checkpointing is None
    assert totals[0] == pytest.approx(totals[1], rel=0.02)


def test_a_card_that_has_the_memory_is_not_left_to_recompute_in_silence(monkeypatch, free) -> None:
    monkeypatch.setattr(slow_settings, "_CARDS", ("cpu",))
    free(MUCH)
    agent, same = make_agent(gradient_checkpointing=True), r"memory does not need it .*tokens fit.*leave it out"
    with pytest.warns(UserWarning, match=same) as caught:
        agent.learn(make_batch())
    assert ["float64 base on a card" in str(warning.message) for warning in caught] == [True, False]
    # Each once for a base: a warning is an error here.
    agent.learn(make_batch())
    free(LITTLE)
    agent = make_agent(gradient_checkpointing=True)
    with pytest.warns(UserWarning, match="float64 base on a card") as caught:
        agent.learn(make_batch())
    assert len(caught) == 1


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_wide_base_on_a_card_is_said_to_be_one_once_whichever_way_attention_goes(family: str, monkeypatch) -> None:
    monkeypatch.setattr(slow_settings, "_CARDS", ("cpu",))
    monkeypatch.setattr(attention, "SLOW_WITHOUT_FLASH", ("cpu",))
    monkeypatch.setattr(attention, "why_not_flash", lambda *_: "it takes bfloat16")
    attention._warn_of_slow_attention.cache_clear()
    agent = make_agent(family)
    with pytest.warns(UserWarning, match="load it with dtype='bfloat16'") as caught:
        agent.learn(make_batch())
    assert len(caught) == 1
    agent.learn(make_batch())


def test_a_compile_mode_for_fixed_shapes_is_said_to_be_one_once(monkeypatch) -> None:
    monkeypatch.setattr(slow_settings, "_CARDS", ("cpu",))
    model = make_family("llama")
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="torch_compiler='reduce-overhead' records"):
        DPO(actor_network=model, lora_config=lora, torch_compiler="reduce-overhead")
    # A warning is an error here.
    DPO(actor_network=model, lora_config=lora, torch_compiler="reduce-overhead")


@pytest.mark.parametrize("value", [None, True, False])
def test_a_checkpoint_keeps_who_decides(value: bool | None, tmp_path) -> None:
    model = make_family("llama")
    agent = DPO(actor_network=model, gradient_checkpointing=value)
    agent.save_checkpoint(str(tmp_path / "agent"))
    loaded = DPO.load(str(tmp_path / "agent"), actor_network=model)
    assert loaded.settings.gradient_checkpointing is value
