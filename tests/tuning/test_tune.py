from __future__ import annotations

import inspect
import json
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_examples, make_rows
from families import RELATIVE
from peft import LoraConfig
from tokenizers_for_tests import make_tokenizer, t5_tokenizer
from transformers import T5Config, T5ForConditionalGeneration
from two_workers import TwoWorkers

import evollm
from evollm import ConfigurationError, DataError, HyperparameterConfig, RLParameter
from evollm.algorithms import ALGORITHMS
from evollm.algorithms.agent import DEFAULT_LORA
from evollm.cli import main
from evollm.data.completion_rows import EXAMPLES
from evollm.data.loading import load_pairs
from evollm.data.preference_rows import PAIRS
from evollm.data.rows import Rows
from evollm.errors import MissingExtraError
from evollm.hpo import PREFERENCE_FITNESSES, STRATEGIES, ancestry
from evollm.hpo.scores import margin_over_std
from evollm.runs import read_run
from evollm.runs.folder import TUNE_ARGUMENTS
from evollm.training import prepare
from evollm.tuning import validate
from evollm.tuning.arguments_file import read_tune_arguments
from evollm.tuning.from_yaml import hp_config_of, lora_config_of, model_config_of
from evollm.tuning.parameters import loop_of, parameters_of
from evollm.tuning.request import TUNE_PARAMETERS, Request, request_of
from evollm.tuning.setup import set_up
from evollm.tuning.splits import Splits, hold_out

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
SMALL = {"lora_config": LORA, "num_epochs": 1, "verbose": False, "num_sample_answers": 0, "data_batch_size_per_gpu": 8}


@pytest.fixture
def tune(make_model, tokenizer, tmp_path):
    """`evollm.tune` with a small model, in a folder of its own."""

    def start(data=None, **changes):
        arguments = {"tokenizer": tokenizer, "run_dir": tmp_path / "run", "population": 3, **SMALL, **changes}
        return evollm.tune(make_model(), make_rows(40) if data is None else data, **arguments)

    return start


def test_one_call_gives_the_best_agent_its_schedule_and_a_run_folder(tune, tmp_path) -> None:
    result = tune(generations=4, search="tournament", fitness="accuracy_mean_margin")
    assert len(result.population) == len(result.fitnesses) == 3
    assert result.best in result.population
    assert result.fitnesses[result.population.index(result.best)] == max(result.fitnesses)
    assert result.run_dir == tmp_path / "run"
    record = read_run(result.run_dir)
    plans = [one.plan for one in record.evolutions]
    assert len(plans) == 3
    assert result.schedule == record.schedule
    assert [values for _, values in result.schedule][-1] == result.best.hyperparameter_values()
    assert result.schedule[0] == (0, dict(ancestry(plans, result.best.index)[0].hyperparameters))
    assert {step for step, _ in result.schedule} <= {0, *(one.step for one in record.evolutions)}


