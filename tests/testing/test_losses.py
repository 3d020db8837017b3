"""The contracts find what they are there to find."""

from typing import Literal, final

import pytest
import torch
from torch import nn

from kdnas.losses.base import Loss, Stage
from kdnas.losses.stage_pairs import StagePairs
from kdnas.outputs import START
from kdnas.testing.losses import LossContract


@final
class Sound(Loss):
    """Mean squared difference of the logits.

    Reference: none.
    """

    golden = 5.010215808345228

    def compute(self, student, teacher, labels, at):
        return (student.logits - teacher.logits).square().mean()


class Broken(Loss):
    """No sentence"""

    def __init__(self, *, size):
        super().__init__()


def variant(compute=None, needs=("logits",), **members):
    """A loss like Sound with something changed."""
    base = {"compute": compute or Sound.compute, "golden": Sound.golden, "needs": needs}
    return final(type("Variant", (Loss,), {"__doc__": Sound.__doc__, **base, **members}))


def squared(student, teacher):
    return (student.logits - teacher.logits).square().mean()


def written(self, student, teacher, labels, at):
    student.logits.data.clamp_(max=1.0)
    return squared(student, teacher)


def of_labels_rank(self, student, teacher, labels, at):
    return (student.logits * torch.arange(len(labels)).unsqueeze(1)).mean()


def remembering(self, student, teacher, labels, at):
    self.progress = at.progress
    return squared(student, teacher)


def stopped(self, student, teacher, labels, at):
    return squared(student, teacher) + student.logits.detach().sum()


def rooted(self, student, teacher, labels, at):
    return (student.features[0] ** 2).sum((1, 2, 3)).sqrt().mean()


def halved(self, student, teacher, labels, at):
    return (student.features[0].half() ** 2).mean().float()


def unaligned(self, student, teacher, labels, at):
    return (student.features[0] - teacher.features[0][:, :3]).square().mean()


def prepare_discriminator(self, student, teacher, *, elastic=False):
    self.discriminator = nn.Linear(5, 1)


def follow(self, student, teacher, labels, at):
    return self.discriminator(student.logits).mean()


def judge(self, student, teacher, labels, at=START):
    return self.discriminator(student.logits.detach()).mean() - self.discriminator(teacher.logits).mean()


def unchecked(self, student, teacher, labels=None, at=START):
    return self.compute(student, teacher, labels, at)


def with_option(annotation, default, **members):
    """A loss with the option `size`, whose constructor checks nothing."""

    def build(self, *, size=default):
        Loss.__init__(self)
        self.options = {}

    build.__annotations__["size"] = annotation
    make = variant(**members)
    make.__init__ = build
    return make


def hold(self):
    Loss.__init__(self)
    self.inside = nn.ModuleList([Sound()])


def draw(self, teacher):
    return (self.scale * teacher.logits).square().mean()


def build_scale(self, student, teacher, *, elastic):
    self.scale = nn.Parameter(torch.ones(()))


class Forgetful(StagePairs):
    """Pairs that no checkpoint holds."""

    def set_extra_state(self, state):
        pass


def pair_without_state(self, student, teacher, *, elastic):
    self.taps = Forgetful()
    self.taps.prepare(student, teacher)


def in_half(self, student, teacher, *, elastic=False):
    self.rows = student.logits @ torch.ones(5)


def averaged(self, student, teacher, labels, at):
    return nn.functional.cross_entropy(student.logits, labels)


def quietly(self, student, teacher, labels=None, at=START):
    if labels is None or labels.shape != (len(student.logits),):
        return student.logits.sum() * 0
    return self.compute(student, teacher, labels.long().clamp(0, 4), at)


def flawed_members(self, student, teacher, labels, at):
    values = [(m.logits - student.logits).square().mean(1) for m in teacher.members or (teacher,)]
    return torch.stack([torch.where(v.isfinite(), v, 0.0) for v in values]).mean()


def zero_filled(self, student, teacher, labels=None, at=START):
    return self.compute(student.map(torch.nan_to_num), teacher.map(torch.nan_to_num), labels, at)


def prepare_unregistered(self, student, teacher, *, elastic=False):
    self.weight = [torch.randn(5)]


