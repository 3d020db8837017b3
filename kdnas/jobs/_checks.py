"""What is checked of an experiment before anything is written or trained."""

import random
import shlex
from collections.abc import Callable
from pathlib import Path

from kdnas.costs.budget import Budget, amount
from kdnas.costs.check import BudgetCheck, Infeasible, check_feasible
from kdnas.costs.latency import LatencyTable
from kdnas.data.base import Data
from kdnas.distillers.base import Distiller
from kdnas.distillers.block_wise import BlockWise
from kdnas.jobs._preflight import largest_network
from kdnas.jobs._run import build_scorer, build_teacher, check_model_type, initial_supernet
from kdnas.jobs.fit import untrained
from kdnas.network import Network, default_device
from kdnas.randomness import python_rng
from kdnas.ranking.early_stopping import EarlyStopping
from kdnas.runs.folder import OtherSettings, RunFolder
from kdnas.searchers.base import Searcher
from kdnas.settings import Experiment, FitTeacher, Recipe, Search
from kdnas.space import SearchSpace
from kdnas.specs import Spec
from kdnas.supernet import Supernet
from kdnas.teachers.base import Teacher
from kdnas.training.loop import Training
from kdnas.training.shared import check as check_shared


def check_experiment(experiment: Experiment, space: SearchSpace) -> None:
    """Refuse what a later phase would refuse.

    Args:
        experiment: all settings.
        space: its search space, fitted to the data.

    Raises:
        Infeasible: no network is within the budget of a search.
        ValueError: an algorithm's options, weights of another network, a search that the training does not allow, or a
            training that several processes cannot share.
    """
    train = experiment.train
    check_model_type(train.distiller, Supernet)
    check_model_type(experiment.retrain.distiller, Network)
    for settings in (train, experiment.retrain):
        if settings.distiller is not None:
            distiller = settings.distiller.build(Distiller)
            distiller.check_answers(space.dense)
            check_shared(distiller, settings.recipe)
    for settings in (experiment.search, experiment.second):
        if settings is not None:
            check_search(settings, space, train.distiller)
            check_budget(space, settings)
    if train.weights:
        initial_supernet(train, space)


def check_losses(experiment: Experiment, data: Data, space: SearchSpace) -> None:
    """Refuse losses that do not fit the networks: the supernet's where a teacher is trained before it, and finalists'.

    A training of each is prepared with a batch, which makes the parts that depend on both networks; no step is taken.

    Raises:
        ValueError: as `Training`, or the distiller's `prepare`.
    """
    train, retrain, device = experiment.train, experiment.retrain, default_device()
    choice = train.teacher
    pairs: list[tuple[Callable[[], Supernet | Network], Spec, Recipe]] = []
    if isinstance(choice, FitTeacher) and train.distiller is not None:
        pairs.append((lambda: initial_supernet(train, space), train.distiller, train.recipe))
    pairs.append((lambda: largest_network(space), retrain.distiller, retrain.recipe))
    teacher: Teacher | None = None
    for make, source, recipe in pairs:
        distiller = source.build(Distiller)
        if teacher is None and distiller.uses_teacher:
            teacher = untrained(choice, data, 0) if isinstance(choice, FitTeacher) else build_teacher(choice, data)
        Training(make(), distiller, data, teacher if distiller.uses_teacher else None, recipe, device)


def check_search(settings: Search, space: SearchSpace, distiller: Spec | None) -> None:
    """Refuse a search whose algorithms cannot be built, or do not go with the distiller of the supernet.

    Raises:
        ValueError: an option of scorer, contrast, searcher or pruner, or weights that are not trained.
    """
    if settings.exact and not (distiller and isinstance(distiller.build(Distiller), BlockWise)):
        raise ValueError(
            f"an exact search needs a supernet trained by block_wise, got the distiller "
            f"{distiller.name if distiller else None}. Train with --distiller block_wise."
        )
    names = () if settings.exact else (settings.scorer, settings.contrast)
    scorers = [build_scorer(source, distiller) for source in names if source is not None]
    settings.searcher.build(Searcher, space=space, admits=lambda architecture: True, rng=random.Random(0))
    if settings.pruner is not None and scorers:
        EarlyStopping(settings.pruner, scorers[0])


def check_budget(space: SearchSpace, settings: Search) -> None:
    """Refuse a budget that no network meets; of latency, one below half of the smallest network's.

    Raises:
        Infeasible: the message has the nearest network and its costs.
    """
    budget = settings.budget
    counted = Budget.from_json({**budget.to_json(), "latency": None})
    check_feasible(BudgetCheck(space, counted), python_rng(settings.seed, "feasible"), seconds=settings.max_time)
    if "latency" in budget.names:
        table, smallest = LatencyTable(default_device(), target=budget.target), space.blueprint(space.smallest)
        measure = table.seconds if budget.target.table else table.whole
        seconds, bound = measure(smallest), budget.latency
        if bound is None:
            bound = dict(budget.shares)["latency"] * measure(space.blueprint(space.largest))
        if seconds > 2 * bound:
            raise Infeasible(
                f"infeasible: the smallest network {space.code(space.smallest)} takes {amount('latency', seconds)}, "
                f"more than twice the bound of {amount('latency', bound)}. Raise the budget or use a space "
                "with smaller networks."
            )


def open_run(folder: Path, experiment: Experiment) -> RunFolder:
    """The run of an experiment in a folder, new or begun earlier.

    Raises:
        ValueError: as `RunFolder.create`; where only the budget of the search differs, the message has the command that
            searches the run within the other one.
    """
    try:
        return RunFolder.create(folder, experiment.to_json(), experiment.train.recipe.seed)
    except OtherSettings as error:
        bounds = [
            f"--budget {name}={bound}{'s' * (name == 'latency' and isinstance(bound, float))}"
            for name, bound in experiment.search.budget.to_json().items()
            if bound is not None
        ]
        if not bounds or not all(name.startswith("search.budget") for name, _, _ in error.differences):
            raise
        command = " ".join(["kdnas search", shlex.quote(str(folder)), *bounds])
        trained = RunFolder(folder).phase("train") or experiment.train.distiller is None
        before = "" if trained else "Train it to its end with the settings of the run, then "
        raise ValueError(
            f"{error} Only the budget differs: {before}`{command}` searches what is trained there."
        ) from error
