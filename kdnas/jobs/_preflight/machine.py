"""The installation and the machine: versions that fit, extras, threads, device, and the run folder."""

import importlib.metadata as metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from kdnas.data.feeding import cores
from kdnas.jobs._preflight.cost import existing
from kdnas.jobs._preflight.findings import Finding, faults, notes
from kdnas.network import default_device
from kdnas.runs.folder import MANIFEST
from kdnas.runs.lock import Busy, hold

_CHECKED = ("kdnas", "torchvision")  # torchvision is built for one version of torch
_GROUPS = ("dev", "real")


def device_finding() -> Finding:
    """Where is computed."""
    device = default_device()
    if device.type == "cuda":
        return Finding("device", f"{device} ({torch.cuda.get_device_name(device)})")
    return Finding("device", f"{device} ({torch.get_num_threads()} threads of {os.cpu_count()} cores)")


def installation() -> list[Finding]:
    """Versions, pairs that do not fit, extras, and threads."""
    versions = ", ".join(f"{name} {_version(name) or 'missing'}" for name in ("kdnas", "torch", "torchvision"))
    misfits = [sentence for name in _CHECKED for sentence in _misfits(name)]
    extras = {name: _lacks("kdnas", name) for name in _extras() if name not in _GROUPS}
    ready = ", ".join(name for name, lacking in extras.items() if not lacking) or "none"
    absent = ", ".join(name for name, lacking in extras.items() if lacking)
    threads, most = torch.get_num_threads(), cores()
    return [
        Finding("installation", f"Python {platform.python_version()}, {versions}"),
        Finding("extras", ready + (f"; not installed: {absent} (pip install 'kdnas[NAME]')" if absent else "")),
        device_finding(),
        *faults("installation", misfits),
        *notes(
            "device",
            f"{threads} threads compute on {most} cores, which is slower than {most}. Set OMP_NUM_THREADS={most}"
            if threads > most
            else "",
        ),
    ]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _extras() -> list[str]:
    return metadata.metadata("kdnas").get_all("Provides-Extra") or []


def _requirements(name: str, extra: str = "") -> Iterator[Requirement]:
    """What a package needs here, of one extra, or without any."""
    for requirement in map(Requirement, metadata.requires(name) or ()):
        marker = requirement.marker
        of_extra = marker is not None and "extra" in str(marker)
        if of_extra == bool(extra) and (marker is None or marker.evaluate({"extra": extra})):
            yield requirement


def _lacks(name: str, extra: str) -> list[str]:
    return [requirement.name for requirement in _requirements(name, extra) if not _version(requirement.name)]


def _misfits(name: str) -> Iterator[str]:
    """A sentence for each requirement of a package that is missing or of another version."""
    if not _version(name):
        yield f"{name} is not installed. Install it: pip install {name}"
        return
    for requirement in _requirements(name):
        version = _version(requirement.name)
        if not version or not requirement.specifier.contains(version, prereleases=True):
            what = f"{version} is installed" if version else "it is not installed"
            yield (
                f"{name} {_version(name)} needs {requirement.name}{requirement.specifier}, but {what}. Install both "
                f"together: pip install --upgrade {name} {requirement.name}"
            )


def folder_findings(folder: Path) -> list[Finding]:
    """What speaks against writing a run there."""
    place = existing(folder)
    if folder.is_file():
        return faults("folder", [f"{folder} is a file. Give --out a folder."])
    if not os.access(place, os.W_OK | os.X_OK):
        return faults("folder", [f"{place} cannot be written to. Change its permissions, or use another --out."])
    if not (folder / MANIFEST).exists():
        return [Finding("folder", f"{folder} can be written")]
    try:
        hold(folder)
    except Busy as error:
        return faults("folder", [str(error)])
    return [Finding("folder", f"{folder} holds a run; the command that began it resumes it")]
