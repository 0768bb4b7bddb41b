"""Make the virtual environments of the peer libraries, each from its own pinned versions (trl.txt, agilerl.txt).

    python benchmarking/peers/make_environments.py --folder .peers

makes `.peers/trl` and `.peers/agilerl` with the Python that runs it; what is made already, from the same versions, is
left alone. Needs only the standard library and pip's package index. The versions were pinned with Python 3.11.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = ("trl", "agilerl")
MARKER = "made-from"

# AgileRL asks for every distribution of its extra `cpu-llm`; liger-kernel, one of them, cannot run without a GPU.
AGILERL_CHECK = 'LLM_PACKAGES = get_extra_dependencies("agilerl", "cpu-llm")\n'
AGILERL_RELAXED = (
    'LLM_PACKAGES = [name for name in get_extra_dependencies("agilerl", "cpu-llm") if name != "liger-kernel"]\n'
)


def main() -> int:
    """Make what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".peers"), help="where the environments go")
    parser.add_argument("--only", choices=PEERS, help="make this one alone")
    options = parser.parse_args()
    for peer in PEERS if options.only is None else (options.only,):
        python = make_environment(peer, options.folder / peer)
        print(f"{peer}: {python}")
    return 0


def make_environment(peer: str, folder: Path) -> Path:
    """Make one peer's environment unless it is there; returns its Python."""
    requirements = HERE / f"{peer}.txt"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    digest = hashlib.sha256(requirements.read_bytes() + AGILERL_RELAXED.encode()).hexdigest()
    marker = folder / MARKER
    if marker.is_file() and marker.read_text() == digest:
        return python
    venv.create(folder, clear=True, with_pip=True)
    # torch first and by itself, pinned exactly: asked for together with others, pip may take a build for a GPU.
    torch = requirements.read_text().splitlines()[0]
    if not torch.startswith("torch=="):
        raise SystemExit(f"{requirements}: the first line must pin torch, and says {torch!r}")
    _pip(python, torch)
    _pip(python, "-r", str(requirements))
    if peer == "agilerl":
        _relax_agilerl(python)
    marker.write_text(digest)
    return python


def _pip(python: Path, *what: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    subprocess.run(command, check=True)


def _relax_agilerl(python: Path) -> None:
    """Let the installed AgileRL do without liger-kernel, and check that it does."""
    find = "import importlib.util; print(importlib.util.find_spec('agilerl').origin)"
    file = Path(_output(python, find))
    text = file.read_text(encoding="utf-8")
    if text.count(AGILERL_CHECK) != 1:
        raise SystemExit(f"{file}: not the text that this script knows how to relax; expected one {AGILERL_CHECK!r}")
    file.write_text(text.replace(AGILERL_CHECK, AGILERL_RELAXED), encoding="utf-8")
    flags = _output(python, "import agilerl; print(agilerl.HAS_LLM_DEPENDENCIES, agilerl.HAS_LIGER_KERNEL)")
    if flags != "True False":
        raise SystemExit(f"{file}: relaxed, and AgileRL still says {flags} (LLM dependencies, liger-kernel)")


def _output(python: Path, code: str) -> str:
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
