"""What docs/from_trl.md tells users of TRL: every argument has its line, and what it says to write instead works."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_rows
from peft import LoraConfig, PeftModel, get_peft_model

import evollm
from evollm import DPO, ConfigurationError, PreferenceGym, tune
from evollm.data.samples import Batch
from evollm.models.adapters.merging import all_logprobs
from evollm.models.layouts.plain import PaddedSequences

PAGE = (Path(__file__).parents[1] / "docs" / "from_trl.md").read_text(encoding="utf-8")
# Names of all arguments, as TRL and transformers of these versions have them.
ARGUMENTS: dict[str, Any] = json.loads((Path(__file__).parent / "trl_arguments.json").read_text(encoding="utf-8"))
VERSIONS = ARGUMENTS.pop("versions")
CONFIGS = ("DPOConfig", "SFTConfig", "TrainingArguments")
# Of older versions, beside a name of today.
OLDER = {"warmup_ratio"}


def first_cells(title: str = "") -> set[str]:
    """The names in the first column of the tables, all of them or that under a title."""
    part = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0] if title else PAGE
    cells = re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE)
    return {name for cell in cells for code in re.findall(r"`([^`]+)`", cell) for name in re.findall(r"\w+", code)}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_every_argument_of_trl_has_its_line(kind: str) -> None:
    assert f"TRL {VERSIONS['trl'].rpartition('.')[0]}" in PAGE
    own = {"DPOTrainer": "Objects", "SFTTrainer": "Objects", "SFTConfig": ""}.get(kind, f"Arguments of `{kind}`")
    named = first_cells(own) | ({"args"} if kind.endswith("Trainer") else set())
    assert sorted(set(ARGUMENTS[kind]) - named) == []


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_line_is_of_an_argument_that_there_is(kind: str) -> None:
    named = first_cells(f"Arguments of `{kind}`") - {kind} - OLDER
    assert len(named) >= 8
    assert sorted(named - set(ARGUMENTS[kind])) == []
    assert not first_cells("In older scripts") & set(ARGUMENTS["DPOConfig"])


def test_the_names_are_those_of_the_installed_version() -> None:
    trl = pytest.importorskip("trl", reason="the extra benchmark is not installed")
    found = {name: importlib.metadata.version(name) for name in VERSIONS}
    if found != VERSIONS:
        pytest.skip(f"the list is of {VERSIONS}, here are {found}")
    common = {field.name for field in dataclasses.fields(importlib.import_module("transformers").TrainingArguments)}
    for kind in ("DPOConfig", "SFTConfig"):
        assert sorted({field.name for field in dataclasses.fields(getattr(trl, kind))} - common) == ARGUMENTS[kind]
    for kind in ("DPOTrainer", "SFTTrainer"):
        assert sorted(set(inspect.signature(getattr(trl, kind)).parameters)) == ARGUMENTS[kind]
    assert sorted(common) == ARGUMENTS["TrainingArguments"]


def code_under(title: str) -> str:
    return re.findall(r"```python\n(.*?)```", PAGE.partition(f"## {title}\n")[2], re.DOTALL)[0]


def test_several_evaluation_sets_are_scored_as_the_page_says(make_model, lora, tokenizer, tmp_path, capsys) -> None:
    env = PreferenceGym(make_rows(8), make_rows(4, 8), tokenizer, data_batch_size_per_gpu=4)
    agent = DPO(actor_network=make_model(), lora_config=lora)
    names = {"agent": agent, "env": env, "tokenizer": tokenizer, "train": make_rows(8)}
    names |= {"code": make_rows(5, 20), "chat": make_rows(3, 30)}
    quiet = "callbacks=", f"run_dir={str(tmp_path / 'run')!r}, verbose=False, num_sample_answers=0, callbacks="
    exec(code_under("Several evaluation sets").replace(*quiet), {**vars(evollm), **names})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["2", "code"], ["2", "chat"]]
    other = PreferenceGym(make_rows(1), make_rows(5, 20), tokenizer)
    assert float(lines[0].split()[2]) == agent.evaluate(other).accuracy


def test_metrics_that_need_all_logits_are_computed_as_the_page_says(make_model, lora, tokenizer, capsys) -> None:
    env = PreferenceGym(make_rows(8), make_rows(4, 8), tokenizer, data_batch_size_per_gpu=8)
    agent = DPO(actor_network=make_model(), lora_config=lora, lr=3e-2, max_grad_norm=1)
    for _ in range(8):
        agent.learn(env.next_batch())
    names: dict[str, Any] = {"agent": agent, "env": env}
    exec(code_under("Metrics that need all logits"), names)
    assert "mean_token_accuracy" in capsys.readouterr().out
    pairs = env.evaluation_pairs("test")
    found = names["logit_metrics"](agent, pairs)

    layout = PaddedSequences.of(Batch(pairs))
    ids, mask = torch.from_numpy(layout.input_ids), torch.from_numpy(layout.attention_mask)
    with agent.base.active(agent.actor_adapter) as network, torch.no_grad():
        logits = network(input_ids=ids, attention_mask=mask).logits[:, :-1]
    scored = torch.from_numpy(layout.completion_mask)
    for name, rows in (("chosen", slice(0, 4)), ("rejected", slice(4, 8))):
        assert found[f"logits/{name}"] == pytest.approx(logits[rows][scored[rows]].mean().item(), abs=1e-5)
    probabilities = logits[scored].softmax(dim=-1)
    entropy = -(probabilities * probabilities.log()).sum(dim=-1).mean().item()
    assert found["entropy"] == pytest.approx(entropy, rel=1e-5)
    hits = (logits.argmax(dim=-1) == ids[:, 1:])[:4][scored[:4]]
    assert 0.1 < found["mean_token_accuracy"] == pytest.approx(hits.float().mean().item())


def test_sigmoid_makes_use_of_label_smoothing_and_num_tokens_counts_a_prompt_once(make_model, lora, tokenizer) -> None:
    env = PreferenceGym(make_rows(8), None, tokenizer, data_batch_size_per_gpu=8)
    agent = DPO(actor_network=make_model(), lora_config=lora, lr=1e-2, nll_alpha=0, label_smoothing=0.2, beta=0.5)
    batch = env.next_batch()
    assert agent.learn(batch)["num_tokens"] == batch.num_tokens.sum()
    assert batch.num_tokens.sum() == sum(
        sizes.sum() for sizes in (batch.prompt_lengths, batch.chosen_lengths, batch.rejected_lengths)
    )
    chosen, rejected = agent.logratios(batch)
    right = 1 / (1 + np.exp(-0.5 * (chosen - rejected)))
    expected = -(0.8 * np.log(right) + 0.2 * np.log(1 - right)).mean()
    assert agent.learn(batch, training=False)["loss"] == pytest.approx(expected, rel=1e-5)


def logprobs_of(agent: DPO, role: str) -> torch.Tensor:
    with agent.base.active(agent.adapter(role)) as network:
        return all_logprobs(network)


@pytest.mark.parametrize("kind", ["fresh", "trained", "loaded"])
def test_for_a_peft_model_the_message_is_a_call_that_starts_from_what_it_computes(
    kind: str, make_model, lora: LoraConfig, tokenizer, tmp_path
) -> None:
    model = get_peft_model(make_model(), lora)
    if kind != "fresh":
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=0.1)
    if kind == "loaded":
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    expected = all_logprobs(model.eval())
    with pytest.raises(ConfigurationError, match=r"PeftModel\w*'?: already carries adapters") as caught:
        DPO(actor_network=model)
    with pytest.raises(ConfigurationError) as of_tune:
        tune(model, make_rows(8), tokenizer=tokenizer, run_dir=str(tmp_path / "run"))
    assert str(of_tune.value).removeprefix("model") == str(caught.value).removeprefix("actor_network")
    found = re.search(r"(model\.\w+\(\)), (lora_config=model\.peft_config\['default'\])", str(caught.value))
    assert found is not None
    assert found[1] == ("model.unload()" if kind == "fresh" else "model.merge_and_unload()")
    agent = eval(f"DPO(actor_network={found[1]}, {found[2]})", {"DPO": DPO, "model": model})
    for role in ("actor", "reference"):
        torch.testing.assert_close(logprobs_of(agent, role), expected, rtol=0, atol=1e-4)
    env = PreferenceGym(make_rows(4), None, tokenizer)
    assert agent.learn(env.next_batch())["grad_norm"] > 0


def test_for_a_quantised_peft_model_the_message_names_its_folder(make_model, lora: LoraConfig) -> None:
    base = make_model()
    model = get_peft_model(base, lora)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.ones_(weight)
    base.is_quantized = True
    with pytest.raises(ConfigurationError, match=r"model\.save_pretrained\(folder\), and model_name=folder"):
        DPO(actor_network=model)


def test_a_base_with_adapters_in_it_is_refused(make_model, lora: LoraConfig) -> None:
    base: Any = get_peft_model(make_model(), lora).get_base_model()
    with pytest.raises(ConfigurationError, match="pass the plain base model, as it was before"):
        DPO(actor_network=base)
