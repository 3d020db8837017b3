"""How a student is trained, by the number of its steps."""

import pytest

from kdnas.jobs._trials import matching, mixture
from kdnas.losses.feature.leading_channels import LeadingChannels
from kdnas.specs import spec


def test_channels_are_matched_in_the_first_thousand_steps():
    assert matching(700) == matching(1000) == spec(LeadingChannels)
    assert matching(4000).build(LeadingChannels).until == pytest.approx(0.25)


def test_a_mixture_matches_channels_where_it_is_asked_to():
    plain, matched = (str(mixture("labels", 4000, features=features)) for features in (False, True))
    assert "LeadingChannels" in matched and "LeadingChannels" not in plain
