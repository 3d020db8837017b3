import json

import pytest
import torch

from kdnas.data.base import Data
from kdnas.distillers.block_wise import BlockWise
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.ranks import team
from kdnas.settings import Recipe
from kdnas.specs import parse_spec
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.teachers.cache import INDEX, TeacherCache, open_cache
from kdnas.teachers.combined import Ensemble, Route
from kdnas.training.loop import Training
from tests.tasks.test_segmentation import shapes
from tests.toy import part

SPACE = load_space("toy").fitted(classes=3, image_channels=3)
PARTS = (part(300, "train"), part(30, "search"), part(30, "test"))
DATA = Data(*PARTS, class_names=("a", "b", "c"), augmentation="crop_flip")
STILL = Data(*PARTS, class_names=("a", "b", "c"))


def teacher(seed=5):
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), seed)
    return Frozen(network, preprocessing=DATA.preprocessing)


def written(folder, data=DATA, views=2, taught=None, limit=1.0):
    return open_cache(folder / "cache", taught or teacher(), data, seed=3, views=views, limit=limit)


def test_cached_outputs_are_the_teacher_s_on_the_same_augmented_pixels(tmp_path):
    cache, ids = written(tmp_path), torch.tensor([299, 0, 17, 256, 255])
    for view in range(2):
        pixels = DATA.view(ids, 3, view)
        found, live = cache.outputs(ids, view, pixels), teacher()(pixels)
        torch.testing.assert_close(found.logits, live.logits)
        assert len(found.features) == len(live.features)
        for mine, theirs in zip(found.features, live.features, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_no_more_files_are_open_than_a_process_can_map(tmp_path, monkeypatch):
    cache, ids = written(tmp_path), torch.tensor([299, 0])  # of both files of a view
    whole = [cache.outputs(ids, view, DATA.view(ids, 3, view)).logits for view in range(2)]
    assert len(cache._shards) == 4
    monkeypatch.setattr("kdnas.teachers.cache._MOST_OPEN", 2)
    fewer = TeacherCache(tmp_path / "cache", teacher(), DATA, seed=3, views=2)
    for view in (0, 1, 0):
        torch.testing.assert_close(fewer.outputs(ids, view, DATA.view(ids, 3, view)).logits, whole[view])
        assert len(fewer._shards) == 2


def test_of_pixels_the_map_that_is_classified_is_stored_too(tmp_path):
    data, taught = shapes(), initialised(frozen_segmenter, 0)
    cache, ids = written(tmp_path, data, taught=taught), torch.tensor([3, 0])
    pixels = data.view(ids, 3, 1)
    torch.testing.assert_close(cache.outputs(ids, 1, pixels).classified, taught(pixels).classified)
    index = json.loads((tmp_path / "cache" / INDEX).read_text())
    del index["set_of_maps"]  # as it was written before
    (tmp_path / "cache" / INDEX).write_text(json.dumps(index | {"format": 1}))
    with pytest.raises(ValueError, match="was written with another set of maps"):
        TeacherCache(tmp_path / "cache", taught, data, seed=3, views=2)


def frozen_segmenter():
    space = load_space("elastic_segmenter").fitted(classes=2, image_channels=3, size=(12, 20))
    return Frozen(Network(space.blueprint(space.smallest)), preprocessing=shapes().preprocessing)


def test_top_logits_take_few_bytes_and_nothing_else_is_stored(tmp_path, caplog):
    caplog.set_level("INFO", "kdnas")
    taught = Ensemble([teacher(1), teacher(2)])
    cache = open_cache(tmp_path / "cache", taught, DATA, seed=3, views=2, limit=1.0, stored="top_logits")
    ids = torch.tensor([299, 0, 17, 256, 255])
    stored, live = cache.outputs(ids, 1, DATA.view(ids, 3, 1)), taught(DATA.view(ids, 3, 1))
    assert not stored.features and len(stored.members) == 2
    for mine, theirs in [(stored, live), *zip(stored.members, live.members, strict=True)]:
        p, q = theirs.logits.softmax(1), mine.logits.softmax(1)
        assert float((p * (p / q).log()).sum(1).max()) <= 1e-3
    assert "0 of 1,800 distributions are too flat" in caplog.text
    with pytest.raises(ValueError, match="another selection of outputs"):
        TeacherCache(tmp_path / "cache", taught, DATA, seed=3, views=2)


@pytest.mark.parametrize("loss", ["soft_targets", "attention_transfer", "hint", "teacher_graph"])
def test_a_loss_that_reads_more_than_logits_is_refused(tmp_path, loss):
    options = {"seed": 3, "views": 2, "limit": 1.0, "stored": "top_logits"}
    cache = open_cache(tmp_path / "cache", teacher(), DATA, **options)
    distiller = FromTeacher(terms=((1.0, parse_spec("kdnas.losses", loss)),))
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.smallest)), 0)
    recipe = Recipe(steps=2, batch_size=8, seed=3)
    if loss == "soft_targets":
        training = Training(network, distiller, DATA, teacher(), recipe, cache=cache)
        assert training.teacher is None and training.step()
        return
    with pytest.raises(ValueError) as error:
        Training(network, distiller, DATA, teacher(), recipe, cache=cache).step()
    assert "cache" not in str(error.value)


