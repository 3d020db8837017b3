import pytest
import torch

from kdnas.losses.stage_pairs import Adapter, StagePairs
from kdnas.outputs import Outputs


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(*shapes, batch=4):
    return Outputs(torch.zeros(batch, 2), tuple(normal(batch, *shape, seed=i) for i, shape in enumerate(shapes)))


CNN = outputs((8, 16, 16), (16, 8, 8), (32, 4, 4))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        pytest.param(CNN, CNN, ((0, 0), (1, 1), (2, 2)), id="the same resolutions"),
        pytest.param(CNN, outputs((8, 8, 8), (9, 4, 4)), ((0, 0), (1, 0), (2, 1)), id="the nearest resolution"),
        pytest.param(
            CNN,
            outputs((4, 16, 16), (5, 16, 16), (6, 8, 8), (7, 4, 4), (8, 4, 4)),
            ((0, 1), (1, 2), (2, 4)),
            id="the deepest of a resolution",
        ),
        pytest.param(
            outputs((4, 8, 8), (5, 8, 8)),
            outputs((4, 8, 8), (5, 8, 8), (6, 8, 8), (7, 8, 8)),
            ((0, 1), (1, 3)),
            id="spread evenly, last with last",
        ),
        pytest.param(
            outputs((4, 8, 8), (5, 8, 8), (6, 8, 8)),
            outputs((4, 8, 8), (5, 8, 8)),
            ((0, 0), (1, 1), (2, 1)),
            id="more student stages than teacher stages",
        ),
        pytest.param(
            CNN,
            outputs(*[(65, 192)] * 6),
            ((0, 1), (1, 3), (2, 5)),
            id="spread over the layers of a transformer, which have one resolution",
        ),
    ],
)
def test_stages_are_paired_by_resolution(student, teacher, expected):
    taps = StagePairs()
    table = taps.prepare(student, teacher)
    assert taps.pairs == expected
    assert tuple((row.student, row.teacher) for row in table) == expected


def test_stages_are_paired_by_the_most_similar_dissimilarity_matrix():
    student = outputs((8, 16, 16), (16, 8, 8), batch=8)
    shuffled = student._replace(features=(2 * student.features[1].flatten(1) + 1, student.features[0].flip(1)))
    taps = StagePairs(pairs="rdm")
    taps.prepare(student, shuffled)
    assert taps.pairs == ((0, 1), (1, 0))


def test_stages_are_paired_in_order_where_their_counts_agree():
    taps = StagePairs(pairs="order")
    taps.prepare(CNN, outputs((3, 2, 2), (4, 8, 8), (5, 1, 1)))
    assert taps.pairs == ((0, 0), (1, 1), (2, 2))
    with pytest.raises(
        ValueError, match=r"equal numbers of stages, got student \[\(8, 16, 16\).* teacher \[\(3, 2, 2\)\]"
    ):
        taps.prepare(CNN, outputs((3, 2, 2)))


def test_explicit_pairs_may_count_from_the_end():
    taps = StagePairs(pairs=((0, 1), (-1, -1)))
    taps.prepare(CNN, CNN)
    assert taps.pairs == ((0, 1), (2, 2))
    for wrong, who in ((((3, 0),), "student"), (((0, -4),), "teacher")):
        with pytest.raises(ValueError, match=f"`taps` must name {who} stages 0 to 2, got"):
            StagePairs(pairs=wrong).prepare(CNN, CNN)


def test_the_map_that_is_classified_comes_after_the_last_stage():
    dense, taps = CNN._replace(classified=normal(4, 5, 16, 16)), StagePairs(pairs="classified", alignment="channels")
    (row,) = taps.prepare(dense, CNN)
    assert (row.student, row.teacher, row.student_shape, row.teacher_shape) == (3, 2, (5, 16, 16), (32, 4, 4))
    ((s, t),) = taps(dense, CNN)
    assert s.shape == t.shape == (4, 32, 4, 4)
    (named,) = StagePairs(pairs=((3, -1),))(dense, CNN)
    assert named[0] is dense.classified and named[1] is CNN.features[-1]
    with pytest.raises(ValueError, match="`taps` must name student stages 0 to 3, got 4"):
        StagePairs(pairs=((4, 0),)).prepare(dense, CNN)
    with pytest.raises(ValueError, match="name stage 3 of the student, which has 3 now"):
        taps(CNN, CNN)


def test_an_unknown_way_of_pairing_and_a_network_without_stages_are_refused():
    with pytest.raises(ValueError, match="`taps` must be resolution, rdm, order, classified or explicit pairs"):
        StagePairs(pairs="name")
    with pytest.raises(ValueError, match="stages to pair, got 3 of the student, 0 of the teacher"):
        StagePairs().prepare(CNN, outputs())


def test_features_of_any_shape_are_passed_through_where_nothing_is_to_be_aligned():
    teacher = outputs((5, 7))
    ((s, t),) = StagePairs(pairs=((0, 0),))(CNN, teacher)
    assert s is CNN.features[0] and t is teacher.features[0]


