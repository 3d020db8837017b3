"""The commands as functions: objects in place of texts, what a run remembers of them, devices, and quiet."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kdnas
from kdnas.cli.commands import main
from kdnas.costs.count import cost
from kdnas.data.builtin import digits
from kdnas.data.datasets import from_dataset
from kdnas.jobs._memory import keep
from kdnas.network import default_device, on_device
from kdnas.runs.folder import RunFolder
from kdnas.settings import FitTeacher
from kdnas.students.folder import read_student
from tests.toy import Cnn, data

ROOT = Path(__file__).parents[2]
SPACE = kdnas.load_space("toy")
SHORT = {"steps": 2, "batch_size": 16, "num_evaluations": 4, "deploy": False, "insist": True}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run from objects in memory, with its folder, teacher and data."""
    torch.manual_seed(0)
    teacher, images = Cnn(), data()
    folder = tmp_path_factory.mktemp("runs") / "run"
    space = kdnas.load_space("toy")
    run = kdnas.run(data=images, teacher=teacher, space=space, budget=kdnas.Budget(macs="70k"), out=folder, **SHORT)
    return run, folder, teacher, images


def test_objects_are_welcome_wherever_a_text_is(started):
    run, folder, _, images = started
    ranking = run.ranking()
    assert 0 < len(ranking[:2]) <= 2 and str(ranking[:1]).startswith("place")
    assert all(entry.macs <= 70_000 for entry in ranking)
    student = kdnas.load_student(folder / "students" / "student")
    logits = student(images.test.take(torch.arange(4)))
    assert logits.shape == (4, 3) and isinstance(student, nn.Module) and student.class_names == ("a", "b", "c")


def test_the_teacher_handed_over_is_the_one_that_teaches_and_stays_as_it_is(started):
    run, _, teacher, images = started
    pixels = images.test.take(torch.arange(4))
    expected = teacher.eval()(images.normalise(pixels))
    taught = run.teacher(pixels).logits
    assert torch.allclose(taught, expected, atol=1e-3)  # on a GPU, convolutions are of another precision
    assert run.device.type != "cpu" or torch.equal(taught, expected)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_later_command_takes_the_same_objects_and_refuses_others(started):
    _, folder, teacher, images = started
    assert len(kdnas.search(folder, teacher=teacher, data=images, num_evaluations=4)) == 4
    with pytest.raises(ValueError, match="`teacher` must be the one"):
        kdnas.search(folder, teacher=nn.Linear(2, 2))


def test_why_takes_the_same_objects(started):
    _, folder, teacher, images = started
    code = kdnas.Run(folder).ranking()[0].code
    assert kdnas.why(folder, code, teacher=teacher, data=images)["code"] == code
    with pytest.raises(ValueError, match="`data` must be the one"):
        kdnas.why(folder, code, data=digits())


def test_another_process_is_told_what_it_needs_again(started, monkeypatch, capsys):
    _, folder, _, _ = started
    monkeypatch.setattr("kdnas.jobs._memory._KEPT", {})  # as in another process
    with pytest.raises(SystemExit) as stopped:
        main(["search", str(folder), "--num-evaluations", "4"])
    assert stopped.value.code == 2
    assert (
        "data was an object in the memory of another process. Pass it again from Python: kdnas.search(RUN, data=...)"
        in capsys.readouterr().err
    )


def test_the_run_says_which_later_commands_need_its_objects_again(tmp_path, capsys):
    with pytest.raises(ValueError, match="no network"):
        kdnas.run(data=data(), teacher=Cnn(), space="toy", budget="macs=1", out=tmp_path / "run", **SHORT)
    message = capsys.readouterr().err
    assert "teacher and data are objects of this process" in message and "kdnas.search(RUN, teacher=..." in message


