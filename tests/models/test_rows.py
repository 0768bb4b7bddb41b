"""Adapters lie in rows, and the members of a pass in one matrix, whatever happens to them and to the model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import make_family
from peft import LoraConfig, PeftModel
from row_members import ALIKE, check_rows, make_agents, make_batch
from snapshots import actor_bits, adapter_bits, states_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evollm import DPO, CheckpointError
from evollm.algorithms.dpo_step import learn_together, logratios_together
from evollm.models.adapters.rows import Row, RowLayout, clip_gradient
from evollm.models.adapters.stack import Stack
from evollm.models.engine import Engine
from evollm.models.fast_paths import FastPaths

EXACT = {"rtol": 0.0, "atol": 1e-10}


def test_parameters_stay_views_through_training_cloning_loading_and_releasing(tmp_path) -> None:
    agents = make_agents(make_family("llama"), ALIKE)
    parameters = [agent.actor_parameters() for agent in agents]
    assert check_rows(agents) is None
    learn_together(agents, make_batch())
    together = check_rows(agents)
    assert together is not None
    assert all(a is b for a, b in zip(parameters[1], agents[1].actor_parameters(), strict=True))
    # The same members, and some of them that stand side by side, move nothing.
    learn_together(agents, make_batch(1))
    learn_together(agents[1:3], make_batch(1))
    assert check_rows(agents).data_ptr() == together.data_ptr()

    agents[3].release()
    agents[3] = agents[0].clone(index=3)
    agents[1].save_checkpoint(str(tmp_path / "agent"))
    agents[2].load_checkpoint(str(tmp_path / "agent"))
    agents[2].set_reference_policy(1)
    assert actor_bits(agents[1]) == actor_bits(agents[2])
    bits = adapter_bits(agents[0].base)
    logratios_together(agents, make_batch())
    assert check_rows(agents) is not None
    assert adapter_bits(agents[0].base) == bits
    learn_together(agents, make_batch(2))
    assert check_rows(agents) is not None
    storages = {
        row.values.untyped_storage().data_ptr() for a in agents for row in a.base.adapters.rows(a.actor_adapter)
    }
    assert len(storages) == 1


def test_a_member_that_leaves_does_not_hold_the_memory_of_the_others() -> None:
    agents = make_agents(make_family("llama"), ALIKE)
    learn_together(agents, make_batch())
    (row,) = agents[0].base.adapters.rows(agents[0].actor_adapter)
    size = row.layout.size
    before = {(one.untyped_storage().data_ptr(), 4 * size * 8) for one in (row.values, row.gradient())}
    learn_together([agents[0], agents[1], agents[3]], make_batch())
    gc.collect()
    # By type, since other tests leave sparse tensors and objects with a `__class__` of their own.
    tensors = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
    held = [one.untyped_storage() for one in tensors if one.layout == torch.strided]
    assert not before & {(one.data_ptr(), one.nbytes()) for one in held}
    for tensor in (one for agent in agents for one in agent.actor_parameters()):
        members = 1 if tensor in set(agents[2].actor_parameters()) else 3
        assert tensor.untyped_storage().nbytes() == members * size * 8
        assert tensor.grad is not None
        assert tensor.grad.untyped_storage().nbytes() == members * size * 8


def test_a_released_agent_holds_no_memory() -> None:
    """Not even before the garbage collector runs, or if somebody keeps the agent."""
    agents = make_agents(make_family("llama"), ALIKE[:2])
    learn_together(agents, make_batch())
    parameters, optimizer = agents[0].actor_parameters(), agents[0].optimizer
    (row,) = agents[0].base.adapters.rows(agents[0].actor_adapter)
    agents[0].release()
    segments = [one for group in optimizer.param_groups for one in group["params"]]
    assert [one.untyped_storage().nbytes() for one in (*parameters, *segments, row.values)] == [0] * (
        len(parameters) + 2
    )
    assert all(one.grad is None for one in (*parameters, *segments))
    learn_together(agents[1:], make_batch())
    # The optimizer has no reference to itself.
    gc.collect()
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer, segments
        agents[0].optimizer = None  # type: ignore[assignment]
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("moved", ["one parameter", "the model"])
def test_a_model_that_was_moved_learns_as_one_that_was_not(moved: str) -> None:
    results = []
    for move in (False, True):
        agents = make_agents(make_family("llama"), ALIKE)
        learn_together(agents, make_batch())
        for parameter in agents[1].actor_parameters()[:1] if moved == "one parameter" else ():
            parameter.data = parameter.data * 1.5 if move else parameter.data.mul_(1.5)
        if move and moved == "the model":
            # To another type and back, as to another device and back.
            agents[0].base.network._apply(lambda tensor: tensor.clone())
        found = [learn_together(agents, make_batch(seed)) for seed in (1, 2)]
        assert check_rows(agents) is not None
        results.append((found, [actor_bits(agent) for agent in agents]))
    assert results[0] == results[1]


def test_members_of_different_types_keep_them() -> None:
    model = make_family("llama").float()
    agents = make_agents(model, ALIKE[:1])
    model.to(torch.bfloat16)
    agents += make_agents(model, ALIKE[1:2])
    before = [actor_bits(agent) for agent in agents]
    logratios_together(agents, make_batch())
    assert before == [actor_bits(agent) for agent in agents]
    learn_together(agents, make_batch())
    assert all(bits != actor_bits(agent) for bits, agent in zip(before, agents, strict=True))
    types = [{parameter.dtype for parameter in agent.actor_parameters()} for agent in agents]
    assert types == [{torch.bfloat16}, {torch.float32}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_different_scalings_are_not_rounded_to_the_type_of_the_base(dtype: torch.dtype) -> None:
    stack = Stack(["a", "b"], RowLayout.of({"q.lora_A.weight": torch.Size((1, 1))}), torch.zeros(2, 32))
    ones = torch.ones(2, 1, 1, dtype=dtype)
    stack.factors((1 / 3, 1.7), torch.ones((), dtype=torch.bfloat16))
    factors = stack.factors((1 / 3, 1.7), ones)
    atol = 1e-15 if dtype == torch.float64 else 1e-7
    expected = torch.tensor([1 / 3, 1.7], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(factors.double(), expected, rtol=0.0, atol=atol)
    assert ones.mul_(factors).dtype == dtype


def test_gradients_that_user_code_made_are_stepped_with_and_cleared() -> None:
    (agent,) = make_agents(make_family("llama"), ALIKE[:1])
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in agent.actor_parameters()]
    other = torch.optim.AdamW(twins, lr=agent.lr, weight_decay=0.0)
    for _ in range(2):
        for twin, parameter in zip(twins, agent.actor_parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        agent.optimizer.step()
        other.step()
        agent.optimizer.zero_grad()
        assert not any(parameter.grad.any() for parameter in agent.actor_parameters())
    assert all(torch.equal(a, b) for a, b in zip(agent.actor_parameters(), twins, strict=True))
    for found, expected in zip(states_of(agent), other.state_dict()["state"].values(), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("optim", ["adamw_torch", "schedule_free_adamw"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_a_copied_agent_learns_as_the_original_does(copied: Callable[[DPO], DPO], optim: str) -> None:
    (agent,) = make_agents(make_family("llama"), ALIKE[:1], optim=optim)
    agent.learn(make_batch())
    other, bits = copied(agent), actor_bits(agent)
    for seed in (1, 2):
        assert agent.learn(make_batch(seed)) == other.learn(make_batch(seed))
    check_rows([other])
    assert bits != actor_bits(agent) == actor_bits(other)
    for found, expected in zip(states_of(other), states_of(agent), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_change_their_gradients(kind: str, members: int) -> None:
    """As of user code that freezes a part of the adapter, or adds noise."""
    agents = make_agents(make_family("llama"), ALIKE[:members])
    parameters = agents[0].actor_parameters()

    def clear(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.zero_()

    for parameter in parameters[::2]:
        getattr(parameter, kind)(torch.zeros_like if kind == "register_hook" else clear)
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.warns(UserWarning, match="members go one by one: their parameters have hooks"):
        learn_together(agents, make_batch())
    changed = [not torch.equal(one, parameter) for one, parameter in zip(before, parameters, strict=True)]
    assert changed == [bool(number % 2) for number in range(len(parameters))]
    check_rows(agents)


@pytest.mark.parametrize("members", [1, 2])
def test_hooks_and_replaced_methods_of_the_base_are_called(members: int) -> None:
    agents = make_agents(make_family("llama"), ALIKE[:members])
    layers = agents[0].base.network.model.layers
    first, second = (layer.mlp.up_proj.base_layer for layer in layers)
    calls = []
    first.register_full_backward_hook(lambda *_: calls.append("backward"))
    own = second.forward
    # As accelerate does to move weights.
    second.forward = lambda x: calls.append("forward") or own(x)
    learn_together(agents, make_batch())
    assert {"backward", "forward"} == set(calls)
    calls.clear()
    learn_together(agents, make_batch(1))
    assert {"backward", "forward"} == set(calls)


@pytest.mark.parametrize("ratio", [None, 4.0])
def test_parameters_that_made_different_numbers_of_steps_are_refused(ratio: float | None) -> None:
    agent, other = make_agents(make_family("llama"), ALIKE[:2], loraplus_lr_ratio=ratio)
    agent.learn(make_batch())

    def make_another_step(state: dict[int, dict[str, Tensor]], numbers: Sequence[int]) -> None:
        for number in numbers:
            state[number]["step"].add_(1)

    last_group = agent.to_folder().optimizer["param_groups"][-1]["params"]
    for damage in (
        lambda state: make_another_step(state, [1]),
        lambda state: state.pop(1),
        lambda state: make_another_step(state, last_group if ratio else last_group[1:]),
    ):
        folder = agent.to_folder()
        damage(folder.optimizer["state"])
        bits = actor_bits(other)
        with pytest.raises(CheckpointError, match="different numbers of steps"):
            other.load_folder(folder)
        assert actor_bits(other) == bits
        with pytest.raises(ValueError, match="different numbers of steps"):
            other.optimizer.load_state_dict(folder.optimizer)
        assert not other.optimizer.state
    # What a checkpoint says of one parameter's step is not the memory of another one's.
    assert {float(state["step"]) for state in agent.to_folder().optimizer["state"].values()} == {1.0}


def test_a_row_that_others_write_to_stays_where_it_is() -> None:
    """As under ZeRO, whose optimizer writes to its own memory."""
    results = []
    for pinned in (False, True):
        agents = make_agents(make_family("llama"), ALIKE)
        (row,) = agents[2].base.adapters.rows(agents[2].actor_adapter)
        memory = torch.zeros_like(row.values)
        if pinned:
            row.pin(memory)
        for seed in range(2):
            learn_together(agents, make_batch(seed))
        if pinned:
            next(iter(agents[2].actor_parameters())).data = agents[2].actor_parameters()[0].data.clone()
        learn_together(agents, make_batch(3))
        assert (row.values.data_ptr() == memory.data_ptr()) == pinned
        check_rows(agents)
        results.append([actor_bits(agent) for agent in agents])
    assert results[0] == results[1]


def test_members_are_not_touched_by_an_adapter_that_is_active_and_not_routed() -> None:
    """An adapter on the embeddings of another agent, whose layer is PEFT's own."""
    batch = make_batch()
    results = []
    for active in (False, True):
        model = make_family("llama")
        agents = make_agents(model, ALIKE[:2])
        stranger = make_agents(model, ALIKE[2:3], targets=["embed_tokens"], gradient_checkpointing=False)[0]
        with pytest.warns(UserWarning, match="members go one by one"):
            stranger.learn(batch)
        agents[0].base.adapters.use(stranger.actor_adapter if active else agents[0].actor_adapter)
        results.append([learn_together(agents, batch), [actor_bits(agent) for agent in agents]])
    assert results[0] == results[1]


