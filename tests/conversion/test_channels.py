"""Which channels belong together, by hand on small chains of nodes."""

import pytest

from kdnas.conversion.channels import ChannelGroup, Operation, branch_end, channel_groups


def conv(source, inputs, outputs, kernel=1, stride=1, group=0):
    return Operation("conv", (source,), (inputs, outputs, kernel, stride, kernel // 2, 1, group, 0))


def node(op, *inputs, values=()):
    return Operation(op, inputs, values)


def norm(source, channels):
    return node("norm", source, values=(channels, 1e-5, 0.1))


def linear(source, inputs, outputs):
    return node("linear", source, values=(inputs, outputs, 1))


HEAD = (node("mean", 0), linear(1, 8, 5))


def free(layers, side=8):
    return [group for group in channel_groups(layers, 3, side) if not group.fixed]


def test_a_residual_stream_is_one_group_from_its_first_writer_to_its_readers():
    branch = (conv(0, 8, 6), norm(1, 6), node("relu", 2), conv(3, 6, 8), norm(4, 8), node("add", 0, 5))
    groups = channel_groups({"stem": (conv(0, 3, 8), norm(1, 8)), "stages.0.0": branch, "head": HEAD}, 3, 8)
    block = "stages.0.0"
    assert groups == [
        ChannelGroup(3, readers=(("stem", 0),), fixed="they are the images'"),
        ChannelGroup(
            8,
            writers=(("stem", 0), (block, 3)),
            normalisations=(("stem", 1), (block, 4)),
            readers=((block, 0), ("head", 1)),
        ),
        ChannelGroup(6, writers=((block, 0),), normalisations=((block, 1),), readers=((block, 3),)),
        ChannelGroup(5, writers=(("head", 1),), fixed="they are the logits"),
    ]
    assert [group.key for group in groups[1:3]] == ["stem:0:stream", "stages_0_0:0"]


def test_a_grouped_convolution_keeps_whole_groups_and_a_depthwise_one_any_number():
    def multiple(group):
        nodes = (conv(0, 3, 12), conv(1, 12, 12, 3, group=group), conv(2, 12, 8))
        (found,) = [g for g in free({"stem": nodes, "head": HEAD}) if g.size == 12]
        assert found.writers == (("stem", 0), ("stem", 1)) and found.readers == (("stem", 2),)
        return found.multiple

    assert [multiple(group) for group in (1, 3, 4)] == [1, 3, 4]
    # Groups of 4 and of 6 that are added have to be whole at once.
    nodes = (conv(0, 3, 12), conv(1, 12, 12, group=4), conv(1, 12, 12, group=6), node("add", 2, 3), conv(4, 12, 8))
    assert [g.multiple for g in free({"stem": nodes, "head": HEAD}) if g.size == 12] == [12]


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ((conv(0, 3, 4), node("cat", 1, 1), conv(2, 8, 8)), "concatenated with themselves"),
        (
            (conv(0, 3, 4), conv(0, 3, 4), node("cat", 1, 2), conv(0, 3, 8), node("add", 3, 4)),
            "added to others that are",
        ),
        ((conv(0, 3, 4), conv(0, 3, 2), node("cat", 1, 2), conv(3, 6, 6, group=3)), "concatenated with others"),
        ((conv(0, 3, 4), conv(1, 4, 8, group=2)), "grouped convolution"),
        ((conv(0, 3, 8), conv(1, 8, 1), node("mul", 1, 2)), "spread over others"),
    ],
)
def test_what_must_stay_is_fixed_and_says_why(nodes, reason):
    groups = channel_groups({"stem": nodes, "head": HEAD}, 3, 8)
    assert any(reason in group.fixed for group in groups)


def test_concatenated_channels_are_groups_behind_each_other_in_what_reads_them():
    nodes = (conv(0, 3, 4), conv(0, 3, 6), node("cat", 1, 2), norm(3, 10), node("relu", 4), conv(5, 10, 8))
    first, second = (group for group in free({"stem": nodes, "head": HEAD}) if group.concatenated)
    stem = "stem"
    assert (first.size, first.writers, first.normalisations) == (4, ((stem, 0),), ((stem, 3),))
    assert (second.size, second.writers, second.normalisations) == (6, ((stem, 1),), ((stem, 3),))
    assert list(first.read()) == [((stem, 5), slice(0, 4))] and list(second.read()) == [((stem, 5), slice(4, 10))]
    assert list(second.written()) == [((stem, 1), slice(0, 6)), ((stem, 3), slice(4, 10))]


def test_a_head_reads_the_channels_of_earlier_stages():
    head = (node("resize", 0, -1, values=(1,)), node("cat", 1, -1), conv(2, 20, 5))
    layers = {
        "stem": (conv(0, 3, 8),),
        "stages.0.0": (conv(0, 8, 8, 3),),
        "stages.1.0": (conv(0, 8, 12, 3, 2),),
        "head": head,
    }
    groups = [g for g in channel_groups(layers, 3, 8, reads=["stages.0"]) if g.concatenated]
    assert [(g.size, g.writers, list(g.read())[-1]) for g in groups] == [
        (8, (("stages.0.0", 0),), (("head", 2), slice(12, 20))),
        (12, (("stages.1.0", 0),), (("head", 2), slice(0, 12))),
    ]


@pytest.mark.parametrize(("side", "stride", "whole"), [(8, 1, False), (8, 2, False), (2, 2, True), (1, 1, True)])
def test_channels_pass_a_flattening_of_a_single_position(side, stride, whole):
    positions = max(1, side // stride) ** 2
    nodes = (conv(0, 3, 8, 3, stride), node("flatten", 1), linear(2, 8 * positions, 5))
    assert [group.size for group in free({"head": nodes}, side)] == ([8] if whole else [])


def test_the_branch_of_a_block_ends_before_its_sum():
    add = node("add", 0, 2)
    dropped = (conv(0, 8, 8), norm(1, 8), node("drop_path", 2, values=(0.1,)), node("add", 3, 0))
    assert branch_end((conv(0, 8, 8), norm(1, 8), add)) == 1
    assert branch_end((conv(0, 8, 8), norm(1, 8), add, node("relu", 3))) == 1
    assert branch_end(dropped) == 1
    assert branch_end((conv(0, 8, 8), conv(0, 8, 8), node("add", 1, 2))) is None  # no sum with the input
    assert branch_end((conv(0, 8, 8), node("relu", 1), add)) is None
    assert branch_end((conv(0, 8, 8), norm(1, 8), node("mul", 0, 2))) is None
