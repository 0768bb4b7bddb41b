"""An algorithm of a user's own in one module, `evollm.algorithms.Algorithm` filled in: completions with labels.

It learns the pointwise logistic loss -log sigmoid(beta * s * (log pi - log ref)), where s is 1 for a completion that
is labelled good and -1 for another one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import make_rows
from torch import Tensor
from torch.nn.functional import logsigmoid

from evollm import (
    Callback,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    RLParameter,
    TournamentSelection,
    finetune_llm_sft,
    replay,
    save_llm_checkpoint,
    tune,
)
from evollm.algorithms import ALGORITHMS, DPO, SFT, Algorithm, algorithm_of, register
from evollm.algorithms.agent import OWN, REFERENCE
from evollm.algorithms.agilerl import EvolvableAlgorithm
from evollm.algorithms.references import Rows, finite_rows, reference_logprobs
from evollm.algorithms.scoring import scored_batches
from evollm.algorithms.settings import Evolvable, Hyperparameters
from evollm.algorithms.step import Method, learn_by
from evollm.data.cells import UnusableRowError
from evollm.data.completion_rows import EXAMPLES
from evollm.data.rows import RowFormat
from evollm.data.samples import Batch, Sample
from evollm.hpo import Evaluation
from evollm.llm_envs import DatasetGym
from evollm.llm_envs.observations import batch_of
from evollm.models.logprobs import MemberLogprobs
from evollm.report import read_run
from evollm.runs.words import Score, Words
from evollm.training import finetune

# --8<-- [start:algorithm]


def labelled(number: int, row: Any) -> Any:
    """A row's completion, with 1 where it is labelled good and -1 where it is not."""
    if row.get("label") is None:
        raise UnusableRowError("no label")
    example = EXAMPLES.read(number, {**row, "label": True})
    return replace(example, label=1.0 if row["label"] else -1.0)


class LabelGym(DatasetGym):
    """Serves completions with labels; the reward is the share of them whose number has the sign of the label."""

    row_format = RowFormat("answer", EXAMPLES.kind, labelled)

    def _reward(self, numbers: Any, pairs: Sequence[Sample]) -> float:
        return float(np.mean(numbers * signs(pairs) > 0))


def signs(pairs: Sequence[Sample]) -> Any:
    return np.array([pair.label for pair in pairs])


@dataclass(frozen=True)
class PointwiseHyperparameters(Hyperparameters):
    beta: float = 0.1


class Pointwise(EvolvableAlgorithm):
    """An agent with an actor and a reference."""

    algorithm: ClassVar[str] = "Pointwise"
    words: ClassVar[Words] = Words(
        name="Pointwise",
        noun="answer",
        title="tuned on labelled answers",
        method="the pointwise logistic loss",
        tags=("pointwise",),
        scores=(
            Score("accuracy", "share told apart", "share of answers", is_share=True),
            Score("mean_margin", "mean signed log-ratio", "nats", digits=2, is_signed=True),
        ),
        curves=(("loss", "pointwise loss"),),
    )
    hyperparameters_class = PointwiseHyperparameters
    beta = Evolvable[float]()

    def _frozen_adapters(self, actor: str) -> dict[str, str | None]:
        return {REFERENCE: self.base.adapters.copy(actor, REFERENCE, trainable=False)}


@dataclass(frozen=True)
class PointwiseObjective:
    """The loss of one optimizer batch: `signs` and `reference` are (B,)."""

    signs: Tensor
    reference: Tensor
    beta: float
    whole_batch: ClassVar[bool] = False

    @property
    def weight(self) -> int:
        return len(self.signs)

    def loss(self, rows: Sequence[int], policy: MemberLogprobs) -> Tensor:
        ratios = policy.chosen - self.reference[list(rows)].to(policy.chosen)
        return -logsigmoid(self.beta * self.signs[list(rows)].to(ratios) * ratios).sum() / self.weight

    def metrics(self, policy: MemberLogprobs) -> dict[str, float]:
        return {"loss": self.loss(range(self.weight), policy).item()}


def objectives(agents: Sequence[Pointwise], batch: Batch) -> list[PointwiseObjective]:
    references = reference_logprobs(agents, batch)
    labels = torch.from_numpy(batch.labels)
    return [PointwiseObjective(labels, one.chosen, agent.beta) for agent, one in zip(agents, references, strict=True)]


def usable_rows(
    agents: Sequence[Pointwise], batch: Batch, suspects: Sequence[int], reference: str | None = OWN
) -> list[Rows]:
    return [tuple(finite_rows([found])) for found in reference_logprobs(agents, batch, reference)]


