"""How much faster finals, trainings and a search are with two workers than in one process with two threads.

    python benchmarks/workers.py                       # some 25 minutes on two idle cores
    python benchmarks/workers.py --only search --repeats 1
    python benchmarks/workers.py --storage             # workers that find each other by a database

Wall time of whole commands, so that starting Python, reading the run and starting the workers are included; the
machine must be idle. One process trains with one thread, so that its numbers do not depend on threads; for this
comparison it is given two. Each command works on its own copy of one prepared run, in turn with its counterpart.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AIMS = {"finals": 1.5, "trainings": 1.5, "search": 1.4}
THREADS = """
import contextlib, sys
from kdnas.jobs import _trainings
_trainings.one_thread = contextlib.nullcontext
from kdnas.cli.commands import main
main(sys.argv[1:])
"""
"""The command line, whose trainings have all threads."""


def prepared(folder, options):
    """A run with a trained supernet and a finished search."""
    words = ["run", "--data", options.data, "--space", options.space, "--finalists", "1"]
    words += ["--steps", str(options.steps), "--num-evaluations", "50", "--no-deploy", "--insist", "--out", str(folder)]
    finished([sys.executable, "-m", "kdnas", *words], 2)


def commands(options, folder):
    """The arguments of each command."""
    steps = ["--steps", str(options.steps)]
    return {
        "finals": ["finals", str(folder), "--finalists", "4", *steps, "--no-deploy"],
        "trainings": ["search", str(folder), "--trainings", "8", "--no-quality"],
        "search": ["search", str(folder), "--num-evaluations", str(options.evaluations)],
    }


def finished(*commands_and_threads):
    """Run commands side by side, each with so many threads; a failed one ends all."""
    *listed, threads = commands_and_threads
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    processes = [
        subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for words in listed
    ]
    for process in processes:
        _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"{process.args[-1]} ended with {process.returncode}: {said[-2000:]}")


def seconds(name, run, options, *, workers):
    """The wall time of a command on a copy of a run."""
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(run, Path(place) / "run")
        words = commands(options, folder)[name]
        own = [sys.executable, "-m", "kdnas", *words]
        began = time.perf_counter()
        if not workers:
            finished([sys.executable, "-c", THREADS, *words, *([] if name == "search" else ["--workers", "1"])], 2)
        elif options.storage:
            finished(*[[*own, "--storage", f"sqlite:///{place}/shared.db"]] * 2, 1)
        else:
            finished([*own, "--workers", "2"], 2)
        return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--space", default="digits")
    parser.add_argument("--steps", type=int, default=600, help="of each of the finals' trainings (default: 600)")
    parser.add_argument("--evaluations", type=int, default=2000, help="of the search (default: 2000)")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement; medians are printed (default: 3)")
    parser.add_argument("--run", type=Path, help="the prepared run, kept for the next call; made where there is none")
    parser.add_argument("--only", choices=AIMS, help="one command")
    parser.add_argument("--storage", action="store_true", help="two processes that share a database of SQLite")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = options.run or Path(place) / "run"
        if not run.exists():
            prepared(run, options)
        print(f"{'command':<12}{'one, 2 threads':>16}{'two workers':>14}{'times as fast':>15}{'aim':>6}", flush=True)
        for name in [options.only] if options.only else AIMS:
            one, two = [], []
            for _ in range(options.repeats):
                one.append(seconds(name, run, options, workers=False))
                two.append(seconds(name, run, options, workers=True))
            alone, side = statistics.median(one), statistics.median(two)
            print(f"{name:<12}{alone:>14.1f} s{side:>12.1f} s{alone / side:>15.2f}{AIMS[name]:>6}", flush=True)


if __name__ == "__main__":
    main()
