import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdnas.distillers.base import Batch, Step
from kdnas.distillers.prioritized import Prioritized
from kdnas.distillers.single_path import SinglePath
from kdnas.randomness import initialised, torch_rng
from kdnas.settings import Recipe
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.training.loop import Training
from tests.toy import data

SPACE = load_space("toy").fitted(classes=3, image_channels=3)
PATHS = list(SPACE.all())
DATA = data()
RECIPE = Recipe(steps=8, batch_size=12, learning_rate=0.05)


def supernet(seed=0):
    return initialised(lambda: Supernet(SPACE), seed)


def batch():
    ids = torch.arange(12)
    return Batch(DATA.train.take(ids), DATA.train.labels[ids], ids, DATA, None)


def prepared(model=None, **options):
    distiller = Prioritized(**{"size": 3, "slice_size": 2, "warmup": 0.0} | options)
    initialised(lambda: distiller.prepare(model or supernet(), batch()), 1)
    return distiller


def slices(name, count=2):
    images = torch.randn(count, 3, 8, 8, generator=torch_rng("images", name))
    return images, torch.randn(count, 3, generator=torch_rng("probabilities", name)).softmax(1)


def admit(distiller, path, accuracy, macs):
    return distiller.admit(PATHS[path], accuracy, macs, *slices(f"{path} {accuracy}"))


def board(distiller):
    return [(PATHS.index(entry.architecture), entry.accuracy, entry.macs) for entry in distiller.board]


def training(distiller, seed=0):
    return Training(supernet(seed), distiller, DATA, None, RECIPE)


candidates = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.integers(1, 4)), max_size=20
)


@given(candidates, st.sampled_from(["paper", "dominance"]))
@settings(max_examples=60, deadline=None)
def test_the_board_is_sorted_never_too_large_and_holds_a_path_once(newcomers, admission):
    distiller = prepared(admission=admission)
    for path, accuracy, macs in newcomers:
        before = board(distiller)
        if admit(distiller, path, accuracy, macs):
            assert (path, accuracy, macs) in board(distiller)
        else:
            assert board(distiller) == before
        now = board(distiller)
        assert len(now) <= 3
        assert len({p for p, _, _ in now}) == len(now)
        assert [(-a, m) for _, a, m in now] == sorted((-a, m) for _, a, m in now)
        if admission == "paper" and len(before) == 3:
            assert now[-1][1] >= before[-1][1]


@given(candidates)
@settings(max_examples=60, deadline=None)
def test_the_paper_s_rule_replaces_the_worst_by_what_is_as_accurate_and_no_dearer(newcomers):
    distiller = prepared()
    for path, accuracy, macs in newcomers:
        before = board(distiller)
        known = [a for p, a, _ in before if p == path]
        if known:
            expected = accuracy >= known[0]
        else:
            expected = len(before) < 3 or (accuracy >= before[-1][1] and macs <= before[-1][2])
        assert admit(distiller, path, accuracy, macs) == expected
        if expected and not known and len(before) == 3:
            assert [e for e in board(distiller) if e[0] != path] == before[:-1]


@given(candidates)
@settings(max_examples=60, deadline=None)
def test_under_dominance_no_entry_is_dominated(newcomers):
    distiller = prepared(admission="dominance")
    costs = {}
    for path, accuracy, macs in newcomers:
        admit(distiller, path, accuracy, costs.setdefault(path, macs))  # a path has one cost
        for (_, a, m), (_, b, n) in itertools.permutations(board(distiller), 2):
            assert not (a >= b and m <= n and (a > b or m < n))


def test_an_entry_s_images_and_probabilities_move_with_it():
    distiller = prepared()
    for path, accuracy in ((0, 0.5), (1, 0.75), (2, 0.25), (3, 0.6)):
        admit(distiller, path, accuracy, 5)
    assert board(distiller) == [(1, 0.75, 5), (3, 0.6, 5), (0, 0.5, 5)]
    for place, (path, accuracy, _) in enumerate(board(distiller)):
        images, probabilities = slices(f"{path} {accuracy}")
        assert torch.equal(distiller.images[place], images)
        assert torch.equal(distiller.probabilities[place], probabilities)


