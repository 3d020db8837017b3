"""Every command as a function of plain arguments; the command line is derived from these signatures and docstrings.

Importing this module imports no torch: what a function needs is imported when it is called. Wherever a text names a
thing (a data set, a teacher, a space, an algorithm), the thing itself is accepted too.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, Unpack, get_args

from kdnas.plain import show
from kdnas.settings import (
    Compare,
    Control,
    Finals,
    FitTeacher,
    Grow,
    InitialWeights,
    Prune,
    Recipe,
    RecipeOptions,
    Retrain,
    Search,
)
from kdnas.trust import trusting
from kdnas.values import (
    Amount,
    Count,
    Factor,
    Index,
    Processes,
    Sample,
    Seconds,
    Seed,
    Share,
    Side,
    Size,
    WorkerCount,
    check_arguments,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from kdnas.costs.budget import Budget
    from kdnas.data.base import Data
    from kdnas.jobs._preflight.findings import Finding
    from kdnas.jobs._run import Run
    from kdnas.jobs.plan import Plan
    from kdnas.ranking.table import Ranking
    from kdnas.settings import CardTeacher, Experiment, NoTeacher
    from kdnas.space import SearchSpace
    from kdnas.specs import Spec

_P = ParamSpec("_P")
_R = TypeVar("_R")
_log = logging.getLogger(__name__)
_CHECKED, _PLANNED = Path("runs/checked"), Path("runs/planned")  # where a run would be, if nobody says


def _computes(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run the function as one command, on the device that `device` names, insisting and trusting if it says so.

    Its numbers are checked against their annotations first.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        from contextlib import nullcontext

        from kdnas.data.decoded import stored_in
        from kdnas.data.feeding import decoding
        from kdnas.network import on_device
        from kdnas.runs.lock import command

        for target in (function, Recipe):
            check_arguments(target, {name: value for name, value in kwargs.items() if value is not None})
        device, insists = kwargs.get("device"), nullcontext()
        assert device is None or isinstance(device, str)
        if kwargs.get("insist"):
            from kdnas.jobs._run import insisting

            insists = insisting(True)
        decoders: Any = kwargs.get("decoders")
        decoded: Any = kwargs.get("decoded")
        trusts = trusting(bool(kwargs.get("trust")))
        with command(), on_device(device), decoding(decoders), stored_in(decoded), insists, trusts:
            return function(*args, **kwargs)

    return call


def _like(
    other: Callable[..., Any], times: Mapping[str, str], **defaults: Any
) -> Callable[[Callable[[dict[str, Any]], _R]], Callable[..., _R]]:
    """Give a function of all arguments the signature of another one, and the texts on its arguments.

    Args:
        other: the function whose arguments it takes.
        times: names of further arguments, each a time or None, and their texts.
        **defaults: of arguments that it does not need.
    """

    def decorate(function: Callable[[dict[str, Any]], _R]) -> Callable[..., _R]:
        *known, last = inspect.signature(other).parameters.values()
        more = [inspect.Parameter(name, last.KEYWORD_ONLY, annotation="Seconds | None", default=None) for name in times]
        known = [each.replace(default=defaults.get(each.name, each.default)) for each in known]
        signature = inspect.Signature([*known, *more, last])

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> _R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(dict(bound.arguments))

        summary, _, example = (inspect.getdoc(function) or "").partition("\n\nExample:")
        own = "\n".join(f"    {name}: {text}" for name, text in times.items())
        texts = (inspect.getdoc(other) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
        call.__doc__ = f"{summary}\n\nArgs:\n{texts}\n{own}\n\nExample:{example}"
        call.__annotations__ = {
            **other.__annotations__,
            **dict.fromkeys(times, "Seconds | None"),
            "return": function.__annotations__["return"],
        }
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


@_computes
def demo(*, out: str | Path = Path("runs/demo"), device: str | None = None) -> Run:
    """Run the whole chain on scikit-learn's digits, in two to four minutes on two CPU cores.

    Args:
        out: the run folder.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
    """
    return run(experiment="demo", out=out, device=device)


@_computes
def run(
    experiment: str | Experiment | None = None,
    *,
    out: str | Path,
    data: str | Spec | Data | Dataset[Any] | None = None,
    task: str | None = None,
    unlabelled: bool = False,
    teacher: str | Spec | FitTeacher | nn.Module = "fit",
    teacher_members: Count = FitTeacher.members,
    space: str | Path | SearchSpace | None = None,
    size: Size | None = None,
    budget: str | Sequence[str] | Budget = (),
    latency_table: str | Path | None = None,
    divisor: Side = 0,
    distiller: str | Spec = "sandwich",
    loss: str | Sequence[str] = (),
    weights: str | Path | None = None,
    scorer: str | Spec = Search.scorer,
    searcher: str | Spec = Search.searcher,
    contrast: str | Spec | None = None,
    pruner: str | Spec | None = None,
    num_evaluations: Count = Search.num_evaluations,
    max_time: Seconds = Search.max_time,
    finalists: Count = Finals.finalists,
    controls: bool = False,
    workers: WorkerCount | None = None,
    deploy: bool = True,
    insist: bool = False,
    trust: bool = False,
    decoders: Processes | None = None,
    decoded: str | Path | None = None,
    device: str | None = None,
    **recipe: Unpack[RecipeOptions],
) -> Run:
    """Run the whole chain on your own data: teacher, supernet, ranking, training of the best few, report.

    Without a space the student is cut out of the teacher's own network (`kdnas prune`, with three finalists), from
    its trained weights; no supernet is trained.

    The same call on an unfinished run resumes it. Objects that cannot be stored in the run (a module, a data set in
    memory) are used by this process; commands in another process need them again, and a message says so.

    Args:
        experiment: a Python file that defines experiment(), or a name from `kdnas list experiments`, instead of
            everything else.
        out: the run folder.
        data: digits, folder:PATH, masks:PATH, culane:PATH, tusimple:PATH, roads:COUNT, hf:FOLDER_OR_NAME,
            parquet:FILES, wds:FILES, csv:FILE, npz:FILE, cifar10:PATH, cifar100:PATH or package.module:function;
            strong:DATA augments more.
        task: what networks are for, such as classification, segmentation or lanes. The data decide it; another one is
            refused.
        unlabelled: learn the teacher's features and no labels, which data and teacher need not have then; labels that
            there are measure the student.
        teacher: fit (or fit,blocks=1,width=16), torchvision:NAME or timm:NAME (each with @WEIGHTS, and options such as
            ,size=96), timm:FOLDER, hf:FOLDER_OR_NAME of transformers, export:FILE of torch.export, onnx:FILE, FOLDER of
            `kdnas fit` or of a student, package.module:function, ensemble:TEACHER,TEACHER (also ensemble+logits:,
            ensemble+random:, ensemble+reliable:, and weighted, ensemble:TEACHER=2,TEACHER=1),
            route:TEACHER,TEACHER or streamed:TEACHER.
        teacher_members: number of teachers that fit trains; they are used as an ensemble.
        space: a TOML table, or a name from `kdnas list spaces`; by default the teacher's own network is cut down.
        size: height and width of the student's images; by default the space's, unless the data's are more than twice as
            large or small: then it must be chosen.
        budget: upper bounds: params=2M, macs=6e8, memory=256KiB (activations), latency=5ms, size=2MB, or shares such as
            macs=25%, of the teacher's network or of the space's largest; repeatable. latency=5ms@onnxruntime,threads=2
            is on another target (eager, compile, onnxruntime, executorch), size=2MB@int8 of the graph in integers.
        latency_table: a JSON file that `kdnas latency` had measured on another device; the bound on latency is for it.
        divisor: without --space, widths narrower than the teacher's are multiples of it; 0 for 8, and for 4 below
            64 channels, under a budget on latency, else 1. The widths of a space are those of its table.
        distiller: NAME or NAME,key=value from `kdnas list distillers`; none trains no supernet.
        loss: NAME or NAME=WEIGHT from `kdnas list losses`, perhaps with ,key=value, a distillation loss beside the
            labels; repeatable.
        weights: a safetensors file with the supernet's initial weights, as `kdnas convert` writes it; without --space
            the student's initial weights: inherited, fresh, or chosen by a short trial, the default.
        scorer: NAME or NAME,key=value from `kdnas list scorers`.
        searcher: NAME or NAME,key=value from `kdnas list searchers`.
        contrast: a second scorer; the search is run under it too, and the two rankings are compared.
        pruner: stops evaluations early: successive_halving, hyperband, median and others of Optuna, or NAME,key=value.
        num_evaluations: number of distinct candidates to score.
        max_time: time of the search and its controls, in seconds or such as 20m.
        finalists: number of the best networks, apart from each other, that are trained, of three or more the last one
            the largest within the budget; the best of them on the search part is the student.
        controls: train all controls too: as many random networks, the largest within the budget, and place 1 for the
            whole cost; without --space all controls are trained in any case.
        workers: number of trainings side by side, each on one thread or one device; by default one per device, or per
            core on a CPU. No result depends on it.
        deploy: whether to write the student as Python code and ONNX too, and compare all forms.
        insist: train although the teacher or the size of the images speaks against it.
        trust: run code that files name, though it is none of kdnas's algorithms.
        decoders: processes that decode images ahead of need, for each training; 0 for none. By default one per core
            that computes nothing, where images are decoded from files. No result depends on it.
        decoded: a folder in which decoded images are stored and read from again. No result depends on it.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
        **recipe: optimizer settings of teacher, supernet and student. `steps` is by default 30 epochs, at least 300 and
            at most 20,000; `batch_size` 128, 16 of images with masks or lanes, or all training images where there are
            fewer.

    Example:
        >>> import tempfile
        >>> options = {"scorer": "params", "steps": 1, "batch_size": 8, "num_evaluations": 4, "deploy": False}
        >>> result = run(data="digits", space="toy", budget="macs=60k", out=tempfile.mkdtemp(), **options)
        >>> all(entry.macs <= 60_000 for entry in result.ranking())
        True
    """
    options = locals()
    from kdnas.jobs.chain import chain
    from kdnas.jobs.prune import prune as cut
    from kdnas.settings import Experiment

    settings = _run_settings(options)
    if isinstance(settings, Experiment):
        return chain(settings, Path(out), deploy=deploy, size_chosen=size is not None, workers=workers)
    from kdnas.jobs._run import Run

    cut(settings, Path(out), deploy=deploy)
    return Run(out)


def _run_settings(options: dict[str, Any]) -> Experiment | Prune:
    """What the arguments of `run` ask for: a search, or without a space a pruning."""
    from kdnas.data.base import Data
    from kdnas.jobs._arguments import (
        as_budget,
        as_experiment,
        as_space,
        as_spec,
        as_teacher,
        of_task,
        recipe_for,
        with_losses,
    )
    from kdnas.jobs._unlabelled import data_of, without_labels
    from kdnas.settings import Experiment, Train

    arguments = types.SimpleNamespace(**options)
    if arguments.experiment is not None:
        _refuse_options(run, options, "deploy", "workers")
        return as_experiment(arguments.experiment)
    if arguments.data is None or (arguments.space is None and not arguments.budget):
        name = "--data" if arguments.data is None else "--budget (or --space)"
        raise ValueError(f"{name} is missing. Give it, or an --experiment that holds everything.")
    if arguments.space is None:
        return _cut(options)
    if arguments.divisor:
        raise ValueError(
            f"`divisor` is for a run without --space, whose table has the widths, got {arguments.divisor}. Drop it."
        )
    options = options | {"budget": as_budget(arguments.budget, arguments.latency_table)}
    names = ("scorer", "searcher", "budget", "contrast", "pruner", "num_evaluations", "max_time")
    search = search_settings(Search(), seed=arguments.recipe.get("seed"), **{name: options[name] for name in names})
    space_value, teacher_spec = as_space(arguments.space), as_teacher(arguments.teacher)
    data_spec = data_of(arguments.data, teacher_spec, unlabelled=arguments.unlabelled)
    if arguments.size is not None:
        space_value = dataclasses.replace(space_value, resolutions=(arguments.size,))
    supernet_distiller = None if arguments.distiller == "none" else as_spec("kdnas.distillers", arguments.distiller)
    if not arguments.unlabelled:
        supernet_distiller = with_losses(supernet_distiller, arguments.loss)
    if not isinstance(teacher_spec, FitTeacher) and arguments.teacher_members != 1:
        raise ValueError(f"--teacher-members must be 1 where --teacher is not fit, got {arguments.teacher_members}.")
    _log_space(space_value)
    _log_memory(teacher=teacher_spec, data=data_spec)
    settings = recipe_for(of_task(data_spec.build(Data), arguments.task), arguments.recipe)
    if isinstance(teacher_spec, FitTeacher):
        members = teacher_spec.members if arguments.teacher_members == FitTeacher.members else arguments.teacher_members
        teacher_spec = dataclasses.replace(teacher_spec, recipe=settings, members=members)
    training = Train(
        space=space_value,
        data=data_spec,
        teacher=teacher_spec,
        distiller=supernet_distiller,
        recipe=settings,
        weights="" if arguments.weights is None else str(Path(arguments.weights).resolve()),
    )
    chosen = finals_settings(Finals(), controls=arguments.controls, finalists=arguments.finalists)
    experiment = Experiment(train=training, search=search, retrain=Retrain(recipe=settings), finals=chosen)
    return without_labels(experiment, arguments.loss) if arguments.unlabelled else experiment


def _cut(options: dict[str, Any]) -> Prune:
    """A run without a space: the teacher's own network is pruned.

    Raises:
        ValueError: an option of supernet or search is not at its default.
    """
    from kdnas.data.base import Data
    from kdnas.jobs._arguments import as_budget, as_seconds, as_teacher, of_task, recipe_for
    from kdnas.jobs._unlabelled import data_of

    allowed = (
        "data",
        "unlabelled",
        "task",
        "teacher",
        "budget",
        "divisor",
        "loss",
        "num_evaluations",
        "max_time",
        "finalists",
        "controls",
        "deploy",
        *(["weights"] if options["weights"] in get_args(InitialWeights) else []),
    )
    _refuse_options(run, options, *allowed, beside="--space")
    teacher = as_teacher(options["teacher"])
    data = data_of(options["data"], teacher, unlabelled=options["unlabelled"])
    loaded = of_task(data.build(Data), options["task"])
    recipe = recipe_for(loaded, options["recipe"])
    rate = Prune.retrain.learning_rate if options["recipe"].get("learning_rate") is None else recipe.learning_rate
    settings = Prune(
        data=data,
        budget=as_budget(options["budget"]),
        teacher=dataclasses.replace(teacher, recipe=recipe) if isinstance(teacher, FitTeacher) else teacher,
        num_candidates=options["num_evaluations"],
        max_time=as_seconds(options["max_time"]),
        divisor=options["divisor"],
        finalists=options["finalists"],
        weights=options["weights"] or Prune.weights,
        retrain=dataclasses.replace(recipe, learning_rate=rate),
    )
    return _with_losses(settings, options["loss"], unlabelled=options["unlabelled"])


def _with_losses(settings: Prune, loss: str | Sequence[str], *, unlabelled: bool) -> Prune:
    """The pruning under these losses, or with none under those that are chosen by trials."""
    from kdnas.jobs._arguments import listed, terms_of
    from kdnas.jobs._unlabelled import pruned_without_labels

    if unlabelled:
        return pruned_without_labels(settings, loss)
    return dataclasses.replace(settings, distiller=terms_of(listed(loss))) if loss else settings


@_computes
@_like(run, {}, out=_CHECKED)
def doctor(options: dict[str, Any]) -> list[Finding]:
    """Check installation, data, teacher and settings, and take a step of every phase; the arguments are those of run.

    Whatever is not named is not checked; nothing is written into `out`. A fault is what a run would stop at, or what
    makes its numbers wrong.

    Example:
        >>> findings = doctor(data="digits")
        >>> [finding.text for finding in findings if finding.subject == "images"]
        ['1,797 of 1,797 were read']
    """
    from kdnas.jobs import doctor as job

    return job.doctor(options, lambda: _run_settings(options))


@_computes
@_like(
    run, {"time": "the time that there is, such as 2h; steps and candidates that fit it are proposed."}, out=_PLANNED
)
def plan(options: dict[str, Any]) -> Plan:
    """Predict time, memory and disk of every phase of a run from a few steps; the arguments are those of run, and time.

    Nothing is written into `out`.

    Example:
        >>> options = {"scorer": "params", "steps": 1, "batch_size": 8, "num_evaluations": 4, "deploy": False}
        >>> planned = plan(data="digits", teacher="fit,width=4", space="toy", finalists=1, **options)
        >>> [phase.name for phase in planned.phases]
        ['teacher', 'supernet', 'search', 'finals', 'other']
    """
    from kdnas.jobs import plan as job
    from kdnas.jobs._arguments import as_seconds

    limit = options.pop("time")
    settings = _run_settings(options)
    seconds = None if limit is None else as_seconds(limit)
    return job.plan(settings, Path(options["out"]), deploy=options["deploy"], seconds=seconds)


def _refuse_options(
    function: Callable[..., Any], values: dict[str, Any], *allowed: str, beside: str = "--experiment"
) -> None:
    """Raise a ValueError where an option is neither allowed nor at its default.

    Args:
        function: the command.
        values: its arguments.
        *allowed: names of options that may differ from their defaults.
        beside: --experiment, which holds everything else; or --space, without which options of it make no sense.
    """
    parameters = inspect.signature(function).parameters
    recipe = {} if "recipe" in allowed or beside == "--space" else values["recipe"]
    for name, value in {**values, **recipe}.items():
        default = parameters[name].default if name in parameters else None
        if (
            name in (*allowed, "out", "experiment", "decoded", "decoders", "device", "insist", "trust", "recipe")
            or value == default
            or not (value or default)
        ):
            continue
        option = f"--{name.replace('_', '-')}"
        if beside == "--space":
            raise ValueError(
                f"{option} needs --space: without one the teacher's own network is cut down, and no supernet is "
                "searched. Add --space, or drop it."
            )
        raise ValueError(f"--experiment holds all settings, got {option} beside it. Drop one.")


def _log_memory(**specs: object) -> None:
    """Say which arguments of a run another process needs again."""
    from kdnas.jobs._memory import is_kept

    names = [name for name, value in specs.items() if is_kept(value)]
    if names:
        arguments = ", ".join(f"{name}=..." for name in names)
        verb = "are objects" if len(names) > 1 else "is an object"
        _log.info(
            f"{' and '.join(names)} {verb} of this process; in another one pass them again: kdnas.search(RUN, "
            f"{arguments}), kdnas.finals(RUN, {arguments}), kdnas.export(RUN, {arguments}), "
            f"kdnas.retrain(STUDENT, {arguments})"
        )


def _log_space(space: SearchSpace) -> None:
    _log.info("search space %s: %s architectures, %d choices", space.name, f"{space.count():,}", len(space.choices))


def search_settings(
    default: Search,
    *,
    scorer: Any = None,
    searcher: Any = None,
    budget: Any = (),
    contrast: Any = None,
    pruner: Any = None,
    seed: Seed | None = None,
    exact: bool = False,
    **numbers: Any,
) -> Search:
    """The default with the options that are not None."""
    from kdnas.jobs._arguments import as_budget, as_seconds, as_spec
    from kdnas.ranking.early_stopping import parse_pruner
    from kdnas.specs import Spec

    changes = {name: numbers[name] for name in ("num_evaluations", "initial") if numbers.get(name) is not None}
    for name, package, value in (
        ("scorer", "scorers", scorer),
        ("searcher", "searchers", searcher),
        ("contrast", "scorers", contrast),
    ):
        if value is not None:
            changes[name] = as_spec(f"kdnas.{package}", value)
    if numbers.get("max_time") is not None:
        changes["max_time"] = as_seconds(numbers["max_time"])
    if pruner is not None:
        changes["pruner"] = pruner if isinstance(pruner, Spec) else parse_pruner(pruner)
    if budget:
        changes["budget"] = as_budget(budget)
    if seed is not None:
        changes["seed"] = seed
    changes["exact"] = exact or (default.exact and scorer is None and searcher is None)
    return dataclasses.replace(default, **changes)


@_computes
def fit(
    *,
    out: str | Path,
    data: str | Spec | Data | Dataset[Any],
    network: str = "resnet",
    weights: Literal["pretrained", "fresh"] = "pretrained",
    size: Side = 0,
    blocks: Side = 0,
    width: Size | None = None,
    loss: str | Sequence[str] = (),
    insist: bool = False,
    trust: bool = False,
    decoders: Processes | None = None,
    decoded: str | Path | None = None,
    device: str | None = None,
    **recipe: Unpack[RecipeOptions],
) -> dict[str, Any]:
    """Train or fine-tune a teacher on your own data, in a folder that --teacher takes; the same call resumes.

    Args:
        out: the folder of the teacher.
        data: see `kdnas run --help`.
        network: resnet, torchvision:NAME or timm:NAME, either with @WEIGHTS, a file to begin with.
        weights: what a zoo's network begins with where no file is named: the zoo's weights, or none.
        size: height and width of a zoo's network's images; 0 for the zoo's.
        blocks: residual blocks per stage of resnet; 0 for one on images of up to 16 pixels, two on larger ones.
        width: channels of resnet's first stage, doubled at each later one; by default 32 on images of up to 16 pixels,
            64 on larger ones.
        loss: NAME or NAME=WEIGHT from `kdnas list losses`, perhaps with ,key=value, a loss of resnet's own stages such
            as self_attention, beside the labels; repeatable.
        insist: train although the teacher or the size of the images speaks against it.
        trust: run code that files name, though it is none of kdnas's algorithms.
        decoders: processes that decode images ahead of need, for each training; 0 for none. By default one per core
            that computes nothing, where images are decoded from files. No result depends on it.
        decoded: a folder in which decoded images are stored and read from again. No result depends on it.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
        **recipe: optimizer settings. `steps` is by default 30 epochs, at least 300 and at most 20,000; `batch_size`
            128, 16 of images with masks or lanes, or all training images where there are fewer; `learning_rate` 0.1,
            and 0.01 for trained weights.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> fit(data="digits", width=8, steps=2, batch_size=16, out=folder)["params"]
        19810
        >>> from kdnas import load_teacher
        >>> load_teacher(folder).make
        'kdnas.teachers.zoo:student_teacher'
    """
    del decoded, decoders, device, insist, trust
    from kdnas.data.base import Data
    from kdnas.jobs import fit as job
    from kdnas.jobs._arguments import as_data, listed, losses_of, recipe_for
    from kdnas.settings import Fit

    source = as_data(data)
    if network.rpartition("@")[1]:
        name, _, file = network.partition("@")
        network = f"{name}@{Path(file).resolve()}"
    trained = network != "resnet" and (weights == "pretrained" or "@" in network)
    options = {"learning_rate": 0.01 if trained else None} | {k: v for k, v in recipe.items() if v is not None}
    teacher = FitTeacher(recipe=recipe_for(source.build(Data), options), blocks=blocks, width=width)
    losses = losses_of(listed(loss))
    settings = Fit(data=source, network=network, weights=weights, size=size, teacher=teacher, losses=losses)
    return job.fit(settings, Path(out))


@_computes
def train(
    experiment: str | Experiment,
    *,
    out: str | Path,
    loss: str | Sequence[str] = (),
    insist: bool = False,
    trust: bool = False,
    decoders: Processes | None = None,
    decoded: str | Path | None = None,
    device: str | None = None,
    **recipe: Unpack[RecipeOptions],
) -> Run:
    """Train the supernet of an experiment, and its teacher; on an existing run of the same experiment, resume.

    Args:
        experiment: a Python file that defines experiment(), or a name from `kdnas list experiments`.
        out: the run folder.
        loss: NAME or NAME=WEIGHT from `kdnas list losses`, perhaps with ,key=value, a distillation loss beside the
            labels; repeatable.
        insist: train although the teacher or the size of the images speaks against it.
        trust: run code that files name, though it is none of kdnas's algorithms.
        decoders: processes that decode images ahead of need, for each training; 0 for none. By default one per core
            that computes nothing, where images are decoded from files. No result depends on it.
        decoded: a folder in which decoded images are stored and read from again. No result depends on it.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
        **recipe: optimizer settings of the supernet, by default the experiment's.

    Example:
        >>> import tempfile
        >>> from kdnas import Experiment, FitTeacher, Recipe, load_data, load_space
        >>> from kdnas.settings import Train
        >>> fit = FitTeacher(recipe=Recipe(steps=1, batch_size=8))
        >>> settings = Experiment(train=Train(space=load_space("toy"), data=load_data("digits"), teacher=fit))
        >>> train(settings, out=tempfile.mkdtemp(), steps=2, batch_size=8).storage.phase("train")["steps"]
        2
    """
    del decoded, decoders, device, insist, trust

    from kdnas.jobs import train as job
    from kdnas.jobs._arguments import as_experiment, with_losses, with_overrides

    settings = as_experiment(experiment)
    changed = dataclasses.replace(
        settings.train,
        recipe=with_overrides(settings.train.recipe, recipe),
        distiller=with_losses(settings.train.distiller, loss),
    )
    _log_space(changed.space)
    return job.train(dataclasses.replace(settings, train=changed), Path(out))


@_computes
def search(
    run: str | Path | Run,
    *,
    scorer: str | Spec | None = None,
    searcher: str | Spec | None = None,
    budget: str | Sequence[str] | Budget = (),
    latency_table: str | Path | None = None,
    contrast: str | Spec | None = None,
    pruner: str | Spec | None = None,
    num_evaluations: Count | None = None,
    max_time: Seconds | None = None,
    exact: bool = False,
    initial: Index | None = None,
    trainings: Index | None = None,
    results: str | Path | None = None,
    quality: bool = True,
    workers: WorkerCount | None = None,
    storage: str | None = None,
    teacher: str | Spec | nn.Module | None = None,
    data: str | Spec | Data | Dataset[Any] | None = None,
    trust: bool = False,
    device: str | None = None,
) -> Ranking:
    """Rank subnets of a run by a score, or by trainings of a few of them; the run's ranking grows by the entries.

    Args:
        run: the run folder.
        scorer: NAME or NAME,key=value from `kdnas list scorers`; by default the run's.
        searcher: NAME or NAME,key=value from `kdnas list searchers`; by default the run's.
        budget: upper bounds, see `kdnas run --help`; repeatable; by default the run's.
        latency_table: a JSON file that `kdnas latency` had measured on another device; the bound on latency is for it.
        contrast: a second scorer; the search is run under it too, and the two rankings are compared.
        pruner: stops evaluations early: successive_halving, hyperband, median and others of Optuna, or NAME,key=value.
        num_evaluations: number of distinct candidates to score; by default the run's.
        max_time: time of the search and its controls, in seconds or such as 20m; by default the run's.
        exact: for a run trained block-wise, rate every option of every block once and compute the best networks
            exactly.
        initial: number of best candidates of the run's previous search to start from.
        trainings: number of networks that are trained, earlier ones included, to predict the accuracies of all others;
            fewer where one more is expected to gain less than the noise.
        results: a CSV file of accuracies of trained networks, with codes in the column arch, or in the first one, and
            accuracies in the column accuracy; they are stored in the run and count as trainings.
        quality: measure first how long trainings must be for their order to say something.
        workers: number of processes side by side, each on one thread or one device. By default trainings have one per
            device, or per core on a CPU, and scores one process with all threads, which differ from those of workers
            in their last digits; no result depends on the number.
        storage: URL of a database, such as postgresql://me@host/name; the same command on any hosts joins the search,
            and with --trainings on any that share the run's folder.
        teacher: the run's own teacher, where it was in memory or lies elsewhere now; see `kdnas run --help`.
        data: the run's own data, likewise.
        trust: run code that files name, though it is none of kdnas's algorithms.
        device: such as cpu or cuda:1 (default: a GPU where there is one).

    Example:
        >>> import tempfile
        >>> options = {"scorer": "params", "steps": 1, "batch_size": 8, "num_evaluations": 4, "deploy": False}
        >>> opened = run(data="digits", space="toy", finalists=1, out=tempfile.mkdtemp(), **options)
        >>> ranking = search(opened, searcher="exhaustive", budget="params=700", num_evaluations=100)
        >>> [entry.params for entry in ranking]
        [694, 590, 550, 550, 398]
    """
    del device, trust
    from kdnas.jobs import search as job
    from kdnas.jobs._arguments import as_budget, as_run, as_seconds
    from kdnas.jobs.predict import predict, shared_predict
    from kdnas.ranking.table import Ranking

    limit = None if max_time is None else as_seconds(max_time)
    opened = as_run(run, teacher=teacher, data=data, writes=storage is None)
    bounds = as_budget(budget, latency_table) if budget or latency_table else ()
    options = {"scorer": scorer, "searcher": searcher, "budget": bounds, "contrast": contrast, "pruner": pruner}
    settings = search_settings(
        opened.experiment.search,
        **options,
        num_evaluations=num_evaluations,
        max_time=limit,
        exact=exact,
        initial=initial,
    )
    _check_one_way(workers, storage)
    if trainings is None and results is None:
        if not quality:
            raise ValueError("`quality` is of trainings, got it without --trainings. Add them, or drop it.")
        if storage is not None:
            return Ranking(job.shared_search(opened, settings, storage))
        return Ranking(job.search(opened, settings, workers=workers))
    path = None if results is None else Path(results)
    if storage is not None:
        return Ranking(shared_predict(opened, settings, trainings or 0, storage, results=path, quality=quality))
    return Ranking(predict(opened, settings, trainings or 0, results=path, quality=quality, workers=workers))


@_computes
def finals(
    run: str | Path | Run,
    *,
    finalists: Count | None = None,
    pruner: str | Spec | None = None,
    controls: bool = False,
    seeds: Count | None = None,
    max_time: Seconds | None = None,
    workers: WorkerCount | None = None,
    storage: str | None = None,
    deploy: bool = True,
    teacher: str | Spec | nn.Module | None = None,
    data: str | Spec | Data | Dataset[Any] | None = None,
    trust: bool = False,
    decoders: Processes | None = None,
    decoded: str | Path | None = None,
    device: str | None = None,
    **recipe: Unpack[RecipeOptions],
) -> dict[str, Any]:
    """Train the best few of a run's last search; the best of them on the search part is the student.

    Each training is a student `students/finalist-N` of the run; the same call resumes, and a later one with more
    finalists trains only those that are new.

    Args:
        run: the run folder, with a finished search.
        finalists: number of the best networks, apart in their choices, that are trained, of three or more the last one
            the largest within the budget; by default the run's, 3.
        pruner: stops finalists early: successive_halving, hyperband, median and others of Optuna, or NAME,key=value; by
            default the run's, successive_halving.
        controls: train all controls too: as many random networks, the largest within the budget, and place 1 for the
            whole cost; by default the run's, which are at least the student without a teacher.
        seeds: number of seeds with which the student and each control are trained; by default the run's, 1.
        max_time: time of the finalists' trainings, in seconds or such as 2h; there are fewer where it is too short.
        workers: number of trainings side by side, each on one thread or one device; by default one per device, or per
            core on a CPU. No result depends on it.
        storage: URL of a database, such as postgresql://me@host/name; the same command on any hosts that share the
            run's folder joins these trainings.
        deploy: whether to write the student as Python code and ONNX too, and compare all forms.
        teacher: the run's own teacher, where it was in memory or lies elsewhere now; see `kdnas run --help`.
        data: the run's own data, likewise.
        trust: run code that files name, though it is none of kdnas's algorithms.
        decoders: processes that decode images ahead of need, for each training; 0 for none. By default one per core
            that computes nothing, where images are decoded from files. No result depends on it.
        decoded: a folder in which decoded images are stored and read from again. No result depends on it.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
        **recipe: optimizer settings of every training, by default the run's.

    Example:
        >>> import tempfile
        >>> options = {"scorer": "params", "steps": 1, "batch_size": 8, "num_evaluations": 4, "deploy": False}
        >>> opened = run(data="digits", space="toy", finalists=1, out=tempfile.mkdtemp(), **options)
        >>> result = finals(opened, finalists=2, steps=2, deploy=False)
        >>> [row["name"] for row in result["finalists"]]
        ['finalist-2', 'finalist-3']
    """
    del decoded, decoders, device, trust
    from kdnas.jobs import finals as job
    from kdnas.jobs._arguments import as_run, with_overrides
    from kdnas.report import write_report

    _check_one_way(workers, storage)
    opened = as_run(run, teacher=teacher, data=data, writes=storage is None)
    changes = {"pruner": pruner, "max_time": max_time, "finalists": finalists, "seeds": seeds}
    settings = finals_settings(opened.experiment.finals, controls=controls, **changes)
    retrain = opened.experiment.retrain
    retrain = dataclasses.replace(retrain, recipe=with_overrides(retrain.recipe, recipe))
    if storage is not None:
        return job.shared_finals(opened, settings, retrain, storage, deploy=deploy)
    result = job.finals(opened, settings, retrain, deploy=deploy, workers=workers)
    write_report(opened.folder)
    return result


def _check_one_way(workers: int | None, storage: str | None) -> None:
    """Raise a ValueError where processes would be started and awaited at once."""
    if storage is not None and workers is not None:
        raise ValueError("`workers` does not go with --storage. Start the same command as often as you want workers.")


def finals_settings(
    default: Finals,
    *,
    controls: bool,
    pruner: Any = None,
    max_time: Seconds | None = None,
    **numbers: int | None,
) -> Finals:
    """The default with the options that are not None."""
    from kdnas.jobs._arguments import as_seconds
    from kdnas.ranking.early_stopping import parse_pruner
    from kdnas.specs import Spec

    changes: dict[str, Any] = {name: number for name, number in numbers.items() if number is not None}
    if controls:
        changes["controls"] = get_args(Control)
    if max_time is not None:
        changes["max_time"] = as_seconds(max_time)
    if pruner is not None:
        changes["pruner"] = pruner if isinstance(pruner, Spec) else parse_pruner(pruner)
    return dataclasses.replace(default, **changes)


@_computes
def rank_check(
    run: str | Path | Run,
    table: str | Path,
    *,
    scorer: str | Sequence[str] = (),
    column: str = "mean_acc",
    num_images: Sample | None = None,
    teacher: str | Spec | nn.Module | None = None,
    data: str | Spec | Data | Dataset[Any] | None = None,
    trust: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Compare a run's scores with a table of true accuracies, beside controls.

    Args:
        run: the run folder.
        table: a CSV file with the networks' codes in the column arch, or in the first one.
        scorer: NAME or NAME,key=value from `kdnas list scorers`; repeatable; by default the run's.
        column: the column of the true accuracies.
        num_images: number of images of the search part; by default the run's.
        teacher: the run's own teacher, where it was in memory or lies elsewhere now; see `kdnas run --help`.
        data: the run's own data, likewise.
        trust: run code that files name, though it is none of kdnas's algorithms.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
    """
    del device, trust
    from kdnas.jobs import rank_check as job
    from kdnas.jobs._arguments import as_run, listed
    from kdnas.specs import parse_spec

    scorers = {name: parse_spec("kdnas.scorers", name) for name in listed(scorer)} or None
    opened = as_run(run, teacher=teacher, data=data)
    return job.rank_check(opened, Path(table), scorers=scorers, column=column, num_images=num_images)


