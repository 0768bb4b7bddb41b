from __future__ import annotations

import json
import re
from pathlib import Path

from conftest import make_examples, make_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(make_model, tokenizer, tmp_path, monkeypatch) -> None:
    """All blocks in order, in one namespace; only the model is a small local one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, rows in (("train", make_rows(8)), ("test", make_rows(4, 8)), ("final", make_rows(4, 12))):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rows in (("examples", make_examples(8)), ("test-examples", make_examples(4, 8))):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 6
    namespace: dict[str, object] = {}
    for block in blocks:
        assert "HuggingFaceTB/SmolLM2-135M-Instruct" in README
        exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(folder)), namespace)
    assert len(namespace["accuracies"]) == 4


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
