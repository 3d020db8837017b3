"""Logits stored as their largest few: bounded in bytes and in error, whatever the distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdnas.teachers._top import MOST, MOST_ERROR, Summary, packed, unpacked

OTHERS = 16  # bytes of index and checksum


def divergences(logits, stored):
    """KL at temperature 1, in float64."""
    ours, theirs = logits.double().log_softmax(1), stored.double().log_softmax(1)
    return (ours.exp() * (ours - theirs)).sum(1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 1000), st.sampled_from([0.0, 0.1, 1.0, 4.0, 20.0, 1e4]), st.floats(-1e3, 1e3)
)
def test_every_distribution_is_within_the_bounds_or_whole(seed, classes, spread, shift):
    logits = torch.randn(5, classes, generator=torch.Generator().manual_seed(seed)) * spread + shift
    tensors, summary = packed(logits)
    rows = torch.tensor([4, 0, 0, 2, 1, 3])
    stored = unpacked(tensors, rows)
    errors, is_whole = divergences(logits[rows], stored), (tensors["counts"] == 255)[rows]
    assert float(errors.max()) <= MOST_ERROR * 1.01 and summary.whole == int((tensors["counts"] == 255).sum())
    assert torch.equal(stored[is_whole], logits[rows][is_whole])
    assert (4 * tensors["counts"][tensors["counts"] != 255].long() + 9 + OTHERS).le(300).all()
    largest = logits[rows].max(1).values
    torch.testing.assert_close(stored.max(1).values, largest, rtol=2e-3, atol=0.02 + 1e-3 * abs(shift))


def test_few_logits_are_stored_of_a_sharp_distribution_and_all_of_a_flat_one():
    sharp, flat = torch.full((1, 1000), -20.0), torch.arange(1000.0)[None] / 200
    sharp[0, 7] = 20.0
    tensors, summary = packed(torch.cat([sharp, flat]))
    assert tensors["counts"].tolist() == [1, 255] and tensors["indices"].tolist() == [7 - 2**15]
    assert summary == Summary(2, 2 + 2 + 2 * 9 + 4000, 1, summary.error) and summary.error < 1e-6
    assert "1 of 2 distributions are too flat for 68 logits" in str(summary)
    even, _ = packed(torch.zeros(1, 1000))
    assert even["counts"].tolist() == [1]  # the rest is as large


def test_what_is_not_finite_is_stored_as_it_is():
    logits = torch.zeros(3, 100)
    logits[0, 3], logits[1, 4] = float("nan"), float("inf")
    tensors, summary = packed(logits)
    assert summary.whole == 2
    assert torch.equal(unpacked(tensors, torch.arange(3)).isfinite(), logits.isfinite())


def test_summaries_add_up():
    one, two = packed(torch.randn(4, 300)), packed(torch.randn(3, 300))
    both = one[1].and_of(two[1])
    assert both.images == 7 and both.size == one[1].size + two[1].size
    assert both.error == max(one[1].error, two[1].error)


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 2**16 + 1)])
def test_what_is_no_distribution_per_image_is_refused(shape):
    with pytest.raises(ValueError, match=r"`cache_outputs` must be all for logits of shape \["):
        packed(torch.zeros(shape))


def test_seventy_logits_would_be_too_many():
    assert 4 * MOST + 9 + OTHERS <= 300 < 4 * (MOST + 1) + 9 + OTHERS
