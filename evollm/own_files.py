"""Files in folders that may come from somebody else: no link is followed, and each file is there whole or not at all.

Nothing here defends against somebody who changes a folder at the same moment; its content is taken to stand still.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from pathlib import Path, PurePosixPath

from evollm.errors import CheckpointError, ConfigurationError


def inside(folder: Path, name: str) -> Path:
    """The path of a file or folder below `folder`, which need not exist.

    Args:
        folder: May be reached through links: its path is the user's.
        name: Relative, with `/` between its parts.

    Raises:
        CheckpointError: The name leads out of the folder, or a part of it is a symbolic link.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\0" in name:
        raise CheckpointError(f"{folder}: {name!r} is no name of a file in this folder")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link, and none is followed in a folder of evollm's: remove it")
    return path


def read_bytes(path: Path) -> bytes:
    """Read a regular file.

    Raises:
        OSError: It cannot be read; a device, a pipe or a folder counts as what cannot be read.
    """
    # Without O_NONBLOCK opening a named pipe waits for somebody who writes into it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        try:
            return file.read()
        except MemoryError:
            raise OSError(f"{path} does not fit into memory") from None


def replace_bytes(path: Path, content: bytes) -> None:
    """Put content in the place of a file; on disk is the old file or the new one, whenever the process dies.

    A link at `path` is replaced, not followed.

    Raises:
        OSError: The disk is full, for example; the old file is still there.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what processes that died while they replaced a file have left in a folder: of that name, or of any."""
    leftover = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{8}}\.new")
    for path in folder.iterdir():
        if leftover.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def check_can_be_made(field: str, path: Path) -> None:
    """Find out before any work whether a file or folder can be written at a path.

    Raises:
        ConfigurationError: A part of the path is a file, or nothing can be written into it.
    """
    existing = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not existing.is_dir():
        what = "a broken link" if existing.is_symlink() and not existing.exists() else "no folder"
        raise ConfigurationError(field, str(path), f"cannot be written: {existing} is {what}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigurationError(field, str(path), f"cannot be written: {existing} may not be written into")
    try:
        # Rights do not tell what root may do, or a file system that takes no files. On Linux this file has no name.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        fix = f"cannot be written: {existing} takes no files ({reason})"
        raise ConfigurationError(field, str(path), fix) from error
