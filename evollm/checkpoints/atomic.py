"""Atomic replacement of folders, with a manifest that detects damage.

A folder is written under another name, listed in a manifest with the sha256 sum of each file, flushed to disk and
renamed. The sums detect changed bits, which neither safetensors nor torch does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from evollm.checks import usable_path
from evollm.errors import CheckpointError, ConfigurationError
from evollm.own_files import check_can_be_made, inside, read_bytes

MANIFEST = "manifest.json"
_LOCK = ".lock"
_CHUNK = 2**22


def check_replaceable(field: str, path: Path) -> None:
    """Check that a path can be written, and that nothing is there that evollm has not written.

    Raises:
        ConfigurationError: The path cannot be written; or at the path, or at one of the two names that are used while
            it is replaced, there is a link, a file, or a folder with other content.
    """
    if not path.name:
        raise ConfigurationError(field, str(path), "has no name of its own: give a folder below it")
    check_can_be_made(field, path)
    for place, is_ours in ((path, _is_ours), (_retired(path), _is_ours), (_staged(path), _is_staging)):
        if place.is_symlink():
            raise ConfigurationError(field, str(place), "is a symbolic link, and would be replaced: remove it")
        if place.exists() and not is_ours(place):
            fix = "holds something else, which would be lost: give another folder"
            raise ConfigurationError(field, str(place), fix)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty, or a saved agent, adapter or population without other files."""
    names = _listed(folder)
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return folder.is_dir() and all(file.relative_to(folder).as_posix() in names for file in files)


def _is_staging(folder: Path) -> bool:
    """Whether a folder is empty, or has the lock of a process that writes or has written a folder."""
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / _LOCK).is_file())


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it replaces `path` if the block ends without an error.

    The folder is beside `path`, so that the rename stays on one file system. After an error nothing has changed. If the
    process is killed, `path` is the old folder or the new one; between the two renames the old folder is where
    `existing_folder` finds it.

    Raises:
        ConfigurationError: `path` is something else than a saved agent, adapter or population.
        CheckpointError: Another process is writing to `path`.
        OSError: The folder cannot be written, for example since the disk is full.
    """
    path = usable_path("path", path)
    check_replaceable("path", path)
    with _staging(path) as staging:
        yield staging
        seal(staging)
        _swap(staging, path)
        # The lock was renamed with the folder, and would mark it as one that is being written.
        with suppress(OSError):
            (path / _LOCK).unlink(missing_ok=True)


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of a new file; the file replaces `path` if the block ends without an error.

    After an error nothing has changed. If the process is killed, `path` is the old file or the new one. A single file
    has no manifest.

    Raises:
        ConfigurationError: `path` is a link, or the name of the new file's folder is taken.
        CheckpointError: Another process is writing to `path`.
        OSError: The file cannot be written, for example since the disk is full.
    """
    path = usable_path("path", path)
    staged = _staged(path)
    if path.is_symlink() or staged.is_symlink() or (staged.exists() and not _is_staging(staged)):
        fix = f"is a link, or {staged.name} beside it is not evollm's: remove that, or give another path"
        raise ConfigurationError("path", str(path), fix)
    with _staging(path) as staging:
        file = staging / path.name
        yield file
        _flush(file)
        file.replace(path)
        _flush(path.parent)


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, for one process at a time, and remove what is left of it afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_discarded(path.parent, re.escape(path.name))
    staging = _staged(path)
    staging.mkdir(exist_ok=True)
    with only_writer(staging, what=path):
        try:
            # Remove what a killed process has left.
            for leftover in staging.iterdir():
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover)
                elif leftover.name != _LOCK:
                    leftover.unlink(missing_ok=True)
            yield staging
        finally:
            if staging.exists():
                _discard(staging, path.name)


@contextmanager
def only_writer(folder: Path, what: Path) -> Iterator[None]:
    """Lock an existing folder against other writers during the block; the lock of a killed process is released.

    Raises:
        CheckpointError: Another process holds the lock, and the message names `what`; or the lock file is not evollm's.
    """
    path = inside(folder, _LOCK)
    if path.exists() and (not path.is_file() or path.stat().st_size > 0):
        raise CheckpointError(f"{path} is not evollm's: remove it")
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(f"another process is writing to {what}: wait for it, or give another folder") from None
    try:
        yield
    finally:
        lock.release()


def check_unlocked(folder: Path) -> None:
    """Check that no other process is writing into a folder.

    Raises:
        CheckpointError: Another process holds the lock of `only_writer`.
    """
    if is_locked_folder(folder):
        try:
            with only_writer(folder, what=folder):
                pass
        except OSError:
            # The folder is not writable; the writer raises the error.
            return


def is_locked_folder(folder: Path) -> bool:
    """Whether a folder has the lock file of `only_writer`, which stays after the block."""
    return (folder / _LOCK).is_file()


