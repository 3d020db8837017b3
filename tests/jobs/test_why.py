"""`kdnas rank-check` and `kdnas why` on a small run."""

import dataclasses
import json
import shutil

import pytest
import torch

from kdnas.cli.commands import main
from kdnas.costs.count import cost
from kdnas.jobs._run import Run
from kdnas.jobs.predict import predict
from kdnas.jobs.rank_check import rank_check
from kdnas.jobs.search import search
from kdnas.jobs.why import neighbours, why
from kdnas.network import batch_statistics
from kdnas.runs.files import FORMAT, read_json
from kdnas.scorers.accuracy import Accuracy
from kdnas.scorers.rdm import Rdm
from kdnas.settings import Search
from kdnas.similarity import dissimilarity, rdm_similarity
from kdnas.specs import spec
from kdnas.tables import load_space

TOY = load_space("toy")
MACRO = load_space("nas_bench_macro")


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "tests/toy.py", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def table(storage):
    """Truth is the MACs but for a little noise, so that the control macs is nearly perfect."""
    space = Run(storage).space
    lines = ["arch,mean_acc,other"]
    for place, architecture in enumerate(space.all()):
        macs = cost(space.blueprint(architecture)).macs
        lines.append(f"{space.code(architecture)},{50 + macs / 1e4 + 0.01 * (place % 3)},{place}")
    path = storage.parent / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rank_check_prints_every_statistic_with_the_controls_beside_it(storage, table, capsys):
    main(["rank-check", str(storage), str(table), "--scorer", "rdm", "--scorer", "accuracy", "--num-images", "20"])
    shown = capsys.readouterr().out
    for text in ("36 rows, 36 networks, 20 images", "Kendall's tau-b", "Spearman's rho", "rdm", "accuracy",
                 "non_minimal",                 "canonical (36)", "within equal depth", "layers 3", "top 10%",
                 "regret q50 <=", "fewer", "the 5 best-scored", "not demonstrably better than"):  # fmt: skip
        assert text in shown, text


def test_rank_check_json_is_one_object_with_known_numbers(storage, table, capsys):
    main(["rank-check", str(storage), str(table), "--json"])
    found = json.loads(capsys.readouterr().out)
    group = found["groups"]["canonical"]
    assert group["rows"] == 36
    assert group["scores"]["macs"]["tau"][0] > 0.95
    assert set(group["scores"]) == {"rank_ensemble", "params", "macs", "layers", "non_minimal"}
    assert found["column"] == "mean_acc" and found["scorers"] == ["rank_ensemble"]
    assert found["saved"].endswith("times fewer)")