@pytest.mark.parametrize(
    ("student", "teacher", "size", "adapter"),
    [
        pytest.param((6, 8, 6), (6, 8, 6), (8, 6), "none", id="CNN to CNN, equal"),
        pytest.param((6, 8, 6), (9, 8, 6), (8, 6), "conv1x1", id="CNN to CNN, other channels"),
        pytest.param((6, 8, 6), (9, 4, 12), (4, 6), "pool + conv1x1", id="CNN to CNN, other height and width"),
        pytest.param((6, 8, 8), (16, 9), (4, 4), "pool + conv1x1", id="ViT to CNN"),
        pytest.param((17, 9), (6, 4, 4), (4, 4), "tokens to map + conv1x1", id="CNN to ViT with a class token"),
        pytest.param((16, 9), (64, 9), (4, 4), "pool", id="ViT to ViT"),
    ],
)
def test_pairs_are_brought_to_one_shape(student, teacher, size, adapter):
    s, t = outputs(student), outputs(teacher)
    taps = StagePairs(alignment="channels")
    (row,) = taps.prepare(s, t)
    ((mine, theirs),) = taps(s, t)
    assert mine.shape == theirs.shape
    assert mine.shape[2:] == size
    assert (row.student_shape, row.teacher_shape, row.adapter) == (student, teacher, adapter)
    assert row.parameters == sum(p.numel() for p in taps.parameters())
    assert (row.parameters > 0) == ("conv1x1" in adapter)


def test_tokens_are_laid_out_like_the_map_they_are_compared_with():
    image = normal(2, 5, 8, 4)
    student = Outputs(torch.zeros(2, 2), (image,))
    teacher = Outputs(torch.zeros(2, 2), (image.flatten(2).transpose(1, 2),))
    for a, b in ((student, teacher), (teacher, student)):
        ((mine, theirs),) = StagePairs(alignment="positions")(a, b)
        assert torch.equal(mine, image) and torch.equal(theirs, image)


def test_a_pair_that_cannot_be_matched_fails_at_once_naming_both_shapes():
    student, teacher = outputs((3, 4, 4, 4)), outputs((8, 4, 4))
    with pytest.raises(
        ValueError, match=r"student stage 0 \(4, 3, 4, 4, 4\) and teacher stage 0 \(4, 8, 4, 4\) cannot"
    ):
        StagePairs(alignment="positions").prepare(student, teacher)


def test_other_channels_without_preparation_fail_naming_both_shapes():
    with pytest.raises(ValueError, match=r"\(4, 8, 4, 4\) and teacher stage 0 \(4, 9, 4, 4\) .* loss.prepare"):
        StagePairs(alignment="channels")(outputs((8, 4, 4)), outputs((9, 4, 4)))
    # It is the pairs that count, not the stages in order.
    StagePairs(pairs=((0, 1),), alignment="channels")(outputs((8, 4, 4)), outputs((9, 4, 4), (8, 4, 4)))


def test_a_narrower_student_without_an_elastic_preparation_fails():
    taps = StagePairs(alignment="channels")
    taps.prepare(outputs((8, 4, 4)), outputs((8, 4, 4)))
    with pytest.raises(ValueError, match="elastic=True"):
        taps(outputs((6, 4, 4)), outputs((8, 4, 4)))


def test_an_adapter_of_a_narrow_student_is_the_wide_one_on_the_leading_channels():
    adapter, x = Adapter(8, 5), normal(2, 8, 3, 3)
    for width in (1, 4, 8):
        padded = torch.cat([x[:, :width], torch.zeros(2, 8 - width, 3, 3)], 1)
        assert torch.allclose(adapter(x[:, :width]), adapter(padded), atol=1e-6)
    with pytest.raises(ValueError, match="at most 8 student channels, got 9"):
        adapter(normal(2, 9, 3, 3))


def test_a_narrow_student_trains_the_leading_columns_only():
    adapter = Adapter(8, 5)
    adapter(normal(2, 3, 3, 3)).sum().backward()
    assert adapter.weight.grad[:, :3].abs().min() > 0
    assert adapter.weight.grad[:, 3:].abs().max() == 0


def test_adapters_of_a_supernet_are_built_for_equal_widths_too_and_start_as_the_identity():
    wide, narrow = outputs((8, 4, 4)), outputs((6, 4, 4))
    taps = StagePairs(alignment="channels")
    (row,) = taps.prepare(wide, wide, elastic=True)
    assert row.parameters == 64
    ((mine, _),) = taps(wide, wide)
    assert torch.equal(mine, wide.features[0])
    ((mine, theirs),) = taps(narrow, wide)
    assert mine.shape == theirs.shape
    assert torch.equal(mine[:, :6], narrow.features[0]) and mine[:, 6:].abs().max() == 0


def test_preparing_again_replaces_pairs_and_adapters():
    taps = StagePairs(alignment="channels")
    taps.prepare(CNN, outputs((9, 16, 16), (9, 8, 8), (9, 4, 4)))
    assert len(list(taps.parameters())) == 3
    taps.prepare(CNN, outputs((8, 16, 16), (16, 8, 8), (33, 4, 4)))
    assert [p.shape for p in taps.parameters()] == [(33, 32)]
