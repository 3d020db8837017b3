"""How well a table of layers predicts the latency of whole networks, on each target.

Usage: `python benchmarks/latency.py [TARGET ...] [--space NAME] [--side PIXELS] [--networks 30] [--processor]`, with
targets such as `eager`, `onnxruntime,threads=1`, `compile` or `executorch`; without any, `eager` and `onnxruntime`. Per
target it prints Kendall's and Spearman's correlation and the median relative error of networks that took no part in the
fit, and beside it the spread of repeated measurements of the same network: half of the difference between the largest
and the least of three, relative to their median. Networks are measured in turn, three times over. Run it on an idle
machine; on one that is not, `--processor` measures the time in which a processor works for this process, which with one
thread is an idle machine's wall time but for caches and memory that others use.
"""

import argparse
import dataclasses
import os
import statistics
import time

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from kdnas.costs.latency import LatencyTable
from kdnas.costs.target import Target
from kdnas.randomness import python_rng
from kdnas.tables import load_space

_ROUNDS = 3


def draws(space, count, purpose):
    """Distinct networks whose sizes spread from the smallest to the largest: options around a random level."""
    rng, networks = python_rng(0, purpose), {}
    while len(networks) < count:
        level = rng.random()

        def pick(choice, level=level):
            place = round(level * (len(choice.options) - 1) + rng.uniform(-1, 1))
            return choice.options[max(0, min(len(choice.options) - 1, place))]

        architecture = space.decide(pick)
        networks.setdefault(architecture, space.blueprint(architecture))
    return list(networks.values())


def check(space, target, count, repeats):
    """Measure one target, and return a line on it."""
    began = time.perf_counter()
    table = LatencyTable(torch.device("cpu"), target=target, repeats=repeats)
    fitted = [space.blueprint(a) for a in (space.smallest, space.largest)] + draws(space, 8, "fit")
    table.calibrate(fitted)
    unseen = [b for b in draws(space, count + 10, "unseen") if b not in fitted][:count]
    predicted = np.array([table.seconds(blueprint) for blueprint in unseen])
    timers = [table.timer(blueprint) for blueprint in unseen]
    measured = np.array([[timer() for timer in timers] for _ in range(_ROUNDS)])
    middle = np.median(measured, 0)
    errors = np.abs(predicted / middle - 1)
    spread = (measured.max(0) - measured.min(0)) / 2 / middle
    errors_text = " | ".join(f"{100 * e:.1f} %" for e in (statistics.median(errors), errors.max(), np.median(spread)))
    return (
        f"| {target} | {table.threads} | {len(unseen)} | {1e3 * middle.min():.2f} to {1e3 * middle.max():.2f} | "
        f"{spearmanr(predicted, middle).statistic:.3f} | {kendalltau(predicted, middle).statistic:.3f} | "
        f"{errors_text} | "
        f"{len(table.layers)} | {time.perf_counter() - began:.0f} s |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", default=["eager", "onnxruntime"], help="such as onnxruntime,threads=1")
    parser.add_argument("--space", default="digits", help="a name from `kdnas list spaces` (default: %(default)s)")
    parser.add_argument("--side", type=int, default=32, help="height and width of the images (default: %(default)s)")
    parser.add_argument("--networks", type=int, default=30, help="unseen networks (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="calls per measurement (default: %(default)s)")
    parser.add_argument("--processor", action="store_true", help="measure the processor's time instead of wall time")
    options = parser.parse_args()
    if options.processor:
        time.perf_counter = time.process_time
    space = dataclasses.replace(load_space(options.space), resolutions=(options.side,))
    clock = "processor's time" if options.processor else "wall time"
    print(
        f"{space.name}, images of {options.side} pixels, threads of PyTorch: {torch.get_num_threads()}, {clock}, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    print("| target | threads | networks | ms | Spearman | Kendall | median error | largest | spread | layers | time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for text in options.targets:
        print(check(space, Target.parse(text), options.networks, options.repeats), flush=True)


if __name__ == "__main__":
    main()
