"""A Python that has imported torch, transformers, PEFT and evollm before it is asked to run a program.

Importing them takes longer than most programs that the tests start. `start` forks a server from a process that has
imported them; `install` writes an executable that is called as Python is. For each call the server forks a process
with the caller's files, folder, environment and arguments, and the executable ends as that process ended. What a
program says while it imports, and what it leaves to import, is seen in a plain Python only. Where the executable is
killed, the program is killed a moment later.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import logging
import os
import runpy
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import NoReturn

import torch

# Without site-packages and in a mode that ignores the environment: it starts in a moment.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [b"%12d" % len(request)], [0, 1, 2])
server.sendall(request)
answers = server.makefile()
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(process, number))
status = int(answers.readline() or 1)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""
MORE = ("accelerate", "datasets", "matplotlib.figure", "torch.distributed.run")


def install(folder: Path) -> str:
    """Start a server and write the executable; returns the executable's path. The server ends with this process."""
    executable, address = folder / "python", str(folder / "socket")
    executable.write_text(CLIENT.format(python=os.path.realpath(sys.executable), address=address))
    executable.chmod(0o755)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    alive, ours = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        try:
            _serve(listening, alive, str(executable))
        finally:
            os._exit(1)
    listening.close()
    alive.close()
    # It closes, and the server sees it, when this process ends.
    os.set_inheritable(ours.detach(), False)
    return str(executable)


def _serve(listening: socket.socket, alive: socket.socket, executable: str) -> NoReturn:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    # Not closed: a program's own files and sockets would get their numbers, which objects from before the fork still
    # write to, such as the handlers of libraries' logs, and close.
    kept = {0, 1, 2, nothing, listening.fileno(), alive.fileno()}
    for number in {int(name) for name in os.listdir("/dev/fd")} - kept:
        os.dup2(nothing, number, inheritable=False)
    threading.Thread(target=_end_with, args=[alive], daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        calling, _ = listening.accept()
        # Not before they are needed; at once from the second call.
        for name in MORE:
            importlib.import_module(name)
        if os.fork() == 0:
            listening.close()
            _handle(calling, executable)
        calling.close()


def _end_with(alive: socket.socket) -> None:
    alive.recv(1)
    os._exit(0)


def _handle(calling: socket.socket, executable: str) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, *_ = socket.recv_fds(calling, 12, 3)
    with calling.makefile("rb") as reader:
        arguments, folder, environment = json.loads(reader.read(int(size)))
    process = os.fork()
    if process == 0:
        calling.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.executable = executable
        _run(arguments[1:])

    def end_with_the_caller() -> None:
        if not calling.recv(1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    for file in files:
        os.close(file)
    calling.sendall(b"%d\n" % process)
    threading.Thread(target=end_with_the_caller, daemon=True).start()
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(BrokenPipeError):
        calling.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _of_the_tests(place: str) -> bool:
    root = Path(__file__).parents[1]
    return any(Path(place).is_relative_to(root / folder) for folder in ("tests", "benchmarking"))


def _run(arguments: list[str]) -> NoReturn:
    """Run a program, and end the process as Python would."""
    # After a fork torch makes its threads anew at their first use, which two threads of a program must not do at once.
    torch.set_num_threads(torch.get_num_threads())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    for logger in (logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)):
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)
    # What pytest has put there, and what was found in it.
    sys.path[:] = [place for place in sys.path if not _of_the_tests(place)]
    for name, module in list(sys.modules.items()):
        if _of_the_tests(getattr(module, "__file__", None) or "/"):
            del sys.modules[name]
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.path.abspath(place) for place in places if place]
    status = 0
    try:
        _execute(arguments[1:] if arguments[0] == "-u" else arguments)
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    # Threads, `atexit` and buffers, as at the end of a program.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _execute(arguments: list[str]) -> None:
    """A script, `-m module` or `-c program`."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        program, name = arguments[1].encode(), "<string>"
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        program, name = Path(arguments[0]).read_bytes(), arguments[0]
        main.__file__ = name
    exec(compile(program, name, "exec", dont_inherit=True), vars(main))
