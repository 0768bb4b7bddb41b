"""Chat templates that write the date, and what is said of texts that have changed."""

from __future__ import annotations

import importlib
import json
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from tokenizers_for_tests import chatml_tokenizer

from evollm import DPO, ConfigurationError, PreferenceGym, finetune_llm_preference, replay, tune
from evollm.data import clock
from evollm.runs import read_run
from evollm.tuning.winner import open_winner

SHORT: dict[str, Any] = {
    **{"population": 2, "evo_steps": 2, "data_batch_size_per_gpu": 8, "lr": 1e-3, "num_sample_answers": 0},
    **{"lora_config": {"r": 4, "target_modules": ["q_proj"]}, "verbose": False},
}


class Clock(datetime):
    """A clock that is set by hand."""

    today_is = datetime(2026, 11, 26, 23, 0)

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls.today_is


def rows(count: int = 40) -> list[dict[str, Any]]:
    def say(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": say("user", f"q{n}"),
            "chosen": say("assistant", f"yes {n}"),
            "rejected": say("assistant", f"no {n}"),
        }
        for n in range(count)
    ]


@pytest.fixture
def dated(make_model, tmp_path, monkeypatch) -> Path:
    """A base whose template writes the date, and a clock that the test sets."""
    monkeypatch.setattr(importlib.import_module("evollm.tuning.tune"), "write_report", lambda run_dir: None)
    monkeypatch.setattr(clock, "datetime", Clock)
    monkeypatch.setattr(Clock, "today_is", datetime(2026, 11, 26, 23, 0))
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path


def tomorrow() -> None:
    Clock.today_is += timedelta(hours=2)


def begun(env: PreferenceGym) -> str:
    return str(env.tokenizer.decode(env.train_pairs[0].prompt_ids[:12]))


def test_a_template_that_writes_the_date_does_not_stop_a_resume(dated) -> None:
    data = dated / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    whole = tune(str(dated / "base"), str(data), num_epochs=2, run_dir=dated / "whole", **SHORT)
    tune(str(dated / "base"), str(data), num_epochs=1, run_dir=dated / "run", **SHORT)
    tomorrow()
    tune(str(dated / "base"), str(data), num_epochs=2, resume_from_checkpoint=dated / "run", **SHORT)
    one, other = (read_run(run).config["data"] for run in (dated / "run", dated / "whole"))
    assert one["fingerprint"] == other["fingerprint"]
    # The same texts, and so the same schedule, bit for bit.
    assert replay(dated / "whole", run_dir=dated / "again", verbose=False).exact
    assert whole.run_dir == dated / "whole"
    assert open_winner(dated / "run").agent.steps > 0


def test_a_new_run_writes_the_day_on_which_it_is_begun(dated) -> None:
    tokenizer = open_tokenizer(dated)
    before = PreferenceGym(rows(), None, tokenizer)
    tomorrow()
    after = PreferenceGym(rows(), None, tokenizer)
    assert begun(before).startswith("26 Nov 2026")
    assert begun(after).startswith("27 Nov 2026")
    with clock.at(before.written_at):
        assert begun(PreferenceGym(rows(), None, tokenizer)).startswith("26 Nov 2026")


def test_a_gym_of_ones_own_takes_the_time_that_a_refused_resume_names(dated) -> None:
    def go_on(**settings: Any) -> None:
        agent = DPO(model_name=str(dated / "base"), lora_config=LoraConfig(r=2, target_modules=["q_proj"]), seed=1)
        env = PreferenceGym(rows(), None, open_tokenizer(dated), **settings.pop("gym", {}))
        finetune_llm_preference([agent], env, verbose=False, **settings)

    go_on(num_epochs=1, run_dir=dated / "run")
    tomorrow()
    with pytest.raises(ConfigurationError, match="the chat template writes the date: build the gym with") as refused:
        go_on(num_epochs=2, resume_from_checkpoint=dated / "run")
    named = re.search(r"written_at='([^']+)'", str(refused.value))
    assert named is not None
    go_on(num_epochs=2, resume_from_checkpoint=dated / "run", gym={"written_at": named[1]})


@pytest.mark.parametrize("written_at", ["yesterday", 20261126, ""])
def test_a_time_that_is_none_is_refused(dated, written_at: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"written_at=.*must be a time, such as"):
        PreferenceGym(rows(), None, open_tokenizer(dated), written_at=written_at)


def open_tokenizer(folder: Path) -> Any:
    from evollm.models.loading.pretrained import load_tokenizer  # noqa: PLC0415

    return load_tokenizer(str(folder / "base"))


def test_of_another_dataset_the_message_says_which_text_changed(dated) -> None:
    tune(str(dated / "base"), rows(), num_epochs=1, run_dir=dated / "run", **SHORT)
    changed = rows()
    changed[7]["prompt"][0]["content"] = "something else"
    with pytest.raises(
        ConfigurationError, match=r"(train|test|final): the first other text is that of row 7, which.*else"
    ):
        tune(str(dated / "base"), changed, num_epochs=2, resume_from_checkpoint=dated / "run", **SHORT)


@pytest.mark.parametrize("count", [3, 300, 1000])
def test_a_text_that_changed_is_found_in_datasets_of_any_size(dated, count: int) -> None:
    tokenizer = open_tokenizer(dated)
    before = PreferenceGym(rows(count), None, tokenizer)
    changed = rows(count)
    changed[count - 2]["chosen"][0]["content"] = "certainly"
    after = PreferenceGym(changed, None, tokenizer)
    said = after.changed_text({"digests": before.digests})
    assert said.startswith("train: the first other text is ")
    first = int(said.split(" row ")[1].split(",")[0])
    assert count - 2 - count // 256 - 1 <= first <= count - 2
    fewer = PreferenceGym(rows(count)[: -count // 2], None, tokenizer)
    assert fewer.changed_text({"digests": before.digests})
