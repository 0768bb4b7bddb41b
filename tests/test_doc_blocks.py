"""The Python and YAML of the documentation run; README and quickstart are run by tests of their own."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_examples, make_rows
from documented import blocks
from safetensors.torch import load_file
from tokenizers_for_tests import CHATML, make_tokenizer, t5_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration
from two_workers import TwoWorkers

import evollm
from evollm.cli import main

DOCS = Path(__file__).parents[1] / "docs"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Pages whose blocks other tests run, or that need several processes.
ELSEWHERE = {
    "quickstart.md": "test_docs.py",
    "processes.md": "test_tutorials.py launches the same lines",
    "ray.md": "execution/test_ray.py, which needs the extra ray",
    "from_agilerl.md": "test_agilerl_script.py",
    "from_trl.md": "test_from_trl.py",
}
Namespace = dict[str, Any]


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.fixture
def namespace(make_model, lora, tmp_path, monkeypatch) -> Namespace:
    """What the pages take for granted: a small model, files, a gym, agents, and all of evollm by name."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(adds_bos=True)
    # bitsandbytes quantises blocks of 64 values.
    model = make_model(hidden_size=64, intermediate_size=64)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, rows in (("train", make_rows(40)), ("test", make_rows(4, 40))):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {name: getattr(evollm, name) for name in evollm.__all__} | {"model": model, "tokenizer": tokenizer}
    env = evollm.PreferenceGym(make_rows(8), make_rows(4, 8), tokenizer)
    hp_config = evollm.HyperparameterConfig(lr=evollm.RLParameter(min=1e-5, max=1e-3))
    population = evollm.DPO.population(2, actor_network=model, lr=1e-4, lora_config=lora, hp_config=hp_config)
    return found | {
        "name": "model",
        "env": env,
        "pairs": env,
        "examples": evollm.SFTGym(make_examples(8), make_examples(4, 8), tokenizer),
        "population": population,
        "agent": population[0],
        "tournament": evollm.TournamentSelection(tournament_size=2, elitism=True, population_size=2),
        "mutation": evollm.Mutations(rand_seed=1),
    }


def run_before(namespace: Namespace) -> None:
    """A run that a page goes on with."""
    evollm.finetune_llm_preference(namespace["population"], namespace["env"], num_epochs=1, run_dir="my-run")


def make_t5(namespace: Namespace) -> None:
    """An encoder-decoder in a folder, and the gym for it."""
    tokenizer = t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained("t5")
    namespace["tokenizer"] = tokenizer


def take_two_workers(namespace: Namespace) -> None:
    """The executor that the page shows."""
    namespace["TwoWorkers"] = TwoWorkers


def write_ratings(namespace: Namespace) -> None:
    """Files of answers with labels."""
    del namespace
    for name, rows in (("ratings", make_rows(6)), ("test-ratings", make_rows(4, 6))):
        answers = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def write_questions(namespace: Namespace) -> None:
    """Files of prompts with the right answers, and a reward model."""
    reader = make_tokenizer(chat_template=CHATML, pad_token="<unk>")
    settings = {**namespace["model"].config.to_dict(), "num_labels": 1, "pad_token_id": reader.pad_token_id}
    LlamaForSequenceClassification(LlamaConfig(**settings)).save_pretrained("reward-model")
    reader.save_pretrained("reward-model")
    for name, rows in (("questions", make_rows(6)), ("test-questions", make_rows(4, 6))):
        asked = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in rows]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def write_sets(namespace: Namespace) -> None:
    """Files of two sets."""
    del namespace
    for name, skip in (("helpful", 0), ("harmless", 50)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(6, skip)))


PAGES: dict[str, Callable[[Namespace], None]] = {
    "add_a_strategy.md": lambda _: None,
    "add_an_executor.md": take_two_workers,
    "checkpoints.md": run_before,
    "data.md": write_sets,
    "grpo.md": write_questions,
    "kto.md": write_ratings,
    "losses.md": lambda _: None,
    "models.md": make_t5,
    "search.md": lambda _: None,
    "stages.md": lambda _: None,
    "tracking.md": lambda _: None,
    "win_rate.md": lambda _: None,
}


def test_no_page_with_python_is_left_out() -> None:
    pages = {page.name for page in DOCS.glob("*.md") if blocks(text_of(page.name), "python")}
    assert pages == PAGES.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, namespace) -> None:
    PAGES[page](namespace)
    for block in blocks(text_of(page), "python"):
        if "load_in_4bit" in block and importlib.util.find_spec("bitsandbytes") is None:
            continue
        there = ["tensorboard", *(["wandb"] if importlib.util.find_spec("wandb") else [])]
        code = block.replace('["tensorboard", "wandb"]', json.dumps(there))
        exec(code.replace("google/flan-t5-small", "t5"), namespace)
    if page == "stages.md":
        learner, chooser = namespace["learner"], namespace["chooser"]
        assert (type(learner), type(chooser)) == (evollm.SFT, evollm.DPO)
        # A next stage takes weights, and its own learning rate.
        assert chooser.hyperparameter_values()["lr"] == 5e-5


def test_the_yaml_of_the_pages_is_a_configuration(namespace, capsys) -> None:
    (config,) = blocks(text_of("cli.md"), "yaml")
    Path("run.yaml").write_text(config.replace(NAME, "model"))
    assert main(["validate", "run.yaml"]) == 0
    assert "agents: 8 of DPO" in capsys.readouterr().out
    (columns,) = blocks(text_of("data.md"), "yaml")
    rows = [
        {"instruction": row["prompt"], "input": "", "output_1": row["chosen"], "output_2": row["rejected"],
         "annotator": 1 + number % 2, "context": "x"}
        for number, row in enumerate(make_rows(40))
    ]  # fmt: skip
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run.yaml").write_text(f"model: model\ndata: train.jsonl\n{columns}")
    assert main(["validate", "run.yaml"]) == 0
    assert "train: 32 pairs kept" in capsys.readouterr().out
    (row,) = blocks(text_of("data.md"), "json")
    assert json.loads(row).keys() == {"prompt", "chosen", "rejected"}


def test_what_stages_say_is_taken_over(namespace) -> None:
    for block in blocks(text_of("stages.md"), "python"):
        exec(block, namespace)

    def loaded(path: str, **settings: bool) -> evollm.DPO:
        agent = evollm.DPO(actor_network=namespace["model"], lr=1e-3, beta=0.3)
        agent.load_checkpoint(path, **settings)
        return agent

    def weights(path: str) -> dict[str, torch.Tensor]:
        return load_file(Path(path, "actor/adapter_model.safetensors"))

    for stage, settings in (("stage-1", {}), ("stage-2", {"overwrite_reference_adapter": True})):
        agent = loaded(f"{stage}/elite", **settings)
        assert (agent.lr, agent.beta, agent.steps) == (1e-3, 0.3, 0)
        agent.save_checkpoint("now")
        torch.testing.assert_close(weights("now"), weights(f"{stage}/elite"), rtol=0, atol=0)
        # The policy is held near that model: no pair has gained anything yet.
        assert not agent.evaluate(namespace["env"]).margins.any()
    resumed = loaded("stage-2/elite")
    assert (resumed.lr, resumed.beta) == (5e-5, 0.1)
    assert resumed.steps > 0
