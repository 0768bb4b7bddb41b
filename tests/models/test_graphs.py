"""Layers compiled with `torch.compile`: the routed LoRA layers are operators inside the graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import make_family
from members import EXACT, MIXED, backward, make_agents, make_batch
from torch import Tensor, nn

from evollm import DPO
from evollm.algorithms.dpo_step import learn_together
from evollm.models.engine import PassOptions

# Two agents that learn in one pass.
TWO = [MIXED[0], {**MIXED[1], "rank": 4}]


class Graphs:
    """A backend that keeps the graphs and generates no code for them.

    Attributes:
        found: The graphs.
        backend: What runs them; "eager" takes less time, since it does not trace the backward pass.
    """

    def __init__(self) -> None:
        self.found: list[torch.fx.GraphModule] = []
        self.backend = "aot_eager"

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        self.found.append(graph)
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)

    @property
    def num_routed(self) -> int:
        """How many calls in the graphs are routed LoRA layers."""
        return sum("evollm.routed_lora" in str(node.target) for graph in self.found for node in graph.graph.nodes)

    def compile_layers_of(self, agents: Sequence[DPO]) -> None:
        """From now on; what the agents need besides training, such as the probe, has been done before."""
        learn_together(agents, make_batch(9))
        agents[0].base.compile("default", backend=self)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_members_learn_as_they_do_without(graphs: Graphs, gradient_checkpointing: bool) -> None:
    """Mixed ranks, scalings and hyperparameters, in float64."""
    results = []
    for compiling in (False, True):
        agents = make_agents(make_family("llama"), MIXED, gradient_checkpointing=gradient_checkpointing)
        if compiling:
            graphs.compile_layers_of(agents)
        else:
            learn_together(agents, make_batch(9))
        metrics = [learn_together(agents, make_batch(seed)) for seed in range(3)]
        results.append((metrics, [[p.detach() for p in agent.actor_parameters()] for agent in agents]))
    for plain, found in zip(*(metrics for metrics, _ in results), strict=True):
        for expected, one in zip(plain, found, strict=True):
            assert one == pytest.approx(expected, rel=0, abs=1e-10)
    torch.testing.assert_close(results[1][1], results[0][1], **EXACT)
    assert graphs.num_routed


def test_compiled_layers_of_another_family_give_the_gradients_of_plain_ones(graphs: Graphs) -> None:
    """Gemma 3: windows, norms of queries and keys, two kinds of positions."""
    gradients = []
    for compiling in (False, True):
        agents = make_agents(make_family("gemma3"), TWO, "all-linear")
        learn_together(agents, make_batch(9))
        if compiling:
            agents[0].base.compile("default", backend=graphs)
        for agent in agents:
            agent.optimizer.zero_grad()
        gradients.append(backward(agents, make_batch()))
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)
    assert graphs.num_routed


def test_other_members_lengths_and_layers_compile_nothing_anew(graphs: Graphs, make_model) -> None:
    layers = 8
    # No number of members equals one of heads: torch would take the coincidence for a rule.
    agents = make_agents(make_model(num_hidden_layers=layers), [MIXED[0]] * 7, ["o_proj"])
    graphs.compile_layers_of(agents)
    learn_together(agents[:5], make_batch(0))
    known = len(graphs.found)
    # With gradients and, for the references, without.
    assert graphs.num_routed <= layers // 2
    for number, some in enumerate((agents, agents[1:4], [agents[6], *agents[:2]])):
        learn_together(some, make_batch(number, [(7 + number, 3, 4), (2, 9, 5 + number)]))
    assert len(graphs.found) == known


def test_layers_below_the_first_adapter_run_once_for_several_passes(graphs: Graphs, make_model) -> None:
    """Autograd records nothing there, so that the backward pass of one member leaves their output to the next."""
    graphs.backend = "eager"
    gradients = []
    for compiling in (False, True):
        agents = make_agents(make_model(num_hidden_layers=2), TWO, r".*\.1\.self_attn\.o_proj")
        learn_together(agents, make_batch(9))
        if compiling:
            agents[0].base.compile("default", backend=graphs)
        for agent in agents:
            agent.optimizer.zero_grad()
        batch = make_batch(0, [(9, 5, 3)])
        gradients.append(backward(agents, batch, PassOptions(token_budget=int(batch.num_tokens.sum()))))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert graphs.num_routed


def test_weights_that_are_gathered_for_each_layer_are_those_of_its_graph(graphs: Graphs, make_model) -> None:
    """As under ZeRO 3: outside of their layer's pass they are empty, and each pass has new parameters."""

    @contextmanager
    def gathered(layers: Sequence[nn.Module]) -> Iterator[None]:
        inside = {module for layer in layers for module in layer.modules()} & whole.keys()
        for module in inside:
            module.weight = nn.Parameter(whole[module].clone(), requires_grad=False)
        try:
            yield
        finally:
            for module in inside:
                module.weight = nn.Parameter(whole[module].new_empty(0), requires_grad=False)

    graphs.backend = "eager"
    losses = []
    for compiling in (False, True):
        agents = make_agents(make_model(num_hidden_layers=1), TWO, ["o_proj"])
        layers = agents[0].base.layers
        learn_together(agents, make_batch(9))
        if compiling:
            agents[0].base.compile("default", backend=graphs)
        bases = [getattr(one, "base_layer", None) for one in layers.modules[0].modules()]
        whole = {one: one.weight for one in bases if one is not None}
        layers.gathered = gathered
        with gathered(layers.modules):
            pass
        losses.append([metrics["loss"] for metrics in learn_together(agents, make_batch())])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert graphs.num_routed


def test_a_base_layer_with_hooks_stays_outside_of_the_graphs(graphs: Graphs, make_model) -> None:
    """The hook is called, and the losses are those without compilation."""
    graphs.backend = "eager"
    calls: list[nn.Module] = []
    losses = []
    for compiling in (False, True):
        agents = make_agents(make_model(num_hidden_layers=1), TWO)
        if compiling:
            graphs.compile_layers_of(agents)
        else:
            learn_together(agents, make_batch(9))
        hooked = agents[0].base.network.get_submodule("model.layers.0.self_attn.q_proj.base_layer")
        hooked.register_forward_hook(lambda layer, inputs, output: calls.append(layer))
        losses.append([metrics["loss"] for metrics in learn_together(agents, make_batch())])
        assert calls[-1] is hooked
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


def test_the_operators_keep_the_rules_of_custom_operators() -> None:
    """Schema, shapes for tracing, and derivatives, with scalings of their own and with a shared one."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    for factors, alpha, bias in ((None, 2.0, random(5)), (random(3, 1, 1), 1.0, None)):
        x, down, up = (random(*shape).requires_grad_() for shape in ((3, 4, 6), (3, 2, 6), (3, 5, 2)))
        arguments = (x, random(5, 6), bias, down, up, factors, alpha)
        torch.library.opcheck(torch.ops.evollm.routed_lora.default, arguments)

        def output(x: Tensor, down: Tensor, up: Tensor, rest: Any = arguments) -> Tensor:
            found, _ = torch.ops.evollm.routed_lora(x, *rest[1:3], down, up, *rest[5:])
            return found

        assert torch.autograd.gradcheck(output, (x, down, up))
