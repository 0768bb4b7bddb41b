"""Check the arguments of `tune` and turn them into agents, gym and arguments of the training loop."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

from evollm.algorithms import Algorithm
from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints.atomic import check_unlocked
from evollm.checkpoints.find import find_agent
from evollm.data import clock
from evollm.data.mixing import FIELD, check_sets, checked_weights
from evollm.errors import ConfigurationError
from evollm.hpo import (
    HyperparameterConfig,
    Mutations,
    RLParameter,
    TournamentSelection,
)
from evollm.hpo.strategies import strategy_of
from evollm.llm_envs import DatasetGym
from evollm.models.encoder_decoder import is_encoder_decoder
from evollm.models.loading.precision import AUTO, names_dtype
from evollm.models.loading.pretrained import find_config, load_tokenizer
from evollm.processes import check_processes
from evollm.runs import read_config
from evollm.training.options import RunOptions
from evollm.training.prepare import check_arguments, check_paths, prepare
from evollm.training.run import Run
from evollm.training.schedule import Schedule
from evollm.tuning.from_yaml import as_objects
from evollm.tuning.parameters import (
    Settings,
    default_of,
    loop_of,
    taken_by,
)
from evollm.tuning.request import Request
from evollm.tuning.searches import check_search_settings, default_search, made_search
from evollm.tuning.splits import hold_out, hold_out_of_sets

# Defaults of `tune` that differ from the agents' defaults, for every algorithm; see `Algorithm.defaults` for others.
DEFAULTS: Settings = {"lr": 1e-4, "max_grad_norm": 1.0}
# Further ones of a population.
SAMPLING = "latin_hypercube"
# Without an hp_config, evolution keeps a hyperparameter within this factor of its start value.
SPREAD = 5.0
GENERATIONS = 8
NUM_EPOCHS = 2
SEED = 42
_AS_GIVEN = {
    "train_dataset": "data",
    "test_dataset": "test_data",
    "final_dataset": "final_data",
    "model_name": "model",
    "actor_network": "model",
}


@dataclass(frozen=True)
class Setup:
    """A run that is ready to begin.

    Attributes:
        algorithm: The algorithm of the agents.
        agents: The population.
        env: Serves the batches.
        loop: Keyword arguments for the training loop.
        run: The checked run, made of the other attributes.
    """

    algorithm: Algorithm
    agents: list[Any]
    env: DatasetGym
    loop: Settings
    run: Run

    @property
    def schedule(self) -> Schedule:
        """When the run evolves, evaluates and saves, in steps."""
        return self.run.schedule


def set_up(request: Request) -> Setup:
    """Load, tokenise and check everything that a run needs, without training.

    Raises:
        ConfigurationError: An argument is invalid.
        DataError: A dataset cannot be read, or has too few rows.
        CheckpointError: `start_from` cannot be read.
    """
    settings = prepare_settings(request)
    processes = check_processes(settings.get("accelerator"))
    resume = settings.get("resume_from_checkpoint")
    names = ("run_dir", "checkpoint_path", "elite_path", "resume_from_checkpoint")
    paths = check_paths(processes, *(settings.get(name) for name in names))
    for folder in (paths.run_dir, paths.checkpoints):
        check_unlocked(folder)
    # `check_paths` has checked the folder to resume.
    began = None if resume is None else read_config(resume, "resume_from_checkpoint")
    with clock.at(None if began is None else clock.read_moment(began["data"].get("written_at"))):
        env = make_env(request, settings)
    if resume is None:
        check_batch_sizes(settings, env.batch_size)
    # These checks come before the slow loading of the model.
    loop = _loop(request, settings, env, began)
    checked = {*names, "pop", "env", "accelerator"}
    parameters = inspect.signature(loop_of(request.kind)).parameters.values()
    given = {one.name: loop.get(one.name, one.default) for one in parameters if one.name not in checked}
    arguments = check_arguments(request.kind, processes, paths, **given)
    agents = make_agents(request, settings, env)
    return Setup(request.kind, agents, env, loop, prepare(agents, env, arguments))


def check_batch_sizes(settings: Settings, served: int) -> None:
    """Refuse a `batch_size` above the rows of a gym's batch, since optimizer steps would silently be smaller.

    Args:
        settings: The settings given to `tune`, without the agents' defaults: a default `batch_size` is not refused.
        served: Rows of a gym's batch.

    Raises:
        ConfigurationError: `batch_size`, or its upper bound in `hp_config`, is larger than `served`.
    """
    config = settings.get("hp_config") or {}
    asked = {"batch_size": settings.get("batch_size")}
    if "batch_size" in config and config["batch_size"].choices is None:
        asked["hp_config.batch_size.max"] = config["batch_size"].bounds[1]
    for name, size in asked.items():
        if size is not None and size > served:
            fix = (
                f"an optimizer step has at most the {served} rows of a batch: raise data_batch_size_per_gpu, which is "
                f"rows in a batch for each process, to {size}, or leave batch_size out"
            )
            raise ConfigurationError(name, size, fix)


def prepare_settings(request: Request) -> Settings:
    """The settings with the defaults of `tune`, converted to the objects that gym, agents and loop take."""
    settings = {**DEFAULTS, **request.kind.defaults, **request.settings}
    if request.population > 1:
        settings.setdefault("sampling", SAMPLING)
    settings.setdefault("seed", SEED)
    settings.setdefault("rand_seed", settings["seed"])
    return as_objects(settings)


def _tokenizer(request: Request, model_config: Mapping[str, Any] | None) -> Any:
    """The given tokenizer, loaded if it is given by name; by default the model's own."""
    if request.tokenizer is not None and not isinstance(request.tokenizer, str):
        return request.tokenizer
    model = request.model
    name = request.tokenizer or (model.name_or_path if isinstance(model, PreTrainedModel) else model)
    if not name:
        raise ConfigurationError("tokenizer", None, "the model does not say where it came from: pass its tokenizer")
    with _as_given({"model": "tokenizer"} if request.tokenizer else {}):
        return load_tokenizer(name, model_config)


