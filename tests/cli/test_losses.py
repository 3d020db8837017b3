"""Losses from the command line: the check, the table of pairs, stages, snapshots of a teacher."""

import dataclasses
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from kdnas.cli.commands import main
from kdnas.jobs._run import Run
from kdnas.jobs.export import export
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.losses.check import GoldenCheck
from kdnas.network import Network
from kdnas.specs import algorithms, spec
from kdnas.tables import space_from_table
from kdnas.teachers.combined import Route
from tests.killing import no_graph  # noqa: F401
from tests.toy import cnn as cnn_teacher
from tests.toy import experiment


def short():
    """The toy experiment with a teacher that is kept three times."""
    made = experiment()
    recipe = dataclasses.replace(made.train.recipe, steps=2)
    teacher = dataclasses.replace(made.train.teacher, snapshots=3)
    settings = dataclasses.replace(made.train, recipe=recipe, teacher=teacher)
    return dataclasses.replace(made, train=settings)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "short"
    run = train(short(), folder)
    search(run, dataclasses.replace(run.experiment.search, num_evaluations=3, control=False))
    export(run)
    return folder


def test_the_check_prints_every_loss_and_ends_well(capsys):
    main(["losses", "--check"])
    lines = capsys.readouterr().out.strip().splitlines()[1:]
    assert [line.split()[0] for line in sorted(lines)] == sorted(algorithms("kdnas.losses"))
    assert len(lines) > 40
    assert all(line.split()[3] == "yes" for line in lines)


def test_the_check_ends_with_exit_code_1_when_a_value_differs(monkeypatch, capsys):
    from kdnas.losses import check

    monkeypatch.setattr(check, "check", lambda: [GoldenCheck("hint", 1.0, 2.0, False, "")])
    with pytest.raises(SystemExit) as stopped:
        main(["losses", "--check"])
    assert stopped.value.code == 1
    assert "NO" in capsys.readouterr().out


SPACES = {
    "cnn": {"family": "toy", "widths": [4, 8], "depths": [1]},
    "vit": {
        "family": "vit",
        "patch": 2,
        "widths": [16, 24],
        "depths": [3],
        "heads": [2],
        "ratios": [2.0],
        "head_width": 8,
        "reach": 2,
        "cuts": [1, 2],
        "resolutions": [8],
    },
}


def cnn():
    return cnn_teacher()


def vit():
    space = space_from_table(SPACES["vit"]).fitted(classes=3, image_channels=3)
    return Network(space.blueprint(space.largest))


@pytest.mark.parametrize(("teacher", "space"), [("cnn", "cnn"), ("cnn", "vit"), ("vit", "cnn"), ("vit", "vit")])
def test_taps_pair_convolutions_and_transformers_either_way(tmp_path, capsys, teacher, space):
    table = tmp_path / "space.toml"
    table.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in SPACES[space].items()))
    for by in ("resolution", "rdm"):
        main(["taps", f"tests.cli.test_losses:{teacher}", str(table), "--data", "tests.toy:data", "--by", by])
        head, *lines = capsys.readouterr().out.strip().splitlines()
        assert head.split() == ["student", "shape", "teacher", "shape", "adapter", "params"]
        assert lines
        assert all("conv1x1" in line for line in lines)
        if teacher != space:
            assert any("tokens to map" in line or "pool" in line for line in lines)


def test_a_staged_loss_runs_its_stages_from_the_command_line(storage, capsys):
    student = storage / "students" / "place-1"
    main(["retrain", str(student), "--loss", "hint", "--steps", "6", "--json"])
    found = json.loads(capsys.readouterr().out)
    with safe_open(Path(found["student"]) / "weights.safetensors", "pt") as after:
        names = set(after.keys())
    with safe_open(student / "weights.safetensors", "pt") as before:
        assert names == set(before.keys())
    lines = [json.loads(line) for line in (storage / "metrics.jsonl").read_text().splitlines()]
    losses = [line["losses"]["student"] for line in lines if line["phase"] == "retrain"]
    # A hundred times a squared difference, then the labels' cross-entropy.
    assert len(losses) == 6
    assert min(losses[:2]) > max(losses[2:])


def test_a_teacher_trained_in_the_run_is_kept_on_its_way_and_followed(storage, capsys):
    run = Run(storage)
    assert sorted(p.name for p in (storage / "teacher-snapshots").iterdir()) == ["1", "2"]
    assert isinstance(run.teacher, Route)
    pixels = run.data.train.take(run.data.indices(0, 0, 4))
    assert len({tuple(s(pixels).logits.flatten().tolist()) for s in run.teacher.snapshots}) == 3
    main(
        [
            "retrain",
            str(storage / "students" / "place-1"),
            "--loss",
            "route_constrained",
            "--out",
            str(storage / "followed"),
        ]
    )
    assert "accuracy" in capsys.readouterr().out


def test_a_loss_is_put_into_the_supernets_distiller(tmp_path, capsys):
    main(["train", "tests/toy.py", "--out", str(tmp_path / "run"), "--steps", "1", "--loss", "representational=2"])
    capsys.readouterr()
    held = Run(tmp_path / "run").experiment.train.distiller
    assert held == experiment().train.distiller.replace(
        terms=((2.0, spec(algorithms("kdnas.losses")["representational"])),)
    )
    for wrong, message in (("hnt", "Did you mean 'hint'"), ("hint=much", "must be a finite number of at least 0")):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "tests/toy.py", "--out", str(tmp_path / "other"), "--loss", wrong])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_more_snapshots_than_steps_are_refused():
    with pytest.raises(ValueError, match="`snapshots` must be from 1 to"):
        dataclasses.replace(experiment().train.teacher, snapshots=99)
