from __future__ import annotations

import json
import socket
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_rows
from mortal_workers import mortal_executor
from own_answers import population

from evollm import (
    DPO,
    Callback,
    ConfigurationError,
    HyperparameterConfig,
    MissingExtraError,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    WorkerError,
    finetune_llm_preference,
)
from evollm.execution.held_worker import Home, outcome
from evollm.execution.journal import CALLS, Journal
from evollm.execution.ray_workers import check_versions, checked_count, connect, default_resources
from evollm.runs import read_run
from evollm.training import finetune

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5))


@pytest.fixture
def run(model_folder, lora, tokenizer, tmp_path) -> Callable[..., list[DPO]]:
    """Run, or resume, a population of four in a folder of that name."""

    def start(name: str, *, resume: bool = False, **changes: Any) -> list[DPO]:
        env = PreferenceGym(
            make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4, final_dataset=make_rows(4, 20)
        )
        agents = DPO.population(
            4, model_name=str(model_folder), lora_config=lora, lr=1e-3, hp_config=HP_CONFIG, max_grad_norm=1.0
        )
        arguments = {
            "max_steps": 5,
            "evo_steps": 2,
            "checkpoint_steps": 1,
            "verbose": False,
            "num_sample_answers": 1,
            "resume_from_checkpoint" if resume else "run_dir": tmp_path / name,
            **changes,
        }
        if "search" not in arguments:
            arguments["tournament"] = TournamentSelection(2, True, 4, rand_seed=3)
            arguments["mutation"] = Mutations(0.2, 0.8, rand_seed=5)
        return finetune_llm_preference(agents, env, **arguments)[0]

    return start


def weights(population: list[DPO]) -> list[torch.Tensor]:
    return [torch.cat([one.detach().flatten() for one in agent.actor_parameters()]) for agent in population]


def never(place: int, method: str) -> str:
    return ""


def at_random(seed: int, share: float) -> Callable[[int, str], str]:
    """Workers die in so many of their calls, replayed ones too, before or after the call was made."""
    rng = np.random.default_rng(seed)
    return lambda place, method: str(rng.choice(["before", "after"])) if rng.random() < share else ""


