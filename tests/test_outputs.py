import math

import pytest
import torch

from kdnas.outputs import Moment, Outputs


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan, "0", None])
def test_a_progress_outside_of_0_to_1_is_refused(progress):
    with pytest.raises(ValueError, match=r"`progress` of a Moment must be a number in \[0, 1\], got"):
        Moment(progress)


def test_the_map_that_is_classified_goes_with_the_features():
    maps = tuple(torch.rand(2, 3, 4, 5) for _ in range(2))
    outputs = Outputs(torch.zeros(2, 3, 4, 5), maps, classified=torch.rand(2, 6, 4, 5))
    assert outputs.maps == (*maps, outputs.classified) and outputs._replace(classified=None).maps == maps
    assert [name for name, _ in outputs.select(("features",))] == ["features[0]", "features[1]", "classified"]
    assert outputs.of(("features",)).classified is outputs.classified and outputs.of(("logits",)).classified is None
    assert outputs.map(lambda x: x[:1]).classified.shape == (1, 6, 4, 5)
    with pytest.raises(ValueError, match="`classified` of the student must be a dense tensor"):
        outputs._replace(classified=torch.ones(2, 6, 4, 5, dtype=torch.int64)).check("student")


@pytest.mark.parametrize("ids", [[0, 1], torch.rand(2), torch.arange(4).reshape(2, 2), torch.tensor([True])])
def test_ids_must_be_whole_numbers_one_per_sample(ids):
    with pytest.raises(ValueError, match=r"`ids` of a Moment must be whole numbers \[batch\], got"):
        Moment(ids=ids)


def test_a_moment_takes_indices_and_names_a_negative_one():
    assert (
        Moment(1, ids=torch.arange(3)).progress == 1 and Moment(ids=torch.zeros(0, dtype=torch.int32)).ids is not None
    )
    with pytest.raises(ValueError, match="`ids` of a Moment must be at least 0, got -2"):
        Moment(ids=torch.tensor([0, -2]))