def filled(model, **options):
    distiller = prepared(model, **options)
    for path, accuracy in ((0, 0.5), (5, 0.75), (11, 0.25)):
        admit(distiller, path, accuracy, 5)
    return distiller


def choose(distiller, model, path, place):
    rng = torch_rng("matcher")
    while distiller.match(model, path).place != place:
        distiller.weight.normal_(generator=rng)


def test_the_teacher_is_the_best_match_and_its_own_weight_is_used():
    model, one = supernet(), batch()
    distiller = filled(model)
    step = Step(3, 8, 0)
    path = SPACE.sample(step.rng("architectures"))
    choose(distiller, model, path, 1)
    matches = []
    for place in range(3):
        logits = model(distiller.images.flatten(0, 1), path, batch_statistics=True).logits.detach()
        seen = logits.softmax(1).view(3, 2, 3)[place]
        value = ((seen - distiller.probabilities[place]).flatten() * distiller.weight).sum() + distiller.bias
        matches.append(1 / (1 + math.exp(-value)))
    chosen = max(range(3), key=matches.__getitem__)
    # The last entry is another, and so is its weight.
    assert chosen != 2 and abs(matches[chosen] - matches[2]) > 1e-3
    ((_, loss),) = distiller.losses(model, one, step)
    student = model(one.images, path).logits
    teacher = model(one.images, distiller.board[chosen].architecture).logits
    kd = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1).mean()
    expected = F.cross_entropy(student, one.labels) + matches[chosen] * kd
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_teacher_s_logits_carry_no_gradient():
    model, one = supernet(), batch()
    distiller = filled(model)
    steps = (Step(index, 999, 0) for index in range(999))
    step = next(s for s in steps if SPACE.sample(s.rng("architectures")) == SPACE.smallest)
    choose(distiller, model, SPACE.smallest, 2)
    assert distiller.board[2].architecture["stage0.layer0.width"] == 8
    ((_, loss),) = distiller.losses(model, one, step)
    loss.backward()
    weight = model.bank["stages_0_0:shared"][0].weight
    assert weight.grad[:4, :4].abs().sum() > 0
    # Outside of the smallest subnet's corner a gradient came through the teacher.
    assert weight.grad[4:].abs().sum() == 0


def test_the_meta_gradient_is_that_of_finite_differences():
    model, one = supernet(), batch()
    distiller = filled(model, look_ahead=2.0).double()
    model.double()
    one.images = one.images.double()
    path = PATHS[7]
    match = distiller.match(model, path)
    weight, bias = distiller.meta_gradient(model, one, path, match, Step(0, 6, 0))

    def loss_after(direction, size):
        weight, bias = distiller.weight + size * direction[0], distiller.bias + size * direction[1]
        chosen = 1 / (1 + math.exp(-float(match.difference @ weight + bias)))
        ahead = supernet().double()
        ahead.load_state_dict(model.state_dict())
        student = ahead(one.images[:2], path, regularise=False, batch_statistics=True)
        teacher = ahead(one.images[:2], distiller.board[match.place].architecture, batch_statistics=True)
        target = teacher.logits.detach().softmax(1)
        kd = (target * (target.log() - student.logits.log_softmax(1))).sum(1).mean()
        kd.backward()
        with torch.no_grad():
            for p in ahead.parameters():
                if p.grad is not None:
                    p -= 2.0 * chosen * p.grad
            logits = ahead(one.images[2:4], path, batch_statistics=True).logits
        return F.cross_entropy(logits, one.labels[2:4]).item()

    assert weight.abs().max() > 1e-4
    drawn = torch.randn(6, dtype=torch.float64, generator=torch_rng("direction"))
    for direction in ((drawn, 0.0), (torch.zeros(6).double(), 1.0)):
        numeric = (loss_after(direction, 1e-5) - loss_after(direction, -1e-5)) / 2e-5
        assert float(weight @ direction[0] + bias * direction[1]) == pytest.approx(numeric, rel=1e-4)


