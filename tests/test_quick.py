"""What is slow to import is imported when it is needed, and in any order."""

from __future__ import annotations

import subprocess
import sys

import pytest

import evollm
from evollm import public
from evollm.commands import export
from evollm.tuning import winner

SLOW = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "pandas", "matplotlib", "rich")


def python(program: str, *arguments: str, executable: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("--help", 0),
        ("--version", 0),
        ("recipes", 0),
        ("recipes dpo", 0),
        ("recipes none", 1),
        *((f"{name} --help", 0) for name in ("demo", "inspect", "train", "resume", "report", "chat", "export")),
        ("wrong", 2),
        ("export run --to x --what wrong", 2),
        ("train", 1),
        ("validate --recipe none", 1),
        ("chat run --max-new-tokens 0", 1),
    ],
)
def test_help_and_mistakes_are_answered_without_what_is_slow_to_import(arguments, status) -> None:
    program = (
        "import sys\nfrom evollm.cli import main\ntry:\n    status = main()\nexcept SystemExit as stopped:\n"
        f"    status = stopped.code\nprint('imported', [name for name in {SLOW} if name in sys.modules], status)"
    )
    said = python(program, *arguments.split())
    assert said.stdout.splitlines()[-1] == f"imported [] {status}", said.stderr


def test_a_report_is_written_without_torch() -> None:
    program = "import sys, evollm.report; print([n for n in ('torch', 'transformers', 'peft') if n in sys.modules])"
    assert python(program).stdout == "[]\n"


def test_ctrl_c_while_a_command_imports_is_one_line() -> None:
    program = (
        "import sys\nclass Interrupt:\n    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch':\n            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\nfrom evollm.cli import main\nsys.exit(main(['resume', 'run']))"
    )
    done = python(program)
    assert done.returncode == 130
    assert (done.stdout, done.stderr) == ("", "evollm: interrupted\n")


def test_every_name_of_evollm_is_found_when_it_is_asked_for(warm_python) -> None:
    assert evollm.__all__ == public.__all__
    assert set(evollm.__all__) <= set(dir(evollm))
    # Others' packages are there; evollm is not.
    of_evollm = "[name for name in sys.modules if name.partition('.')[0] == 'evollm']"
    forget = f"import sys\nfor name in {of_evollm}:\n    del sys.modules[name]\n"
    for program in (
        "import evollm; print(evollm.training.train_llm, evollm.models.quantised, evollm.DPO, evollm.tune.__name__); "
        "print([getattr(evollm, name) for name in dir(evollm)])",
        "from evollm import *; print(DPO, tune, ConfigurationError)",
    ):
        done = python(forget + program, executable=warm_python)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    assert not hasattr(evollm, "no_such_name")


def test_every_module_may_be_imported_first(warm_python) -> None:
    program = """
import importlib, pkgutil, sys
import peft, transformers, torch, rich, numpy, evollm
names = [module.name for module in pkgutil.walk_packages(evollm.__path__, "evollm.")]
# These import packages that need not be there.
optional = ("evollm.distributed.", "evollm.models.head_kernel")
names = [name for name in names if not name.startswith(optional)]
def forget(kept):
    for name in [name for name in sys.modules if name.partition(".")[0] == "evollm" and name not in kept]:
        package, _, last = name.rpartition(".")
        if package in kept:
            vars(sys.modules[package]).pop(last, None)
        del sys.modules[name]
packages = sorted({name.rpartition(".")[0] for name in names})
for package in packages:
    # Whichever of its modules is imported first, the package is imported before.
    forget(())
    importlib.import_module(package)
    kept = set(sys.modules)
    for name in names:
        if name.rpartition(".")[0] == package:
            importlib.import_module(name)
            forget(kept)
print(len(names))
"""
    done = python(program, executable=warm_python)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 100


def test_the_kinds_of_an_export_are_the_librarys() -> None:
    assert tuple(winner.KINDS) == export.KINDS
