"""The arguments that all agents share are listed once, and shown as if each class had listed them."""

from __future__ import annotations

import inspect
import pydoc

import pytest

from evollm import DPO, SFT
from evollm.algorithms import AgentArguments, AgentSettings
from evollm.algorithms.settings import Hyperparameters

# Their defaults differ by algorithm, or one algorithm alone takes them.
SFT_ALONE = {"observation_space", "action_space", "lr", "max_grad_norm"}


@pytest.mark.parametrize("kind", [DPO, SFT])
def test_a_constructor_shows_the_shared_arguments_with_their_types_and_documentation(kind) -> None:
    parameters = inspect.signature(kind).parameters
    shared = {name: given.__forward_arg__ for name, given in AgentArguments.__annotations__.items()}
    assert {name: parameters[name].annotation for name in shared} == shared
    shown = pydoc.plain(pydoc.render_doc(kind))
    assert [
        name for name in parameters if f" {name}: " not in shown.partition("Raises:")[0].partition("Args:")[2]
    ] == []


def test_what_is_shared_is_what_every_agent_takes() -> None:
    assert set(inspect.signature(SFT).parameters) == SFT_ALONE | set(AgentArguments.__annotations__)
    assert set(inspect.signature(SFT).parameters) < set(inspect.signature(DPO).parameters)


def test_the_defaults_of_a_constructor_are_those_of_its_classes_of_settings() -> None:
    taken = inspect.signature(DPO).parameters
    for values in (DPO.settings_class(), DPO.hyperparameters_class(), AgentSettings(), Hyperparameters()):
        assert {name: taken[name].default for name in vars(values)} == vars(values)


@pytest.mark.parametrize("kind", [DPO, SFT])
def test_an_argument_that_no_agent_takes_is_a_type_error_that_names_it(kind) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'lrr'"):
        kind(lrr=1e-4)
