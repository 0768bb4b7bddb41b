"""The loss of routers is the model's own, on the same pairs, whatever passes they go through."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import make_rows
from peft import LoraConfig
from torch import Tensor

from evollm import DPO, SFT, ConfigurationError, tune
from evollm.algorithms.dpo_step import learn_together
from evollm.data.samples import Batch, Sample
from evollm.models import passes
from evollm.models.engine import Engine
from evollm.models.exchange import from_all_processes
from evollm.models.fast_paths import FastPaths
from evollm.models.layouts.plain import PaddedSequences
from evollm.models.load_balancing import LoadBalancing
from evollm.models.logprobs import TokenLogprobs, pieces_of
from evollm.processes import Processes
from evollm.tuning.arguments_file import read_tune_arguments

# That members go one by one, PEFT's remarks on target_parameters.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

VOCABULARY, COEFFICIENT = 90, 0.3
SMALL = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "intermediate_size": 48, "num_experts_per_tok": 2, "max_position_embeddings": 256},
    **{"initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
ASKED = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
ATTENTION = ["q_proj", "v_proj"]
# Classes, their own settings, and what their adapters are on; None: all linear layers, experts included.
BASES: dict[str, tuple[Any, Any, dict[str, Any], list[str] | None]] = {
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {"num_local_experts": 4}, None),
    "qwen3-moe": (
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8},
        None,
    ),
    "olmoe": (hf.OlmoeForCausalLM, hf.OlmoeConfig, {"num_experts": 4}, ATTENTION),
    "phimoe": (hf.PhimoeForCausalLM, hf.PhimoeConfig, {"num_local_experts": 4}, ATTENTION),
    "granitemoe": (hf.GraniteMoeForCausalLM, hf.GraniteMoeConfig, {"num_local_experts": 4}, ATTENTION),
    "gpt-oss": (hf.GptOssForCausalLM, hf.GptOssConfig, {"num_local_experts": 4, "head_dim": 8}, ATTENTION),
}
SHAPES = [(5, 7, 3), (9, 2, 8), (3, 4, 4), (1, 6, 9)]


def make_base(kind: str = "mixtral", **asked: Any) -> Any:
    model, config, own, _ = BASES[kind]
    torch.manual_seed(0)
    return model(config(**{**SMALL, **own, **(asked or ASKED)})).eval()


def make_batch(rejected: bool = True) -> Batch:
    rng = np.random.default_rng(0)
    shapes = [shape if rejected else (*shape[:2], 0) for shape in SHAPES]
    return Batch([Sample.of(*(rng.integers(3, VOCABULARY, size=size) for size in shape if size)) for shape in shapes])


def make_agent(model: Any, targets: list[str] | None = ATTENTION, agent: type = DPO, **settings: Any) -> Any:
    # As after some training: without it B is 0, and A gets no gradient.
    lora = LoraConfig(r=4, target_modules=targets or "all-linear", init_lora_weights=False, **settings.pop("lora", {}))
    return agent(actor_network=model, lora_config=lora, max_grad_norm=1e9, **settings)


def own_outputs(agent: Any, batch: Batch) -> tuple[Any, Any]:
    """The model's own forward pass of the padded batch, with its mask, and its layout."""
    layout = PaddedSequences.of(batch)
    ids, mask = torch.from_numpy(layout.input_ids), torch.from_numpy(layout.attention_mask)
    with agent.base.active(agent.actor_adapter) as network:
        return network(input_ids=ids, attention_mask=mask, output_router_logits=True), layout


def gradient_of(agent: Any, batch: Batch) -> tuple[dict[str, float], Tensor]:
    """What an agent learns a batch with, metrics and gradient; its weights stay."""
    found: list[Tensor] = []
    agent.optimizer.step = lambda: found.append(torch.cat([p.grad.flatten() for p in agent.actor_parameters()]))
    return agent.learn(batch), found[0]


@pytest.mark.parametrize("kind", BASES)
def test_the_loss_of_routers_is_the_models_own(kind: str) -> None:
    batch, agent = make_batch(), make_agent(make_base(kind), BASES[kind][3], nll_alpha=0.0)
    with torch.no_grad():
        own = own_outputs(agent, batch)[0].aux_loss.item()
    metrics = agent.learn(batch, training=False)
    assert metrics["aux_loss"] == pytest.approx(own, rel=1e-5)
    # Actor and reference are the same as yet.
    assert metrics["loss"] == pytest.approx(np.log(2) + COEFFICIENT * own, rel=1e-5)
    assert metrics["mean_loss"] == metrics["loss"]


