"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from evollm.config import override, parse_config, read_config
from evollm.errors import ConfigurationError
from evollm.names import ALIASES
from evollm.recipes import recipe_text


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add a configuration file or a recipe, with values that replace its own."""
    parser.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG.yaml key=value",
        help="a file whose keys are parameters of evollm.tune, and values that come before its own, such as lr=1e-4 "
        "or lora_config.r=8",
    )
    parser.add_argument("--recipe", metavar="NAME", help="start from a recipe instead of a file: see evollm recipes")


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `evollm.tune` from the file or recipe and the command line.

    Raises:
        ConfigurationError: There is neither a file nor a recipe, or it cannot be read, or lacks model or data.
    """
    if options.recipe is not None:
        where = f"recipe {options.recipe}"
        config = override(parse_config(recipe_text(options.recipe), where), options.config)
    elif options.config:
        where, *overrides = options.config
        config = read_config(where, overrides)
    else:
        raise ConfigurationError("config", None, "give a YAML file, or --recipe NAME (evollm recipes lists them)")
    for name in ("model", "data"):
        if config.get(name) is None:
            others = [key for key in config if key != name]
            given = next((key for key in others if name in (key.lower(), ALIASES.get(key.lower()))), None)
            hint = f"; it says {given}, which is called {name} here" if given else ""
            fix = f"{where} does not say it: add it, or give {name}=... behind it{hint}"
            raise ConfigurationError(name, None, fix)
    return config


def trusts(config: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for code that comes with the base."""
    return bool((config.get("model_config") or {}).get("trust_remote_code"))


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the run folder."""
    parser.add_argument("run_dir", metavar="RUN", help="run folder")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the base, for a run that does not name it."""
    parser.add_argument("--model", help="hub name or folder of the base (default: the one that the run names)")


def add_elite(parser: argparse.ArgumentParser) -> None:
    """Add the folder of the best agent, for a run that keeps it elsewhere."""
    parser.add_argument("--elite", metavar="FOLDER", help="the best agent, of a run that keeps it outside its folder")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add whether code that comes with the base is run."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the base: a run folder cannot ask for it, so that you must",
    )
