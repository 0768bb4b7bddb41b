"""Folders that appear whole or not at all, and say whether they still are.

A folder is written aside, listed in a manifest with a sha256 sum for each file, flushed to disk and renamed. The sums
are what finds a changed bit: neither safetensors nor torch does.
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
    """Refuse a path at which something lies that evollm did not write, and one that cannot be written.

    Raises:
        ConfigurationError: A link, a file, or a folder with other content, at the path or where its parts are set
            aside; or a path that cannot be made.
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
    """Whether a folder is empty, or a saved agent, adapter or population without a file of somebody else's."""
    if not folder.is_dir():
        return False
    return not any(folder.iterdir()) or _holds_only(folder, _listed(folder))


def _is_staging(folder: Path) -> bool:
    """Whether a folder is empty, or one in which a process writes or has written a folder."""
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / _LOCK).is_file())


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Give a new empty folder to write into, and put it in the place of `path` when the block ends without an error.

    The folder lies beside `path`, so that the rename stays on one file system. After an error nothing has changed; if
    the process dies, `path` is the old folder or the new one, but for the moment between two renames, when the old one
    is where `existing_folder` finds it.

    Raises:
        ConfigurationError: Something lies at `path` that is not a saved agent, adapter or population.
        CheckpointError: Another process is writing to `path`.
        OSError: The disk is full, for example.
    """
    path = _as_path(path)
    check_replaceable("path", path)
    with _staging(path) as staging:
        yield staging
        seal(staging)
        _swap(staging, path)
        # It moved with the folder: by its lock a folder is known that is being written.
        with suppress(OSError):
            (path / _LOCK).unlink(missing_ok=True)


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Give the path of a new file to write, and put it in the place of `path` when the block ends without an error.

    After an error nothing has changed; if the process dies, `path` is the old file or the new one. A lone file has no
    manifest.

    Raises:
        ConfigurationError: Something of somebody else's lies where the new file is written.
        CheckpointError: Another process is writing to `path`.
        OSError: The disk is full, for example.
    """
    path = _as_path(path)
    if path.is_symlink() or not _is_free(_staged(path)):
        raise ConfigurationError("path", str(path), f"it, or {_staged(path).name} beside it, is somebody else's")
    with _staging(path) as staging:
        file = staging / path.name
        yield file
        _flush(file)
        file.replace(path)
        _flush(path.parent)


def _is_free(staged: Path) -> bool:
    return not staged.is_symlink() and (not staged.exists() or _is_staging(staged))


def _as_path(path: str | Path) -> Path:
    return usable_path("path", path)


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, on the same file system, that one process at a time has; it is gone afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_discarded(path.parent, re.escape(path.name))
    staging = _staged(path)
    staging.mkdir(exist_ok=True)
    with only_writer(staging, what=path):
        try:
            # Left by a process that died.
            for leftover in staging.iterdir():
                if leftover.name != _LOCK:
                    _remove(leftover)
            yield staging
        finally:
            if staging.exists():
                _discard(staging, path.name)


@contextmanager
def only_writer(folder: Path, what: Path) -> Iterator[None]:
    """Keep other processes from writing into an existing folder during the block; a dead process keeps nobody out.

    Raises:
        CheckpointError: Another process is in such a block; the message names `what`. Or the folder's lock is a file of
            somebody else's.
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
    """Refuse a folder into which another process writes now.

    Raises:
        CheckpointError: As of `only_writer`.
    """
    if is_locked_folder(folder):
        try:
            with only_writer(folder, what=folder):
                pass
        except OSError:
            # Whoever writes says why that cannot be.
            return


def is_locked_folder(folder: Path) -> bool:
    """Whether `only_writer` has been in a folder: its lock stays."""
    return (folder / _LOCK).is_file()


def seal(folder: Path) -> None:
    """List the files of a folder with their sums in its manifest, and flush everything to disk."""
    files: dict[str, dict[str, object]] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if file not in (folder / MANIFEST, folder / _LOCK):
            files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
            _flush(file)
    (folder / MANIFEST).write_text(_manifest_text(files), encoding="utf-8")
    _flush(folder / MANIFEST)
    _give_ordinary_permissions(folder, list(files))
    for inner in [folder, *(inner for inner in folder.rglob("*") if inner.is_dir())]:
        _flush(inner)


def _give_ordinary_permissions(folder: Path, names: list[str]) -> None:
    """Let files be read by whom the user's umask lets read: some libraries write weights for the owner alone."""
    ordinary = stat.S_IMODE((folder / MANIFEST).stat().st_mode)
    for name in names:
        if stat.S_IMODE((folder / name).stat().st_mode) != ordinary:
            (folder / name).chmod(ordinary)


