"""What callbacks hear of, in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_rows

from evollm import Callback, HyperparameterConfig, Mutations, PreferenceGym, RLParameter, TournamentSelection
from evollm import finetune_llm_preference as finetune

METHODS = ("on_start", "on_step", "on_evaluation", "on_evolution", "on_checkpoint", "on_end")


class Diary(Callback):
    """Notes every event; ends the run at a step if it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.heard: list[tuple[str, object]] = []

    def __getattribute__(self, name: str):
        if name not in METHODS:
            return super().__getattribute__(name)

        def note(event) -> None:
            self.heard.append((name, event))
            if name == "on_step" and event.step == self.fail_at:
                raise RuntimeError("the machine fell over")

        return note

    def close(self) -> None:
        self.heard.append(("close", None))


@pytest.fixture
def run(make_population, tokenizer, tmp_path):
    def start(*callbacks: Callback) -> Path:
        env = PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4)
        finetune(
            make_population(2, hp_config=HyperparameterConfig(lr=RLParameter(1e-4, 1e-2))),
            env,
            max_steps=2,
            evo_steps=1,
            tournament=TournamentSelection(2, True, 2),
            mutation=Mutations(0.2, 0.8),
            run_dir=tmp_path / "run",
            num_sample_answers=1,
            callbacks=callbacks,
            verbose=False,
        )
        return tmp_path / "run"

    return start


def test_callbacks_hear_of_every_event_in_order(run) -> None:
    diary = Diary()
    folder = run(diary)
    generation = ["on_step", "on_evaluation", "on_checkpoint", "on_evolution"]
    last = ["on_step", "on_evaluation", "on_checkpoint"]
    assert [name for name, _ in diary.heard] == ["on_start", *generation, *last, "on_end", "close"]
    started, step, evaluated, checkpointed, evolved = (event for _, event in diary.heard[:5])
    assert (started.run_dir, started.total_steps, started.step) == (folder, 2, 0)
    assert [birth.index for birth in started.founders] == [0, 1]
    assert (step.step, set(step.metrics)) == (1, {0, 1})
    assert evaluated.best in evaluated.fitnesses
    assert len(evaluated.evaluations[0].margins) == 6
    assert evolved.plan.births[0].parent == evaluated.best
    assert checkpointed.path == folder / "checkpoints/step-000001"
    ended = diary.heard[-2][1]
    assert (ended.step, ended.best_path, ended.split) == (2, folder / "elite", "test")
    assert {ended.best, ended.runner_up} == {birth.index for birth in evolved.plan.births}
    assert len(ended.samples) == 1


def test_a_callback_is_closed_once_after_an_error_too(run) -> None:
    diary = Diary(fail_at=1)
    with pytest.raises(RuntimeError, match="fell over"):
        run(diary)
    assert [name for name, _ in diary.heard] == ["on_start", "on_step", "close"]


class Stuck(Callback):
    """Cannot be closed."""

    def close(self) -> None:
        raise OSError("the disk is gone")


def test_a_callback_that_cannot_be_closed_costs_neither_the_others_nor_the_first_error(run) -> None:
    diary = Diary(fail_at=1)
    with pytest.warns(UserWarning, match="Stuck could not be closed.*disk is gone"), pytest.raises(RuntimeError):
        run(Stuck(), diary)
    assert diary.heard[-1] == ("close", None)


def test_a_callback_that_cannot_be_closed_does_not_cost_the_result(run) -> None:
    diary = Diary()
    with pytest.warns(UserWarning, match="Stuck could not be closed"):
        assert run(Stuck(), diary).is_dir()
    assert diary.heard[-1] == ("close", None)
