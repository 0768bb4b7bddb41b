"""Executors by their names, and the settings of each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec

from evollm.checks import optional_whole_number
from evollm.errors import ConfigurationError, MissingExtraError
from evollm.execution.executor import ExecutorFactory as Factory
from evollm.execution.local import LocalExecutor

LOCAL, RAY = "local", "ray"


def executor_named(asked: object, workers: object, resources_per_worker: object, ray_address: object) -> Factory:
    """What makes the executor that is asked for, by its name or as a class or function.

    Raises:
        ConfigurationError: It is none, or a setting is invalid or another executor's.
        MissingExtraError: It is Ray's, which is not installed.
    """
    optional_whole_number("workers", workers, 1)
    settings = {"workers": workers, "resources_per_worker": resources_per_worker, "ray_address": ray_address}
    for name, value in settings.items():
        if value is not None and asked != RAY:
            raise ConfigurationError(name, value, f"is a setting of executor={RAY!r}: name that, or leave it out")
    if asked == LOCAL:
        return LocalExecutor
    if asked == RAY:
        return _ray(settings)
    if not callable(asked):
        fix = (
            "must be a class or a function from agents and gym to an evollm.execution.executor.Executor, or a name: "
            f"{LOCAL} or {RAY}"
        )
        raise ConfigurationError("executor", asked, fix)
    return asked


def _ray(settings: Mapping[str, object]) -> Factory:
    resources, address = settings["resources_per_worker"], settings["ray_address"]
    if not isinstance(resources, Mapping | None):
        fix = "must be a mapping by Ray's names, such as {'CPU': 2, 'GPU': 0.5}"
        raise ConfigurationError("resources_per_worker", resources, fix)
    if not isinstance(address, str | None):
        raise ConfigurationError("ray_address", address, "must be the address of a cluster, such as 'auto', or None")
    # Said before the model is loaded. Importing Ray takes a second, which only those who use it wait for.
    if find_spec("ray") is None:
        raise MissingExtraError("ray", "ray", f"executor={RAY!r}")
    from evollm.execution.ray_workers import ray_executor  # noqa: PLC0415

    return partial(ray_executor, **settings)  # type: ignore[arg-type]