def test_the_default_is_a_race_by_margins_over_std_between_founders_that_are_spread(tune) -> None:
    result = tune(make_rows(100), num_epochs=2, population=4, test_data=make_rows(80, 100), error_rate=0)
    record = read_run(result.run_dir)
    assert record.config["options"]["search"]["name"] == "Racing"
    total = record.config["schedule"]["total"]
    assert [one.step for one in record.evolutions] == [-(-total // 4), 2 * -(-total // 4)]
    assert [(one.step, one.rows) for one in record.evaluations] == [
        *[(record.evolutions[0].step, 64)] * 4,
        *[(record.evolutions[1].step, None)] * 2,
        (total, None),
    ]
    scores = [margin_over_std(one.pairs.margins) for one in record.evaluations]
    assert [one.fitness for one in record.evaluations] == [(score,) for score in scores]
    assert result.fitnesses == [scores[-1]]
    # The three that are drawn lie in one third each of the bounds of lr, a factor of 5 around 1e-4.
    rates = [birth.hyperparameters["lr"] for birth in record.founders]
    assert rates[0] == 1e-4
    assert sorted(int(math.log(rate / 2e-5, 25) * 3) for rate in rates[1:]) == [0, 1, 2]


def test_everything_is_checked_once(tune, monkeypatch) -> None:
    calls = []

    def counted(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **named: calls.append(name) or function(*args, **named))

    for name in ("check_run", "check_fitness", "check_callbacks", "tracker_names"):
        counted(prepare, name)
    counted(prepare.RunPaths, "of")
    tune(generations=2)
    assert sorted(calls) == ["check_callbacks", "check_fitness", "check_run", "of", "tracker_names"]


def test_the_agents_are_where_an_executor_has_them(tune, make_model, tokenizer, tmp_path) -> None:
    result = tune(generations=2, executor=TwoWorkers, search="tournament", fitness="accuracy_mean_margin")
    assert result.best in result.population
    assert read_tune_arguments(result.run_dir).objects == {"model", "data", "tokenizer", "executor"}
    arguments = {"tokenizer": tokenizer, "population": 3, **SMALL, "executor": TwoWorkers}
    assert "3 agents learnt from" in validate(make_model(), make_rows(40), **arguments)


def test_a_search_by_its_name_takes_its_settings_and_is_known_to_the_folder(tune) -> None:
    result = tune(search="successive_halving", reduction_factor=3, evo_steps=1, max_steps=2)
    assert len(result.population) == 1
    record = read_run(result.run_dir)
    assert record.config["options"]["search"] == {"name": "SuccessiveHalving", "reduction_factor": 3}
    asked = read_tune_arguments(result.run_dir).settings
    assert (asked["search"], asked["reduction_factor"], asked["evo_steps"]) == ("successive_halving", 3, 1)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "Racing"),
        ({"rand_seed": 3, "device": "cpu"}, "Racing"),
        ({"error_rate": 0.1}, "Racing"),
        ({"tournament_size": 2}, None),
        ({"quantile_fraction": 0.3}, "PopulationBasedTraining"),
        ({"max_agents": 4}, "ASHA"),
    ],
)
def test_settings_of_one_search_alone_choose_it(make_model, tokenizer, settings, name) -> None:
    request = request_of(make_model(), make_rows(40), tokenizer=tokenizer, population=4, **SMALL, **settings)
    setup = set_up(request)
    assert (type(setup.loop["search"]).__name__ if "search" in setup.loop else None) == name
    assert ("tournament" in setup.loop) == (name is None)


