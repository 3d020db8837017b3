"""What must hold for every scorer, as a class that anyone's tests can inherit."""

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdnas.architecture import Architecture
from kdnas.data.base import Data, TensorImages
from kdnas.distillers.base import Batch
from kdnas.distillers.block_wise import BlockWise
from kdnas.network import BATCH_NORMS, Network, batch_statistics, without_weights
from kdnas.outputs import Outputs
from kdnas.randomness import initialised, torch_rng
from kdnas.scorers.base import Evidence, Score, Scorer, score_all
from kdnas.space import SearchSpace
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.testing._algorithm import AlgorithmContract
from kdnas.testing._generators import generator_states, generators_seeded
from kdnas.testing._modules import module_state


class ScorerContract(AlgorithmContract):
    """What must hold for every scorer. Set `make` to the class.

        class TestMine(ScorerContract):
            make = Mine

    The students are networks of a small space; the evidence has everything that a scorer may read.

    Attributes:
        make: the scorer's class.
        arguments: its arguments.
        repeats: whether a second score of the same student is the same; False if it measures time.
        prefers: which student must have the higher score: `teacher`, the teacher's own network, not others of its
            architecture; `size`, the space's largest network, not its smallest; `labels`, a student that classifies
            every image right, not one that gets half of them wrong; `largest`, the supernet's largest subnet, not the
            others; `nothing`, if no such order is certain.
    """

    make: type[Scorer]
    _base = Scorer
    repeats = True
    prefers: Literal["teacher", "size", "labels", "largest", "nothing"] = "nothing"

    def test_subnets_and_networks_have_finite_scores(self) -> None:
        evidence = _evidence()
        for student in self._students():
            score = self._scorer().score(student, evidence)
            assert isinstance(score, Score) and isinstance(score.value, float), score
            assert math.isfinite(score.value) and all(map(math.isfinite, score.parts.values())), score
            assert score.share == 1

    def test_the_score_does_not_depend_on_what_was_scored_before(self) -> None:
        if not self.repeats:
            return
        first, *others = self._students()
        alone = self._scorer().score(first, _evidence())
        scorer, evidence = self._scorer(), _evidence()
        for student in others:
            scorer.score(student, evidence)
        assert scorer.score(first, evidence) == alone, "it differs after others were scored"
        assert scorer.score(first, evidence) == alone, "it differs the second time"

    def test_the_score_does_not_depend_on_the_global_generators(self) -> None:
        if not self.repeats:
            return
        scores = []
        for seed in (0, 1):
            with generators_seeded(seed):
                scores.append(self._scorer().score(next(self._students()), _evidence()))
        assert scores[0] == scores[1]

    def test_the_global_generators_are_left_alone(self) -> None:
        student, evidence = next(self._students()), _evidence()
        self._scorer().score(student, _evidence())  # what is imported or cached is so before the comparison
        before = generator_states()
        self._scorer().score(student, evidence)
        assert generator_states() == before, "a global generator was drawn from or seeded"

    def test_the_student_is_left_as_it_was(self) -> None:
        """Its weights, buffers, gradients and hooks, and its modes, if they differ between its parts."""
        evidence = _evidence()
        for training in (False, True):
            for student in self._students():
                student.train(training)
                for norm in [m for m in student.modules() if isinstance(m, BATCH_NORMS)][:1]:
                    norm.train(not training)
                next(iter(student.parameters())).requires_grad_(False)
                before = module_state(student)
                self._scorer().score(student, evidence)
                after = module_state(student)
                changed = [name for name in before if before[name] != after[name]]
                assert not changed, f"the student's {changed} changed"

    def test_evidence_teacher_and_supernet_are_left_as_they_were(self) -> None:
        evidence = _evidence()
        assert evidence.teacher_module is not None and evidence.supernet is not None
        parts: dict[str, Callable[[], Any]] = {
            "images": lambda: [x.tolist() for x in (evidence.pixels, evidence.images, evidence.labels)],
            "teacher's outputs": lambda: [
                x.tolist() for x in (evidence.teacher.logits, *evidence.teacher.features, *evidence.teacher.attentions)
            ],
            "teacher": lambda: module_state(evidence.teacher_module),
            "supernet": lambda: module_state(evidence.supernet),
        }
        before = {name: look() for name, look in parts.items()}
        for student in self._students():
            self._scorer().score(student, evidence)
        changed = [name for name, look in parts.items() if look() != before[name]]
        assert not changed, f"{changed} of the evidence changed"

    def test_higher_is_better(self) -> None:
        evidence = _evidence()
        better, worse = self._pair(evidence)
        best = self._scorer().score(better, evidence).value if better is not None else math.inf
        for student in worse:
            assert self._scorer().score(student, evidence).value < best, f"it does not prefer `{self.prefers}`"

    def test_extreme_students_have_finite_scores_or_are_refused(self) -> None:
        evidence = _evidence()
        for name, change in EXTREME_WEIGHTS.items():
            student = _network(3)
            with torch.no_grad():
                for parameter in student.parameters():
                    change(parameter)
            self._finite_or_refused(f"weights {name}", student, evidence)

    def test_extreme_outputs_have_finite_scores_or_are_refused(self) -> None:
        evidence = _evidence()
        for name, outputs in _extreme_outputs(evidence).items():
            student = initialised(partial(_FixedOutputs, outputs), 0)
            self._finite_or_refused(f"a student of {name}", student, evidence)
            self._finite_or_refused(f"a teacher of {name}", _network(3), replace(evidence, teacher=outputs))

    def test_few_and_equal_images_have_finite_scores_or_are_refused(self) -> None:
        for name, order in (("two", (0, 1)), ("three", (0, 1, 2)), ("equal", (0,) * 12)):
            self._finite_or_refused(f"{name} images", _network(3), _evidence(order))

    def test_a_module_of_another_library_is_scored_or_refused_with_the_reason(self) -> None:
        evidence = _evidence()
        for kind in (_LogitsOnly, _Linear, _WithoutWeights):
            module = initialised(kind, 0).eval()
            self._finite_or_refused(kind.__name__, module, evidence)
            hooks = [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks]
            assert not hooks, f"hooks are left on {hooks}"

    def test_the_last_rung_is_the_score(self) -> None:
        resources = self._scorer().resources
        assert len(resources) >= 1 and list(resources) == sorted(set(resources)), resources
        student = next(self._students())
        rungs = list(self._scorer().rungs(student, _evidence()))
        assert len(rungs) == len(resources), f"{len(rungs)} rungs, {len(resources)} resources"
        if self.repeats:
            assert rungs[-1] == self._scorer().score(student, _evidence())

    def test_a_population_has_the_scores_of_each_alone_to_the_bit(self) -> None:
        *candidates, last = _space().all()
        supernet, candidates = _supernet(), [*candidates[:3], last]
        scores = score_all(supernet, candidates, self._scorer(), _evidence())
        assert len(scores) == len(candidates)
        if not self.repeats:
            return
        evidence, scorer = _evidence(), self._scorer()
        for architecture, score in zip(candidates, scores, strict=True):
            alone = scorer.score(_subnet(architecture), evidence)
            assert score == alone, f"{_space().code(architecture)}: {score.value!r} together, {alone.value!r} alone"

    def test_a_scorer_that_reads_no_weights_gives_the_same_score_for_any(self) -> None:
        if self._scorer().reads_weights:
            return
        blueprint = _space().blueprint(_space().largest)
        shape = without_weights(blueprint).eval()
        scores = [self._scorer().score(s, _evidence()) for s in (shape, _network(3), _network(4))]
        if self.repeats:
            assert scores[0] == scores[1] == scores[2], "the score depends on the weights: set reads_weights to True"

    def _scorer(self) -> Scorer:
        return self.make(**self.arguments)

    def _students(self) -> Iterator[nn.Module]:
        """Subnets extracted from a supernet, and networks of their own; new ones at every call."""
        yield _subnet(_space().smallest)
        yield _network(3)
        yield _subnet(_space().sample(random.Random(4)))

    def _pair(self, evidence: Evidence) -> tuple[nn.Module | None, list[nn.Module]]:
        """The student that must have the higher score, and those that must have a lower one."""
        space = _space()
        if self.prefers == "teacher":
            return _network(TEACHER), [_network(seed) for seed in (1, 2, 3)]
        if self.prefers == "size":
            return _network(3), [_network(3, smallest=True)]
        if self.prefers == "labels":
            labels = evidence.labels
            wrong = [(labels + turn * (torch.arange(len(labels)) % 2)) % CLASSES for turn in (1, 2)]
            return _FixedAnswers(labels), [_FixedAnswers(answers) for answers in wrong]
        if self.prefers == "largest":
            others: list[nn.Module] = [_subnet(a) for a in (space.smallest, *list(space.all())[4:30:6])]
            return _subnet(space.largest), others
        return None, []

    def _finite_or_refused(self, name: str, student: nn.Module, evidence: Evidence) -> None:
        try:
            score = self._scorer().score(student, evidence)
        except ValueError as error:
            assert str(error).strip(), f"{name}: a ValueError without a message"
            return
        assert math.isfinite(score.value), f"{name}: the score is {score.value}"


