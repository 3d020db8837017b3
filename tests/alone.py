"""Python programs in an environment that has one distribution and what that requires, and nothing else."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

_BLOCKER = """
import sys

class Blocker:
    admitted = set({admitted!r}) | sys.stdlib_module_names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.admitted:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def closure(distribution):
    """The distribution and all that it requires, extras apart, as far as they are installed; normalised names."""
    names, left = set(), [distribution]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in names:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        names.add(name)
        left += [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
    return names


def run_alone(distribution, code, *arguments, folder):
    """What a program prints that can import the standard library and one distribution with its requirements alone."""
    known = closure(distribution)
    tops = importlib.metadata.packages_distributions().items()
    admitted = sorted(top for top, owners in tops if {re.sub(r"[-_.]+", "-", o).lower() for o in owners} & known)
    program = _BLOCKER.format(admitted=admitted) + code
    command = [sys.executable, "-I", "-B", "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
