"""Models by name: precisions, quantisation, attention implementations, devices, custom code, GGUF files, adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documented import as_documented
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from snapshots import base_bits
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from evollm import DPO, ConfigurationError, MissingExtraError
from evollm.models import load_base_model
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.loading.model_config import reloadable

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}


@pytest.fixture
def folder(make_model: Callable[..., LlamaForCausalLM], tmp_path: Path) -> str:
    # bitsandbytes quantises blocks of 64 values.
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def logprobs(agent: DPO, gym: Any) -> torch.Tensor:
    """Of the first batch of an epoch, by the agent's actor."""
    gym.reset(seed=0)
    return Engine.of(agent.base).logprobs(Item.on(gym.next_batch(), [agent.actor_adapter]), PassOptions())[0].chosen


def takes_documented_paths(agent: DPO, kind: str) -> bool:
    (paths,) = Engine.of(agent.base).paths.values()
    return as_documented(
        kind, prompt_once=paths.shared_prompt, members_together=paths.stacking, tiled_head=paths.tiled_head
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float16])
def test_a_base_in_any_precision_has_finite_losses_and_float32_adapters(folder, gym, lora, dtype: Any) -> None:
    agent = DPO(model_name=folder, model_config={"dtype": dtype}, lora_config=lora, lr=1e-3)
    batch = gym.next_batch()
    losses = [agent.learn(batch)["loss"] for _ in range(4)]
    assert str(agent.base.network.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert {parameter.dtype for parameter in agent.actor_parameters()} == {torch.float32}
    assert takes_documented_paths(agent, str(dtype).removeprefix("torch."))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert not agent.diverged


# LLM.int8() treats columns with outliers apart, so that a row depends on the rows beside it: no path is shared.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "quantisation"),
    [
        ("nf4", NF4),
        ("nf4-double", BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)),
        ("int8", INT8),
    ],
    ids=["nf4", "nf4-double", "int8"],
)
def test_eight_members_learn_on_one_quantised_base_and_are_found_again(
    folder, gym, lora, tmp_path, kind: str, quantisation: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    model_config = {"quantization_config": quantisation, "device_map": "cpu", "dtype": torch.float32}
    agents = DPO.population(
        8, model_name=folder, model_config=model_config, lora_config=lora, lr=1e-2, max_grad_norm=1.0
    )
    base, batch = agents[0].base, gym.next_batch()
    assert base.network.is_quantized
    before, parameters = base_bits(base), sum(p.numel() for p in base.network.parameters() if not p.requires_grad)
    for agent in agents:
        losses = [agent.learn(batch)["loss"] for _ in range(4)]
        assert losses[-1] < losses[0]
    assert {id(agent.base.network) for agent in agents} == {id(base.network)}
    assert base_bits(base) == before
    assert takes_documented_paths(agents[0], kind)
    assert sum(p.numel() for p in base.network.parameters() if not p.requires_grad) == parameters

    agents[0].save_checkpoint(str(tmp_path / "agent"))
    loaded = DPO.load(str(tmp_path / "agent"))
    assert loaded.base.network.is_quantized
    assert torch.equal(logprobs(loaded, gym), logprobs(agents[0], gym))


def test_a_checkpoint_keeps_only_plain_settings_of_quantisation() -> None:
    kept = reloadable({"quantization_config": BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)})
    assert kept["quantization_config"].items() >= (NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}).items()
    assert json.loads(json.dumps(kept)) == kept
    strange = {"load_in_8bit": True, "bnb_4bit_compute_dtype": "load", "llm_int8_skip_modules": [print], "hook": "x"}
    assert reloadable({"quantization_config": strange}) == {"quantization_config": {"load_in_8bit": True}}
    for other in ({"quant_method": "gptq", "load_in_4bit": True}, {"bits": 4}, "nf4", None):
        assert reloadable({"quantization_config": other}) == {}


@pytest.mark.parametrize(("bits", "quantisation"), [("4bit", NF4), ("8bit", INT8)], ids=["4bit", "8bit"])
def test_bitsandbytes_that_is_missing_is_named_with_its_extra(folder, monkeypatch, bits: str, quantisation) -> None:
    flag = f"transformers.quantizers.quantizer_bnb_{bits}.is_bitsandbytes_available"
    monkeypatch.setattr(flag, lambda *_, **__: False)
    with pytest.raises(MissingExtraError, match=r'bitsandbytes: pip install "evollm\[quantization\]"'):
        load_base_model(folder, {"quantization_config": quantisation})