def test_equal_objects_are_one_and_other_objects_are_not():
    first, second = Cnn(), Cnn()
    assert keep(first) == keep(first) != keep(second)
    assert keep(data()) == keep(data())
    with pytest.raises(ValueError, match="must be a text, a spec, a torch module or a function, and data"):
        keep(3)


def test_a_torch_data_set_is_read_into_its_parts():
    images, labels = torch.rand(40, 3, 8, 8), torch.arange(40) % 4
    parts = from_dataset(TensorDataset(images, labels))
    taken = torch.cat([part.take(torch.arange(len(part))) for part in (parts.train, parts.search, parts.test)])
    assert (len(parts.train), len(parts.search), len(parts.test)) == (32, 4, 4)
    assert torch.equal(taken.flatten(1).sum(1).sort().values, images.flatten(1).sum(1).sort().values)
    both = from_dataset(TensorDataset(images, labels), TensorDataset(images[:8], labels[:8]))
    assert torch.equal(both.test.take(torch.arange(8)), images[:8]) and len(both.train) == 36
    with pytest.raises(ValueError, match="images must have one shape"):
        from_dataset([(torch.rand(3, 8, 8), 0), (torch.rand(3, 9, 8), 1)])
    with pytest.raises(ValueError, match="must be a pair"):
        from_dataset([torch.rand(3, 8, 8)])


def test_an_unknown_argument_gets_the_nearest(tmp_path):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'stepz'\. Did you mean 'steps'\?"):
        kdnas.run(data="digits", space="toy", out=tmp_path / "run", stepz=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [{"budget": ["macs=1"]}, {"scorer": "macs"}, {"teacher": "tests.toy:cnn"}, {"steps": 2}, {"data": "digits"}],
)
def test_an_option_beside_an_experiment_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"--experiment holds all settings, got --{next(iter(options))} beside it"):
        kdnas.run(experiment="demo", out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_pruning_s_experiment_takes_a_recipe_beside_it_and_nothing_else(tmp_path):
    with pytest.raises(ValueError, match="--experiment holds all settings, got --budget beside it"):
        kdnas.prune("scale_factors:small", out=tmp_path / "run", budget="macs=1", steps=1, penalty=0.1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "teacher", "source"),
    [
        ({}, FitTeacher, "teacher"),
        ({"source": "tests.toy:cnn"}, "tests.toy:cnn", "teacher"),
        ({"source": "tests.toy:cnn", "teacher": "fit"}, FitTeacher, "tests.toy:cnn"),
        ({"source": "tests.toy:narrow_cnn", "teacher": "tests.toy:cnn"}, "tests.toy:cnn", "tests.toy:narrow_cnn"),
    ],
)
def test_a_source_without_a_teacher_is_its_own(tmp_path, monkeypatch, options, teacher, source):
    monkeypatch.setattr("kdnas.jobs.prune.prune", lambda settings, folder: settings)
    settings = kdnas.prune(data="digits", budget="macs=50%", out=tmp_path / "run", **options)
    assert settings.source == source
    if teacher is FitTeacher:
        assert isinstance(settings.teacher, FitTeacher)
    else:
        assert settings.teacher["function"] == teacher


def test_a_pruning_s_search_has_the_time_that_a_person_gives_it(tmp_path, monkeypatch):
    known = []
    monkeypatch.setattr("kdnas.jobs.prune.prune", lambda settings, folder, **_: known.append(settings))
    for number, command in enumerate((kdnas.prune, kdnas.run)):
        folder = tmp_path / str(number)
        RunFolder.create(folder, {"prune": {}}, 0)
        command(data=data(), teacher=Cnn(), budget="macs=50%", out=folder, max_time="5m")
    assert [settings.max_time for settings in known] == [300, 300]
    assert "max_time" not in dataclasses.replace(known[0], max_time=1e9).to_json()["prune"]  # as in runs of before