def test_a_population_of_one_is_an_ordinary_run(tune, make_model, tokenizer, tmp_path) -> None:
    rows, test = make_rows(12), make_rows(6, 12)
    tuned = tune(rows, population=1, test_data=test, nll_alpha=0.5).best
    env = evollm.PreferenceGym(rows, test, tokenizer)
    agent = evollm.DPO(
        actor_network=make_model(), lora_config=LoraConfig(**LORA), lr=1e-4, nll_alpha=0.5, max_grad_norm=1.0
    )
    evollm.finetune_llm_preference([agent], env, run_dir=tmp_path / "plain", verbose=False)
    pairs = zip(tuned.actor_parameters(), agent.actor_parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_sft_takes_examples_and_dpo_goes_on_from_it(tune, tmp_path) -> None:
    stage_1 = tune(make_examples(40), algorithm="sft", generations=2)
    assert isinstance(stage_1.best, evollm.SFT)
    stage_2 = tune(population=1, start_from=stage_1.run_dir / "elite", run_dir=tmp_path / "two", lr=1e-9)
    fresh, tuned = (agent.base.adapters.export(agent.actor_adapter).tensors for agent in (stage_1.best, stage_2.best))
    assert all(torch.allclose(fresh[name], tuned[name], atol=1e-6) for name in fresh)


def test_the_run_that_tune_began_is_resumed_by_the_same_call(tune) -> None:
    short = tune(max_steps=2, evo_steps=1, search="tournament")
    longer = tune(max_steps=4, evo_steps=1, search="tournament", run_dir=None, resume_from_checkpoint=short.run_dir)
    assert longer.run_dir == short.run_dir
    record = read_run(short.run_dir)
    assert [one.step for one in record.evolutions] == [1, 2, 3]
    assert longer.schedule == record.schedule


def test_a_run_that_goes_on_longer_has_more_generations_of_the_same_length(tune) -> None:
    short = tune(generations=2, search="tournament")
    longer = tune(num_epochs=2, search="tournament", run_dir=None, resume_from_checkpoint=short.run_dir)
    assert [one.step for one in read_run(longer.run_dir).evolutions] == [2, 4, 6]


def test_the_run_folder_keeps_a_none_that_is_no_default(tune) -> None:
    """Resumed with the default instead, the run would delete checkpoints, or let other values evolve."""
    result = tune(max_steps=2, evo_steps=1, keep_last=None, hp_config=None, rl_hp=0.0, report_to=None)
    asked = json.loads((result.run_dir / TUNE_ARGUMENTS).read_text())["settings"]
    assert {name for name, value in asked.items() if value is None} >= {"keep_last", "hp_config"}
    assert not {"test_data", "start_from", "run_dir"} & set(asked)


def test_a_report_that_cannot_be_drawn_does_not_cost_the_result(tune, monkeypatch, capsys) -> None:
    def fail_with(error):
        def write_report(run_dir):
            raise error

        monkeypatch.setattr(sys.modules["evollm.tuning.tune"], "write_report", write_report)

    fail_with(ValueError("no such font"))
    with pytest.warns(UserWarning, match="no report: ValueError: no such font"):
        result = tune(population=1, max_steps=1)
    assert result.report is None
    fail_with(MissingExtraError("matplotlib", "report", "the report"))
    assert tune(population=1, max_steps=1, run_dir=result.run_dir / "again").report is None
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------------ settings


def test_every_setting_is_a_parameter_of_a_public_piece() -> None:
    """And none is listed by hand: what the pieces' signatures lose or gain, `tune` loses or gains."""
    for name, algorithm in ALGORITHMS.items():
        public = [algorithm.gym, algorithm.agent, algorithm.agent.population, loop_of(algorithm)]
        public += [evollm.TournamentSelection, evollm.Mutations, *STRATEGIES.values()]
        known = {name for piece in public for name in inspect.signature(piece).parameters}
        assert set(parameters_of(algorithm)) <= known, name
        assert {"lr", "seed", "num_epochs", "tournament_size", "rl_hp", "max_context_length"} <= parameters_of(
            algorithm
        ).keys()
    assert [*inspect.signature(evollm.tune).parameters][:-1] == sorted(
        TUNE_PARAMETERS, key=[*inspect.signature(evollm.tune).parameters].index
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("learning_rate", "lr"),
        ("num_epoch", "num_epochs"),
        ("train_dataset", "data"),
        ("popluation", "population"),
        ("tornament_size", "tournament_size"),
        ("lora_confg", "lora_config"),
    ],
)
def test_an_unknown_name_raises_with_the_nearest_known_one(tune, name, nearest) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}.*'{nearest}'"):
        tune(**{name: 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verbose": "yes"}, "verbose='yes': must be true or false"),
        ({"lr": True}, "lr=True: must be a number"),
        ({"num_epochs": 1.5}, "num_epochs=1.5: must be a whole number or null"),
        ({"population": 0}, "population=0: must be a whole number of at least 1"),
        ({"algorithm": "ppo"}, "algorithm='ppo': must be one of dpo, grpo, kto, sft"),
        ({"hp_config": {"lr": [1e-3]}}, r"hp_config.lr=\[0.001\]: must be"),
        ({"hp_config": {"lr": {"min": 1e-3, "max": 1e-4}}}, "hp_config.lr.min=0.001: must be below"),
        ({"hp_config": {"lr": {"minimum": 1}}}, "minimum.*nearest known one is 'min'"),
        ({"lora_config": {"rank": 8}}, "rank=8: is no parameter"),
        ({"lora_config": 8}, "lora_config=8: must be a mapping"),
        ({"lora_config": {"r": "x"}}, "lora_config.r='x': must be a whole number"),
        ({"lora_config": {"target_modules": 3}}, "lora_config.target_modules=3: must be names"),
        ({"start_from": 3}, "start_from=3: must be the folder"),
        ({"model_config": {"quantization_config": 3}}, "quantization_config=3: must be a mapping"),
        ({"population": 1, "generations": 3}, "generations=3: one agent does not evolve"),
        ({"generations": 3, "evo_steps": 2}, "generations=3: .* leave one of the three out"),
        ({"generations": 300, "num_epochs": 1}, "generations=300: the run has 4 steps only"),
        ({"test_data": "nowhere.jsonl"}, "test_data='nowhere.jsonl': no such file"),
        ({"data": "nowhere.jsonl"}, "data='nowhere.jsonl': no such file"),
        ({"start_from": "nowhere"}, "nowhere is not an agent's checkpoint"),
        ({"search": "annealing"}, "search='annealing': .*known are racing, tournament, successive_halving"),
        ({"search": 3}, "search=3: lacks start"),
        (
            {"search": "successive_halving", "tournament_size": 2},
            "tournament_size=2: is a setting of search='tournament'",
        ),
        ({"search": "pbt", "reduction_factor": 3}, "reduction_factor=3: is a setting of search='racing'"),
        ({"search": "successive_halving", "reduction_factor": 1}, "reduction_factor=1: must be a whole number"),
        ({"population": 1, "search": "tournament"}, "search='tournament': one agent does not evolve"),
    ],
)
def test_what_cannot_work_is_named_before_any_training(tune, tmp_path, changes, message) -> None:
    with pytest.raises(evollm.EvoLLMError, match=message):
        tune(**changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "wnadb"}, "report_to='wnadb': .*'wandb'"),
        ({"wb": None}, "wb=None: must be"),
        ({"fitness": "log-los"}, "fitness='log-los': is no fitness .*nearest is 'log_loss'"),
        ({"fitness": 1}, "fitness=1: must be a function"),
        ({"fitness": str}, "fitness"),
        ({"callbacks": [print]}, "callbacks=.*: must be a list of instances"),
        ({"callbacks": None}, "callbacks=None: must be a list of instances"),
    ],
)
def test_trackers_callbacks_and_fitness_are_checked_before_the_model_is_loaded(
    tokenizer, monkeypatch, changes, message
) -> None:
    monkeypatch.setattr(sys.modules["evollm.tuning.setup"], "make_agents", lambda *_: pytest.fail("loads the model"))
    settings = {"tokenizer": tokenizer, "encoder_decoder": False, **SMALL, **changes}
    for call in (evollm.tune, evollm.tuning.validate):
        with pytest.raises(evollm.EvoLLMError, match=message):
            call("model", make_rows(40), **settings)


