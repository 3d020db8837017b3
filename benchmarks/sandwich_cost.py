"""What sharing weights costs: one sandwich step beside the same four subnets as ordinary networks.

    python benchmarks/sandwich_cost.py                    # OFA-MobileNetV3 at 64 x 64 and NAS-Bench-Macro, on the CPU
    python benchmarks/sandwich_cost.py --space nas_bench_macro --rounds 20

Time: forward, backward and an optimiser step of the largest, the smallest and two random subnets, in turn with the
sandwich step on the same images, in one process, so that both meet the same load; the ratio is that of the medians
of at least ten rounds. On a shared machine the ratio of processor times is the steadier one. Memory: the highest
resident size of a process that trains, less what it held before the weights were made; the sandwich beside the
largest subnet alone. Goals: time at most 1.10, memory at most 1.10.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from kdnas import Supernet, load_space
from kdnas.distillers import Batch, Sandwich, Step
from kdnas.network import Network
from kdnas.randomness import python_rng
from kdnas.space import SearchSpace
from kdnas.tables import space_from_table, table_of

SIDES = {"ofa_mbv3": 64, "nas_bench_macro": 32}


class Normal:
    """What `Batch` asks of a data set: images that are normalised already."""

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same."""
        return pixels


def main() -> None:
    """Print both ratios for every space asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--space", choices=SIDES, action="append")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--memory-of", choices=("sandwich", "largest"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(peak(options.memory_of, options.space[0], options.batch))
        return
    for name in options.space or SIDES:
        ours, theirs = times(name, options.batch, options.rounds, options.channels_last)
        (wall, own_wall), (busy, own_busy) = (
            [statistics.median(t) for t in pair] for pair in zip(ours, theirs, strict=True)
        )
        paired = statistics.median(a / b for a, b in zip(ours[0], theirs[0], strict=True))
        print(
            f"{name}, batch {options.batch}, {options.rounds} rounds: sandwich {wall:.3f} s, "
            f"four networks {own_wall:.3f} s, "
            f"time ratio {wall / own_wall:.3f} (median of paired ratios {paired:.3f}), processor time ratio "
            f"{busy / own_busy:.3f}",
            flush=True,
        )
        sandwich, largest = (_measured(kind, name, options.batch) for kind in ("sandwich", "largest"))
        print(
            f"{name}: peak memory {sandwich / 2**20:.0f} MiB, largest alone {largest / 2**20:.0f} MiB, "
            f"memory ratio {sandwich / largest:.3f}",
            flush=True,
        )


def space_of(name: str) -> SearchSpace:
    """The published space at one resolution, for ten classes."""
    return space_from_table({**table_of(load_space(name)), "resolutions": [SIDES[name]], "classes": 10})


def batch_of(name: str, size: int, channels_last: bool = False) -> Batch:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, SIDES[name], SIDES[name], generator=generator)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, torch.arange(size) % 10, torch.arange(size), Normal(), None)  # pyrefly: ignore


def optimiser(module: torch.nn.Module) -> torch.optim.Optimizer:
    """As `Training` makes it."""
    return torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)


Seconds = tuple[list[float], list[float]]


def times(name: str, size: int, rounds: int, channels_last: bool) -> tuple[Seconds, Seconds]:
    """Wall and processor seconds of every sandwich step, and of the same four subnets as networks."""
    space, batch, step = space_of(name), batch_of(name, size, channels_last), Step(0, 100, 0)
    torch.manual_seed(0)
    supernet = Supernet(space).train()
    rng = step.rng("architectures")
    chosen = [space.largest, space.smallest, space.sample(rng), space.sample(rng)]
    networks = [supernet.extract(architecture) for architecture in chosen]
    if channels_last:
        supernet = supernet.to(memory_format=torch.channels_last)
        networks = [network.to(memory_format=torch.channels_last) for network in networks]
    distiller, shared = Sandwich(terms=()), optimiser(supernet)
    single = [optimiser(network) for network in networks]

    def sandwich() -> None:
        shared.zero_grad(set_to_none=True)
        for _, loss in distiller.losses(supernet, batch, step):
            loss.backward()
        shared.step()

    def ordinary() -> None:
        target = None
        for network, own in zip(networks, single, strict=True):
            own.zero_grad(set_to_none=True)
            outputs = network(batch.images)
            if target is None:
                loss, target = F.cross_entropy(outputs.logits, batch.labels), outputs.detach()
            else:
                loss = distiller.soft(outputs, target, batch.labels)
            loss.backward()
            own.step()

    for warm in (sandwich, ordinary):
        warm()
    ours: Seconds = [], []
    theirs: Seconds = [], []
    order = python_rng("order")
    for _ in range(rounds):
        pair = [(sandwich, ours), (ordinary, theirs)]
        order.shuffle(pair)
        for run, seconds in pair:
            began, busy = time.perf_counter(), time.process_time()
            run()
            seconds[0].append(time.perf_counter() - began)
            seconds[1].append(time.process_time() - busy)
    return ours, theirs


def peak(kind: str, name: str, size: int) -> int:
    """Bytes by which the resident size rose at most while this process trained."""
    space, batch = space_of(name), batch_of(name, size)
    # The libraries' own buffers are there before the measurement begins.
    F.conv2d(torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)).sum().backward()
    before = _status("VmRSS")
    model = Supernet(space) if kind == "sandwich" else Network(space.blueprint(space.largest))
    own, distiller = optimiser(model), Sandwich(terms=())
    for index in range(4):
        own.zero_grad(set_to_none=True)
        if isinstance(model, Supernet):
            for _, loss in distiller.losses(model, batch, Step(index, 100, 0)):
                loss.backward()
        else:
            F.cross_entropy(model(batch.images).logits, batch.labels).backward()
        own.step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def _measured(kind: str, name: str, size: int) -> int:
    # Freed tensors go back to the system at once, so that the resident size is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = ["--memory-of", kind, "--space", name, "--batch", str(size)]
    command = [sys.executable, __file__, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


if __name__ == "__main__":
    main()
