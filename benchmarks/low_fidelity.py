"""Does a short training under the teacher rank networks better than an equally short one on labels alone?

    python benchmarks/low_fidelity.py --out runs/low_fidelity   # about 45 minutes of one CPU thread; goes on if stopped

The claim behind multi-fidelity search (Trofimov et al., Multi-fidelity Neural Architecture Search with Knowledge
Distillation, 2020), on scikit-learn's digits and networks drawn from the space `digits` as a random search draws them.

Truth: the mean accuracy, over seeds, on the 697 test images after a long training under the teacher, as
`experiments/multi_fidelity.py` retrains. Low fidelity: the scorer `short_training` of some number of steps on the 220
search images, under the teacher (KD) and on labels alone (CE). With a seed, the two share fresh weights and batches; no
long training has a short one's seed. Two scores of each: accuracy, and cross-entropy with the labels, negative.

Printed: Kendall's tau with the truth (a mean over seeds) and the paired difference, with 95 % bootstrap intervals over
networks, the trainings held fixed. Controls: parameters, MACs and depth; one long training against the mean of the
others, which says how much of the truth is noise; and two seeds of one score beside KD against CE: where these agree no
less than those, the two orders do not differ by more than noise. OUT/networks holds a JSON file for every network.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import agree
from numpy.typing import NDArray

from kdnas import Recipe, load_space, spec
from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.data import Data, digits
from kdnas.distillers import Distiller, FromLabels, FromTeacher
from kdnas.evaluation import accuracy
from kdnas.network import Network
from kdnas.randomness import initialised, python_rng
from kdnas.runs.checkpoint import load_state, save_state
from kdnas.runs.files import write_json
from kdnas.scorers import Depth, Evidence, ShortTraining
from kdnas.space import SearchSpace
from kdnas.statistics import interval, kendall
from kdnas.teachers import Frozen
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.loop import Training

TEACHER_RECIPE = Recipe(steps=200, learning_rate=0.1)
DISTILLERS = {"kd": spec(FromTeacher), "ce": spec(FromLabels)}
SCORES = {"accuracy": 1.0, "cross_entropy": -1.0}  # with the sign that makes higher better
Columns = NDArray[np.float64]
"""One row per network, one column per seed."""


def trained(network: Network, distiller: Distiller, data: Data, teacher: Frozen | None, recipe: Recipe) -> Network:
    """The network after the recipe's last step."""
    training = Training(network, distiller, data, teacher, recipe)
    while not training.done:
        training.step()
    return network


def teacher_of(data: Data, place: Path) -> Frozen:
    """The network that a run without a given teacher trains; kept in a file."""
    side = data.preprocessing.height
    blueprint = fitted_teacher((data.channels, side, side), data.classes)
    network = initialised(lambda: Network(blueprint), TEACHER_RECIPE.seed)
    if place.exists():
        network.load_state_dict(load_state(place))
    else:
        trained(network, FromLabels(label_smoothing=0.1), data, None, TEACHER_RECIPE)
        save_state(place, dict(network.state_dict()))
    print(f"teacher: {accuracy(network, data.test, data):.2%} of the test images", flush=True)
    return Frozen(network, preprocessing=data.preprocessing)