@pytest.mark.parametrize("name", ["accuracy", "log_loss", "margin_over_std", "mean_margin"])
def test_a_fitness_is_chosen_by_its_name(tune, tmp_path, name) -> None:
    result = tune(generations=2, fitness=name, search="tournament")
    scored = read_run(tmp_path / "run").evaluations
    assert scored
    assert [one.fitness for one in scored] == [PREFERENCE_FITNESSES[name](one.pairs) for one in scored]
    assert len(result.fitnesses) == 3
    # A run that is resumed from its folder selects by the same name.
    assert read_tune_arguments(tmp_path / "run").settings["fitness"] == name


def test_guards_are_a_setting_of_tune_and_an_agent_that_has_to_break_one_is_told_of(tune, tmp_path) -> None:
    guards = {"min_chosen_logratio": 50}
    with pytest.warns(UserWarning, match="every agent breaks a guard: take a weaker bound"):
        tune(generations=2, guards=guards)
    assert read_tune_arguments(tmp_path / "run").settings["guards"] == guards
    record = read_run(tmp_path / "run")
    assert {one.fitness[0] for one in record.evaluations} == {-1e9}
    nearest = max(record.latest_evaluation, key=lambda one: one.pairs.chosen_logratios.mean())
    assert record.winner == nearest.agent


def test_examples_have_no_guards(tune) -> None:
    with pytest.raises(ConfigurationError, match=r"guards=.*is no parameter"):
        tune(make_examples(40), algorithm="sft", guards={"min_chosen_logratio": -3})


