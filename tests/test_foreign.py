"""Calls as scripts for AgileRL write them: understood, or refused in one line that says what to write."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from conftest import make_examples, make_rows

import evollm
from evollm import (
    DPO,
    GRPO,
    SFT,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_sft,
    foreign,
    save_llm_checkpoint,
)

TABLES: list[tuple[Callable[..., Any], Mapping[str, str]]] = [
    (DPO, foreign.AGENT),
    (SFT, foreign.SFT_AGENT),
    (GRPO, foreign.GRPO_AGENT),
    (PreferenceGym, foreign.GYM),
    (SFTGym, foreign.GYM),
    (PreferenceGym.reset, foreign.RESET),
    (finetune_llm_preference, foreign.LOOP),
    (finetune_llm_sft, foreign.LOOP),
    (TournamentSelection, foreign.TOURNAMENT),
    (Mutations, foreign.MUTATIONS),
    (DPO.save_checkpoint, foreign.SAVE),
    (DPO.load_checkpoint, foreign.LOAD),
    (DPO.test, foreign.TEST),
    (SFT.test, foreign.TEST),
    (DPO.get_action, foreign.ACTION),
    (SFT.get_action, foreign.ACTION),
    (save_llm_checkpoint, foreign.SAVE_ADAPTER),
]


@pytest.mark.parametrize(("function", "names"), TABLES)
def test_an_argument_of_agilerls_is_refused_with_what_to_write(function, names) -> None:
    assert not set(names) & set(inspect.signature(function).parameters)
    for name, fix in names.items():
        with pytest.raises(ConfigurationError) as caught:
            function(**{name: "secret"})
        assert str(caught.value).startswith(f"{name}=")
        assert fix in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_may_hold_a_key_is_not_printed() -> None:
    for name, value in {
        "wandb_api_key": "k3y",
        "init_hp": {"WANDB_API_KEY": "k3y"},
        "wandb_kwargs": {"key": "k3y"},
    }.items():
        with pytest.raises(ConfigurationError) as caught:
            finetune_llm_preference([], None, **{name: value})
        assert "k3y" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"init_hp=.*leave it out") as caught:
        finetune_llm_preference([], None, {"WANDB_API_KEY": "k3y"})
    assert "k3y" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: TournamentSelection(2, True, 4, 1), r"^eval_loop=1: .*\(tournament_size, elitism, population_size\)"),
        (lambda: Mutations(0.4, 0.2, 0.2, 0.2, 0.2, 0.2), "^new_layer_prob=0.2: .*by their names"),
        (lambda: DPO(0, "<eos>", "model"), "^argument 3='model': .*observation_space, action_space.*by their names"),
        (lambda: DPO(0, "<eos>"), "^observation_space=0: must be a space of gymnasium or None"),
        (lambda: DPO(pad_token_id=0, action_space="<eos>"), "^action_space='<eos>': must be a space"),
        (lambda: SFT(0, "<eos>", model_name="x"), "^observation_space=0: must be a space"),
        (lambda: DPO.population(2, 0, "<eos>", model_name="x"), "^observation_space=0: must be a space"),
        (lambda: finetune_llm_preference([], None, None, True), "^init_hp='...': .*leave it out"),
    ],
)
def test_an_argument_at_a_place_of_another_order_is_refused_by_its_name(call, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        call()


def test_a_gym_is_reset_by_a_seed_that_is_named(gym) -> None:
    with pytest.raises(ConfigurationError, match=r"^reset_dataloaders=True: .*reset\(seed=\.\.\.\)"):
        gym.reset(True)


def test_what_nobody_lists_stays_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'tournament'"):
        TournamentSelection(tournament=2)  # type: ignore[call-arg]


def public_callables() -> dict[str, Callable[..., Any]]:
    """All public functions, constructors and methods."""
    found: dict[str, Callable[..., Any]] = {}
    for name in evollm.__all__:
        thing = getattr(evollm, name)
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            found |= {
                f"{name}.{one}": method
                for one, method in inspect.getmembers(thing, inspect.isroutine)
                if not one.startswith("_") and method.__module__.startswith("evollm")
            }
            found[name] = thing
        elif inspect.isfunction(thing):
            found[name] = thing
    return found


def test_no_public_callable_swallows_arguments() -> None:
    """Some pass them on to what checks them, a config takes names, and tensors of any number are moved.

    A protocol is not constructed.
    """
    swallowing = {
        name
        for name, function in public_callables().items()
        if not getattr(function, "_is_protocol", False)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    }
    agents = {"DPO", "GRPO", "KTO", "SFT"}
    passing_on = {"tune", "replay", *(f"{agent}.population" for agent in agents)}
    assert swallowing == passing_on | {"HyperparameterConfig", *(f"{agent}.to_device" for agent in agents)}


@pytest.fixture
def callables(make_agent, make_sft, gym, sft_gym, tokenizer, tmp_path) -> dict[str, Callable[..., Any]]:
    """What takes switches and numbers, with the rest of its arguments given."""
    agent, learner = make_agent(), make_sft()
    agent.save_checkpoint(str(tmp_path / "agent"))
    loop = {"max_steps": 1, "num_sample_answers": 0, "save_elite": False, "checkpoint_steps": 0, "verbose": False}

    def bound(function: Callable[..., Any], *arguments: Any, **given: Any) -> Callable[..., Any]:
        return lambda **changed: function(*arguments, **{**given, **changed})

    return {
        "DPO": bound(DPO, actor_network=agent.base.network),
        "SFT": bound(SFT, actor_network=learner.base.network),
        "PreferenceGym": bound(PreferenceGym, make_rows(4), None, tokenizer),
        "SFTGym": bound(SFTGym, make_examples(4), None, tokenizer),
        "PreferenceGym.reset": gym.reset,
        "TournamentSelection": TournamentSelection,
        "Mutations": Mutations,
        "RLParameter": bound(RLParameter, min=1, max=2),
        "HyperparameterConfig": bound(HyperparameterConfig),
        "finetune_llm_preference": bound(finetune_llm_preference, [agent], gym, **loop),
        "finetune_llm_sft": bound(finetune_llm_sft, [learner], sft_gym, **loop),
        "DPO.population": bound(DPO.population, 1, actor_network=agent.base.network),
        "DPO.clone": agent.clone,
        "DPO.learn": bound(agent.learn, gym.next_batch()),
        "DPO.test": bound(agent.test, gym),
        "DPO.save_checkpoint": bound(agent.save_checkpoint, str(tmp_path / "again")),
        "DPO.load_checkpoint": bound(agent.load_checkpoint, str(tmp_path / "agent")),
        "DPO.set_reference_policy": agent.set_reference_policy,
    }


def test_a_switch_is_no_number_and_a_number_no_switch(callables, tmp_path) -> None:
    wrong = {"bool": 1, "bool | None": 1, "int": True, "int | None": True, "float": True, "float | None": True}
    tried, taken = 0, []
    for name, call in callables.items():
        annotated = inspect.signature(public_callables()[name]).parameters
        for parameter, value in [(one.name, wrong.get(str(one.annotation))) for one in annotated.values()]:
            if value is not None and not (name == "DPO.population" and parameter == "size"):
                tried += 1
                run_dir = {"run_dir": str(tmp_path / f"run-{tried}")} if name.startswith("finetune") else {}
                try:
                    call(**{parameter: value}, **run_dir)
                except ConfigurationError as error:
                    said = str(error)
                else:
                    said = "taken"
                taken += [] if said.startswith(f"{parameter}={value}: must be") else [(name, parameter, said)]
    assert taken == []
    assert tried > 90
