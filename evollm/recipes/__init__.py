"""Configurations that come with evollm, to start from."""

from __future__ import annotations

from importlib.resources import files

from evollm.errors import ConfigurationError


def recipe_names() -> list[str]:
    """The names of the recipes, in alphabetical order."""
    names = [file.name for file in files("evollm.recipes").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """A recipe as YAML.

    Raises:
        ConfigurationError: There is no such recipe.
    """
    if name not in recipe_names():
        raise ConfigurationError("recipe", name, f"is none of those that there are: {', '.join(recipe_names())}")
    return files("evollm.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def recipe_purpose(name: str) -> str:
    """The first line of a recipe, which says what it is for."""
    return recipe_text(name).splitlines()[0].lstrip("# ")
