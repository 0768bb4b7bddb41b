"""A run folder from somebody else: nothing in it runs, and nothing outside of it is touched, whatever it holds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from quick_page import quick_page
from tokenizers_for_tests import chatml_tokenizer

import evollm
from evollm import DPO, EvoLLMError
from evollm.checkpoints.atomic import seal
from evollm.cli import main

# Damaged records are said, and runs go on.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = ("lora_config.r=2", "lora_config.target_modules=[q_proj]", "data_batch_size_per_gpu=16", "num_epochs=1")
# Which go on with, read or hand on a run; each writes somewhere.
COMMANDS: dict[str, list[str]] = {
    "resume": ["resume", "run", "num_epochs=2"],
    "report": ["report", "run"],
    "export": ["export", "run", "--to", "out"],
    "chat": ["chat", "run", "--prompt", "Tea?", "--max-new-tokens", "1"],
    "replay": ["replay", "run", "--run-dir", "replayed"],
}
FILES = ("config.json", "metrics.jsonl", "lineage.jsonl", "timing.jsonl", "tune.json", "final.safetensors", ".lock")


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A working folder with a model, its data, a run that has ended, and somebody's other files beside it."""
    folder = tmp_path_factory.mktemp("security")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("evollm.report.write.render", quick_page)
        tokenizer = chatml_tokenizer()
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained("model")
        tokenizer.save_pretrained("model")
        Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
        asked = ["model=model", "data=train.jsonl", "population=2", "generations=2", "num_sample_answers=1"]
        Path("run.yaml").write_text("{}\n")
        assert main(["train", "run.yaml", *asked, "run_dir=run", "verbose=false", *SMALL]) == 0
        shutil.rmtree("run/report")
        Path("run/report.html").unlink()
        precious = Path("precious")
        shutil.copytree("run/elite", precious / "agent")
        for name in ("thesis.txt", "notes/a.txt", "step-000099.safetensors", "page.html", "N.png"):
            (precious / name).parent.mkdir(exist_ok=True)
            (precious / name).write_text(name)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy to spoil; nothing beside the run may change, and nothing may wait forever."""
    shutil.copytree(template, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    before = _state(Path("precious"))
    signal.alarm(120)
    yield tmp_path / "copy"
    signal.alarm(0)
    assert _state(Path("precious")) == before
    assert not Path("ran").exists()


def _state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


@pytest.fixture
def trap(folder: Path) -> str:
    """A model folder whose code, if it is run, leaves a file `ran`."""
    shutil.copytree("model", "trap")
    Path("trap/trap.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Trap: pass\n")
    config = json.loads(Path("trap/config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}}
    Path("trap/config.json").write_text(json.dumps(config))
    return str(folder / "trap")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are drawn at once."""
    monkeypatch.setattr("evollm.report.write.render", quick_page)


