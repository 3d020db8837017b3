"""NAS-Bench-Macro: counts, costs and the equality of its spellings."""

import csv
import dataclasses
import itertools
import os
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from kdnas.blocks.macro import InvertedResidual
from kdnas.costs.count import cost
from kdnas.network import Network
from kdnas.spaces.macro import Macro, MacroOperation
from kdnas.supernet import Supernet
from kdnas.tables import load_space

SPACE = load_space("nas_bench_macro")
THIN = dataclasses.replace(SPACE, width_multiplier=0.125, resolutions=(8,))

# Code of the benchmark, its canonical code, params and MACs: named nets, then rows of the released table.
ROWS = [
    ("00000000", "00000000", 387882, 7713280),
    ("22222222", "22222222", 2932586, 105660928),
    ("02012100", "02012100", 890666, 47327744),
    ("22212220", "22212220", 1985514, 85164544),
    ("00000102", "00000120", 1339050, 25160192),
    ("00000022", "00000022", 2050858, 34107904),
    ("00000100", "00000100", 507562, 11962880),
]


@pytest.mark.parametrize(("code", "canonical", "params", "macs"), ROWS)
def test_the_named_nets_cost_what_the_benchmark_says(code, canonical, params, macs):
    architecture = SPACE.parse(code)
    assert cost(SPACE.blueprint(architecture)) == (params, macs)
    assert SPACE.code(architecture) == canonical


def test_there_are_6561_codes_and_3969_networks():
    assert SPACE.count() == 6561
    assert len(set(SPACE.all())) == 3969
    codes = map("".join, itertools.product("012", repeat=8))
    assert len({SPACE.parse(code) for code in codes}) == 3969


def test_different_canonical_codes_are_different_blueprints():
    assert len({SPACE.blueprint(architecture) for architecture in SPACE.all()}) == 3969


def literally(code, network):
    """The network as the code spells it, identities in their places, with the weights of `network` in order."""
    weights = iter([m for stage in network.stages for m in stage])
    made, inputs, digits = [network.stem], 4, iter(code)
    for depth, outputs in zip((2, 3, 3), (8, 16, 32), strict=True):
        for place in range(depth):
            digit = next(digits)
            if digit == "0" and place:
                made.append(nn.Identity())
                continue
            trained = next(weights)
            if digit == "0":
                made.append(trained)
            else:
                kernel, expansion = {"1": (3, 3), "2": (5, 6)}[digit]
                block = InvertedResidual(inputs, outputs, inputs * expansion, kernel, 1 if place else 2)
                block.load_state_dict(trained.state_dict())
                made.append(block)
            inputs = outputs
    return nn.Sequential(*made, network.head).eval()


@pytest.mark.parametrize("code", ["01020012", "00102020", "20201002", "10012022"])
def test_a_canonical_form_is_the_network_its_code_spells(code):
    network = Network(THIN.blueprint(THIN.parse(code))).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(literally(code, network)(images), network(images).logits)


def test_every_operation_has_weights_of_its_own_and_every_weight_is_used():
    supernet = Supernet(THIN)
    codes = ("00000000", "11111111", "22222222")
    sizes = [cost(THIN.blueprint(THIN.parse(code))).params for code in codes]
    ends = 4 * 27 + 8 + sum(p.numel() for p in supernet.bank["head:shared"].parameters())
    assert sum(p.numel() for p in supernet.parameters()) == sum(sizes) - 2 * ends
    used = set()
    for code in codes:
        supernet.zero_grad(set_to_none=True)
        supernet(torch.randn(2, 3, 8, 8), THIN.parse(code)).logits.sum().backward()
        used |= {name for name, p in supernet.named_parameters() if p.grad is not None}
    assert used == {name for name, _ in supernet.named_parameters()}


def test_two_spellings_have_one_output_in_the_supernet():
    supernet, images = Supernet(THIN).eval(), torch.randn(2, 3, 8, 8)
    first, second = (supernet(images, THIN.parse(code)).logits for code in ("00000102", "00000120"))
    assert torch.equal(first, second)


def test_a_sampled_subnet_is_its_student():
    supernet, rng, images = Supernet(THIN).eval(), random.Random(0), torch.randn(2, 3, 8, 8)
    for _ in range(5):
        architecture = THIN.sample(rng)
        inside, outside = supernet(images, architecture), supernet.extract(architecture)(images)
        assert torch.equal(inside.logits, outside.logits)
        assert all(map(torch.equal, inside.features, outside.features))


def test_half_width_at_half_resolution_keeps_the_codes_and_divides_the_cost():
    half = dataclasses.replace(SPACE, width_multiplier=0.5, resolutions=(16,))
    assert half.parse("00000102") == SPACE.parse("00000102")
    # Every convolution has a quarter of its products per position, the depthwise ones and the stem half, and
    # there are a quarter of the positions.
    full, small = (cost(s.blueprint(s.parse("22222222"))).macs for s in (SPACE, half))
    assert full / 16 < small < full / 8


def test_several_resolutions_are_one_more_choice():
    space = dataclasses.replace(THIN, resolutions=(8, 16))
    assert space.count() == 2 * 6561
    assert len(Supernet(space).bank) == len(Supernet(THIN).bank)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (2, 3)}, "one entry per stage"),
        ({"depths": (2, 0, 3)}, "`depths` must be at least 1"),
        ({"operations": ()}, "`operations` must not be empty"),
        ({"width_multiplier": 0.0}, "`width_multiplier` must be above 0"),
        ({"operations": (MacroOperation(kernel=3, expansion=3),) * 2}, "twice"),
    ],
)
def test_a_wrong_table_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Macro(**fields).count()


def test_every_row_of_the_released_table_is_reproduced():
    path = Path(os.environ.get("KDNAS_DATA", "absent")) / "nas_bench_macro_public.csv"
    if not path.is_file():
        pytest.skip("needs nas_bench_macro_public.csv in the folder KDNAS_DATA names")
    with path.open() as file:
        for row in csv.DictReader(file):
            architecture = SPACE.parse(row["arch"])
            assert SPACE.code(architecture) == row["canonical"]
            assert cost(SPACE.blueprint(architecture)) == (int(row["params"]), int(row["macs"])), row["arch"]


def test_rows_of_one_network_have_equal_stored_results():
    path = Path(os.environ.get("KDNAS_DATA", "absent")) / "nas_bench_macro_public.csv"
    if not path.is_file():
        pytest.skip("needs nas_bench_macro_public.csv in the folder KDNAS_DATA names")
    stored: dict[str, set[tuple[str, ...]]] = {}
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        results = tuple(row[name] for name in ("mean_acc", "acc_std", "params", "macs"))
        stored.setdefault(SPACE.code(SPACE.parse(row["arch"])), set()).add(results)
    assert len(stored) < len(rows)
    assert {code for code, results in stored.items() if len(results) > 1} == set()
