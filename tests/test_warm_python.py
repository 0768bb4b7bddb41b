"""A program that is forked is run, and ends, as by a Python that is started."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

WHAT_IT_SEES = """
import json, os, sys
print(json.dumps([sys.argv, __name__, os.getcwd(), sorted(os.environ), sys.stdin.read(), "conftest" in sys.modules]))
print("said", file=sys.stderr)
"""
OF_THE_TESTS = """
import importlib.util
assert importlib.util.find_spec("conftest") is None
"""


@pytest.mark.parametrize(
    "program",
    [
        WHAT_IT_SEES,
        OF_THE_TESTS,
        "import sys; sys.exit(3)",
        "import sys; sys.exit('a mistake')",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit; atexit.register(print, 'last'); print('first', end='')",
    ],
)
@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_a_program_is_given_and_leaves_what_python_would(warm_python, tmp_path, how, program) -> None:
    (tmp_path / "program.py").write_text(program)
    start = {"-c": ["-c", program], "-m": ["-m", "program"], "script": ["program.py"]}[how]
    environment = {"PYTHONPATH": str(tmp_path), "LC_CTYPE": "C.UTF-8"}
    ended = [
        subprocess.run(
            [executable, *start, "a b", "c"],
            cwd=tmp_path, env=environment, input="given", capture_output=True, text=True, check=False,
        )
        for executable in (sys.executable, warm_python)
    ]  # fmt: skip
    said = [(done.returncode, done.stdout, done.stderr) for done in ended]
    assert said[0] == said[1]


def test_what_it_raises_is_told_and_what_stops_its_caller_stops_it(warm_python) -> None:
    done = subprocess.run([warm_python, "-c", "1 / 0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
    program = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([warm_python, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM


FILES_OF_ITS_OWN = """
import os, transformers
pipes = [os.pipe() for _ in range(20)]
transformers.logging.get_logger("transformers.told").warning("of the program")
for reading, writing in pipes:
    os.set_blocking(reading, False)
    try:
        print(os.read(reading, 100))
    except BlockingIOError:
        pass
"""


def test_what_libraries_say_goes_to_its_stderr_and_into_none_of_its_files(warm_python) -> None:
    """Their handlers are bound to files of the process that imported them, whose numbers may be others' here."""
    done = subprocess.run(
        [warm_python, "-c", FILES_OF_ITS_OWN], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.stdout, done.stderr) == ("", "[transformers] of the program\n")