def verify(folder: Path) -> list[str]:
    """Compare every file of a folder with its manifest.

    Returns:
        The names of the files, relative to the folder, with `/` between their parts.

    Raises:
        CheckpointError: The manifest or a file is missing, cut or changed, or a link; the message names it.
    """
    try:
        text = read_bytes(inside(folder, MANIFEST)).decode()
        files: dict[str, dict[str, object]] = json.loads(text)["files"]
        unchanged = text == _manifest_text(files)
        if not all(entry.keys() == {"bytes", "sha256"} for entry in files.values()):
            raise ValueError("its entries are something else")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing, so nothing says whether the rest is whole") from None
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
    """The files in a folder's manifest; none where it has no manifest of evollm's."""
    try:
        manifest = json.loads(read_bytes(folder / MANIFEST))
    except (OSError, ValueError, RecursionError):
        return set()
    # Other programs give their files that name too.
    ours = isinstance(manifest, dict) and manifest.keys() == {"files", "format", "sha256"}
    return {*manifest["files"], MANIFEST, _LOCK} if ours and isinstance(manifest["files"], dict) else set()


def _holds_only(folder: Path, names: set[str]) -> bool:
    """Whether each file in a folder has one of these names, relative to the folder."""
    return all(path.relative_to(folder).as_posix() in names or path.is_dir() for path in folder.rglob("*"))


def existing_folder(path: Path) -> Path:
    """Where the folder that was written to `path` is: there, or set aside by a process that died while replacing it."""
    retired = _retired(path)
    return retired if retired.is_dir() and not retired.is_symlink() and not path.exists() else path


def remove_folder(path: Path, name: str | None = None) -> None:
    """Remove a folder; if the process dies meanwhile, what is left has a name that nobody takes for the folder.

    Args:
        path: The folder.
        name: Under which `remove_discarded` finds what is left; None: the folder's own.
    """
    discarded = path.with_name(f".{name or path.name}.{secrets.token_hex(4)}.gone")
    path.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove what processes that died while they wrote or removed folders have left in `folder`.

    Whoever calls it keeps other writers out.

    Args:
        folder: Where the folders were.
        name: A pattern of their names.
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
    """Remove a folder as `remove_folder` does, as far as it can be removed.

    Renamed first: of a folder that is removed in part, nothing else would tell whose it is.
    """
    try:
        remove_folder(path, name)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def remove_discarded(folder: Path, name: str) -> None:
    """Finish what processes that died while removing a folder have left in `folder`.

    Args:
        folder: Where the folder was.
        name: A pattern of its name.
    """
    pattern = re.compile(rf"\.{name}\.[0-9a-f]{{8}}\.gone")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _swap(staging: Path, path: Path) -> None:
    """Rename `staging` to `path`; a folder that was there is deleted once the new one is on disk."""
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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _manifest_text(files: dict[str, dict[str, object]]) -> str:
    listed = json.dumps(files, sort_keys=True)
    # A sum of its own: a changed letter in a name must not pass for a missing file.
    own = hashlib.sha256(listed.encode()).hexdigest()
    return json.dumps({"files": files, "format": 1, "sha256": own}, indent=1) + "\n"


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Have a file or folder on disk, not only in the system's memory."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
