"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evollm.errors import ConfigurationError

# A folder that holds none of these is not evollm's to replace.
MARKS = ("attributes.pt", "adapter_config.json")


def check_replaceable(field: str, path: Path) -> None:
    """Refuse a path at which something lies that is not a saved agent or adapter.

    Raises:
        ConfigurationError: A file, or a folder with other content.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir() or not any((path / mark).is_file() for mark in MARKS):
        raise ConfigurationError(field, str(path), "holds something else, which would be lost: give another folder")


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Give a new empty folder to write into, and put it in the place of `path` when the block ends without an error.

    The folder is made beside `path`, so that the rename stays on one file system. After an error nothing has changed.

    Raises:
        ConfigurationError: Something lies at `path` that is not a saved agent or adapter.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigurationError("path", path, "must be a path")
    path = Path(path)
    check_replaceable("path", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        # mkdtemp makes folders that only their owner can read.
        staging.chmod(0o777 & ~_umask())
        yield staging
        _swap(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, path: Path) -> None:
    """Rename `staging` to `path`; a folder that was there is deleted once it has made way."""
    if not path.exists():
        staging.rename(path)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    path.rename(retired / "old")
    staging.rename(path)
    shutil.rmtree(retired, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