def test_processes_that_write_elsewhere_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(team, "number", lambda: 2)
    with pytest.raises(
        ValueError, match="must be on a file system that all processes share: there is nothing of process"
    ):
        written(tmp_path)


def test_an_image_s_view_depends_on_seed_view_and_image_alone():
    ids = torch.tensor([4, 9])
    assert torch.equal(DATA.view(ids, 3, 1)[1], DATA.view(torch.tensor([9, 7, 2]), 3, 1)[0])
    many = torch.arange(60)
    views = [DATA.view(many, seed, view) for seed, view in ((3, 0), (3, 1), (4, 0))]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert torch.equal(STILL.view(many, 3, 0), STILL.train.take(many))


def test_every_member_of_an_ensemble_is_kept(tmp_path):
    taught, ids = Ensemble([teacher(1), teacher(2)]), torch.arange(5)
    found = written(tmp_path, taught=taught).outputs(ids, 1, DATA.view(ids, 3, 1))
    live = taught(DATA.view(ids, 3, 1))
    assert len(found.members) == 2
    torch.testing.assert_close(found.members[1].features[0], live.members[1].features[0])


def test_the_size_is_said_before_anything_is_written_and_a_limit_is_kept(tmp_path, log):
    with pytest.raises(ValueError, match=r"the limit is 0\.001"):
        written(tmp_path, limit=0.001)
    assert not (tmp_path / "cache").exists()
    # 3 logits, 8 x 8 x 8 and 8 x 4 x 4 features, 4 bytes each.
    each = 4 * (3 + 512 + 128)
    assert f"300 images x 2 views x {each:,} bytes = {300 * 2 * each / 1e9:.3g} GB" in log.text


def test_training_with_a_cache_is_training_without_on_the_same_views(tmp_path):
    taught, recipe = teacher(), Recipe(steps=5, batch_size=100, learning_rate=0.01, optimizer="adamw", seed=3)

    def trained(cache):
        made = Training(initialised(lambda: Supernet(SPACE), 0), BlockWise(), DATA, taught, recipe, cache=cache)
        while not made.done:
            made.step()
        return made.distiller.state_dict()

    class Live:
        views = 2

        def outputs(self, ids, view, pixels):
            assert torch.equal(pixels, DATA.view(ids, 3, view))
            seen.append(view)
            return taught(pixels)

    seen = []
    live = trained(Live())
    assert seen == [0, 0, 0, 0, 1, 1]  # one batch to build the parts, then epochs of three steps
    for name, tensor in trained(written(tmp_path, taught=taught)).items():
        torch.testing.assert_close(tensor, live[name], rtol=1e-3, atol=1e-4)


def test_with_a_cache_the_teacher_is_not_run(tmp_path, monkeypatch):
    cache = written(tmp_path)
    monkeypatch.setattr(Frozen, "teach", lambda *_: pytest.fail("the teacher was run"))
    made = Training(
        initialised(lambda: Supernet(SPACE), 0), BlockWise(), DATA, None, Recipe(steps=1, seed=3), cache=cache
    )
    made.step()


