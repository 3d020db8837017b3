"""What `kdnas plan` predicts of a run, beside what the run then takes: seconds of each phase, memory and disk.

    python benchmarks/plan.py                       # the demo's experiment, some three minutes on two idle cores
    python benchmarks/plan.py --experiment FILE     # another one, as `kdnas run --experiment` takes it
    python benchmarks/plan.py --deploy              # with every form of the student

The machine must be idle: both the steps that are timed and the run are wall time.
"""

import argparse
import tempfile
from pathlib import Path

import kdnas
from kdnas.jobs._arguments import as_experiment
from kdnas.jobs._rehearsal import phases
from kdnas.jobs.plan import Meter


def measured(name: str, folder: Path, *, deploy: bool) -> dict[str, tuple[float, int, int]]:
    """Seconds, bytes of memory and bytes on disk of each phase of the run, by the phases' names in a plan."""
    meter, walls, names = Meter(folder), {}, []
    for phase, spent in phases(as_experiment(name), folder, deploy=deploy):
        if names:
            walls[names[-1]] = meter.phase(names[-1], spent)
        names.append(phase)
    records = kdnas.Run(folder).storage.manifest["phases"]
    training = walls["training"]
    seconds = {"teacher": records.get("teacher", {}).get("seconds", 0.0), "supernet": records["train"]["seconds"]}
    other = training.seconds - sum(seconds.values()) + walls["export"].seconds
    taken = {name: (spent, training.memory, training.disk) for name, spent in seconds.items()}
    taken |= {name: (walls[name].seconds, walls[name].memory, walls[name].disk) for name in ("search", "finals")}
    return taken | {"other": (other, training.memory, walls["export"].disk)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="demo", help="a file or a name (default: %(default)s)")
    parser.add_argument("--deploy", action="store_true", help="write every form of the student too")
    options = parser.parse_args()
    planned = kdnas.plan(options.experiment, deploy=options.deploy)
    with tempfile.TemporaryDirectory() as folder:
        taken = measured(options.experiment, Path(folder) / "run", deploy=options.deploy)
    rows = [(phase.name, phase.seconds, *taken[phase.name], phase.memory, phase.disk) for phase in planned.phases]
    print(f"{'phase':<10}{'predicted':>11}{'measured':>10}{'off':>7}{'MB predicted':>14}{'measured':>10}")
    for name, predicted, seconds, memory, _, expected, _ in rows:
        off = f"{predicted / seconds - 1:+.0%}" if seconds else "-"
        print(f"{name:<10}{predicted:>9.1f} s{seconds:>8.1f} s{off:>7}{expected / 1e6:>14.0f}{memory / 1e6:>10.0f}")
    predicted, seconds = planned.seconds, sum(row[2] for row in rows)
    print(f"{'whole run':<10}{predicted:>9.1f} s{seconds:>8.1f} s{predicted / seconds - 1:>+7.0%}")
    disk = [sum(row[i] for row in rows) / 1e6 for i in (6, 4)]
    print(f"on disk: {disk[0]:.1f} MB predicted, {disk[1]:.1f} MB measured")


if __name__ == "__main__":
    main()