def seal(folder: Path) -> None:
    """Write the manifest of a folder, with the sum of each file, and flush everything to disk."""
    files: dict[str, dict[str, object]] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if file not in (folder / MANIFEST, folder / _LOCK):
            files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
            _flush(file)
    (folder / MANIFEST).write_text(_manifest_text(files), encoding="utf-8")
    _flush(folder / MANIFEST)
    # All files get the permissions of the user's umask, since some libraries let only the owner read weights.
    mode = stat.S_IMODE((folder / MANIFEST).stat().st_mode)
    for name in files:
        if stat.S_IMODE((folder / name).stat().st_mode) != mode:
            (folder / name).chmod(mode)
    for inner in [folder, *(inner for inner in folder.rglob("*") if inner.is_dir())]:
        _flush(inner)


def verify(folder: Path) -> list[str]:
    """Compare every file of a folder with the manifest.

    Returns:
        The files' paths relative to the folder, with `/` as the separator.

    Raises:
        CheckpointError: The manifest or a file is missing, truncated, changed, or a link; the message names it.
    """
    try:
        text = read_bytes(inside(folder, MANIFEST)).decode()
        files: dict[str, dict[str, object]] = json.loads(text)["files"]
        unchanged = text == _manifest_text(files)
        if not all(entry.keys() == {"bytes", "sha256"} for entry in files.values()):
            raise ValueError("an entry has other fields")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing, so the other files cannot be checked") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged ({error})") from None
    if not unchanged:
        raise CheckpointError(f"{folder}: {MANIFEST} has changed since it was written")
    for name, expected in files.items():
        file = inside(folder, name)
        if not file.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{folder}: {name} has {file.stat().st_size} bytes of {expected['bytes']}")
        if _digest(file) != expected["sha256"]:
            raise CheckpointError(f"{folder}: {name} is not what was saved (its sha256 sum differs)")
    return list(files)


def _listed(folder: Path) -> set[str]:
    """Return the files in a folder's manifest; none if there is no manifest, or not one of evollm's."""
    try:
        manifest = json.loads(read_bytes(folder / MANIFEST))
    except (OSError, ValueError, RecursionError):
        return set()
    # Other programs write files with this name, too.
    ours = isinstance(manifest, dict) and manifest.keys() == {"files", "format", "sha256"}
    return {*manifest["files"], MANIFEST, _LOCK} if ours and isinstance(manifest["files"], dict) else set()


def existing_folder(path: Path) -> Path:
    """Return `path`, or the name to which a process that was killed while replacing it had renamed the old folder."""
    retired = _retired(path)
    return retired if retired.is_dir() and not retired.is_symlink() and not path.exists() else path


def remove_folder(path: Path, name: str | None = None) -> None:
    """Remove a folder; it is renamed first, so that a partly removed folder is not taken for a complete one.

    Args:
        path: The folder.
        name: The name by which `remove_discarded` finds a partly removed folder; None: the folder's own.
    """
    discarded = path.with_name(f".{name or path.name}.{secrets.token_hex(4)}.gone")
    path.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove what processes that were killed while writing or removing folders have left in `folder`.

    The caller must hold the lock of `folder`.

    Args:
        folder: The parent of the folders.
        name: A regular expression for the folders' names.
    """
    remove_discarded(folder, name)
    for path in folder.iterdir():
        written = folder / path.name[1:-4]
        if path.is_symlink() or not re.fullmatch(rf"\.{name}\.(new|old)", path.name):
            continue
        if (path.name.endswith(".new") and _is_staging(path)) or (
            path.name.endswith(".old") and written.exists() and _is_ours(path)
        ):
            _discard(path, written.name)


def _discard(path: Path, name: str) -> None:
    """Remove a folder with `remove_folder`, or, if it cannot be renamed, as far as possible."""
    try:
        remove_folder(path, name)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def remove_discarded(folder: Path, name: str) -> None:
    """Remove the partly removed folders that killed processes have left in `folder`.

    Args:
        folder: The parent of the folders.
        name: A regular expression for the folders' names.
    """
    pattern = re.compile(rf"\.{name}\.[0-9a-f]{{8}}\.gone")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _swap(staging: Path, path: Path) -> None:
    """Rename `staging` to `path`; a folder that was there is removed after the new one is on disk."""
    retired = _retired(path)
    if path.exists():
        if retired.exists():
            remove_folder(retired, path.name)
        path.rename(retired)
    try:
        staging.rename(path)
    except OSError:
        if retired.exists():
            retired.rename(path)
        raise
    _flush(path.parent)
    if retired.exists():
        _discard(retired, path.name)


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _retired(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _manifest_text(files: dict[str, dict[str, object]]) -> str:
    listed = json.dumps(files, sort_keys=True)
    # The manifest has a sum of itself, so that damage to a name in it is not reported as a missing file.
    own_sum = hashlib.sha256(listed.encode()).hexdigest()
    return json.dumps({"files": files, "format": 1, "sha256": own_sum}, indent=1) + "\n"


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Write a file or folder to disk with fsync."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
