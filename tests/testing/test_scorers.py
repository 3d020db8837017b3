"""The scorers' contract finds what it is there to find: each fault breaks its own demand and no other."""

import random
from typing import final

import numpy as np
import pytest
import torch

from kdnas.network import batch_statistics
from kdnas.scorers.base import OutputScorer, Score, Scorer, outputs_of
from kdnas.testing.scorers import ScorerContract


def likeness(outputs, evidence):
    return -float((outputs.logits - evidence.teacher.logits).square().mean())


class Plain(Scorer):
    """Minus the squared distance from the teacher's logits.

    Reference: none.
    """

    def score(self, student, evidence):
        with torch.no_grad(), batch_statistics(student):
            return self.judged(student, outputs_of(student, evidence.images), evidence)

    def judged(self, student, outputs, evidence):
        return Score(likeness(outputs, evidence), {"part": 1.0})


class Walked(OutputScorer):
    """The same, by the walk over common prefixes.

    Reference: none.
    """

    def judge(self, logits, digests, evidence):
        return Score(-float((logits - evidence.teacher.logits).square().mean()), {})


def variant(base=Plain, **members):
    """A scorer like Plain with something changed."""
    return final(type("Variant", (base,), {"__doc__": base.__doc__, **members}))


def more(change):
    """A scorer whose value has something added to it, or that does something beside."""

    def judged(self, student, outputs, evidence):
        added = change(self, student, outputs, evidence)
        return Score(likeness(outputs, evidence) + (added if isinstance(added, float) else 0.0), {"part": 1.0})

    return variant(judged=judged)


def count(self, student, outputs, evidence):
    self.number = getattr(self, "number", 0) + 1
    return -1e-3 * self.number


def listen_to_the_world(self, student, outputs, evidence):
    with torch.random.fork_rng(devices=[]):
        return float(torch.rand(()))


def teach_the_student(self, student, outputs, evidence):
    with torch.enable_grad():
        for norm in (m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.add_(1.0)


def thaw(self, student, outputs, evidence):
    next(student.parameters(), torch.zeros(())).requires_grad_(True)


def divide_by_weights(self, student, outputs, evidence):
    return float(0 * (1 / next(student.parameters(), torch.ones(1)).abs().sum()))


def overflow(self, student, outputs, evidence):
    return float(0 * evidence.teacher.logits.max().exp())


def want_three(self, student, outputs, evidence):
    return 0.0 / (len(evidence.images) - 2)


def want_maps(self, student, outputs, evidence):
    if not outputs.features:
        raise KeyError(0)


def further_rung(self, student, evidence):
    yield self.score(student, evidence)._replace(value=0.0)


def two_rungs(self, student, evidence):
    yield self.score(student, evidence)
    yield self.score(student, evidence)


class Counting(Walked):
    """Counts the stages between two judgements: fewer where a prefix is shared.

    Reference: none.
    """

    stages = 0

    def digest(self, stage, feature, evidence):
        self.stages += 1
        return feature

    def judge(self, logits, digests, evidence):
        counted, self.stages = self.stages, 0
        return Score(super().judge(logits, digests, evidence).value - 1e-3 * counted, {})


class Open(Plain):
    """Anyone may derive from it.

    Reference: none.
    """


QUIET = "test_the_global_generators_are_left_alone"
STUDENT = "test_the_student_is_left_as_it_was"
EVIDENCE = "test_evidence_teacher_and_supernet_are_left_as_they_were"
RUNGS = "test_the_last_rung_is_the_score"
WHOLE = "test_subnets_and_networks_have_finite_scores"
FAULTS = [
    ("test_it_is_final_with_plain_keyword_only_arguments_that_have_defaults", Open),
    ("test_its_docstring_names_its_reference", final(type("Variant", (Plain,), {"__doc__": "No sentence"}))),
    (WHOLE, variant(judged=lambda self, s, o, e: Score(likeness(o, e), {}, 0.5))),
    (WHOLE, variant(judged=lambda self, s, o, e: Score(torch.tensor(likeness(o, e)), {}))),
    ("test_the_score_does_not_depend_on_what_was_scored_before", more(count)),
    ("test_the_score_does_not_depend_on_the_global_generators", more(listen_to_the_world)),
    (QUIET, more(lambda *_: random.random() and None)),
    (QUIET, more(lambda *_: np.random.rand() and None)),
    (QUIET, more(lambda *_: torch.rand(2))),
    (STUDENT, more(teach_the_student)),
    (STUDENT, more(thaw)),
    (STUDENT, more(lambda self, student, outputs, evidence: student.register_forward_hook(lambda *_: None))),
    (EVIDENCE, more(lambda self, student, outputs, evidence: evidence.pixels.add_(1.0))),
    (EVIDENCE, more(lambda self, student, outputs, evidence: evidence.teacher_module.module.train())),
    (EVIDENCE, more(lambda self, student, outputs, evidence: evidence.supernet.train())),
    ("test_higher_is_better", variant(judged=lambda self, s, o, e: Score(-likeness(o, e), {}))),
    ("test_extreme_students_have_finite_scores_or_are_refused", more(divide_by_weights)),
    ("test_extreme_outputs_have_finite_scores_or_are_refused", more(overflow)),
    ("test_few_and_equal_images_have_finite_scores_or_are_refused", more(want_three)),
    ("test_a_module_of_another_library_is_scored_or_refused_with_the_reason", more(want_maps)),
    (RUNGS, variant(rungs=further_rung)),
    (RUNGS, variant(rungs=two_rungs)),
    (RUNGS, variant(resources=(3, 2))),
    ("test_a_population_has_the_scores_of_each_alone_to_the_bit", variant(Counting)),
    ("test_a_scorer_that_reads_no_weights_gives_the_same_score_for_any", variant(reads_weights=False)),
]
DEMANDS = [name for name in dir(ScorerContract) if name.startswith("test_")]


def missed(scorer, **members):
    """The demands that a scorer does not keep."""
    contract = type("Contract", (ScorerContract,), {"make": scorer, "prefers": "teacher", **members})
    names = set()
    for demand in DEMANDS:
        try:
            getattr(contract(), demand)()
        except (AssertionError, ArithmeticError, RuntimeError, LookupError):
            names.add(demand)
    return names


@pytest.mark.parametrize("base", [Plain, Walked])
def test_a_sound_scorer_keeps_every_demand(base):
    assert missed(variant(base)) == set()


@pytest.mark.parametrize(("demand", "scorer"), [pytest.param(d, s, id=f"{d}-{i}") for i, (d, s) in enumerate(FAULTS)])
def test_a_fault_breaks_its_demand_and_no_other(demand, scorer):
    # A hook stays on whatever is scored, a module of another library too.
    more_of_it = (
        {"test_a_module_of_another_library_is_scored_or_refused_with_the_reason"} if demand == STUDENT else set()
    )
    assert missed(scorer) - more_of_it == {demand} - more_of_it


def test_every_demand_is_broken_by_some_fault():
    assert {demand for demand, _ in FAULTS} == set(DEMANDS)
