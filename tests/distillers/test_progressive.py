import pytest
import torch
import torch.nn.functional as F

from kdnas.distillers.base import Step
from kdnas.distillers.progressive import Progressive, kind_of
from kdnas.settings import Recipe
from kdnas.training.loop import Training
from tests.distillers.spaces import DATA, ELASTIC, OPERATIONS, batch, gradients, supernet, teacher, watched

STAGES = (
    ("full", 1, 4.0, 1),
    ("kernel", 0, 4.0, 1),
    ("depth", 0, 4.0, 2),
    ("width", 2, 4.0, 4),
    ("width", 0, 4.0, 4),
)


def drawn(choice, index, made=None, total=20):
    return (made or Progressive(stages=STAGES)).schedule(total).options(choice, index)


def test_stages_begin_at_their_share_and_free_their_kind_only():
    made = Progressive(stages=STAGES)
    assert made.begins(20) == (0, 4, 8, 12, 16)
    assert made.schedule(20).restarts == {4, 8, 12, 16}
    first = {kind_of(c): c for c in reversed(ELASTIC.choices)}
    kernel, depth, width = first["kernel"], first["depth"], first["width"]
    assert drawn(kernel, 3) == (7,) and drawn(kernel, 4) == drawn(kernel, 19) == (3, 5, 7)
    assert drawn(depth, 7) == (2,) and drawn(depth, 8) == (1, 2)
    assert drawn(width, 11) == (4,) and drawn(width, 12) == (3, 4) and drawn(width, 16) == (2, 3, 4)


def test_every_step_draws_from_its_stage_and_as_many_as_the_stage_says():
    model = supernet(ELASTIC)
    made = Training(model, Progressive(stages=STAGES), DATA, None, Recipe(steps=20, batch_size=12, learning_rate=0.01))
    seen, numbers = watched(model), []
    for index in range(20):
        begin = len(seen)
        made.step()
        numbers.append(len(seen) - begin)
        for architecture, _, _ in seen[begin:]:
            for choice in ELASTIC.choices:
                if choice.name in architecture:
                    assert architecture[choice.name] in drawn(choice, index), (index, choice.name)
        if index < 4:
            assert seen[begin][0] == ELASTIC.largest
    assert numbers == [1] * 8 + [2] * 4 + [4] * 8


def test_later_subnets_learn_from_labels_and_the_network_that_the_first_stage_left():
    model = supernet(ELASTIC)
    made = Training(model, Progressive(stages=STAGES), DATA, None, Recipe(steps=20, batch_size=12, learning_rate=0.05))
    for _ in range(4):
        made.step()
    trained = model.extract(ELASTIC.largest).eval()
    one = batch()
    with torch.no_grad():
        target = trained(one.images).logits.softmax(1)
    for _ in range(10):
        made.step()
    copied = made.distiller.largest
    assert all(
        torch.equal(a, b) for a, b in zip(copied.state_dict().values(), trained.state_dict().values(), strict=True)
    )
    assert not any(p.requires_grad for p in copied.parameters())
    step = Step(13, 20, 0)
    model.zero_grad()
    for _, loss in made.distiller.losses(model, one, step):
        loss.backward()
    ours = gradients(model)
    model.zero_grad()
    for path in made.distiller._sample(ELASTIC, step, 4):
        logits = model(one.images, path).logits
        soft = -(target * logits.log_softmax(1)).sum(1).mean()
        (F.cross_entropy(logits, one.labels) + soft).backward()
    for name, gradient in gradients(model).items():
        assert gradient is None or torch.allclose(gradient, ours[name], rtol=1e-3, atol=1e-5), name


def test_channels_are_sorted_before_each_width_stage_and_trained_widths_keep_theirs():
    model = supernet(ELASTIC)
    made = Training(model, Progressive(stages=STAGES), DATA, None, Recipe(steps=20, batch_size=12, learning_rate=0.05))
    weight = model.bank["stages_0_0:shared"].reduce[0].weight

    def importance():
        return weight.detach().abs().sum((0, 2, 3))

    for begin, kept in ((12, 32), (16, 24)):  # 8 channels in, so 32, 24 and 16 inside
        while made.index < begin:
            made.step()
        before = importance()
        assert not (before[:-1] >= before[1:]).all()
        next(made.distiller.losses(model, batch(), Step(begin, 20, 0)))
        for part in (slice(0, kept), slice(kept, 32)):
            after = importance()[part]
            assert (after[:-1] >= after[1:]).all()
            torch.testing.assert_close(after.sort().values, before[part].sort().values)


def test_a_resumed_training_ends_bit_for_bit_like_an_uninterrupted_one():
    def training():
        recipe = Recipe(steps=10, batch_size=12, learning_rate=0.05)
        return Training(supernet(ELASTIC), Progressive(stages=STAGES), DATA, None, recipe)

    whole = training()
    while not whole.done:
        whole.step()
    first = training()
    for _ in range(5):
        first.step()
    resumed = training()
    resumed.load(first.state())
    while not resumed.done:
        resumed.step()
    for kind in ("model", "distiller"):
        for name, tensor in whole.state()[kind].items():
            assert torch.equal(tensor, resumed.state()[kind][name]), name
    assert whole.model.uses == resumed.model.uses


def test_the_outside_teacher_may_be_the_source():
    made = Progressive(stages=STAGES, source="teacher")
    model, one = supernet(ELASTIC), batch(teacher(ELASTIC))
    made.prepare(model, one)
    assert made.largest is None
    (_, loss), *_ = made.losses(model, one, Step(5, 20, 0))
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"stages": STAGES[1:]}, "must begin with kind full"),
        ({"stages": (*STAGES, ("hight", 0, 1.0, 1))}, "'hight'"),
        ({"stages": (("full", 1, 0.0, 1),)}, "need a positive share"),
        ({"source": "student"}, "`source` must be one of largest, teacher"),
    ],
)
def test_settings_without_sense_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Progressive(**wrong)


def test_operations_are_refused():
    with pytest.raises(ValueError, match="operations"):
        Progressive().prepare(supernet(OPERATIONS), batch())
