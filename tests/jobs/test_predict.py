"""Rankings by trainings: who is trained, for how long, what is believed of the others, and what is never done twice."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from kdnas.cli.commands import main
from kdnas.costs.count import cost
from kdnas.jobs import _lengths, _trainings
from kdnas.jobs import predict as job
from kdnas.jobs._lengths import LENGTHS, shortest_length
from kdnas.jobs._run import Run, insisting
from kdnas.jobs._trainings import TrainingRow, with_length
from kdnas.jobs.finals import _Finals
from kdnas.jobs.predict import predict
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.ranking.order import difference
from kdnas.ranking.table import Ranking
from kdnas.runs.entry import RANDOM
from kdnas.settings import Finals, Search
from kdnas.statistics import kendall
from tests.toy import by_params

WIDE = dataclasses.replace(by_params().search, budget=Search().budget, num_evaluations=36, control=False)


@pytest.fixture(autouse=True)
def few_untrained(monkeypatch):
    """A search is compared with scores of its untrained networks, which take longer than all the rest here."""
    monkeypatch.setattr("kdnas.ranking.controls.TRAINING_FREE_ENTRIES", 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    with insisting(True):  # the teacher has random weights
        train(by_params(), folder)
    return folder


@pytest.fixture
def run(tmp_path, trained):
    """A run without a search; whoever reads its test part fails."""
    shutil.copytree(trained, tmp_path / "run")
    return Run(tmp_path / "run")


def truth(architecture, steps=1000):
    """An accuracy that follows the first choice against the sizes, and noise that longer trainings have less of."""
    values = [float(v) for v in architecture.values()]
    digits = np.random.default_rng([int(v) for v in values]).normal()
    return 0.5 + 0.1 * (values[0] == 2) + 0.01 * values[1] + 0.02 * digits / steps


@pytest.fixture
def trainings(monkeypatch):
    """Trainings that take no time; `calls` has what was trained."""
    calls = []

    def advance(self, training):
        architecture, recipe = training.architecture, training.settings.recipe
        calls.append((self.run.space.code(architecture), recipe.steps, recipe.seed))
        begun = self.of(architecture, training.settings)[-1]
        self.add(dataclasses.replace(begun, step=recipe.steps, accuracy=truth(architecture, recipe.steps)))

    monkeypatch.setattr(_trainings.Trainings, "_advance", advance)
    return calls


def test_the_first_trainings_are_apart_and_the_others_are_ranked_better_than_by_score(run, trainings):
    entries = predict(run, WIDE, 12, quality=False)
    codes = [code for code, _, _ in trainings]
    assert len(codes) == len(set(codes)) == 12
    first = [run.space.parse(code) for code in codes[:5]]
    scored = Run(run.folder).ranking(1)
    assert first[0] == scored[0].architecture
    assert all(difference(a, b) >= 0.2 for i, a in enumerate(first) for b in first[:i])
    others = [e for e in entries if e.code not in codes]
    true = [truth(e.architecture) for e in others]
    assert kendall([e.score for e in others], true) > kendall([e.params for e in others], true) + 0.3
    assert entries == list(Run(run.folder).ranking())
    assert {e.code for e in entries} == {e.code for e in scored} and {e.search for e in entries} == {2}
    assert all(e.parts["low"] <= e.score <= e.parts["high"] for e in entries)
    assert np.mean([e.parts["low"] <= truth(e.architecture) <= e.parts["high"] for e in entries]) > 0.8
    assert "90 % interval" in str(Ranking(entries))


def test_a_measure_may_be_negative(run, trainings, monkeypatch):
    monkeypatch.setitem(globals(), "truth", lambda architecture, steps, plain=truth: plain(architecture, steps) - 2)
    entries = predict(run, WIDE, 6, quality=False)
    assert all(-2 < entry.score < -1 for entry in entries)


def test_the_same_call_and_other_budgets_train_nothing_again(run, trainings):
    first = predict(run, WIDE, 8, quality=False)
    files = [p.read_text() for p in (run.folder / "ranking.jsonl", run.folder / "run.json")]
    assert predict(Run(run.folder), WIDE, 8, quality=False) == first
    assert files[0] == (run.folder / "ranking.jsonl").read_text()
    assert len(trainings) == 8
    small = dataclasses.replace(WIDE, budget=by_params().search.budget)
    within = predict(Run(run.folder), small, 8, quality=False)
    assert len(trainings) == 8 and all(e.macs <= 70_000 for e in within) and len(within) < len(first)
    predict(Run(run.folder), small, 9, quality=False)
    assert len(trainings) == 9


def test_finals_of_a_ranking_by_trainings_have_the_random_networks_of_its_search(run, trainings):
    predict(run, dataclasses.replace(WIDE, num_evaluations=6, control=True), 3, quality=False)
    opened = Run(run.folder)
    drawn = [e.architecture for e in opened.storage.ranking(1) if e.searcher == RANDOM]
    assert drawn and opened.storage.manifest["searches"][1]["of"] == 1
    assert _Finals(opened, Finals(), by_params().retrain, _trainings.Trainings(opened))._random(2) == drawn[:2]


def test_trainings_stop_where_one_more_gains_less_than_the_noise(run, trainings, monkeypatch):
    monkeypatch.setattr(job._Predictions, "known_length", _lengths.Length(8, 0.2))
    entries = predict(run, WIDE, 30, quality=False)
    assert len(trainings) == 5
    control = Run(run.folder).storage.results()["controls"]["trainings"]
    assert control["value"] < 0.2 and "expected to gain less than the noise of 20.00 points" in control["stopped"]
    assert f"Place 1 is expected to have {entries[0].score:.2%}" in control["sentence"]


def lengths(table, entries=6):
    """`shortest_length` where network k has the accuracy `table[steps, seed][k]`."""
    phases = {}
    storage = SimpleNamespace(phase=phases.get, finish=lambda name, **record: phases.__setitem__(name, record))
    names = [SimpleNamespace(architecture=k) for k in range(entries)]

    def train_one(role, architecture, settings):
        recipe = settings.recipe
        calls.append((architecture, recipe.steps, recipe.seed))
        return SimpleNamespace(accuracy=table[recipe.steps, recipe.seed][architecture], name="x", problem="")

    calls = []
    fake = SimpleNamespace(
        run=SimpleNamespace(storage=storage),
        train_all=lambda jobs: [train_one(*j[:3]) for j in jobs],
        seconds_of=lambda *_: 60.0,
    )
    return lambda: shortest_length(fake, with_length(by_params().retrain, 8), names, 20), phases, calls


def test_the_shortest_length_whose_order_agrees_is_used_and_measured_once(caplog):
    caplog.set_level("INFO")
    rising, mixed = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.3, 0.1, 0.6, 0.2, 0.5, 0.4]
    table = {(8, 0): rising, (8, 1): rising, (4, 0): rising, (4, 1): [a + 0.02 for a in rising]}
    measure, phases, calls = lengths(table | {(2, 0): mixed, (2, 1): mixed})
    length = measure()
    assert length.steps == 4 and length.noise == pytest.approx(0.01414, abs=1e-5)
    assert {place for place, _, _ in calls} == {0, 1, 2, 4, 5} and len(calls) == 5 * 2 * 3
    five = [0, 1, 2, 4, 5]
    tau = kendall([mixed[k] for k in five], [rising[k] for k in five])
    assert phases[LENGTHS]["agreement"] == {"2": pytest.approx(tau), "4": 1.0, "8": 1.0}
    assert f"2 steps {tau:.2f}, 4 steps 1.00, 8 steps 1.00; 4 steps are used" in caplog.text
    assert measure() == length and len(calls) == 30


def test_where_no_length_agrees_the_cost_is_said(caplog):
    caplog.set_level("INFO")
    first, second = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.3, 0.1, 0.6, 0.2, 0.5, 0.4]
    measure, _, _ = lengths({(steps, seed): (first, second)[seed] for steps in (2, 4, 8) for seed in (0, 1)})
    assert measure() is None
    assert "none reaches 0.8" in caplog.text
    assert "20 trainings of 8 steps would cost roughly 20 min, and those of twice as many 40 min" in caplog.text


def test_without_a_length_the_order_of_the_score_stays(run, trainings, monkeypatch):
    monkeypatch.setattr(job, "shortest_length", lambda *_: None)
    assert [e.score for e in predict(run, WIDE, 8)] == sorted(
        (e.params for e in Run(run.folder).ranking()), reverse=True
    )
    assert trainings == []


def steps_until(monkeypatch, last):
    """Count training steps; the one after `last` is interrupted."""
    steps, step = [], _trainings.Training.step

    def counted(self, **options):
        if len(steps) == last:
            raise KeyboardInterrupt
        steps.append(self.index)
        return step(self, **options)

    monkeypatch.setattr(_trainings.Training, "step", counted)
    return steps


def outcome(folder):
    """What a run says, without its times."""
    rows = [dataclasses.replace(TrainingRow(**row), seconds=0) for row in Run(folder).storage.lines("trainings.jsonl")]
    entries = [dataclasses.replace(entry, seconds=0) for entry in Run(folder).ranking()]
    return rows, entries, Run(folder).storage.results()["controls"]["trainings"]


def test_a_killed_call_goes_on_to_the_same_result_bit_for_bit(run, tmp_path, trained, monkeypatch):
    whole = steps_until(monkeypatch, 10**6)
    predict(run, WIDE, 5, quality=False)
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    interrupted = steps_until(monkeypatch, len(whole) // 2)
    with pytest.raises(KeyboardInterrupt):
        predict(Run(other), WIDE, 5, quality=False)
    monkeypatch.undo()
    rest = steps_until(monkeypatch, 10**6)
    predict(Run(other), WIDE, 5, quality=False)
    assert outcome(other) == outcome(run.folder)
    assert len(interrupted) + len(rest) < len(whole) + 8  # at most the training that was interrupted begins again
    assert (run.folder / "students" / "trained-1" / "student.json").is_file()


def table_of(run, folder, rows=36, unit=1.0, column="accuracy"):
    path = folder / "results.csv"
    architectures = list(run.space.all())[:rows]
    lines = [f"{run.space.code(a)},{unit * truth(a)!r}" for a in architectures]
    path.write_text("\n".join([f"arch,{column}", *lines]) + "\n")
    return path


@pytest.mark.parametrize(("unit", "column"), [(1.0, "accuracy"), (100.0, "mean_acc")])
def test_a_file_of_results_counts_as_trainings(run, tmp_path, trainings, unit, column):
    path = table_of(run, tmp_path, 20, unit, column)
    entries = predict(run, WIDE, 20, results=path)
    assert trainings == []
    listed = [json.loads(line) for line in (run.folder / "imported.jsonl").read_text().splitlines()]
    known = {line["code"] for line in listed}
    measured = {e.code: truth(e.architecture) for e in entries if e.code in known}
    assert [line["accuracy"] for line in listed] == pytest.approx([measured[line["code"]] for line in listed])
    assert max(abs(e.score - measured[e.code]) for e in entries if e.code in known) < 0.02
    predict(Run(run.folder), WIDE, results=path)
    assert len((run.folder / "imported.jsonl").read_text().splitlines()) == len(listed)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("arch,accuracy\n00.00.,1e3\n", "accuracies must be in [0, 1] or in percent, got 1000"),
        ("arch,accuracy\n00.00.,-1\n", "accuracies must be in [0, 1] or in percent, got -1"),
        ("arch,accuracy\n00.00.,nan\n", "must be a finite number, got 'nan'"),
        ("arch,accuracy\n99.99.,0.5\n", "line 2: column 'arch' must be a code of"),
        ("arch,top1\n00.00.,0.5\n", "has no column 'accuracy'"),
        ("arch,accuracy\n", "must have at least 1 rows, got 0"),
        ("arch,accuracy\n00.00.,0.5\n", "needs at least 3 results, got 1. Raise --trainings"),
        (b"arch,accuracy\n\xff\xfe\n", "is no text file"),
        (None, "does not exist"),
    ],
)
def test_a_file_of_results_that_cannot_be_used_is_refused(run, tmp_path, content, said):
    path = tmp_path / "results.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        predict(run, WIDE, results=path)
    assert said in str(error.value)


def test_the_command_line_says_what_trainings_need(run, capsys):
    with pytest.raises(SystemExit) as end:
        main(["search", str(run.folder), "--no-quality"])
    assert end.value.code == 2 and "without --trainings" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["search", str(run.folder), "--trainings", "0"])
    assert end.value.code == 2


def test_a_search_of_too_few_networks_is_refused(run, trainings):
    few = dataclasses.replace(WIDE, num_evaluations=2)
    with pytest.raises(ValueError, match="needs a search of at least 3 networks, got 2"):
        predict(run, few, 5)


def test_the_score_of_a_search_is_that_of_networks_outside_of_its_budget_too(run, trainings):
    predict(run, WIDE, 6, quality=False)
    small = dataclasses.replace(WIDE, budget=by_params().search.budget)
    number = search(Run(run.folder), small)[0].search
    predictions = job._Predictions(Run(run.folder), number, _trainings.Trainings(Run(run.folder)))
    results = predictions.results(predictions.known_length)
    outside = [r for r in results if r.architecture not in {e.architecture for e in predictions.entries}]
    assert outside
    architectures = [r.architecture for r in outside] + [e.architecture for e in predictions.entries]
    _, scores = predictions._known(architectures, results)
    space = predictions.run.space
    assert kendall(scores, [cost(space.blueprint(a)).params for a in architectures]) == pytest.approx(1)


def test_after_the_first_the_largest_expected_improvement_is_trained(run, trainings):
    predict(run, WIDE, 5, quality=False)
    predictions = job._Predictions(Run(run.folder), 1, _trainings.Trainings(Run(run.folder)))
    results = predictions.results(predictions.known_length)
    predictor = predictions.fitted(results, falls_back=False)
    features, scores = predictions._known([e.architecture for e in predictions.entries], results)
    best = predictor.predict(features.values, scores).max()
    gains = predictor.improvement(features.values, best, scores)
    left = [i for i, e in enumerate(predictions.entries) if e.code not in {code for code, _, _ in trainings}]
    assert gains[left].max() > 2 * np.median(gains[left])
    predict(Run(run.folder), WIDE, 6, quality=False)
    assert trainings[5][0] == predictions.entries[left[int(gains[left].argmax())]].code
