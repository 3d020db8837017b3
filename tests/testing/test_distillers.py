"""The distillers' contract finds what it is there to find: each fault breaks its own demand and no other."""

import random
from typing import final

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdnas.distillers.base import Distiller, Schedule
from kdnas.network import Network
from kdnas.testing.distillers import DistillerContract


class Plain(Distiller):
    """Cross-entropy, and the distance of projected logits from the teacher's.

    Reference: none.
    """

    model_type = Network

    def __init__(self):
        super().__init__()

    def prepare(self, model, batch):
        self.projection = nn.Linear(3, 3, bias=False)

    def losses(self, model, batch, step):
        logits = model(batch.images).logits
        distance = (self.projection(logits) - batch.teacher.logits).square().mean()
        yield "student", F.cross_entropy(logits, batch.labels) + distance + self.extra(model, batch, step, logits)

    def extra(self, model, batch, step, logits):
        return 0.0


def variant(**members):
    """A distiller like Plain with something changed."""
    return final(type("Variant", (Plain,), {"__doc__": Plain.__doc__, **members}))


def more(change):
    """A distiller whose loss has something added to it, or that does something beside."""

    def extra(self, model, batch, step, logits):
        added = change(self, model, batch, step, logits)
        return added if isinstance(added, float | torch.Tensor) and added is not None else 0.0

    return variant(extra=extra)


def two_numbers(self, model, batch, step):
    for name, loss in Plain.losses(self, model, batch, step):
        yield name, loss.expand(1)


def gave_back(self, model, batch, step):
    """The weights are put back where they were."""
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), self.before, strict=True):
            parameter.copy_(value)


def remember(self, model, batch, step, logits):
    self.__dict__["before"] = [p.detach().clone() for p in model.parameters()]
    return 0.0


def move_the_teacher(self, model, batch, step):
    batch._teacher.func.module.head.linear.weight.data.mul_(1.001)


def thaw_the_teacher(self, model, batch, step):
    batch._teacher.func.module.requires_grad_(True)


def listen_to_the_world(self, model, batch, step, logits):
    return 1e-3 * random.Random(str(random.getstate())).random()


def begin_by_the_world(self, model, batch):
    Plain.prepare(self, model, batch)
    self.projection.weight.data.add_(1e-3 * random.Random(str(random.getstate())).random())


def draw_at_first(self):
    Distiller.__init__(self)
    torch.rand(())


def grow(self, model, batch, step):
    if step.index == 1:
        self.register_buffer("late", torch.zeros(1))


HIDDEN = [nn.Parameter(torch.ones(3))]


def hide_a_weight(self, model, batch, step, logits):
    return (logits * HIDDEN[0]).mean()


def count_in_secret(self, model, batch, step):
    self.__dict__["number"] = self.__dict__.get("number", 0) + 1


def by_the_secret(self, model, batch, step, logits):
    return 1e-2 * self.__dict__.get("number", 0)


def another_schedule(self, total):
    self.__dict__["asked"] = self.__dict__.get("asked", 0) + 1
    return Schedule(total, frozenset({self.__dict__["asked"]}))


class Open(Plain):
    """Anyone may derive from it.

    Reference: none.
    """


TEACHER = "test_the_teacher_is_left_as_it_was"
QUIET = "test_the_global_generators_are_left_alone"
SCALARS = "test_it_yields_named_finite_scalars_with_a_graph_to_the_model"
SCHEDULE = "test_the_schedule_depends_on_the_number_of_steps_alone"
FAULTS = [
    ("test_it_is_final_with_plain_keyword_only_arguments_that_have_defaults", Open),
    ("test_its_docstring_names_its_reference", final(type("Variant", (Plain,), {"__doc__": "No sentence"}))),
    (SCALARS, variant(losses=two_numbers)),
    ("test_every_step_changes_the_model", variant(extra=remember, after=gave_back)),
    (TEACHER, variant(after=move_the_teacher)),
    (TEACHER, variant(after=thaw_the_teacher)),
    ("test_the_batch_is_left_as_it_was", more(lambda self, model, batch, step, logits: batch.pixels.zero_()[:0].sum())),
    ("test_seed_and_step_determine_the_losses", more(listen_to_the_world)),
    ("test_preparing_depends_on_the_seed_alone", variant(prepare=begin_by_the_world)),
    (QUIET, more(lambda *_: random.random() and None)),
    (QUIET, more(lambda *_: np.random.rand() and None)),
    (QUIET, variant(__init__=draw_at_first)),
    ("test_all_learnable_parts_are_built_in_prepare", variant(after=grow)),
    ("test_every_parameter_with_a_gradient_belongs_to_the_model_or_the_distiller", more(hide_a_weight)),
    ("test_its_state_gives_the_same_next_losses", variant(after=count_in_secret, extra=by_the_secret)),
    (SCHEDULE, variant(schedule=lambda self, total: Schedule(total, frozenset({total})))),
    (SCHEDULE, variant(schedule=lambda self, total: Schedule(total, curves=frozenset({-1})))),
    (SCHEDULE, variant(schedule=lambda self, total: Schedule(total, options=lambda choice, index: ()))),
    (SCHEDULE, variant(schedule=another_schedule)),
]
DEMANDS = [name for name in dir(DistillerContract) if name.startswith("test_")]
# What a fault cannot but break as well.
ALSO = {
    # Another teacher gives other losses after a resumption.
    TEACHER: {"test_its_state_gives_the_same_next_losses"},
    # A loss of another shape ends every training, and so whatever takes a step.
    SCALARS: {name for name in DEMANDS if name not in ("test_its_docstring_names_its_reference",)},
    # A part that comes later is in the saved state, and not in the distiller that is to load it.
    "test_all_learnable_parts_are_built_in_prepare": {"test_its_state_gives_the_same_next_losses"},
}


def missed(distiller, **members):
    """The demands that a distiller does not keep."""
    contract = type("Contract", (DistillerContract,), {"make": distiller, **members})
    names = set()
    for demand in DEMANDS:
        try:
            getattr(contract(), demand)()
        except (AssertionError, RuntimeError, TypeError, ValueError):
            names.add(demand)
    return names


def test_a_sound_distiller_keeps_every_demand():
    assert missed(variant()) == set()


@pytest.mark.parametrize(
    ("demand", "distiller"), [pytest.param(d, s, id=f"{d}-{i}") for i, (d, s) in enumerate(FAULTS)]
)
def test_a_fault_breaks_its_demand_and_no_other(demand, distiller):
    names = missed(distiller)
    assert demand in names
    assert names - ALSO.get(demand, set()) <= {demand}


def test_a_distiller_of_something_else_is_found_out():
    contract = type("Contract", (DistillerContract,), {"make": variant(model_type=nn.Linear)})
    with pytest.raises(AssertionError):
        contract().test_it_declares_the_type_of_its_models()


def test_every_demand_is_broken_by_some_fault():
    others = {"test_it_declares_the_type_of_its_models"}  # by the test above
    assert {demand for demand, _ in FAULTS} | others == set(DEMANDS)
