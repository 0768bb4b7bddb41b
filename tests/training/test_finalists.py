"""After the last step adapters made of the best agents may win, and the run's result is what won."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_examples, make_rows
from plain_executor import PlainExecutor

import evollm
from evollm import DPO, SFT, ConfigurationError
from evollm.cli import main
from evollm.hpo import PREFERENCE_FITNESSES, Evaluation, FinalCandidates, Guards, Recipe
from evollm.models.adapters.combining import combined
from evollm.models.adapters.merging import all_logprobs
from evollm.processes import Processes
from evollm.report import write_report
from evollm.runs import read_run
from evollm.runs.events import Candidate
from evollm.training.finalists import Contest

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
SMALL = {"lora_config": LORA, "num_epochs": 1, "verbose": False, "num_sample_answers": 1, "data_batch_size_per_gpu": 8}
# With this score and level the stretched best agent wins: its mean margin is larger.
STRETCHED = {"factors": [2.0], "score": "mean_margin", "level": 0.49, "combinations": ["cat", "ties"]}


@pytest.fixture
def tune(make_model, tokenizer, tmp_path):
    def start(model=None, data=None, **changes: Any):
        defaults = {"tokenizer": tokenizer, "run_dir": tmp_path / "run", "population": 3, "lr": 1e-3}
        # A search that ends with several finalists.
        if changes.get("population") != 1:
            defaults |= {"search": "tournament", "sampling": "random"}
        if changes.get("algorithm") != "sft":
            defaults["fitness"] = "accuracy_mean_margin"
        rows = make_rows(40) if data is None else data
        return evollm.tune(make_model() if model is None else model, rows, **{**defaults, **SMALL, **changes})

    return start


def logprobs_of(agent: Any) -> torch.Tensor:
    with agent.base.active(agent.actor_adapter) as network:
        return all_logprobs(network)


@pytest.mark.usefixtures("drawn_reports")
def test_the_winner_is_the_result_the_elite_and_in_the_records(tune, make_model, tmp_path) -> None:
    result = tune(merge=STRETCHED)
    ended = read_run(result.run_dir).ended
    assert ended is not None
    names = [str(one.recipe).partition(" ")[0] for one in ended.candidates]
    assert names[:2] == ["cat", "ties"]
    assert ended.made_of is not None
    assert ended.made_of.factor == 2
    member = next(agent for agent in result.population if agent.index == ended.best)
    assert result.best is not member
    # Twice the deltas of the agent as it was trained, which is the runner-up now.
    assert ended.runner_up == ended.best
    base, names = result.best.base, [agent.actor_adapter for agent in (result.best, member)]
    for path, first in base.adapters.export(names[0]).tensors.items():
        second = base.adapters.export(names[1]).tensors[path]
        assert torch.equal(first, 2 * second if "lora_B" in path else second)
    elite = DPO.load(str(result.run_dir / "elite"), actor_network=make_model())
    assert (logprobs_of(elite) - logprobs_of(result.best)).abs().max() < 1e-5
    assert ended.scores["after"]["mean_margin"] > ended.scores["runner_up"]["mean_margin"]
    assert write_report(result.run_dir).read_text().count(" x 2</td>") == 1


def test_without_a_better_candidate_the_best_agent_stays_with_its_bits(tune, make_model, tmp_path) -> None:
    plain = tune(run_dir=tmp_path / "plain")
    merged = tune(run_dir=tmp_path / "merged", merge={"level": 1e-9})
    for name in ("elite/actor/adapter_model.safetensors", "lineage.jsonl", "final.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    ended = read_run(merged.run_dir).ended
    assert ended is not None
    assert ended.made_of is None
    assert len(ended.candidates) >= 4
    assert read_run(plain.run_dir).ended.candidates == ()
    assert merged.best in merged.population
    # All candidates are freed.
    assert len(merged.best.base.adapters.names) == len(plain.best.base.adapters.names)


def test_an_agent_takes_a_soup_of_another_rank_as_its_actor_and_learns_on(make_population, gym, make_model, tmp_path):
    agents = make_population(2)
    for agent in agents:
        agent.set_hyperparameters({"lr": 1e-3 * (1 + agent.index)})
        agent.learn(gym.next_batch())
    base, rank = agents[0].base, agents[0].lora_config.r
    soup = combined(base, [agent.actor_adapter for agent in agents])
    agents[0].replace_actor(soup)
    assert agents[0].lora_config.r == 2 * rank
    agents[0].save_checkpoint(str(tmp_path / "soup"))
    loaded = DPO.load(str(tmp_path / "soup"), actor_network=make_model())
    assert (logprobs_of(loaded) - logprobs_of(agents[0])).abs().max() < 1e-5
    before = logprobs_of(agents[0])
    metrics = agents[0].learn(gym.next_batch())
    assert metrics["grad_norm"] > 0
    assert (logprobs_of(agents[0]) - before).abs().max() > 0


def test_extrapolation_starts_from_a_reference_that_is_an_adapter(tune, make_model, tmp_path) -> None:
    first = tune(run_dir=tmp_path / "first")
    found = tune(run_dir=tmp_path / "second", start_from=first.run_dir, merge=STRETCHED)
    ended = read_run(found.run_dir).ended
    assert ended.made_of is not None
    member = next(agent for agent in found.population if agent.index == ended.best)
    # [2 B, -B_ref]: the ranks add up.
    assert found.best.base.adapters.config(found.best.actor_adapter).r == 2 * LORA["r"]
    layer = found.best.base.network.model.layers[0].self_attn.q_proj
    best, actor, reference = (
        layer.get_delta_weight(name)
        for name in (found.best.actor_adapter, member.actor_adapter, member.adapter("reference"))
    )
    assert reference.abs().max() > 0
    assert torch.allclose(best, 2 * actor - reference, atol=1e-6)


def test_a_run_is_resumed_to_the_same_end_and_its_replay_says_why_it_is_not_compared(
    tune, make_model, tokenizer, tmp_path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, make_rows(40))))
    whole = tune(merge=FinalCandidates(**STRETCHED), data=str(rows), checkpoint_steps=2)
    elite = (whole.run_dir / "elite/actor/adapter_model.safetensors").read_bytes()
    metrics = (whole.run_dir / "metrics.jsonl").read_bytes()
    again = tune(
        merge=FinalCandidates(**STRETCHED),
        data=str(rows),
        checkpoint_steps=2,
        run_dir=None,
        resume_from_checkpoint=whole.run_dir,
    )
    assert (again.run_dir / "elite/actor/adapter_model.safetensors").read_bytes() == elite
    assert (again.run_dir / "metrics.jsonl").read_bytes() == metrics
    replayed = evollm.replay(
        whole.run_dir, model=make_model(), tokenizer=tokenizer, run_dir=tmp_path / "replay", verbose=False
    )
    assert replayed.exact is None
    assert "made of trained agents" in replayed.reason


class Fake:
    """An executor whose candidates have given margins, of all pairs alike but for noise."""

    processes = Processes.present()

    def __init__(self, margins: dict[Any, float]) -> None:
        self._margins, self._made = margins, {}
        self.discarded: list[int] = []

    def combine(self, index: int, recipe: Recipe) -> None:
        assert index not in {*self._made, *self.discarded}
        self._made[index] = recipe.agents if recipe.combination else recipe.factor

    def discard(self, indices: list[int]) -> None:
        self.discarded += indices

    def evaluate(self, split: str, indices: list[int]) -> dict[int, Evaluation]:
        assert split == "test"
        noise = np.random.default_rng(0).normal(size=50)
        found = {index: noise + self._margins[self._made.get(index, index)] for index in indices}
        return {index: Evaluation(margins, np.zeros(50)) for index, margins in found.items()}


def contest(executor: Fake, guards: Guards | None = None, **asked: Any) -> tuple[int, list[Candidate]]:
    options = FinalCandidates(finalists=4, **{"combinations": [], "factors": [], **asked})
    terms = PREFERENCE_FITNESSES["mean_margin"].terms
    return Contest(executor, options, terms, guards or Guards()).hold([7, 3, 5, 1])


def test_a_greedy_soup_takes_each_finalist_that_does_not_lower_the_score() -> None:
    executor = Fake({7: 1.0, (7, 3): 0.9, (7, 5): 1.1, (7, 5, 1): 1.2})
    winner, candidates = contest(executor)
    assert [one.recipe.agents for one in candidates] == [(7, 5, 1)]
    assert candidates[0].won
    assert candidates[0].difference == pytest.approx(0.2)
    assert winner not in executor.discarded
    assert len(executor.discarded) == 2


def test_a_greedy_soup_that_is_the_uniform_one_is_one_candidate() -> None:
    executor = Fake({7: 1.0, (7, 3): 1.1, (7, 3, 5): 1.2, (7, 3, 5, 1): 1.3})
    winner, candidates = contest(executor, combinations=["cat"])
    assert [one.recipe.agents for one in candidates] == [(7, 3, 5, 1)]
    assert winner not in executor.discarded


def test_a_candidate_that_breaks_a_guard_never_wins() -> None:
    margins = {7: -1.0, 0.5: -0.5, 1.5: -1.5}
    assert contest(Fake(margins), greedy=False, factors=[0.5, 1.5])[0] != 7
    guards = Guards(min_chosen_logratio=-0.1)
    executor = Fake(margins)
    winner, candidates = contest(executor, guards, greedy=False, factors=[0.5, 1.5])
    assert winner == 7
    assert len(executor.discarded) == 2
    assert not any(one.won for one in candidates)


@pytest.mark.parametrize(("bound", "factor"), [(1e-4, 0.0), (1e6, 2.0)])
def test_candidates_are_held_to_a_bound_on_the_kl(tune, bound, factor) -> None:
    """The reference itself holds it; where the best agent breaks it, that is enough to win, and no reason to warn."""
    asked = {**STRETCHED, "factors": [0.0, 2.0], "combinations": [], "greedy": False}
    result = tune(merge=asked, guards={"max_kl": bound}, lr=1e-2)
    ended = read_run(result.run_dir).ended
    assert ended.made_of.factor == factor
    broken = [one for one in read_run(result.run_dir).latest_evaluation if one.fitness[0] == -1e9]
    assert bool(broken) == (factor == 0)


def test_a_yaml_file_asks_for_candidates_and_its_run_is_resumed_from_the_folder(
    make_model, tokenizer, tmp_path, monkeypatch
) -> None:
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, make_rows(40))))
    lines = ["model: base", "data: rows.jsonl", "population: 2", "num_epochs: 1", "lr: 1e-3", "run_dir: run"]
    lines += ["search: tournament"]
    lines += ["lora_config: {r: 4, target_modules: [q_proj]}", "num_sample_answers: 0", "verbose: false"]
    lines += ["merge: {combinations: [svd], greedy: false, factors: [2], score: mean_margin, level: 0.49}"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "run.yaml"]) == 0
    ended = read_run("run").ended
    assert [str(one.recipe).partition(" ")[0] for one in ended.candidates] == ["svd", "agent"]
    elite = Path("run/elite/actor/adapter_model.safetensors").read_bytes()
    assert main(["resume", "run"]) == 0
    assert Path("run/elite/actor/adapter_model.safetensors").read_bytes() == elite


def test_sft_and_one_agent_have_candidates(make_model, tokenizer, tmp_path) -> None:
    result = evollm.tune(
        make_model(),
        make_examples(40),
        algorithm="sft",
        population=1,
        tokenizer=tokenizer,
        run_dir=tmp_path / "run",
        lr=1e-3,
        merge=True,
        **SMALL,
    )
    assert isinstance(result.best, SFT)
    ended = read_run(tmp_path / "run").ended
    assert [one.recipe.factor for one in ended.candidates] == [0.5, 1.25, 1.5]
    assert "loss" in ended.candidates[0].scores


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge": {"score": "perplexity"}}, "is no fitness of this algorithm"),
        ({"merge": True, "test_data": False, "population": 1}, "merge needs held-out rows"),
        ({"merge": True, "lora_config": {**LORA, "use_dora": True}}, "use_dora"),
        ({"merge": {"combinations": ["ties"]}, "lora_config": {**LORA, "lora_bias": True}}, "lora_bias"),
        ({"merge": True, "executor": PlainExecutor}, "cannot make candidates"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_work_is_refused_before_training(tune, tmp_path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tune(**changes)
    assert not Path(tmp_path / "run").exists()
