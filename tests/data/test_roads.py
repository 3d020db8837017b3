"""Synthetic roads: a function of seed and place, lines where their labels say, and what is refused."""

import pytest
import torch

from kdnas.data.load import load_data
from kdnas.data.roads import roads
from kdnas.tasks.lanes import exists


def test_an_image_depends_on_its_number_and_the_seed_alone():
    few, more, other = (
        roads(*numbers, seed=seed) for numbers, seed in (((10, 20, 32), 1), ((20, 20, 32), 1), ((10, 20, 32), 2))
    )
    # The first fifth is for test.
    assert torch.equal(few.test.images, more.test.images[:2]) and torch.equal(few.test.labels, more.test.labels[:2])
    assert few.fingerprint == roads(10, 20, 32, seed=1).fingerprint != other.fingerprint
    assert [len(part) for part in (more.train, more.search, more.test)] == [14, 2, 4]
    assert load_data("roads:10,height=20,width=32,seed=1").build().fingerprint == few.fingerprint


def test_lines_are_brighter_than_the_road_beside_them():
    data = roads(60, 48, 96)
    images, labels = data.train.images.float().mean(1), data.train.labels
    columns = (labels * 96 - 0.5).round().long()
    inside = (labels >= 0) & (columns > 6) & (columns < 89)
    inside[:, :, :30] = False

    def brightness(shift):
        places = (columns + shift).clamp(0, 95)
        values = images[:, None].expand(-1, 4, -1, -1).gather(3, places[..., None])[..., 0]
        return values[inside].mean()

    assert brightness(0) > brightness(-5) + 10 and brightness(0) > brightness(5) + 10


def test_lanes_differ_and_stay_in_order():
    labels = torch.cat([part.labels for part in (roads(60, 32, 64).train, roads(60, 32, 64, seed=1).train)])
    there = exists(labels).float().mean(0)
    assert (there > 0.3).all() and (there[1:3] > there[[0, 3]]).all() and exists(labels).any(1).all()
    both = (labels[:, 1] >= 0) & (labels[:, 2] >= 0)
    assert (labels[:, 1] < labels[:, 2])[both].all()
    assert roads(10, 16, 32, lanes=6).train.labels.shape[1] == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("roads", "roads must have a number of images: roads:COUNT"),
        ("roads:", "roads must have a number of images"),
        ("roads:many", "count of roads:many must be a whole number, got 'many'"),
        ("roads:9", "`count` of roads must be at least 10, got 9"),
        ("roads:20,height=8", "at least 16 x 16, got 8 x 160"),
        ("roads:20,lanes=3", "even number from 2 to 32, got 3"),
        ("roads:100000,height=512,width=512", "more than a gibibyte"),
        ("roads:20,depth=3", "depth"),
    ],
)
def test_other_roads_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        load_data(text).build()