def test_an_adapter_that_user_code_merged_is_taken_out_of_the_base() -> None:
    batch, results = make_batch(), []
    for merged in (False, True):
        agents = make_agents(make_family("llama"), ALIKE[:2])
        learn_together(agents, batch)
        if merged:
            agents[0].get_policy().merge_adapter()
        learn_together(agents, make_batch(1))
        results.append([list(agent.actor_parameters()) for agent in agents])
    torch.testing.assert_close(results[0], results[1], **EXACT)


def test_peft_saves_and_loads_a_member_of_a_matrix(tmp_path) -> None:
    agents = make_agents(make_family("llama"), ALIKE)
    learn_together(agents, make_batch())
    agents[1].get_policy().save_pretrained(str(tmp_path), selected_adapters=[agents[1].actor_adapter])
    loaded = PeftModel.from_pretrained(make_family("llama"), str(tmp_path / agents[1].actor_adapter))
    own = agents[1].base.adapters.parameters(agents[1].actor_adapter)
    found = {name.replace(".default", ""): one for name, one in loaded.named_parameters()}
    for path, parameter in own.items():
        torch.testing.assert_close(found[path], parameter, check_dtype=False)


def test_members_of_one_rank_learn_as_they_do_one_after_the_other() -> None:
    results = []
    for plain in (False, True):
        agents = make_agents(make_family("llama"), ALIKE, loraplus_lr_ratio=4.0, max_grad_norm=0.1)
        if plain:
            Engine.of(agents[0].base).prepare = lambda members, length: FastPaths(False, False, False, length)  # type: ignore
        metrics = [learn_together(agents, make_batch(seed)) for seed in range(5)]
        results.append((metrics, [[p.detach() for p in agent.actor_parameters()] for agent in agents]))
    for fast, expected in zip(results[0][0], results[1][0], strict=True):
        for one, other in zip(fast, expected, strict=True):
            assert one == pytest.approx(other, rel=0, abs=1e-10)
    torch.testing.assert_close(results[0][1], results[1][1], **EXACT)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0), (0, 1, 0)])