def test_rank_check_scores_each_row_as_the_scorer_alone_does(storage, table):
    run = Run(storage)
    found = rank_check(run, table, scorers={"mine": spec(Rdm, premature=0.5)}, column="other", resamples=5)
    evidence = run.evidence(run.experiment.search.num_images, 0)
    networks = list(run.space.all())
    alone = [Rdm(premature=0.5).score(run.supernet.extract(a), evidence).value for a in networks]
    import scipy.stats

    expected = scipy.stats.kendalltau(alone, range(36)).statistic
    assert found["groups"]["all"]["scores"]["mine"]["tau"][0] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--column", "accuracy"], "no column 'accuracy'"),
        (["--scorer", "rdmm"], "Did you mean 'rdm'"),
        (["--scorer", "macs"], "'macs' is a control"),
    ],
)
def test_rank_check_refuses_what_is_not_there(storage, table, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["rank-check", str(storage), str(table), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_neighbours_differ_in_one_choice_and_are_other_networks():
    architecture = TOY.parse("100" + "110")
    found = list(neighbours(TOY, architecture))
    assert [(c.name, option) for c, option, _ in found] == [
        ("stage0.depth", 1),
        ("stage0.layer0.width", 8),
        ("stage0.layer1.width", 8),
        ("stage1.depth", 1),
        ("stage1.layer0.width", 4),
        ("stage1.layer1.width", 8),
    ]
    # A layer that goes away takes its width along; one that comes into being is of the first width.
    assert TOY.code(found[0][2]) == "00.110"
    deeper = next(o for c, _, o in neighbours(TOY, TOY.parse("01.110")) if c.name == "stage0.depth")
    assert TOY.code(deeper) == "110110"
    # One network in two spellings is no neighbour of itself.
    for _, _, other in neighbours(MACRO, MACRO.parse("00000020")):
        assert other != MACRO.parse("00000020")


def test_why_explains_similarity_cost_and_every_choice(storage, capsys):
    run = Run(storage)
    space, code = run.space, "110110"
    main(["why", str(storage), code, "--scorer", "rdm", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found | {"format": FORMAT} == read_json(storage / "why.json", dict, "")
    architecture = space.parse(code)
    evidence = run.evidence(run.experiment.search.num_images, 0)
    student = run.supernet.extract(architecture)
    assert found["score"] == pytest.approx(Rdm().score(student, evidence).value, abs=1e-6)
    with torch.no_grad(), batch_statistics(student):
        outputs = student(evidence.images)
    teacher = dissimilarity(evidence.teacher.logits)
    expected = [float(rdm_similarity(dissimilarity(f), teacher)) for f in (*outputs.features, outputs.logits)]
    assert [line[-1] for line in found["similarity"]["values"]] == pytest.approx(expected, abs=1e-5)
    assert found["similarity"]["student"] == ["stage 0", "stage 1", "logits"]
    whole = cost(space.blueprint(architecture))
    assert [s["stage"] for s in found["stages"]] == ["stem", "stage 0", "stage 1", "head"]
    assert (sum(s["params"] for s in found["stages"]), sum(s["macs"] for s in found["stages"])) == whole
    assert sum(s["share of macs"] for s in found["stages"]) == pytest.approx(1, abs=1e-4)
    assert [c["score"] for c in found["choices"]] == sorted((c["score"] for c in found["choices"]), reverse=True)
    assert {c["choice"] for c in found["choices"]} == set(architecture)
    for c in found["choices"]:
        other = space.parse(c["code"])
        assert cost(space.blueprint(other)).macs - whole.macs == c["macs difference"]
        alone = Rdm().score(run.supernet.extract(other), evidence).value
        assert found["score"] + c["score difference"] == pytest.approx(alone, abs=1e-6)


def test_why_prints_tables_and_the_report_draws_them(storage, capsys):
    main(["why", str(storage), "110110", "--scorer", "accuracy"])
    shown = capsys.readouterr().out
    for text in ("110110: accuracy", "teacher logits", "stage 1", "what changing one choice does", "stage0.depth", "*"):
        assert text in shown, text
    main(["report", str(storage)])
    page = (storage / "report.html").read_text()
    for text in ("Why this score", "student (down), teacher (across)", "stage0.layer1.width", "110110"):
        assert text in page, text


def test_a_damaged_explanation_does_not_stop_the_report(storage):
    for damaged in ("{", "[]", '{"similarity": {"student": ["a"], "values": 3}, "stages": [1], "choices": {"a": 1}}'):
        (storage / "why.json").write_text(damaged)
        main(["report", str(storage)])


def test_why_refuses_a_code_of_another_space(storage, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["why", str(storage), "99"])
    assert stopped.value.code == 2
    assert "must have 6 digits, got 2" in capsys.readouterr().err


def test_the_scorer_of_why_is_named_in_its_result(storage):
    assert why(Run(storage), "110110", scorer=spec(Accuracy))["scorer"] == "accuracy"


def test_trainings_say_what_each_choice_is_worth(storage, tmp_path, capsys):
    shutil.copytree(storage, tmp_path / "run")
    run, table = Run(tmp_path / "run"), tmp_path / "results.csv"
    worth = {
        a: 0.6 + 0.05 * (a["stage0.depth"] == 2) + 1e-5 * cost(run.space.blueprint(a)).params for a in run.space.all()
    }
    table.write_text("\n".join(["arch,accuracy", *(f"{run.space.code(a)},{v}" for a, v in worth.items())]) + "\n")
    settings = dataclasses.replace(run.experiment.search, budget=Search().budget, num_evaluations=36)
    best = predict(run, settings, results=table)[0]
    main(["why", str(run.folder), best.code, "--json"])
    explained = json.loads(capsys.readouterr().out)
    believed = explained["trainings"]
    assert believed["results"] == 36 and believed["accuracy"] == pytest.approx(best.score, abs=1e-5)
    assert believed["low"] <= worth[best.architecture] <= believed["high"]
    differences = []
    for choice in explained["choices"]:
        true = worth[run.space.parse(choice["code"])] - worth[best.architecture]
        assert choice["low"] <= choice["accuracy difference"] <= choice["high"]
        assert choice["accuracy difference"] == pytest.approx(true, abs=0.01)
        differences.append(choice["accuracy difference"])
    assert differences == sorted(differences, reverse=True) and min(differences) < -0.03
    main(["why", str(run.folder), best.code])
    shown = capsys.readouterr().out
    assert f"as 36 trainings predict it: {believed['accuracy']:.2%} [" in shown and "accuracy, points" in shown
    plain = dataclasses.replace(settings, num_evaluations=4, scorer=spec(Accuracy))
    search(run, plain)  # a later search without trainings forgets none
    assert why(Run(run.folder), best.code)["trainings"] == believed