def make_env(request: Request, settings: Settings) -> DatasetGym:
    """The gym; held-out splits that are not given are split off the data."""
    model_config = settings.get("model_config")
    tokenizer = _tokenizer(request, model_config)
    algorithm, data = request.kind, request.data
    given = {"test_dataset": request.test_data, "final_dataset": request.final_data}
    # One agent needs no final split by default: without selection, the test score is already unbiased.
    wanted = [name for name in given if given[name] is None and (name == "test_dataset" or request.population > 1)]
    splits = {name: rows for name, rows in given.items() if rows is not None and rows is not False}
    if wanted:
        row_format = algorithm.row_format.with_columns(settings.get("columns"))
        weights = checked_weights(settings.get(FIELD))
        if weights is not None:
            check_sets("data", data, weights)
        held_out = hold_out if weights is None else hold_out_of_sets
        divided = held_out(data, row_format, len(wanted), settings["seed"])
        data, splits = divided.train, splits | dict(zip(wanted, divided.parts, strict=True))
    arguments = {"test_dataset": None, **splits, **taken_by(algorithm.gym, settings)}
    if "encoder_decoder" not in arguments:
        model = request.model
        config = model.config if isinstance(model, PreTrainedModel) else find_config(model, model_config)
        arguments["encoder_decoder"] = is_encoder_decoder(config)
    with _as_given():
        return algorithm.gym(data, tokenizer=tokenizer, **arguments)


@contextmanager
def _as_given(names: Mapping[str, str] = MappingProxyType(_AS_GIVEN)) -> Iterator[None]:
    """In a ConfigurationError, replace the argument name of the called function with the argument name of `tune`."""
    try:
        yield
    except ConfigurationError as error:
        field, dot, inner = error.field.partition(".")
        raise type(error)(f"{names.get(field, field)}{dot}{inner}", error.value, error.fix) from error.__cause__