def test_a_stack_looks_up_once_where_each_row_is(order: tuple[int, ...], monkeypatch) -> None:
    """A look takes an address for each of some hundred parameters."""
    agents = make_agents(make_family("llama"), ALIKE[:3])
    looks: Counter[Row] = Counter()
    settle = Row.settle

    def counted(row: Row) -> Tensor:
        looks[row] += 1
        return settle(row)

    monkeypatch.setattr(Row, "settle", counted)
    adapters = agents[0].base.adapters
    learn_together(agents, make_batch())
    looks.clear()
    adapters.stack([agents[number].actor_adapter for number in order])
    assert {looks[adapters.rows(agents[number].actor_adapter)[0]] for number in order} == {1}
    looks.clear()
    # Before the gradients are cleared, before the pass, and before the optimizer's step.
    learn_together(agents, make_batch())
    assert {looks[adapters.rows(agent.actor_adapter)[0]] for agent in agents} == {3}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 0)])
def test_parts_of_a_stack_take_views_of_its_one_cast(order: tuple[int, ...]) -> None:
    agents = make_agents(make_family("llama").bfloat16(), ALIKE)
    stack = agents[0].base.adapters.stack([agents[number].actor_adapter for number in order])
    path = "base_model.model.model.layers.1.mlp.up_proj"
    whole = stack.weights(path, torch.bfloat16)
    for start in range(len(order) - 1):
        part = stack.part(start, 2).part(0, 2)
        assert part.names == stack.names[start : start + 2]
        assert part.holds(path)
        assert part.factors((0.5, 2.0), whole[0]) is stack.factors((0.5, 2.0), whole[0])
        for mine, all_of_them in zip(part.weights(path, torch.bfloat16), whole, strict=True):
            assert mine.data_ptr() == all_of_them[start].data_ptr()
            assert torch.equal(mine, all_of_them[start : start + 2])


