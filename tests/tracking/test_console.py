from __future__ import annotations

import io
import re

import rich.console
from conftest import make_rows

from evollm import (
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.models.attention import ONE_BY_ONE
from evollm.tracking import Console

WIDTH = 80


def run(make_population, tokenizer, tmp_path, **changes) -> str:
    """What a run of four prints on a terminal of 80 columns."""
    output = io.StringIO()
    console = Console(rich.console.Console(file=output, width=WIDTH, force_terminal=False))
    splits = {"final_dataset": make_rows(5, 30), **changes}
    env = PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4, **splits)
    hp_config = HyperparameterConfig(
        lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5), nll_alpha=RLParameter(0.01, 1.0)
    )
    finetune_llm_preference(
        make_population(4, hp_config=hp_config),
        env,
        num_epochs=3,
        tournament=TournamentSelection(2, True, 4),
        mutation=Mutations(0.0, 1.0),
        run_dir=tmp_path / "run",
        callbacks=[console],
        verbose=False,
        num_sample_answers=2,
    )
    return output.getvalue()


def test_a_person_sees_tables_mutations_the_score_and_how_to_load_the_best(
    make_population, tokenizer, tmp_path
) -> None:
    text = run(make_population, tokenizer, tmp_path)
    assert text.count("generation ") >= 3
    for column in ("agent", "parent", "lr", "beta", "nll_alpha", "accuracy", "margin", "loss"):
        assert column in text
    assert len(re.findall(r"^ +\* \d+ ", text, re.MULTILINE)) == 3
    assert re.search(r"agent \d+ <- \d+  (lr|beta|nll_alpha): \S+ -\(x[\d.]+\)-> \S+", text)
    assert re.search(r"Held-out accuracy on 5 final pairs: 0\.500 -> \d\.\d+", text)
    assert f"Best adapter: {tmp_path / 'run' / 'elite' / 'actor'}" in text
    assert f'PeftModel.from_pretrained(base_model, "{tmp_path / "run" / "elite" / "actor"}")' in text
    assert text.count("before:") == text.count("after:") == 2
    assert "Question 30 by" in text


def test_tables_fit_a_terminal_of_80_columns_uncut(make_population, tokenizer, tmp_path) -> None:
    text = run(make_population, tokenizer, tmp_path)
    assert "…" not in text
    tables = [line for line in text.splitlines() if "accuracy" in line or re.match(r" +(\* )?\d+ ", line)]
    assert max(map(len, tables)) <= WIDTH


def test_a_score_on_the_selection_pairs_says_that_it_is_one(make_population, tokenizer, tmp_path) -> None:
    text = run(make_population, tokenizer, tmp_path, final_dataset=None)
    assert "selection pairs" in text
    assert "pass final_dataset" in text


def test_one_line_says_what_attention_is_computed_by(make_population, tokenizer, tmp_path) -> None:
    lines = run(make_population, tokenizer, tmp_path).splitlines()
    said = [number for number, line in enumerate(lines) if "attention" in line]
    assert [lines[number] for number in said] == [f"attention: {ONE_BY_ONE}"]
    # Before the first table.
    assert not any("generation" in line for line in lines[: said[0]])