def make_agents(request: Request, settings: Settings, env: DatasetGym) -> list[SavableAgent]:
    """The population on the model, with the adapter weights of `start_from` if given."""
    algorithm, model = request.kind, request.model
    if not isinstance(model, str | PreTrainedModel):
        model = str(model)
    arguments = taken_by(algorithm.agent, settings) | taken_by(algorithm.agent.population, settings)
    arguments["model_name" if isinstance(model, str) else "actor_network"] = model
    if request.population > 1:
        arguments.setdefault("hp_config", default_hp_config(algorithm, settings))
    if isinstance(model, str) and not names_dtype(arguments.get("model_config")):
        arguments.setdefault("dtype", AUTO)
    with _as_given():
        agents = algorithm.agent.population(request.population, env.observation_space, env.action_space, **arguments)
    if request.start_from is not None:
        found = find_agent("start_from", request.start_from)
        if found.remark:
            warnings.warn(found.remark, UserWarning, stacklevel=2)
        start = str(found.path.resolve())
        for agent in agents:
            agent.load_checkpoint(start, load_optimizer=False, overwrite_reference_adapter=True)
    return agents


def default_hp_config(algorithm: Algorithm, settings: Settings) -> HyperparameterConfig:
    """Bounds of the hyperparameters that evolve by default: a factor of `SPREAD` around each start value above 0."""
    start = {name: settings.get(name, default_of(algorithm.agent, name)) for name in algorithm.evolves}
    return HyperparameterConfig(
        **{
            name: RLParameter(min=value / SPREAD, max=value * SPREAD)
            for name, value in start.items()
            if isinstance(value, int | float) and value > 0
        }
    )


def _loop(request: Request, settings: Settings, env: DatasetGym, began: Mapping[str, Any] | None) -> Settings:
    """Keyword arguments for the training loop; `began` is the `config.json` of a run to resume, None for a new run."""
    loop = taken_by(loop_of(request.kind), settings)
    total_given = loop.get("max_steps") is not None or loop.get("num_epochs") is not None
    evo_steps, generations = loop.get("evo_steps"), request.generations
    if evo_steps is None and generations is None and began is not None and request.population > 1:
        # A resumed run with a larger num_epochs gets more generations of the same length.
        evo_steps = loop["evo_steps"] = began["schedule"].get("evolve_every")
    if generations is not None and evo_steps is not None:
        if total_given:
            fix = "generations x evo_steps is the length of the run: leave one of the three out"
            raise ConfigurationError("generations", generations, fix)
        loop["max_steps"] = generations * evo_steps
    elif not total_given:
        loop["num_epochs"] = NUM_EPOCHS
    if request.population == 1:
        return loop
    search = loop.pop("search", None)
    search = default_search(request.settings) if search is None else search
    check_search_settings(search, request.settings)
    if evo_steps is None:
        total = Schedule.of(_options_so_far(request.kind, loop), len(env), held_out=bool(env.test_pairs)).total
        if generations is not None and generations > total:
            raise ConfigurationError("generations", generations, f"the run has {total} steps only: raise num_epochs")
        wanted = getattr(strategy_of(search) if isinstance(search, str) else search, "generations", GENERATIONS)
        loop["evo_steps"] = -(-total // (generations or wanted))
    if search == "tournament":
        sizes = {"population_size": request.population, **taken_by(TournamentSelection, settings)}
        loop["tournament"] = TournamentSelection(**sizes)
        loop["mutation"] = Mutations(**taken_by(Mutations, settings))
    else:
        loop["search"] = made_search(search, settings)
    return loop


def _options_so_far(algorithm: Algorithm, loop: Settings) -> RunOptions:
    """The options of the run, checked as the loop checks them, before a search is added."""
    defaults = {name: default_of(loop_of(algorithm), name) for name in RunOptions.__dataclass_fields__}
    found = {name: loop.get(name, default) for name, default in defaults.items()}
    if found["tournament"] is None and found["search"] is None:
        found["evo_steps"] = None
    # The SFT loop has no `update_reference_each_epoch`, so the default is None here.
    return RunOptions(**{**found, "update_reference_each_epoch": bool(found["update_reference_each_epoch"])})
