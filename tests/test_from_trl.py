"""What docs/from_trl.md tells users of TRL: every argument has its line, and what it says to write instead works."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import make_rows
from peft import LoraConfig, PeftModel, get_peft_model

from evollm import DPO, ConfigurationError, PreferenceGym, tune
from evollm.models.merging import all_logprobs


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
