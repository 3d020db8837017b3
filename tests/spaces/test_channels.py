"""Channel-Bench-Macro: counts, costs, codes and shared widths."""

import csv
import dataclasses
import os
import random
from pathlib import Path

import pytest
import torch

from kdnas.costs.count import cost
from kdnas.spaces.channels import Channels, ChannelStage
from kdnas.supernet import Supernet
from kdnas.tables import load_space

MOBILENET, RESNET = (load_space(f"channel_bench_macro_{name}") for name in ("mobilenet", "resnet"))

# Rows of the released tables: code, params, MACs.
ROWS = {
    "mobilenet": [
        ("1313313", 506602, 45805056),
        ("4421224", 716234, 108435456),
        ("4111232", 541258, 58647552),
        ("3344432", 1302058, 148526080),
        ("3324342", 1146154, 123745280),
        ("4231434", 1218954, 130758656),
        ("3241312", 554794, 83084288),
        ("3421114", 404778, 73127936),
        ("4444424", 1400970, 185673728),
        ("1144332", 819562, 69604352),
        ("4411433", 1150346, 126561792),
        ("3144321", 789034, 101280256),
    ],
    "resnet": [
        ("1314323", 6794058, 491179776),
        ("4414423", 10931338, 983241728),
        ("4111221", 2962954, 303761920),
        ("3411144", 3845194, 459031808),
        ("3331241", 4805066, 562842112),
        ("4231243", 6208394, 681249280),
        ("3242244", 7091658, 709118464),
        ("3421311", 3774154, 496783104),
        ("4444313", 8865034, 1020989184),
        ("1143424", 9450442, 675206144),
        ("4344311", 6800010, 832245504),
        ("3214142", 3918922, 378815744),
    ],
}


def thin(space):
    stages = tuple(
        dataclasses.replace(s, hidden=tuple(h // 16 for h in s.hidden), width=s.width // 16) for s in space.stages
    )
    return dataclasses.replace(
        space,
        stem_width=space.stem_width // 16,
        stages=stages,
        head_width=space.head_width // 16,
        resolutions=(8,),
    )


@pytest.mark.parametrize("space", [MOBILENET, RESNET], ids=["mobilenet", "resnet"])
def test_the_costs_of_released_rows_are_exact(space):
    for code, params, macs in ROWS["mobilenet" if space.head_width else "resnet"]:
        architecture = space.parse(code)
        assert cost(space.blueprint(architecture)) == (params, macs), code
        assert space.code(architecture) == code
    assert space.count() == 16384


def test_the_largest_nets_have_the_widths_of_the_readme():
    assert dict(MOBILENET.parse("4444444")) == {
        "stem.width": 128,
        "stage0.block0.hidden": 768,
        "stage0.block1.hidden": 768,
        "stage1.block0.hidden": 768,
        "stage1.width": 256,
        "stage1.block1.hidden": 1536,
        "head.width": 1024,
    }
    assert list(RESNET.parse("1234123").values()) == [64, 128, 192, 512, 128, 256, 384]


@pytest.mark.parametrize("space", [thin(MOBILENET), thin(RESNET)], ids=["mobilenet", "resnet"])
def test_a_subnet_is_its_student_and_draws_on_leading_channels(space):
    supernet, rng, images = Supernet(space).eval(), random.Random(0), torch.randn(2, 3, 8, 8)
    for _ in range(4):
        architecture = space.sample(rng)
        student = supernet.extract(architecture)
        inside, outside = supernet(images, architecture), student(images)
        assert torch.equal(inside.logits, outside.logits)
        assert all(map(torch.equal, inside.features, outside.features))
        stem = student.stem[0].weight
        assert torch.equal(stem, supernet.bank["stem:shared"][0].weight[: stem.shape[0]])
    # The bank is the largest network, nothing more.
    assert sum(p.numel() for p in supernet.parameters()) == cost(space.blueprint(space.largest)).params


def test_only_a_block_that_begins_a_skip_path_has_no_shortcut():
    def shortcuts(space):
        _, stages, _ = space.layers(space.parse("1234321"))
        return [[layer.make["shortcut"] for layer in stage] for stage in stages]

    assert shortcuts(MOBILENET) == [["identity", "identity"], ["none", "identity"]]
    assert shortcuts(RESNET) == [["identity", "identity"], ["none", "identity", "identity"]]


@pytest.mark.parametrize("code", ["111111", "11111111", "1111110", "5111111", "111a111"])
def test_a_wrong_code_is_refused(code):
    with pytest.raises(ValueError, match="digit"):
        RESNET.parse(code)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": "dense"}, "`block` must be one of"),
        ({"ratios": (0.5, 0.25)}, "ascending"),
        ({"ratios": (0.0, 1.0)}, "`ratios` must be above 0"),
        ({"stages": (ChannelStage(hidden=()),)}, r"`stages\[0\].hidden` must not be empty"),
        ({"stages": (ChannelStage(hidden=(8,), stride=2),)}, "width` must be set"),
    ],
)
def test_a_wrong_table_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Channels(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("space", [MOBILENET, RESNET], ids=["mobilenet", "resnet"])
def test_every_row_of_the_released_tables_is_reproduced(space):
    path = Path(os.environ.get("KDNAS_DATA", "absent")) / f"{space.name}_public.csv"
    if not path.is_file():
        pytest.skip(f"needs {path.name} in the folder KDNAS_DATA names")
    with path.open() as file:
        for row in csv.DictReader(file):
            architecture = space.parse(row["widths"])
            assert cost(space.blueprint(architecture)) == (int(row["params"]), int(row["macs"])), row