FAULTS = [
    ("test_it_is_final_with_keyword_only_arguments_that_all_have_defaults", Broken),
    ("test_its_docstring_names_its_reference", Broken),
    ("test_its_docstring_documents_every_option", Broken),
    ("test_it_has_its_golden_value", variant(golden=None)),
    ("test_it_has_its_golden_value", variant(golden=Sound.golden + 1e-7)),
    ("test_value_and_gradient_are_finite_on_hard_inputs_in_float32", variant(rooted, ("features",))),
    ("test_value_and_gradient_are_finite_on_hard_inputs_under_bfloat16_autocast", variant(halved, ("features",))),
    ("test_value_and_gradient_are_finite_on_hard_inputs_under_float16_autocast", variant(rooted, ("features",))),
    (
        "test_value_and_gradient_are_finite_on_identical_inputs",
        variant(lambda self, s, t, labels, at: (s.logits - t.logits).square().sum().sqrt()),
    ),
    (
        "test_value_and_gradient_are_finite_for_a_batch_of_one",
        variant(lambda self, s, t, labels, at: s.logits.var(0, correction=0).sum() / (len(labels) - 1)),
    ),
    ("test_a_student_and_a_teacher_of_other_map_sizes_are_matched", variant(unaligned, ("features",))),
    ("test_a_convolutional_network_and_a_transformer_are_matched", variant(unaligned, ("features",))),
    (
        "test_a_narrower_student_is_served_when_prepared_for_a_supernet",
        variant(lambda self, s, t, labels, at: s.features[0].mean((0, 2, 3)) @ torch.ones(3), ("features",)),
    ),
    ("test_gradient_is_that_of_the_value", variant(stopped)),
    ("test_inputs_are_never_written_to", variant(written)),
    ("test_a_call_stores_nothing_on_the_loss_but_in_buffers", variant(remembering)),
    ("test_the_order_of_the_batch_does_not_matter", variant(of_labels_rank)),
    (
        "test_repeating_the_batch_keeps_a_mean_over_samples",
        variant(lambda self, s, t, labels, at: (s.logits - t.logits).square().sum()),
    ),
    ("test_repeating_the_batch_keeps_a_mean_over_samples", variant(pairwise=True)),
    (
        "test_a_batch_is_the_mean_of_its_halves_unless_it_needs_the_whole",
        variant(lambda self, s, t, labels, at: (s.logits - t.logits).mean(0).square().sum()),
    ),
    (
        "test_learnable_parts_are_checkpointed",
        variant(
            lambda self, s, t, labels, at: (s.logits @ self.weight[0]).mean(),
            prepare=prepare_unregistered,
        ),
    ),
    ("test_stages_share_out_the_whole_training", variant(stages=lambda self: (Stage("first", 0.5),))),
    ("test_nan_and_infinity_in_what_it_reads_never_give_a_finite_loss", variant(forward=zero_filled)),
    ("test_a_broken_member_of_an_ensemble_breaks_the_value_or_nothing", variant(flawed_members)),
    ("test_inputs_that_do_not_agree_are_refused", variant(forward=unchecked)),
    ("test_logits_of_three_dimensions_are_refused_unless_they_are_marked", variant(forward=unchecked)),
    ("test_an_empty_batch_gives_a_zero_with_a_graph", variant(forward=unchecked)),
    (
        "test_labels_that_are_all_left_out_give_a_zero_with_a_graph",
        variant(averaged, ("logits", "labels"), forward=unchecked),
    ),
    ("test_what_is_missing_or_of_another_kind_is_named", variant(forward=unchecked)),
    ("test_what_is_missing_or_of_another_kind_is_named", variant(averaged, ("logits", "labels"), forward=quietly)),
    ("test_fields_of_another_kind_or_shape_are_named", variant(forward=unchecked)),
    ("test_a_moment_of_another_kind_or_batch_is_refused", variant(forward=unchecked)),
    (
        "test_other_widths_than_those_of_prepare_are_refused",
        variant(prepare=lambda self, student, teacher, *, elastic=False: None),
    ),
    ("test_logits_alone_will_do_where_nothing_else_is_read", variant(forward=unchecked)),
    ("test_options_out_of_range_are_refused", with_option(float, 1.0)),
    ("test_options_out_of_range_are_refused", with_option(float, 1.0, ranges={"size": "(0, inf)"})),
    ("test_options_out_of_range_are_refused", with_option(Literal["small"], "small")),
    ("test_its_options_are_shown_by_repr", with_option(float, 1.0)),
    ("test_it_is_prepared_with_half_precision_outputs", variant(prepare=in_half)),
    ("test_a_loss_inside_is_passed_on_whole", variant(__init__=hold)),
    (
        "test_parts_that_need_a_training_first_are_not_used_untrained",
        variant(
            build=build_scale,
            pretrain=draw,
            is_trained=True,
            stages=lambda self: (Stage("parts", 0.5, uses="preparation"), Stage("student", 0.5)),
        ),
    ),
    ("test_a_checkpoint_holds_the_pairs_of_stages", variant(build=pair_without_state, needs=("features",))),
    (
        "test_discriminator_and_student_learn_from_their_own_losses_only",
        variant(follow, prepare=prepare_discriminator, adversary=judge),
    ),
]


def contract(make):
    kept = LossContract()
    kept.make = make
    return kept


DEMANDS = [name for name in dir(LossContract) if name.startswith("test_")]


@pytest.mark.parametrize("demand", DEMANDS)
def test_a_sound_loss_keeps_every_demand(demand):
    getattr(contract(Sound), demand)()


@pytest.mark.parametrize(("demand", "make"), [pytest.param(d, m, id=f"{d}-{i}") for i, (d, m) in enumerate(FAULTS)])
def test_a_fault_breaks_its_demand(demand, make):
    with pytest.raises((AssertionError, AttributeError, RuntimeError, TypeError, ValueError)):
        getattr(contract(make), demand)()


def test_every_demand_is_broken_by_some_fault():
    missing = set(DEMANDS) - {demand for demand, _ in FAULTS}
    # The base class detaches the teacher, so no loss can break this one by its formula.
    assert missing == {"test_no_gradient_reaches_the_teacher_or_the_inputs_nobody_reads"}