@_computes
def why(
    run: str | Path | Run,
    architecture: str,
    *,
    scorer: str | Spec | None = None,
    num_images: Sample | None = None,
    read_only: bool = False,
    teacher: str | Spec | nn.Module | None = None,
    data: str | Spec | Data | Dataset[Any] | None = None,
    trust: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Explain one subnet: its teacher similarity and cost per stage, and the effect of each choice.

    Args:
        run: the run folder.
        architecture: its code, as the ranking prints it.
        scorer: NAME or NAME,key=value from `kdnas list scorers`; by default the run's.
        num_images: number of images of the search part; by default the run's.
        read_only: write no why.json, from which the report draws it; then another command may be writing the run.
        teacher: the run's own teacher, where it was in memory or lies elsewhere now; see `kdnas run --help`.
        data: the run's own data, likewise.
        trust: run code that files name, though it is none of kdnas's algorithms.
        device: such as cpu or cuda:1 (default: a GPU where there is one).

    Example:
        >>> import tempfile
        >>> options = {"scorer": "params", "steps": 1, "batch_size": 8, "num_evaluations": 4, "deploy": False}
        >>> opened = run(data="digits", space="toy", finalists=1, out=tempfile.mkdtemp(), **options)
        >>> explained = why(opened, opened.ranking()[0].code)
        >>> explained["score"] == opened.ranking()[0].score, len(explained["stages"])
        (True, 4)
    """
    del device, trust
    from kdnas.jobs import why as job
    from kdnas.jobs._arguments import as_run, as_spec

    source = None if scorer is None else as_spec("kdnas.scorers", scorer)
    opened = as_run(run, teacher=teacher, data=data, writes=not read_only)
    return job.why(opened, architecture, scorer=source, num_images=num_images, read_only=read_only)


@_computes
def convert(
    source: str,
    *,
    out: str | Path,
    size: Size | None = None,
    classes: Size = 1000,
    channels: Size | None = None,
    divisor: Side = 0,
    budget: str | Sequence[str] | Budget = (),
    trust: bool = False,
    device: str | None = None,
) -> Any:
    """Turn a trained network into an elastic supernet to start from.

    Args:
        source: torchvision:NAME or timm:NAME (each with @WEIGHTS), checkpoint:FOLDER, or package.module:function.
        out: the folder for the space, the weights and the report.
        size: height and width of the images in pixels (default: the network's own, else 224).
        classes: number of classes of a zoo's network with @WEIGHTS.
        channels: number of image channels (default: the network's own, else 3).
        divisor: widths narrower than the source's are multiples of it; 0 for 8, and for 4 below 64 channels.
        budget: upper bounds of a later search, see `kdnas run --help`; repeatable. Where no subnet is within them,
            nothing is written.
        trust: run code that files name, though it is none of kdnas's algorithms.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
    """
    del device, trust
    from kdnas.jobs._arguments import as_budget
    from kdnas.jobs.convert import convert_source

    options = {"size": size, "classes": classes, "channels": channels, "divisor": divisor}
    return convert_source(source, Path(out), **options, budget=as_budget(budget))


@_computes
def export(
    run: str | Path | Run,
    *,
    forms: str | Sequence[str] = (),
    input: Literal["pixels", "normalised"] = "pixels",
    output: Literal["logits", "probabilities", "coarse_logits"] = "logits",
    place: Count = 1,
    search: Count | None = None,
    out: str | Path | None = None,
    force: bool = False,
    teacher: str | Spec | nn.Module | None = None,
    data: str | Spec | Data | Dataset[Any] | None = None,
    trust: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Write the student of a place of the ranking, with inherited weights; or further forms of a student folder.

    Args:
        run: the run folder, or a student folder, which then gets further forms.
        forms: onnx, pt2 (torch.export), int8 (ONNX), pte (ExecuTorch) and timm, joined by commas; repeatable; by
            default onnx, where its packages are installed. A form that fails is left out, which student.json says.
        input: whether forms take pixels in [0, 1] and normalise them inside, or normalised images.
        output: whether forms return logits, or their softmax; or of segmenters coarse_logits, at the network's stride.
        place: 1-based place in the ranking.
        search: 1-based number of the search whose ranking it is; by default the last finished one.
        out: the student folder; by default RUN/students/place-N, or the student folder itself.
        force: replace a trained student.
        teacher: the run's own teacher, where it was in memory or lies elsewhere now; see `kdnas run --help`.
        data: the run's own data, likewise.
        trust: run code that files name, though it is none of kdnas's algorithms.
        device: such as cpu or cuda:1 (default: a GPU where there is one).

    Example:
        >>> export("no/such/run")
        Traceback (most recent call last):
        ValueError: there is no run no/such/run. Make one with `kdnas run` or `kdnas train`.
    """
    del device, trust
    from kdnas.jobs import export as job
    from kdnas.jobs._arguments import as_run, listed
    from kdnas.students.folder import is_student
    from kdnas.students.forms import Interface

    names, interface = [name for text in listed(forms) for name in text.split(",")], Interface(input, output)
    folder = None if out is None else Path(out)
    if isinstance(run, str | Path) and is_student(Path(run)):
        if place != 1 or search is not None:
            raise ValueError(f"`place` and `search` are of a run, and {run} is a student. Drop them, or name the run.")
        return job.export_forms(Path(run), names, folder or Path(run), interface)
    opened = as_run(run, teacher=teacher, data=data, writes=out is None)
    options = {"forms": names or None, "interface": interface}
    return job.export(opened, place, folder, search=search, force=force, **options)


@_computes
def push(
    student: str | Path, repo: str, *, public: bool = False, revision: str | None = None, trust: bool = False
) -> str:
    """Upload a student folder to the Hugging Face hub; nothing else in kdnas uploads anything.

    It needs the extra `hub` and a login of its own (`hf auth login`). The files of the student are uploaded, which name
    data and teacher, but no paths.

    Args:
        student: a student folder, as `kdnas export` and `kdnas finals` write it.
        repo: OWNER/NAME; it is created where there is none.
        public: create it for everybody to see; by default it is private.
        revision: the branch; by default the main one.
        trust: read a student whose layers are none of kdnas's.

    Example:
        >>> push("no/such/student", "owner/name")
        Traceback (most recent call last):
        ValueError: there is no student no/such/student. Write one with `kdnas export`.
    """
    del trust
    from kdnas.students.hub import push_student

    return push_student(Path(student), repo, private=not public, revision=revision)


@_computes
def latency(
    space: str | Path | SearchSpace,
    *,
    write_script: str | Path,
    target: str = "onnxruntime,threads=1",
    classes: Size | None = None,
    channels: Size | None = None,
    size: Size | None = None,
    num_networks: Count = 10,
    trust: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Write a script that measures the layers of a space on another device, for --latency-table.

    The script needs onnxruntime alone, or torch alone, and no kdnas: `python SCRIPT table.json`.

    Args:
        space: a run folder, whose space is taken as it is; or a TOML table, or a name from `kdnas list spaces`.
        write_script: the Python file to write.
        target: onnxruntime, eager or compile, with threads and batch, such as onnxruntime,threads=4,batch=1.
        classes: of a space that is no run's; by default the table's.
        channels: of the images of a space that is no run's; by default the table's.
        size: height and width of its images; by default the table's.
        num_networks: number of whole networks that are measured, which correct the sums of the layers.
        trust: run code that files name, though it is none of kdnas's algorithms.
        device: such as cpu or cuda:1 (default: a GPU where there is one).

    Example:
        >>> import tempfile
        >>> result = latency("toy", write_script=Path(tempfile.mkdtemp()) / "measure.py", target="eager,threads=1")
        >>> result["layers"] > 10
        True
    """
    del device, trust
    from kdnas.costs.target import Target
    from kdnas.jobs.latency import space_of, write_measuring_script

    searched = space_of(space, classes=classes, channels=channels, size=size)
    return write_measuring_script(searched, Path(write_script), Target.parse(target), num_networks)


@_computes
def retrain(
    student: str | Path,
    *,
    out: str | Path | None = None,
    weights: Literal["fresh", "inherited"] | None = None,
    teacher: str | Spec | nn.Module | NoTeacher | CardTeacher = "card",
    data: str | Spec | Data | Dataset[Any] | None = None,
    greedy_anchors: Factor | None = None,
    assistants: str | None = None,
    distiller: str | Spec | None = None,
    loss: str | Sequence[str] = (),
    force: bool = False,
    insist: bool = False,
    trust: bool = False,
    decoders: Processes | None = None,
    decoded: str | Path | None = None,
    device: str | None = None,
    **recipe: Unpack[RecipeOptions],
) -> dict[str, Any]:
    """Train an exported student, with or without a teacher.

    Args:
        student: a student folder.
        out: the new student folder; by default STUDENT-retrained.
        weights: initial weights: fresh (random) or inherited from the supernet; by default the run's.
        teacher: card for the one that the student's card names, none for the labels alone, or another, see
            `kdnas run --help`.
        data: other data, see `kdnas run --help`; by default the student's.
        greedy_anchors: follow a route of the teacher's snapshots; the next one is the farthest whose divergence is at
            most this multiple of the present one's.
        assistants: auto, or codes of the space joined by commas, largest first.
        distiller: NAME or NAME,key=value from `kdnas list distillers`, such as mutual; by default the run's.
        loss: NAME or NAME=WEIGHT from `kdnas list losses`, perhaps with ,key=value, a distillation loss beside the
            labels; repeatable.
        force: replace the student that `out` holds.
        insist: train although the teacher or the size of the images speaks against it.
        trust: run code that files name, though it is none of kdnas's algorithms.
        decoders: processes that decode images ahead of need, for each training; 0 for none. By default one per core
            that computes nothing, where images are decoded from files. No result depends on it.
        decoded: a folder in which decoded images are stored and read from again. No result depends on it.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
        **recipe: optimizer settings, by default the student's run's.

    Example:
        >>> retrain("no/such/student", steps=10)
        Traceback (most recent call last):
        ValueError: there is no student no/such/student. Write one with `kdnas export`.
    """
    del decoded, decoders, device, insist, trust
    from kdnas.jobs._arguments import as_data, retrain_settings
    from kdnas.jobs._retrain import retrain_with

    student = Path(student)
    settings, source = retrain_settings(
        student, weights=weights, teacher=teacher, distiller=distiller, loss=loss, recipe=recipe
    )
    return retrain_with(
        student,
        settings,
        student.with_name(student.name + "-retrained") if out is None else Path(out),
        greedy_anchors=greedy_anchors,
        assistants=assistants,
        data=None if data is None else as_data(data),
        teacher=source,
        force=force,
    )


@_computes
def prune(
    experiment: str | None = None,
    *,
    out: str | Path,
    data: str | Spec | Data | Dataset[Any] | None = None,
    unlabelled: bool = False,
    task: str | None = None,
    source: str = Prune.source,
    teacher: str | Spec | FitTeacher | nn.Module | None = None,
    budget: str | Sequence[str] | Budget = (),
    method: Literal["shares", "scale_factors"] = Prune.method,
    num_candidates: Count = Prune.num_candidates,
    max_time: Seconds = Prune.max_time,
    divisor: Side = Prune.divisor,
    loss: str | Sequence[str] = (),
    weights: Literal["chosen", "inherited", "fresh"] = Prune.weights,
    controls: bool = Prune.controls,
    penalty: Amount | None = None,
    rounds: Count = Prune.rounds,
    insist: bool = False,
    trust: bool = False,
    decoders: Processes | None = None,
    decoded: str | Path | None = None,
    device: str | None = None,
    **recipe: Unpack[RecipeOptions],
) -> dict[str, Any]:
    """Cut a student out of a trained network within a budget, and retrain it under the teacher.

    Args:
        experiment: a file or name whose function returns a Prune, instead of data and budget.
        out: the run folder.
        data: see `kdnas run --help`.
        unlabelled: learn the teacher's features and no labels, see `kdnas run --help`.
        task: see `kdnas run --help`.
        source: the network to prune: teacher (its own), checkpoint:FOLDER, or as `kdnas convert` takes it.
        teacher: see `kdnas run --help`; by default the source, or fit where none is named.
        budget: upper bounds on params, macs, latency and size, see `kdnas run --help`; repeatable.
        method: shares of each group of channels, searched under the source; or scale_factors, trained under the
            teacher.
        num_candidates: number of removals that are scored.
        max_time: time in which they are scored, in seconds or such as 5m; at least one is.
        divisor: widths are multiples of it; 0 for 8, and for 4 below 64 channels, under a budget on latency, else 1.
        loss: NAME or NAME=WEIGHT from `kdnas list losses`, beside the labels; repeatable; by default the mixture of
            labels and teacher is chosen by trials of a tenth of the steps.
        weights: initial weights of the retraining: inherited, fresh, or chosen by such a trial.
        controls: whether equal shares, random removal and the student without a teacher are retrained whole too.
        penalty: weight of the scale factors' penalty; by default it grows until the budget is met.
        rounds: in which a penalty that grows removes, with training in between.
        insist: train although the teacher or the size of the images speaks against it.
        trust: run code that files name, though it is none of kdnas's algorithms.
        decoders: processes that decode images ahead of need, for each training; 0 for none. By default one per core
            that computes nothing, where images are decoded from files. No result depends on it.
        decoded: a folder in which decoded images are stored and read from again. No result depends on it.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
        **recipe: optimizer settings of all trainings; by default 400 steps at 0.02 with factors, 1000 steps else, and
            batches as of `kdnas run`.

    Example:
        >>> prune(data="digits", budget="memory=5MB", out="runs/pruned")
        Traceback (most recent call last):
        ValueError: a pruning bounds params and macs and latency and size, got a bound on memory. Remove that bound.
    """
    options = locals()
    del decoded, decoders, device, insist, trust

    from kdnas.data.base import Data as DataSet
    from kdnas.jobs import prune as job
    from kdnas.jobs._arguments import (
        as_budget,
        as_seconds,
        as_teacher,
        batch_for,
        load_settings,
        of_task,
        with_overrides,
    )
    from kdnas.jobs._unlabelled import data_of

    overrides: Mapping[str, Any] = recipe
    if experiment is not None:
        _refuse_options(prune, options, "penalty", "recipe")
        settings = load_settings(experiment, Prune)
    elif data is None or not budget:
        raise ValueError("--data and --budget are missing. Give them, or an experiment that holds everything.")
    else:
        if teacher is None:
            teacher, source = ("fit", source) if source == Prune.source else (source, Prune.source)
        teacher_spec = as_teacher(teacher)
        settings = Prune(
            data=data_of(data, teacher_spec, unlabelled=unlabelled),
            budget=as_budget(budget),
            source=source,
            teacher=teacher_spec,
            method=method,
            num_candidates=num_candidates,
            max_time=as_seconds(max_time),
            divisor=divisor,
            controls=controls,
            rounds=rounds,
            weights=weights,
        )
        overrides = batch_for(of_task(settings.data.build(DataSet), task), recipe)
    changes: dict[str, Any] = {
        "recipe": with_overrides(settings.recipe, overrides),
        "retrain": with_overrides(settings.retrain, overrides),
    }
    if isinstance(settings.teacher, FitTeacher):
        fit = with_overrides(settings.teacher.recipe, overrides)
        changes["teacher"] = dataclasses.replace(settings.teacher, recipe=fit)
    if penalty is not None:
        changes["penalty"] = penalty
    settings = dataclasses.replace(settings, **changes)
    return job.prune(_with_losses(settings, loss, unlabelled=unlabelled), Path(out))


@_computes
def quantize(
    student: str | Path,
    *,
    out: str | Path | None = None,
    data: str | Spec | Data | Dataset[Any] | None = None,
    num_images: Count = 256,
    most: Share = 0.02,
    trust: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Write an exported student in 8-bit integers, for ONNX Runtime.

    Args:
        student: a student folder.
        out: the .onnx file; by default STUDENT-int8.onnx.
        data: other data, see `kdnas run --help`; by default the student's.
        num_images: number of training images for calibration.
        most: largest loss of test accuracy that is accepted, as a share of the images.
        trust: run code that files name, though it is none of kdnas's algorithms.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
    """
    del device, trust
    from kdnas.jobs._arguments import as_data
    from kdnas.jobs.quantize import quantize_student

    student = Path(student)
    place = student.with_name(student.name + "-int8.onnx") if out is None else Path(out)
    source = None if data is None else as_data(data)
    return quantize_student(student, place, data=source, num_images=num_images, most=most)


@_computes
def compare(
    *,
    data: str | Spec = "digits",
    unlabelled: bool = False,
    space: str | Path | SearchSpace = "digits",
    teacher: str | Spec | FitTeacher = "fit",
    systems: str = "all",
    budget: str | Sequence[str] | Budget = (),
    max_time: Seconds = Compare.max_time,
    seed: Seed = Compare.seed,
    out: str | Path = Path("runs/compare"),
    storage: str | None = None,
    insist: bool = False,
    trust: bool = False,
    decoders: Processes | None = None,
    decoded: str | Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Compare systems on the same data, under one teacher and budget, at equal cost.

    Args:
        data: see `kdnas run --help`.
        unlabelled: learn the teacher's features and no labels; the data's labels measure the students.
        space: a TOML table, or a name from `kdnas list spaces`.
        teacher: see `kdnas run --help`.
        systems: all, or names from `kdnas list systems` joined by commas.
        budget: upper bounds: params=2M, macs=6e8, memory=256KiB; repeatable.
        max_time: time for everything, in seconds or such as 20m.
        seed: random seed of every system.
        out: the folder of the comparison.
        storage: URL of a database, such as postgresql://me@host/name; the same command on any hosts that share the
            folder joins the comparison.
        insist: train although the teacher or the size of the images speaks against it.
        trust: run code that files name, though it is none of kdnas's algorithms.
        decoders: processes that decode images ahead of need, for each training; 0 for none. By default one per core
            that computes nothing, where images are decoded from files. No result depends on it.
        decoded: a folder in which decoded images are stored and read from again. No result depends on it.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
    """
    del decoded, decoders, device, insist, trust
    from kdnas.jobs import compare as job
    from kdnas.jobs._arguments import as_budget, as_seconds, as_space, as_teacher
    from kdnas.jobs._unlabelled import data_of

    teacher_spec = as_teacher(teacher)
    settings = Compare(
        data=data_of(data, teacher_spec, unlabelled=unlabelled),
        space=as_space(space),
        teacher=teacher_spec,
        systems=() if systems == "all" else tuple(systems.split(",")),
        budget=as_budget(budget),
        max_time=as_seconds(max_time),
        seed=seed,
    )
    return job.compare(settings, Path(out)) if storage is None else job.shared_compare(settings, Path(out), storage)


@_computes
def grow(
    experiment: str | None = None,
    *,
    out: str | Path,
    data: str | Spec | Data | Dataset[Any] | None = None,
    space: str | Path | SearchSpace | None = None,
    num_members: Count | None = None,
    generator: Literal["simple", "dynamic", "random"] | None = None,
    teacher: Literal["ensemble", "last", "none"] | None = None,
    mixture: Literal["uniform", "learned"] | None = None,
    architecture: str | None = None,
    budget: str | Sequence[str] | Budget = (),
    controls: bool = Grow.controls,
    insist: bool = False,
    trust: bool = False,
    decoders: Processes | None = None,
    decoded: str | Path | None = None,
    device: str | None = None,
    **recipe: Unpack[RecipeOptions],
) -> dict[str, Any]:
    """Grow an ensemble in which each member is taught by the earlier ones; one student folder.

    Args:
        experiment: a file or name whose function returns a Grow, such as adanas:small, instead of data and space.
        out: the run folder.
        data: see `kdnas run --help`.
        space: a TOML table, or a name from `kdnas list spaces`.
        num_members: number of subnets of the finished ensemble; by default 3.
        generator: how candidates are proposed; by default dynamic.
        teacher: teacher of a candidate: the ensemble so far, the last member or none; by default ensemble.
        mixture: weights of the members; by default uniform.
        architecture: code of the first member; by default the smallest network.
        budget: upper bounds on the whole ensemble: params=2M, macs=6e8; repeatable.
        controls: whether to train the controls too.
        insist: train although the teacher or the size of the images speaks against it.
        trust: run code that files name, though it is none of kdnas's algorithms.
        decoders: processes that decode images ahead of need, for each training; 0 for none. By default one per core
            that computes nothing, where images are decoded from files. No result depends on it.
        decoded: a folder in which decoded images are stored and read from again. No result depends on it.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
        **recipe: optimizer settings of every candidate; by default the experiment's.
    """
    del decoded, decoders, device, insist, trust

    from kdnas.jobs import grow as job
    from kdnas.jobs._arguments import as_budget, as_data, as_space, load_settings, with_overrides

    options = {"num_members": num_members, "generator": generator, "teacher": teacher, "mixture": mixture}
    options |= {"architecture": architecture, "controls": None if controls else False}
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if data is not None:
        changes["data"] = as_data(data)
    if space is not None:
        changes["space"] = as_space(space)
    if budget:
        changes["budget"] = as_budget(budget)
    if experiment is not None:
        settings = dataclasses.replace(load_settings(experiment, Grow), **changes)
    else:
        for name in ("data", "space"):
            if name not in changes:
                raise ValueError(f"--{name} is missing. Give it, or an experiment that holds everything.")
        settings = Grow(**changes)
    return job.grow(dataclasses.replace(settings, recipe=with_overrides(settings.recipe, recipe)), Path(out))


def report(run: str | Path | Sequence[str | Path], *, out: str | Path = Path("runs.html")) -> Path:
    """Write a run's report, one self-contained HTML file; of several runs, one page that compares them.

    Args:
        run: the run folder; several are compared.
        out: the page of a comparison; the report of a single run is in its folder.

    Example:
        >>> report("no/such/run")
        Traceback (most recent call last):
        ValueError: there is no run no/such/run. Make one with `kdnas run` or `kdnas train`.
    """
    from kdnas.report import write_report, write_side_by_side
    from kdnas.runs.folder import RunFolder

    paths = [run] if isinstance(run, str | Path) else run
    folders = [RunFolder(Path(path), builds=False).folder for path in paths]
    return write_report(folders[0]) if len(folders) == 1 else write_side_by_side(folders, Path(out))


def track(
    run: str | Path,
    *,
    to: Literal["tensorboard", "wandb", "mlflow"],
    follow: bool = False,
    online: bool = False,
) -> dict[str, Any]:
    """Write a run's metrics and results to a tracker; the same call later writes what is new, and nothing twice.

    Args:
        run: the run folder, whose training may be going on.
        to: the tracker; its files are in RUN/tracking.
        follow: go on until the run has a student.
        online: send to the tracker's server, as its own environment variables say.

    Example:
        >>> track("no/such/run", to="tensorboard")
        Traceback (most recent call last):
        ValueError: there is no run no/such/run. Make one with `kdnas run` or `kdnas train`.
    """
    from kdnas.jobs import track as job

    return job.track(Path(run), to, follow=follow, online=online)


@_computes
def taps(
    teacher: str,
    space: str,
    *,
    data: str = "digits",
    unlabelled: bool = False,
    by: Literal["resolution", "rdm", "order", "classified"] = "resolution",
    trust: bool = False,
    device: str | None = None,
) -> str:
    """Print which student stage is compared with which teacher stage, and by which adapter.

    Args:
        teacher: torchvision:NAME, timm:NAME, checkpoint:FOLDER or package.module:function.
        space: a TOML table, or a name from `kdnas list spaces`.
        data: the data whose image size and channels are used; see `kdnas run --help`.
        unlabelled: the teacher gives features and no classes.
        by: how stages are paired.
        trust: run code that files name, though it is none of kdnas's algorithms.
        device: such as cpu or cuda:1 (default: a GPU where there is one).
    """
    del device, trust
    from kdnas.jobs.taps import taps_table

    return taps_table(teacher, space, data, by, unlabelled=unlabelled)


def listed(
    what: Literal["spaces", "losses", "distillers", "scorers", "searchers", "data", "experiments", "systems"],
) -> str:
    """Print what there is of a kind, one line each.

    Args:
        what: the kind.
    """
    from kdnas.jobs.listing import listing

    return listing(what)


def check_losses(*, check: bool = False) -> bool:
    """Compute every loss's reference value on this torch build and compare.

    Args:
        check: compute and compare, the only action of this command.
    """
    from kdnas.losses import check as job

    if not check:
        raise ValueError("--check is missing: it is the only action of this command.")
    rows = job.check()
    show(job.table(rows))
    return all(row.matches for row in rows)


def report_command(student: str | Path) -> str:
    """The command that writes the report of the run that a student lies in; empty outside of a run."""
    from kdnas.runs.folder import run_around

    storage = run_around(Path(student))
    return "" if storage is None else f"kdnas report {storage.folder}"


class _Handler(logging.Handler):
    """Messages as they are, warnings marked, on whatever `sys.stderr` is now."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "warning: " if record.levelno >= logging.WARNING else ""
        show(mark + self.format(record), sys.stderr)


def _log_to_stderr() -> None:
    """Show messages of kdnas, unless the program has configured the logger `kdnas` itself."""
    logger = logging.getLogger("kdnas")
    if not logger.handlers and logger.level == logging.NOTSET:
        logger.addHandler(_Handler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


_log_to_stderr()
