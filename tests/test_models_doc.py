from __future__ import annotations

import re
from pathlib import Path

from documented import MODELS, as_documented, documented_paths
from families import FAMILIES

TESTS = Path(__file__).parent


def test_every_family_that_is_tested_has_a_row_and_no_other() -> None:
    others = {"float32", "bfloat16", "float16", "nf4", "nf4-double", "int8"}
    assert set(documented_paths()) == {*FAMILIES, *others}


def test_every_test_that_the_page_names_is_there() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", MODELS))
    assert len(named) >= 20
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []


def test_a_row_that_is_wrong_is_seen() -> None:
    assert as_documented("llama", prompt_once=True, lower_layers_once=True)
    assert not as_documented("llama", prompt_once=False)
    assert not as_documented("bart", tiled_head=True)
    assert as_documented("int8", prompt_once=True)