def learn(agents: Sequence[Pointwise], batch: Batch) -> list[dict[str, float]]:
    return learn_by(Method(objectives, usable_rows), agents, batch, training=True)


def evaluate(agents: Sequence[Pointwise], env: DatasetGym, split: str, reference: str | None) -> list[Evaluation]:
    """Log-ratios times the labels; that of the side which no row has is 0."""
    ratios = np.full((len(agents), len(env.evaluation_pairs(split))), np.nan)
    for positions, batch, policies in scored_batches(usable_rows, agents, env, split):
        references = reference_logprobs(agents, batch, reference)
        for row, (policy, frozen) in enumerate(zip(policies, references, strict=True)):
            ratios[row, positions] = batch.labels * (policy.chosen.double().cpu() - frozen.chosen).numpy()
    return [Evaluation(row, np.zeros(len(row))) for row in ratios]


POINTWISE = Algorithm(
    agent=Pointwise,
    gym=LabelGym,
    learn=learn,
    evaluate=evaluate,
    fitness=lambda evaluation: evaluation.mean_margin,
    trial=Evaluation(np.zeros(2), np.zeros(2)),
    has_reference=True,
    evolves=("lr", "beta"),
    defaults={"beta": 0.5},
)

# --8<-- [end:algorithm]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, POINTWISE.name, POINTWISE)


def answers(count: int, skip: int = 0) -> list[dict[str, Any]]:
    """Both sides of `make_rows`, each with its label."""
    sides = (("chosen", True), ("rejected", False))
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": label}
        for row in make_rows(count, skip)
        for side, label in sides
    ]


