"""What must hold for every search space, as a class that anyone's tests can inherit."""

import json
import random
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from kdnas.architecture import Architecture, Choice, Value
from kdnas.costs.count import cost
from kdnas.network import Network
from kdnas.randomness import initialised, torch_rng
from kdnas.space import Blueprint, SearchSpace
from kdnas.supernet import Supernet
from kdnas.tables import space_from_table, table_of


class SpaceContract:
    """What must hold for every space. Set `space`.

        class TestMine(SpaceContract):
            space = Mine(widths=(4, 8))

    Networks are run with at most ten classes and on images of at most 32 pixels (48 for a second resolution).

    Attributes:
        space: the space.
        ordered: whether a choice's first option is the cheapest and its last the most expensive; False if options are
            operations.
        samples: number of random architectures.
    """

    space: SearchSpace
    ordered = True
    samples = 10

    def test_it_survives_the_round_trip_through_a_table(self) -> None:
        assert space_from_table(json.loads(json.dumps(table_of(self.space)))) == self.space

    def test_there_is_something_to_choose(self) -> None:
        assert self.space.count() >= 2
        names = [choice.name for choice in self.space.choices]
        assert len(set(names)) == len(names), "two choices have the same name"
        for choice in self.space.choices:
            assert choice.options and len(set(choice.options)) == len(choice.options), choice

    def test_sampled_mutated_and_crossed_architectures_are_valid_and_canonical(self) -> None:
        for seed in range(self.samples):
            rng = random.Random(seed)
            first, second = self.space.sample(rng), self.space.sample(rng)
            mutant = self.space.mutate(first, rng, rate=0.2)
            assert mutant != first
            for architecture in (first, second, mutant, self.space.cross(first, second, rng)):
                self.space.validate(architecture)
                assert self.space.canonical(architecture) == architecture, f"{dict(architecture)} is not canonical"

    def test_architectures_survive_json_and_their_codes(self) -> None:
        for architecture in self._architectures():
            assert Architecture(json.loads(json.dumps(dict(architecture)))) == architecture
            assert self.space.architecture(dict(architecture)) == architecture
            assert self.space.parse(self.space.code(architecture)) == architecture

    def test_blueprints_survive_json_and_are_the_same_in_an_equal_space(self) -> None:
        equal = space_from_table(table_of(self.space))
        for architecture in self._architectures():
            blueprint = self.space.blueprint(architecture)
            assert Blueprint.from_json(json.loads(json.dumps(blueprint.to_json()))) == blueprint
            assert equal.blueprint(architecture) == blueprint, f"the layers of {dict(architecture)} differ"

    def test_different_architectures_have_different_codes_and_networks(self) -> None:
        architectures = self._architectures()
        assert len({self.space.code(a) for a in architectures}) == len(architectures), "two have the same code"
        assert len({self.space.blueprint(a) for a in architectures}) == len(architectures), "two are the same network"

    def test_costs_lie_between_those_of_the_smallest_and_the_largest(self) -> None:
        if not self.ordered:
            return
        low, high = (cost(self.space.blueprint(a)) for a in (self.space.smallest, self.space.largest))
        for architecture in self._architectures()[2:4]:
            params, macs = cost(self.space.blueprint(architecture))
            assert low.params <= params <= high.params and low.macs <= macs <= high.macs, dict(architecture)

    def test_networks_have_the_classes_and_channels_of_the_data_and_a_feature_map_per_stage(self) -> None:
        small = self._small()
        space = small.fitted(classes=small.classes + 1, image_channels=small.image_channels + 1)
        for architecture in self._within(space, (self.space.smallest, self.space.largest)):
            blueprint = space.blueprint(architecture)
            images = _images(space, architecture)
            outputs = initialised(lambda b=blueprint: Network(b), 0).eval()(images)
            assert outputs.logits.shape == (2, small.classes + 1, *(images.shape[2:] if space.dense else ()))
            assert len(outputs.features) == len(blueprint.stages) > 0
            assert all(feature.dim() in (3, 4) for feature in outputs.features)
            assert all(bool(torch.isfinite(x).all()) for x in (outputs.logits, *outputs.features))

    def test_a_subnet_is_its_extracted_student_to_the_bit(self) -> None:
        space = self._small()
        supernet = initialised(lambda: _supernet(space), 0)
        rng = random.Random(0)
        samples = [space.sample(rng) for _ in range(3)]
        ends = self._within(space, (self.space.smallest, self.space.largest, *self.space.covering()[:3]))
        for architecture in dict.fromkeys((*ends, *samples)):
            student = supernet.extract(architecture)
            assert isinstance(student, Network) and not student.training
            images = _images(space, architecture)
            with torch.no_grad():
                inside, outside = supernet(images, architecture), student(images)
            assert inside.logits.shape == (2, space.classes, *(images.shape[2:] if space.dense else ()))
            assert torch.isfinite(inside.logits).all()
            assert torch.equal(inside.logits, outside.logits), dict(architecture)
            assert len(inside.maps) == len(outside.maps)
            assert all(torch.equal(a, b) for a, b in zip(inside.maps, outside.maps, strict=True))

    def test_every_weight_is_used_by_some_covering_architecture(self) -> None:
        space = self._small()
        with torch.device("meta"):
            supernet = Supernet(space)
        parameters = {id(parameter): name for name, parameter in supernet.named_parameters()}
        for architecture in set(self._within(space, (*self.space.covering(), self.space.smallest))):
            for position, layer in space.blueprint(architecture).named_layers():
                for _, owner, attribute, _ in supernet._plan(position, layer).sources:
                    parameters.pop(id(getattr(owner, attribute)), None)
        # A shortcut's convolution may be used only by networks whose widths differ where the largest's are equal.
        unused = [name for name in parameters.values() if not name.endswith("project.weight")]
        assert not unused, f"no covering architecture uses {unused}"

    def _small(self) -> SearchSpace:
        """The same choices, except for the size of images, and at most ten classes."""
        if self.space.dense:
            size = (21, 34)
            return self.space.fitted(
                classes=min(10, self.space.classes), image_channels=self.space.image_channels, size=size
            )
        first, *others = self.space.resolutions
        side = min(32, first)
        resolutions = (side, side + side // 2) if others else (side,)
        return replace(self.space, resolutions=resolutions, classes=min(10, self.space.classes))

    def _within(self, space: SearchSpace, architectures: Iterable[Architecture]) -> list[Architecture]:
        """The same options in a space whose resolutions alone are others; its own ends would take seconds to find."""

        def option(architecture: Architecture, choice: Choice) -> Value:
            if choice.name != "resolution":
                return architecture[choice.name]
            return choice.options[0 if architecture["resolution"] == self.space.resolutions[0] else -1]

        return [space.decide(lambda choice, a=a: option(a, choice)) for a in architectures]

    def _architectures(self) -> list[Architecture]:
        """Different ones, some only in one choice."""
        rng = random.Random(0)
        architectures = [self.space.smallest, self.space.largest]
        architectures += [self.space.sample(rng) for _ in range(self.samples)]
        architectures += [self.space.mutate(architecture, rng, rate=0.0) for architecture in architectures]
        return list(dict.fromkeys(architectures))


def _supernet(space: SearchSpace) -> Supernet:
    supernet = Supernet(space).eval()
    for tensor in supernet.bank.state_dict().values():
        if tensor.dim() == 1 and tensor.is_floating_point():
            # With the initial norms and biases a wrong slice would not be seen, with scales of zero a whole branch.
            tensor.add_(0.1 * torch.rand_like(tensor))
    return supernet


def _images(space: SearchSpace, architecture: Architecture) -> Tensor:
    return torch.randn(2, *space.blueprint(architecture).image, generator=torch_rng("contract"))
