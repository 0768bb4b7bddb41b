"""Reward models score answers as the classifier alone does, whatever else is in the batch."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from tokenizers_for_tests import CHATML, bos_template_tokenizer, make_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from evollm import ConfigurationError, Judge, PreferenceGym, RewardGym, RewardModel, finetune_llm_preference, tune
from evollm.config import read_config
from evollm.hpo import AnswerPair
from evollm.tuning.reward_models import judge_of, reward_functions_of

PROMPTS = ["Which is the answer?", "Why?", "What is the question, and who asks it of the user?"]
ANSWERS = ["yes", "no, another answer, for the question is another one", ""]
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is the answer?"}]


def llama(tokenizer: Any, **changes: Any) -> LlamaForSequenceClassification:
    settings = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "num_labels": 1},
        **{"initializer_range": 0.2, "pad_token_id": tokenizer.pad_token_id},
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForSequenceClassification(LlamaConfig(**{**settings, **changes})).eval()


def saved(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def reader() -> Any:
    return make_tokenizer(adds_bos=True, pad_token="<unk>", chat_template=CHATML)


@pytest.fixture
def folder(reader: Any, tmp_path: Path) -> str:
    return saved(llama(reader), reader, tmp_path / "rewards")


def logit(model: Any, ids: list[int]) -> float:
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def test_rewards_are_the_logits_of_each_text_by_itself_whatever_the_batch(reader, folder) -> None:
    model = llama(reader)
    asked = [(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
    prompts, answers = [list(one) for one in zip(*asked, strict=True)]
    eos = reader.eos_token_id
    expected = [logit(model, [*reader(prompt + answer)["input_ids"], eos]) for prompt, answer in asked]
    assert max(expected) - min(expected) > 0.1
    found = {size: RewardModel(folder, batch_size=size, as_turns=False) for size in (1, 2, 16)}
    for rewards in found.values():
        assert rewards(prompts, answers) == pytest.approx(expected, abs=1e-5)
        # In another order, and beside others.
        assert rewards(prompts[::-1], answers[::-1])[::-1] == pytest.approx(expected, abs=1e-5)
        assert len({*rewards(["Why?"] * 3 + PROMPTS[:1], ["no"] * 3 + ["longer than the others"])[:3]}) == 1
    loaded = found[2].network
    found[2](prompts, answers)
    assert found[2].network is loaded


def test_messages_go_through_the_template_of_the_reward_model_and_strings_if_asked(reader, folder) -> None:
    model = llama(reader)

    def of(messages: list[dict[str, str]], answer: str) -> float:
        text = reader.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
        return logit(model, reader(text, add_special_tokens=False)["input_ids"])

    rewards = RewardModel(folder, as_turns=True)
    prompts = [TURNS, TURNS[1:], "what is the answer?"]
    expected = [of(TURNS, "yes"), of(TURNS[1:], "no"), of(TURNS[1:], "yes")]
    assert rewards(prompts, ["yes", "no", "yes"], answer=["a", "b", "c"]) == pytest.approx(expected, abs=1e-5)
    # A template that writes a BOS is not given a second one.
    tokenizer = bos_template_tokenizer()
    tokenizer.pad_token = "<unk>"
    own = RewardModel(llama(tokenizer), tokenizer=tokenizer)
    assert own._ids(TURNS[1:], "yes").count(tokenizer.bos_token_id) == 1
    unsaid = RewardModel(folder)
    with pytest.warns(UserWarning, match="strings, which do not go through its chat template: pass as_turns=True"):
        unsaid(PROMPTS[:1], ["yes"])
    unsaid(PROMPTS[:1], ["yes"])  # said once


def test_an_encoder_reads_no_padding(tokenizer) -> None:
    reader = make_tokenizer(pad_token="<unk>", cls_token="<s>", sep_token="</s>", eos_token=None)
    config = BertConfig(
        **{"vocab_size": len(reader), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 1, "initializer_range": 0.2},
        pad_token_id=reader.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
    expected = [logit(model, reader(prompt + "yes")["input_ids"]) for prompt in PROMPTS]
    assert RewardModel(model, tokenizer=reader)(PROMPTS, ["yes"] * 3) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("padding", [None, "</s>"])
def test_without_a_padding_token_answers_are_read_one_at_a_time_and_that_is_said(padding) -> None:
    reader = make_tokenizer(pad_token=padding)
    model = llama(reader, pad_token_id=None)
    expected = [logit(model, [*reader(prompt + "yes")["input_ids"], reader.eos_token_id]) for prompt in PROMPTS]
    with pytest.warns(UserWarning, match="no padding token, so that it reads one answer at a time: set pad_token_id"):
        rewards = RewardModel(model, tokenizer=reader)
    assert rewards(PROMPTS, ["yes"] * 3) == pytest.approx(expected, abs=1e-6)
    # A token of the tokenizer that ends no text pads as well.
    other = make_tokenizer(pad_token="<unk>")
    assert RewardModel(model, tokenizer=other)(PROMPTS, ["yes"] * 3) == pytest.approx(expected, abs=1e-5)


def test_of_long_texts_the_end_is_read_behind_the_bos(reader, folder) -> None:
    ids = reader("Why is the question another answer? yes, the other answer")["input_ids"] + [reader.eos_token_id]
    rewards = RewardModel(folder, as_turns=False, max_length=6)
    with pytest.warns(UserWarning, match="longer than max_length=6: it reads their ends"):
        found = rewards(["Why is the question another answer?"], [" yes, the other answer"])
    assert found == pytest.approx([logit(llama(reader), [ids[0], *ids[-5:]])], abs=1e-5)
    assert RewardModel(folder).max_length == 256
    reader.model_max_length = 32
    assert RewardModel(folder, tokenizer=reader).max_length == 32


def test_positions_that_begin_behind_the_padding_index_hold_shorter_texts(tmp_path) -> None:
    """As RoBERTa's: of 40 positions 35 are left, also where only the weights say so."""
    reader = make_tokenizer(pad_token="<unk>", cls_token="<s>", sep_token="</s>")
    assert reader.pad_token_id == 4
    config = RobertaConfig(
        **{"vocab_size": len(reader), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 40, "num_labels": 1, "initializer_range": 0.2},
        pad_token_id=reader.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RobertaForSequenceClassification(config).eval()
    prompt, named = "the answer " * 40, RewardModel(saved(model, reader, tmp_path / "roberta"))
    ids = [*reader(prompt + "yes")["input_ids"], reader.eos_token_id]
    for rewards in (named, RewardModel(model, tokenizer=reader)):
        with pytest.warns(UserWarning, match="longer than max_length=35"):
            assert rewards([prompt], ["yes"]) == pytest.approx([logit(model, ids[-35:])], abs=1e-5)


def test_tokens_that_the_model_has_not_are_named(reader) -> None:
    rewards = RewardModel(llama(reader, vocab_size=100), tokenizer=reader, as_turns=False)
    rewards(["a"], ["b"])
    with pytest.raises(ConfigurationError, match=r"tokenizer=.*gives token \d+, and .* has 100: pass the one that"):
        rewards(["Which is the answer?"], ["another answer"])


def test_what_is_no_reward_model_is_refused_before_it_is_loaded(make_model, reader, folder, tmp_path) -> None:
    two = saved(llama(reader, num_labels=2), reader, tmp_path / "two")
    with pytest.raises(ConfigurationError, match=r"two': must be a reward model.*LlamaForSequenceCl.* with 2 labels"):
        RewardModel(two)
    language = saved(make_model(), reader, tmp_path / "language")
    with pytest.raises(ConfigurationError, match=r"must be a reward model.*; this is LlamaForCausalLM with 2 labels"):
        RewardModel(language)
    base = saved(make_model(num_labels=1), reader, tmp_path / "base")
    with pytest.raises(ConfigurationError, match=r"its files lack weights of LlamaForSequenceClassification: score"):
        RewardModel(base, as_turns=False)(["a"], ["b"])
    for arguments, message in (
        ({"model": "no/such/folder"}, "no such folder"),
        ({"model": 3}, "model=3: must be a reward model"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 257}, "max_length=257: rewards has 256 positions"),
        ({"dtype": "bf16"}, "write bfloat16"),
        ({"device": "nowhere"}, "device='nowhere': cannot be used here"),
        ({"as_turns": "yes"}, "as_turns='yes': must be True or False"),
        ({"tokenizer": 3}, "tokenizer=3: must be a tokenizer"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            RewardModel(**{"model": folder, **arguments})
    with pytest.raises(ConfigurationError, match="dtype='float32': belongs to the name of a model"):
        RewardModel(llama(reader), tokenizer=reader, dtype="float32")
    plain = make_tokenizer(pad_token="<unk>")
    with pytest.raises(ConfigurationError, match="as_turns=True: needs a chat template"):
        RewardModel(folder, tokenizer=plain, as_turns=True)
    with pytest.raises(
        ConfigurationError, match=r"tokenizer\.chat_template=None: the prompts are messages, which rewards"
    ):
        RewardModel(folder, tokenizer=plain)([TURNS], ["yes"])


def test_a_copy_for_another_process_has_no_weights_of_a_named_model_and_needs_no_folder(folder, monkeypatch) -> None:
    rewards = RewardModel(folder, as_turns=False)
    found = rewards(PROMPTS, ["yes"] * 3)
    monkeypatch.chdir(Path(folder).parent)
    sent = pickle.dumps(RewardModel(Path(folder).name, as_turns=False))
    monkeypatch.chdir("/")
    assert len(sent) < sum(weights.nbytes for weights in rewards.network.parameters())
    assert pickle.loads(sent)(PROMPTS, ["yes"] * 3) == found


def test_a_reward_model_judges_and_rewards(folder, reader, tokenizer, make_population, tmp_path) -> None:
    rewards = RewardModel(folder, as_turns=False)
    judge = Judge(rewards, prompts=2, max_new_tokens=4)
    assert judge.to_dict()["function"] == "rewards"
    first, second = rewards(["Why?"] * 2, ["yes", "no"])
    assert judge.win_rates([AnswerPair(0, "Why?", "yes", "no")]).tolist() == [float(first > second)]
    env = RewardGym([{"prompt": "Why?", "answer": "a"}], None, tokenizer, rewards, data_batch_size_per_gpu=1)
    assert env.rewards.names == ("rewards",)
    assert env.rewards.of_answers(env.train_pairs * 2, ["yes", "no"])[:, 0].tolist() == [first, second]
    pairs = PreferenceGym(make_rows(8), make_rows(4, 50), tokenizer, data_batch_size_per_gpu=4)
    _, fitnesses = finetune_llm_preference(
        make_population(2), pairs, max_steps=1, judge=judge, fitness="win_rate", verbose=False, run_dir=tmp_path / "run"
    )
    assert all(0 <= fitness <= 1 for fitness in fitnesses)
    # Messages without a template are said to be so before the training, with the row.
    judge = Judge(RewardModel(folder, tokenizer=make_tokenizer(pad_token="<unk>")))
    with pytest.raises(ConfigurationError, match=r"judge='rewards raised Config.*chat_template=None.*on row 3, 'what"):
        judge.try_out(3, TURNS)


def test_a_configuration_names_reward_models(folder, make_model, tokenizer, lora, tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"reward_functions:\n  helpful: {{model: {folder}, as_turns: false}}\n"
        f"judge: {{function: {{model: {folder}, as_turns: false}}, prompts: 2, max_new_tokens: 4}}\n"
    )
    settings = read_config(tmp_path / "run.yaml")
    assert isinstance(reward_functions_of(settings["reward_functions"])["helpful"], RewardModel)
    assert isinstance(reward_functions_of(folder), RewardModel)
    assert [type(one) for one in reward_functions_of([folder, len])] == [RewardModel, type(len)]
    judge = judge_of(settings["judge"])
    assert isinstance(judge, Judge)
    assert (judge.prompts, judge.name) == (2, "rewards")
    for value, message in (
        ({"prompts": 2}, "needs function, the name or folder"),
        ({"function": folder, "promts": 2}, "judge.promts"),
        ({"function": {"model": folder, "model_config": {"trust_remote_code": True}}}, "judge.function.model_config"),
        ({"function": {"model": folder, "batch_size": 0}}, "judge.function.batch_size=0"),
        ("module:function", "names no reward model; other functions are Python"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            judge_of(value)
    found = tune(
        make_model(),
        [{"prompt": f"Question {number}:"} for number in range(8)],
        tokenizer=tokenizer,
        algorithm="grpo",
        population=1,
        lora_config=lora,
        reward_functions=settings["reward_functions"],
        **{"max_completion_length": 3, "group_size": 2, "max_steps": 1, "test_data": False, "final_data": False},
        **{"verbose": False, "run_dir": tmp_path / "run", "num_sample_answers": 0},
    )
    assert "helpful" in (found.run_dir / "config.json").read_text()
