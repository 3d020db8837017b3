"""A run's metrics in trackers: once each, also while it goes on; the libraries themselves under `real`."""

import json
import sys

import pytest

from kdnas.cli.commands import main
from kdnas.jobs import track as job
from kdnas.runs.folder import RunFolder


class Notes:
    """A tracker that keeps what it was told."""

    def __init__(self):
        self.lines, self.settings, self.ends = [], [], 0

    def start(self, settings):
        self.settings.append(settings)

    def write(self, phase, step, numbers):
        self.lines.append((phase, step, numbers))

    def flush(self):
        pass

    def close(self):
        self.ends += 1


@pytest.fixture
def run(tmp_path):
    storage = RunFolder.create(tmp_path / "runs" / "mine", {"train": {"recipe": {"steps": 9}, "data": "digits"}}, 0)
    metrics = storage.metrics("train")
    for step in range(3):
        share = {"hint": {"value": 2.0, "gradient": 0.25}}
        metrics.write(step=step, total=9, losses={"largest": 1.0 / (step + 1)}, seconds=1.5, lr=0.1, terms=share)
    return storage


@pytest.fixture
def notes(monkeypatch):
    made = Notes()
    monkeypatch.setitem(job._SINKS, "tensorboard", lambda place, name, online: made)
    return made


def test_every_line_is_written_once_also_after_a_resumption(run, notes):
    assert job.track(run.folder, "tensorboard")["lines"] == 3
    assert notes.settings == [{"train.recipe.steps": "9", "train.data": "digits"}]
    numbers = {"seconds": 1.5, "lr": 0.1, "losses/largest": 0.5, "terms/hint/value": 2.0, "terms/hint/gradient": 0.25}
    assert notes.lines[1] == ("train", 1, numbers)
    assert job.track(run.folder, "tensorboard")["lines"] == 0
    # A training that is resumed writes the steps after its checkpoint again.
    metrics = run.metrics("train", before=2)
    for step in (2, 3):
        metrics.write(step=step, total=9, losses={"largest": 0.1}, seconds=2.0)
    RunFolder(run.folder).metrics("student").write(step=0, total=2, losses={}, accuracy=0.5)
    assert job.track(run.folder, "tensorboard")["lines"] == 2
    assert [line[:2] for line in notes.lines] == [
        ("train", 0),
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("student", 0),
    ]
    assert notes.ends == 3


def test_it_follows_a_run_to_its_end_and_writes_the_results(run, notes, monkeypatch):
    def sleep(_):
        run.metrics("student").write(step=len(notes.lines), total=9, losses={}, accuracy=0.75)
        run.record_result({"name": "student", "accuracy": 0.75, "params": 10, "macs": None})
        run.finish("student", accuracy=0.75)

    monkeypatch.setattr(job.time, "sleep", sleep)
    assert job.track(run.folder, "tensorboard", follow=True)["lines"] == 4
    assert notes.lines[-2:] == [
        ("student", 3, {"accuracy": 0.75}),
        ("result/student", 0, {"accuracy": 0.75, "params": 10}),
    ]


def test_an_interruption_is_remembered(run, notes, monkeypatch):
    write = notes.write

    def stop(phase, step, numbers):
        if step == 2:
            raise KeyboardInterrupt
        write(phase, step, numbers)

    monkeypatch.setattr(notes, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        job.track(run.folder, "tensorboard")
    monkeypatch.setattr(notes, "write", write)
    assert job.track(run.folder, "tensorboard")["lines"] == 1 and len(notes.lines) == 3


@pytest.mark.parametrize(
    ("tracker", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow.entities")]
)
def test_a_library_that_is_missing_is_a_sentence(run, monkeypatch, tracker, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"--to {tracker} needs .* pip install 'kdnas\[{tracker}\]'"):
        job.track(run.folder, tracker)
    assert not run.path("tracking").exists()


def test_event_files_go_nowhere_online(run):
    with pytest.raises(ValueError, match="`online` is for wandb and mlflow"):
        job.track(run.folder, "tensorboard", online=True)


def test_the_command_says_how_many_lines(run, notes, capsys):
    main(["track", str(run.folder), "--to", "tensorboard", "--json"])
    assert json.loads(capsys.readouterr().out)["lines"] == 3
    with pytest.raises(SystemExit):
        main(["track", str(run.folder.parent), "--to", "tensorboard"])
    assert "there is no run in" in capsys.readouterr().err


def more(run):
    RunFolder(run.folder).metrics("train", before=3).write(step=3, total=9, losses={"largest": 0.125}, seconds=2.0)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_event_files_hold_every_step_once(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job.track(run.folder, "tensorboard")
    more(run)
    place = job.track(run.folder, "tensorboard")["place"]
    events = EventAccumulator(place)
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/losses/largest")]
    assert [step for step, _ in scalars] == [0, 1, 2, 3]
    assert [value for _, value in scalars] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 8])
    shares = {name: events.Scalars(f"train/terms/hint/{name}")[0].value for name in ("value", "gradient")}
    assert shares == {"value": 2.0, "gradient": 0.25}


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_an_offline_run_of_wandb_is_written(run, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    place = run.path("tracking", "wandb")
    job.track(run.folder, "wandb")
    name = (place / "id").read_text()
    more(run)
    assert job.track(run.folder, "wandb")["lines"] == 1
    files = sorted(place.glob(f"wandb/offline-run-*/run-{name}.wandb"))
    assert files and all(file.stat().st_size > 0 for file in files) and (place / "id").read_text() == name


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_every_step_once_in_its_file(run):
    from mlflow.tracking import MlflowClient

    job.track(run.folder, "mlflow")
    more(run)
    place = run.path("tracking", "mlflow")
    job.track(run.folder, "mlflow")
    client, name = MlflowClient(f"sqlite:///{place}/mlflow.db"), (place / "id").read_text()
    history = [(metric.step, metric.value) for metric in client.get_metric_history(name, "train/losses/largest")]
    assert sorted(history) == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3)), (3, 0.125)]
    assert client.get_run(name).data.params["train.recipe.steps"] == "9"
    assert [metric.value for metric in client.get_metric_history(name, "train/terms/hint/gradient")] == [0.25] * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tracking/tensorboard/written.json", '{"train": "x"}', "its 'train' must be a whole number"),
        ("tracking/tensorboard/written.json", "[", "cannot be read"),
        ("metrics.jsonl", '{"phase": "train"}\n', "has no 'step'"),
        ("metrics.jsonl", '{"phase": 3, "step": 1}\n', "its 'phase' must be a text"),
        ("metrics.jsonl", '{"phase": "train", "step": -1}\n', "its 'step' must be at least 0"),
    ],
)
def test_damaged_files_are_one_sentence(run, notes, name, content, message):
    path = run.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        job.track(run.folder, "tensorboard")


def test_what_is_no_number_in_a_line_is_left_out(run, notes):
    run.path("metrics.jsonl").write_text('{"phase": "train", "step": 1, "losses": [1], "terms": "x", "lr": null}\n')
    job.track(run.folder, "tensorboard")
    assert notes.lines == [("train", 1, {})]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"../x", b"a" * 100])
def test_an_id_that_is_none_is_one_sentence(tmp_path, content):
    (tmp_path / "id").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        job._known(tmp_path / "id")


def test_nothing_is_written_through_a_link(run, notes, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    for place in (run.path("tracking"), run.path("tracking", "tensorboard")):
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match="is a link that leads out"):
            job.track(run.folder, "tensorboard")
        place.unlink()
    assert not list((tmp_path / "elsewhere").iterdir())
