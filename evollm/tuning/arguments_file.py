"""`tune.json`: the keyword arguments with which `tune` began a run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from evollm.algorithms.agent import DEFAULT_LORA
from evollm.checks import expanded, located, usable_path
from evollm.command_line import command, place, setting
from evollm.data.open_dataset import is_files
from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo import HyperparameterConfig
from evollm.models.precision import AUTO, DTYPES
from evollm.models.pretrained import reloadable
from evollm.own_files import inside, read_bytes, replace_bytes
from evollm.runs.folder import ASKED, CHECKPOINTS, ELITE, no_run, run_above

_DEVICE_MAPS = ("auto", "cpu", "cuda")
_ROWS = frozenset({"data", "test_data", "final_data"})
_PASSWORDS = frozenset({"proxies", "token", "use_auth_token"})
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|npu|hpu)(:\d+)?")
# Where a run writes, besides its folder.
_PLACES = {"checkpoint_path": CHECKPOINTS, "elite_path": ELITE}
# Arguments that may be paths: the folder may be used from another one.
_PATHS = {*_ROWS, *_PLACES, "model", "tokenizer", "start_from", "archive", "cache_dir"}
# Where it may write besides, and need not.
_CACHE = "cache_dir"
# What is never taken from a folder, since it says which folder it is.
_NOT_TAKEN = frozenset({"run_dir", "resume_from_checkpoint"})


def write_tune_arguments(run_dir: Path, asked: Mapping[str, Any]) -> None:
    """Keep the keyword arguments of `tune` in a run folder, those that are plain data; of the others their names.

    People hand run folders on: rows count as objects, since they may be private and many, and of `model_config` only
    what `read_asked` takes is written, and so no `token`.
    """
    settings, objects = {}, []
    for name, value in asked.items():
        plain = _recorded(name, value)
        if plain is not _NOT_PLAIN:
            settings[name] = plain
        if plain is _NOT_PLAIN or (name == "model_config" and isinstance(value, Mapping) and _lost(value)):
            objects.append(name)
    content = {"settings": settings, "objects": sorted(objects)}
    replace_bytes(inside(run_dir, ASKED), (json.dumps(content, indent=2) + "\n").encode())


@dataclass(frozen=True)
class TuneArguments:
    """The keyword arguments with which `tune` began a run, without those that say where it goes.

    Attributes:
        settings: Those that the folder holds.
        objects: Names of those that it does not, or not wholly: Python objects.
        elsewhere: Places outside the folder that it names; they are the user's to give.
    """

    settings: dict[str, Any]
    objects: frozenset[str]
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def require_places(self, names: Collection[str], run_dir: object, how: Callable[[str, str], str]) -> None:
        """Refuse to go on without being told where some of the places are.

        Args:
            names: Of the places.
            run_dir: The run folder.
            how: From the name and the path that the folder states to what the user types.

        Raises:
            ConfigurationError: One of the places lies outside the folder.
        """
        for name in sorted(set(names) & self.elsewhere.keys()):
            path = self.elsewhere[name]
            fix = f"names {path} as {name}, which is outside its folder; if that is yours, say so: {how(name, path)}"
            raise ConfigurationError("run_dir", str(run_dir), fix)

    def require(self, names: Collection[str], run_dir: object, fix: str) -> None:
        """Refuse to go on without some of them.

        Raises:
            ConfigurationError: One of the names is that of an object; `fix` says what to do.
        """
        missing = sorted(self.objects & set(names))
        if missing:
            what = f"was begun from Python with {', '.join(missing)} as objects, which no folder holds"
            raise ConfigurationError("run_dir", str(run_dir), f"{what}: {fix}")


def read_asked(run_dir: str | os.PathLike[str], given: Collection[str] = ()) -> dict[str, Any]:
    """All keyword arguments with which `tune` began a run, without those that say where it goes.

    Args:
        run_dir: The run folder.
        given: Names of those that the user gives anew.

    Raises:
        ConfigurationError: No command and no `tune` began it, or with Python objects, which no folder holds.
        CheckpointError: The file is damaged.
    """
    asked = read_tune_arguments(run_dir)
    asked.require_places(_PLACES.keys() - set(given), run_dir, lambda name, path: shlex.quote(setting(name, path)))
    asked.require(asked.objects, run_dir, "call evollm.tune as then, with resume_from_checkpoint=...")
    return asked.settings


def resume_of(run_dir: str | os.PathLike[str]) -> str:
    """The command that goes on with a run that `tune` began, with the places that it must be told of."""
    try:
        elsewhere = known_of(run_dir).elsewhere
    except (ConfigurationError, CheckpointError):  # The command itself says what is wrong.
        elsewhere = {}
    return command("resume", place(run_dir), *(setting(name, path) for name, path in sorted(elsewhere.items())))


def known_of(run_dir: str | os.PathLike[str]) -> TuneArguments:
    """As `read_tune_arguments`; nothing of a run that a script began.

    Raises:
        CheckpointError: The file is damaged.
    """
    return (
        read_tune_arguments(run_dir)
        if (usable_path("run_dir", run_dir) / ASKED).is_file()
        else TuneArguments({}, frozenset())
    )


def read_tune_arguments(run_dir: str | os.PathLike[str]) -> TuneArguments:
    """What a run folder holds of the arguments of `tune`.

    A folder may come from somebody else: of `model_config` only what chooses weights and how they are stored is taken,
    never `trust_remote_code` or a kernel by its name. Who needs these must ask for them anew.

    Raises:
        ConfigurationError: No command and no `tune` began the run.
        CheckpointError: The file is damaged.
    """
    path = usable_path("run_dir", run_dir) / ASKED
    if not path.is_file():
        above = run_above(path.parent)
        if above is not None:
            raise ConfigurationError("run_dir", str(run_dir), no_run(path.parent))
        fix = (
            "is no run that a command began. One that did not get to its first step is begun again by the command that "
            "began it; one that a script began goes on by the script, with "
            "finetune_llm_preference(..., resume_from_checkpoint=...), and a replay with "
            f"evollm replay RUN --resume {shlex.quote(place(run_dir))} (it has no {ASKED})"
        )
        raise ConfigurationError("run_dir", str(run_dir), fix)
    try:
        content = json.loads(read_bytes(inside(path.parent, ASKED)))
        settings, objects = dict(content["settings"]), frozenset(map(str, content["objects"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    for name in ("model", "tokenizer"):
        if not isinstance(settings.get(name), str | None):
            raise CheckpointError(f"{path} is damaged: {name} is {settings[name]!r}")
    if not _DEVICE.fullmatch(str(settings.get("device") or "cpu")):
        raise CheckpointError(f"{path} is damaged: device is {settings['device']!r}")
    if settings.get("dtype") not in (None, AUTO, *DTYPES):
        raise CheckpointError(f"{path} is damaged: dtype is {settings['dtype']!r}")
    if isinstance(settings.get("model_config"), Mapping):
        settings["model_config"] = _harmless(settings["model_config"])
    elsewhere = {name: str(settings[name]) for name in _PLACES if _leads_out(path.parent, settings.get(name))}
    # Without it the rows are tokenised again, which is no reason to refuse anything.
    no_cache = {_CACHE} if _leads_out(path.parent, settings.get(_CACHE)) else set()
    kept = {name: value for name, value in settings.items() if name not in _NOT_TAKEN | elsewhere.keys() | no_cache}
    return TuneArguments(kept, objects, elsewhere)


def _leads_out(run_dir: Path, place: object) -> bool:
    """Whether a place that a folder names is not a folder of its own below it."""
    if place is None:
        return False
    try:
        return not isinstance(place, str) or run_dir.resolve() not in Path(expanded(place)).resolve().parents
    except (OSError, ValueError):  # no path at all
        return True


def place_of(run_dir: Path, asked: TuneArguments, name: str) -> Path:
    """Where a run that was asked for like this has its `elite_path` or `checkpoint_path`.

    Raises:
        CheckpointError: A link lies there.
    """
    given = asked.settings.get(name)
    if given is None:
        return inside(run_dir, _PLACES[name])
    return inside(run_dir, Path(expanded(given)).resolve().relative_to(run_dir.resolve()).as_posix())


def _harmless(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run folder holds of `model_config`, and what is taken from it."""
    devices = model_config.get("device_map")
    return reloadable(model_config) | ({"device_map": devices} if devices in _DEVICE_MAPS else {})