TEACHER = 7
CLASSES = 3

EXTREME_WEIGHTS: dict[str, Callable[[Tensor], object]] = {
    "of zero": lambda w: w.zero_(),
    "all equal": lambda w: w.fill_(0.1),
    "a thousand times as large": lambda w: w.mul_(1e3),
    "a thousand times as small": lambda w: w.mul_(1e-3),
}


def _extreme_outputs(evidence: Evidence) -> dict[str, Outputs]:
    """Outputs in the shapes of the evidence's teacher."""
    teacher = evidence.teacher
    certain = 1e4 * nn.functional.one_hot(evidence.labels, CLASSES).float()
    return {
        "zeros": teacher.map(torch.zeros_like),
        "constants": teacher.map(lambda x: torch.full_like(x, 0.1)),
        "equal images": teacher.map(lambda x: x[:1].expand_as(x).clone()),
        "a million": teacher.map(lambda x: 1e6 * x),
        "a millionth": teacher.map(lambda x: 1e-6 * x),
        "certainty": teacher._replace(logits=certain),
        "certain mistakes": teacher._replace(logits=-certain),
    }


class _FixedOutputs(nn.Module):
    """Returns the same outputs for all images."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs, self.layer = outputs, nn.Linear(CLASSES, CLASSES)

    def forward(self, images: Tensor) -> Outputs:
        """The outputs of as many images; its layer changes nothing."""
        unchanged = 0 * self.layer(images.mean((2, 3))).sum()
        outputs = self.outputs.map(lambda x: x[: len(images)])
        return outputs._replace(logits=outputs.logits + unchanged)


class _FixedAnswers(nn.Module):
    """A network with a fixed class for each of the evidence's images."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.network, self.answers = _network(3), answers

    def forward(self, images: Tensor) -> Outputs:
        """The network's feature maps, and logits of the fixed classes."""
        logits = 4.0 * nn.functional.one_hot(self.answers[: len(images)], CLASSES).float()
        return self.network(images)._replace(logits=logits)