def test_a_device_is_used_inside_and_refused_where_there_is_none():
    outside = default_device()
    with on_device("meta"):
        assert default_device() == torch.device("meta")
        with on_device(None):
            assert default_device() == torch.device("meta")
    assert default_device() == outside
    for wrong in ("gpu0", "cuda:99", "cpu:1"):
        with pytest.raises(ValueError, match=f"`device` must be one of this machine, such as cpu, got '{wrong}'"):
            kdnas.search("no/such/run", device=wrong)


def test_a_program_can_silence_kdnas(capsys):
    logger = logging.getLogger("kdnas")
    level = logger.level
    try:
        logging.getLogger("kdnas.jobs").info("heard")
        logger.setLevel(logging.ERROR)
        logging.getLogger("kdnas.jobs").info("silent")
    finally:
        logger.setLevel(level)
    assert capsys.readouterr().err == "heard\n"


def test_a_ranking_prints_slices_and_becomes_json(started):
    ranking = started[0].ranking()
    assert [row["place"] for row in ranking[1:3].to_json()] == [2, 3]
    assert json.loads(json.dumps(ranking.to_json()))[0]["code"] == ranking[0].code
    front = ranking.front()
    assert max(entry.score for entry in front) == ranking[0].score and len(front) <= len(ranking)


def test_without_a_space_the_teachers_own_network_is_cut_down_from_its_trained_weights(tmp_path):
    torch.manual_seed(0)
    teacher = Cnn()
    with torch.no_grad():
        teacher(data().train.take(torch.arange(32)))  # statistics that are not those of a new network
    run = kdnas.run(data=data(), teacher=teacher, budget="macs=50%", out=tmp_path / "run", **SHORT)
    _, card = read_student(tmp_path / "run" / "students" / "student")
    source, whole = read_student(tmp_path / "run" / "students" / "source")
    assert 0.3 * whole.cost.macs < card.cost.macs <= 0.5 * whole.cost.macs and "student" in str(run)
    images = data().normalise(data().test.take(torch.arange(8)))
    with torch.no_grad():
        torch.testing.assert_close(source(images).logits, teacher.eval()(images), rtol=1e-4, atol=1e-4)
    finalists = [path.name for path in (tmp_path / "run" / "students").glob("removal-chosen*")]
    assert len(finalists) > 1
    for option, value in (("scorer", "nwot"), ("weights", "x"), ("teacher_members", 2)):
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} needs --space"):
            kdnas.run(data=data(), teacher=teacher, budget="macs=50%", out=tmp_path / "other", **{option: value})


def test_without_a_space_the_weights_are_the_students(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("kdnas.jobs.prune.prune", lambda settings, folder, **_: asked.append(settings.weights))
    for weights in (None, "inherited", "fresh", "chosen"):
        RunFolder.create(tmp_path / str(weights), {"prune": {}}, 0)
        options = {"data": data(), "teacher": Cnn(), "budget": "macs=50%", "out": tmp_path / str(weights)}
        kdnas.run(**options, **({"weights": weights} if weights else {}))
    assert asked == ["chosen", "inherited", "fresh", "chosen"]


def test_a_share_is_of_the_space_s_largest_network(tmp_path):
    largest = cost(SPACE.blueprint(SPACE.largest)).macs
    run = kdnas.run(data=data(), teacher=Cnn(), space=SPACE, budget="macs=60%", out=tmp_path / "run", **SHORT)
    assert max(entry.macs for entry in run.ranking()) <= 0.6 * largest
    assert json.loads((tmp_path / "run" / "run.json").read_text())["job"]["search"]["budget"]["macs"] == "60%"
    assert run.experiment.search.budget == kdnas.Budget(macs="60%")


def test_a_run_of_another_command_is_not_searched(tmp_path):
    RunFolder.create(tmp_path / "pruned", {"prune": {}}, 0)
    with pytest.raises(
        ValueError,
        match="pruned has no supernet and no ranking: it is no run of `kdnas train`, or of `kdnas run` with --space",
    ):
        kdnas.search(tmp_path / "pruned")
