"""How fast a device computes a sandwich step and a ranking: beside other code, by precision, with repeatable sums.

    python benchmarks/device_speed.py                       # every section, on the GPU where there is one
    python benchmarks/device_speed.py step --ofa CHECKOUT   # beside the code of mit-han-lab/once-for-all
    python benchmarks/device_speed.py step --alphanet CHECKOUT   # AttentiveNAS with AlphaNet over it; pyyaml

`step`: forward and backward of the largest, the smallest and two random subnets of OFA-MobileNetV3, at one size, in
the product's supernet, as four ordinary networks, and by OFA's own code on the very same subnets; with a checkout of
AlphaNet the same for its space. Other code is timed with its images contiguous, as it is used, and channels-last, as
kdnas trains on a CPU. `precision`: the same step by number format, memory format, whether sums are repeatable
(`kdnas.network.repeatable`) and activations are recomputed (`kdnas.network.recomputing`), with its peak memory on a GPU
and how far its losses are from those of float32. `execution`: the largest and the smallest subnet in a step, and the
smallest by itself, by eager and by compiled layers (`kdnas.compilation.compiling`), and what compiling takes: give it
one core by TORCHINDUCTOR_COMPILE_THREADS=1, and no programs of an earlier run by an empty TORCHINDUCTOR_CACHE_DIR.
`rate`: operations of the step a second beside those of a large matrix product, and what the step's time goes to.
`ranking`: all codes of NAS-Bench-Macro (or `--networks` of them) by RDM, with shared prefixes, one by one, and naively.
`waiting`: how long the GPU has nothing to do in the product's own training loop.
`start`: how long a new process takes to import torch, to import a job, and to print the first preflight line of
`kdnas run`; on an idle machine, at most five rounds.

Ways are timed in turn, in one process, medians of `--rounds` after two that are left out. Ratios are of one run; give
the device's name with them, which the first line prints. On a CPU one thread computes.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from prefix_sharing import all_codes, evidence_of, score_naively, synthetic
from torch import Tensor, nn

from kdnas import Supernet, load_space
from kdnas.architecture import Architecture
from kdnas.compilation import compiling
from kdnas.costs.count import cost
from kdnas.distillers.sandwich import Sandwich
from kdnas.network import Network, recomputing, repeatable
from kdnas.randomness import initialised, python_rng
from kdnas.scorers import Rdm
from kdnas.scorers.base import score_all
from kdnas.settings import Recipe
from kdnas.space import SearchSpace
from kdnas.tables import space_from_table, table_of
from kdnas.teachers import Frozen
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.loop import Training

WARM = 2
Call = Callable[[], list[float]]


def wait_for(device: torch.device) -> None:
    """Until all is computed."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def medians(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, float]:
    """The median seconds of every call, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM + rounds):
        for name, call in calls.items():
            wait_for(device)
            began = time.perf_counter()
            call()
            wait_for(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[WARM:]) for name, each in seconds.items()}


def space_of(side: int, name: str = "ofa_mbv3") -> SearchSpace:
    """OFA-MobileNetV3, or another space, at one size and without dropout."""
    table = table_of(load_space(name)) | {"resolutions": [side]}
    table["stages"] = [stage | {"drop_path": 0.0} for stage in table["stages"]]
    table["head"] = table["head"] | {"dropout": 0.0}
    return space_from_table(table)


def subnets(space: SearchSpace) -> list[Architecture]:
    """The largest, the smallest and two random ones."""
    rng = python_rng(0, "architectures")
    return [space.largest, space.smallest, space.sample(rng), space.sample(rng)]


def step_of(run: Callable[[int], Tensor], labels: Tensor, zero: Callable[..., Any], count: int = 4) -> Call:
    """Forward and backward of so many subnets; returns their losses."""

    def step() -> list[float]:
        zero(set_to_none=True)
        losses = []
        for index in range(count):
            loss = F.cross_entropy(run(index), labels)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).tolist()

    return step


def of_ofa(checkout: Path, chosen: Sequence[Architecture], side: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The supernet of OFA's own code, and its settings of the same subnets."""
    del side  # it takes images of any
    sys.path.insert(0, str(checkout))
    from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3

    supernet = OFAMobileNetV3(n_classes=1000, ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4])
    blocks = list(itertools.product(range(5), range(4)))
    settings = [
        {
            "ks": [a.get(f"stage{i}.block{j}.kernel", 3) for i, j in blocks],
            "e": [a.get(f"stage{i}.block{j}.expansion", 3) for i, j in blocks],
            "d": [a[f"stage{i}.depth"] for i in range(5)],
        }
        for a in map(dict, chosen)
    ]
    return supernet, settings


