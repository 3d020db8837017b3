import dataclasses

import pytest

from kdnas.cost import Budget
from kdnas.distillers.block_wise import BlockWise
from kdnas.distillers.single_path import SinglePath
from kdnas.jobs.block_rating import rate_blocks, search_blocks
from kdnas.jobs.export import place_of
from kdnas.jobs.search import search
from kdnas.jobs.settings import Experiment, Search, Train
from kdnas.jobs.train import TEACHER_CACHE, train
from kdnas.scorers.blocks import Blocks
from kdnas.search import Infeasible
from kdnas.searchers.exhaustive import Exhaustive
from kdnas.spaces.macro import Macro
from kdnas.spec import spec
from kdnas.training import Recipe

RECIPE = Recipe(steps=4, batch_size=16, learning_rate=0.01, optimizer="adamw", clip=0.0)
TRAIN = Train(
    space=Macro(depths=(1, 2), widths=(4, 6), stem_width=4, head_width=8, resolutions=(8,)),
    data=spec("tests.toy:data"),
    distiller=spec(BlockWise),
    recipe=RECIPE,
    teacher_recipe=dataclasses.replace(RECIPE, steps=2),
    teacher_views=1,
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return train(Experiment(train=TRAIN), tmp_path_factory.mktemp("runs") / "dna")


def test_a_run_trained_block_wise_caches_its_teacher_and_is_searched_exactly(opened):
    assert (opened.run.folder / TEACHER_CACHE / "index.json").is_file()
    found = search_blocks(opened, Search(num_evaluations=5, num_images=30))
    assert len(found) == 5
    assert place_of(opened, 1).architecture == found[0].architecture
    assert opened.run.phase("search")["search"] == 1
    # The same network is the best of scoring all of them one by one, with the same score.
    settings = Search(scorer=spec(Blocks), searcher=spec(Exhaustive), num_images=30, control=False)
    every = search(opened, settings)
    assert every[0].score == pytest.approx(found[0].score, rel=1e-5)
    assert [e.code for e in every[:5]] == [e.code for e in found]


def test_the_budget_is_kept_and_one_that_no_network_meets_is_refused(opened):
    cheapest = min(e.macs for e in search_blocks(opened, Search(num_images=30)))
    inside = search_blocks(opened, Search(budget=Budget(macs=cheapest), num_images=30))
    assert [e.macs for e in inside] == [cheapest] * len(inside)
    with pytest.raises(Infeasible):
        search_blocks(opened, Search(budget=Budget(macs=10), num_images=30))


def test_the_trained_adapters_are_those_of_the_checkpoint(opened):
    again = type(opened)(opened.run.folder)
    tables = [rate_blocks(o.supernet, o.distiller, o.evidence(30, 0)) for o in (opened, again)]
    assert tables[0] == tables[1]


def test_another_distiller_is_refused(tmp_path):
    made = dataclasses.replace(TRAIN, distiller=spec(SinglePath), teacher_views=0)
    other = train(Experiment(train=made), tmp_path / "spos")
    with pytest.raises(ValueError, match="SinglePath"):
        search_blocks(other, Search(num_images=30))
