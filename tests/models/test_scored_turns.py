"""Log-probs and losses of completions of which only some tokens are scored: by every path those of plain sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import AGAIN, BLUE, GREEN, USER, family_tokenizer
from families import ROTARY, VOCABULARY, make_family
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from evollm import DPO, SFT, PreferenceGym, SFTGym
from evollm.algorithms.dpo_step import learn_together
from evollm.data.samples import Batch, Sample
from evollm.models import ReferenceCache
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.fast_paths import FastPaths

# Prompt, chosen and rejected side, and how many of their tokens are scored; the last has no rejected side.
SHAPES = [(6, 9, 5, 4, 5), (3, 4, 12, 4, 5), (5, 7, 8, 2, 6), (4, 6, 3, 6, 3), (5, 8, 0, 3, 0)]
PATHS = {
    "packed": FastPaths(longest=32),
    "packed, whole head": FastPaths(tiled_head=False, longest=32),
    "padded": FastPaths(shared_prompt=False, stacking=False, longest=32),
    "padded, whole head": FastPaths(False, False, False, 32),
    "one by one": FastPaths(False, False, False, 32, explicit_positions=False, implicit_positions=False),
}
LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
# BART's head adds what tiles do not know of.
CASES = [
    (family, path)
    for family in ("llama", "gpt2", "t5", "bart")
    for path in PATHS
    if family != "bart" or not PATHS[path].tiled_head or PATHS[path].goes_alone(True)
]


def random_pairs(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for *sizes, chosen, rejected in shapes:
        pair = Sample.of(*(rng.integers(VOCABULARY, size=size) for size in sizes if size))
        mask = np.zeros(sizes[1] + sizes[2], np.bool_)
        mask[rng.choice(sizes[1], chosen, replace=False)] = True
        mask[sizes[1] + rng.choice(sizes[2], rejected, replace=False) if sizes[2] else []] = True
        found.append(pair.with_mask(mask))
    return found


def token_logprobs(network: nn.Module, prompt: np.ndarray, side: np.ndarray, apart: bool) -> torch.Tensor:
    """(side,) log-probs by a plain pass of one sequence, log_softmax over all logits."""
    with torch.no_grad():
        if apart:
            labels = torch.from_numpy(side)[None]
            logits = network(input_ids=torch.from_numpy(prompt)[None], labels=labels).logits[0]
        else:
            logits = network(torch.from_numpy(np.concatenate([prompt, side]))[None]).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(side)), torch.from_numpy(side)]


def small_llama(tokenizer: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**{**ROTARY, "vocab_size": len(tokenizer)})
        return LlamaForCausalLM(config).double()


def expected_of(agent: DPO, pairs: Sequence[Sample], adapter: str | None = None) -> list[list[float]]:
    """For each pair the four sums: of scored tokens, and of the first of them, as many as the fewer of both sides."""
    apart = agent.base.is_encoder_decoder
    found = []
    with agent.base.active(adapter or agent.actor_adapter) as network:
        for pair in pairs:
            sides = [
                token_logprobs(network, pair.prompt_ids, ids, apart)[torch.from_numpy(mask)]
                for ids, mask in ((side.ids, side.scored) for side in pair.completions)
            ]
            shorter = min(map(len, sides))
            sides += [torch.zeros(0, dtype=torch.float64)] * (2 - len(sides))
            found.append([side[:end].sum().item() for end in (None, shorter) for side in sides])
    return found


def population(family: str, **settings: Any) -> list[DPO]:
    targets = {"t5": ["q", "v"], "gpt2": ["c_attn"]}.get(family, ["q_proj", "v_proj"])
    lora = replace(LORA, target_modules=targets, fan_in_fan_out=family == "gpt2")
    return DPO.population(3, actor_network=make_family(family), lora_config=lora, **settings)


@pytest.mark.parametrize(("family", "path"), CASES)
def test_log_probs_are_sums_over_scored_tokens_by_every_path(family: str, path: str, monkeypatch) -> None:
    agents, pairs = population(family), random_pairs()
    engine = Engine.of(agents[0].base)
    monkeypatch.setattr(engine, "prepare", lambda members, length: PATHS[path])
    names = [agent.actor_adapter for agent in agents]
    for up_to_shorter in (False, True):
        options = PassOptions()
        for agent, found in zip(agents, engine.logprobs(Item.on(Batch(pairs), names), options), strict=True):
            sums = found.sums(up_to_shorter=up_to_shorter)
            columns = [*sums.columns, *(sums.up_to_shorter or ())]
            expected = torch.tensor(expected_of(agent, pairs), dtype=torch.float64)[:, : len(columns)]
            torch.testing.assert_close(torch.stack(columns, dim=1).double(), expected, rtol=0, atol=1e-10)


def test_a_pair_beside_one_that_is_scored_in_part_has_the_bits_that_it_has_beside_one_that_is_not() -> None:
    whole, partial = random_pairs([(6, 9, 5, 9, 5), (3, 4, 12, 2, 5)])
    everywhere = Sample.of(partial.prompt_ids, partial.chosen_ids, partial.rejected_ids)
    agents = population("llama")
    engine, names = Engine.of(agents[0].base), [agents[0].actor_adapter]
    found = [
        engine.logprobs(Item.on(Batch([whole, other]), names), PassOptions())[0] for other in (partial, everywhere)
    ]
    assert found[0].chosen[0].item() == found[1].chosen[0].item()
    assert found[0].rejected[0].item() == found[1].rejected[0].item()
    assert found[0].chosen[1].item() != found[1].chosen[1].item()


def losses_by_hand(agent: DPO, pairs: Sequence[Sample], reference: list[list[float]]) -> dict[str, float]:
    sums = torch.tensor(expected_of(agent, pairs), dtype=torch.float64)
    ratios = sums - torch.tensor(reference, dtype=torch.float64)
    lengths = torch.tensor([pair.num_scored for pair in pairs], dtype=torch.float64)
    means, beta, ld = sums[:, :2] / lengths, agent.beta, 0.25
    weighted = ratios[:, 2:] + ld * (ratios[:, :2] - ratios[:, 2:])
    per_token = ratios[:, :2] / lengths
    return {
        "sigmoid": -nn.functional.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).mean().item(),
        "ipo": ((per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2).mean().item(),
        "simpo": -nn.functional.logsigmoid(beta * (means[:, 0] - means[:, 1]) - 0.5).mean().item(),
        "sft": (-sums[:, 0].sum() / lengths[:, 0].sum()).item(),
        "ld": -nn.functional.logsigmoid(beta * (weighted[:, 0] - weighted[:, 1])).mean().item(),
    }


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "sft", "ld"])
def test_losses_are_of_scored_tokens_and_members_learn_together_as_alone(loss: str) -> None:
    settings = {"loss_type": "sigmoid", "ld_alpha": 0.25} if loss == "ld" else {"loss_type": loss}
    pairs = random_pairs(SHAPES[:4])
    batch = Batch(pairs)
    together, alone = (population("llama", **settings, lr=1e-2, nll_alpha=0.0) for _ in range(2))
    for step in range(2):
        metrics = learn_together(together, batch)
        for found, agent in zip(metrics, alone, strict=True):
            expected = agent.learn(batch)
            if step == 0:
                # All rewards are 0 up to rounding, which decides whose is larger.
                expected["rewards/accuracies"] = found["rewards/accuracies"]
            assert found == pytest.approx(expected, rel=0, abs=1e-9)
    for agent in together:
        found = agent.learn(batch, training=False)
        reference = expected_of(agent, pairs, agent.adapter("reference"))
        expected = losses_by_hand(agent, pairs, reference)
        assert found["mean_loss"] == pytest.approx(expected[loss], abs=1e-10)
        assert found["nll_loss"] == pytest.approx(expected["sft"], abs=1e-10)
        assert expected["sigmoid"] != pytest.approx(np.log(2), abs=1e-3)


def test_gradients_are_those_of_scored_tokens_alone() -> None:
    """A completion's end that is not scored changes nothing: it conditions no scored token."""
    pair = random_pairs([(6, 9, 5, 9, 5)])[0]
    mask = np.array([True] * 6 + [False] * 3 + [True] * 3 + [False] * 2)
    other = Sample.of(pair.prompt_ids, pair.chosen_ids[:6], pair.rejected_ids[:3])
    weights = []
    for one in (pair.with_mask(mask), other):
        agent = population("llama", lr=1e-2, loss_type="ipo")[0]
        agent.learn(Batch([one]))
        agent.learn(Batch([one]))
        weights.append([p.detach().clone() for p in agent.actor_parameters()])
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-10)


