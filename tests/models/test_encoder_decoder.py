"""Encoder-decoder models: right log-probs, and the same agents, runs and exports as with any other base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_examples, make_rows
from families import RELATIVE, make_family
from peft import LoraConfig, PeftModel
from tokenizers_for_tests import t5_tokenizer
from torch import nn
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from evollm import (
    DPO,
    SFT,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_sft,
    save_llm_checkpoint,
    save_merged_model,
)
from evollm.data.samples import Batch, Sample
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.generation import Question, answers_to, greedy_answers
from evollm.models.layouts.encoder_decoder import EncoderDecoderLayout, LaidOutEncoderDecoder
from evollm.models.logprobs import TokenLogprobs

CPU = torch.device("cpu")
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v", "wo"])


def make_t5(tokenizer: Any, **changes: Any) -> T5ForConditionalGeneration:
    settings = {**RELATIVE, "vocab_size": len(tokenizer), "initializer_factor": 0.2, "eos_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(T5Config(**settings | changes)).eval()


def make_gym(**changes: Any) -> PreferenceGym:
    settings = {"data_batch_size_per_gpu": 4, "encoder_decoder": True}
    return PreferenceGym(make_rows(12), make_rows(6, 12), t5_tokenizer(), **settings | changes)


def random_batch() -> Batch:
    """The second pair has no rejected side."""
    rng, shapes = np.random.default_rng(0), [(9, 5, 3), (3, 4, 0), (6, 1, 7)]
    return Batch([Sample.of(*(rng.integers(160, size=size) for size in shape if size)) for shape in shapes])


def by_hand(network: nn.Module, prompt: np.ndarray, side: np.ndarray) -> float:
    """One side by itself, by the model's own shift of its labels."""
    labels = torch.from_numpy(side).unsqueeze(0)
    with torch.no_grad():
        logits = network(input_ids=torch.from_numpy(prompt).unsqueeze(0), labels=labels).logits
    return logits.double().log_softmax(-1)[0, range(len(side)), labels[0]].sum().item()


@pytest.mark.parametrize("shared_prompt", [False, True])
@pytest.mark.parametrize("family", ["t5", "mt5", "bart"])
def test_log_probs_of_an_encoder_decoder_are_those_of_the_models_own_labels(family: str, shared_prompt: bool) -> None:
    network, batch = make_family(family), random_batch()
    layout = EncoderDecoderLayout(CPU, network.config.decoder_start_token_id, False, shared_prompt)
    laid = layout.lay_out(batch, [])
    with torch.no_grad():
        found = TokenLogprobs(laid.read(network, 1), laid.pieces).of(0)
    for row in range(len(batch)):
        pair = batch[row]
        assert found.chosen[row].item() == pytest.approx(by_hand(network, pair.prompt_ids, pair.chosen_ids), abs=1e-10)
        expected = by_hand(network, pair.prompt_ids, pair.rejected_ids) if len(pair.completions) > 1 else 0.0
        assert found.rejected[row].item() == pytest.approx(expected, abs=1e-10)


