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
from evollm.data.mixing import FIELD
from evollm.data.open_dataset import is_files
from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo import FinalCandidates, HyperparameterConfig
from evollm.models.loading.model_config import reloadable
from evollm.models.loading.precision import AUTO, DTYPES
from evollm.own_files import inside, read_bytes, replace_bytes
from evollm.runs.folder import CHECKPOINTS, ELITE, TUNE_ARGUMENTS, no_run, run_above

_DEVICE_MAPS = ("auto", "cpu", "cuda")
_ROWS = frozenset({"data", "test_data", "final_data"})
_PASSWORDS = frozenset({"proxies", "token", "use_auth_token"})
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|npu|hpu)(:\d+)?")
# Where a run writes, and below which name of its folder by default.
_PLACES = {"checkpoint_path": CHECKPOINTS, "elite_path": ELITE}
# Arguments that may be paths. They are written as absolute ones: a run may be resumed from another working folder.
_PATHS = {*_ROWS, *_PLACES, "model", "tokenizer", "start_from", "archive", "cache_dir"}
# Where tokenised rows are kept; a run works without it.
_CACHE = "cache_dir"
# Never taken from a run folder, which may have been moved, or come from somebody else: a cluster gets the data.
_NOT_TAKEN = frozenset({"run_dir", "resume_from_checkpoint", "ray_address"})


def write_tune_arguments(run_dir: Path, arguments: Mapping[str, Any]) -> None:
    """Write the keyword arguments of `tune` that are plain data into a run folder, and the names of the others.

    Run folders are handed on: rows are not written, since they may be private, and of `model_config` only what
    `read_tune_arguments` takes, so that no `token` is.
    """
    settings, objects = {}, []
    has_sets = arguments.get(FIELD) is not None
    for name, value in arguments.items():
        plain = _recorded_sets(value) if has_sets and name in _ROWS else _recorded(name, value)
        if plain is not _NOT_PLAIN:
            settings[name] = plain
        if plain is _NOT_PLAIN or (name == "model_config" and isinstance(value, Mapping) and _lost(value)):
            objects.append(name)
    content = {"settings": settings, "objects": sorted(objects)}
    replace_bytes(inside(run_dir, TUNE_ARGUMENTS), (json.dumps(content, indent=2) + "\n").encode())


@dataclass(frozen=True)
class TuneArguments:
    """The keyword arguments with which `tune` began a run, without `run_dir` and `resume_from_checkpoint`.

    Attributes:
        settings: Those that the run folder holds.
        objects: Names of those that it does not hold, or not wholly: Python objects.
        elsewhere: By name, paths outside the run folder that `elite_path` and `checkpoint_path` were. They are not
            taken from a run folder: the user has to give them.
    """

    settings: dict[str, Any]
    objects: frozenset[str]
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def require_places(self, names: Collection[str], run_dir: object, how: Callable[[str, str], str]) -> None:
        """Refuse to go on where one of these arguments is a path outside the run folder.

        Args:
            names: Of the arguments.
            run_dir: The run folder.
            how: From the name and the path of the argument to what the user types.

        Raises:
            ConfigurationError: One of the paths lies outside the folder.
        """
        for name in sorted(set(names) & self.elsewhere.keys()):
            path = self.elsewhere[name]
            fix = f"names {path} as {name}, which is outside its folder; if that is yours, say so: {how(name, path)}"
            raise ConfigurationError("run_dir", str(run_dir), fix)

    def require(self, names: Collection[str], run_dir: object, fix: str) -> None:
        """Refuse to go on where one of these arguments was a Python object.

        Raises:
            ConfigurationError: One was; `fix` says what to do.
        """
        missing = sorted(self.objects & set(names))
        if missing:
            what = f"was begun from Python with {', '.join(missing)} as objects, which no folder holds"
            raise ConfigurationError("run_dir", str(run_dir), f"{what}: {fix}")


def arguments_to_resume(run_dir: str | os.PathLike[str], given: Collection[str] = ()) -> dict[str, Any]:
    """The keyword arguments with which `tune` goes on with a run, beside `resume_from_checkpoint`.

    Args:
        run_dir: The run folder.
        given: Names of the arguments that the user gives anew.

    Raises:
        ConfigurationError: The run was not begun by `tune`, or with Python objects, which no folder holds.
        CheckpointError: The file is damaged.
    """
    arguments = read_tune_arguments(run_dir)
    arguments.require_places(_PLACES.keys() - set(given), run_dir, lambda name, path: shlex.quote(setting(name, path)))
    arguments.require(arguments.objects, run_dir, "call evollm.tune as then, with resume_from_checkpoint=...")
    return arguments.settings


def resume_of(run_dir: str | os.PathLike[str]) -> str:
    """The command that goes on with a run of `tune`, with the paths outside its folder that have to be given."""
    try:
        elsewhere = known_of(run_dir).elsewhere
    except (ConfigurationError, CheckpointError):  # The command itself says what is wrong.
        elsewhere = {}
    return command("resume", place(run_dir), *(setting(name, path) for name, path in sorted(elsewhere.items())))


