"""What must hold for a loss on inputs that are wrong, missing or empty, and for its options; part of `LossContract`."""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from kdnas.losses import ConditionalAdversarial, Hint, InformationFlow, SingularValue
from kdnas.losses._options import ranges_of
from kdnas.losses.base import Loss, Wrapper
from kdnas.losses.example import example, wave
from kdnas.losses.stage_pairs import StagePairs
from kdnas.outputs import Moment, Outputs


class LossInputContract:
    """The demands on inputs and options."""

    make: type[Loss]

    def test_nan_and_infinity_in_what_it_reads_never_give_a_finite_loss(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        for wrong in (math.nan, math.inf, -math.inf):
            for name, s, t in _spoiled(loss, student, teacher, wrong):
                s = s.map(lambda x: x.detach().clone().requires_grad_())
                result = loss(s, t, labels)
                assert not torch.isfinite(result), f"the value for {wrong} in {name} is {result.item()}"
                result.backward()
                against = loss.adversary(s, t, labels)
                assert against is None or not torch.isfinite(against), f"the discriminator's loss for {wrong} in {name}"
        if _prepares(loss):
            value = loss.preparation(teacher.map(lambda x: torch.full_like(x, math.nan)))
            assert not torch.isfinite(value), "the preparation of an all-NaN teacher is finite"

    def test_a_broken_member_of_an_ensemble_breaks_the_value_or_nothing(self) -> None:
        student, teacher, labels = self._example()
        if labels.dim() == 1:
            labels = teacher.logits.argmax(1)  # the sound member is right
        loss = self._prepared(student, teacher._replace(members=(teacher, teacher)))
        for wrong in (math.nan, math.inf):
            broken = teacher.map(lambda x, wrong=wrong: torch.where(x == x[:, :1], wrong, x))
            s = student.map(lambda x: x.clone().requires_grad_())
            value = loss(s, teacher._replace(members=(teacher, broken)), labels)
            value.backward()
            finite = all(torch.isfinite(x.grad).all() for _, x in s.select(loss.needs) if x.grad is not None)
            assert finite or not torch.isfinite(value), f"a member with {wrong}: the value is finite, its gradient not"

    def test_inputs_that_do_not_agree_are_refused(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        for name, s, t in (
            ("a teacher's batch of 1", student, teacher.map(lambda x: x[:1])),
            ("a smaller teacher's batch", student, teacher.map(lambda x: x[:3])),
            ("a larger teacher's batch", student, teacher.map(lambda x: torch.cat([x, x]))),
            ("another dtype of the teacher's", student, teacher.map(Tensor.double)),
            ("another device of the teacher's", student, teacher.map(lambda x: x.to("meta"))),
            ("another number of classes", student, teacher._replace(logits=teacher.logits[:, :1])),
        ):
            reads = "logits" in loss.needs or "classes" not in name
            if loss.uses_teacher and reads:
                _refuses(f"{name} is accepted", lambda s=s, t=t: loss(s, t, labels))
        if len(student.features) > 1 and "features" in loss.needs:
            first, *rest = student.features
            ragged = student._replace(features=(first[:1], *rest))
            _refuses("stages of unequal batches are accepted", lambda: loss(ragged, teacher, labels))
        if "labels" in loss.needs:
            _refuses("labels of a smaller batch are accepted", lambda: loss(student, teacher, labels[:3]))

    def test_logits_of_three_dimensions_are_refused_unless_they_are_marked(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        if "logits" not in loss.needs and "labels" not in loss.needs:
            return
        batch, classes = student.logits.shape[:2]
        scales = wave(7).float()
        words = [o._replace(logits=o.logits.reshape(batch, classes, -1)[:, :, :1] * scales) for o in (student, teacher)]
        few = labels.reshape(batch, -1)[:, :1].expand(-1, 7)
        _refuses("logits [batch, classes, tokens] are accepted", lambda: loss(words[0], words[1], few))
        marked = [Outputs.of_tokens(o.logits.transpose(1, 2), *o[1:]) for o in words]
        try:
            fresh = self._prepared(*marked)
            value = fresh(*marked, few)
        except ValueError:
            return  # a loss without positions says so
        as_maps = [o._replace(logits=o.logits[..., None]) for o in words]
        assert torch.equal(value, fresh(*as_maps, few[..., None])), "tokens are not compared like a map's positions"

    def test_an_empty_batch_gives_a_zero_with_a_graph(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        student, teacher = student.map(lambda x: x[:0]), teacher.map(lambda x: x[:0])
        _is_connected_zero("an empty batch", loss, student, teacher, labels[:0])
        prepared = loss.preparation(teacher) if _prepares(loss) else None
        for value in (loss.adversary(student, teacher, labels[:0]), prepared):
            if value is not None:
                assert value == 0 and value.requires_grad, f"an empty batch gives the parts {value}"
                value.backward()

    def test_labels_that_are_all_left_out_give_a_zero_with_a_graph(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        if "labels" in loss.needs:
            _is_connected_zero("labels of -100 only", loss, student, teacher, torch.full_like(labels, -100))

    def test_what_is_missing_or_of_another_kind_is_named(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        for kind in ("features", "attentions"):
            if kind in loss.needs:
                missing = student._replace(features=()) if kind == "features" else student._replace(attentions=())
                _refuses(f"outputs without {kind} are accepted", lambda s=missing: loss(s, teacher, labels))
                _refuses(f"{kind} are missing in prepare", lambda s=missing: self.make().prepare(s, teacher))
        maps: Any = student.features[0]
        single = student._replace(features=maps)
        _refuses("a map in place of a tuple of maps is accepted", lambda: loss(single, teacher, labels))
        _refuses("a list is accepted as outputs", lambda: loss([student.logits], teacher, labels))
        whole = student._replace(logits=student.logits.long())
        _refuses("logits of whole numbers are accepted", lambda: loss(whole, teacher, labels))
        if "labels" in loss.needs:
            classes = student.logits.shape[1]
            for wrong in (None, labels.double(), labels + classes, labels - classes, labels[:, None] + 0 * labels):
                _refuses(f"labels {wrong} are accepted", lambda wrong=wrong: loss(student, teacher, wrong))
            assert torch.equal(loss(student, teacher, labels.int()), loss(student, teacher, labels)), "int32 labels"

    def test_fields_of_another_kind_or_shape_are_named(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        first, *rest = student.features
        square = student.attentions[0]
        nothing: Any = None
        numbers: Any = (1, 2)
        faults: tuple[tuple[str, dict[str, Any]], ...] = (
            ("sparse logits", {"logits": student.logits.to_sparse()}),
            ("complex logits", {"logits": student.logits.to(torch.complex64)}),
            ("features of None", {"features": nothing}),
            ("a stage of None", {"features": (nothing, *rest)}),
            ("a stage of one dimension", {"features": (first.flatten(1)[:, 0], *rest)}),
            ("a stage of five dimensions", {"features": (first[..., None], *rest)}),
            ("attention that is not square", {"attentions": (square[..., 1:],)}),
            ("attention without heads", {"attentions": (square[:, 0],)}),
            ("members that are no outputs", {"members": numbers}),
        )
        for fault, changes in faults:
            s, t = student._replace(**changes), teacher._replace(**changes)
            _refuses(f"{fault} is accepted", lambda s=s, t=t: loss(s, t, labels))
        for wrong in (labels.tolist(), labels.numpy()):
            _refuses(f"labels of {type(wrong)} are accepted", lambda wrong=wrong: loss(student, teacher, wrong))

    def test_a_moment_of_another_kind_or_batch_is_refused(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        others: tuple[Any, ...] = (None, 0.5, Moment(ids=torch.arange(len(labels) + 1)))
        for at in others:
            _refuses(f"{at} is accepted as the moment", lambda at=at: loss(student, teacher, labels, at))
            if loss.adversary(student, teacher, labels) is not None:
                _refuses(f"{at} is accepted as the moment", lambda at=at: loss.adversary(student, teacher, labels, at))

    def test_other_widths_than_those_of_prepare_are_refused(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)

        def wide(outputs: Outputs) -> Outputs:
            return outputs._replace(features=tuple(torch.cat([f, f], 1) for f in outputs.features))

        def rich(outputs: Outputs) -> Outputs:
            return outputs._replace(logits=torch.cat([outputs.logits, outputs.logits], 1))

        def short(outputs: Outputs) -> Outputs:
            return outputs._replace(features=outputs.features[:-1])

        theirs = (loss.teacher_needs or loss.needs) if loss.uses_teacher else ()
        for name, kind, s, t in (
            ("a wider teacher", theirs, student, wide(teacher)),
            ("a teacher of fewer stages", theirs, student, short(teacher)),
            ("a wider student", loss.needs, wide(student), teacher),
            ("a student of fewer stages", loss.needs, short(student), teacher),
        ):
            if "features" in kind:
                _refuses(f"{name} than in prepare is accepted", lambda s=s, t=t: loss(s, t, labels))
        if "logits" in loss.needs:
            _refuses("more classes are accepted", lambda: loss(rich(student), rich(teacher), labels))
        with torch.random.fork_rng():
            loss.prepare(rich(student), rich(teacher))
        loss.mark_trained()
        loss(rich(student), rich(teacher), labels)

    def test_logits_alone_will_do_where_nothing_else_is_read(self) -> None:
        student, teacher, labels = self._example()
        loss = self._prepared(student, teacher)
        if {"features", "attentions", "images"} & set(loss.needs):
            _refuses("logits alone are accepted", lambda: loss(student.logits, teacher.logits, labels))
        elif not any("images" in part for part in vars(loss)):
            value = loss(Outputs(student.logits), Outputs(teacher.logits), labels)
            assert torch.equal(value, loss(student.logits, teacher.logits, labels)), "logits alone give another value"

    def test_options_out_of_range_are_refused(self) -> None:
        ranges = ranges_of(self.make)
        for name, parameter in inspect.signature(self.make).parameters.items():
            kinds = (parameter.annotation, *get_args(parameter.annotation))
            if any(get_origin(kind) is Literal for kind in kinds):
                _refuses(f"{name}='no such' is accepted", lambda name=name: self.make(**{name: "no such"}))
            several = tuple[float, ...] in kinds
            if not ({int, float} & set(kinds) or several):
                continue
            assert name in ranges, f"{name} is a number: give its range in `ranges`"
            low, high = map(float, ranges[name][1:-1].split(", "))
            for wrong in (math.nan, math.inf, -math.inf, "x", low - 1, high + 1, *((low,) * (ranges[name][0] == "("))):
                value = (wrong,) if several else wrong
                if isinstance(wrong, float | str):
                    _refuses(f"{name}={value} is accepted", lambda name=name, value=value: self.make(**{name: value}))

    def test_it_is_prepared_with_half_precision_outputs(self) -> None:
        student, teacher, labels = self._example()
        for dtype in (torch.bfloat16, torch.float16):
            s, t = (o.map(lambda x, dtype=dtype: x.to(dtype)) for o in (student, teacher))
            value = self._prepared(s, t)(s, t, labels)
            assert value.dtype == torch.float32 and torch.isfinite(value), f"prepared with {dtype}: {value}"

    def test_a_loss_inside_is_passed_on_whole(self) -> None:
        loss = self._prepared(*self._example()[:2])
        inner = [part for part in loss.modules() if isinstance(part, Loss) and part is not loss]
        assert not inner or isinstance(loss, Wrapper), "derive a loss that holds another one from Wrapper"
        for name, parameter in inspect.signature(self.make).parameters.items():
            if Loss in (parameter.annotation, *get_args(parameter.annotation)):
                for inside in (
                    ConditionalAdversarial(),
                    SingularValue(),
                    Hint(staged=False),
                    InformationFlow(),
                    Hint(),
                ):
                    self._check_passed_on(name, inside)

    def test_its_options_are_shown_by_repr(self) -> None:
        text = repr(self.make())
        for name, parameter in inspect.signature(self.make).parameters.items():
            if parameter.default is not None:
                assert f"{name}={parameter.default!r}" in text, f"{name} is not shown by repr: {text.splitlines()[0]}"

    def test_parts_that_need_a_training_first_are_not_used_untrained(self) -> None:
        student, teacher, labels = self._example()
        with torch.random.fork_rng():
            loss = self.make()
            loss.prepare(student, teacher)
            if not _prepares(loss):
                return
            _refuses("parts are used untrained", lambda: loss(student, teacher, labels))
            untrained = {name: x.clone() for name, x in loss.state_dict().items()}
            loss.preparation(teacher)
            trained = {name: x.clone() for name, x in loss.state_dict().items()}
            loss(student, teacher, labels)
            again = self.make()
            again.prepare(student, teacher)
        again.load_state_dict(trained)
        again(student, teacher, labels)
        again.load_state_dict(untrained)
        _refuses("a checkpoint of untrained parts counts as trained", lambda: again(student, teacher, labels))

    def test_a_checkpoint_holds_the_pairs_of_stages(self) -> None:
        student, teacher, _ = self._example()
        stored, restored = self._prepared(student, teacher), self._prepared(student, teacher)
        taps = [m for m in restored.modules() if isinstance(m, StagePairs)]
        for rule in taps:
            rule.pairs = (*reversed(rule.pairs), (0, 0))
        restored.load_state_dict(stored.state_dict())
        before = [m.pairs for m in stored.modules() if isinstance(m, StagePairs)]
        assert before == [rule.pairs for rule in taps], "a checkpoint loses the pairs of stages"

    def _check_passed_on(self, name: str, inside: Loss) -> None:
        make: Callable[..., Loss] = self.make
        try:
            loss = make(**{name: inside})
        except ValueError:
            assert len(inside.stages()) > 1, f"{type(inside).__name__} with one stage is refused"
            return
        student, teacher, labels = self._example()
        with torch.random.fork_rng():
            loss.prepare(student, teacher)
        assert {id(p) for p in inside.parameters()} == {id(p) for p in loss.parameters()}, "parts are not passed on"
        for member in ("needs", "clipped", "uses_teacher", "dense"):
            assert getattr(loss, member) == getattr(inside, member), f"`{member}` of the inner loss is not passed on"
        assert len(loss.discriminator_rates) == len(inside.discriminator_rates), "discriminator rates are not passed on"
        assert {s.uses for s in loss.stages()} == {s.uses for s in inside.stages()}, "stages are not passed on"
        against = [either.adversary(student, teacher, labels) is None for either in (loss, inside)]
        assert against[0] == against[1], "the discriminator's loss is not passed on"
        early, late = (
            [float(either(student, teacher, labels, Moment(progress)).detach()) for either in (loss, inside)]
            for progress in (0.0, 0.5)
        )
        assert (early[0] == late[0]) == (early[1] == late[1]), "the progress is not passed on"

    def _example(self, dtype: torch.dtype = torch.float32) -> tuple[Outputs, Outputs, Tensor]:
        student, teacher, labels = example(dense=self.make.dense)
        return student.map(lambda x: x.to(dtype)), teacher.map(lambda x: x.to(dtype)), labels

    def _prepared(
        self,
        student: Outputs,
        teacher: Outputs,
        *,
        elastic: bool = False,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Loss:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            loss = self.make()
            loss.prepare(student, teacher, elastic=elastic)
        loss.mark_trained()
        return loss.to(dtype)


def _refuses(fault: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except ValueError:
        return
    except Exception as error:
        raise AssertionError(f"{fault}, it raises {type(error).__name__}: {error}") from error
    raise AssertionError(fault)


def _prepares(loss: Loss) -> bool:
    return any(stage.uses == "preparation" for stage in loss.stages())


def _spoiled(loss: Loss, student: Outputs, teacher: Outputs, wrong: float) -> Iterator[tuple[str, Outputs, Outputs]]:
    """Outputs in which one entry, or one tensor as a whole, is `wrong`."""
    for name, x in student.select(loss.needs):
        for part in (x.flatten()[:1], x):
            yield f"the student's {name}", _with(student, x, part, wrong), teacher
    for name, x in teacher.select(loss.teacher_needs or loss.needs) if loss.uses_teacher else ():
        for part in (x.flatten()[:1], x):
            yield f"the teacher's {name}", student, _with(teacher, x, part, wrong)


def _with(outputs: Outputs, tensor: Tensor, part: Tensor, wrong: float) -> Outputs:
    def change(x: Tensor) -> Tensor:
        if x is not tensor:
            return x
        spoiled = x.clone().flatten()
        spoiled[: part.numel()] = wrong
        return spoiled.reshape(x.shape)

    return outputs.map(change)


def _is_connected_zero(name: str, loss: Loss, student: Outputs, teacher: Outputs, labels: Tensor) -> None:
    student = student.map(lambda x: x.detach().clone().requires_grad_())
    value = loss(student, teacher, labels)
    assert value.shape == () and not value.any(), f"{name}: the value is {value}"
    assert value.requires_grad, f"{name}: the value has no graph"
    value.backward()
    for field, x in student.select(loss.needs):
        assert x.grad is not None and not x.grad.any(), f"{name}: the gradient of {field} is not 0"