def test_the_encoder_reads_each_prompt_once_for_both_sides_and_all_members_share_the_pass() -> None:
    agents = DPO.population(3, actor_network=make_family("t5"), lora_config=LORA, gradient_checkpointing=False)
    engine, names, batch = Engine.of(agents[0].base), [agent.actor_adapter for agent in agents], random_batch()
    engine.prepare(names, 16)
    rows: dict[str, list[int]] = {"encoder": [], "decoder": []}
    for part, seen in rows.items():
        getattr(agents[0].base.network, part).register_forward_hook(
            lambda _, args, kwargs, output, seen=seen: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
    engine.logprobs(Item.on(batch, names), PassOptions(token_budget=10_000))
    assert rows == {"encoder": [3 * 3], "decoder": [3 * 5]}


@pytest.mark.parametrize("budget", [1, 40, 60, 10_000])
def test_no_pass_of_an_encoder_decoder_has_more_tokens_than_the_budget(monkeypatch, budget: int) -> None:
    agent = DPO(actor_network=make_family("t5"), lora_config=LORA)
    engine, batch, sizes = Engine.of(agent.base), random_batch(), []
    expected = engine.logprobs(Item.on(batch, [agent.actor_adapter]), PassOptions(token_budget=10_000))
    original = EncoderDecoderLayout.lay_out

    def record(layout: EncoderDecoderLayout, batch: Batch, members: Sequence[str | None]) -> LaidOutEncoderDecoder:
        laid = original(layout, batch, members)
        sizes.append((len(batch), laid.num_tokens))
        return laid

    monkeypatch.setattr(EncoderDecoderLayout, "lay_out", record)
    found = engine.logprobs(Item.on(batch, [agent.actor_adapter]), PassOptions(token_budget=budget))
    assert all(count == 1 or tokens <= budget for count, tokens in sizes)
    assert sum(count for count, _ in sizes) == len(batch)
    torch.testing.assert_close(found[0].chosen, expected[0].chosen, rtol=0, atol=1e-10)
    torch.testing.assert_close(found[0].rejected, expected[0].rejected, rtol=0, atol=1e-10)


def test_prompts_and_completions_of_an_encoder_decoder_are_tokenised_apart() -> None:
    tokenizer, row = t5_tokenizer(), {"prompt": "translate: yes", "chosen": "the answer", "rejected": "no"}
    (pair,) = PreferenceGym([row], None, tokenizer, encoder_decoder=True).train_pairs
    for ids, text in ((pair.prompt_ids, "prompt"), (pair.chosen_ids, "chosen"), (pair.rejected_ids, "rejected")):
        assert ids.tolist() == tokenizer(row[text])["input_ids"]
        assert ids.tolist()[-1] == tokenizer.eos_token_id
    (cut,) = PreferenceGym([row], None, tokenizer, encoder_decoder=True, max_context_length=8).train_pairs
    assert cut.prompt_ids.tolist() == pair.prompt_ids.tolist()[-(8 - len(pair.chosen_ids)) :]


@pytest.mark.filterwarnings("ignore:.*without positions:UserWarning")
def test_a_population_of_encoder_decoders_evolves_is_saved_and_goes_on_as_a_model_of_its_own(tmp_path) -> None:
    tokenizer, gym = t5_tokenizer(), make_gym()
    make_t5(tokenizer).save_pretrained(tmp_path / "base")
    population = DPO.population(
        3,
        model_name=str(tmp_path / "base"),
        lora_config=LORA,
        lr=5e-3,
        hp_config=HyperparameterConfig(lr=RLParameter(min=1e-3, max=1e-2)),
    )
    assert isinstance(population[0].base.network, T5ForConditionalGeneration)
    population, _ = finetune_llm_preference(
        population,
        gym,
        num_epochs=2,
        tournament=TournamentSelection(tournament_size=2, elitism=True, population_size=3),
        mutation=Mutations(no_mutation=0.2, rl_hp=0.8, rand_seed=1),
        run_dir=tmp_path / "run",
        verbose=False,
    )
    best, batch = max(population, key=lambda agent: agent.fitness[-1]), gym.next_batch()
    expected = best.logratios(batch)
    assert np.abs(expected[0]).max() > 1e-3

    best.save_checkpoint(str(tmp_path / "agent"))
    loaded = DPO.load(str(tmp_path / "agent"))
    assert all(np.array_equal(*sides) for sides in zip(loaded.logratios(batch), expected, strict=True))

    save_llm_checkpoint(best, tmp_path / "adapter")
    save_merged_model(best, tmp_path / "merged", tokenizer)
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert tuned.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    pair = batch[0]
    logprob = Engine.of(best.base).logprobs(Item.on(batch, [best.actor_adapter]), PassOptions())[0].chosen[0].item()
    for model in (merged, tuned):
        assert by_hand(model, pair.prompt_ids, pair.chosen_ids) == pytest.approx(logprob, abs=1e-3)
    (answer,) = greedy_answers(best.base, [best.actor_adapter], [pair.prompt_ids], tokenizer, max_new_tokens=5)[0]
    output = merged.generate(torch.from_numpy(pair.prompt_ids)[None], max_new_tokens=5, do_sample=False)
    assert answer == tokenizer.decode(output[0], skip_special_tokens=True).strip()


def test_a_decoder_samples_from_its_first_token_on_alone_and_among_others() -> None:
    tokenizer = t5_tokenizer()
    agents = [
        DPO(actor_network=model, index=index, lora_config=LORA) for model in [make_t5(tokenizer)] for index in (0, 1)
    ]
    base, prompt = agents[0].base, random_batch()[0].prompt_ids
    names = [agent.actor_adapter for agent in agents]
    asked = [Question(name, prompt, 1.0, (number,)) for name in names for number in range(500)]
    found = answers_to(base, asked, tokenizer, 4)
    (alone,) = answers_to(base, asked[-1:], tokenizer, 4)
    assert alone.ids.tolist() == found[-1].ids.tolist()
    with base.active(names[1]) as network, torch.no_grad():
        start = torch.tensor([[network.config.decoder_start_token_id]])
        logits = network(input_ids=torch.from_numpy(prompt)[None], decoder_input_ids=start).logits[0, -1]
    expected = logits.double().softmax(-1).numpy()
    shares = np.bincount([answer.ids[0] for answer in found[500:]], minlength=len(expected)) / 500
    assert (np.abs(shares - expected) <= 5 * np.sqrt(expected / 500) + 1 / 500).all()


def test_an_encoder_decoder_learns_completions_and_then_preferences(tmp_path) -> None:
    tokenizer = t5_tokenizer()
    model = make_t5(tokenizer)
    gym = SFTGym(make_examples(12), make_examples(6, 12), tokenizer, data_batch_size_per_gpu=4, encoder_decoder=True)
    learner = SFT(actor_network=model, lora_config=LORA, lr=3e-2)
    before = float(learner.test(gym))
    finetune_llm_sft([learner], gym, num_epochs=6, run_dir=tmp_path / "run", verbose=False)
    assert learner.fitness[-1] > before + 0.1
    chooser = DPO(actor_network=model, lora_config=LORA)
    chooser.load_checkpoint(str(tmp_path / "run" / "elite"))
    assert np.isfinite(chooser.learn(make_gym().next_batch())["loss"])


def test_recomputed_layers_of_an_encoder_decoder_give_the_same_gradients() -> None:
    results = []
    for recompute in (False, True):
        agents = DPO.population(2, actor_network=make_family("t5"), lora_config=LORA, gradient_checkpointing=recompute)
        agents[1].lr = 1e-4
        for agent in agents:
            agent.learn(random_batch_with_both_sides())
        results.append([p.detach() for agent in agents for p in agent.actor_parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


def random_batch_with_both_sides() -> Batch:
    batch = random_batch()
    return Batch([batch[0], batch[2]])


def test_a_gym_for_another_kind_of_model_is_refused(tmp_path) -> None:
    agent = DPO(actor_network=make_t5(t5_tokenizer()), lora_config=LORA)
    with pytest.raises(ConfigurationError, match="encoder_decoder=False: the base is an encoder-decoder"):
        finetune_llm_preference([agent], make_gym(encoder_decoder=False), run_dir=tmp_path / "run")


def test_a_decoder_without_a_first_input_is_refused() -> None:
    model = make_t5(t5_tokenizer())
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ConfigurationError, match="decoder_start_token_id"):
        DPO(actor_network=model, lora_config=LORA)