def known_of(run_dir: str | os.PathLike[str]) -> TuneArguments:
    """As `read_tune_arguments`, but no arguments of a run that was not begun by `tune`.

    Raises:
        CheckpointError: The file is damaged.
    """
    if (usable_path("run_dir", run_dir) / TUNE_ARGUMENTS).is_file():
        return read_tune_arguments(run_dir)
    return TuneArguments({}, frozenset())


def read_tune_arguments(run_dir: str | os.PathLike[str]) -> TuneArguments:
    """The arguments of `tune` that a run folder holds.

    A run folder may come from somebody else: of `model_config` only what chooses weights and how they are stored is
    taken, never `trust_remote_code` or a kernel by its name, which the user has to give anew.

    Raises:
        ConfigurationError: The run was not begun by `tune`.
        CheckpointError: The file is damaged.
    """
    path = usable_path("run_dir", run_dir) / TUNE_ARGUMENTS
    if not path.is_file():
        above = run_above(path.parent)
        if above is not None:
            raise ConfigurationError("run_dir", str(run_dir), no_run(path.parent))
        fix = (
            "is no run that a command began. One that did not get to its first step is begun again by the command that "
            "began it; one that a script began goes on by the script, with "
            "finetune_llm_preference(..., resume_from_checkpoint=...), and a replay with "
            f"evollm replay RUN --resume {shlex.quote(place(run_dir))} (it has no {TUNE_ARGUMENTS})"
        )
        raise ConfigurationError("run_dir", str(run_dir), fix)
    try:
        content = json.loads(read_bytes(inside(path.parent, TUNE_ARGUMENTS)))
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
    # Without the cache rows are tokenised again, so a cache outside the folder is left out and not refused.
    no_cache = {_CACHE} if _leads_out(path.parent, settings.get(_CACHE)) else set()
    kept = {name: value for name, value in settings.items() if name not in _NOT_TAKEN | elsewhere.keys() | no_cache}
    return TuneArguments(kept, objects, elsewhere)


def _leads_out(run_dir: Path, place: object) -> bool:
    """Whether a path in a run folder's arguments is not one below the run folder."""
    if place is None:
        return False
    try:
        return not isinstance(place, str) or run_dir.resolve() not in Path(expanded(place)).resolve().parents
    except (OSError, ValueError):  # no path at all
        return True


def place_of(run_dir: Path, arguments: TuneArguments, name: str) -> Path:
    """The `elite_path` or `checkpoint_path` of a run with these arguments, below its folder.

    Raises:
        CheckpointError: A link lies there.
    """
    given = arguments.settings.get(name)
    if given is None:
        return inside(run_dir, _PLACES[name])
    return inside(run_dir, Path(expanded(given)).resolve().relative_to(run_dir.resolve()).as_posix())


def _harmless(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `model_config` that are written into a run folder, and that are taken from one."""
    devices = model_config.get("device_map")
    return reloadable(model_config) | ({"device_map": devices} if devices in _DEVICE_MAPS else {})


def _lost(model_config: Mapping[str, Any]) -> set[str]:
    """Names of the Python objects in `model_config` that a base cannot be loaded without, but for passwords."""
    objects = {str(name) for name, value in model_config.items() if _plain(value) is _NOT_PLAIN}
    return objects - _PASSWORDS - _harmless(model_config).keys()


_NOT_PLAIN = object()


def _recorded_sets(value: Any) -> Any:
    """Sets of rows by their names, or rows, as `_recorded` gives them."""
    if not isinstance(value, Mapping):
        return _recorded("data", value)
    sets = {name: _recorded("data", rows) for name, rows in value.items()}
    return _NOT_PLAIN if any(rows is _NOT_PLAIN for rows in sets.values()) else sets


def _recorded(name: str, value: Any) -> Any:
    """An argument of `tune` as `tune.json` holds it, with absolute paths, or `_NOT_PLAIN`."""
    if name in _ROWS and value is not False and not (isinstance(value, str | os.PathLike) or is_files(value)):
        return _NOT_PLAIN
    if name == "model_config" and isinstance(value, Mapping):
        return _harmless(value)
    if name == "lora_config" and type(value) is LoraConfig:
        return _plain(_lora_fields(value))
    if name in _PATHS and isinstance(value, str | os.PathLike):
        # A folder to write is absolute even where nothing is there yet; another text may be a name on the hub.
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
    if isinstance(value, HyperparameterConfig | FinalCandidates):
        value = value.to_dict()
    elif isinstance(value, Enum):
        value = value.value
    elif isinstance(value, set | frozenset):
        value = sorted(value, key=repr)  # A set of names, such as target_modules, has no order of its own.
    if isinstance(value, os.PathLike | torch.device):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        entries = {str(key): _plain(item) for key, item in value.items()}
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in entries.values()) else entries
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    return value if value is None or isinstance(value, str | int | float | bool) else _NOT_PLAIN
