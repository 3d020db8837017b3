"""Search spaces: counting, sampling, mutating, naming, checking; blueprints as values."""

import json
import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from kdnas.architecture import Architecture, Choice
from kdnas.costs.count import cost
from kdnas.space import Blueprint, Range, SearchSpace, layer, make_divisible
from kdnas.spaces.toy import Toy
from kdnas.supernet import Supernet

TOY = Toy(name="toy")


@dataclass(frozen=True, kw_only=True)
class Twins(SearchSpace):
    """Two positions, each empty or a letter; only the letters' order makes a network."""

    @property
    def structure(self):
        return (Choice("first", ("-", "a", "b")), Choice("second", ("-", "a", "b")))

    def layers(self, architecture):
        pooled = layer("kdnas.blocks.basic:PoolLinear", inputs=3, classes=self.classes)
        return layer("torch.nn:Identity"), ((layer("torch.nn:Identity"),),), pooled

    def canonical(self, architecture):
        letters = [v for v in architecture.values() if v != "-"] + ["-", "-"]
        return Architecture({"first": letters[0], "second": letters[1]})


def test_the_count_is_the_number_of_assignments():
    assert TOY.count() == (2 + 4) ** 2 == len(list(TOY.all()))
    assert Toy(widths=(4, 8, 12), depths=(1, 2, 3), num_stages=1, resolutions=(8, 16)).count() == 2 * (3 + 9 + 27)


def test_nested_conditions_are_counted_like_enumerated():
    @dataclass(frozen=True, kw_only=True)
    class Nested(Twins):
        @property
        def structure(self):
            return (
                Choice("depth", (0, 1, 2)),
                Choice("one", (1, 2, 3), "depth", 1),
                Choice("two", (1, 2), "depth", 2),
                Choice("deep", ("x", "y"), "one", 3),
            )

        def canonical(self, architecture):
            return architecture

    assert Nested().count() == len(list(Nested().all())) == 1 + 4 + 4 * 2


def test_all_gives_every_distinct_network_once():
    found = list(Twins().all())
    assert Twins().count() == 9
    assert len(found) == len(set(found)) == 7  # -, a, b and the four pairs


@dataclass(frozen=True, kw_only=True)
class Mixed(SearchSpace):
    """A layer whose options are in no order: descending widths, and kernels beside widths in one choice."""

    widths: tuple[int, ...] = (8, 4, 6)

    @property
    def structure(self):
        return (Choice("width", self.widths), Choice("shape", ("4x3", "2x5", "6x1")), Choice("same", ("x", "y")))

    def layers(self, architecture):
        width, (outputs, kernel) = architecture.integer("width"), map(int, architecture["shape"].split("x"))
        stem = layer("kdnas.blocks.basic:ConvNormAct", inputs=self.image_channels, outputs=width, kernel=1)
        only = layer("kdnas.blocks.basic:ConvNormAct", inputs=width, outputs=outputs, kernel=kernel)
        return stem, ((only,),), layer("kdnas.blocks.basic:PoolLinear", inputs=outputs, classes=self.classes)


def test_largest_and_smallest_follow_cost_whatever_the_order_of_options():
    space = Mixed(resolutions=(8,))
    costs = {a: cost(space.blueprint(a))[::-1] for a in space.all()}
    assert costs[space.smallest] == min(costs.values()) and costs[space.largest] == max(costs.values())
    assert space.smallest["same"] == "x" and space.largest["same"] == "y"  # equal costs: the first and the last


def test_the_supernet_has_the_largest_of_every_dimension_of_layers_that_share_weights():
    space = Mixed(resolutions=(8,))
    assert {a["shape"] for a in space.covering()} == {"4x3", "2x5", "6x1"}
    supernet = Supernet(space).eval()
    assert supernet.bank["stages_0_0:shared"][0].weight.shape == (6, 8, 5, 5)
    for architecture in space.all():
        assert supernet(torch.rand(2, 3, 8, 8), architecture).logits.isfinite().all()