def measured(
    space: SearchSpace,
    architecture: Architecture,
    data: Data,
    teacher: Frozen,
    recipe: Recipe,
    steps: list[int],
    seeds: int,
) -> dict[str, Any]:
    """Every training of one network: seeds 0 on are the long ones', those after them the short ones'."""
    blueprint = space.blueprint(architecture)
    pixels = data.search.take(torch.arange(len(data.search)))
    evidence = Evidence(pixels, data.normalise(pixels), data.search.labels, teacher(pixels), teacher, data)
    student, size = Network(blueprint), cost(blueprint)
    depth = Depth().score(student, evidence).value
    record: dict[str, Any] = {
        "code": space.code(architecture),
        "params": size.params,
        "macs": size.macs,
        "depth": depth,
    }
    began, long = time.process_time(), []
    for seed in range(seeds):
        network = initialised(lambda: Network(blueprint), seed)
        trained(network, FromTeacher(), data, teacher, dataclasses.replace(recipe, seed=seed))
        long.append(accuracy(network, data.test, data))
    record |= {"long": long, "long_seconds": (time.process_time() - began) / seeds, "short": {}}
    for count, (name, distiller) in itertools.product(steps, DISTILLERS.items()):
        scorer = ShortTraining(steps=count, batch_size=64, distiller=distiller)
        began = time.process_time()
        parts_per_seed = [
            scorer.score(student, dataclasses.replace(evidence, seed=seeds + k)).parts for k in range(seeds)
        ]
        scores: dict[str, Any] = {score: [parts[score] for parts in parts_per_seed] for score in SCORES}
        scores["seconds"] = (time.process_time() - began) / seeds
        record["short"].setdefault(str(count), {})[name] = scores
    return record


def mean_tau(scores: Columns, truth: Columns) -> float:
    """Kendall's tau of each seed's scores with the truth, a mean over the seeds."""
    return statistics.fmean(kendall(column, truth) for column in scores.T)


def agreement(first: Columns, second: Columns, *, same: bool) -> float:
    """Kendall's tau between one column of each, a mean over the pairs of equal seeds, or over those of different."""
    pairs = itertools.product(range(first.shape[1]), range(second.shape[1]))
    return statistics.fmean(kendall(first[:, i], second[:, j]) for i, j in pairs if (i == j) == same)


def ceiling(long: Columns, _: Columns | None = None) -> float:
    """Kendall's tau between one long training and the mean of the others, a mean over which one."""
    return statistics.fmean(kendall(long[:, k], np.delete(long, k, 1).mean(1)) for k in range(long.shape[1]))


def steadier(kd: Columns, ce: Columns) -> float:
    """How much more two seeds of KD agree than two of CE."""
    return agreement(kd, kd, same=False) - agreement(ce, ce, same=False)


def apart(kd: Columns, ce: Columns) -> float:
    """How much more two seeds of one score agree than one of each does: 0 where the orders differ by noise alone."""
    own = agreement(kd, kd, same=False) + agreement(ce, ce, same=False)
    return own / 2 - agreement(kd, ce, same=False)


def cell(x: Columns, truth: Columns, statistic: Callable[[Columns, Columns], float]) -> str:
    """A statistic and its interval over networks."""
    low, high = interval(lambda a, b, rows: np.array([statistic(a[r], b[r]) for r in rows]), x, truth)
    return f"{statistic(x, truth):+.2f} [{low:+.2f}, {high:+.2f}]"


def row(*cells: str) -> None:
    """Print a row of a Markdown table."""
    print(f"| {' | '.join(cells)} |")


