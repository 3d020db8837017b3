"""The command line. Only the standard library is imported here, so that help and errors come at once."""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Recipe's fields, mirrored by a test: reading them from the dataclass would import torch.
RECIPE: dict[str, tuple[type, str]] = {
    "steps": (int, "optimiser steps"),
    "batch_size": (int, "images per step"),
    "optimizer": (str, "sgd or adamw"),
    "learning_rate": (float, "the peak learning rate"),
    "weight_decay": (float, "weight decay on weights of two and more dimensions"),
    "warmup": (float, "share of the steps in which the rate rises"),
    "floor": (float, "share of the peak at which the cosine ends"),
    "clip": (float, "largest norm of the gradient, 0 for none"),
    "precision": (str, "float32 or bfloat16"),
    "seed": (int, "of weights, order, augmentation and sampling"),
}
LISTED = ("spaces", "losses", "distillers", "scorers", "searchers", "data", "experiments", "systems")


class _Parser(argparse.ArgumentParser):
    """Offers the nearest name for a misspelt option or command; errors end with exit code 2."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        hint = ""
        for word in message.replace(",", " ").split():
            close = difflib.get_close_matches(word, known, n=1) if word.startswith("--") else []
            if close and close[0] != word:
                hint = f" Did you mean {close[0]}?"
        if "invalid choice" in message:
            asked = message.partition("invalid choice: '")[2].partition("'")[0]
            choices = message.partition("choose from ")[2].rstrip(")").replace("'", "").split(", ")
            close = difflib.get_close_matches(asked, choices, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
        print(f"kdnas: {message}.{hint} See `{self.prog} --help`.", file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    made = _Parser(prog="kdnas", description="Find the student architecture that learns best from your teacher.")
    made.add_argument("--version", action="store_true", help="print the version")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    demo = command("demo", _demo, "the whole chain on scikit-learn's digits, in about two minutes on two CPU cores")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="the run folder")

    whole = command("run", _run, "the whole chain on your own data, teacher, space and budget")
    whole.add_argument("--experiment", help="take everything from an experiment instead, see `kdnas list experiments`")
    whole.add_argument(
        "--data",
        help="digits, folder:PATH, cifar10:PATH, cifar100:PATH, module:function; strong: before it augments more",
    )
    whole.add_argument(
        "--teacher",
        default="fit",
        help="fit, torchvision:NAME, timm:NAME (either @weights.safetensors), checkpoint:FOLDER, module:function, "
        "ensemble:SPEC,SPEC, ensemble:SPEC=2,SPEC=1, ensemble+logits:, ensemble+random:, ensemble+reliable: alike, "
        "route:SPEC,SPEC, streamed:SPEC",
    )
    whole.add_argument("--teacher-members", type=int, default=1, help="how many teachers fit trains, as an ensemble")
    whole.add_argument("--space", help="a TOML table, or a name from `kdnas list spaces`")
    whole.add_argument("--out", type=Path, required=True, help="the run folder")
    whole.add_argument(
        "--distiller",
        default="sandwich",
        help="how the supernet learns, see `kdnas list distillers`; none for no supernet",
    )
    whole.add_argument("--weights", type=Path, help="a safetensors file the supernet starts from; see `kdnas convert`")
    _loss_option(whole)
    _search_options(whole)
    _recipe_options(whole)

    train = command("train", _train, "train a supernet; on an existing run of the same experiment, resume")
    train.add_argument("experiment", help="a Python file that defines experiment(), or a name from experiments/")
    train.add_argument("--out", type=Path, required=True, help="the run folder")
    _loss_option(train)
    _recipe_options(train)

    search = command("search", _search, "rank subnets of a run by teacher similarity; appends to its ranking")
    search.add_argument("folder", type=Path, metavar="RUN", help="the run folder")
    _search_options(search)
    search.add_argument(
        "--exact", action="store_true", help="rate every path of every block once, of a run trained block_wise"
    )
    search.add_argument("--initial", type=int, help="begin with so many of the best of the run's search before")
    search.add_argument("--top", type=int, default=10, help="places to print")
    search.add_argument(
        "--front", action="store_true", help="print the front of score, MACs and params instead of the best"
    )
    search.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    check = command(
        "rank-check", _rank_check, "a run's scores against a table of true accuracies, controls beside them"
    )
    check.add_argument("folder", type=Path, metavar="RUN", help="the run folder")
    check.add_argument("table", type=Path, metavar="TABLE.csv", help="codes in the column arch, or in the first one")
    check.add_argument("--scorer", action="append", default=[], help="NAME or NAME,key=value; repeatable")
    check.add_argument("--column", default="mean_acc", help="of the true accuracies")
    check.add_argument("--num-images", type=int, help="of the search part (default: as many as the run's search)")
    check.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    why = command("why", _why, "explain one subnet: teacher similarity and cost per stage, and what each choice does")
    why.add_argument("folder", type=Path, metavar="RUN", help="the run folder")
    why.add_argument("architecture", metavar="ARCHITECTURE", help="its code, as the ranking prints it")
    why.add_argument("--scorer", help="NAME or NAME,key=value (default: the run's)")
    why.add_argument("--num-images", type=int, help="of the search part (default: as many as the run's search)")
    why.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    convert = command("convert", _convert, "turn a trained network into an elastic supernet to start from")
    convert.add_argument("source", help="torchvision:NAME, timm:NAME (either @weights.safetensors), module:function")
    convert.add_argument("--out", type=Path, required=True, help="the folder for the space, the weights, the report")
    convert.add_argument("--size", type=int, default=224, help="height and width of the images")
    convert.add_argument("--classes", type=int, default=1000, help="how many a zoo's network knows")
    convert.add_argument("--channels", type=int, default=3, help="channels of the images")

    export = command("export", _export, "write the student of a place of the ranking")
    export.add_argument("folder", type=Path, metavar="RUN", help="the run folder")
    export.add_argument("--place", type=int, default=1, help="1 is the best")
    export.add_argument("--out", type=Path, help="the student folder (default: RUN/students/place-N)")
    export.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    retrain = command("retrain", _retrain, "train an exported student, with or without a teacher")
    retrain.add_argument("student", type=Path, metavar="STUDENT", help="a student folder")
    retrain.add_argument("--out", type=Path, help="the new student folder (default: beside it, -retrained)")
    retrain.add_argument("--weights", choices=("fresh", "inherited"), help="where to start")
    retrain.add_argument("--teacher", help="another teacher, see `kdnas run --help`, or none for the labels alone")
    retrain.add_argument("--data", help="other data, see `kdnas run --help`")
    retrain.add_argument(
        "--greedy-anchors",
        type=float,
        metavar="THRESHOLD",
        help="along a route of the teacher's snapshots, next the farthest whose divergence is at most so many times",
    )
    retrain.add_argument("--assistants", help="auto, or codes of the space joined by commas, largest first")
    retrain.add_argument("--distiller", help="NAME or NAME,key=value, such as mutual; see `kdnas list distillers`")
    _loss_option(retrain)
    retrain.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    _recipe_options(retrain)

    pruned = command("prune", _prune, "a student cut out of a network by scale factors trained under the teacher")
    pruned.add_argument("experiment", nargs="?", help="a file or name whose function returns a Prune")
    pruned.add_argument("--data", help="see `kdnas run --help`")
    pruned.add_argument(
        "--source", default="teacher", help="teacher, checkpoint:FOLDER, or as `kdnas convert` takes it"
    )
    pruned.add_argument("--teacher", default="fit", help="see `kdnas run --help`")
    pruned.add_argument("--penalty", type=float, help="of the factors (default: grows until the budget is met)")
    pruned.add_argument(
        "--budget", action="append", default=[], metavar="NAME=BOUND", help="params=…, macs=…; repeatable"
    )
    pruned.add_argument("--out", type=Path, required=True, help="the run folder")
    pruned.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    _recipe_options(pruned)

    quantize = command("quantize", _quantize, "write an exported student in 8-bit integers, for ONNX Runtime")
    quantize.add_argument("student", type=Path, metavar="STUDENT", help="a student folder")
    quantize.add_argument("--out", type=Path, help="the .onnx file (default: beside it, -int8.onnx)")
    quantize.add_argument("--data", help="other data")
    quantize.add_argument("--num-images", type=int, default=256, help="for calibration")
    quantize.add_argument("--most", type=float, default=0.02, help="largest loss of accuracy that is accepted")
    quantize.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    compare = command("compare", _compare, "systems on the same data, under one teacher and budget, at equal cost")
    compare.add_argument("--data", default="digits", help="see `kdnas run --help`")
    compare.add_argument("--space", default="digits", help="a TOML table, or a name from `kdnas list spaces`")
    compare.add_argument("--teacher", default="fit", help="see `kdnas run --help`")
    compare.add_argument("--systems", default="all", help="all, or names from `kdnas list systems` joined by commas")
    compare.add_argument(
        "--budget", action="append", default=[], metavar="NAME=BOUND", help="params=…, macs=…; repeatable"
    )
    compare.add_argument("--max-time", type=_seconds, default=1200.0, help="for everything, such as 20m")
    compare.add_argument("--seed", type=int, default=0, help="of every system")
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), help="the folder of the comparison")
    compare.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    grown = command("grow", _grow, "grow an ensemble, each member taught by those before it; one student folder")
    text = "a file or name whose function returns a Grow, such as adanas:small"
    grown.add_argument("experiment", nargs="?", help=text)
    grown.add_argument("--data", help="digits, folder:PATH, cifar10:PATH, cifar100:PATH, module:function")
    grown.add_argument("--space", help="a TOML table, or a name from `kdnas list spaces`")
    grown.add_argument("--out", type=Path, required=True, help="the folder of the growth")
    grown.add_argument("--num-members", type=int, help="subnets of the finished ensemble")
    grown.add_argument("--generator", help="who is tried next: simple, dynamic or random")
    grown.add_argument("--teacher", help="of a candidate: ensemble, last (born again) or none")
    grown.add_argument("--mixture", help="weights of the members: uniform or learned")
    grown.add_argument("--architecture", help="code of the first member (default: the smallest network)")
    grown.add_argument("--budget", action="append", default=[], metavar="NAME=BOUND", help="of the whole ensemble")
    grown.add_argument("--no-controls", dest="controls", action="store_const", const=False, help="the ensemble alone")
    grown.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    _recipe_options(grown)

    report = command("report", _report, "write the run's report, one self-contained HTML file")
    report.add_argument("folder", type=Path, metavar="RUN", help="the run folder")

    listed = command("list", _list, "what there is, one line each")
    listed.add_argument("what", choices=LISTED)

    losses = command("losses", _losses, "check every loss's known value on this torch build")
    losses.add_argument("--check", action="store_true", required=True, help="compute and compare")

    taps = command("taps", _taps, "which student stage is compared with which teacher stage, and by what adapter")
    taps.add_argument("teacher", help="torchvision:NAME, timm:NAME, checkpoint:FOLDER or module:function")
    taps.add_argument("space", help="a TOML table, or a name from `kdnas list spaces`")
    taps.add_argument("--data", default="digits", help="what the images are like; see `kdnas run --help`")
    taps.add_argument("--by", default="resolution", choices=("resolution", "rdm", "order"), help="how to pair")
    return made


def _commands(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(a.choices for a in of._actions if isinstance(a, argparse._SubParsersAction))


def _loss_option(to: argparse.ArgumentParser) -> None:
    text = "a distillation loss beside the labels; may be repeated; see `kdnas list losses`"
    to.add_argument("--loss", action="append", default=[], metavar="NAME[=WEIGHT]", help=text)


def _recipe_options(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("training")
    for name, (kind, text) in RECIPE.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def _search_options(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("search")
    group.add_argument("--scorer", help="NAME or NAME,key=value; see `kdnas list scorers`")
    group.add_argument("--searcher", help="NAME or NAME,key=value; see `kdnas list searchers`")
    group.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="NAME=BOUND",
        help="params=2M, macs=6e8, memory=256KiB (activations), latency=5ms; repeatable",
    )
    group.add_argument("--contrast", metavar="SCORER", help="run the same search under this scorer too, and compare")
    group.add_argument(
        "--pruner", help="stop evaluations early: successive_halving, hyperband, median … of Optuna, or NAME,key=value"
    )
    group.add_argument("--num-evaluations", type=int, help="unique architectures to score")
    group.add_argument("--max-time", type=_seconds, help="such as 300s or 20m")


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        return float(number) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"a time is a number and s, m or h, such as 300s, got {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a mistake of the user ends with a message and exit code 2, never with a traceback."""
    made = parser()
    given, unknown = made.parse_known_args(arguments)
    if unknown:
        # The command's own parser knows the options that the misspelt one may be near.
        asked = made if given.command is None else _commands(made)[given.command]
        asked.error(f"unrecognized arguments: {' '.join(unknown)}")
    sys.path.insert(0, str(Path.cwd()))  # package.module:function is looked for where the user stands
    if given.version:
        from importlib.metadata import version

        print(version("kdnas"))
        return
    if given.command is None:
        made.print_help()
        return
    for name, value in vars(given).items():
        if value == "" or (isinstance(value, list) and "" in value):
            asked = _commands(made)[given.command]
            asked.error(f"--{name.replace('_', '-')} is empty; give a value, or leave it out")
    try:
        given.run(given)
    except (ValueError, FloatingPointError) as error:
        print(f"kdnas {given.command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"kdnas {given.command}: {place}{error.strerror or error}. Check the path and the disk.", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"kdnas {given.command}: stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        raise SystemExit(130) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _demo(given: argparse.Namespace) -> None:
    print(
        "kdnas demo: teacher, supernet, ranking, export, retraining on scikit-learn's digits (two minutes)", flush=True
    )
    from kdnas.jobs._arguments import load_experiment

    _chain(load_experiment("demo"), given.out)


def _chain(experiment: Any, out: Path) -> None:
    from kdnas.jobs.chain import chain, closing_table

    run = chain(experiment, out)
    print(closing_table(run.storage))


def _run(given: argparse.Namespace) -> None:
    _say(f"kdnas run: {given.experiment or given.data} into {given.out}")
    if given.experiment is not None:
        from kdnas.jobs._arguments import load_experiment

        asked = [name for name in ("data", "space", *RECIPE) if getattr(given, name) is not None]
        if asked:
            raise ValueError(f"an experiment holds everything. Drop --{asked[0].replace('_', '-')}, or --experiment.")
        _chain(load_experiment(given.experiment), given.out)
        return
    for name in ("data", "space"):
        if getattr(given, name) is None:
            raise ValueError(f"--{name} is missing. Give it, or an --experiment that holds everything.")
    import dataclasses

    from kdnas.data.base import Data
    from kdnas.data.load import load_data
    from kdnas.jobs._arguments import with_losses, with_overrides
    from kdnas.settings import Experiment, FitTeacher, Recipe, Retrain, Search, Train
    from kdnas.specs import parse_spec
    from kdnas.tables import load_space
    from kdnas.teachers.load import load_teacher

    space = load_space(given.space)
    data = load_data(given.data)
    teacher = load_teacher(given.teacher)
    if not isinstance(teacher, FitTeacher) and given.teacher_members != 1:
        raise ValueError("--teacher-members counts the teachers that fit trains. Drop it, or use --teacher fit.")
    distiller = None if given.distiller == "none" else parse_spec("kdnas.distillers", given.distiller)
    distiller = with_losses(distiller, given.loss)
    search = _search_settings(given, Search())
    if given.seed is not None:
        search = dataclasses.replace(search, seed=given.seed)
    _say(f"search space {space.name}: {space.count():,} architectures, {len(space.choices)} choices")
    loaded = data.build(Data)
    # Long enough to learn something, short enough to try: thirty epochs, between 300 and 20,000 steps.
    batch = given.batch_size or min(128, len(loaded.train))
    steps = min(20_000, max(300, 30 * len(loaded.train) // batch))
    recipe = with_overrides(Recipe(steps=steps, batch_size=batch), _overrides(given))
    if isinstance(teacher, FitTeacher):
        teacher = FitTeacher(recipe=recipe, members=given.teacher_members)
    experiment = Experiment(
        train=Train(
            space=space,
            data=data,
            teacher=teacher,
            distiller=distiller,
            recipe=recipe,
            weights="" if given.weights is None else str(given.weights.resolve()),
        ),
        search=search,
        retrain=Retrain(recipe=recipe),
    )
    _chain(experiment, given.out)


def _overrides(given: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(given, name) for name in RECIPE}


def _search_settings(given: argparse.Namespace, default: Any) -> Any:
    import dataclasses

    from kdnas.costs.budget import Budget
    from kdnas.specs import parse_spec

    changed: dict[str, Any] = {}
    if given.scorer:
        changed["scorer"] = parse_spec("kdnas.scorers", given.scorer)
    if given.searcher:
        changed["searcher"] = parse_spec("kdnas.searchers", given.searcher)
    if given.contrast:
        changed["contrast"] = parse_spec("kdnas.scorers", given.contrast)
    if given.pruner:
        from kdnas.ranking.early_stopping import pruner_named

        changed["pruner"] = pruner_named(given.pruner)
    if given.scorer or given.searcher:
        changed["exact"] = False
    if given.budget:
        changed["budget"] = Budget.parse(given.budget)
    changed |= {n: getattr(given, n) for n in ("num_evaluations", "max_time") if getattr(given, n) is not None}
    return dataclasses.replace(default, **changed)


def _train(given: argparse.Namespace) -> None:
    _say(f"kdnas train: {given.experiment} into {given.out}")
    import dataclasses

    from kdnas.jobs._arguments import load_experiment, with_losses, with_overrides
    from kdnas.jobs.train import train

    experiment = load_experiment(given.experiment)
    recipe = with_overrides(experiment.train.recipe, _overrides(given))
    distiller = with_losses(experiment.train.distiller, given.loss)
    settings = dataclasses.replace(experiment.train, recipe=recipe, distiller=distiller)
    experiment = dataclasses.replace(experiment, train=settings)
    space = experiment.train.space
    _say(f"search space {space.name}: {space.count():,} architectures, {len(space.choices)} choices")
    run = train(experiment, given.out)
    print(json.dumps(run.storage.phase("train")))
    _say(f"next: kdnas search {given.out}")


def _search(given: argparse.Namespace) -> None:
    _say(f"kdnas search: {given.folder}")
    import dataclasses

    from kdnas.jobs._run import Run
    from kdnas.jobs.search import ranking_json, ranking_table, search
    from kdnas.ranking.order import front_of

    run = Run(given.folder)
    settings = _search_settings(given, run.experiment.search)
    if given.exact:
        settings = dataclasses.replace(settings, exact=True)
    if given.initial is not None:
        settings = dataclasses.replace(settings, initial=given.initial)
    entries = search(run, settings)
    shown, top = (front_of(entries), len(entries)) if given.front else (entries, given.top)
    print(ranking_json(run.storage, shown, top) if given.json else ranking_table(run.storage, shown, top))
    _say(f"next: kdnas export {given.folder} --place 1")


def _rank_check(given: argparse.Namespace) -> None:
    _say(f"kdnas rank-check: {given.folder} against {given.table}")
    from kdnas.jobs._run import Run
    from kdnas.jobs.rank_check import rank_check, rank_check_table
    from kdnas.specs import parse_spec

    scorers = {name: parse_spec("kdnas.scorers", name) for name in given.scorer} or None
    found = rank_check(
        Run(given.folder), given.table, scorers=scorers, column=given.column, num_images=given.num_images
    )
    print(json.dumps(found) if given.json else rank_check_table(found))


def _why(given: argparse.Namespace) -> None:
    _say(f"kdnas why: {given.architecture} of {given.folder}")
    from kdnas.jobs._run import Run
    from kdnas.jobs.why import why, why_table
    from kdnas.specs import parse_spec

    scorer = parse_spec("kdnas.scorers", given.scorer) if given.scorer else None
    found = why(Run(given.folder), given.architecture, scorer=scorer, num_images=given.num_images)
    print(json.dumps(found) if given.json else why_table(found))
    _say(f"next: kdnas report {given.folder}")


def _convert(given: argparse.Namespace) -> None:
    _say(f"kdnas convert: {given.source} into {given.out}")
    from kdnas.jobs.convert import SPACE, WEIGHTS, convert_source

    options = {"size": given.size, "classes": given.classes, "channels": given.channels}
    print(convert_source(given.source, given.out, **options))
    _say(f"next: kdnas run --space {given.out / SPACE} --weights {given.out / WEIGHTS} --data DATA --out RUN")


def _export(given: argparse.Namespace) -> None:
    _say(f"kdnas export: place {given.place} of {given.folder}")
    from kdnas.jobs._run import Run
    from kdnas.jobs.export import export

    found = export(Run(given.folder), given.place, given.out)
    print(json.dumps(found) if given.json else _lines(found))
    _say(f"next: kdnas retrain {found['student']}")


def _retrain(given: argparse.Namespace) -> None:
    out = given.out or given.student.with_name(given.student.name + "-retrained")
    _say(f"kdnas retrain: {given.student} into {out}")
    import dataclasses

    from kdnas.data.load import load_data
    from kdnas.distillers.base import Distiller
    from kdnas.distillers.from_labels import FromLabels
    from kdnas.jobs._arguments import terms_of, with_losses, with_overrides
    from kdnas.jobs.retrain import retrain, settings_of
    from kdnas.runs.folder import run_around
    from kdnas.settings import FitTeacher
    from kdnas.specs import parse_spec, spec
    from kdnas.teachers.load import load_teacher

    storage = run_around(given.student)
    settings = settings_of(given.student)
    settings = dataclasses.replace(settings, recipe=with_overrides(settings.recipe, _overrides(given)))
    if given.weights:
        settings = dataclasses.replace(settings, weights=given.weights)
    if given.teacher == "fit":
        raise ValueError(
            "fit trains a teacher in a run, and a student is retrained under a finished one. Drop --teacher for its "
            "run's, or name another."
        )
    if given.distiller is not None:
        made = with_losses(parse_spec("kdnas.distillers", given.distiller), given.loss)
        assert made is not None
        settings = dataclasses.replace(settings, distiller=made)
    elif given.loss:
        settings = dataclasses.replace(settings, distiller=terms_of(given.loss))
    elif given.teacher == "none":
        settings = dataclasses.replace(settings, distiller=spec(FromLabels))
    asks = settings.distiller.build(Distiller).uses_teacher
    if given.teacher == "none" and asks:
        what = "--distiller" if given.distiller is not None else "--loss"
        raise ValueError(f"without a teacher there is nothing to distil. Drop {what}, or --teacher none.")
    if given.teacher not in (None, "none") and not asks:
        raise ValueError(f"{settings.distiller.name} asks no teacher. Drop --teacher, or name another --distiller.")
    teacher = load_teacher(given.teacher) if given.teacher not in (None, "none") else None
    assert not isinstance(teacher, FitTeacher)
    data = None if given.data is None else load_data(given.data)
    if given.assistants and given.greedy_anchors is not None:
        raise ValueError("a student learns from assistants or along a route. Drop one of the two.")
    if given.greedy_anchors is not None:
        from kdnas.jobs._anchors import retrain_along

        found = retrain_along(given.student, settings, out, threshold=given.greedy_anchors, data=data, teacher=teacher)
    elif given.assistants:
        from kdnas.jobs._assist import retrain_assisted

        found = retrain_assisted(given.student, settings, out, given.assistants, data=data, teacher=teacher)
    else:
        found = retrain(given.student, settings, out, data=data, teacher=teacher)
    print(json.dumps(found) if given.json else _lines(found))
    if storage is not None:
        _say(f"next: kdnas report {storage.folder}")


def _prune(given: argparse.Namespace) -> None:
    _say(f"kdnas prune: {given.experiment or given.data} into {given.out}")
    import dataclasses

    from kdnas.costs.budget import Budget
    from kdnas.data.load import load_data
    from kdnas.jobs._arguments import load_settings, with_overrides
    from kdnas.jobs.chain import closing_table
    from kdnas.jobs.prune import prune
    from kdnas.runs.folder import RunFolder
    from kdnas.settings import FitTeacher, Prune
    from kdnas.teachers.load import load_teacher

    if given.experiment is not None:
        settings = load_settings(given.experiment, Prune)
    elif given.data is None or not given.budget:
        raise ValueError("--data and --budget are missing. Give them, or an experiment that holds everything.")
    else:
        data, budget, teacher = load_data(given.data), Budget.parse(given.budget), load_teacher(given.teacher)
        settings = Prune(data=data, budget=budget, source=given.source, teacher=teacher)
    overrides = _overrides(given)
    settings = dataclasses.replace(
        settings,
        recipe=with_overrides(settings.recipe, overrides),
        retrain=dataclasses.replace(settings.retrain, recipe=with_overrides(settings.retrain.recipe, overrides)),
    )
    if isinstance(settings.teacher, FitTeacher):
        fit = with_overrides(settings.teacher.recipe, overrides)
        settings = dataclasses.replace(settings, teacher=dataclasses.replace(settings.teacher, recipe=fit))
    if given.penalty is not None:
        settings = dataclasses.replace(settings, penalty=given.penalty)
    found = prune(settings, given.out)
    print(json.dumps(found) if given.json else closing_table(RunFolder(given.out)))


def _quantize(given: argparse.Namespace) -> None:
    out = given.out or given.student.with_name(given.student.name + "-int8.onnx")
    _say(f"kdnas quantize: {given.student} into {out}")
    from kdnas.data.load import load_data
    from kdnas.jobs.quantize import quantize_student

    data = None if given.data is None else load_data(given.data)
    found = quantize_student(given.student, out, data=data, num_images=given.num_images, most=given.most)
    print(json.dumps(found) if given.json else _lines(found))


def _compare(given: argparse.Namespace) -> None:
    _say(f"kdnas compare: {given.systems} systems on {given.data} into {given.out}")
    from kdnas.costs.budget import Budget
    from kdnas.data.load import load_data
    from kdnas.jobs.compare import compare, comparison_table
    from kdnas.settings import Compare
    from kdnas.tables import load_space
    from kdnas.teachers.load import load_teacher

    settings = Compare(
        data=load_data(given.data),
        space=load_space(given.space),
        teacher=load_teacher(given.teacher),
        systems=() if given.systems == "all" else tuple(given.systems.split(",")),
        budget=Budget.parse(given.budget),
        max_time=given.max_time,
        seed=given.seed,
    )
    found = compare(settings, given.out)
    print(json.dumps(found) if given.json else comparison_table(found))
    _say(f"report: {given.out / 'report.html'}")


def _grow(given: argparse.Namespace) -> None:
    _say(f"kdnas grow: {given.experiment or given.data} into {given.out}")
    import dataclasses

    from kdnas.costs.budget import Budget
    from kdnas.data.load import load_data
    from kdnas.jobs._arguments import load_settings, with_overrides
    from kdnas.jobs.chain import closing_table
    from kdnas.jobs.grow import grow
    from kdnas.runs.folder import RunFolder
    from kdnas.settings import Grow
    from kdnas.tables import load_space

    changed: dict[str, Any] = {}
    for name in ("num_members", "generator", "teacher", "mixture", "architecture", "controls"):
        if getattr(given, name) is not None:
            changed[name] = getattr(given, name)
    if given.data is not None:
        changed["data"] = load_data(given.data)
    if given.space is not None:
        changed["space"] = load_space(given.space)
    if given.budget:
        changed["budget"] = Budget.parse(given.budget)
    if given.experiment is not None:
        settings = dataclasses.replace(load_settings(given.experiment, Grow), **changed)
    else:
        for name in ("data", "space"):
            if name not in changed:
                raise ValueError(f"--{name} is missing. Give it, or an experiment that holds everything.")
        settings = Grow(**changed)
    settings = dataclasses.replace(settings, recipe=with_overrides(settings.recipe, _overrides(given)))
    found = grow(settings, given.out)
    print(json.dumps(found) if given.json else closing_table(RunFolder(given.out)))
    _say(f"next: kdnas retrain {found['student']} --teacher none --weights inherited")


def _lines(found: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)

    return "\n".join(f"{name:<16} {shown(value)}" for name, value in found.items())


def _report(given: argparse.Namespace) -> None:
    _say(f"kdnas report: {given.folder}")
    from kdnas.report import write_report
    from kdnas.runs.folder import RunFolder

    print(write_report(RunFolder(given.folder).folder))


def _list(given: argparse.Namespace) -> None:
    from kdnas.cli.listing import listing

    print(listing(given.what))


def _losses(given: argparse.Namespace) -> None:
    from kdnas.losses.check import check, table

    del given
    rows = check()
    print(table(rows))
    if not all(row.matches for row in rows):
        raise SystemExit(1)


def _taps(given: argparse.Namespace) -> None:
    _say(f"kdnas taps: {given.teacher} beside {given.space}, on images as of {given.data}")
    from kdnas.jobs.taps import taps_table

    print(taps_table(given.teacher, given.space, given.data, given.by))


if __name__ == "__main__":
    main()