def own_gradient(agent: Any, batch: Batch) -> Tensor:
    """By the model's own pass: the loss of the algorithm, and what transformers adds to it."""
    outputs, layout = own_outputs(agent, batch)
    logprobs = outputs.logits[:, :-1].log_softmax(dim=-1)
    targets = torch.from_numpy(layout.input_ids)[:, 1:, None]
    sums = (logprobs.gather(2, targets)[..., 0] * torch.from_numpy(layout.completion_mask)).sum(dim=1)
    if isinstance(agent, SFT):
        loss = -sums.sum() / int(batch.chosen_lengths.sum())
    else:
        margins = agent.beta * (sums - sums.detach())
        loss = -(margins[: len(batch)] - margins[len(batch) :]).sigmoid().log().mean()
    loss = loss + COEFFICIENT * outputs.aux_loss
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, agent.actor_parameters())])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mixtral", {}),
        ("mixtral", {"micro_batch_size_per_gpu": 1}),
        ("mixtral", {"gradient_checkpointing": True, "token_budget": 40}),
        ("mixtral", {"calc_position_embeddings": False}),
        ("mixtral", {"lora": {"layers_to_transform": [1]}}),
        ("qwen3-moe", {"targets": None}),
        ("gpt-oss", {"micro_batch_size_per_gpu": 2}),
        ("olmoe", {"agent": SFT, "micro_batch_size_per_gpu": 3}),
    ],
)
def test_its_gradient_is_that_of_the_whole_batch_in_whatever_passes(kind: str, settings: dict[str, Any]) -> None:
    own = {} if settings.get("agent") is SFT else {"nll_alpha": 0.0}
    agent, batch = make_agent(make_base(kind), **settings, **own), make_batch(rejected="agent" not in settings)
    expected = own_gradient(agent, batch)
    with_routers = own_outputs(agent, batch)[0].aux_loss
    alone = torch.autograd.grad(with_routers, agent.actor_parameters(), allow_unused=True)
    metrics, found = gradient_of(agent, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert metrics["aux_loss"] == pytest.approx(with_routers.item(), rel=1e-5)
    # It would not go unnoticed if it were missing.
    assert torch.cat([part.flatten() for part in alone if part is not None]).abs().max() > 1e-4


def test_sequences_one_by_one_have_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch = make_agent(make_base(), nll_alpha=0.0), make_batch()
    expected = gradient_of(agent, batch)
    alone = FastPaths(False, False, False, explicit_positions=False, implicit_positions=False)
    monkeypatch.setattr(Engine, "prepare", lambda *_: alone)
    metrics, gradient = gradient_of(agent, batch)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-6)
    assert metrics["num_tokens"] == 2 * expected[0].pop("num_tokens")
    # All rewards are 0 up to rounding, which decides whose is larger.
    free = {name: metrics[name] for name in ("num_tokens", "rewards/accuracies")}
    assert metrics == pytest.approx({**expected[0], **free}, rel=1e-5, abs=1e-6)


def test_each_member_of_a_stack_has_the_loss_of_its_own_routers() -> None:
    model, batch = make_base("granitemoe"), make_batch()
    # The first layer runs once for all members where no loss of routers is asked for.
    upper = {"lora": {"layers_to_transform": [1]}}
    agents = [make_agent(model, seed=seed, index=seed, nll_alpha=0.0, **upper) for seed in range(3)]
    assert Engine.of(agents[0].base).prepare([agent.actor_adapter for agent in agents], 20).stacking
    together = learn_together(agents, batch, training=False)
    for agent, metrics in zip(agents, together, strict=True):
        with torch.no_grad():
            own = own_outputs(agent, batch)[0].aux_loss.item()
        assert metrics["aux_loss"] == pytest.approx(own, rel=1e-5)
    assert len({round(metrics["aux_loss"], 6) for metrics in together}) == len(agents)


def test_a_base_in_float16_has_the_gradient_of_float32() -> None:
    batch = make_batch()
    found = []
    for dtype in (torch.float32, torch.float16):
        model = make_base("granitemoe").half().to(dtype)
        # Then it is nearly all of the loss.
        found.append(gradient_of(make_agent(model, nll_alpha=0.0, beta=1e-3), batch)[1])
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()


@pytest.mark.parametrize("asked", [{"output_router_logits": False}, {**ASKED, "router_aux_loss_coef": 0.0}])
def test_without_being_asked_for_nothing_changes(asked: dict[str, Any]) -> None:
    metrics = make_agent(make_base(**asked), nll_alpha=0.0).learn(make_batch())
    assert "aux_loss" not in metrics
    assert metrics["loss"] == pytest.approx(np.log(2), rel=1e-6)


