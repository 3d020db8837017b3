"""Training phases: the teacher, where one is trained here, and the supernet."""

from pathlib import Path

from kdnas.costs.budget import Budget, amount
from kdnas.costs.check import BudgetCheck, Infeasible, check_feasible
from kdnas.costs.latency import LatencyTable
from kdnas.data.base import Data
from kdnas.distillers.base import Distiller
from kdnas.evaluation import health
from kdnas.jobs._run import Run, check_model_type, record_data
from kdnas.jobs.fit import fit_teacher
from kdnas.network import Network, default_device
from kdnas.randomness import python_rng
from kdnas.runs.files import remove_drafts
from kdnas.runs.folder import CHECKPOINT, MANIFEST, RunFolder
from kdnas.settings import Experiment, FitTeacher
from kdnas.space import SearchSpace
from kdnas.specs import Spec
from kdnas.supernet import Supernet
from kdnas.teachers.cache import open_cache
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.guard import Guard
from kdnas.training.loop import Training

TEACHER_CACHE = "teacher_cache"


def train(experiment: Experiment, folder: Path) -> Run:
    """Train the teacher and the supernet, where the run trains them; goes on where it was interrupted.

    Raises:
        Infeasible: no network is within the budget of a search; nothing is written or trained.
        ValueError: the folder holds something else, the data or the teacher do not fit.
    """
    check_model_type(experiment.train.distiller, Supernet)
    check_model_type(experiment.retrain.distiller, Network)
    data = None if (folder / MANIFEST).exists() else _check_budgets(experiment)
    storage = RunFolder.create(folder, experiment.to_json(), experiment.train.recipe.seed)
    run = Run(storage.folder)
    if data is not None:
        run.data = data  # read once
    record_data(run.storage, run.data)
    if isinstance(experiment.train.teacher, FitTeacher):
        fit_teacher(experiment.train.teacher, run.data, run.storage)
    if run.storage.phase("train") is None and experiment.train.distiller is not None:
        _train_supernet(run, experiment.train.distiller)
    return run


def _check_budgets(experiment: Experiment) -> Data | None:
    """Refuse budgets of searches that no network meets; returns the data where it had to be read."""
    budgets = [(s.budget, s.seed) for s in (experiment.search, experiment.second) if s is not None and s.budget.names]
    if not budgets:
        return None
    data: Data = experiment.train.data.build(Data)
    space = experiment.train.space.fitted(classes=data.classes, image_channels=data.channels)
    for budget, seed in budgets:
        _check_budget(space, budget, seed)
    return data


def _check_budget(space: SearchSpace, budget: Budget, seed: int) -> None:
    """Refuse a budget that no network meets; of latency, one below half of the smallest network's."""
    counted = Budget(**{**budget.to_json(), "latency": None})
    check_feasible(BudgetCheck(space, counted), python_rng(seed, "feasible"))
    if budget.latency is not None:
        seconds = LatencyTable(default_device()).whole(space.blueprint(space.smallest))
        if seconds > 2 * budget.latency:
            raise Infeasible(
                f"infeasible: the smallest network {space.code(space.smallest)} takes {amount('latency', seconds)}, "
                f"more than twice the bound of {amount('latency', budget.latency)}. Raise the budget or use a space "
                "with smaller networks."
            )


def _train_supernet(run: Run, source: Spec) -> None:
    settings, storage = run.experiment.train, run.storage
    supernet = run.fresh_supernet()
    distiller = source.build(Distiller)
    teacher, data, device = run.teacher, run.data, run.device
    cache = None
    if settings.teacher_views:
        options = {"seed": settings.recipe.seed, "views": settings.teacher_views, "limit": settings.cache_limit}
        cache = open_cache(storage.path(TEACHER_CACHE), teacher.to(device), data, device=device, **options)
    training = Training(supernet, distiller, data, teacher, settings.recipe, device, cache)
    guard = Guard(training, storage.path("healthy.safetensors"), rollback=settings.rollback)
    seconds = train_with_checkpoints(
        training, "train", storage.path(CHECKPOINT), storage, lambda: health(supernet, run.data), guard=guard
    )
    guard.checkpoint.unlink(missing_ok=True)
    remove_drafts(guard.checkpoint)
    storage.finish("train", seconds=seconds, steps=settings.recipe.steps, **health(supernet, run.data))
