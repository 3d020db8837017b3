"""What must hold for every algorithm of a kind, as classes that anyone's tests can inherit.

    class TestMine(LossContract):
        make = Mine

Needs no test framework; pytest collects the methods.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kdnas.losses.base import Loss, connected_zero
from kdnas.losses.check import agrees, value
from kdnas.losses.example import fill
from kdnas.outputs import Moment, Outputs
from kdnas.testing._loss_inputs import LossInputContract

Change = Callable[[Outputs], Outputs]


def _features(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda outputs: outputs._replace(features=tuple(change(f) for f in outputs.features))


def _logits(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda outputs: outputs._replace(logits=change(outputs.logits))


def _first(x: Tensor, new: Tensor | float) -> Tensor:
    return torch.cat([torch.zeros_like(x[:1]) + new, x[1:]])


def _dead_channel(feature: Tensor) -> Tensor:
    feature = feature.clone()
    if feature.dim() == 4:
        feature[:, 0] = 0
    else:
        feature[..., 0] = 0
    return feature


def _one_hot(logits: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1).to(logits.dtype)


def _scaled(x: Tensor, scale: float) -> Tensor:
    limits = torch.finfo(torch.float16)
    # Half precision ends at 65504 and loses digits below 6e-5.
    return x * (min(max(scale, 1e-3), limits.max / 4) if x.dtype == torch.float16 else scale)


# Inputs of unit scale, whose gradient must stay small.
HARD: dict[str, Change] = {
    "an ordinary batch": lambda o: o,
    "an all-zero sample": lambda o: _features(lambda f: _first(f, 0.0))(_logits(lambda z: _first(z, 0.0))(o)),
    "two equal samples": lambda o: o.map(lambda x: _first(x, x[1])),
    "all samples equal": lambda o: o.map(lambda x: x[:1].expand_as(x).clone()),
    "constant maps": _features(lambda f: torch.full_like(f, 0.1)),
    "zero maps": _features(torch.zeros_like),
    "zero logits": _logits(torch.zeros_like),
    "a dead channel": _features(_dead_channel),
    "one-hot logits": _logits(_one_hot),
    "logits of +-80": _logits(lambda z: 80 * torch.where(z > 0, 1.0, -1.0).to(z.dtype)),
    "one-hot attention": lambda o: o._replace(
        attentions=tuple(torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a).clone() for a in o.attentions)
    ),
}

# Inputs of extreme scale: value and gradient must be finite.
EXTREME: dict[str, Change] = {
    "gaps of 1e4 between logits": _logits(lambda z: 1e4 * _one_hot(z)),
    "maps scaled by 1e6": _features(lambda f: _scaled(f, 1e6)),
    "maps scaled by 1e-6": _features(lambda f: _scaled(f, 1e-6)),
}


class LossContract(LossInputContract):
    """The contract of a loss, as tests: derive a class `Test...` and set `make` to the loss class.

    Attributes:
        make: the loss class.
        largest_gradient: bound on each entry of the gradient for inputs of unit scale.
    """

    make: type[Loss]
    largest_gradient = 1e3

    def test_it_is_final_with_keyword_only_arguments_that_all_have_defaults(self) -> None:
        assert getattr(self.make, "__final__", False), "decorate the class with @final"
        for parameter in inspect.signature(self.make).parameters.values():
            assert parameter.kind is parameter.KEYWORD_ONLY, parameter
            assert parameter.default is not parameter.empty, parameter

    def test_its_docstring_names_its_reference(self) -> None:
        text = inspect.cleandoc(self.make.__doc__ or "")
        assert text.splitlines()[0].endswith("."), "the first line is one sentence"
        assert any(line.startswith("Reference:") for line in text.splitlines()), "no line starts with Reference:"

    def test_its_docstring_documents_every_option(self) -> None:
        lines = [line.strip() for line in (self.make.__doc__ or "").splitlines()]
        for name in inspect.signature(self.make).parameters:
            assert any(line.startswith(f"{name}: ") for line in lines), f"the docstring has no line `{name}: ...`"

    def test_it_has_its_golden_value(self) -> None:
        current = value(self.make)
        assert self.make.golden is not None, f"golden = {current!r}"
        assert agrees(self.make.golden, current), f"golden = {self.make.golden!r}, this torch build gives {current!r}"

    def test_value_and_gradient_are_finite_on_hard_inputs_in_float32(self) -> None:
        self._check_hard_inputs(torch.float32)

    def test_value_and_gradient_are_finite_on_hard_inputs_under_bfloat16_autocast(self) -> None:
        self._check_hard_inputs(torch.bfloat16)

    def test_value_and_gradient_are_finite_on_hard_inputs_under_float16_autocast(self) -> None:
        self._check_hard_inputs(torch.float16)

    def test_value_and_gradient_are_finite_on_identical_inputs(self) -> None:
        for outputs in self._example()[:2]:
            loss, labels = self._prepared(outputs, outputs), self._example()[2]
            self._check_finite("identical inputs", loss, outputs, outputs, labels, bounded=True)

    def test_value_and_gradient_are_finite_for_a_batch_of_one(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        single = (student.map(lambda x: x[:1]), teacher.map(lambda x: x[:1]), labels[:1])
        self._check_finite("a batch of 1", loss, *single, bounded=True)

    def test_a_student_and_a_teacher_of_other_map_sizes_are_matched(self) -> None:
        student, teacher, labels = self._example()
        bigger = _features(lambda f: torch.nn.functional.interpolate(f, scale_factor=(2, 1)))
        for s, t in ((bigger(student), teacher), (student, bigger(teacher))):
            self._check_finite("non-square maps of unequal height", self._prepared(s, t), s, t, labels, bounded=True)

    def test_a_convolutional_network_and_a_transformer_are_matched(self) -> None:
        student, teacher, labels = self._example()
        tokens = _features(lambda f: f.flatten(2).transpose(1, 2).contiguous())
        for s, t in (
            (student, tokens(teacher)),
            (tokens(student), teacher),
            (tokens(student), tokens(teacher)),
        ):
            self._check_finite("tokens [batch, tokens, channels]", self._prepared(s, t), s, t, labels, bounded=True)

    def test_a_narrower_student_is_served_when_prepared_for_a_supernet(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher, elastic=True)
        narrow = _features(lambda f: f[:, :-1].clone())(student)
        for s in (narrow, student, narrow):
            self._check_finite("a student narrower than the largest", loss, s, teacher, labels, bounded=True)

    def test_gradient_is_that_of_the_value(self) -> None:
        if self.make.own_gradient:
            return
        student, teacher, labels = self._example(torch.float64)
        loss = self._prepared(student, teacher, dtype=torch.float64)
        leaves = [x.clone().requires_grad_() for x in _tensors(student)]

        def value_of(*tensors: Tensor) -> Tensor:
            # Plus a zero with a graph: gradcheck needs every input in it.
            return loss(_like(student, tensors), teacher, labels) + connected_zero(*tensors)

        assert torch.autograd.gradcheck(value_of, leaves, fast_mode=True, eps=1e-6, atol=1e-7, rtol=1e-4)

    def test_no_gradient_reaches_the_teacher_or_the_inputs_nobody_reads(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        student = student.map(lambda x: x.clone().requires_grad_())
        teacher = teacher.map(lambda x: x.clone().requires_grad_())
        loss(student, teacher, labels).backward()
        assert all(x.grad is None for x in _all_tensors(teacher)), "the teacher got a gradient"
        if student.images is not None:
            assert student.images.grad is None, "the images got a gradient"

    def test_inputs_are_never_written_to(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        before = copy.deepcopy((student, teacher, labels))
        loss(student, teacher, labels)
        for old, new in zip(_all_tensors(*before[:2]), _all_tensors(student, teacher), strict=True):
            assert torch.equal(old, new)
        assert torch.equal(before[2], labels)

    def test_a_call_stores_nothing_on_the_loss_but_in_buffers(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        before = [dict(vars(module)) for module in loss.modules()]
        moment = Moment(0.5, ids=torch.arange(len(labels)))
        loss(student, teacher, labels, moment)
        loss.adversary(student, teacher, labels, moment)
        after = [dict(vars(module)) for module in loss.modules()]
        assert before == after, "a call changed an attribute: read what changes during training from `at`"

    def test_the_order_of_the_batch_does_not_matter(self) -> None:
        student, teacher, labels = self._example(torch.float64)
        loss = self._prepared(student, teacher, dtype=torch.float64)
        order = torch.tensor([2, 0, 3, 1])
        ordered = float(loss(student, teacher, labels).detach())
        shuffled = float(loss(student.map(lambda x: x[order]), teacher.map(lambda x: x[order]), labels[order]).detach())
        assert math.isclose(ordered, shuffled, rel_tol=1e-9, abs_tol=1e-12), (ordered, shuffled)

    def test_repeating_the_batch_keeps_a_mean_over_samples(self) -> None:
        student, teacher, labels = self._example(torch.float64)
        loss = self._prepared(student, teacher, dtype=torch.float64)
        once = float(loss(student, teacher, labels).detach())
        twice = [o.map(lambda x: torch.cat([x, x])) for o in (student, teacher)]
        doubled = float(loss(*twice, torch.cat([labels, labels])).detach())
        equal = abs(doubled - once) <= 0.01 * abs(once) + 1e-12
        if self.make.pairwise:
            assert not equal, f"the values {once} and {doubled} are equal: set pairwise to False"
        else:
            assert equal, f"repeating the batch changes the value from {once} to {doubled}"

    def test_a_batch_is_the_mean_of_its_halves_unless_it_needs_the_whole(self) -> None:
        student, teacher, labels = self._example(torch.float64)
        loss = self._prepared(student, teacher, dtype=torch.float64)
        whole = float(loss(student, teacher, labels).detach())
        halves = 0.0
        for rows in (slice(2), slice(2, 4)):
            parts = [outputs.map(lambda x, rows=rows: x[rows]) for outputs in (student, teacher)]
            halves += float(loss(*parts, labels[rows]).detach()) / 2
        if not math.isclose(whole, halves, rel_tol=1e-6, abs_tol=1e-9):
            assert self.make.whole_batch, f"the value is {whole}, of halves {halves}: set whole_batch to True"

    def test_learnable_parts_are_checkpointed(self) -> None:
        student, teacher, labels = self._example()
        trained = fill(self._prepared(student, teacher))
        restored = self._prepared(student, teacher, seed=1)
        restored.load_state_dict(trained.state_dict())
        assert torch.equal(trained(student, teacher, labels), restored(student, teacher, labels))

    def test_stages_share_out_the_whole_training(self) -> None:
        switches = [{}]
        if "staged" in inspect.signature(self.make).parameters:
            switches = [{"staged": True}, {"staged": False}]
        for switch in switches:
            student, teacher, _ = self._example()
            loss = self.make(**switch)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                loss.prepare(student, teacher)
            stages = loss.stages()
            assert math.isclose(sum(stage.share for stage in stages), 1.0)
            if any(stage.uses == "preparation" for stage in stages):
                prepared = loss.preparation(teacher)
                assert prepared.shape == () and torch.isfinite(prepared)
                prepared.backward()
                assert any(p.grad is not None for p in loss.parameters()), (
                    "the preparation has no gradient for any part"
                )

    def test_discriminator_and_student_learn_from_their_own_losses_only(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        student = student.map(lambda x: x.clone().requires_grad_())
        against = loss.adversary(student, teacher, labels)
        if against is None:
            return
        assert against.shape == () and torch.isfinite(against)
        against.backward()
        assert all(x.grad is None for x in _all_tensors(student)), "the discriminator's loss reached the student"
        discriminator = [p for p in loss.parameters() if p.grad is not None]
        assert discriminator and all(torch.isfinite(p.grad).all() for p in discriminator if p.grad is not None)
        loss.zero_grad()
        loss(student, teacher, labels).backward()
        assert all(p.grad is None for p in discriminator), "the student's loss reached the discriminator"

    def _check_hard_inputs(self, dtype: torch.dtype) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        student, teacher, labels = self._example(dtype)
        for name, change in (HARD | EXTREME).items():
            for changed, s, t in (
                ("student", change(student), teacher),
                ("teacher", student, change(teacher)),
                ("both", change(student), change(teacher)),
            ):
                with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                    self._check_finite(f"{name} ({changed}, {dtype})", loss, s, t, labels, bounded=name in HARD)

    def _check_finite(
        self, name: str, loss: Loss, student: Outputs, teacher: Outputs, labels: Tensor, *, bounded: bool
    ) -> None:
        student = student.map(lambda x: x.detach().clone().requires_grad_())
        loss.zero_grad()
        result = loss(student, teacher, labels)
        assert result.shape == (), f"{name}: the loss must be a scalar, got shape {tuple(result.shape)}"
        assert result.dtype in (torch.float32, torch.float64), f"{name}: the loss must be float32, got {result.dtype}"
        assert torch.isfinite(result), f"{name}: the value is {result.item()}"
        assert result.requires_grad, f"{name}: the value has no graph"
        with torch.autocast("cpu", enabled=False):  # as every training loop runs it
            result.backward()
        for gradient in (x.grad for x in _all_tensors(student) if x.grad is not None):
            largest = float(gradient.float().abs().max())
            if gradient.dtype == torch.float16 and not math.isfinite(largest) and not bounded:
                # Float16 ends at 65504; the gradient of a fourth power of large maps does not, in float32.
                self._check_finite(
                    f"{name} as float32", loss, student.map(Tensor.float), teacher, labels, bounded=False
                )
                break
            assert math.isfinite(largest), f"{name}: the student's gradient is {largest}"
            assert not bounded or largest < self.largest_gradient, f"{name}: the student's gradient is {largest}"
        for part, parameter in loss.named_parameters():
            if parameter.grad is not None:
                assert torch.isfinite(parameter.grad).all(), f"{name}: the gradient of {part} is not finite"


def _tensors(outputs: Outputs) -> Iterator[Tensor]:
    """The tensors of a student that may get a gradient."""
    yield outputs.logits
    yield from outputs.features
    yield from outputs.attentions


def _all_tensors(*outputs: Outputs) -> Iterator[Tensor]:
    for output in outputs:
        yield from _tensors(output)
        if output.images is not None:
            yield output.images


def _like(outputs: Outputs, tensors: tuple[Tensor, ...]) -> Outputs:
    end = 1 + len(outputs.features)
    return outputs._replace(logits=tensors[0], features=tensors[1:end], attentions=tensors[end:])