def test_gguf_that_is_missing_is_named_with_its_extra(folder, monkeypatch) -> None:
    """Of transformers some versions need it and some do not; these are the words of those that do."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    monkeypatch.setattr("evollm.models.loading.pretrained.AutoConfig.from_pretrained", refuse)
    with pytest.raises(MissingExtraError, match=r'gguf: pip install "evollm\[gguf\]"'):
        load_base_model(folder, {"gguf_file": "model.gguf"})


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """flex_attention without the half minute in which it is compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_attention_implementation_gives_the_same_log_probs(folder, gym, lora, uncompiled, attention: str) -> None:
    """Pairs that share their prompt go through evollm's own attention, whichever the base was loaded with."""
    expected = logprobs(DPO(model_name=folder, lora_config=lora), gym)
    agent = DPO(model_name=folder, model_config={"attn_implementation": attention}, lora_config=lora, lr=1e-3)
    assert agent.base.network.config._attn_implementation == attention
    torch.testing.assert_close(logprobs(agent, gym), expected, rtol=0, atol=1e-4)
    (paths,) = Engine.of(agent.base).paths.values()
    assert paths.shared_prompt
    assert paths.stacking
    assert np.isfinite(agent.learn(gym.next_batch())["loss"])
    assert agent.base.network.config._attn_implementation == attention


def test_flex_attention_that_would_have_to_be_differentiated_on_a_cpu_is_refused(folder, gym, lora, uncompiled) -> None:
    agent = DPO(
        model_name=folder,
        model_config={"attn_implementation": "flex_attention"},
        lora_config=lora,
        calc_position_embeddings=False,
    )
    with pytest.raises(ConfigurationError, match=r"attn_implementation='flex_attention'.*'sdpa'"):
        agent.learn(gym.next_batch())


def test_flash_attention_that_is_not_installed_is_said_to_be(folder) -> None:
    from transformers.utils import is_flash_attn_2_available  # noqa: PLC0415

    if is_flash_attn_2_available():
        pytest.skip("it is installed")
    with pytest.raises(ConfigurationError, match=r"attn_implementation='flash_attention_2'.*pip install flash-attn"):
        load_base_model(folder, {"attn_implementation": "flash_attention_2"})


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_base_with_a_device_map_learns(folder, gym, lora, device_map: Any) -> None:
    agent = DPO(model_name=folder, model_config={"device_map": device_map}, lora_config=lora)
    assert np.isfinite(agent.learn(gym.next_batch())["loss"])