def test_other_losses_over_the_batch_and_weights_for_long_sides_stay_what_they_are() -> None:
    """They are linearised too, and `ld_alpha` has sums of its own."""
    batch, settings = make_batch(), {"loss_type": "aot", "ld_alpha": 0.3, "nll_alpha": 0.2}
    plain, asked = (make_agent(make_base(**one), **settings) for one in ({"output_router_logits": False}, ASKED))
    expected, found = plain.learn(batch, training=False), asked.learn(batch, training=False)
    added = {name: expected[name] + COEFFICIENT * found["aux_loss"] for name in ("loss", "mean_loss")}
    assert found == pytest.approx({**expected, **added, "aux_loss": found["aux_loss"]}, rel=1e-5)
    norms = [gradient_of(agent, batch)[0]["grad_norm"] for agent in (plain, asked)]
    assert norms[1] != pytest.approx(norms[0], rel=1e-3)


def test_a_batch_without_a_usable_row_has_no_loss_of_routers() -> None:
    agent, batch = make_agent(make_base()), make_batch()
    with torch.no_grad():
        agent.base.network.get_input_embeddings().weight[int(batch[0].prompt_ids[0])] = torch.nan
    metrics = agent.learn(batch.select([0]), training=False)
    assert np.isnan([metrics["loss"], metrics["aux_loss"]]).all()


def test_a_checkpoint_asks_for_it_again(tmp_path) -> None:
    make_base(output_router_logits=False).save_pretrained(tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, COEFFICIENT
    agent, batch = make_agent(model), make_batch()
    agent.save_checkpoint(str(tmp_path / "agent"))
    loaded = DPO.load(str(tmp_path / "agent"))
    assert loaded.learn(batch, training=False) == agent.learn(batch, training=False)
    assert loaded.base.load_balancing == LoadBalancing(COEFFICIENT, experts=4, per_token=2)


def test_a_run_on_a_base_by_name_has_it_and_its_folder_says_so(tokenizer, tmp_path) -> None:
    make_base(output_router_logits=False, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    asked = {"model_config": {**ASKED, "trust_remote_code": False}, "tokenizer": tokenizer, "lora_config": {"r": 2}}
    run = {"population": 1, "max_steps": 2, "num_sample_answers": 0, "verbose": False, "run_dir": tmp_path / "run"}
    result = tune(str(tmp_path / "base"), make_rows(12), test_data=False, **asked, **run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in lines for name, value in line.items() if name.endswith("aux_loss")]
    assert len(losses) == 2, lines[:3]
    assert read_tune_arguments(tmp_path / "run").settings["model_config"] == ASKED
    again = DPO.load(str(result.run_dir / "elite")).base.load_balancing
    assert again == LoadBalancing(COEFFICIENT, experts=4, per_token=2)


def encoder_decoder() -> Any:
    config = hf.SwitchTransformersConfig(
        **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        **{"num_experts": 4, "decoder_start_token_id": 0, "num_sparse_encoder_layers": 1},
        **{"num_decoder_layers": 2, "num_sparse_decoder_layers": 1, **ASKED},
    )
    return hf.SwitchTransformersForConditionalGeneration(config)


def other_logits() -> Any:
    """A model whose config asks for what its forward pass does not give."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{k: v for k, v in SMALL.items() if k != "num_experts_per_tok"}))
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, COEFFICIENT
    return model


def other_loss() -> Any:
    """A model whose own loss is another one."""
    model = make_base()
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = own(*args, **kwargs)
        outputs.aux_loss = torch.tensor(2.5)
        return outputs

    model.forward = forward
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (encoder_decoder, "not computed for encoder-decoder models"),
        (other_logits, "cannot be computed for LlamaForCausalLM"),
        (other_loss, r"own loss of routers is 2\.5 where"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_training(make: Callable[[], Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"output_router_logits.*{reason}.*set it to False"):
        DPO(actor_network=make(), lora_config=LoraConfig(r=2, target_modules="all-linear"))


def test_processes_add_up_the_loads_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    batch, experts = make_batch(), 4
    pieces = pieces_of(batch)
    shape = 2, sum(piece.length for piece in pieces)
    whole = TokenLogprobs(torch.rand(shape), pieces, torch.rand(2, len(batch), 2, experts).double())
    received: list[list[Tensor]] = []
    monkeypatch.setattr(Processes, "add_up", lambda _, tensor: received[-1].append(tensor))
    for rows in ([0, 2], [1, *range(3, len(batch))], []):
        received.append([])
        own = tuple(piece for piece in pieces if piece.row in rows)
        part = TokenLogprobs(whole.values[:, whole.index_of(own)], own, whole.loads[:, rows]) if rows else None
        from_all_processes(part, rows, batch, torch.zeros(shape), LoadBalancing(1.0, experts, 1))
    values, loads = (torch.stack(parts).sum(dim=0) for parts in zip(*received, strict=True))
    assert torch.equal(whole.values, values)
    assert torch.equal(whole.loads, loads)


def test_nothing_is_recorded_where_no_loss_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, batch = make_agent(make_base(output_router_logits=False)), make_batch()
    monkeypatch.setattr(passes, "recorded", lambda _: pytest.fail("recorded"))
    agent.learn(batch)
    agent.learn(batch, training=False)