@pytest.mark.parametrize("model", [None, 3, make_rows(2), {"name": "x"}, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused_before_data_are_read(model) -> None:
    with pytest.raises(ConfigurationError, match=r"model=.*: must be a hub name, a folder, or a loaded language model"):
        evollm.tune(model, "no/such/file.jsonl")


def test_validate_describes_a_population_whose_values_stay(make_model, tokenizer) -> None:
    settings = {"tokenizer": tokenizer, "population": 2, "generations": 2, **SMALL}
    said = evollm.tuning.validate(make_model(), make_rows(40), **settings, hp_config=None, rl_hp=0.0)
    assert "no hyperparameter evolves" in said


def test_model_config_takes_types_and_quantisation_by_name() -> None:
    found = model_config_of(
        {"dtype": "bfloat16", "quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}}
    )
    assert found["dtype"] is torch.bfloat16
    assert found["quantization_config"].load_in_4bit
    assert found["quantization_config"].bnb_4bit_compute_dtype is torch.float32
    with pytest.raises(ConfigurationError, match=r"load_in_4bits.*'load_in_4bit'"):
        model_config_of({"quantization_config": {"load_in_4bits": True}})
    with pytest.raises(ConfigurationError, match=r"model_config.dtype='half-ish'"):
        model_config_of({"dtype": "half-ish"})


def test_a_lora_config_keeps_the_defaults_that_it_does_not_change() -> None:
    found, plain = lora_config_of({"r": 8}), DEFAULT_LORA
    assert (found.r, found.lora_alpha, found.target_modules) == (8, plain["lora_alpha"], plain["target_modules"])


def test_names_in_an_hp_config_are_choices() -> None:
    found = hp_config_of({"loss_type": ["sigmoid", "ipo"], "lr": [1e-6, 1e-4]})
    assert found == HyperparameterConfig(
        loss_type=RLParameter(choices=("sigmoid", "ipo")), lr=RLParameter(min=1e-6, max=1e-4)
    )
    with pytest.raises(ConfigurationError, match=r"hp_config\.lr\.min=.*must be a number"):
        hp_config_of({"lr": ["1e-6", "1e-4"]})


def test_an_encoder_decoder_is_recognised_given_or_by_its_name(tmp_path) -> None:
    tokenizer = t5_tokenizer()
    model = T5ForConditionalGeneration(T5Config(**{**RELATIVE, "vocab_size": len(tokenizer)}))
    model.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    rows = [{"prompt": f"say {number}", "chosen": "yes", "rejected": "no"} for number in range(40)]
    lora = {"r": 2, "target_modules": ["q", "v"]}
    settings = {"population": 2, "generations": 2, "lora_config": lora, "data_batch_size_per_gpu": 8}
    assert "agents: 2" in evollm.tuning.validate(model, rows, tokenizer=tokenizer, **settings)
    assert "agents: 2" in evollm.tuning.validate(str(tmp_path / "t5"), rows, **settings)


def test_without_an_hp_config_values_move_within_a_factor_of_five(make_model, tokenizer) -> None:
    def hp_config(**settings):
        request = Request(
            make_model(), make_rows(40), tokenizer=tokenizer, population=2, settings={"lora_config": LORA, **settings}
        )
        return set_up(request).agents[0].hp_config

    assert hp_config(lr=1e-4, nll_alpha=0.0) == HyperparameterConfig(
        lr=RLParameter(1e-4 / 5, 5e-4), beta=RLParameter(0.1 / 5, 0.5)
    )
    assert hp_config(hp_config={"lr": [1e-5, 1e-4]}) == HyperparameterConfig(lr=RLParameter(1e-5, 1e-4))


# -------------------------------------------------------------------------------------------------------------- splits


def prompts(rows) -> set[str]:
    return {row["prompt"] for row in rows}


def test_no_prompt_is_in_two_splits_whatever_the_order_of_the_rows() -> None:
    rows = [*make_rows(60), *[{**row, "rejected": " never"} for row in make_rows(30)], {"prompt": "a", "chosen": "b"}]
    splits = hold_out(rows, PAIRS, 2, seed=1)
    found = [prompts(part) for part in (splits.train, *splits.parts)]
    assert sum(map(len, found)) == len(set().union(*found)) == 61
    assert [len(part) for part in splits.parts] == [9, 9] or all(9 <= len(part) <= 10 for part in splits.parts)
    assert sum(map(len, (splits.train, *splits.parts))) == 91
    again = hold_out(rows[::-1], PAIRS, 2, seed=1)
    assert [prompts(part) for part in again.parts] == found[1:]
    assert [prompts(part) for part in hold_out(rows, PAIRS, 2, seed=2).parts] != found[1:]


def test_texts_without_a_prompt_are_set_apart_one_by_one() -> None:
    splits = hold_out([{"text": f"Story {number}"} for number in range(50)], EXAMPLES, 2, seed=1)
    assert [len(part) for part in (splits.train, *splits.parts)] == [40, 5, 5]


def test_rows_that_are_set_apart_are_parsed_once() -> None:
    parsed: list[int] = []

    def read(number: int, row: Any) -> Any:
        parsed.append(number)
        return PAIRS.read(number, row)

    rows = [*make_rows(20), {"prompt": "a", "chosen": "b"}]
    counting = replace(PAIRS, read=read)
    splits = hold_out(rows, counting, 2, seed=1)
    found = [load_pairs(part, make_tokenizer(), name=name, row_format=counting) for name, part in named(splits)]
    assert sorted(parsed) == list(range(21))
    plain = [load_pairs(part, make_tokenizer(), name=name) for name, part in named(hold_out(rows, PAIRS, 2, seed=1))]
    assert [report for _, report in found] == [report for _, report in plain]
    assert [[pair.key for pair in pairs] for pairs, _ in found] == [[pair.key for pair in pairs] for pairs, _ in plain]


def named(splits: Splits) -> list[tuple[str, Rows]]:
    return list(zip(("train", "test", "final"), (splits.train, *splits.parts), strict=True))


def test_whether_the_prompt_is_repeated_is_the_same_in_all_splits() -> None:
    sides = ("chosen", "rejected")
    repeating = [{**row, **{side: row["prompt"] + row[side] for side in sides}} for row in make_rows(60)]
    for rows, stripped in ((repeating, True), ([*repeating, *make_rows(1)], False)):
        splits = hold_out(rows, PAIRS, 2, seed=1)
        found = [row["chosen"].startswith(row["prompt"]) for part in splits.parts for row in part]
        assert found == [not stripped] * len(found)


OTHER_NAMES = [
    {"question": row["prompt"], "a": row["chosen"], "b": row["rejected"], "best": "ab"[n % 2]}
    for n, row in enumerate(make_rows(40))
]
COLUMNS = {"prompt": "question", "first": "a", "second": "b", "label": {"column": "best", "first": "a", "second": "b"}}


def test_a_mapping_of_columns_reaches_the_splits_the_gym_and_the_record(tune, tmp_path) -> None:
    with pytest.raises(DataError, match=r"data=.*lacks chosen and rejected"):
        tune(data=OTHER_NAMES)
    result = tune(data=OTHER_NAMES, columns=COLUMNS)
    asked = json.loads((result.run_dir / TUNE_ARGUMENTS).read_text())["settings"]
    assert asked["columns"] == COLUMNS
    with pytest.raises(ConfigurationError, match=r"columns\.promt='question': is none of"):
        tune(data=OTHER_NAMES, columns={"promt": "question"}, run_dir=tmp_path / "another")


def test_a_mapping_of_columns_is_given_in_yaml_and_on_the_command_line(model_folder, tmp_path, capsys) -> None:
    (tmp_path / "a.json").write_text(json.dumps(OTHER_NAMES))
    label = "{column: best, first: a, second: b}"
    config = f"model: {model_folder}\ndata: {tmp_path}/a.json\ncolumns: {{first: a, second: b, label: {label}}}\n"
    (tmp_path / "c.yaml").write_text(config)
    assert main(["validate", str(tmp_path / "c.yaml")]) == 1
    assert "has a column 'question' that would not be used" in capsys.readouterr().err
    assert main(["validate", str(tmp_path / "c.yaml"), "columns.prompt=question"]) == 0
    assert "pairs" in capsys.readouterr().out


def test_too_little_data_to_divide_is_named() -> None:
    with pytest.raises(DataError, match=r"5 usable pairs with 5 prompts.*false"):
        hold_out(make_rows(5), PAIRS, 2, seed=1)
    with pytest.raises(DataError, match="8 usable pairs with 1 prompts"):
        hold_out([{**row, "prompt": "same"} for row in make_rows(8)], PAIRS, 1, seed=1)


def test_a_split_is_left_out_on_demand(tune) -> None:
    result = tune(population=1, test_data=False)
    assert result.best.fitness == []
