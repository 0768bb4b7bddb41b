"""Safe access to files in run folders and checkpoints, which may come from other people: no links, atomic writes.

These functions do not protect against another process that changes the folder at the same time.
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
    """Return the path of a file or folder below `folder`, which need not exist.

    Args:
        folder: The folder; its own path, which the user has given, may have links.
        name: A relative path with `/` as the separator.

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
        OSError: The file cannot be read, or is a device, a pipe or a folder.
    """
    # Without O_NONBLOCK opening a named pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no regular file")
        try:
            return file.read()
        except MemoryError:
            raise OSError(f"{path} does not fit into memory") from None


def replace_bytes(path: Path, content: bytes) -> None:
    """Write or replace a file; if the process is killed, the old file or the new one is on disk.

    A link at `path` is replaced, not followed.

    Raises:
        OSError: The file cannot be written, for example since the disk is full; the old file is unchanged.
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
    """Remove the temporary files that killed processes have left in a folder: those of one file name, or of all."""
    leftover = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{8}}\.new")
    for path in folder.iterdir():
        if leftover.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def check_can_be_made(field: str, path: Path) -> None:
    """Check, before any work, that a file or folder can be written at a path.

    Raises:
        ConfigurationError: A parent of the path is not a folder, or cannot be written into.
    """
    existing = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not existing.is_dir():
        what = "a broken link" if existing.is_symlink() and not existing.exists() else "no folder"
        raise ConfigurationError(field, str(path), f"cannot be written: {existing} is {what}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigurationError(field, str(path), f"cannot be written: {existing} may not be written into")
    try:
        # os.access is not enough for root and for read-only file systems. On Linux this file has no name.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        fix = f"cannot be written: {existing} takes no files ({reason})"
        raise ConfigurationError(field, str(path), fix) from error