def of_alphanet(checkout: Path, chosen: Sequence[Architecture], side: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The supernet of AlphaNet's own code by its own configuration, and its settings of the same subnets."""
    import yaml

    sys.path.insert(0, str(checkout))
    from models.model_factory import create_model

    config = yaml.safe_load((checkout / "configs" / "train_alphanet_models.yml").read_text(encoding="utf-8"))
    parts = {
        name: SimpleNamespace(**part) if isinstance(part, dict) else part
        for name, part in config["supernet_config"].items()
    }
    args = SimpleNamespace(supernet_config=SimpleNamespace(**parts), arch="attentive_nas_dynamic_model")
    stages = range(7)
    settings = [
        {
            "resolution": side,
            "width": [a["stem.width"], *(a[f"stage{i}.width"] for i in stages), a["head.width"]],
            "depth": [a[f"stage{i}.depth"] for i in stages],
            "kernel_size": [a[f"stage{i}.kernel"] for i in stages],
            "expand_ratio": [a.get(f"stage{i}.expansion", parts[f"mb{i + 1}"].t[0]) for i in stages],
        }
        for a in map(dict, chosen)
    ]
    return create_model(args), settings


def images_of(space: SearchSpace, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    shape = space.blueprint(space.largest).image
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *shape, generator=generator).to(device), (torch.arange(batch) % 10).to(device)


def as_trained(images: Tensor) -> Tensor:
    """The images in the memory format of the product's training: channels-last on a CPU."""
    return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images


def measure_step(options: argparse.Namespace, device: torch.device) -> None:
    """Beside four networks, and beside other code for the same space."""
    others = {
        "OFA's code": ("ofa_mbv3", of_ofa, options.ofa),
        "AlphaNet's code": ("alphanet", of_alphanet, options.alphanet),
    }
    for title, (name, make, checkout) in others.items():
        if checkout is None and name != "ofa_mbv3":
            continue
        space = space_of(options.side, name)
        chosen, (dense, labels) = subnets(space), images_of(space, options.batch, device)
        last, images = dense.contiguous(memory_format=torch.channels_last), as_trained(dense)
        supernet = initialised(lambda space=space: Supernet(space), 0).to(device).train()
        networks = [supernet.extract(architecture).to(device).train() for architecture in chosen]
        parts = nn.ModuleList(networks)
        calls = {
            "kdnas": step_of(in_format(supernet, chosen, images, torch.float32), labels, supernet.zero_grad),
            "four networks": step_of(lambda i, own=networks, x=images: own[i](x).logits, labels, parts.zero_grad),
        }
        if checkout is not None:
            theirs, settings = make(checkout, chosen, options.side)
            theirs = theirs.to(device).train()
            for form, inputs in {"contiguous": dense, "channels-last": last}.items():

                def run(index: int, own: Any = theirs, active: Any = settings, inputs: Tensor = inputs) -> Tensor:
                    own.set_active_subnet(**active[index])
                    return own(inputs)

                calls[f"{title}, {form}"] = step_of(run, labels, theirs.zero_grad)
        with repeatable(device):
            seconds = medians(calls, options.rounds, device)
        print(f"step of {name}, {options.batch} images of {options.side}x{options.side}:")
        for way, each in seconds.items():
            print(f"  {way:<30}{1000 * each:>9.1f} ms; kdnas takes {seconds['kdnas'] / each:.2f} of it", flush=True)


def in_format(
    supernet: Supernet, chosen: Sequence[Architecture], images: Tensor, dtype: torch.dtype
) -> Callable[[int], Tensor]:
    """The logits of each subnet under autocast."""

    def run(index: int) -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return supernet(images, chosen[index]).logits

    return run


def formats(device: torch.device) -> dict[str, tuple[torch.dtype, torch.memory_format, bool]]:
    """Number format, memory format, and whether sums are repeatable, by name; of "recomputed" activations too."""
    dense, last = torch.contiguous_format, torch.channels_last
    names = {
        "float32, not repeatable": (torch.float32, dense, False),
        "float32": (torch.float32, dense, True),
        "float32, activations recomputed": (torch.float32, dense, True),
        "float32, channels-last": (torch.float32, last, True),
        "bfloat16": (torch.bfloat16, dense, True),
        "bfloat16, channels-last": (torch.bfloat16, last, True),
        "bfloat16, channels-last, not repeatable": (torch.bfloat16, last, False),
    }
    return names if device.type == "cuda" else {n: v for n, v in names.items() if v[2]}


def measure_precision(options: argparse.Namespace, device: torch.device) -> None:
    """By number format and memory format."""
    space = space_of(options.side)
    chosen, (images, labels) = subnets(space), images_of(space, options.batch, device)
    supernet = initialised(lambda: Supernet(space), 0).to(device).train()
    print(f"precision, {options.batch} images of {options.side}x{options.side}:")
    first: list[float] = []
    base = 0.0
    for name, (dtype, memory, repeats) in formats(device).items():
        inputs = images.clone(memory_format=memory)
        call = step_of(in_format(supernet, chosen, inputs, dtype), labels, supernet.zero_grad)
        again = recomputing("recomputed" in name)
        with repeatable(device) if repeats else contextlib.nullcontext(), again:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = medians({name: call}, options.rounds, device)[name]
            losses = call()
        memory_used = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB, " if device.type == "cuda" else ""
        first, base = first or losses, base or seconds
        away = max(abs(a - b) / b for a, b in zip(losses, first, strict=True))
        print(
            f"  {name:<42}{1000 * seconds:>9.1f} ms, {base / seconds:.2f} times as fast, {memory_used}"
            f"losses away by {away:.1e}",
            flush=True,
        )


def measure_execution(options: argparse.Namespace, device: torch.device) -> None:
    """By eager and compiled layers; and the first call of these, which compiles them."""
    from torch._dynamo.utils import counters

    space = space_of(options.side)
    pixels, labels = images_of(space, options.batch, device)
    images = as_trained(pixels)
    supernet = initialised(lambda: Supernet(space), 0).to(device).train()
    student = supernet.extract(space.smallest).to(device).train()
    ends = (space.largest, space.smallest)
    steps = {
        "student": step_of(lambda i: student(images).logits, labels, student.zero_grad, 1),
        "supernet": step_of(in_format(supernet, ends, images, torch.float32), labels, supernet.zero_grad, 2),
    }
    print(f"execution, {options.batch} images of {options.side}x{options.side}:")
    for name, step in steps.items():

        def compiled(step: Call = step) -> list[float]:
            with compiling():
                return step()

        with repeatable(device):
            torch._dynamo.reset()
            state = {key: tensor.clone() for key, tensor in supernet.state_dict().items()}
            before, began = counters["stats"]["unique_graphs"], sum(os.times()[:4])
            compiled()
            first = sum(os.times()[:4]) - began  # of the compiler's processes too
            programs = counters["stats"]["unique_graphs"] - before
            seconds = medians({"eager": step, "compiled": compiled}, options.rounds, device)
            losses = step(), compiled()
        supernet.load_state_dict(state)
        away = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
        print(
            f"  {name:<10} eager {1000 * seconds['eager']:>9.1f} ms, compiled {1000 * seconds['compiled']:>9.1f} ms, "
            f"{seconds['eager'] / seconds['compiled']:.2f} times as fast, losses away by {away:.1e}; "
            f"{programs} programs in {first:.0f} s of the processor's time",
            flush=True,
        )


def measure_rate(options: argparse.Namespace, device: torch.device) -> None:
    """Operations a second of a step, three times those of its forward pass, beside a matrix product's."""
    space = space_of(options.side)
    chosen, (images, labels) = subnets(space), images_of(space, options.batch, device)
    supernet = initialised(lambda: Supernet(space), 0).to(device).train()
    macs = sum(cost(space.blueprint(architecture)).macs for architecture in chosen) * options.batch
    size = 8192 if device.type == "cuda" else 2048
    print(f"rate, {options.batch} images of {options.side}x{options.side}:")
    last = images.contiguous(memory_format=torch.channels_last)
    for dtype, inputs in ((torch.float32, as_trained(images)), (torch.bfloat16, last)):
        a = torch.randn(size, size, device=device, dtype=dtype)

        def product(a: Tensor = a) -> list[float]:
            return [float((a @ a)[0, 0])]

        step = step_of(in_format(supernet, chosen, inputs, dtype), labels, supernet.zero_grad)
        calls = {"step": step, "product": product}
        with repeatable(device):
            seconds = medians(calls, options.rounds, device)
        rates = 6 * macs / seconds["step"], 2 * size**3 / seconds["product"]
        print(
            f"  {str(dtype).removeprefix('torch.'):<10}{rates[0] / 1e12:>9.3f} TFLOP/s of "
            f"{rates[1] / 1e12:.3f} TFLOP/s of a product of {size}: {rates[0] / rates[1]:.1%}",
            flush=True,
        )
        if dtype == torch.float32:
            print("    " + ", ".join(f"{kind} {share:.0%}" for kind, share in time_by_kind(step).items()), flush=True)


KINDS = {
    "native_batch_norm": "batch norm",
    "convolution": "convolution",
    **dict.fromkeys(("threshold", "clamp_min", "relu", "hardswish", "hardsigmoid"), "activations"),
    **dict.fromkeys(("mm", "addmm"), "linear layers"),
}
"""By a part of an operation's name, what it is of; the rest is of slices, gates, sums and calls."""


def time_by_kind(step: Call) -> dict[str, float]:
    """Shares of the processor's time, or the GPU's, of one step by kind of operation, the largest first."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * torch.cuda.is_available()
    with torch.profiler.profile(activities=kinds, record_shapes=True) as recorded:
        step()
    seconds: dict[str, float] = {}
    for event in recorded.key_averages(group_by_input_shape=True):
        kind = next((kind for part, kind in KINDS.items() if part in event.key.split("::")[-1]), "the rest")
        if kind == "convolution":
            weight = [shape for shape in event.input_shapes if len(shape) == 4][1:]
            depthwise = bool(weight) and weight[-1][1] == 1
            backward = ", backward" if "backward" in event.key else ""
            kind = f"{'depthwise' if depthwise else 'dense'} convolutions{backward}"
        own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        seconds[kind] = seconds.get(kind, 0.0) + own
    whole = sum(seconds.values())
    return {kind: own / whole for kind, own in sorted(seconds.items(), key=lambda item: -item[1])}


def measure_ranking(options: argparse.Namespace, device: torch.device) -> None:
    """With shared prefixes, one by one, naively."""
    space = dataclasses.replace(load_space("nas_bench_macro"), resolutions=(32,))
    supernet = initialised(lambda: Supernet(space), 0).to(device).eval()
    data = synthetic(max(256, options.images), 32)
    teacher = Frozen(Network(fitted_teacher((3, 32, 32), 10)), preprocessing=data.preprocessing).to(device)

    def evidence() -> Any:
        given = evidence_of(data, teacher, options.images)
        return dataclasses.replace(
            given,
            pixels=given.pixels.to(device),
            images=given.images.to(device),
            labels=given.labels.to(device),
            teacher=given.teacher.map(lambda tensor: tensor.to(device)),
        )

    kept, scorer = evidence(), Rdm()
    every = all_codes(space)
    if options.networks:
        every = random.Random(1).sample(every, options.networks)
    few = random.Random(0).sample(every, min(len(every), 60))

    def naive() -> None:
        for architecture in few[:20]:
            score_naively(supernet, architecture, scorer, data, evidence())

    ways = {
        "shared": (lambda: score_all(supernet, every, scorer, kept), len(every)),
        "one by one": (lambda: [score_all(supernet, [each], scorer, kept) for each in few], len(few)),
        "naive": (naive, min(len(few), 20)),
    }
    print(f"ranking, {len(every):,} codes, {options.images} images of 32x32:")
    each: dict[str, float] = {}
    with repeatable(device), torch.no_grad():
        score_all(supernet, few[:5], scorer, kept)
        for name, (call, count) in ways.items():
            wait_for(device)
            began = time.perf_counter()
            call()
            wait_for(device)
            each[name] = (time.perf_counter() - began) / count
            print(
                f"  {name:<12}{1000 * each[name]:>9.2f} ms a candidate, {each[name] / each['shared']:.1f} times shared"
            )


def measure_waiting(options: argparse.Namespace, device: torch.device) -> None:
    """The share of a training's time in which the GPU has nothing to do."""
    from torch.profiler import ProfilerActivity, profile

    space = space_of(options.side)
    parts = synthetic(2048, options.side)
    for precision, batch in itertools.product(("float32", "bfloat16"), (options.batch, 4 * options.batch)):
        recipe = Recipe(steps=100, batch_size=batch, precision=precision)
        with repeatable(device):
            training = Training(
                initialised(lambda: Supernet(space.fitted(classes=10, image_channels=3)), 0),
                Sandwich(terms=()),
                parts,
                None,
                recipe,
                device,
            )
            for _ in range(4):
                training.step()
            with profile(activities=[ProfilerActivity.CUDA]) as record:
                wait_for(device)
                began = time.perf_counter()
                for _ in range(options.rounds):
                    training.step()
                wait_for(device)
                seconds = time.perf_counter() - began
            training.close()
        busy = sum(e.device_time_total for e in record.events() if e.device_type.name == "CUDA") / 1e6
        print(
            f"waiting, {precision}, {batch} images of {options.side}x{options.side}: "
            f"{1000 * seconds / options.rounds:.1f} ms a step, {batch * options.rounds / seconds:,.0f} images/s; "
            f"the GPU waits {1 - busy / seconds:.0%}",
            flush=True,
        )


def measure_start(options: argparse.Namespace, device: torch.device) -> None:
    """How long processes take that import torch or a job and end, and a run until the first line of its preflight."""
    jobs = ("chain", "compare", "finals", "prune", "retrain", "search", "train")
    modules = ["torch", *(f"kdnas.jobs.{name}" for name in jobs)]
    run = ["-m", "kdnas", "run", "--data", "digits", "--space", "digits", "--budget", "macs=6e5", "--out"]

    def imports(module: str) -> list[float]:
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
        return []

    def preflight() -> list[float]:
        with (
            tempfile.TemporaryDirectory() as folder,
            subprocess.Popen([sys.executable, *run, f"{folder}/run"], stderr=subprocess.PIPE, text=True) as process,
        ):
            assert process.stderr is not None
            if not any(line.startswith("before the training") for line in process.stderr):
                raise SystemExit(f"{' '.join(run)} printed no preflight")
            process.kill()
        return []

    calls = {module: partial(imports, module) for module in modules} | {"preflight": preflight}
    seconds = medians(calls, min(options.rounds, 5), device)
    for module in modules[1:]:
        print(f"start: {module} {seconds[module]:.2f} s, {seconds[module] - seconds['torch']:.2f} more than torch")
    after = seconds["preflight"] - max(seconds[module] for module in modules)
    print(f"start: first preflight line {seconds['preflight']:.2f} s, {after:.2f} after the largest import", flush=True)


SECTIONS = {
    "step": measure_step,
    "precision": measure_precision,
    "execution": measure_execution,
    "rate": measure_rate,
    "ranking": measure_ranking,
    "waiting": measure_waiting,
    "start": measure_start,
}


def sections(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Those asked for; `waiting` needs a GPU."""
    chosen = options.sections or list(SECTIONS)
    yield from (name for name in chosen if name != "waiting" or device.type == "cuda")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("--ofa", type=Path, help="a checkout of mit-han-lab/once-for-all")
    parser.add_argument(
        "--alphanet",
        type=Path,
        help="a checkout of facebookresearch/AttentiveNAS with facebookresearch/AlphaNet laid over it",
    )
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=256, help="of a ranking")
    parser.add_argument("--networks", type=int, default=0, help="of a ranking; 0 for all codes")
    options = parser.parse_args()
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"sections must be of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    print(f"{name}, torch {torch.__version__}")
    for section in sections(options, device):
        SECTIONS[section](options, device)


if __name__ == "__main__":
    main()
