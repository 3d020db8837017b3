"""What must hold for every distiller, as a class that anyone's tests can inherit."""

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.data.base import Data, TensorImages
from kdnas.distillers.base import Batch, Distiller, Model, Step
from kdnas.network import Network
from kdnas.randomness import initialised, torch_rng
from kdnas.settings import Recipe
from kdnas.space import SearchSpace
from kdnas.supernet import Supernet
from kdnas.tables import space_from_table
from kdnas.teachers.base import Frozen, Teacher
from kdnas.testing._algorithm import AlgorithmContract
from kdnas.testing._generators import generator_states, generators_seeded
from kdnas.testing._modules import module_state
from kdnas.training.loop import Training

STEPS = 6
CLASSES = 3


class DistillerContract(AlgorithmContract):
    """What must hold for every distiller. Set `make` to the class.

        class TestMine(DistillerContract):
            make = Mine

    The trainings take a few steps of a small space's supernet, or of one of its networks, under a teacher.

    Attributes:
        make: the distiller's class.
        arguments: its arguments.
    """

    make: type[Distiller]
    _base = Distiller

    def test_it_declares_the_type_of_its_models(self) -> None:
        assert self.make.model_type in (Supernet, Network, None), self.make.model_type

    def test_it_yields_named_finite_scalars_with_a_graph_to_the_model(self) -> None:
        training = self._training()
        for index in (0, STEPS - 1):
            _advance(training, index)
            training.model.zero_grad()
            number = 0
            for name, loss in _losses(training, index):
                assert isinstance(name, str) and name, f"the name of a loss must be a non-empty string, got {name!r}"
                assert isinstance(loss, Tensor) and loss.shape == (), f"{name} must be a scalar tensor, got {loss!r}"
                assert torch.isfinite(loss), f"{name} is {loss.item()}"
                assert loss.requires_grad, f"{name} has no graph"
                loss.backward()
                number += 1
            assert number, "there is no loss"
            gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
            assert any(bool(g.any()) for g in gradients), "no gradient reached the model"
            assert all(bool(torch.isfinite(g).all()) for g in gradients)

    def test_every_step_changes_the_model(self) -> None:
        training = self._training()
        for _ in range(2):
            before = [p.detach().clone() for p in training.model.parameters()]
            training.step()
            assert any(not torch.equal(p, b) for p, b in zip(training.model.parameters(), before, strict=True))

    def test_the_teacher_is_left_as_it_was(self) -> None:
        training = self._training()
        teacher = training.teacher
        assert teacher is not None
        before = module_state(teacher)
        while not training.done:
            training.step()
        changed = [name for name, value in module_state(teacher).items() if value != before[name]]
        assert not changed, f"the teacher's {changed} changed"

    def test_the_batch_is_left_as_it_was(self) -> None:
        training = self._training()
        for index in (0, 1):
            batch = _batch(training, index)
            before = [x.clone() for x in (batch.pixels, batch.images, batch.labels, batch.ids)]
            for _, loss in _run(training, batch, index):
                loss.backward()
            after = (batch.pixels, batch.images, batch.labels, batch.ids)
            assert all(torch.equal(x, b) for x, b in zip(after, before, strict=True)), "the batch was written to"

    def test_seed_and_step_determine_the_losses(self) -> None:
        """Whatever the states of the global generators."""
        first, second = self._training(), self._training()
        for index in (0, STEPS - 1):
            values = []
            for seed, training in enumerate((first, second)):
                _advance(training, index)
                with generators_seeded(seed):
                    values.append([(name, loss.item()) for name, loss in _losses(training, index)])
            assert values[0] == values[1], f"the losses of step {index} differ the second time"

    def test_preparing_depends_on_the_seed_alone(self) -> None:
        """Training seeds torch's generator before; nothing may be drawn from the others."""
        states = []
        for seed in (0, 1):
            with generators_seeded(seed):
                states.append(_plain(self._training().distiller.state_dict()))
        assert states[0] == states[1], "the learnable parts differ the second time"

    def test_the_global_generators_are_left_alone(self) -> None:
        self._training()  # what is imported or cached is so before the comparison
        before = generator_states()
        training = self._training()
        training.step()
        training.step()
        training.distiller.schedule(STEPS)
        assert generator_states() == before, "a global generator was drawn from or seeded"

    def test_all_learnable_parts_are_built_in_prepare(self) -> None:
        training = self._training()
        before = _shapes(training.distiller)
        training.step()
        training.step()
        assert _shapes(training.distiller) == before, "the parts changed after the optimizer was made"

    def test_every_parameter_with_a_gradient_belongs_to_the_model_or_the_distiller(self) -> None:
        training = self._training()
        own = {id(p) for module in (training.model, training.distiller) for p in module.parameters()}
        for _, loss in _losses(training, 0):
            strangers = [tuple(leaf.shape) for leaf in _leaves(loss) if id(leaf) not in own]
            assert not strangers, f"parameters of shapes {strangers} are in no submodule, so they are never optimised"

    def test_its_state_gives_the_same_next_losses(self) -> None:
        """As after a kill: another process prepares its parts, then loads the state."""
        training = self._training()
        for count in (1, STEPS // 2):
            _advance(training, count)
            state = copy.deepcopy(training.state())
            resumed = self._training()
            resumed.load(state)
            expected = [training.step() for _ in range(2)]
            assert [resumed.step() for _ in range(2)] == expected, f"the losses after {count} steps differ"

    def test_the_schedule_depends_on_the_number_of_steps_alone(self) -> None:
        distiller = self._training().distiller
        for total in (STEPS, 8 * STEPS):
            schedule, again = distiller.schedule(total), distiller.schedule(total)
            assert schedule.total == total
            assert (again.restarts, again.curves) == (schedule.restarts, schedule.curves)
            for index in schedule.restarts | schedule.curves:
                assert 0 < index < total, f"a stage begins at {index} of {total} steps"
            for index in range(total):
                place, length = schedule.curve(index)
                assert 0 <= place < length <= total, (index, total, place, length)
                for choice in self._space().choices:
                    options = schedule.options(choice, index)
                    assert options and set(options) <= set(choice.options), (choice, index, options)
                    assert options == again.options(choice, index)

    def _training(self) -> Training:
        recipe = Recipe(steps=STEPS, batch_size=12, learning_rate=0.02)
        return Training(self._model(), self.make(**self.arguments), _data(), _teacher(), recipe)

    def _model(self) -> Model:
        space = self._space()
        if self.make.model_type is Network:
            return initialised(lambda: Network(space.blueprint(space.smallest)), 0)
        return initialised(lambda: Supernet(space), 0)

    def _space(self) -> SearchSpace:
        """Two stages; every choice exists in every network, as some distillers require."""
        return _small()


@cache
def _small() -> SearchSpace:
    return space_from_table(
        {
            "family": "mbconv",
            "name": "small",
            "classes": CLASSES,
            "resolutions": [8],
            "per": "block",
            "stem": {"width": [4], "stride": 1},
            "stages": [
                {"width": [4], "depth": [1], "kernel": [3, 5], "expansion": [1, 2]},
                {"width": [8], "depth": [1], "kernel": [3, 5], "expansion": [1, 2], "stride": 2},
            ],
        }
    )


@cache
def _data() -> Data:
    parts = []
    for name, count in (("train", 24), ("search", 6), ("test", 6)):
        labels = torch.arange(count) % CLASSES
        parts.append(TensorImages(torch.rand(count, 3, 8, 8, generator=torch_rng("contract", name)), labels))
    return Data(*parts, class_names=tuple("abc"), augmentation="shift")


def _teacher() -> Teacher:
    space = _small()
    return Frozen(initialised(lambda: Network(space.blueprint(space.largest)), 5), preprocessing=_data().preprocessing)


def _advance(training: Training, index: int) -> None:
    while training.index < index:
        training.step()


def _batch(training: Training, index: int) -> Batch:
    ids = training.data.indices(0, index, 12)
    return Batch(
        training.data.pixels(ids, 0, index), training.data.train.labels[ids], ids, training.data, training.teacher
    )


def _run(training: Training, batch: Batch, index: int) -> Iterator[tuple[str, Tensor]]:
    training.model.train()
    training.distiller.train()
    yield from training.distiller.losses(training.model, batch, Step(index, STEPS, 0))


def _losses(training: Training, index: int) -> Iterator[tuple[str, Tensor]]:
    yield from _run(training, _batch(training, index), index)


def _leaves(loss: Tensor) -> list[Tensor]:
    """Every tensor that a backward pass would give a gradient."""
    leaves: list[Tensor] = []
    nodes: list[Any] = [loss.grad_fn]
    known: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes += [after for after, _ in node.next_functions]
    return leaves


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in state.items()}
