"""Kernels and copies are counted on a card that is not there; the figures are those of a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
from compiled_launches import kernels_of_lora
from families import make_family
from launches import PARTS, a_card, count_step, main, place, with_compiled_layers
from peft import LoraConfig
from pretended_card import CARD, multi_tensor_launches, pretended_card
from synthetic import Shape
from torch import nn

from evollm import DPO
from evollm.models.fast_paths import FastPaths
from evollm.models.layouts import layout_for


@pytest.fixture(scope="module")
def step():
    return count_step("toy", 3, 4)


def test_a_step_is_counted_by_its_parts(step) -> None:
    assert step["passes"] == 1
    assert step["attention"].startswith("torch's flash kernel")
    assert step["kernels"] == sum(step[part] for part in PARTS)
    assert all(step[part] for part in PARTS if part != "other")
    assert step["other"] == 0, "a part of the step that place() does not know"
    # Members that share a pass launch as many kernels as the one reference does.
    assert 0 < step["references"] <= step["scoring"] < step["kernels"]
    assert step["rows"] == 64


def test_a_step_waits_for_one_copy_beside_the_norms(step) -> None:
    copies = step["copies"]
    assert copies["down in evollm/models/logprobs.py, joined"] == 1
    assert not [what for what in copies if what.startswith("up")], "references, lengths and indices are not waited for"
    # One norm comes down for each member at most.
    assert step["blocking"] <= 1 + 3
    # The tokens' tables, two of the attention's, and one of all members' references and lengths.
    assert step["queued"] == 4


def test_the_same_step_counts_the_same(step) -> None:
    assert count_step("toy", 3, 4) == step


def test_compiled_layers_replace_those_of_the_step(step) -> None:
    fewer = count_step("toy", 3, 4, fewer_layers=1)["kernels"]
    # Two layers.
    assert with_compiled_layers(step, step["kernels"] - fewer) == step["kernels"]
    assert with_compiled_layers(step, 1) == step["kernels"] - 2 * (step["kernels"] - fewer) + 2


def test_the_operator_of_a_routed_layer_launches_its_products_and_nothing_else() -> None:
    """Three forward, five backward, and the adding up of two gradients."""
    assert kernels_of_lora() == 10


def test_operators_count_as_what_a_card_runs() -> None:
    def kernels(run) -> dict[str, int]:
        with pretended_card(place) as counts:
            given = torch.ones(4, 6, device="cuda")
            counts.clear()
            run(given)
        return {call.what: number for call, number in counts.kernels.items()}

    assert kernels(lambda x: x.t()[1:].flatten(1)[..., None]) == {}
    assert kernels(lambda x: x.to(torch.bfloat16)) == {"copy_": 1}
    assert kernels(lambda x: x.to("cuda").float()) == {}
    assert kernels(torch.empty_like) == {}
    assert kernels(lambda x: x[:0] + 1) == {}
    assert kernels(lambda x: nn.functional.linear(x, x)) == {"mm": 1}
    assert sum(kernels(lambda x: x.logsumexp(1)).values()) > 4, "torch composes it of other operators"
    assert kernels(lambda x: torch._foreach_add_([x] * 111, 1)) == {"_foreach_add_": 2}


def test_copies_between_host_and_card_count_unless_nobody_waits_for_them() -> None:
    def copies(run) -> list[str]:
        with pretended_card(place) as counts:
            given = torch.ones(4, device="cuda")
            counts.clear()
            run(given)
        return sorted(call.what for call, number in counts.copies.items() for _ in range(number))

    host = torch.arange(4)
    with pretended_card(place) as counts:
        host.pin_memory().to("cuda", non_blocking=True)
    assert (counts.copies.total(), counts.queued.total()) == (0, 1)
    assert copies(lambda x: x.sum().item()) == ["down"]
    assert copies(lambda x: x.tolist()) == ["down"]
    assert copies(lambda x: x.cpu()) == ["down"]
    assert copies(lambda x: host.to(x.device)) == ["up"]
    assert copies(lambda x: torch.tensor([1.0, 2.0], device="cuda")) == ["up"]
    assert copies(lambda x: x[[0, 2]]) == copies(lambda x: x[host]) == ["up"]
    assert copies(lambda x: host.pin_memory().to("cuda", non_blocking=True)) == []
    assert copies(lambda x: host.to("cuda", non_blocking=True)) == ["up"], "memory that is not pinned is waited for"
    assert copies(lambda x: x.to("cpu", non_blocking=True)) == ["down"], "its values are needed"
    assert copies(lambda x: x + 1) == copies(lambda x: host + 1) == []


def test_what_a_card_says_of_itself() -> None:
    with pretended_card(place):
        given = torch.ones(2, device=CARD)
        assert (given.device, given.is_cuda, given.is_meta) == (CARD, True, False)
        assert (torch.ones(2).device.type, torch.ones(2).is_cuda) == ("cpu", False)
    assert torch.ones(2).device.type == "cpu"


@pytest.mark.parametrize(
    ("sizes", "depth", "launches"),
    [
        ([8] * 110, 1, 1),
        ([8] * 111, 1, 2),
        ([8] * 36, 4, 1),
        ([8] * 37, 4, 2),
        ([65536 * 320], 1, 1),
        ([65536 * 321], 1, 2),
        ([], 1, 0),
    ],
)
def test_launches_on_lists_of_tensors(sizes, depth, launches) -> None:
    assert multi_tensor_launches(sizes, depth) == launches


def test_the_script_prints_a_table_and_the_copies(monkeypatch, capsys, tmp_path) -> None:
    arguments = ["--shapes", "toy", "--members", "2", "--pairs", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["launches.py", *arguments])
    main()
    said = capsys.readouterr().out
    (row,) = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    assert str(row["kernels"]) in said
    assert sum(row["copies"].values()) == row["blocking"]


@pytest.mark.parametrize("tiled_head", [True, False])
@pytest.mark.parametrize(("family", "masks"), [("llama", 1), ("t5", 3)])
def test_padded_layouts_wait_for_the_card_only_where_transformers_looks_at_masks(
    family: str, masks: int, tiled_head: bool
) -> None:
    batch = Shape(8, 6, 7).batch(4, 100)
    paths = FastPaths(shared_prompt=family == "t5", tiled_head=tiled_head)
    lora = LoraConfig(r=4, target_modules=["q" if family == "t5" else "q_proj"])
    with a_card() as counts:
        with torch.device(CARD):
            model = make_family(family)
        agent = DPO(actor_network=model, lora_config=lora, device=CARD)
        counts.clear()
        laid = layout_for(agent.base, paths).lay_out(batch, [agent.actor_adapter])
        assert not counts.copies
        with agent.base.active(agent.actor_adapter) as network, laid.passing(1):
            read = laid.read(network, 1)
    assert read.shape == (1, int(batch.chosen_scored.sum() + batch.rejected_scored.sum()))
    assert counts.copies.total() <= masks, counts.copies