def run(name: str) -> int:
    """One command; what it raises that is not a refusal is a failure of the test."""
    return main(COMMANDS[name])


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change a file of plain data, and write the manifests anew, as somebody would who wants to be believed."""
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    else:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    for folder in path.parents:
        if (folder / "manifest.json").is_file():
            (folder / "manifest.json").unlink()
            seal(folder)


OVERRIDES: list[dict[str, Any]] = [
    {"model_name": "TRAP", "model_config": {"trust_remote_code": True}},
    {"model_name": "TRAP", "model_config": {"trust_remote_code": True}, "actor_network": None},
    {"archive": "precious/thesis.txt"},
    {"device": "meta"},
    {"accelerator": 1},
    {"hp_config": {"lr": 1}},
    {"index": -1},
    {"seed": "x"},
    {"lr": [1, [2]]},
    {"beta": {"a": 1}},
]


@pytest.mark.parametrize("section", ["settings", "hyperparameters"])
@pytest.mark.parametrize("values", OVERRIDES, ids="+".join)
def test_a_checkpoint_names_neither_a_model_nor_its_arguments(folder, trap, capsys, section: str, values) -> None:
    values = {name: trap if value == "TRAP" else value for name, value in values.items()}
    for agent in [Path("run/elite"), *Path("run/checkpoints").glob("*/agent-*")]:
        edit(agent / "attributes.pt", lambda attributes: attributes[section].update(values))
    for name in ("chat", "export", "resume") if "model_name" in values else ("chat",):
        assert run(name) == 1
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("evollm:")]
        assert "attributes" in line
    for attempt in (
        lambda: DPO.load("run/elite"),
        lambda: DPO.load("run/elite", actor_network=evollm.models.load_base_model("model")),
        lambda: DPO(model_name="model").load_checkpoint("run/elite", merge_lora_configs=True),
    ):
        with pytest.raises(EvoLLMError, match="attributes"):
            attempt()


@pytest.mark.parametrize(
    "change",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"auto_mapping": {"base_model_class": "Trap", "parent_library": "antigravity"}, "r": "2"},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"peft_type": "IA3"},
        {"corda_config": {"cache_file": "precious/thesis.txt"}},
        {"target_modules": [["q_proj"]]},
        {"rank_pattern": {"q_proj": "x"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_adapter_configuration_says_how_it_computes_and_nothing_else(folder, capsys, change) -> None:
    edit(Path("run/elite/actor/adapter_config.json"), lambda config: config.update(change))
    for name in ("chat", "export"):
        assert run(name) == 1
        assert capsys.readouterr().err.count("\n") <= 1


PLACES = (
    *FILES,
    *("evaluations", "checkpoints", "elite", "report.html", "report", ".elite.new", ".elite.old", "tensorboard"),
    *("tracking-id", "checkpoints/.step-000002.new", "checkpoints/.step-000004.old", "checkpoints/step-000002"),
    *("evaluations/step-000002.safetensors", "report/held-out-accuracy.png", "elite/actor", "elite/attributes.pt"),
)


@pytest.mark.parametrize("to", ["precious/agent", "precious/nothing"])
@pytest.mark.parametrize("place", PLACES)
def test_no_link_is_followed(folder, quick, place: str, to: str) -> None:
    path = Path("run") / place
    _remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(folder / to)
    for name in ("report", "resume"):
        run(name)
    assert not Path("precious/nothing").exists()
    for name in ("chat", "export") if place.startswith("elite") else ():
        run(name)


@pytest.mark.parametrize("place", FILES)
def test_nothing_is_written_through_a_hard_link(folder, quick, place: str) -> None:
    path = Path("run") / place
    shutil.copy(path, "precious/copy")
    before = Path("precious/copy").read_bytes()
    path.unlink()
    path.hardlink_to("precious/copy")
    for name in ("report", "resume"):
        run(name)
    assert Path("precious/copy").read_bytes() == before
    Path("precious/copy").unlink()


@pytest.mark.parametrize(
    "place", [*FILES, "report.html", "elite/attributes.pt", "elite/manifest.json", "elite/actor/adapter_config.json"]
)
def test_no_pipe_keeps_a_command_waiting(folder, quick, place: str) -> None:
    path = Path("run") / place
    _remove(path)
    os.mkfifo(path)
    for name in COMMANDS:
        run(name)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["elite_path", "checkpoint_path"])
@pytest.mark.parametrize("to", ["precious/agent", "../copy/precious/agent", "ABSOLUTE", "run/../precious/agent", ["x"]])
def test_a_place_outside_the_folder_is_the_users_to_give(folder, quick, capsys, name: str, to: Any) -> None:
    where = str(folder / "precious/agent") if to == "ABSOLUTE" else to
    edit(Path("run/tune.json"), lambda asked: asked["settings"].update({name: where}))
    assert run("resume") == 1
    assert f"{name}=" in capsys.readouterr().err
    assert main([*COMMANDS["resume"], f"{name}=elsewhere"]) in (0, 1)
    if name == "elite_path":
        assert run("chat") == 1
        assert "--elite" in capsys.readouterr().err
        assert main([*COMMANDS["chat"], "--elite", "precious/agent"]) == 0


@pytest.mark.parametrize(
    "settings",
    [{"run_dir": "precious"}, {"resume_from_checkpoint": "precious"}, {"callbacks": ["print"]}, {"fitness": "print"}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_tune_was_asked_for_names_no_folder_and_no_code(folder, quick, settings) -> None:
    edit(Path("run/tune.json"), lambda asked: asked["settings"].update(settings))
    assert run("resume") in (0, 1)
    assert run("replay") in (0, 1)


class _Tags(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"{tag} {name}" for name, _ in attrs)}


EVIL = '"><script>open("ran")</script><img src=x onerror=alert(1)>\\g<99>$x$ {{ 7*7 }}'


def _spoil(value: Any, evil: str, keys: bool = False) -> Any:
    """Every text, or every name, in a nested value made evil."""
    if isinstance(value, dict):
        return {f"{key}{evil}" if keys else key: _spoil(item, evil, keys) for key, item in value.items()}
    if isinstance(value, list):
        return [_spoil(item, evil, keys) for item in value]
    return f"{value}{evil}" if isinstance(value, str) and not keys else value


def _spoil_texts(words: dict[str, Any]) -> dict[str, Any]:
    """An algorithm's words with every text made evil; names are refused then, which tests/runs/test_words.py shows."""
    scores = [_spoil(score, EVIL) | {"name": score["name"]} for score in words["scores"]]
    curves = [[name, title + EVIL] for name, title in words["curves"]]
    return _spoil(words, EVIL) | {"tags": words["tags"], "scores": scores, "curves": curves}


