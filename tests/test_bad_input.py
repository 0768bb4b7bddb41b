"""Mistakes that newcomers make: each is one line that names field, value and what to do, before any training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_examples, make_rows
from transformers import LlamaConfig, LlamaForCausalLM

import evollm
from evollm.cli import main
from evollm.errors import EvoLLMError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
BASE = "model: model\ndata: pairs.jsonl\n"


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tokenizer) -> Path:
    """A folder with a model, its data, and what passes for such."""
    folder = tmp_path_factory.mktemp("shop")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
    for name in ("model", "lfs-model", "bare-model"):
        model.save_pretrained(folder / name)
        if name != "bare-model":
            tokenizer.save_pretrained(folder / name)
    (folder / "lfs-model/model.safetensors").write_text(POINTER)
    pairs = "".join(json.dumps(row) + "\n" for row in make_rows(40))
    texts = {
        "pairs.jsonl": pairs,
        "crlf.jsonl": pairs.replace("\n", "\r\n"),
        "bom.jsonl": "\ufeff" + pairs,
        "examples.jsonl": "".join(json.dumps(row) + "\n" for row in make_examples(40)),
        "pointer.jsonl": POINTER,
        "pointer.parquet": POINTER,
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "python.jsonl": "{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}\n",
        "page.jsonl": "<!DOCTYPE html>",
        "semicolons.csv": "prompt;chosen;rejected\na; b; c\n",
        "run/lineage.jsonl": "",
        "run/config.json": "{}",
        "parts/a.jsonl": pairs,
        "parts/b.jsonl": pairs,
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    (folder / "wide.jsonl").write_bytes(pairs.encode("utf-16"))
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture
def said_of(shop, monkeypatch, capsys) -> Callable[..., str]:
    """What `evollm validate` and `evollm train` say of a configuration, in one line."""
    monkeypatch.chdir(shop)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def say(text: str, *values: str) -> str:
        Path("run.yaml").write_text(text, newline="")
        there = sorted(shop.rglob("*"))
        lines = []
        for command in ("validate", "train"):
            assert main([command, "run.yaml", *values]) == 1
            said = capsys.readouterr()
            assert said.out == ""
            lines.append(said.err)
        assert sorted(shop.rglob("*")) == there
        assert lines[0] == lines[1]
        assert lines[0].startswith("evollm: ")
        assert lines[0].count("\n") == 1
        # No value is printed at length.
        assert all(len(found) <= 100 for found in re.findall(r"\{.*?\}", lines[0]))
        return lines[0].strip().removeprefix("evollm: ")

    return say


# What stands in the file beside model and data, or instead of them, and what is said; ... is anything.
MISTAKES = {
    # Files.
    "data: pointer.jsonl": "data='pointer.jsonl': is a pointer of Git LFS and not the data; run git lfs pull...",
    "data: pointer.parquet": "data='pointer.parquet': is a pointer of Git LFS and not the data; run git lfs pull...",
    "data: empty.jsonl": "data='empty.jsonl': is empty (0 bytes); write or fetch it again",
    "data: blank.jsonl": "data='blank.jsonl': has no rows; hand in at least one pair",
    "data: wide.jsonl": "data='wide.jsonl': is a text in UTF-16; save it as UTF-8",
    "data: python.jsonl": "data='python.jsonl': line 1 is not valid JSON...write lines with json.dumps...",
    "data: page.jsonl": "data='page.jsonl': line 1 is not valid JSON...download the file itself",
    "data: semicolons.csv": "data='semicolons.csv': is separated by ';'; save it with commas between the columns",
    "data: parts": "data='parts': is a folder: pass its files, [parts/a.jsonl, parts/b.jsonl]",
    "data: nothing": "data='nothing': is a folder without data files...",
    "data: parts/*.jsonl": "data='parts/*.jsonl': no such file, and patterns are not expanded: pass a list, "
    "[parts/a.jsonl, parts/b.jsonl]",
    "data: pair.jsonl": "data='pair.jsonl': no such file; the nearest there is 'pairs.jsonl'",
    "data: \"'pairs.jsonl'\"": "data=\"'pairs.jsonl'\": no such file: the quotation marks are a part of the name; "
    "write pairs.jsonl",
    "data: https://huggingface.co/datasets/a/b": "data=...: is an address: write a/b, its name on the hub",
    "data: https://a.b/c.jsonl": "data=...: is an address: download the file, and pass its path",
    "data: hub/name": "data='hub/name': is no file here and not in the cache of datasets...: give a file...",
    "data: {train: pairs.jsonl}": "data={...}: must be the path of a file; the others are test_data and final_data...",
    "data: 3": "data=3: must be rows, the path of a file, or a list of paths",
    "data: examples.jsonl": "data=...: lacks chosen and rejected; rows with a completion or messages are for "
    "SFTGym: algorithm: sft, or --sft...",
    "algorithm: sft": "data=...: holds preference pairs; pass them to PreferenceGym (algorithm=dpo)...",
    "test_data: no": "test_data='no': must be rows, ... or false for none",
    "final_data: None": "final_data='None': must be rows, ... or false for none",
    "test_data: 0.1": "test_data=0.1: must be rows, ... null for a tenth of data's rows...",
    # Models.
    "model: ./missing": "model='./missing': no such folder: give that of a model, or its name on the hub...",
    "model: hub/name": "model='hub/name': is no folder here and not in the cache of the hub...or a network...",
    "model: pairs.jsonl": "model='pairs.jsonl': is no folder: give that of a model, or its name on the hub",
    "model: model/config.json": "model='model/config.json': is a file of a model: give its folder, 'model'",
    "model: nothing": "model='nothing': is no folder of a model: it has no config.json; ...",
    "model: bare-model": "model='bare-model': has no tokenizer (tokenizer.json): ...or pass tokenizer",
    "model: lfs-model": "model='lfs-model': its model.safetensors is a pointer of Git LFS...: run git lfs pull...",
    "model: run": "model='run': is a run folder: evollm export run --to FOLDER writes its model...",
    "model: https://huggingface.co/gpt2": "model=...: is the address of a page: write gpt2, its name on the hub",
    "Model: model": "model=None: run.yaml does not say it...; it says Model, which is called model here",
    "base_model: model": "model=None: ...; it says base_model, which is called model here",
    "tokenizer: ./missing": "tokenizer='./missing': no such folder...",
    # Names.
    "lora_config: {rank: 8}": "lora_config.rank=8: is no parameter; the nearest known one is 'r'",
    "lora_config: {alpha: 8}": "lora_config.alpha=8: is no parameter; the nearest known one is 'lora_alpha'",
    "lora_r: 8": "lora_r=8: is no parameter; it is an entry of another one: lora_config.r",
    "load_in_4bit: true": "load_in_4bit=True: ...: model_config.quantization_config.load_in_4bit",
    "lora_config.r: 8": "lora_config.r=8: is no parameter; in a file write lora_config: {r: ...}...",
    "training: {lr: 1e-5}": "training={...}: is no parameter; write its entries by themselves...",
    "LR: 1e-5": "LR=1e-05: is no parameter; the nearest known one is 'lr'",
    "run-dir: out": "run-dir='out': is no parameter; the nearest known one is 'run_dir'",
    "epochs: 2": "epochs=2: is no parameter; the nearest known one is 'num_epochs'",
    "optim: lion": "optim='lion': is not known; the nearest is 'lion_8bit'...",
    "optimizer: lion_32bit": "optimizer='lion_32bit': is no parameter; the nearest known one is 'optim'",
    "warmup_ratio: 0.1": "warmup_ratio=0.1: has no effect with lr_scheduler_type='constant'...",
    "bf16: true": "bf16=True: is no parameter; leave it out: the base's type is dtype, such as dtype=bfloat16...",
    "hp_config: {learning_rate: [1e-5, 1e-4]}": "hp_config.learning_rate=...: ...the nearest known name is 'lr'...",
    "hp_config: {LR: [1e-5, 1e-4]}": "hp_config.LR=...: ...the nearest known name is 'lr'...",
    "loss_type: IPO": "loss_type='IPO': 'IPO' is not a loss; the nearest is 'ipo'...",
    "hp_config: {lr: {min: 1e-5, maxx: 1e-4}}": "hp_config.lr.maxx=0.0001: ...the nearest known one is 'max'",
    "hp_config: {lr: {low: 1e-5, high: 1e-4}}": "hp_config.lr.low=1e-05: ...the nearest known one is 'min'",
    "columns: {promt: prompt}": "columns.promt='prompt': ...; the nearest is 'prompt'",
    "model_config: {dtpye: bfloat16}": "model_config.dtpye='bfloat16': ...the nearest known one is 'dtype'",
    "model_config: {load_in_4bit: true}": "model_config.load_in_4bit=True: belongs one level down: ...",
    "model_config: {quantization_config: {load_in_4_bit: true}}": "model_config.quantization_config."
    "load_in_4_bit=True: ...the nearest known one is 'load_in_4bit'",
    # Values.
    'lr: "1e-5"': "lr='1e-5': must be a number; it is text, so take its quotation marks away (PyYAML...write 1.0e-5)",
    "lr: 0,001": "lr='0,001': must be a number; write 0.001, with a point",
    "lr: [1e-5, 1e-4]": "lr=[1e-05, 0.0001]: must be a number",
    'num_epochs: "2"': "num_epochs='2': must be a whole number or null; it is text, so take its quotation marks away",
    "max_steps: None": "max_steps='None': must be a whole number or null; write null",
    "population: 4.0": "population=4.0: must be a whole number of at least 1; write 4",
    "verbose: yes": "verbose='yes': must be true or false",
    "verbose: on": "verbose='on': must be true or false",
    "gradient_checkpointing: off": "gradient_checkpointing='off': must be true or false or null",
    'lora_config: {r: "8"}': "lora_config.r='8': must be a whole number; it is text, so take its quotation marks away",
    "lora_config: {task_type: CAUSAL}": "lora_config={'task_type': 'CAUSAL'}: cannot be used: ...CAUSAL_LM...",
    'lora_config: {target_modules: "q_proj, v_proj"}': "lora_config={...'target_modules': 'q_proj, v_proj'...}: ..."
    "give target_modules a list: [q_proj, v_proj]",
    "hp_config: {lr: 1e-5}": "hp_config.lr=1e-05: must be [smallest, largest]...",
    'hp_config: {lr: ["1e-5", "1e-4"]}': "hp_config.lr.min='1e-5': must be a number; it is text...",
    "dtype: bf16": "dtype='bf16': must be 'auto' or one of ...; write bfloat16",
    "model_config: {dtype: fp16}": "model_config.dtype='fp16': must be a torch type...; write float16",
    "model_config: {attn_implementation: flash}": "model_config.attn_implementation='flash': is none of eager...",
    "loss_type: dpo": "loss_type='dpo': 'dpo' is not a loss; ...known are sigmoid...",
    # What is no YAML, or not what it looks like.
    "hp_config:\n\tlr: [1e-5, 1e-4]": "config='run.yaml': is not valid YAML: line 4...: indent with spaces...",
    "lr: 1e-5: 3": "config='run.yaml': is not valid YAML: line 3...: indent the keys of a mapping alike...",
    "lr = 1e-5": "config='run.yaml': is not valid YAML: ...: a line is key: value",
    "run_dir: @out": "config='run.yaml': is not valid YAML: ...: put the text into quotation marks",
    'data: "C:\\Users\\me\\train.jsonl"': "config='run.yaml': is not valid YAML: ...: put a path with \\ into single "
    "quotation marks",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_field_value_and_fix(said_of, mistake) -> None:
    key = re.match(r"(\w*)", mistake)[1].lower()
    own = "model" if key == "base_model" else key
    kept = [line for line in BASE.splitlines() if not line.startswith(f"{own}:")]
    wanted = ".*".join(map(re.escape, MISTAKES[mistake].split("...")))
    said = said_of("\n".join([*kept, mistake, ""]))
    assert re.fullmatch(wanted, said), said


def test_what_stands_on_the_line_is_no_riddle_either(shop, monkeypatch, capsys) -> None:
    monkeypatch.chdir(shop)
    Path("run.yaml").write_text(BASE)
    for line, wanted in {
        "train pairs.jsonl": "config='pairs.jsonl': is data and no configuration: give data=pairs.jsonl",
        "train model=model data=pairs.jsonl": "config='model=model': .* give a YAML file first, or --recipe NAME",
        "train model": "config='model': cannot be read: it is a folder: give a YAML file",
        "train wide.jsonl": "config='wide.jsonl': cannot be read: it is no text in UTF-8 .*: save it as UTF-8",
        "train --recipe dpo pairs.jsonl": "override='pairs.jsonl': must be key=value: data=pairs.jsonl",
        "train run.yaml lr:1e-5": "override='lr:1e-5': must be key=value, such as lr=1e-5",
        "train run.yaml lora_config.rank=8": "lora_config.rank=8: is no parameter; the nearest known one is 'r'",
        "train run.yaml lr=[1": r"override='lr=\[1': is not valid YAML",
    }.items():
        assert main(line.split()) == 1
        assert re.fullmatch(f"evollm: {wanted}.*\n", capsys.readouterr().err), line
    with pytest.raises(SystemExit) as stopped:
        main(["train", "run.yaml", "--lr=1e-5"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --lr=1e-5; a setting is given without dashes" in capsys.readouterr().err


def test_line_ends_and_a_mark_of_windows_are_no_mistake(shop, monkeypatch, capsys) -> None:
    monkeypatch.chdir(shop)
    for data in ("crlf.jsonl", "bom.jsonl"):
        Path("run.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.replace("pairs.jsonl", data).replace("\n", "\r\n").encode())
        assert main(["validate", "run.yaml"]) == 0
        assert "train: 32 pairs kept" in capsys.readouterr().out


def test_a_mistake_in_python_is_an_error_of_evollm(make_model, tokenizer, shop, monkeypatch) -> None:
    monkeypatch.chdir(shop)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows, model = make_rows(8), make_model()
    calls: dict[str, Callable[[], Any]] = {
        r"lora_config.rank=8: .*'r'": lambda: evollm.tune("model", "pairs.jsonl", lora_config={"rank": 8}),
        "lr='1e-5': must be a number; it is text": lambda: evollm.DPO(actor_network=model, lr="1e-5"),
        "test_data=0.1: must be rows": lambda: evollm.tune("model", "pairs.jsonl", test_data=0.1),
        r"model_config.dtpye='x': .*'dtype'": lambda: evollm.DPO(model_name="model", model_config={"dtpye": "x"}),
        "dtype='bf16': .*; write bfloat16": lambda: evollm.DPO(model_name="model", dtype="bf16"),
        "model_name='lfs-model': its model.safetensors is a pointer": lambda: evollm.DPO(model_name="lfs-model"),
        "hp_config.learning_rate=.* 'lr'": lambda: evollm.DPO(
            actor_network=model,
            hp_config=evollm.HyperparameterConfig(learning_rate=evollm.RLParameter(min=1e-5, max=1e-4)),
        ),
        "lora_config='dict': must be a peft.LoraConfig": lambda: evollm.DPO(actor_network=model, lora_config={"r": 8}),
        r"data_batch_size_per_gpu=4.0: .*; write 4": lambda: evollm.PreferenceGym(
            rows, None, tokenizer, data_batch_size_per_gpu=4.0
        ),
        r"tokenizer=LlamaForCausalLM\(.{0,100}: must be": lambda: evollm.PreferenceGym(rows, None, model),
        "train_dataset='parts': is a folder: pass its files": lambda: evollm.PreferenceGym("parts", None, tokenizer),
        "train_dataset='pointer.jsonl': is a pointer": lambda: evollm.SFTGym("pointer.jsonl", None, tokenizer),
        "agent='run': must be an agent.*DPO.load": lambda: evollm.save_merged_model("run", "out"),
    }
    for wanted, call in calls.items():
        with pytest.raises(EvoLLMError, match=f"^{wanted}"):
            call()
