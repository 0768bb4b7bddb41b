"""Several sets of rows with weights, from the gym to a run that goes on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import make_examples, make_rows

import evollm
from evollm import (
    GRPO,
    KTO,
    ConfigurationError,
    DataError,
    PreferenceGym,
    RewardGym,
    SFTGym,
    UnpairedGym,
    finetune_llm_kto,
    replay,
)
from evollm.algorithms.rollouts import collect
from evollm.cli import main
from evollm.data import Batch
from evollm.runs import read_run
from evollm.tuning.splits import hold_out_of_sets

WEIGHTS = {"helpful": 1, "harmless": 3}


def sets(helpful: int = 12, harmless: int = 6) -> dict[str, list[dict[str, str]]]:
    return {"helpful": make_rows(helpful), "harmless": make_rows(harmless, 100)}


@pytest.fixture
def make_gym(tokenizer):
    def make(data: Any = None, test: Any = None, **changes: Any) -> PreferenceGym:
        arguments = {"data_batch_size_per_gpu": 4, "dataset_weights": WEIGHTS, **changes}
        return PreferenceGym(sets() if data is None else data, test, tokenizer, **arguments)

    return make


def set_of(env: PreferenceGym, pair: Any) -> str:
    keys = [one.key for one in env.train_pairs]
    return "helpful" if keys.index(pair.key) < env.sets["helpful"]["rows"] else "harmless"


def test_an_epoch_has_as_many_rows_as_the_sets_in_proportion_to_their_weights(make_gym) -> None:
    env = make_gym()
    assert env.sets == {
        "helpful": {"weight": 1.0, "rows": 12, "drawn": 5},
        "harmless": {"weight": 3.0, "rows": 6, "drawn": 13},
    }
    assert len(env) == 5
    for epoch in range(3):
        served = [pair for _ in range(len(env)) for pair in env.next_batch()]
        assert [pair.key for pair in served] == [pair.key for pair in env.epoch_pairs(epoch)]
        assert Counter(set_of(env, pair) for pair in served) == {"helpful": 5, "harmless": 13}
        assert env.num_epochs == epoch + 1


def test_the_position_is_seed_epoch_and_index_and_upcoming_rows_are_those_that_come(make_gym) -> None:
    env, other = make_gym(), make_gym()
    for _ in range(7):
        env.next_batch()
    ahead = env.upcoming(100)
    state = json.loads(json.dumps(env.state_dict()))
    other.load_state_dict(state)
    served = [env.next_batch() for _ in range(8)]
    assert [pair.key for batch in served[:3] for pair in batch] == [pair.key for pair in ahead]
    assert [batch.keys() for batch in served] == [other.next_batch().keys() for _ in range(8)]
    other.reset(seed=1)
    assert other.epoch_pairs(0) != env.epoch_pairs(0)


def test_weights_of_the_sizes_serve_every_row_once(make_gym) -> None:
    env = make_gym(dataset_weights={"helpful": 12, "harmless": 6})
    assert sorted(pair.key for pair in env.epoch_pairs(0)) == sorted(pair.key for pair in env.train_pairs)


def test_each_set_has_its_report_and_what_is_said_of_rows_names_the_set(make_gym) -> None:
    data = sets()
    data["harmless"][2]["rejected"] = data["harmless"][2]["chosen"]
    report = make_gym(data).reports["train"]
    assert str(report).startswith("train: 17 pairs kept (12 of helpful, 5 of harmless), 1 dropped (1 ")
    assert "in harmless: row 2" in str(report)
    assert str(report.sets["harmless"]).startswith("train, harmless: 5 pairs kept, 1 dropped")
    assert report.sets["helpful"].dropped == {}
    keys = [pair.key for pair in make_gym(data).train_pairs]
    assert len(keys) == report.kept == 17
    assert all(0 <= preview.position < 17 for preview in report.previews)
    assert max(preview.position for preview in report.previews) >= 12


def test_held_out_data_are_rows_or_sets_which_are_scored_once(make_gym) -> None:
    test = {"harmless": make_rows(3, 200), "helpful": make_rows(2, 300)}
    env = make_gym(test=test)
    assert len(env.test_pairs) == 5
    assert env.reports["test"].sets.keys() == test.keys()
    with env.eval_mode():
        assert len([pair for _ in range(len(env)) for pair in env.next_batch()]) == 5
    rows = make_gym(test=[*test["harmless"], *test["helpful"]])
    assert Batch(rows.test_pairs).keys() == Batch(env.test_pairs).keys()
    columns = {name: [row[name] for row in test["helpful"]] for name in ("prompt", "chosen", "rejected")}
    assert len(make_gym(test=columns).test_pairs) == 2


def test_weights_and_sets_are_a_part_of_the_fingerprint(make_gym) -> None:
    found = [
        make_gym(**changes).fingerprint
        for changes in (
            {},
            {"dataset_weights": {"helpful": 1, "harmless": 2}},
            {"data": {"helpful": make_rows(11), "harmless": [make_rows(12)[11], *make_rows(6, 100)]}},
            {"data": [*make_rows(12), *make_rows(6, 100)], "dataset_weights": None},
        )
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset_weights": {"helpful": 1}},
            r"train_dataset.harmless='list': has no weight: add it to dataset_weights",
        ),
        (
            {"dataset_weights": {**WEIGHTS, "harmles": 1}},
            "dataset_weights.harmles=1.0: is the weight of no set",
        ),
        ({"dataset_weights": {"helpful": 0, "harmless": 1}}, "dataset_weights.helpful=0: must be a number above 0"),
        (
            {"dataset_weights": {"helpful": 1, "harmless": 1e-9}},
            "dataset_weights.harmless=1e-09: gives no row of the 18",
        ),
        ({"data": make_rows(4)}, "train_dataset='list': with dataset_weights it must map names to rows"),
        ({"test": {}}, r"test_dataset=\{\}: has no set: give rows, or some of the sets helpful, harmless, or None"),
        (
            {"test": {"helpful": make_rows(2, 200), "Harmless": make_rows(2, 300)}},
            "test_dataset.Harmless='list': is none of the sets, helpful, harmless",
        ),
        ({"final_dataset": {"Helpful": make_rows(2, 200)}}, "final_dataset.Helpful='list': is none of the sets"),
        ({"test": {"prompt": ["a"], "chosen": ["b"]}}, "test_dataset=.*lacks rejected"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(make_gym, changes, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_gym(**changes)


def test_a_set_without_usable_rows_is_named(make_gym) -> None:
    with pytest.raises(DataError, match=r"train_dataset.harmless"):
        make_gym({"helpful": make_rows(4), "harmless": []})


def test_the_other_gyms_mix_too(tokenizer) -> None:
    weights = {"a": 1, "b": 1}
    sft = SFTGym({"a": make_examples(6), "b": make_examples(2, 6)}, None, tokenizer, dataset_weights=weights)
    assert [one["drawn"] for one in sft.sets.values()] == [4, 4]
    good, bad = ([{**row, "label": label} for row in make_examples(6, 6 * label)] for label in (True, False))
    env = UnpairedGym({"a": good, "b": bad[:2]}, None, tokenizer, dataset_weights=weights)
    # As many as it serves, not as many as there are.
    assert (env.balance.desirable, env.balance.undesirable) == (4, 4)


@pytest.fixture
def workplace(make_model, tokenizer, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    for name, rows in sets(30, 16).items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run.yaml").write_text(
        "model: model\ndata: {helpful: helpful.jsonl, harmless: [harmless.jsonl]}\n"
        "dataset_weights: {helpful: 1, harmless: 3}\npopulation: 2\nevo_steps: 3\nmax_steps: 9\nlr: 1.0e-3\n"
        "checkpoint_steps: 1\ndata_batch_size_per_gpu: 8\nnum_sample_answers: 1\nverbose: false\n"
        "lora_config: {r: 2, target_modules: [q_proj]}\nsearch: tournament\n"
    )
    return tmp_path


def test_a_mixed_run_from_a_file_is_resumed_and_replayed_bit_for_bit(workplace, capsys) -> None:
    assert main(["train", "run.yaml", "run_dir=whole"]) == 0
    data = read_run("whole").config["data"]
    assert data["sets"]["harmless"]["weight"] == 3
    assert data["sets"]["harmless"]["drawn"] > data["sets"]["helpful"]["drawn"]
    assert "of helpful" in data["reports"][0]
    settings = json.loads(Path("whole/tune.json").read_text())["settings"]
    assert settings["data"] == {
        "helpful": str(workplace / "helpful.jsonl"),
        "harmless": [str(workplace / "harmless.jsonl")],
    }
    # A run that was interrupted, in the middle of an epoch, and goes on from its folder.
    assert main(["train", "run.yaml", "run_dir=cut", "max_steps=5"]) == 0
    capsys.readouterr()
    assert main(["resume", "cut", "max_steps=9"]) == 0, capsys.readouterr().err
    files = ("elite/actor/adapter_model.safetensors", "lineage.jsonl")
    for file in files:
        assert Path("whole", file).read_bytes() == Path("cut", file).read_bytes()
    assert replay("whole", run_dir="again", verbose=False).exact
    # Other weights are another run.
    assert main(["resume", "cut", "dataset_weights.harmless=2", "max_steps=10"]) == 1
    said = capsys.readouterr().err
    assert "data.sets.harmless.weight: 3.0 then, 2.0 now" in said


def test_tune_holds_out_by_prompt_over_all_sets(make_model, tokenizer, tmp_path) -> None:
    shared = make_rows(10)
    data = {"a": shared, "b": [{**row, "chosen": row["chosen"] + "!"} for row in shared] + make_rows(20, 50)}
    request = evollm.tuning.request.request_of(
        make_model(), data, tokenizer=tokenizer, dataset_weights={"a": 1, "b": 1}, verbose=False
    )
    env = evollm.tuning.setup.make_env(request, evollm.tuning.setup.prepare_settings(request))
    prompts = [
        {bytes(pair.prompt_ids) for pair in pairs} for pairs in (env.train_pairs, env.test_pairs, env.final_pairs)
    ]
    assert all(prompts)
    assert not prompts[0] & prompts[1]
    assert not (prompts[0] | prompts[1]) & prompts[2]
    assert len(env.all_pairs) == 40


def test_several_files_without_weights_are_refused_with_what_is_missing(make_model, tokenizer) -> None:
    with pytest.raises(ConfigurationError, match=r"data=.*several sets need dataset_weights"):
        evollm.tune(make_model(), {"a": "a.jsonl", "b": "b.jsonl"}, tokenizer=tokenizer)
    with pytest.raises(ConfigurationError, match=r"data.b=3: must be rows"):
        evollm.tune(make_model(), {"a": "a.jsonl", "b": 3}, tokenizer=tokenizer, dataset_weights={"a": 1, "b": 1})


def test_labels_are_counted_over_the_epochs_in_which_a_small_set_comes(tokenizer, make_model, lora, tmp_path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in make_rows(48)]
    mixed = [{**row, "label": number % 2 == 0} for number, row in enumerate(rows[40:])]
    data, weights = {"good": rows[:40], "mixed": mixed}, {"good": 40, "mixed": 1}
    env = UnpairedGym(data, None, tokenizer, data_batch_size_per_gpu=8, dataset_weights=weights)
    assert env.sets["mixed"]["drawn"] == 1
    assert (env.balance.desirable, env.balance.undesirable) == pytest.approx((47.5, 0.5))
    agent = KTO(actor_network=make_model(), lora_config=lora)
    with pytest.warns(UserWarning, match="far from balance"):
        finetune_llm_kto([agent], env, max_steps=1, verbose=False, run_dir=tmp_path / "run")


def test_a_set_of_which_all_rows_are_held_out_is_named(tokenizer) -> None:
    big, tiny = make_rows(60), make_rows(1, 60)
    found = []
    for seed in range(20):
        try:
            hold_out_of_sets({"big": big, "tiny": tiny}, PreferenceGym.row_format, 2, seed)
        except DataError as error:
            found.append(str(error))
    assert found
    assert all("data.tiny='1 rows': were all held out" in one for one in found)


def test_prompts_of_several_sets_are_answered_anew_each_time_they_come(tokenizer, make_model) -> None:
    prompts = {name: [{"prompt": f"{name} {number}"} for number in range(2)] for name in ("a", "b")}

    def zero(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    env = RewardGym(prompts, None, tokenizer, zero, data_batch_size_per_gpu=4, dataset_weights={"a": 3, "b": 1})
    assert env.sets["a"] == {"weight": 3.0, "rows": 2, "drawn": 3}
    agent = GRPO(actor_network=make_model(), group_size=2, max_completion_length=8)
    batch = env.next_batch()
    (learnt,) = collect([agent], batch, env)
    (same,) = collect([agent], batch, env)
    answers = [[tuple(one.ids) for one in sample.completions] for sample in learnt]
    assert answers == [[tuple(one.ids) for one in sample.completions] for sample in same]
    twice = [
        own for sample, own in zip(batch, answers, strict=True) if (sample.set_name, sample.row) == repeated(batch)
    ]
    assert len(twice) == 2
    assert twice[0] != twice[1]


def repeated(batch: Batch) -> tuple[str, int | None]:
    """The row that comes twice."""
    return Counter((sample.set_name, sample.row) for sample in batch).most_common(1)[0][0]
