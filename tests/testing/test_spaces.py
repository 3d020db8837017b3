"""The spaces' contract finds what it is there to find: each fault breaks its own demand."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from kdnas.architecture import Architecture, Choice
from kdnas.space import SearchSpace, layer
from kdnas.testing.spaces import SpaceContract


@dataclass(frozen=True, kw_only=True)
class Plain(SearchSpace):
    """Two convolutions of a width each."""

    widths: tuple[int, ...] = (2, 4)
    resolutions: tuple[int, ...] = (8,)

    @property
    def structure(self):
        return (Choice("first.width", self.widths), Choice("second.width", self.widths))

    def layers(self, architecture):
        first, second = architecture.integer("first.width"), architecture.integer("second.width")
        stem = layer(nn.Conv2d, in_channels=self.image_channels, out_channels=first, kernel_size=3, padding=1)
        stage = layer(nn.Conv2d, in_channels=first, out_channels=second, kernel_size=1)
        return stem, ((stage,),), layer("kdnas.blocks.basic:PoolLinear", inputs=second, classes=self.classes)


@dataclass(frozen=True, kw_only=True)
class Doubled(Plain):
    """Two choices of one name."""

    @property
    def structure(self):
        return (*super().structure, Choice("second.width", self.widths))


@dataclass(frozen=True, kw_only=True)
class Wandering(Plain):
    """A canonical spelling that is not canonical."""

    def canonical(self, architecture):
        if "first.width" not in architecture:
            return architecture
        place = self.widths.index(architecture["first.width"])
        return Architecture({**architecture, "first.width": self.widths[1 - place]})


@dataclass(frozen=True, kw_only=True)
class Nameless(Plain):
    """Codes that cannot be read back."""

    def code(self, architecture):
        return super().code(architecture)[::-1]


@dataclass(frozen=True, kw_only=True)
class Alike(Plain):
    """The second width changes nothing."""

    def layers(self, architecture):
        return super().layers(Architecture({**architecture, "second.width": self.widths[0]}))


@dataclass(frozen=True, kw_only=True)
class UpsideDown(Plain):
    """Smallest and largest are exchanged."""

    def _extreme(self, end):
        return super()._extreme(-1 - end)

    def covering(self):
        return (self.smallest,)


@dataclass(frozen=True, kw_only=True)
class TenClasses(Plain):
    """Always ten classes."""

    def layers(self, architecture):
        stem, stages, _ = super().layers(architecture)
        inputs = architecture.integer("second.width")
        return stem, stages, layer("kdnas.blocks.basic:PoolLinear", inputs=inputs, classes=10)


CALLS = [0]


@dataclass(frozen=True, kw_only=True)
class Restless(Plain):
    """The same architecture has another bank in another instance."""

    def layers(self, architecture):
        stem, stages, head = super().layers(architecture)
        CALLS[0] += 1
        return dataclasses.replace(stem, bank=f"bank{CALLS[0]}"), stages, head


@dataclass(frozen=True, kw_only=True)
class Wasteful(Plain):
    """The supernet holds a layer that nobody uses."""

    def bank_layers(self):
        yield from super().bank_layers()
        yield "stages.0.1", layer(nn.Conv2d, in_channels=4, out_channels=4, kernel_size=1)


@dataclass(frozen=True, kw_only=True)
class Numbered(Plain):
    """No two of them are equal."""

    def __post_init__(self):
        CALLS[0] += 1
        object.__setattr__(self, "name", f"number {CALLS[0]}")


@dataclass(frozen=True, kw_only=True)
class Stageless(Plain):
    """Nothing between stem and head."""

    def layers(self, architecture):
        stem, _, _ = super().layers(architecture)
        inputs = architecture.integer("first.width")
        return stem, (), layer("kdnas.blocks.basic:PoolLinear", inputs=inputs, classes=self.classes)


class Noisy(nn.Conv2d):
    """Gives something else at every call."""

    def forward(self, x):
        return super().forward(x) + torch.rand_like(x[:, :1])


@dataclass(frozen=True, kw_only=True)
class Unsteady(Plain):
    """A layer that draws."""

    def layers(self, architecture):
        _, stages, head = super().layers(architecture)
        width = architecture.integer("first.width")
        return layer(Noisy, in_channels=self.image_channels, out_channels=width, kernel_size=1), stages, head


OUTPUTS = "test_networks_have_the_classes_and_channels_of_the_data_and_a_feature_map_per_stage"
FAULTS = [
    ("test_it_survives_the_round_trip_through_a_table", Numbered()),
    (OUTPUTS, Stageless()),
    ("test_a_subnet_is_its_extracted_student_to_the_bit", Unsteady()),
    ("test_there_is_something_to_choose", Doubled()),
    ("test_sampled_mutated_and_crossed_architectures_are_valid_and_canonical", Wandering()),
    ("test_architectures_survive_json_and_their_codes", Nameless()),
    ("test_different_architectures_have_different_codes_and_networks", Alike()),
    ("test_costs_lie_between_those_of_the_smallest_and_the_largest", UpsideDown()),
    (OUTPUTS, TenClasses()),
    ("test_blueprints_survive_json_and_are_the_same_in_an_equal_space", Restless()),
    ("test_every_weight_is_used_by_some_covering_architecture", Wasteful()),
]
DEMANDS = [name for name in dir(SpaceContract) if name.startswith("test_")]


def contract(space):
    return type("Contract", (SpaceContract,), {"space": space})()


@pytest.mark.parametrize("demand", DEMANDS)
def test_a_sound_space_keeps_every_demand(demand):
    getattr(contract(Plain()), demand)()


@pytest.mark.parametrize(("demand", "space"), FAULTS)
def test_a_fault_breaks_its_demand(demand, space):
    with pytest.raises((AssertionError, ValueError)):
        getattr(contract(space), demand)()


def test_every_demand_is_broken_by_some_fault():
    assert {demand for demand, _ in FAULTS} == set(DEMANDS)