@pytest.fixture
def remote(folder: str) -> str:
    """A folder whose configuration and model are code of its own; running it leaves a mark."""
    config = json.loads(Path(folder, "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    Path(folder, "config.json").write_text(json.dumps(config))
    Path(folder, "own.py").write_text(
        "import pathlib\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"pathlib.Path({folder!r}, 'ran').touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


@pytest.mark.parametrize("kernel", ["somebody/kernel", "kernels-community/flash-attn:varlen", "unknown"])
def test_a_base_cannot_ask_for_a_kernel_by_its_name(folder, kernel: str) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": kernel}))
    with pytest.raises(ConfigurationError, match=f"asks for attn_implementation='{kernel}'"):
        load_base_model(folder)
    assert load_base_model(folder, {"attn_implementation": "sdpa"}).config._attn_implementation == "sdpa"


def test_an_adapter_given_as_a_model_imports_no_module(folder, lora, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    asks = {"megatron_config": {"a": 1}, "megatron_core": "antigravity", "base_model_name_or_path": folder}
    path.write_text(json.dumps(json.loads(path.read_text()) | asks))
    with pytest.raises(ConfigurationError, match="asks for Megatron"):
        load_base_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize("model_config", [None, {}, {"trust_remote_code": False}])
def test_custom_code_is_not_run_unless_asked_for(remote, model_config: Any) -> None:
    with pytest.raises(ConfigurationError, match="pass trust_remote_code=True in model_config"):
        DPO(model_name=remote, model_config=model_config)
    assert not Path(remote, "ran").exists()


def test_custom_code_runs_when_asked_for(remote, gym, lora, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    agent = DPO(model_name=remote, model_config={"trust_remote_code": True}, lora_config=lora)
    assert type(agent.base.network).__name__ == "OwnModel"
    assert Path(remote, "ran").exists()
    assert np.isfinite(agent.learn(gym.next_batch())["loss"])


@pytest.mark.parametrize(
    ("model_config", "said"),
    [
        ({"dtype": "float99"}, "cannot be loaded"),
        ({"attn_implementation": "bogus"}, "is none of eager"),
        ({"device_map": "gpu7"}, "cannot be loaded"),
        ({"quantization_config": {"load_in_5bit": True}}, "cannot be loaded"),
        ({"load_in_4bit": True}, "belongs one level down"),
        ({"gguf_file": "missing.gguf"}, "cannot be loaded"),
        ({"nonsense": 3}, "is no argument of from_pretrained"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_work_are_errors_of_evollm(folder, model_config: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load_base_model(folder, model_config)


def test_a_name_that_leads_nowhere_is_an_error_of_evollm(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, said in (("empty", "cannot be loaded"), ("broken", "cannot be loaded"), ("missing", "no such folder")):
        with pytest.raises(ConfigurationError, match=said):
            load_base_model(str(tmp_path / name))


def test_files_that_lack_weights_are_refused(folder) -> None:
    """transformers would draw them at random and say so in its log."""
    tensors = load_file(Path(folder, "model.safetensors"))
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"lack weights.*layers\.1.self_attn.q_proj.weight"):
        load_base_model(folder)


def test_a_gguf_file_gives_the_model_that_it_was_written_from(folder, gym, lora, tmp_path) -> None:
    gguf = pytest.importorskip("gguf")
    source = AutoModelForCausalLM.from_pretrained(folder)
    write_gguf(gguf, source, tmp_path / "gguf" / "model.gguf")
    model_config = {"gguf_file": "model.gguf", "dtype": torch.float32}
    agent = DPO(model_name=str(tmp_path / "gguf"), model_config=model_config, lora_config=lora)
    expected = DPO(actor_network=source, lora_config=lora)
    torch.testing.assert_close(logprobs(agent, gym), logprobs(expected, gym), rtol=0, atol=1e-4)
    assert np.isfinite(agent.learn(gym.next_batch())["loss"])
    agent.save_checkpoint(str(tmp_path / "agent"))
    assert torch.equal(logprobs(DPO.load(str(tmp_path / "agent")), gym), logprobs(agent, gym))


def write_gguf(gguf: Any, model: LlamaForCausalLM, path: Path) -> None:
    """A Llama in float32, with the rows of its query and key weights in GGUF's order."""
    path.parent.mkdir()
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                shape = (heads, 2, len(values) // heads // 2, values.shape[1])
                values = np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def adapter(folder: str, lora: LoraConfig, tmp_path: Path) -> str:
    """A PEFT adapter that changes what its base says, as an SFT run elsewhere leaves it."""
    lora.init_lora_weights = False
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_the_folder_of_an_adapter_is_its_base_with_the_adapter_merged(folder, adapter, gym, tmp_path) -> None:
    batch = gym.next_batch()
    agent = DPO(model_name=adapter, lr=1e-3)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).merge_and_unload()
    expected, plain = DPO(actor_network=merged), DPO(model_name=folder)
    assert torch.equal(logprobs(agent, gym), logprobs(expected, gym))
    assert not torch.allclose(logprobs(agent, gym), logprobs(plain, gym))
    assert agent.learn(batch)["loss"] != 0
    agent.save_checkpoint(str(tmp_path / "agent"))
    assert torch.equal(logprobs(DPO.load(str(tmp_path / "agent")), gym), logprobs(agent, gym))


def test_an_adapter_that_cannot_be_merged_is_refused(adapter, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be merged into quantised weights"):
        load_base_model(adapter, {"quantization_config": NF4, "device_map": "cpu"})
    config = json.loads(Path(adapter, "adapter_config.json").read_text())
    for changes, said in (
        ({"base_model_name_or_path": None}, "does not name its base"),
        ({"base_model_name_or_path": str(tmp_path / "nowhere")}, "nowhere.*no such folder"),
        ({"r": 3}, "cannot be merged into"),
        ({"peft_type": "NONE_SUCH"}, "cannot be read"),
    ):
        Path(adapter, "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ConfigurationError, match=said):
            load_base_model(adapter)


def test_an_agents_checkpoint_is_no_model_and_says_what_to_call(make_agent, tmp_path) -> None:
    make_agent().save_checkpoint(str(tmp_path / "agent"))
    with pytest.raises(ConfigurationError, match="load_checkpoint"):
        DPO(model_name=str(tmp_path / "agent"))
