"""Training phases: the teacher, where one is trained here, and the supernet."""

from pathlib import Path

from kdnas.data.base import Data
from kdnas.distillers.base import Distiller
from kdnas.evaluation import health
from kdnas.jobs._checks import check_experiment, check_losses, open_run
from kdnas.jobs._preflight import preflight
from kdnas.jobs._run import Run, initial_supernet, record_data
from kdnas.jobs.fit import fit_teacher
from kdnas.runs.files import remove_drafts
from kdnas.runs.folder import CHECKPOINT, MANIFEST, RunFolder
from kdnas.settings import Experiment, FitTeacher, Train
from kdnas.supernet import Supernet
from kdnas.teachers.cache import open_cache
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.guard import Guard
from kdnas.training.loop import Training

TEACHER_CACHE = "teacher_cache"


def train(experiment: Experiment, folder: Path, *, size_chosen: bool = False) -> Run:
    """Train the teacher and the supernet, where the run trains them; goes on where it was interrupted.

    Args:
        experiment: all settings.
        folder: the run folder.
        size_chosen: whether a person decided the size of the student's images.

    Raises:
        Infeasible: no network is within the budget of a search; nothing is written or trained.
        ValueError: the folder holds something else, the data or the teacher do not fit; or, before anything is
            written, what `check_experiment`, `preflight` and `check_losses` refuse.
    """
    data: Data | None = None
    if not (folder / MANIFEST).exists() or RunFolder(folder).is_blank:
        data = loaded = experiment.train.data.build(Data)
        space = loaded.fitted(experiment.train.space)
        check_experiment(experiment, space)
        preflight(
            loaded,
            folder=folder,
            teacher=experiment.train.teacher,
            space=space,
            recipe=experiment.train.recipe,
            budget=experiment.search.budget,
            finals=(sum(experiment.finals.trainings), experiment.retrain.recipe),
            size_chosen=size_chosen,
        )
        check_losses(experiment, loaded, space)
    storage = open_run(folder, experiment)
    run = Run(storage.folder)
    if data is not None:
        run.data = data  # read once
    record_data(run.storage, run.data)
    if isinstance(experiment.train.teacher, FitTeacher):
        fit_teacher(experiment.train.teacher, run.data, run.storage)
    if run.storage.phase("train") is None and experiment.train.distiller is not None:
        _train_supernet(run)
    return run


def supernet_training(run: Run, settings: Train) -> Training:
    """The training of a run's supernet before its first step, with a cache if one is asked for.

    Args:
        run: whose data and teacher it uses.
        settings: with a distiller.
    """
    assert settings.distiller is not None
    teacher, data, device, cache = run.teacher, run.data, run.device, None
    supernet, distiller = initial_supernet(settings, run.space), settings.distiller.build(Distiller)
    if distiller.reads_attentions:
        teacher = teacher.with_attentions()
    if settings.teacher_views:
        options = {"seed": settings.recipe.seed, "views": settings.teacher_views, "limit": settings.cache_limit}
        folder, stored = run.storage.path(TEACHER_CACHE), settings.cache_outputs
        cache = open_cache(folder, teacher.to(device), data, device=device, stored=stored, **options)
        teacher.cpu()
    return Training(supernet, distiller, data, teacher, settings.recipe, device, cache)


def _train_supernet(run: Run) -> None:
    settings, storage = run.experiment.train, run.storage
    training = supernet_training(run, settings)
    supernet = training.model
    assert isinstance(supernet, Supernet)
    guard = Guard(training, storage.path("healthy.safetensors"), rollback=settings.rollback)
    seconds = train_with_checkpoints(
        training, "train", storage.path(CHECKPOINT), storage, lambda: health(supernet, run.data), guard=guard
    )
    guard.checkpoint.unlink(missing_ok=True)
    remove_drafts(guard.checkpoint)
    storage.finish("train", seconds=seconds, steps=settings.recipe.steps, **health(supernet, run.data))
