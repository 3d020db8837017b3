"""What `kdnas plan` predicts of a run, beside what the run then takes: seconds of each phase, memory and disk.

    python benchmarks/plan.py                      # the demo's experiment, some three minutes on two idle cores
    python benchmarks/plan.py -- ARGUMENTS         # another run, as `kdnas run` takes it
    python benchmarks/plan.py --processor ...      # on a machine that is not idle

Both the steps that are timed and the run are wall time, so that the machine must be idle. With `--processor` all times
are those in which a processor works for this process: with one thread (OMP_NUM_THREADS=1) that is an idle machine's
wall time but for the waiting for disks.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import kdnas
from kdnas.cli.commands import parser
from kdnas.jobs import plan
from kdnas.jobs._plan_pruning import pruning_phases
from kdnas.settings import Experiment

_plan = plan.plan


def done(action, arguments, processor):
    """What an action returns of the settings that the arguments ask for, with a folder for the run; in a new process.

    Whatever is imported or made ready at its first use takes its time in both.
    """
    if processor:
        time.perf_counter = time.process_time
    with tempfile.TemporaryDirectory() as folder:
        values = vars(parser().parse_args(["plan", *arguments, "--out", str(Path(folder) / "run")]))
        plan.plan = action  # what `kdnas.plan` calls with the settings
        return kdnas.plan(**{k: v for k, v in values.items() if k not in ("command", "version", "function", "json")})


def predicted(settings, folder, *, deploy, seconds):
    """The plan of a run."""
    return _plan(settings, folder, deploy=deploy, seconds=seconds)


def taken(settings, folder, *, deploy, seconds):
    """The phases of a run that is done."""
    del seconds
    run = plan.run_phases if isinstance(settings, Experiment) else pruning_phases
    result = run(settings, folder, deploy=deploy)
    return result if isinstance(result, dict) else result[0]


def main():
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--processor", action="store_true", help="measure the processor's time instead of wall time")
    own.add_argument("arguments", nargs="*", default=["demo"], help="of `kdnas run` (default: demo)")
    options = own.parse_args()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        plans, phases = pool.map(done, (predicted, taken), [options.arguments] * 2, [options.processor] * 2)
    pairs = [(phase, phases[phase.name]) for phase in plans.phases]
    print("| phase | predicted | measured | off | MB predicted | MB measured |")
    print("| --- | --- | --- | --- | --- | --- |")
    for own, true in pairs:
        off = f"{own.seconds / true.seconds - 1:+.0%}" if true.seconds else "-"
        print(
            f"| {own.name} | {own.seconds:.1f} s | {true.seconds:.1f} s | {off} | {own.memory / 1e6:.0f} | "
            f"{true.memory / 1e6:.0f} |"
        )
    whole = sum(true.seconds for _, true in pairs)
    print(f"| whole run | {plans.seconds:.1f} s | {whole:.1f} s | {plans.seconds / whole - 1:+.0%} | | |")
    disk = [sum(pair[i].disk for pair in pairs) / 1e6 for i in (0, 1)]
    print(f"\non disk: {disk[0]:.1f} MB predicted, {disk[1]:.1f} MB measured")


if __name__ == "__main__":
    main()
