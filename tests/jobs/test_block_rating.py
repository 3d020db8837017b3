import dataclasses
import json

import pytest

from kdnas.cli.commands import main
from kdnas.costs.budget import Budget
from kdnas.costs.check import Infeasible
from kdnas.distillers.block_wise import BlockWise
from kdnas.distillers.single_path import SinglePath
from kdnas.jobs._block_rating import rate_blocks
from kdnas.jobs.commands import search_settings
from kdnas.jobs.export import place_of
from kdnas.jobs.search import search
from kdnas.jobs.train import TEACHER_CACHE, train
from kdnas.runs.folder import RunFolder
from kdnas.scorers.blocks import Blocks
from kdnas.searchers.exhaustive import Exhaustive
from kdnas.settings import Experiment, FitTeacher, Recipe, Search, Train
from kdnas.spaces.macro import Macro
from kdnas.specs import spec
from kdnas.statistics import kendall

RECIPE = Recipe(steps=4, batch_size=16, learning_rate=0.01, optimizer="adamw", clip=0.0)
TRAIN = Train(
    space=Macro(depths=(1, 2), widths=(4, 6), stem_width=4, head_width=8, resolutions=(8,)),
    data=spec("tests.toy:data"),
    distiller=spec(BlockWise),
    recipe=RECIPE,
    teacher=FitTeacher(recipe=dataclasses.replace(RECIPE, steps=2)),
    teacher_views=1,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(Experiment(train=TRAIN), tmp_path_factory.mktemp("runs") / "dna")


def test_a_run_trained_block_wise_caches_its_teacher_and_is_searched_exactly(run):
    assert (run.storage.folder / TEACHER_CACHE / "index.json").is_file()
    found = search(run, Search(exact=True, num_evaluations=5, num_images=30))
    assert len(found) == 5
    assert place_of(run, 1).architecture == found[0].architecture
    assert run.storage.phase("search")["search"] == 1
    # The same network is the best of scoring all of them one by one, with the same score.
    settings = Search(scorer=spec(Blocks), searcher=spec(Exhaustive), num_images=30, control=False)
    every = search(run, settings)
    assert every[0].score == pytest.approx(found[0].score, rel=1e-5)
    assert [e.code for e in every[:5]] == [e.code for e in found]


def test_the_budget_is_kept_and_one_that_no_network_meets_is_refused(run):
    cheapest = min(e.macs for e in search(run, Search(exact=True, num_images=30)))
    inside = search(run, Search(exact=True, budget=Budget(macs=cheapest), num_images=30))
    assert [e.macs for e in inside] == [cheapest] * len(inside)
    with pytest.raises(Infeasible):
        search(run, Search(exact=True, budget=Budget(macs=10), num_images=30))


def test_the_trained_adapters_are_those_of_the_checkpoint(run):
    again = type(run)(run.storage.folder)
    tables = [rate_blocks(o.supernet, o.distiller, o.evidence(30, 0)) for o in (run, again)]
    assert tables[0] == tables[1]


def test_another_distiller_is_refused(tmp_path):
    made = dataclasses.replace(TRAIN, distiller=spec(SinglePath), teacher_views=0)
    other = train(Experiment(train=made), tmp_path / "spos")
    with pytest.raises(ValueError, match="single_path"):
        search(other, Search(exact=True, num_images=30))


def test_an_exact_search_has_its_controls_and_the_best_is_no_worse_than_a_random_one(run):
    found = search(run, Search(exact=True, num_evaluations=5, num_images=30))
    controls = run.storage.results()["controls"]
    assert {"tau params", "tau macs", "tau layers", "tau depth", "random search"} <= set(controls)
    assert controls["random search"]["value"] <= found[0].score + 1e-6
    number = run.storage.phase("search")["search"]
    drawn = [e for e in run.storage.ranking(number) if e.searcher == "random control"]
    assert len(drawn) == 5
    assert controls["tau macs"]["value"] == pytest.approx(
        kendall([e.score for e in drawn], [float(e.macs) for e in drawn])
    )
    assert "block paths instead of" in run.storage.phase("search")["stopped"]


def test_an_exact_search_that_was_killed_while_recording_ends_like_an_uninterrupted_one(run):
    settings = Search(exact=True, num_evaluations=5, num_images=30)
    search(run, settings)
    storage = RunFolder(run.storage.folder)
    number = len(storage.manifest["searches"])
    whole = storage.ranking(number)
    storage.manifest["searches"][-1]["state"] = "running"
    storage.save()
    lines = storage.path("ranking.jsonl").read_text().splitlines()
    storage.path("ranking.jsonl").write_text("\n".join(lines[:-7]) + "\n" + lines[-7][:20])
    search(type(run)(storage.folder), settings)
    again = RunFolder(storage.folder)
    assert len(again.manifest["searches"]) == number
    assert [(e.code, e.searcher) for e in again.ranking(number)] == [(e.code, e.searcher) for e in whole]


def test_the_command_line_can_ask_for_an_exact_search_and_another_searcher_asks_for_none(run, capsys):
    main(["search", str(run.storage.folder), "--exact", "--num-evaluations", "3", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert [p["searcher"] for p in shown["places"]] == ["exact"] * 3
    assert "random search" in shown["controls"]
    assert search_settings(Search(exact=True), searcher="random_search").exact is False
