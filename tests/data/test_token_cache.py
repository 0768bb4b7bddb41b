"""Token ids that are kept between runs: the same ones, only for what is the same, and whole or not at all."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import make_examples, make_rows
from tokenizers_for_tests import CHATML, chatml_tokenizer, make_tokenizer

from evollm import ConfigurationError, PreferenceGym, SFTGym, own_files
from evollm.data import tokenization


def rows_of_all_kinds() -> list[dict[str, str]]:
    """Pairs of which some are dropped, and some are cut."""
    rows = make_rows(8)
    rows[1]["chosen"] = rows[1]["rejected"]
    rows[3]["prompt"] *= 30
    rows[5]["chosen"] = " yes" * 100
    return rows


def chat_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in make_rows(count)
    ]


def content(env: Any) -> tuple[Any, ...]:
    pairs = [(pair.row, pair.key, pair.prompt_ids.dtype) for pair in env.all_pairs]
    return env.fingerprint, pairs, {name: str(report) for name, report in env.reports.items()}, env.longest_sequence


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """Grows by a number for each split that is tokenised."""
    calls: list[int] = []
    tokenize = tokenization._tokenize
    monkeypatch.setattr(
        tokenization, "_tokenize", lambda *args, **kwargs: (calls.append(1), tokenize(*args, **kwargs))[1]
    )
    return calls


@pytest.mark.parametrize("kind", ["pairs", "chat", "examples", "encoder-decoder"])
def test_what_is_kept_is_what_would_be_made(kind, tmp_path, count) -> None:
    tokenizer = chatml_tokenizer() if kind == "chat" else make_tokenizer(adds_bos=True)
    gym, train, test = PreferenceGym, rows_of_all_kinds(), make_rows(3, 8)
    if kind == "chat":
        train, test = chat_rows(6), chat_rows(9)[6:]
    if kind == "examples":
        gym, train, test = SFTGym, make_examples(6), make_examples(3, 6)
    arguments = {"max_context_length": 90, "encoder_decoder": kind == "encoder-decoder"}
    made = content(gym(train, test, tokenizer, **arguments))
    count.clear()
    for expected in (2, 0):
        env = gym(train, test, tokenizer, cache_dir=tmp_path / "kept", **arguments)
        assert content(env) == made
        assert len(count) == expected
        count.clear()
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".safetensors"] * 2


CHANGES = {
    "a text": {"rows": [{**row, "chosen": row["chosen"] + "!"} for row in make_rows(4)]},
    "where a text ends": {
        "rows": [
            {**row, "prompt": row["prompt"] + row["chosen"][:1], "chosen": row["chosen"][1:]} for row in make_rows(4)
        ]
    },
    "the order": {"rows": make_rows(4)[::-1]},
    "positions": {"rows": [{"prompt": "x", "chosen": "y", "rejected": "y"}, *make_rows(4)]},
    "the longest": {"max_context_length": 40},
    "the shortest": {"min_completion_length": 6},
    "the kind of model": {"encoder_decoder": True},
    "a normaliser": {"tokenizer": make_tokenizer(lowercase=True)},
    "the BOS": {"tokenizer": make_tokenizer(adds_bos=True)},
    "the EOS": {"tokenizer": make_tokenizer(eos_token="<|im_end|>")},
    "a token": {"tokenizer": make_tokenizer(additional_special_tokens=[" please"])},
    "special tokens as text": {"tokenizer": make_tokenizer(split_special_tokens=True)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_served_for_what_differs(change, tmp_path, count) -> None:
    same = {"rows": make_rows(4), "tokenizer": make_tokenizer(), "max_context_length": 200}

    def make(rows: Any, tokenizer: Any, **arguments: Any) -> Any:
        return PreferenceGym(rows, None, tokenizer, **arguments)

    make(**same, cache_dir=tmp_path)
    count.clear()
    other = make(**same | CHANGES[change], cache_dir=tmp_path)
    assert len(count) == 1
    assert content(other) == content(make(**same | CHANGES[change]))


def test_a_template_that_writes_the_date_is_not_served_from_another_day(tmp_path, count) -> None:
    def make(day: str) -> Any:
        tokenizer = chatml_tokenizer()
        tokenizer.chat_template = "{{ day }}" + CHATML
        rows = [{**row, "chat_template_kwargs": {"day": day}} for row in chat_rows(4)]
        return content(PreferenceGym(rows, None, tokenizer, cache_dir=tmp_path))

    first, second = make("Monday"), make("Tuesday")
    assert first != second
    count.clear()
    assert make("Monday") == first
    assert make("Tuesday") == second
    assert not count


def test_strings_are_not_served_what_messages_with_the_same_texts_are(tmp_path, count) -> None:
    tokenizer = chatml_tokenizer()
    (chat,) = chat_rows(1)
    write = partial(tokenizer.apply_chat_template, tokenize=False)
    text = {side: write([*chat["prompt"], *chat[side]]) for side in ("chosen", "rejected")}
    text["prompt"] = write(chat["prompt"], add_generation_prompt=True)
    first = PreferenceGym([chat], None, tokenizer, cache_dir=tmp_path)
    second = PreferenceGym([text], None, tokenizer, cache_dir=tmp_path)
    assert len(count) == 2
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("damage", ["empty", "cut", "no file of this kind", "a bit of the ids", "a bit of the rest"])
def test_a_damaged_file_is_made_again_with_a_warning(damage, tmp_path, count) -> None:
    def make() -> Any:
        return content(PreferenceGym(rows_of_all_kinds(), None, make_tokenizer(), cache_dir=tmp_path))

    whole = make()
    (path,) = tmp_path.iterdir()
    bits = path.read_bytes()
    place = len(bits) - 1 if damage == "a bit of the ids" else bits.index(b"prompts_cut") + 15
    flipped = bits[:place] + bytes([bits[place] ^ 1]) + bits[place + 1 :]
    path.write_bytes({"empty": b"", "cut": bits[:-9], "no file of this kind": b"{}" * 99}.get(damage, flipped))
    count.clear()
    with pytest.warns(UserWarning, match="is damaged and is made again"):
        assert make() == whole
    assert make() == whole
    assert len(count) == 1


def test_a_folder_that_cannot_be_written_to_costs_a_warning(tmp_path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(own_files.os, "fsync", full)
    with pytest.warns(UserWarning, match="tokens could not be kept in"):
        env = PreferenceGym(make_rows(4), None, make_tokenizer(), cache_dir=tmp_path)
    assert len(env.train_pairs) == 4
    assert not list(tmp_path.iterdir())
    file = tmp_path / "file"
    file.touch()
    with pytest.warns(UserWarning, match="tokens could not be kept in"):
        PreferenceGym(make_rows(4), None, make_tokenizer(), cache_dir=file)
    with pytest.raises(ConfigurationError, match="cache_dir=3"):
        PreferenceGym(make_rows(4), None, make_tokenizer(), cache_dir=3)


def test_a_tokenizer_of_ones_own_is_not_trusted_to_say_all(tmp_path) -> None:
    class Own(type(make_tokenizer())):
        pass

    tokenizer = make_tokenizer()
    tokenizer.__class__ = Own
    with pytest.warns(UserWarning, match="is not used: Own is not one of transformers' own fast tokenizers"):
        PreferenceGym(make_rows(4), None, tokenizer, cache_dir=tmp_path)
    assert not list(Path(tmp_path).iterdir())