@pytest.mark.parametrize(
    ("limits", "value", "message"),
    [
        (Range(least=1), 0, "be at least 1, got 0"),
        (Range(least=1), (4, 0), r"be at least 1, got \[4, 0\]"),
        (Range(above=0), 0.0, "be above 0, got 0.0"),
        (Range(below=1), 1.0, "be below 1, got 1.0"),
        (Range(odd=True), (3, 4), "be odd"),
        (Range(ascending=True), (4, 4), "be ascending"),
        (Range(), (), "not be empty"),
        (Range(), float("nan"), "be finite"),
        (Range(), "8", "be a number"),
    ],
)
def test_a_number_outside_its_range_is_refused_with_rule_and_value(limits, value, message):
    with pytest.raises(ValueError, match=f"`field` must {message}"):
        limits.check("field", value)


def test_numbers_inside_their_range_pass():
    Range(least=1, below=9, odd=True, ascending=True).check("field", (1, 3, 7))
    Range(empty=True).check("field", ())
    Range(above=0).check("field", 1e-9)


def test_largest_and_smallest_take_the_last_and_first_option():
    assert dict(TOY.smallest) == {
        "stage0.depth": 1,
        "stage0.layer0.width": 4,
        "stage1.depth": 1,
        "stage1.layer0.width": 4,
    }
    assert set(TOY.largest.values()) == {2, 8} and len(TOY.largest) == 6


def test_a_seed_repeats_its_samples_and_options_are_equally_likely():
    assert TOY.sample(random.Random(3)) == TOY.sample(random.Random(3))
    rng = random.Random(0)
    depths = Counter(TOY.sample(rng)["stage0.depth"] for _ in range(2000))
    assert 900 < depths[1] < 1100


def test_a_mutant_differs_and_at_rate_zero_in_one_choice_and_what_depends_on_it():
    rng = random.Random(0)
    for _ in range(50):
        parent = TOY.sample(rng)
        child = TOY.mutate(parent, rng, rate=0.0)
        changed = [n for n in parent if n in child and parent[n] != child[n]]
        assert len(changed) == 1
        if not changed[0].endswith("depth"):
            assert set(parent) == set(child)


def test_at_rate_one_every_choice_changes():
    child = TOY.mutate(TOY.smallest, random.Random(0), rate=1.0)
    assert all(child[name] != TOY.smallest[name] for name in TOY.smallest)


def test_another_spelling_of_the_same_network_is_no_mutant():
    space, rng = Twins(), random.Random(0)
    parent = space.architecture({"first": "-", "second": "a"})
    assert dict(parent) == {"first": "a", "second": "-"}
    assert all(space.mutate(parent, rng) != parent for _ in range(100))


def test_a_space_of_one_architecture_cannot_mutate():
    space = Toy(name="single", widths=(4,), depths=(1,))
    with pytest.raises(ValueError, match="single has only one architecture"):
        space.mutate(space.largest, random.Random(0))


def test_a_mutation_ends_where_all_assignments_are_one_network():
    class One(Twins):
        def canonical(self, architecture):
            return super().canonical(Architecture(dict.fromkeys(architecture, "a")))

    with pytest.raises(ValueError, match="has only one architecture in 1000 mutations"):
        One().mutate(One().smallest, random.Random(0))


def test_a_mutation_changes_more_where_every_neighbour_is_the_same_network():
    class Far(Twins):
        """`a-` and its neighbours are one network, `bb` is another."""

        def canonical(self, architecture):
            both = all(value == "b" for value in architecture.values())
            return Architecture(dict.fromkeys(architecture, "b" if both else "a"))

    space = Far()
    parent = space.architecture({"first": "a", "second": "a"})
    assert space.mutate(parent, random.Random(0), rate=0.0) != parent


