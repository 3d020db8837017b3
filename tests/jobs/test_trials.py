"""How a student is trained, by the number of its steps."""

import pytest

from kdnas.jobs._trials import MIXTURES, matching, mixture
from kdnas.losses.feature.leading_channels import LeadingChannels
from kdnas.specs import spec
from kdnas.tasks.classification import Classification
from kdnas.tasks.lanes import Lanes
from kdnas.tasks.segmentation import Segmentation


def test_channels_are_matched_in_the_first_thousand_steps():
    assert matching(700) == matching(1000) == spec(LeadingChannels)
    assert matching(4000).build(LeadingChannels).until == pytest.approx(0.25)


def test_a_mixture_matches_channels_where_it_is_asked_to():
    plain, matched = (str(mixture("labels", 4000, Classification(), features=features)) for features in (False, True))
    assert "LeadingChannels" in matched and "LeadingChannels" not in plain


@pytest.mark.parametrize(
    ("task", "teacher"),
    [(Classification(), "SoftTargets"), (Segmentation(), "PixelWise"), (Lanes(), "SoftTargets")],
    ids=["classification", "segmentation", "lanes"],
)
def test_a_mixture_is_of_the_task_s_own_losses(task, teacher):
    weights = {
        name: [(weight, loss.make.rpartition(":")[2]) for weight, loss in terms(name, task)] for name in MIXTURES
    }
    assert weights == {
        "half labels, half teacher": [(0.5, "CrossEntropy"), (0.5, teacher)],
        "labels": [(1.0, "CrossEntropy")],
        "a tenth labels": [(0.1, "CrossEntropy"), (0.9, teacher)],
    }


def terms(name, task):
    return dict(mixture(name, 100, task, features=False).arguments)["terms"]