@pytest.mark.usefixtures("drawn_reports")
def test_no_text_of_a_run_is_markup_in_its_report(folder) -> None:
    clean = _Tags()
    assert run("report") == 0
    clean.feed(Path("run/report.html").read_text())
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(
        json.dumps(
            _spoil(config, EVIL)
            | {"algorithm": "DPO", "device": "cpu", "words": _spoil_texts(config["words"])}
            | {f"x{EVIL}": EVIL}
        )
    )
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    # Texts in the others are numbers that are not finite.
    lines[-1] = _spoil(lines[-1], EVIL) | {"kind": "end", "split": "final"}
    Path("run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lineage = Path("run/lineage.jsonl").read_text().replace('"sigmoid"', json.dumps(EVIL))
    Path("run/lineage.jsonl").write_text(lineage)
    assert run("report") == 0
    page = Path("run/report.html").read_text()
    spoilt_tags = _Tags()
    spoilt_tags.feed(page)
    assert "open(" in page
    assert spoilt_tags.found <= clean.found | {"li", "td", "tr", "table"}
    assert "script" not in spoilt_tags.found
    assert run("export") == 0
    card = Path("out/README.md").read_text()
    assert "open(" in card
    assert "<" not in card
    assert "49" not in page.split("{{ 7*7 }}")[0][-20:]


@pytest.mark.usefixtures("drawn_reports")
@pytest.mark.parametrize("name", ["x/../../../N", "../../precious/N", EVIL, "", "a b", "\\g<99>", "x\0y"])
def test_no_name_of_a_hyperparameter_is_a_path_or_markup(folder, name: str) -> None:
    for file in ("lineage.jsonl", "metrics.jsonl"):
        path = Path("run") / file
        path.write_text(path.read_text().replace('"beta"', json.dumps(name)))
    for command in ("report", "export", "replay"):
        assert run(command) == 1
    assert not Path("run/report.html").exists()


@pytest.mark.parametrize("name", ["../../../precious/agent", "/etc", "agent-0/../../precious", "agent-x", 3])
def test_no_name_of_an_agent_is_a_path(folder, capsys, name: Any) -> None:
    for state in Path("run/checkpoints").glob("*/population.json"):
        edit(state, lambda content: content.update(agents=[name] * 2))
    assert run("resume") == 1
    assert "names no folders of agents" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(([a-z0-9_.])*)*!", "(a|a)+!", ".*.*.*.*!", "x" * 5000])
def test_no_pattern_keeps_a_command_waiting(folder, capsys, field: str, pattern: str) -> None:
    value: Any = {pattern: 2} if field.endswith("_pattern") else pattern
    edit(Path("run/elite/actor/adapter_config.json"), lambda config: config.update({field: value}))
    assert run("chat") == 1
    assert f"lora_config.{field}" in capsys.readouterr().err


@pytest.mark.parametrize("parents", [{0: 0, 1: 1}, {0: 1}, {0: 7}])
def test_no_agent_of_a_lineage_is_its_own_ancestor(folder, quick, capsys, parents: dict[int, int]) -> None:
    path = Path("run/lineage.jsonl")
    founders, *evolutions = map(json.loads, path.read_text().splitlines())
    for index, parent in parents.items():
        founders["births"][index]["parent"] = parent
    path.write_text("".join(json.dumps(line) + "\n" for line in (founders, *evolutions)))
    for name in ("report", "replay", "export"):
        assert run(name) == 1
    assert "has a parent" in capsys.readouterr().err


STRANGE: list[tuple[str, Callable[[Any], Any]]] = [
    ("config.json", lambda content: content.update(schedule={})),
    ("config.json", lambda content: content.update(options={})),
    ("config.json", lambda content: content["data"].pop("fingerprint")),
    ("tune.json", lambda content: content["settings"].update(population=10**30)),
    ("tune.json", lambda content: content["settings"].update(model=["model"])),
    ("tune.json", lambda content: content["settings"].update(tokenizer=5)),
    ("tune.json", lambda content: content["settings"].update(device="meta")),
    ("tune.json", lambda content: content["settings"].update(elite_path="~nobody\0")),
    ("tune.json", lambda content: content["settings"].update(elite_path="/x\x1b[31mEVIL\r")),
    ("elite/attributes.pt", lambda content: content.update(model_config=[1])),
    ("elite/attributes.pt", lambda content: content["settings"].update(seed=10**40)),
    ("elite/attributes.pt", lambda content: content["fitness"].append(content["fitness"])),
    ("checkpoints/step-000002/population.json", lambda content: content.update(config=5)),
    ("checkpoints/step-000002/population.json", lambda content: content.pop("search")),
    ("checkpoints/step-000002/population.json", lambda content: content.update(agents=[])),
    ("checkpoints/step-000002/population.json", lambda content: content.update(step=-5)),
]


@pytest.mark.parametrize(("file", "change"), STRANGE, ids=[f"{n}-{file}" for n, (file, _) in enumerate(STRANGE)])
def test_whatever_stands_in_a_folder_is_read_or_refused_in_one_line(folder, quick, capsys, file: str, change) -> None:
    edit(Path("run") / file, change)
    for name in COMMANDS:
        assert run(name) in (0, 1)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evollm:")]
        assert all(line.isprintable() for line in said)
        assert len(said) <= 1


def test_a_manifest_of_something_else_is_refused(folder, capsys) -> None:
    for files in ([], "x", 5, {"a": 5}, {"a": {"bytes": 1}}):
        text = json.dumps(files, sort_keys=True)
        own = hashlib.sha256(text.encode()).hexdigest()
        manifest = json.dumps({"files": files, "format": 1, "sha256": own}, indent=1) + "\n"
        Path("run/elite/manifest.json").write_text(manifest)
        assert run("chat") == 1
        assert "manifest.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [[], ["lr=1e-2"]])
def test_a_run_that_has_ended_is_not_begun_again_when_its_checkpoints_are_gone(folder, quick, capsys, settings) -> None:
    shutil.rmtree("run/checkpoints")
    before = _state(Path("run"))
    assert main(["resume", "run", *settings]) == 1
    assert "has ended, and its checkpoints are gone" in capsys.readouterr().err
    assert _state(Path("run")) == before


@pytest.mark.parametrize(
    "places",
    [
        {"elite_path": "precious"},
        {"elite_path": "precious/agent", "more": "precious/agent/thesis.txt"},
        {"elite_path": "."},
        {"elite_path": "new", "run_dir": "new/run"},
        {"elite_path": "saved/elite", "checkpoint_path": "saved"},
        {"checkpoint_path": "fresh", "run_dir": "fresh"},
    ],
    ids=str,
)
def test_no_place_of_a_run_is_replaced_with_another(folder, quick, capsys, places) -> None:
    more = places.pop("more", None) if isinstance(places, dict) else None
    if more:
        Path(more).write_text("mine")
    arguments = {"run_dir": "fresh", **places}
    asked = ["model=model", "data=train.jsonl", "population=1", "max_steps=1", *SMALL]
    assert main(["train", "run.yaml", *asked, *(f"{name}={place}" for name, place in arguments.items())]) == 1
    assert "_path=" in capsys.readouterr().err
    if more:
        assert Path(more).read_text() == "mine"
        Path(more).unlink()


def test_a_folder_of_the_users_is_no_leftover_of_a_checkpoint(folder, quick) -> None:
    mine = Path("run/checkpoints/.backup.12345678.gone")
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    assert run("resume") == 0
    assert (mine / "thesis.txt").read_text() == "mine"


def test_nothing_of_the_users_is_replaced_beside_an_export(folder) -> None:
    for place in (".out.new", ".out.old"):
        shutil.copytree("precious", place)
        before = _state(Path(place))
        assert run("export") == 1
        assert _state(Path(place)) == before
        shutil.rmtree(place)
    assert run("export") == 0


def test_a_report_replaces_only_reports(folder) -> None:
    assert main(["report", "run", "--output", "precious/page.html"]) == 1
    Path("run/report").mkdir()
    Path("run/report/held-out-accuracy.png").write_text("my picture")
    assert run("report") == 1
    assert Path("run/report/held-out-accuracy.png").read_text() == "my picture"
    Path("run/report/held-out-accuracy.png").unlink()
    assert run("report") == run("report") == 0


def test_a_base_is_known_by_every_value(make_model) -> None:
    model = make_model()
    seen = {evollm.models.fingerprints.weights_fingerprint(model)}
    for parameter in model.parameters():
        for place in (0, parameter.numel() // 3, parameter.numel() - 1):
            flat = parameter.data.view(-1)
            before = flat[place].item()
            flat[place] = before + 1e-3
            seen.add(evollm.models.fingerprints.weights_fingerprint(model))
            flat[place] = before
    assert len(seen) == 1 + 3 * len(list(model.parameters()))
    assert evollm.models.fingerprints.weights_fingerprint(make_model()) in seen