def same_adapters(first: Any, second: Any) -> bool:
    one, other = (agent.base.adapters.export(agent.actor_adapter).tensors for agent in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stop(Callback):
    """Ends a run behind a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event: Any) -> None:
        if event.step == self.step:
            raise KeyboardInterrupt


def test_the_loop_trains_and_evolves_a_population_of_an_own_algorithm(make_model, tokenizer, lora, tmp_path) -> None:
    env = LabelGym(answers(6), answers(3, 6), tokenizer, data_batch_size_per_gpu=4)
    agents = Pointwise.population(
        2,
        actor_network=make_model(),
        lora_config=lora,
        lr=3e-3,
        beta=0.5,
        hp_config=HyperparameterConfig(lr=RLParameter(min=1e-3, max=1e-2), beta=RLParameter(min=0.1, max=1.0)),
        sample_hyperparameters=False,
    )
    population, fitnesses = finetune(
        agents,
        env,
        num_epochs=4,
        evo_steps=3,
        tournament=TournamentSelection(2, True, 2, rand_seed=1),
        mutation=Mutations(no_mutation=0.0, rl_hp=1.0, rand_seed=1),
        run_dir=tmp_path / "run",
        verbose=False,
    )
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if step["kind"] == "step"]
    # Where the actor is its reference, every ratio is 0.
    assert losses[:2] == pytest.approx([math.log(2)] * 2)
    assert max(losses[-2:]) < 0.6 * math.log(2)
    assert len({agent.beta for agent in population}) == 2
    # The mean margin, in nats: an accuracy would be at most 1.
    assert max(fitnesses) > 1
    record = read_run(tmp_path / "run")
    assert record.config["algorithm"] == "Pointwise"
    assert record.config["data"]["noun"] == "answer"


def tuned(make_model: Any, tokenizer: Any, lora: Any, run_dir: Path, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "test_data": answers(3, 6),
        "final_data": answers(3, 9),
        "algorithm": "pointwise",
        "population": 2,
        "evo_steps": 2,
        "max_steps": 6,
        "checkpoint_steps": 2,
        "data_batch_size_per_gpu": 4,
        "lr": 3e-3,
        "lora_config": lora,
        "verbose": False,
    }
    arguments |= {"run_dir": run_dir} if "resume_from_checkpoint" not in changes else {}
    return tune(make_model(), answers(6), **{**arguments, **changes})


@pytest.mark.usefixtures("drawn_reports")
def test_tune_evolves_it_and_a_run_that_was_interrupted_goes_on_bit_for_bit(
    make_model, tokenizer, lora, tmp_path
) -> None:
    whole = tuned(make_model, tokenizer, lora, tmp_path / "whole")
    assert isinstance(whole.best, Pointwise)
    # What the algorithm says of itself: where beta begins, and that it evolves.
    assert {*whole.best.hp_config} == {"lr", "beta"}
    assert whole.best.hp_config["beta"].bounds == (0.1, 2.5)
    with pytest.raises(KeyboardInterrupt):
        tuned(make_model, tokenizer, lora, tmp_path / "cut", callbacks=[Stop(3)])
    resumed = tuned(make_model, tokenizer, lora, tmp_path, resume_from_checkpoint=tmp_path / "cut")
    assert same_adapters(resumed.best, whole.best)
    assert resumed.fitnesses == whole.fitnesses
    assert [birth for _, birth in resumed.schedule] == [birth for _, birth in whole.schedule]

    page = whole.report.read_text(encoding="utf-8")
    assert "share told apart" in page
    assert "pointwise loss" in page
    save_llm_checkpoint(whole.best, tmp_path / "best", tokenizer, whole.run_dir)
    assert "tuned on labelled answers" in (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    handed = {"model": make_model(), "tokenizer": tokenizer, "lora_config": lora, "verbose": False}
    rows = {"data": answers(6), "test_data": answers(3, 6), "final_data": answers(3, 9)}
    replayed = replay(tmp_path / "cut", run_dir=tmp_path / "replay", **handed, **rows)
    assert replayed.exact


def test_labels_are_a_part_of_the_data(make_model, tokenizer, lora, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuned(make_model, tokenizer, lora, tmp_path / "cut", callbacks=[Stop(3)])
    others = [{**row, "label": not row["label"]} for row in answers(3, 6)]
    with pytest.raises(ConfigurationError, match="data"):
        tuned(make_model, tokenizer, lora, tmp_path, resume_from_checkpoint=tmp_path / "cut", test_data=others)


def test_labels_stay_with_their_rows_in_batches_and_beside_kept_tokens(tokenizer, tmp_path) -> None:
    rows = [*answers(4), {"prompt": "Question 9:", "completion": " well", "label": None}]
    for _ in range(2):
        env = LabelGym(rows, None, tokenizer, data_batch_size_per_gpu=3, cache_dir=tmp_path)
        assert env.reports["train"].num_dropped == 1
        for _ in range(len(env)):
            batch = env.next_batch()
            wanted = [1.0 if rows[number]["label"] else -1.0 for number in batch.rows]
            assert batch.labels.tolist() == wanted == [batch[row].label for row in range(len(batch))]
            assert batch.select([len(batch) - 1]).labels.tolist() == wanted[-1:]


def test_an_observation_holds_labels_and_teaches_what_its_batch_does(make_model, tokenizer, lora) -> None:
    rows, losses = answers(3, 6), []
    for observed in (False, True):
        env = LabelGym(rows, None, tokenizer, data_batch_size_per_gpu=4)
        agent = Pointwise(actor_network=make_model(), lora_config=lora)
        observation, twin = env.reset()[0], LabelGym(rows, None, tokenizer, data_batch_size_per_gpu=4)
        assert env.observation_space.contains(observation)
        batch = twin.next_batch()
        assert observation["labels"].tolist() == batch.labels.tolist()
        assert batch_of(observation).keys() == batch.keys()
        given = batch_of(observation) if observed else batch
        losses.append([learn([agent], given)[0]["loss"] for _ in range(2)])
        assert env.observation_space.contains(env.step(np.zeros(4, np.float32))[0])
    assert losses[0] == losses[1]


def test_other_loops_refuse_its_agents_and_its_name_is_its_own(make_model, tokenizer, lora, tmp_path) -> None:
    env = LabelGym(answers(6), None, tokenizer, data_batch_size_per_gpu=4)
    agent = Pointwise(actor_network=make_model(), lora_config=lora)
    with pytest.raises(ConfigurationError, match="is not a SFT agent, which finetune_llm_sft tunes"):
        finetune_llm_sft([agent], env, run_dir=tmp_path / "run")
    for nobody in ([], None, [object()]):
        with pytest.raises(ConfigurationError, match="no agent of an algorithm that is known"):
            finetune(nobody, env)
    with pytest.raises(TypeError, match="num_epoch'"):
        finetune([agent], env, num_epoch=1)

    class Child(SFT):
        pass

    assert algorithm_of(Child.__new__(Child)) is ALGORITHMS["sft"]
    assert algorithm_of(DPO.__new__(DPO)) is ALGORITHMS["dpo"]
    register(POINTWISE)
    with pytest.raises(ConfigurationError, match="is the name of"):
        register(replace(POINTWISE, agent=type("Other", (Pointwise,), {})))