def test_the_meta_gradient_leaves_weights_gradients_statistics_and_counts_as_they_were():
    model, one = supernet(), batch()
    distiller = filled(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.uses.clear()
    distiller.meta_gradient(model, one, PATHS[7], distiller.match(model, PATHS[7]), Step(0, 6, 0))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.uses


def test_the_matcher_changes_only_in_the_meta_step():
    made = training(Prioritized(size=3, slice_size=2, warmup=0.0, every=3, meta_rate=1.0))
    states = [(made.distiller.weight.clone(), made.distiller.bias.clone())]
    while not made.done:
        made.step()
        states.append((made.distiller.weight.clone(), made.distiller.bias.clone()))
    changed = [not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(states)]
    # Steps are counted from 0: those at 2 and 5 are every third.
    assert [i for i, c in enumerate(changed) if c] == [2, 5]
    assert not list(made.distiller.parameters())


def test_with_weight_0_the_method_is_single_path_training_statistics_included():
    made = training(Prioritized(size=3, slice_size=2, warmup=0.0, every=1000))
    made.distiller.bias.fill_(-math.inf)
    single = training(SinglePath())
    while not made.done:
        values = made.step()
        assert values == pytest.approx(single.step())
    assert int(made.distiller.count) == 3
    state = made.model.state_dict()
    for name, tensor in single.model.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-7)
    assert any("running_mean" in name for name in state)


def test_in_the_warm_up_it_is_single_path_training_and_the_board_fills():
    made, single = training(Prioritized(size=3, slice_size=2, warmup=1.0)), training(SinglePath())
    while not made.done:
        assert made.step() == pytest.approx(single.step())
    assert int(made.distiller.count) == 3


def test_matching_and_teaching_leave_running_statistics_alone():
    model, one = supernet(), batch()
    distiller = filled(model)
    path = SPACE.sample(Step(3, 8, 0).rng("architectures"))
    list(distiller.losses(model, one, Step(3, 8, 0)))
    plain = supernet()
    plain(one.images, path)
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


def test_resumed_training_equals_uninterrupted_training_board_and_matcher_included():
    def made():
        return training(Prioritized(size=3, slice_size=2, warmup=0.25, every=2, meta_rate=0.1))

    whole, first, resumed = made(), made(), made()
    while not whole.done:
        whole.step()
    for _ in range(5):
        first.step()
    resumed.load(first.state())
    while not resumed.done:
        resumed.step()
    assert whole.distiller.board == resumed.distiller.board
    for mine, other in ((whole.model, resumed.model), (whole.distiller, resumed.distiller)):
        state = other.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())


def test_an_entry_remembers_its_own_probabilities_and_cost():
    model, one = supernet(), batch()
    distiller = prepared(model)
    step = Step(0, 8, 0)
    path = SPACE.sample(step.rng("architectures"))
    list(distiller.losses(model, one, step))
    distiller.after(model, one, step)
    logits = supernet()(one.images, path).logits
    entry = distiller.board[0]
    assert entry.architecture == path
    assert entry.accuracy == pytest.approx((logits.argmax(1) == one.labels).double().mean().item())
    torch.testing.assert_close(distiller.probabilities[0], logits[:2].softmax(1).detach())
    assert torch.equal(distiller.images[0], one.images[:2])


@pytest.mark.parametrize("wrong", [{"size": 0}, {"slice_size": 0}, {"every": 0}, {"warmup": 2.0}, {"admission": "a"}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}`? must"):
        Prioritized(**wrong)


def test_a_batch_of_fewer_than_two_slices_is_refused():
    with pytest.raises(ValueError, match="two slices of 7"):
        prepared(slice_size=7)