def _lost(model_config: Mapping[str, Any]) -> set[str]:
    """The Python objects in `model_config` that the folder does not hold, and that a base cannot be loaded without."""
    objects = {str(name) for name, value in model_config.items() if _plain(value) is _NOT_PLAIN}
    return objects - _PASSWORDS - _harmless(model_config).keys()


_NOT_PLAIN = object()


def _recorded(name: str, value: Any) -> Any:
    """An argument of `tune` as its record has it, with paths from the root, or `_NOT_PLAIN`."""
    if name in _ROWS and value is not False and not (isinstance(value, str | os.PathLike) or is_files(value)):
        return _NOT_PLAIN
    if name == "model_config" and isinstance(value, Mapping):
        return _harmless(value)
    if name == "lora_config" and type(value) is LoraConfig:
        return _plain(_lora_fields(value))
    if name in _PATHS and isinstance(value, str | os.PathLike):
        # What is not there yet is no name on the hub.
        return os.path.abspath(expanded(value)) if name in _PLACES else located(value)
    if name in _ROWS and is_files(value):
        return [located(path) for path in value]
    return _plain(value)


def _lora_fields(config: LoraConfig) -> dict[str, Any]:
    """The fields that are not at their defaults, and those to which `tune` gives defaults of its own."""
    default = LoraConfig()
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    return {name: value for name, value in fields.items() if name in DEFAULT_LORA or value != getattr(default, name)}


def _plain(value: Any) -> Any:
    """The value as JSON has it, or `_NOT_PLAIN`."""
    if isinstance(value, HyperparameterConfig):
        return value.to_dict()
    if isinstance(value, os.PathLike | torch.device):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        found = {str(key): _plain(item) for key, item in value.items()}
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in found.values()) else found
    if isinstance(value, Enum):
        return _plain(value.value)
    return value if value is None or isinstance(value, str | int | float | bool) else _plain_list(value)


def _plain_list(value: Any) -> Any:
    # A set of names, such as target_modules, has no order of its own.
    items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
    found = [_plain(item) for item in items] if isinstance(items, list | tuple) else [_NOT_PLAIN]
    return _NOT_PLAIN if any(item is _NOT_PLAIN for item in found) else found