def lineage(folder: Path) -> list[dict[str, Any]]:
    """Who came from whom with which values; fitnesses carry the rounding of the passes."""
    lines = [json.loads(line) for line in (folder / "lineage.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "fitnesses"} for line in lines]


def assert_same_bits(whole: Path, other: Path) -> None:
    for name in ("lineage.jsonl", "metrics.jsonl"):
        assert (other / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_whose_workers_die_ends_as_without_deaths_bit_for_bit(run, tmp_path) -> None:
    here = run("here", search="successive_halving")
    whole = run("whole", executor=mortal_executor(never), search="successive_halving")
    made: list[Any] = []
    with pytest.warns(UserWarning, match=r"worker \d was lost, and another one goes on"):
        mortal = run("mortal", executor=mortal_executor(at_random(1, 0.06), made), search="successive_halving")
    assert made[0].deaths > 2
    assert [agent.index for agent in mortal] == [agent.index for agent in whole] == [agent.index for agent in here]
    assert all(map(torch.equal, weights(mortal), weights(whole)))
    assert_same_bits(tmp_path / "whole", tmp_path / "mortal")
    assert lineage(tmp_path / "whole") == lineage(tmp_path / "here")
    # Members of different workers share no passes, so roundings differ.
    for one, other in zip(weights(here), weights(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["grpo", "kto"])
def test_members_that_learn_from_own_or_unpaired_answers_end_on_mortal_workers_as_here(
    algorithm, model_folder, lora, tokenizer, tmp_path
) -> None:
    """What a lost worker was rewarded for is asked again: a reward is a function of its arguments."""

    def run(name: str, **changes: Any) -> list[Any]:
        agents, env = population(algorithm, model_folder, lora, tokenizer)
        search = {"tournament": TournamentSelection(2, True, 4, rand_seed=3), "mutation": Mutations(0.2, rand_seed=5)}
        arguments = {"max_steps": 4, "evo_steps": 2, "verbose": False, "num_sample_answers": 0, **search, **changes}
        return finetune(agents, env, run_dir=tmp_path / name, **arguments)[0]

    here, whole = run("here"), run("whole", executor=mortal_executor(never))
    with pytest.warns(UserWarning, match=r"worker 1 was lost"):
        mortal = run("mortal", executor=mortal_executor(Once((1, "learn_step", 2), (1, "evaluate", 2))))
    assert all(map(torch.equal, weights(mortal), weights(whole)))
    assert_same_bits(tmp_path / "whole", tmp_path / "mortal")
    assert lineage(tmp_path / "whole") == lineage(tmp_path / "here")
    for one, other in zip(weights(here), weights(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def not_always_a_number(completions: list[str]) -> list[float]:
    """Not for the answers to the first prompt of a worker's first member."""
    return [float("nan") if number < 3 else float(-len(one)) for number, one in enumerate(completions)]


def test_what_a_worker_warns_of_is_warned_of_where_the_run_is(model_folder, lora, tokenizer, tmp_path) -> None:
    agents, env = population("grpo", model_folder, lora, tokenizer, not_always_a_number)
    with pytest.warns(UserWarning, match=r"left out for agent \d: its answers to row") as told:
        finetune(
            agents,
            env,
            max_steps=2,
            executor=mortal_executor(never),
            run_dir=tmp_path / "run",
            num_sample_answers=0,
            verbose=False,
        )
    # Once by each worker.
    assert len([one for one in told if "left out" in str(one.message)]) == 2


class Once:
    """Workers die once each, after a call of a method: (place, method) and which of its calls; place None: any."""

    def __init__(self, *deaths: tuple[int | None, str, int]) -> None:
        self.deaths = {(place, method): number for place, method, number in deaths}
        self.calls: Counter[tuple[int | None, str]] = Counter()
        self.died: set[int] = set()

    def __call__(self, place: int, method: str) -> str:
        dies = False
        for one in ((place, method), (None, method)):
            self.calls[one] += 1
            dies = dies or self.deaths.get(one) == self.calls[one]
        self.died |= {place} if dies else set()
        return "after" if dies else ""


@pytest.mark.filterwarnings("ignore:worker . was lost")
@pytest.mark.parametrize(
    ("deaths", "count", "moves"),
    [
        # The lodger of worker 0 is lost with it, and both go to worker 2.
        ([(1, "evaluate", 2), (0, "note_scores", 1)], 3, True),
        # Candidates are made when no step is left: nobody moves, and all bits are the same.
        ([(None, "combine", 1)], 2, False),
    ],
)
def test_members_of_a_worker_that_finds_no_room_go_on_with_the_others(run, tmp_path, deaths, count, moves) -> None:
    changes: dict[str, Any] = {} if moves else {"merge": {"finalists": 3, "greedy": True}, "max_steps": 3}
    whole = run("whole", executor=mortal_executor(never, count=count), **changes)
    made: list[Any] = []
    dies = Once(*deaths)
    with pytest.warns(UserWarning, match="has found no room: its members go on with the"):
        fewer = run("fewer", executor=mortal_executor(dies, made, count, room=0), **changes)
    assert [agent.index for agent in fewer] == [agent.index for agent in whole]
    assert lineage(tmp_path / "fewer") == lineage(tmp_path / "whole")
    for one, other in zip(weights(whole), weights(fewer), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if moves else 0)
    record = read_run(tmp_path / "fewer")
    assert {loss.home.worker for loss in record.losses if not loss.replaced} == dies.died
    ends = {home.worker for home in record.placements[-1].homes}
    assert ends | set(made[0].dismissed) == set(range(count))
    assert len(ends) == count - len(made[0].dismissed)
    assert bool(made[0].dismissed) == moves
    assert set(made[0].dismissed) <= dies.died
    # A plan after a loss at the same step comes last.
    last = {placed.step: placed for placed in record.placements if placed.step <= record.last_step}
    for placed in last.values():
        assert sorted(index for members in placed.members for index in members) == sorted(
            {line.agent for line in record.steps if line.step == placed.step}
        )
    # Nothing but the records of workers and times tells of it.
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "fewer").iterdir()}


@pytest.mark.filterwarnings("ignore:worker . was lost")
def test_a_run_without_a_worker_ends_with_an_error_and_is_resumed(run, tmp_path) -> None:
    whole = run("whole", executor=mortal_executor(never))
    dies = Once((1, "learn_step", 2), (0, "learn_step", 5))
    with (
        pytest.warns(UserWarning, match="its members go on with the 1 other worker, from its last commit"),
        pytest.raises(WorkerError, match=r"no worker is left: worker 0 has found no room; the run resumes from its"),
    ):
        run("fewer", executor=mortal_executor(dies, room=0))
    resumed = run("fewer", resume=True, executor=mortal_executor(never, count=3))
    assert lineage(tmp_path / "fewer") == lineage(tmp_path / "whole")
    for one, other in zip(weights(whole), weights(resumed), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


class Crash(Callback):
    def on_step(self, event) -> None:
        if event.step == 3:
            raise RuntimeError("the machine fell over")


def test_a_run_whose_driver_dies_too_resumes_bit_for_bit(run, tmp_path) -> None:
    changes = {"update_reference_each_epoch": True, "merge": True}
    whole = run("whole", executor=mortal_executor(never), **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="fell over"):
            run("killed", executor=mortal_executor(at_random(2, 0.05)), callbacks=[Crash()], **changes)
        resumed = run("killed", resume=True, executor=mortal_executor(at_random(3, 0.05)), **changes)
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


def test_a_worker_that_dies_of_a_call_is_not_replaced_for_ever(run) -> None:
    def dies(place: int, method: str) -> str:
        return "before" if place == 1 and method == "learn_step" else ""

    with (
        pytest.warns(UserWarning, match="worker 1 was lost"),
        pytest.raises(WorkerError, match=r"worker 1 was lost 6 times in learn_step.*fewer workers.*was killed"),
    ):
        run("run", executor=mortal_executor(dies), max_steps=3)


def test_a_journal_repeats_what_changes_a_worker_and_stays_short() -> None:
    journal = Journal()
    for call in ["begin", "evaluate", "members", "learn_step", "exports"]:
        journal.note((call, {}))
    assert [method for method, _ in journal.calls()] == ["begin", "evaluate", "learn_step"]
    assert not journal.is_due
    journal.note(("apply", {}))
    assert journal.is_due
    journal.commit("the state")  # type: ignore[arg-type]
    assert journal.calls() == [("begin", {}), ("restore", {"saved": "the state"})]
    for _ in range(CALLS):
        journal.note(("learn_step", {}))
    assert journal.is_due
    # Candidates are in no commit.
    journal.note(("combine", {}))
    assert not journal.is_due
    journal.note(("restore", {"saved": "another"}))
    assert journal.calls() == [("begin", {}), ("restore", {"saved": "another"})]


def test_what_workers_elsewhere_cannot_have_is_said_before_the_run(run, make_population, gym, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"model=.*each worker loads the base by itself"):
        finetune_llm_preference(make_population(2), gym, run_dir=tmp_path / "a", executor=mortal_executor(never))
    for changes, text in [
        ({"workers": 2}, r"workers=2: is a setting of executor='ray'"),
        ({"executor": "ray", "workers": 0}, r"workers=0"),
        ({"executor": "ray", "resources_per_worker": 2}, r"resources_per_worker=2: must be a mapping"),
        ({"executor": "ray", "ray_address": 6379}, r"ray_address=6379"),
    ]:
        with pytest.raises(ConfigurationError, match=text):
            run("b", **changes)
    assert not (tmp_path / "b").exists()


def test_without_ray_its_extra_is_named(run, monkeypatch) -> None:
    monkeypatch.setattr("evollm.execution.named.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'executor=\'ray\' needs the package ray: pip install "evollm\[ray\]"'):
        run("run", executor="ray")


@pytest.mark.parametrize(
    ("count", "resources", "found"),
    [
        (None, {"CPU": 1}, 4),
        (None, {"CPU": 4}, 3),
        (2, {"CPU": 4, "GPU": 0.5}, 2),
        (10, {"GPU": 0.1}, 10),
        (None, {}, 4),
        (
            4,
            {"CPU": 4},
            r"workers=4: each needs 4 CPU, .* room for 3 \(nodes: 8 CPU, 1 GPU, 1.0 GiB of memory; 4 CPU\)",
        ),
        (1, {"TPU": 1}, "each needs 1 TPU, and the cluster has room for 0"),
        (None, {"CPU": 16}, "each needs 16 CPU"),
        (1, {"CPU": -1}, r"resources_per_worker\.CPU=-1"),
        (1, {"CPU": 1.5}, r"resources_per_worker\.CPU=1.5"),
        (1, {"CPU": "2"}, r"resources_per_worker\.CPU='2'"),
    ],
)
def test_a_cluster_with_too_little_room_is_refused(count, resources, found) -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0, "node:10.0.0.1": 1.0, "memory": 2.0**30}, {"CPU": 4.0}]
    assert default_resources(nodes) == {"CPU": 1, "GPU": 1}
    assert default_resources(nodes[1:]) == {"CPU": 1}
    if isinstance(found, int):
        assert checked_count(count, 4, resources, nodes) == found
        return
    with pytest.raises(ConfigurationError, match=found):
        checked_count(count, 4, resources, nodes)


def test_a_worker_with_other_packages_is_refused() -> None:
    here = Home.present()
    check_versions(here, here)
    there = Home("node7", 1, {**here.versions, "torch": "1.0"})
    with pytest.raises(ConfigurationError, match=r"workers='node7': node7 has torch 1.0 and .*: install the same"):
        check_versions(there, here)


def test_errors_of_a_worker_arrive_as_they_are_or_as_text() -> None:
    class LocalError(Exception):
        """Cannot be pickled."""

    def fails(error: Exception) -> Callable[[], None]:
        def fail() -> None:
            raise error

        return fail

    same = [ConfigurationError("lr", -1, "must be positive"), MissingExtraError("a", "b", "c"), ValueError("no")]
    for error in same:
        with pytest.raises(type(error)) as raised:
            outcome(fails(error)).result()
        assert str(raised.value) == str(error)
    with pytest.raises(WorkerError, match=r"failed: LocalError: what\?"):
        outcome(fails(LocalError("what?"))).result()
    with pytest.raises(WorkerError, match=r"is out of memory: use fewer workers for each card"):
        outcome(fails(torch.OutOfMemoryError("CUDA out of memory"))).result()


def test_an_address_at_which_nobody_answers_is_refused_at_once() -> None:
    # Ray's own retries last minutes.
    ray = SimpleNamespace(is_initialized=lambda: False, init=lambda **_: pytest.fail("Ray was asked to connect"))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        for given in (address, f"ray://{address}"):
            with pytest.raises(ConfigurationError, match=r"ray_address='.*': Ray cannot be reached or started there"):
                connect(ray, given)
    connected = SimpleNamespace(is_initialized=lambda: False, init=lambda **_: None)
    assert connect(connected, None)
    assert connect(connected, "auto")
