"""Measures layers and networks on this device, and writes a table that `kdnas run --latency-table FILE` takes.

Usage: python THIS_FILE [table.json]. Needed is the runtime that is measured, torch or onnxruntime, and nothing else.
"""

import base64
import hashlib
import json
import platform
import sys
import time
import zlib
from pathlib import Path

ROUNDS = 3
LEAST_CALLS = 10
SECONDS = 0.2


def least_seconds(call):
    """The least time of some calls: at least ten, and a fifth of a second, after two that are not timed."""
    call()
    call()
    best, calls, began = float("inf"), 0, time.perf_counter()
    while calls < LEAST_CALLS or time.perf_counter() - began < SECONDS:
        before = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - before)
        calls += 1
    return best


def signed(row):
    """A row, or the whole table, with the checksum of its values."""
    return {**row, "checksum": hashlib.blake2b(json.dumps(row).encode(), digest_size=8).hexdigest()}


def call_of_graph(entry, threads):
    """A function that runs an ONNX graph on inputs of zeros."""
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    content = zlib.decompress(base64.b64decode(entry["graph"]))
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = (node.name for node in session.get_inputs())
    inputs = {next(names): numpy.zeros(shape, numpy.float32) for shape in entry["shapes"]}
    return lambda: session.run(None, inputs)


def call_of_module(entry, modules, compiles):
    """A function that runs a PyTorch module on inputs of zeros."""
    import torch

    inputs = [torch.zeros(shape) for shape in entry["shapes"]]
    module = modules[entry["module"]]().eval()
    if compiles:
        torch._dynamo.reset()  # else PyTorch leaves what is beyond the eighth module of the same code uncompiled
        module = torch.compile(module, dynamic=False)

    def call():
        with torch.no_grad():
            return module(*inputs)

    return call


def measure(payload, modules=()):
    """The table of a payload: the least time of a call that does nothing, of each layer, and of whole networks."""
    threads, runtime = payload["threads"], payload["runtime"]
    if runtime != "onnxruntime":
        import torch

        torch.set_num_threads(threads)
    best = {}
    entries = [("call", payload["call"]), *(("layer", e) for e in payload["layers"])]
    entries += [("network", e) for e in payload["networks"]]
    for round_ in range(ROUNDS):  # in turn, as other load comes and goes
        for place, (_, entry) in enumerate(entries):
            if runtime == "onnxruntime":
                call = call_of_graph(entry, threads)
            else:
                call = call_of_module(entry, modules, runtime == "compile")
            best[place] = min(best.get(place, float("inf")), least_seconds(call))
            print(f"\rround {round_ + 1} of {ROUNDS}: {place + 1} of {len(entries)}", end="", file=sys.stderr)
    print(file=sys.stderr)
    times = [(kind, entry, best[place]) for place, (kind, entry) in enumerate(entries)]
    table = {
        "format": 1,
        "target": payload["target"],
        "device": f"{platform.machine()} {platform.system()}",
        "threads": threads,
        "call": signed({"call": times[0][2] if runtime != "eager" else 0.0}),
        "layers": [signed({"layer": e["key"], "seconds": s}) for kind, e, s in times if kind == "layer"],
        "networks": [signed({"layers": e["keys"], "seconds": s}) for kind, e, s in times if kind == "network"],
    }
    return signed(table)


def main(payload, arguments, modules=()):
    """Measure, and write the file that the arguments name."""
    out = Path(arguments[0] if arguments else "latency.json")
    draft = out.with_name(out.name + ".draft")
    draft.write_text(json.dumps(measure(payload, modules)) + "\n", encoding="utf-8")
    draft.replace(out)
    print(f"wrote {out}: kdnas run --space SPACE --budget latency=5ms --latency-table {out}")
