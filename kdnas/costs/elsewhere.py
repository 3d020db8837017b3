"""A table of layers that was measured on another device, by a script that needs no kdnas."""

import hashlib
import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from kdnas.costs.latency import adopt_rows, linear_fit, verified
from kdnas.costs.target import Target
from kdnas.runs.files import Damaged, read_json

_AGAIN = "Measure it again with the script of `kdnas latency`."
_MOST_ROWS = 20_000
_MOST_SECONDS = 1e4


class _Layer(TypedDict):
    layer: str
    seconds: float
    checksum: str


class _Network(TypedDict):
    layers: list[str]
    seconds: float
    checksum: str


class _Call(TypedDict):
    call: float
    checksum: str


class _File(TypedDict):
    format: int
    target: str
    device: str
    threads: int
    call: _Call
    layers: list[_Layer]
    networks: list[_Network]
    checksum: NotRequired[str]


def adopt(path: Path) -> Target:
    """Read a table, so that this process can search with it, and return its target.

    Raises:
        ValueError: there is no such file, it is damaged, too large, or its values are out of range.
    """
    if not path.is_file():
        raise ValueError(f"there is no latency table {path}. {_AGAIN}")
    content: dict[str, Any] = read_json(path, _File, _AGAIN)
    layers, networks = content["layers"], content["networks"]
    if not layers or not networks or len(layers) + len(networks) > _MOST_ROWS:
        count = f"{len(layers)} layers and {len(networks)} networks"
        raise Damaged(path, f"must have layers and networks, at most {_MOST_ROWS:,}, it has {count}", _AGAIN)
    try:
        target = Target.parse(content["target"])
        rows = [verified(row) for row in (content["call"], *layers, *networks)]
    except (TypeError, ValueError) as error:
        raise Damaged(path, f"holds a wrong value: {error}", _AGAIN) from error
    for row in rows:
        seconds = row.get("seconds", row.get("call"))
        if not 0 <= seconds < _MOST_SECONDS or ("call" not in row and seconds == 0):
            raise Damaged(path, f"has {seconds!r} seconds for {str(row)[:60]}", _AGAIN)
    call = content["call"]["call"]
    alone = {row["layer"]: max(0.0, row["seconds"] - call) for row in layers}
    for row in networks:
        if absent := [key for key in row["layers"] if key not in alone]:
            raise Damaged(path, f"has a network of a layer that it lacks, {absent[0][:60]}", _AGAIN)
    sums, wholes = [sum(alone[key] for key in n["layers"]) for n in networks], [n["seconds"] for n in networks]
    if min(sums) <= 0:
        raise Damaged(path, "has a network whose layers take no time", _AGAIN)
    offset, scale = linear_fit(sums, wholes)
    table = [
        {"reference": 1.0, "device": content["device"], "threads": content["threads"]},
        {"scale": scale, "offset": offset, "sums": sums, "wholes": wholes},
        *({"layer": key, "seconds": seconds} for key, seconds in alone.items()),
    ]
    try:
        verified(content)
    except TypeError as error:
        raise Damaged(path, str(error), _AGAIN) from error
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
    adopt_rows(digest, table)
    return Target(target.runtime, content["threads"], target.batch, digest)