def test_a_changed_file_is_refused(tmp_path):
    cache = written(tmp_path)
    path = tmp_path / "cache" / "view001-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ids = torch.tensor([1, 2])
    cache.outputs(ids, 1, DATA.view(ids, 3, 1))
    ids = torch.tensor([1, 260])
    with pytest.raises(ValueError, match=r"view001-000001\.safetensors .* was changed"):
        cache.outputs(ids, 1, DATA.view(ids, 3, 1))


def test_a_misaligned_file_is_refused(tmp_path):
    written(tmp_path)
    first, second = (tmp_path / "cache" / f"view000-00000{i}.safetensors" for i in range(2))
    index = json.loads((tmp_path / "cache" / INDEX).read_text())
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    files = index["files"]
    files[first.name], files[second.name] = files[second.name], files[first.name]
    (tmp_path / "cache" / INDEX).write_text(json.dumps(index | {"format": 1}))
    ids = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="misaligned"):
        written(tmp_path).outputs(ids, 0, DATA.view(ids, 3, 0))


def test_pixels_other_than_those_written_for_are_refused(tmp_path):
    cache, ids = written(tmp_path), torch.tensor([1, 2])
    pixels = DATA.view(ids, 3, 0)
    for other in (DATA.view(ids, 3, 0).flip(3), DATA.view(ids.flip(0), 3, 0), pixels + 1e-3):
        with pytest.raises(ValueError, match="does not have the pixels"):
            cache.outputs(ids, 0, other)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 4}, "seed"), ({"views": 1}, "number of views"), ({"taught": teacher(6)}, "teacher")],
)
def test_a_cache_of_something_else_is_refused(tmp_path, changes, named):
    written(tmp_path)
    asked = {"taught": teacher(), "seed": 3, "views": 2} | changes
    with pytest.raises(ValueError, match=f"another {named}"):
        TeacherCache(tmp_path / "cache", asked.pop("taught"), DATA, **asked)


def test_a_stale_cache_is_reported_and_replaced(tmp_path, log):
    ids = torch.tensor([1, 2])
    pixels = DATA.view(ids, 3, 0)
    old = written(tmp_path).outputs(ids, 0, pixels).logits
    log.clear()
    new = written(tmp_path, taught=teacher(6))
    assert "written with another teacher; it is replaced" in log.text
    assert torch.allclose(new.outputs(ids, 0, pixels).logits, teacher(6)(pixels).logits, atol=1e-5)
    assert not torch.allclose(old, teacher(6)(pixels).logits, atol=1e-2)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    log.clear()
    written(tmp_path, taught=teacher(6))
    assert log.records == []


def test_a_stale_cache_stays_where_the_new_one_cannot_be_written(tmp_path):
    written(tmp_path)
    with pytest.raises(ValueError, match="the limit is"):
        written(tmp_path, taught=teacher(6), limit=1e-9)
    assert TeacherCache(tmp_path / "cache", teacher(), DATA, seed=3, views=2).views == 2


def test_what_cannot_be_cached_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one view"):
        written(tmp_path, views=0)
    with pytest.raises(ValueError, match="exactly one without augmentation"):
        written(tmp_path, data=STILL)
    with pytest.raises(ValueError, match="route"):
        written(tmp_path, taught=Route([teacher(1), teacher(2)]))
    (tmp_path / "cache").mkdir()
    with pytest.raises(ValueError, match="not a teacher cache"):
        written(tmp_path)


def test_a_broken_writing_leaves_no_cache(tmp_path, monkeypatch):
    calls = []

    def failing(self, pixels, labels, at):
        calls.append(len(pixels))
        if len(calls) > 2:
            raise KeyboardInterrupt
        return teach(self, pixels, labels, at)

    teach = Frozen.teach
    taught = teacher()
    monkeypatch.setattr(Frozen, "teach", failing)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, taught=taught)
    assert not (tmp_path / "cache").exists()