class _LogitsOnly(nn.Module):
    """A network of another library: it returns logits, and its stages have to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.second(self.first(images)).mean((2, 3)))


class _Linear(nn.Module):
    """A linear classifier, without feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(images.flatten(1))


class _WithoutWeights(nn.Module):
    """A classifier without weights: the logits are the mean colour."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return images.mean((2, 3))


@cache
def _space() -> SearchSpace:
    return load_space("toy").fitted(classes=CLASSES, image_channels=3)


@cache
def _data() -> Data:
    parts = []
    for name, count in (("train", 24), ("search", 24), ("test", 6)):
        labels = torch.arange(count) % CLASSES
        noise = torch.rand(count, 3, 8, 8, generator=torch_rng("contract", name)) * 0.6
        for label in range(CLASSES):
            noise[labels == label, label, label : label + 3] += 0.4
        parts.append(TensorImages(noise, labels))
    return Data(*parts, class_names=tuple("abc"))


def _network(seed: int, *, smallest: bool = False) -> Network:
    architecture = _space().smallest if smallest else _space().largest
    return initialised(lambda: Network(_space().blueprint(architecture)), seed).eval()


def _supernet() -> Supernet:
    return initialised(lambda: Supernet(_space()), 0).eval()


@cache
def _extracted(architecture: Architecture) -> Network:
    return _supernet().extract(architecture)


def _subnet(architecture: Architecture) -> Network:
    return copy.deepcopy(_extracted(architecture))


@cache
def _first_evidence(order: tuple[int, ...]) -> Evidence:
    data, ids = _data(), torch.tensor(order)
    teacher = Frozen(_network(TEACHER), preprocessing=data.preprocessing)
    pixels, labels = data.search.take(ids), data.search.labels[ids]
    with torch.no_grad(), batch_statistics(teacher.module):  # as a student's outputs are computed
        outputs = teacher(pixels)
    supernet, distiller = _supernet(), BlockWise()
    with torch.no_grad():
        initialised(lambda: distiller.prepare(supernet, Batch(pixels, labels, ids, data, lambda *_: outputs)), 0)
    return Evidence(pixels, data.normalise(pixels), labels, outputs, teacher, data, 0, distiller.eval(), supernet)


def _evidence(order: tuple[int, ...] = tuple(range(16))) -> Evidence:
    """The evidence of these images of the search part; a new copy at every call."""
    shared = (_data(), _space())
    return copy.deepcopy(_first_evidence(order), {id(part): part for part in shared})
