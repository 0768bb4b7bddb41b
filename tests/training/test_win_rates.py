"""Win rates of generated answers, judged at every evaluation of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_examples, make_rows
from plain_executor import PlainExecutor
from two_workers import TwoWorkers

from evollm import (
    Callback,
    ConfigurationError,
    PreferenceGym,
    SFTGym,
    UnpairedGym,
    finetune_llm_kto,
    finetune_llm_preference,
    finetune_llm_sft,
)
from evollm.algorithms import KTO
from evollm.execution.executor import Agreement
from evollm.execution.judged import JudgedExecutor
from evollm.execution.local import LocalExecutor
from evollm.execution.wire import from_bytes, to_bytes
from evollm.hpo import AnswerPair, AnswerSampling, Judge
from evollm.models.generation import greedy_answers
from evollm.report import write_report
from evollm.runs.evaluations import read_evaluations


def digits(prompts, completions):
    """A reward that random answers differ in."""
    return [sum(map(ord, text)) % 1000 for text in completions]


def first_is_better(prompts, first, second):
    return [1.0] * len(first)


JUDGE = Judge(digits, prompts=4, max_new_tokens=6)


class Crash(Callback):
    def on_step(self, event) -> None:
        if event.step == 3:
            raise RuntimeError("the machine fell over")


@pytest.fixture
def run(make_population, tokenizer, tmp_path):
    def start(name: str, *, resume: bool = False, rows: int = 5, **changes):
        env = PreferenceGym(make_rows(12), make_rows(rows, 50), tokenizer, data_batch_size_per_gpu=4)
        population = make_population(3)
        for agent, lr in zip(population, (1e-3, 5e-3, 2e-2), strict=True):
            agent.lr = lr
        where = {"resume_from_checkpoint" if resume else "run_dir": tmp_path / name}
        settings = {"max_steps": 4, "evaluation_interval": 2, "checkpoint_steps": 1, "judge": JUDGE, **changes}
        return env, *finetune_llm_preference(population, env, verbose=False, num_sample_answers=0, **settings, **where)

    return start


@pytest.mark.usefixtures("drawn_reports")
def test_win_rates_are_those_of_the_answers_and_can_be_the_fitness(run, tmp_path) -> None:
    env, population, fitnesses = run("run", fitness="win_rate")
    base = population[0].base
    adapters = [population[0].adapter("reference"), *(agent.actor_adapter for agent in population)]
    prompts = [pair.prompt_ids for pair in env.test_pairs[:4]]
    answers = greedy_answers(base, adapters, prompts, env.tokenizer, 6)
    assert len({tuple(one) for one in answers}) > 2
    rewards = np.array([digits(prompts, one) for one in answers])
    wins = np.heaviside(rewards[1:] - rewards[0], 0.5)
    assert fitnesses == wins.mean(axis=1).tolist()
    found = read_evaluations(tmp_path / "run/evaluations/step-000004.safetensors")
    for index in range(3):
        assert found[f"agent-{index}"].win_rates[:4].tolist() == wins[index].tolist()
        assert np.isnan(found[f"agent-{index}"].win_rates[4:]).all()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["win_rate"] for line in lines if line.get("step") == 4 and "win_rate" in line][:3] == fitnesses
    # The same answers before training: a tie with the reference.
    assert next(line for line in lines if "before_win_rate" in line or line.get("win_rate") == 0.5)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["options"]["judge"]["function"] == "digits"
    page = write_report(tmp_path / "run").read_text()
    assert "win rate" in page


def test_a_run_with_a_judge_goes_on_bit_for_bit(run, tmp_path) -> None:
    changes = {"fitness": "win_rate", "judge": Judge(digits, prompts=4, max_new_tokens=6, temperature=1.0)}
    run("whole", **changes)
    with pytest.raises(RuntimeError):
        run("killed", callbacks=[Crash()], **changes)
    run("killed", resume=True, **changes)
    for name in ("metrics.jsonl", "evaluations/step-000004.safetensors"):
        whole, killed = (Path(tmp_path, folder, name).read_bytes() for folder in ("whole", "killed"))
        assert whole == killed
    with pytest.raises(ConfigurationError, match=r"options\.judge\.temperature: 1\.0 then, 0\.0 now"):
        run("whole", resume=True, **{**changes, "judge": JUDGE})


def test_members_on_two_workers_have_the_win_rates_of_one(run) -> None:
    _, _, expected = run("one", fitness="win_rate", max_steps=2)
    assert len(set(expected)) > 1
    _, _, found = run("two", fitness="win_rate", max_steps=2, executor=TwoWorkers)
    assert found == expected


def test_a_race_and_its_candidates_are_judged(run, tmp_path) -> None:
    race = {"search": "racing", "evo_steps": 2, "evaluation_interval": None, "rows": 8, "max_steps": 3}
    asked = []

    def counting(prompts, completions):
        asked.append(len(prompts))
        return digits(prompts, completions)

    merge = {"score": "win_rate", "factors": [2.0]}
    run("run", judge=Judge(counting, prompts=6, max_new_tokens=4), merge=merge, guards={"min_win_rate": 0.01}, **race)
    # The trial, the rung, the last step with its candidate and agent, and the final scores.
    assert asked[0] == 2
    assert len(asked) >= 4


def test_a_judge_that_always_prefers_the_first_answer_ties_all_agents_which_are_below_a_bound(run, tmp_path) -> None:
    judge = Judge(first_is_better, prompts=2, max_new_tokens=3)
    with pytest.warns(UserWarning, match="every agent breaks a guard"):
        *_, fitnesses = run("run", judge=judge, fitness="win_rate", guards={"min_win_rate": 0.6}, max_steps=2)
    assert fitnesses == [-1e9] * 3
    found = read_evaluations(tmp_path / "run/evaluations/step-000002.safetensors").values()
    assert [one.win_rate for one in found] == [0.5] * len(found)


def test_what_cannot_be_judged_is_refused_before_training(run, tmp_path, make_population, tokenizer) -> None:
    def fails(prompts, completions):
        raise ValueError("no such model")

    with pytest.raises(ConfigurationError, match=r"fails raised ValueError: no such model.*on row 0, 'Question 50"):
        run("fails", judge=Judge(fails, max_new_tokens=4))
    with pytest.raises(ConfigurationError, match=r"judge=None: a win rate is measured only with one"):
        run("without", judge=None, fitness="win_rate")
    with pytest.raises(ConfigurationError, match=r"judge=None"):
        run("function", judge=None, fitness=lambda evaluation: evaluation.win_rate)
    with pytest.raises(ConfigurationError, match=r"judge=None"):
        run("merge", judge=None, merge={"score": "win_rate"})
    with pytest.raises(ConfigurationError, match=r"guards\.min_win_rate=0\.5: needs a judge"):
        run("guard", judge=None, guards={"min_win_rate": 0.5})
    with pytest.raises(ConfigurationError, match=r"judge='digits': needs a method compared_answers, which Plain"):
        run("plain", executor=type("Plain", (PlainExecutor,), {"compared_answers": None}))
    env = PreferenceGym(make_rows(12), None, tokenizer, data_batch_size_per_gpu=4)
    with pytest.raises(ConfigurationError, match="a judge needs held-out rows"):
        finetune_llm_preference(make_population(2), env, judge=digits, run_dir=tmp_path / "rows", verbose=False)
    assert not any(path.exists() for path in map(tmp_path.joinpath, ("fails", "without", "guard", "plain", "rows")))


def test_a_judge_that_fails_later_names_the_row(run) -> None:
    def stumbles(prompts, completions):
        return [0.0 if text in ("An answer.", "Another answer.") else float("nan") for text in completions]

    with pytest.raises(ConfigurationError, match=r"stumbles returned nan.*on row \d, 'Question 5\d"):
        run("run", judge=Judge(stumbles, prompts=3, max_new_tokens=4))


class Second:
    """The second of two processes, which is sent what the first one says."""

    size, is_main = 2, False

    def __init__(self, said) -> None:
        self.said = said

    def from_main(self, value):
        assert value == {}
        return self.said.pop(0)


def test_the_main_process_alone_judges_and_its_errors_are_everyones(gym, make_population) -> None:
    def never(prompts, completions):
        raise AssertionError("called in a process that is not the main one")

    executor = LocalExecutor(make_population(1), gym)
    # Processes exchange answers as plain data.
    pair = AnswerPair(1, [{"role": "user", "content": "Hello"}], "Hi", "")
    assert from_bytes(to_bytes({0: [pair]})) == {0: [pair]}
    second: Agreement = Second(
        [{"value": None}, {"value": [0.25, 1.0]}, {"refused": ["judge", "broken", "correct it"]}]
    )
    executor.processes = second
    judged = JudgedExecutor(executor, Judge(never, prompts=2, max_new_tokens=2), (0, "Hello"))
    assert judged.evaluate("test")[0].win_rates[:2].tolist() == [0.25, 1.0]
    with pytest.raises(ConfigurationError, match="judge='broken': correct it"):
        judged.evaluate("test")


def test_completions_and_labelled_answers_are_judged_against_the_base(
    make_sft_population, make_model, lora, tokenizer, tmp_path
) -> None:
    judge = Judge(digits, prompts=3, max_new_tokens=3)
    env = SFTGym(make_examples(8), make_examples(4, 8), tokenizer, data_batch_size_per_gpu=4)
    settings = {"judge": judge, "fitness": "win_rate", "verbose": False, "num_sample_answers": 0}
    _, fitnesses = finetune_llm_sft(make_sft_population(2, lr=2e-2), env, run_dir=tmp_path / "sft", **settings)
    assert all(0 <= fitness <= 1 for fitness in fitnesses)
    rows = [{"prompt": one["prompt"], "completion": one["completion"], "label": True} for one in make_examples(8)]
    rows += [{**one, "completion": " no", "label": False} for one in rows]
    held_out = [{**one, "prompt": f"Now {one['prompt']}"} for one in rows]
    unpaired = UnpairedGym(rows, held_out, tokenizer, data_batch_size_per_gpu=4)
    agents = KTO.population(2, actor_network=make_model(), lora_config=lora, lr=1e-2)
    _, fitnesses = finetune_llm_kto(agents, unpaired, max_steps=2, run_dir=tmp_path / "kto", **settings)
    assert all(0 <= fitness <= 1 for fitness in fitnesses)


def test_a_prompt_of_several_rows_is_judged_once_in_its_place(make_model, lora, tokenizer) -> None:
    pairs = make_rows(4)
    env = UnpairedGym(make_rows(4, 8), [*pairs, *pairs[:2]], tokenizer, data_batch_size_per_gpu=4)
    agent = KTO(actor_network=make_model(), lora_config=lora, lr=1e-2)
    executor = LocalExecutor([agent], env)
    found = executor.compared_answers("test", [0], AnswerSampling(16, 3))[0]
    # Each pair is two answers, and the last two pairs are the first ones again.
    assert [pair.place for pair in found] == [0, 2, 4, 6]
    judged = JudgedExecutor(executor, Judge(first_is_better, max_new_tokens=3), (0, "Hello")).evaluate("test")[0]
    assert np.flatnonzero(np.isfinite(judged.win_rates)).tolist() == [0, 2, 4, 6]
    assert judged.win_rate == 0.5


def test_answers_that_do_not_fit_into_the_positions_are_refused_before_training(run) -> None:
    with pytest.raises(ConfigurationError, match=r"judge\.max_new_tokens=5000: .* do not fit into the base's"):
        run("long", judge=Judge(digits, max_new_tokens=5000))
