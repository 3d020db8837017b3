"""Whether channels-last pays: a supernet's training step and its scoring, in both memory formats.

    python benchmarks/channels_last.py

Only the images' format differs: layers hand it on. One process, one thread on a CPU; the two formats in turn, so that
both meet the same load; medians of the rounds. Training is forward and backward of the largest and of two random
subnets, scoring their forward with batch statistics and without a graph. A ratio above 1 says that channels-last is
faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kdnas import Supernet, load_space
from kdnas.randomness import python_rng
from kdnas.space import SearchSpace
from kdnas.tables import space_from_table, table_of

CASES: dict[str, dict[str, Any]] = {
    "ofa_mbv3": {"resolutions": [64]},
    "nas_bench_macro": {"resolutions": [32]},
    "nas_bench_macro at half width": {"resolutions": [16], "width_multiplier": 0.5},
    "digits": {},
}
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
Call = Callable[[], torch.Tensor]


def runs_of(space: SearchSpace, images: torch.Tensor, memory: torch.memory_format) -> dict[str, Call]:
    """A training step and a scoring of three subnets, on images in one memory format; weights stay as they are."""
    rng = python_rng(0, "architectures")
    chosen = [space.largest, space.sample(rng), space.sample(rng)]
    torch.manual_seed(0)
    supernet = Supernet(space).to(images.device)
    inputs, labels = images.clone(memory_format=memory), torch.arange(len(images), device=images.device) % 10

    def train() -> torch.Tensor:
        supernet.train().zero_grad()
        losses = []
        for architecture in chosen:
            loss = F.cross_entropy(supernet(inputs, architecture).logits, labels)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def score() -> torch.Tensor:
        supernet.eval()
        with torch.no_grad():
            return torch.stack(
                [supernet(inputs, architecture, batch_statistics=True).logits for architecture in chosen]
            )

    return {"training": train, "scoring": score}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    for case, changes in CASES.items():
        table = table_of(load_space(case.partition(" ")[0]))
        space = space_from_table({**table, "classes": 10, **changes})
        channels, height, width = space.blueprint(space.largest).image
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(options.batch, channels, height, width, generator=generator).to(device)
        runs = {kind: runs_of(space, images, memory) for kind, memory in FORMATS.items()}
        error = (runs["contiguous"]["scoring"]() - runs["channels-last"]["scoring"]()).abs().max().item()
        print(f"{case}, {height}x{width}, batch {options.batch}, {device}; largest difference of logits {error:.1e}")
        for what in ("training", "scoring"):
            seconds: dict[str, list[float]] = {kind: [] for kind in FORMATS}
            for _ in range(options.rounds + 1):
                for kind, calls in runs.items():
                    began = time.perf_counter()
                    calls[what]()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds[kind].append(time.perf_counter() - began)
            a, b = (statistics.median(seconds[kind][1:]) for kind in FORMATS)
            print(f"  {what:<10} contiguous {a:.3f} s, channels-last {b:.3f} s: {a / b:.2f} times", flush=True)


if __name__ == "__main__":
    main()
