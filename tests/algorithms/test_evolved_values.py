"""What evolution can draw is possible, or refused before a model is loaded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import make_rows

import evollm
from evollm import DPO, SFT, ConfigurationError, HyperparameterConfig, RLParameter
from evollm.algorithms.dpo_settings import DPOHyperparameters

# Each impossible config, what an agent has beside it, and the words of the error.
IMPOSSIBLE = [
    (
        {"loss_type": RLParameter(choices=("sigmoid", "exo_pair"))},
        {},
        r"hp_config\.loss_type='exo_pair'.*label_smoothing=0\.0: must be above 0 and below 0\.5",
    ),
    (
        {"label_smoothing": RLParameter(0.1, 0.9)},
        {"label_smoothing": 0.45},
        r"hp_config\.label_smoothing=0\.9: .*must be at least 0 and below 0\.5",
    ),
    (
        {"lr": RLParameter(1e-6, 1e-4), "label_smoothing": RLParameter(0.1, 0.5)},
        {"label_smoothing": 0.2},
        r"hp_config\.label_smoothing=0\.5: evolution can draw this value, but label_smoothing",
    ),
    ({"loss_type": RLParameter(choices=("sigmoid", "ipoo"))}, {}, r"hp_config\.loss_type='ipoo': .*nearest is 'ipo'"),
    ({"loss_type": RLParameter(1, 2)}, {}, r"loss_type='sigmoid': is a name and has no bounds"),
]


@pytest.mark.parametrize(("parameters", "changes", "message"), IMPOSSIBLE)
def test_a_value_that_evolution_could_draw_and_no_agent_can_have_is_refused_before_a_model_is_loaded(
    parameters, changes, message
) -> None:
    arguments = {"model_name": "no/such/model", "hp_config": HyperparameterConfig(**parameters), **changes}
    with pytest.raises(ConfigurationError, match=message):
        DPO(**arguments)
    with pytest.raises(ConfigurationError, match=message):
        DPO.population(3, **arguments)


def test_an_sft_agent_has_no_losses_to_choose_from() -> None:
    config = HyperparameterConfig(loss_type=RLParameter(choices=("sigmoid", "ipo")))
    with pytest.raises(ConfigurationError, match=r"loss_type=.*is not a hyperparameter that can evolve"):
        SFT(model_name="no/such/model", hp_config=config)


@pytest.mark.parametrize("call", [evollm.tune, evollm.tuning.validate])
def test_tune_and_validate_refuse_it_too(make_model, tokenizer, tmp_path, call) -> None:
    settings = {"tokenizer": tokenizer, "run_dir": tmp_path / "run", "population": 2, "generations": 2}
    with pytest.raises(ConfigurationError, match=r"hp_config\.loss_type='exo_pair'"):
        call(make_model(), make_rows(40), hp_config={"loss_type": ["sigmoid", "exo_pair"]}, **settings)
    assert not (tmp_path / "run").exists()


def test_whatever_an_accepted_config_draws_is_possible() -> None:
    start = DPOHyperparameters(label_smoothing=0.1, batch_size=4)
    config = HyperparameterConfig(
        lr=RLParameter(1e-12, 1e3),
        beta=RLParameter(1e-3, 10),
        nll_alpha=RLParameter(1e-3, 10),
        loss_type=RLParameter(choices=("sigmoid", "exo_pair", "robust")),
        label_smoothing=RLParameter(1e-9, 0.4999, grow_factor=100),
        batch_size=RLParameter(1, 9, dtype=int),
    )
    config.validate(vars(start), list(vars(start)), lambda values: replace(start, **values))
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = config.sample(rng)
        for name in config:
            values[name], _ = config[name].mutate(values[name], rng)
            replace(start, **values)


def test_an_agent_whose_values_changed_is_checked_again_before_a_run(make_agent, gym, tmp_path) -> None:
    agent = make_agent(
        label_smoothing=0.1, hp_config=HyperparameterConfig(loss_type=RLParameter(choices=("sigmoid", "exo_pair")))
    )
    agent.label_smoothing = 0
    with pytest.raises(ConfigurationError, match=r"hp_config\.loss_type='exo_pair'"):
        evollm.finetune_llm_preference(
            [agent],
            gym,
            run_dir=tmp_path,
            evo_steps=1,
            tournament=evollm.TournamentSelection(1, True, 1),
            mutation=evollm.Mutations(),
        )


def test_an_agent_takes_no_more_losses_than_it_has_weights(make_agent) -> None:
    agent = make_agent(loss_type=["sigmoid", "ipo"], loss_weights=[1.0, 0.5])
    with pytest.raises(ConfigurationError, match=r"loss_weights=\[1.0, 0.5\]: must hold a number for each"):
        agent.loss_type = "sigmoid"
    assert agent.loss_type == ["sigmoid", "ipo"]


def test_a_config_without_entries_cannot_be_mutated(make_agent, gym, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"hp_config=HyperparameterConfig\(\): a mutation has nothing"):
        evollm.finetune_llm_preference(
            [make_agent(hp_config=HyperparameterConfig())],
            gym,
            run_dir=tmp_path,
            evo_steps=1,
            tournament=evollm.TournamentSelection(1, True, 1),
            mutation=evollm.Mutations(),
        )
