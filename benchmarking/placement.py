"""What does a population cost on many devices? A simulation, from step times that were measured.

    python benchmarking/placement.py

Members are spread over devices, each with a base of its own. The births are those of tournaments over random
fitnesses, which moves more than a search whose best members stay ahead, and `evollm.execution.placement.placed`
decides who goes where: both are the library's own code. Assumed are:

- A step of m members on a device takes `one + (m - 1) * (eight - one) / 7` milliseconds, of the times that an H100
  took for one and for eight (RESULTS.md, "On a card"): measured at 1 and 8, a straight line between them and beyond.
- All devices wait for the slowest after each step, and each exchange of numbers takes `--latency` milliseconds for
  each doubling of devices. An evaluation takes a third of training on as many pairs.
- A member that travels is its adapter and AdamW's two moments in float32, over links of `--link` GB/s. `--by
  processes`: to all devices, as `parallel="members"` does; `--by driver`: in and out of one process, as with Ray.
- A checkpoint a generation, for which all members travel in the same way.
- No failures and no start: those depend on the place.

Columns: members on the fullest device; seconds of a generation without its checkpoint, and of these for exchanges;
how many times faster than one device, and that as a share of the devices; GB that come to a device in a generation,
and with a checkpoint; GB that data parallelism would bring to it, which adds up the gradients of all members after
each step.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from gpu import LORA, PUBLISHED

from evollm.execution.placement import placed
from evollm.hpo import Birth, HyperparameterConfig, Mutations, Result, RLParameter, TournamentSelection, plan_births

# Milliseconds of a step of 8 pairs with one member and with eight, on an H100.
MEASURED = {"0.5B": (113.0, 191.0), "7B": (149.0, 1054.0)}
BATCH = 8
BYTES_OF_A_PARAMETER, BYTES_OF_METRICS = 12, 400
PROCESSES, DRIVER = "processes", "driver"


@dataclass(frozen=True)
class Place:
    """What is assumed of the devices and of a generation.

    Attributes:
        shape: Of the base, a key of `MEASURED`.
        steps: Of a generation.
        pairs: Held-out pairs, scored once a generation.
        link: GB a second into or out of a device.
        latency: Milliseconds of an exchange of numbers for each doubling of devices.
        by: How members travel, `PROCESSES` or `DRIVER`.
    """

    shape: str
    steps: int
    pairs: int
    link: float
    latency: float
    by: str

    def compute_seconds(self, members: int) -> float:
        """Seconds of a generation's steps and evaluation of some members on one device."""
        one, eight = MEASURED[self.shape]
        return (self.steps + self.pairs / BATCH / 3) * (one + (members - 1) * (eight - one) / 7) / 1e3

    @property
    def member_bytes(self) -> int:
        """Bytes of a member that travels."""
        return BYTES_OF_A_PARAMETER * adapter_parameters(self.shape)

    def exchange_seconds(self, devices: int, travelling: float) -> float:
        """Seconds for a generation's numbers and for members that travel."""
        if devices == 1:
            return 0.0
        numbers = (self.steps + 2) * self.latency / 1e3 * math.log2(devices)
        # In turn to all; or to the driver, and from it.
        copies = 1 if self.by == PROCESSES else 2
        return numbers + copies * travelling * self.member_bytes / (self.link * 1e9)


def main() -> None:
    """Print a table for each shape."""
    options = _parse()
    for shape in options.shapes:
        place = Place(shape, options.steps, options.pairs, options.link, options.latency, options.by)
        print(f"\n{shape}: {place.member_bytes / 2**20:.0f} MiB a member, {place.steps} steps of {BATCH} pairs\n")
        print(
            "| members | devices | fullest | s | exchange | x one | of ideal | GB | checkpoint GB | data-parallel GB |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for members in options.members:
            for devices in (count for count in options.devices if count <= members):
                print(line(place, members, devices, options.generations))


def line(place: Place, members: int, devices: int, generations: int) -> str:
    """The mean of some generations as a row of the table."""
    found = list(moves(members, devices, generations))
    fullest = max(max(counts) for counts, _ in found)
    travelling = float(np.mean([travels for _, travels in found]))
    exchange = place.exchange_seconds(devices, travelling)
    seconds = float(np.mean([place.compute_seconds(max(counts)) for counts, _ in found])) + exchange
    times = place.compute_seconds(members) / seconds
    others = int(devices > 1)
    arriving = others * (travelling * place.member_bytes + (place.steps + 1) * members * BYTES_OF_METRICS)
    checkpoint = others * members * place.member_bytes
    # Each device passes on, and gets, all of the gradients once and the sums once.
    gradients = others * 2 * place.steps * members * adapter_parameters(place.shape) * 4
    sizes = " | ".join(f"{size / 1e9:.2f}" for size in (arriving, checkpoint, gradients))
    return (
        f"| {members} | {devices} | {fullest} | {seconds:.1f} | {exchange:.1f} | {times:.1f} | {times / devices:.0%} "
        f"| {sizes} |"
    )


def moves(members: int, devices: int, generations: int) -> Iterator[tuple[list[int], int]]:
    """For each generation the members of each device, and how many parents are sent."""
    bounds = HyperparameterConfig(lr=RLParameter(min=1e-6, max=1e-3))
    select, mutate, score = (np.random.default_rng(seed) for seed in range(3))
    births: Sequence[Birth] = [Birth.fresh(index, {"lr": 1e-5}) for index in range(members)]
    places = placed(births, {}, devices)
    for _ in range(generations):
        holders = {birth.index: place for birth, place in zip(births, places, strict=True)}
        births = plan_births(
            [Result(birth.index, (float(score.normal()),), birth.hyperparameters) for birth in births],
            tournament=TournamentSelection(population_size=members),
            mutations=Mutations(),
            hp_config=bounds,
            next_index=1 + max(holders),
            tournament_rng=select,
            mutation_rng=mutate,
        )
        places = placed(births, holders, devices)
        sent = {
            birth.parent
            for birth, place in zip(births, places, strict=True)
            if birth.parent is not None and holders[birth.parent] != place
        }
        yield [places.count(device) for device in range(devices)], len(sent)


def adapter_parameters(shape: str) -> int:
    """Parameters of LoRA on all linear layers of a published shape."""
    hidden, intermediate, layers, heads, key_value_heads, _ = PUBLISHED[shape]
    narrow = hidden // heads * key_value_heads
    sides = [2 * hidden] * 2 + [hidden + narrow] * 2 + [hidden + intermediate] * 3
    return int(LORA.r) * sum(sides) * layers


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=MEASURED, default=tuple(MEASURED))
    parser.add_argument("--members", type=int, nargs="+", default=(8, 64, 256, 1024))
    parser.add_argument("--devices", type=int, nargs="+", default=(1, 2, 8, 32, 128))
    parser.add_argument("--generations", type=int, default=5, help="of the simulation (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of a generation (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=256, help="held-out pairs (default: %(default)s)")
    parser.add_argument("--link", type=float, default=1.25, help="GB/s (default: 1.25, 10 Gbit/s)")
    parser.add_argument(
        "--latency", type=float, default=0.2, help="ms for a doubling of devices (default: %(default)s)"
    )
    parser.add_argument("--by", choices=(PROCESSES, DRIVER), default=PROCESSES, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