def test_supervised_losses_and_scores_are_means_over_scored_tokens() -> None:
    tokenizer = family_tokenizer("ChatML")
    rows = [{"prompt": [USER], "completion": side} for side in ([BLUE, AGAIN, GREEN], [GREEN], [GREEN, AGAIN, BLUE])]
    env = SFTGym([{"prompt": [AGAIN], "completion": [BLUE]}], rows, tokenizer, 1)
    agent = SFT(actor_network=small_llama(tokenizer), lora_config=LORA)
    logprobs, counts = [], []
    with agent.base.active(agent.actor_adapter) as network:
        for pair in env.test_pairs:
            mask = torch.from_numpy(pair.masks[0])
            logprobs.append(token_logprobs(network, pair.prompt_ids, pair.chosen_ids, False)[mask].sum().item())
            counts.append(int(mask.sum()))
    found = agent.evaluate(env)
    assert found.logprobs == pytest.approx(logprobs, abs=1e-9)
    assert found.num_tokens.tolist() == counts
    batch = Batch(env.test_pairs)
    assert agent.learn(batch, training=False)["mean_loss"] == pytest.approx(-sum(logprobs) / sum(counts), abs=1e-9)


def test_a_user_turn_moved_into_the_prompt_leaves_the_log_prob_of_the_answers_behind_it() -> None:
    """log pi of both answers is that of the first, and of the second with all before it as its prompt."""
    tokenizer = family_tokenizer("Llama 3")
    whole = {"prompt": [USER], "chosen": [BLUE, AGAIN, GREEN], "rejected": [GREEN, AGAIN, BLUE]}
    first = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}
    behind = [
        {"prompt": [USER, one, AGAIN], "chosen": [two], "rejected": [one]}
        for one, two in ((BLUE, GREEN), (GREEN, BLUE))
    ]
    agent = DPO(actor_network=small_llama(tokenizer), lora_config=LORA)
    env = PreferenceGym([whole, first, *behind], None, tokenizer, 4)
    scores = Engine.of(agent.base).logprobs(Item.on(Batch(env.train_pairs), [agent.actor_adapter]), PassOptions())[0]
    chosen, rejected = scores.chosen.tolist(), scores.rejected.tolist()
    assert chosen[0] == pytest.approx(chosen[1] + chosen[2], abs=1e-10)
    assert rejected[0] == pytest.approx(rejected[1] + chosen[3], abs=1e-10)


def test_a_run_goes_on_with_the_same_references_and_not_with_those_of_whole_sides(tmp_path) -> None:
    (pair, *_), agent = random_pairs(), population("llama")[0]
    whole = Sample.of(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    sums = [agent.reference_logprobs(Batch([one])) for one in (pair, whole, pair)]
    assert sums[0].chosen.item() == sums[2].chosen.item() != sums[1].chosen.item()
    agent.base.reference_cache.save(tmp_path / "cache")
    cache = ReferenceCache()
    cache.load(tmp_path / "cache")
    assert len(cache) == 2
    fingerprint = agent.base.adapters.fingerprint(agent.adapter("reference"))
    assert cache.get([fingerprint], Batch([pair]), None)[0].chosen.item() == sums[0].chosen.item()
