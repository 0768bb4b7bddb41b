"""Rows of strings where the tokenizer has a chat template: said once, with a fix that works as it is written."""

from __future__ import annotations

import json
import re
import warnings
from ast import literal_eval
from pathlib import Path

import pytest
from conftest import make_examples, make_rows
from tokenizers_for_tests import bos_template_tokenizer, chatml_tokenizer, make_tokenizer, no_eos_template_tokenizer

from evollm import ConfigurationError, DataError, PreferenceGym, SFTGym
from evollm.cli import main
from evollm.llm_envs import DatasetGym

TEMPLATES = [chatml_tokenizer, bos_template_tokenizer, no_eos_template_tokenizer]
MESSAGE = "do not go through the chat template"


def as_turns(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The row as messages."""
    prompt = [{"role": "user", "content": row["prompt"]}]
    sides = {name: [{"role": "assistant", "content": text}] for name, text in row.items() if name != "prompt"}
    return {"prompt": prompt, **sides}


def said_of(gym: type[DatasetGym], *arguments: object, **settings: object) -> tuple[DatasetGym, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = gym(*arguments, **settings)
    return env, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("make", TEMPLATES)
@pytest.mark.parametrize(("gym", "rows"), [(PreferenceGym, make_rows), (SFTGym, make_examples)])
@pytest.mark.parametrize("name", ["prompt", "a question"])
def test_strings_are_said_once_and_the_fix_works_as_it_is_written(make, gym, rows, name) -> None:
    tokenizer = make()
    data = [{name: row["prompt"], **{side: row[side] for side in row if side != "prompt"}} for row in rows(12)]
    splits = (data[:8], data[8:10], tokenizer)
    columns = None if name == "prompt" else {"prompt": name}
    _, said = said_of(gym, *splits, final_dataset=data[10:], columns=columns)
    assert [MESSAGE in message for message in said] == [True]
    fix = literal_eval(re.search(r"columns=(\{.*?\})", said[0])[1])
    env, said = said_of(gym, *splits, columns=fix)
    assert said == []
    expected, _ = said_of(gym, list(map(as_turns, rows(8))), list(map(as_turns, rows(2, 8))), tokenizer)
    assert env.fingerprint == expected.fingerprint


def test_the_other_way_out_is_to_have_no_template() -> None:
    tokenizer = chatml_tokenizer()
    with_template, said = said_of(PreferenceGym, make_rows(4), None, tokenizer)
    assert "set tokenizer.chat_template = None" in said[0]
    tokenizer.chat_template = None
    without, said = said_of(PreferenceGym, make_rows(4), None, tokenizer)
    assert said == []
    assert without.fingerprint == with_template.fingerprint


def test_rows_without_a_prompt_are_told_to_be_messages() -> None:
    rows = [{"chosen": f"{row['prompt']}{row['chosen']}", "rejected": f"{row['prompt']}{row['rejected']}"}
            for row in make_rows(4)]  # fmt: skip
    _, said = said_of(PreferenceGym, rows, None, chatml_tokenizer())
    assert re.search(r'hand in messages: \{"prompt": \[\{"role": "user"', said[0])


def test_nothing_is_said_where_there_is_nothing_to_do() -> None:
    tokenizer = chatml_tokenizer()
    rows = make_rows(4)
    opened = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    written = [{**row, "prompt": opened.format(row["prompt"])} for row in rows]
    for data, chosen in [
        (rows, make_tokenizer()),
        (list(map(as_turns, rows)), tokenizer),
        (written, tokenizer),
        ([{"instruction": row.pop("prompt"), **row} for row in make_rows(4)], tokenizer),
    ]:
        assert said_of(PreferenceGym, data, None, chosen)[1] == []
    assert said_of(SFTGym, [{"text": "a b c"}], None, tokenizer)[1] == []


def test_an_instruction_stands_instead_of_a_prompt() -> None:
    for columns in ({"instruction": "prompt", "prompt": "prompt"}, {"instruction": 3}):
        with pytest.raises(ConfigurationError, match=r"columns\.instruction="):
            PreferenceGym(make_rows(4), None, chatml_tokenizer(), columns=columns)
    for rows, missing in ((make_rows(4), "question"), ([{"chosen": "a b", "rejected": "a c"}], "prompt")):
        with pytest.raises(DataError, match=rf"no column '{missing}', which columns\.instruction names"):
            PreferenceGym(rows, None, chatml_tokenizer(), columns={"instruction": missing})


@pytest.mark.filterwarnings("always")
def test_the_command_line_says_it_once_and_takes_the_fix(make_model, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    chatml_tokenizer().save_pretrained("model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
    line = ["validate", "--recipe", "population", "model=model", "data=rows.jsonl"]
    assert main(line) == 0
    said = capsys.readouterr()
    assert said.err.count(MESSAGE) == said.out.count(MESSAGE) == 1
    fix = re.search(r"command line (columns\S+)\)", said.err)[1]
    assert main([*line, fix]) == 0
    said = capsys.readouterr()
    assert MESSAGE not in said.err + said.out
    assert main(["inspect", "rows.jsonl", "--model", "model"]) == 0
    said = capsys.readouterr().out
    assert said.count(MESSAGE) == said.count(fix) == 1