def test_a_step_casts_the_members_once_for_all_passes() -> None:
    agents = make_agents(make_family("llama").bfloat16(), ALIKE, token_budget=40)
    learn_together(agents, make_batch())
    size = agents[0].base.adapters.rows(agents[0].actor_adapter)[0].layout.size
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].shape[-1:] == (size,):
                casts.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    with Casts():
        learn_together(agents, make_batch())
    # Of the actors, whose references are known.
    assert casts == [len(agents)]


def test_a_gradient_is_clipped_as_torch_clips_it() -> None:
    gradients = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for max_norm in (0.5, 1e3):
        parameters = [nn.Parameter(torch.zeros(50)) for _ in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        expected = nn.utils.clip_grad_norm_(parameters, max_norm)
        for parts in ([torch.cat(gradients)], [gradients[0].clone(), torch.cat(gradients[1:])]):
            torch.testing.assert_close(clip_gradient(parts, max_norm), expected)
            torch.testing.assert_close(torch.cat(parts), torch.cat([one.grad for one in parameters]))


def test_a_layout_keeps_the_kinds_of_loraplus_side_by_side() -> None:
    shapes = {
        "layers.0.q.lora_A.weight": torch.Size((4, 10)),
        "layers.0.q.lora_B.weight": torch.Size((10, 4)),
        "layers.0.q.lora_B.bias": torch.Size((10,)),
        "embed.lora_embedding_A": torch.Size((4, 7)),
        "layers.1.q.lora_A.weight": torch.Size((2, 10)),
    }
    layout = RowLayout.of(shapes)
    assert [path for path, _ in layout.shapes] == [list(shapes)[number] for number in (0, 4, 3, 1, 2)]
    assert list(layout.starts.values()) == [0, 64, 96, 128, 192]
    assert layout.size == 224
    assert layout.segment(["layers.0.q.lora_A.weight", "layers.1.q.lora_A.weight"]) == slice(0, 96)
    wider = RowLayout.of({**shapes, "layers.1.q.lora_A.weight": torch.Size((3, 9))})
    assert dict(RowLayout.union([layout, wider]).shapes)["layers.1.q.lora_A.weight"] == (3, 10)


class Counted(TorchDispatchMode):
    """Counts the operators that compute something: each of them is at least one kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and "empty" not in str(func) and "detach" not in str(func)
        return func(*args, **(kwargs or {}))


def test_a_step_launches_hardly_more_for_more_members() -> None:
    """What a member adds, losses and metrics, does not depend on the number of its matrices."""
    added = []
    for targets, parameters in ((["q_proj"], 4), ("all-linear", 28)):
        lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        counts = []
        for size in (2, 6):
            model = make_family("llama").float()
            agents = DPO.population(size, actor_network=model, lora_config=lora, token_budget=10_000)
            assert len(agents[0].actor_parameters()) == parameters
            for seed in range(2):
                learn_together(agents, make_batch(seed))
            with Counted() as counted:
                learn_together(agents, make_batch(1))
            counts.append(counted.count)
        added.append(counts[1] - counts[0])
    assert added[0] == added[1]
    assert Engine.of(agents[0].base).prepare([a.actor_adapter for a in agents], 30).stacking