def test_a_cross_takes_each_choice_from_a_parent():
    rng = random.Random(0)
    seen = set()
    for _ in range(50):
        child = TOY.cross(TOY.smallest, TOY.largest, rng)
        TOY.validate(child)
        seen.add(child)
    assert len(seen) > 10
    assert TOY.cross(TOY.largest, TOY.largest, rng) == TOY.largest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage0.dept": 1}, "toy has no choice 'stage0.dept'. Did you mean 'stage0.depth'?"),
        ({"stage0.depth": 3}, r"stage0.depth must be one of \(1, 2\), got 3"),
        ({"stage0.depth": None}, "stage0.depth is missing. Set it to one of"),
        ({"stage0.layer1.width": 4}, "exists only while stage0.depth is at least 2, got stage0.depth = 1"),
    ],
)
def test_a_wrong_architecture_is_refused_with_the_choice_and_its_options(change, message):
    values = {name: v for name, v in {**TOY.smallest, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        TOY.architecture(values)


def test_a_code_names_an_architecture_and_back():
    assert TOY.code(TOY.smallest) == "00.00." and TOY.code(TOY.largest) == "111111"
    assert all(TOY.parse(TOY.code(architecture)) == architecture for architecture in TOY.all())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("00", "a code of toy must have 6 digits, got 2"),
        ("02.00.", "the digit of stage0.layer0.width must be from 0 to 1, got '2'"),
        ("0..00.", "stage0.layer0.width is missing"),
        ("0 0.00.", "a code of toy must have 6 digits, got 7"),
        ("0 .00.", "the digit of stage0.layer0.width must be from 0 to 1"),
        ("000.00", "exists only while"),
    ],
)
def test_a_wrong_code_is_refused(code, message):
    with pytest.raises(ValueError, match=message):
        TOY.parse(code)


def test_the_input_size_is_a_choice_like_any_other():
    space = Toy(resolutions=(8, 16))
    assert space.choices[0] == Choice("resolution", (8, 16))
    assert space.blueprint(space.smallest).image == (3, 8, 8)
    assert space.blueprint(space.largest).image == (3, 16, 16)
    assert "resolution" not in TOY.largest and TOY.blueprint(TOY.largest).image == (3, 8, 8)


def test_a_space_fits_other_data():
    fitted = TOY.fitted(classes=7, image_channels=1)
    blueprint = fitted.blueprint(fitted.smallest)
    assert blueprint.head.make["classes"] == 7 and blueprint.stem.make["inputs"] == 1
    assert list(fitted.all()) == list(TOY.all())


def test_a_head_may_read_stages_before_the_last():
    blueprint = TOY.blueprint(TOY.largest)
    both = replace(blueprint, head=replace(blueprint.head, reads=(0,)))
    assert Blueprint.from_json(json.loads(json.dumps(both.to_json()))) == both != blueprint
    assert "reads" not in json.dumps(blueprint.to_json()) and str(both).endswith(" with stage 0")
    assert both.head.inputs("c", ["a", "b"]) == ("a", "c") and blueprint.head.inputs("c", ["a", "b"]) == ("c",)
    assert [stage for _, _, stage in both.steps()] == [None, None, 0, None, 1, None]
    assert dict(both.chain.make.arguments)["reads"] == (2,)
    assert "reads" not in dict(blueprint.chain.make.arguments)


@pytest.mark.parametrize("reads", [(1,), (-1,), (0, 0), (0.0,), ("0",), (True,)])
def test_a_head_reads_stages_that_there_are(reads):
    blueprint = TOY.blueprint(TOY.largest)
    with pytest.raises(ValueError, match="`reads` of a head must be indices of the 1 stages before the last"):
        replace(blueprint, head=replace(blueprint.head, reads=reads))
    with pytest.raises(ValueError, match="must be empty for layers before the head"):
        replace(blueprint, stem=replace(blueprint.stem, reads=(0,)))
    with pytest.raises(ValueError, match="every stage must have a layer"):
        Blueprint(blueprint.stem, ((), *blueprint.stages), replace(blueprint.head, reads=(1,)), blueprint.image)


def test_a_blueprint_is_a_value_that_prints_as_a_table_and_survives_json():
    blueprint = TOY.blueprint(TOY.smallest)
    assert Blueprint.from_json(json.loads(json.dumps(blueprint.to_json()))) == blueprint
    assert hash(blueprint) == hash(TOY.blueprint(TOY.smallest))
    lines = str(blueprint).splitlines()
    assert lines[0] == "image       3 x 8 x 8"
    assert [line.split()[0] for line in lines[1:]] == ["stem", "stages.0.0", "stages.1.0", "head"]
    assert lines[-1] == "head        PoolLinear(classes=10, inputs=4)"


def test_layers_of_another_bank_are_other_layers():
    assert layer("torch.nn:Identity") != layer("torch.nn:Identity", bank="own")


@pytest.mark.parametrize(("value", "rounded"), [(16, 16), (19.2, 24), (28.8, 32), (33, 32), (3, 8), (134.4, 136)])
def test_widths_are_rounded_to_the_nearest_multiple_but_never_far_below(value, rounded):
    assert make_divisible(value) == rounded
