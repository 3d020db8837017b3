"""What sharing prefixes saves when all of NAS-Bench-Macro is scored: layer evaluations, wall time, memory.

    python benchmarks/prefix_sharing.py            # about three minutes on one CPU thread

Three ways to score the same candidates with the same scorer, on one thread, in one process:
  shared      depth first over common prefixes, as every search does it;
  one by one  each subnet through the supernet, evidence and teacher outputs kept (cached batches);
  naive       per candidate: the network rebuilt, the data opened, the teacher run, batch norm re-estimated; in
              contiguous memory, as images come.
The last two are timed on a random part, and given per candidate. Weights are random: times do not depend on them.
"""

import argparse
import dataclasses
import itertools
import random
import time
import weakref
from typing import Any

import torch

from kdnas import Supernet, load_space
from kdnas.architecture import Architecture
from kdnas.data import Data, TensorImages
from kdnas.network import Network, calibrate, channels_last
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import torch_rng
from kdnas.scorers import Evidence, Rdm
from kdnas.scorers.base import LayerCount, score_all
from kdnas.space import SearchSpace
from kdnas.teachers import Frozen
from kdnas.teachers.fitted import fitted_teacher


def synthetic(count: int, side: int) -> Data:
    """Random images: what is timed does not depend on them."""
    parts = [
        TensorImages(torch.rand(count, 3, side, side, generator=torch_rng(name)), torch.arange(count) % 10)
        for name in ("train", "search", "test")
    ]
    return Data(*parts, class_names=tuple("0123456789"))


def evidence_of(data: Data, teacher: Frozen, count: int) -> Evidence:
    """The first images of the search part and the teacher's outputs on them."""
    pixels = data.search.take(torch.arange(count))
    return Evidence(pixels, channels_last(data.normalise(pixels)), data.search.labels[:count], teacher(pixels))


def peak_bytes(supernet: Supernet, networks: list[Architecture], scorer: Rdm, evidence: Evidence) -> int:
    """The most bytes of layers' outputs that are alive at once while these networks are scored."""
    alive: list[weakref.ref[torch.Tensor]] = []
    peak, run = 0, supernet.run

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal alive, peak
        output = run(*arguments, **options)
        alive = [reference for reference in [*alive, weakref.ref(output)] if reference() is not None]
        peak = max(peak, sum(t.numel() * t.element_size() for reference in alive if (t := reference()) is not None))
        return output

    supernet.run = watched  # type: ignore[method-assign]
    try:
        score_all(supernet, networks, scorer, evidence)
    finally:
        supernet.run = run  # type: ignore[method-assign]
    return peak


def all_codes(space: SearchSpace) -> list[Architecture]:
    """Every combination of options."""
    names = [choice.name for choice in space.choices]
    return [
        Architecture(dict(zip(names, values, strict=True)))
        for values in itertools.product(*(choice.options for choice in space.choices))
    ]


def score_naively(supernet: Supernet, architecture: Architecture, scorer: Rdm, data: Data, evidence: Evidence) -> None:
    """The network rebuilt, its batch norm re-estimated on 256 images."""
    device = evidence.images.device
    network = supernet.extract(architecture).to(device)
    calibrate(network, [data.normalise(data.train.take(torch.arange(256)).to(device))])
    scorer.score(network, dataclasses.replace(evidence, images=evidence.images.contiguous()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--sample", type=int, default=150, help="candidates timed one by one and naively")
    options = parser.parse_args()
    torch.set_num_threads(1)
    space = dataclasses.replace(load_space("nas_bench_macro"), width_multiplier=0.25, resolutions=(options.side,))
    supernet = Supernet(space).eval()
    data = synthetic(max(256, options.images), options.side)
    preprocessing: Preprocessing = data.preprocessing
    teacher = Frozen(Network(fitted_teacher((3, options.side, options.side), 10)), preprocessing=preprocessing)
    evidence = evidence_of(data, teacher, options.images)
    scorer = Rdm()
    everything = all_codes(space)
    chosen = random.Random(0).sample(everything, options.sample)

    score_all(supernet, chosen[:5], scorer, evidence)  # warm
    bound, peak = (
        peak_bytes(supernet, [space.largest], scorer, evidence),
        peak_bytes(supernet, chosen, scorer, evidence),
    )
    layer_count, began = LayerCount(), time.perf_counter()
    shared = dict(zip(everything, score_all(supernet, everything, scorer, evidence, layer_count), strict=True))
    shared_each = (time.perf_counter() - began) / len(everything)

    began = time.perf_counter()
    alone = [score_all(supernet, [architecture], scorer, evidence)[0] for architecture in chosen]
    alone_each = (time.perf_counter() - began) / len(chosen)
    worst = max(abs(a.value - shared[architecture].value) for a, architecture in zip(alone, chosen, strict=True))

    began = time.perf_counter()
    for architecture in chosen[: max(1, options.sample // 3)]:
        run = synthetic(max(256, options.images), options.side)
        score_naively(supernet, architecture, scorer, run, evidence_of(run, teacher, options.images))
    naive_each = (time.perf_counter() - began) / max(1, options.sample // 3)

    distinct = sum(1 for _ in space.all())
    print(
        f"{len(everything):,} codes of {distinct:,} networks, "
        f"{options.images} images of {options.side}x{options.side}: {layer_count}"
    )
    print(f"largest difference between shared and one by one: {worst:.1e}")
    print(f"activations alive at once: {peak:,} bytes; one path of the largest network: {bound:,} bytes")
    print(f"{'way':<12}{'ms a candidate':>16}{'candidates a minute':>22}{'times shared':>14}")
    for name, each in (("shared", shared_each), ("one by one", alone_each), ("naive", naive_each)):
        print(f"{name:<12}{1e3 * each:>16.2f}{60 / each:>22,.0f}{each / shared_each:>14.1f}")


if __name__ == "__main__":
    main()