def report(records: list[dict[str, Any]], steps: list[int], recipe: Recipe) -> None:
    """The tables."""
    long = np.array([r["long"] for r in records])
    truth, seeds = long.mean(1), long.shape[1]
    within = float(np.sqrt(long.var(1, ddof=1).mean()))
    print(
        f"\n{len(records)} networks, {seeds} seeds. Truth: {recipe.steps} steps of {recipe.batch_size} images, "
        f"{truth.min():.2%} to {truth.max():.2%}; standard deviation of the means {truth.std(ddof=1):.2%}, of one "
        f"network's seeds {within:.2%}; {statistics.fmean(r['long_seconds'] for r in records):.1f} s each.\n"
    )

    def scores(count: int, name: str, score: str) -> Columns:
        return SCORES[score] * np.array([r["short"][str(count)][name][score] for r in records])

    def less(first: Columns, second: Columns) -> str:
        """How much closer to the truth the first is than the second, with its interval."""
        width = first.shape[1]
        return cell(
            np.hstack([first, second]), truth, lambda x, y: mean_tau(x[:, :width], y) - mean_tau(x[:, width:], y)
        )

    macs = np.array([[r["macs"]] for r in records], float)
    fidelities = list(itertools.product(steps, SCORES))
    columns = {(c, s): (scores(c, "kd", s), scores(c, "ce", s)) for c, s in fidelities}
    heads = ("KD: tau with the truth", "CE: tau with the truth", "KD less CE", "KD less MACs")
    row("steps", "score", *heads, "accuracy: KD, CE", "seconds: KD, CE")
    row(*["---"] * 8)
    for (count, score), (kd, ce) in columns.items():
        mean = [f"{scores(count, name, 'accuracy').mean():.0%}" for name in DISTILLERS]
        took = [[r["short"][str(count)][name]["seconds"] for r in records] for name in DISTILLERS]
        cells = [cell(kd, truth, mean_tau), cell(ce, truth, mean_tau), less(kd, ce), less(kd, macs)]
        row(str(count), _words(score), *cells, ", ".join(mean), ", ".join(f"{statistics.fmean(t):.1f}" for t in took))
    for score in SCORES:
        kd, ce = (np.hstack([columns[count, score][k] for count in steps]) for k in range(2))
        cells = [cell(kd, truth, mean_tau), cell(ce, truth, mean_tau), less(kd, ce), less(kd, macs)]
        row("mean over steps", _words(score), *cells, "", "")
    print()
    row("control", "tau with the truth")
    row("---", "---")
    for name in ("params", "macs", "depth"):
        row(name, cell(np.array([[r[name]] for r in records], float), truth, mean_tau))
    row("one long training, with the mean of the others", cell(long, truth, ceiling))
    print()
    heads = ("KD, two seeds", "CE, two seeds", "KD with CE, two seeds", "KD with CE, one seed")
    row("steps", "score", *heads, "first less second", "mean of both less third")
    row(*["---"] * 8)
    for (count, score), (kd, ce) in columns.items():
        cells = [agreement(a, b, same=False) for a, b in ((kd, kd), (ce, ce), (kd, ce))]
        cells.append(agreement(kd, ce, same=True))
        spread = [cell(kd, ce, steadier), cell(kd, ce, apart)]
        row(str(count), _words(score), *(f"{value:+.2f}" for value in cells), *spread)


def _words(score: str) -> str:
    return score.replace("_", "-")


def main() -> None:
    """Measure what is not measured yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=40)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50, 100], help="of the short trainings")
    parser.add_argument("--long", type=int, default=250, help="steps of the long training")
    parser.add_argument("--seeds", type=int, default=3, help="of each training; at least 2")
    parser.add_argument("--out", type=Path, required=True, help="a folder to write to and to go on from")
    options = parser.parse_args()
    if options.networks < 2 or options.seeds < 2:
        raise SystemExit("a rank correlation wants two networks, and its noise two seeds: give at least 2 of each")
    torch.set_num_threads(1)
    recipe = Recipe(steps=options.long, learning_rate=0.1)
    settings = {"steps": options.steps, "long": options.long, "seeds": options.seeds}
    folder, settings_file = options.out / "networks", options.out / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    agree(settings, settings_file)
    data = digits()
    space = load_space("digits").fitted(classes=data.classes, image_channels=data.channels)
    teacher = teacher_of(data, options.out / "teacher.safetensors")
    rng, chosen = python_rng("low fidelity", 0), dict[Architecture, None]()
    while len(chosen) < options.networks:
        chosen[space.sample(rng)] = None
    records = []
    for number, architecture in enumerate(chosen, 1):
        place = folder / f"{space.code(architecture)}.json"
        if not place.exists():
            began = time.perf_counter()
            write_json(place, measured(space, architecture, data, teacher, recipe, options.steps, options.seeds))
            print(f"{number} of {options.networks}: {time.perf_counter() - began:.0f} s", flush=True)
        records.append(json.loads(place.read_text()))
    report(records, options.steps, recipe)


if __name__ == "__main__":
    main()
