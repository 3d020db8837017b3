"""Who teaches whom: peers, deeper exits, and the generation before."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from kdnas.cli.commands import main
from kdnas.distillers.base import Distiller, Step
from kdnas.distillers.born_again import BornAgain
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.mutual import Mutual
from kdnas.distillers.self_distillation import SelfDistillation
from kdnas.losses.feature.self_attention import SelfAttention
from kdnas.losses.response.cross_entropy import CrossEntropy
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.runs.checkpoint import load_state, save_state
from kdnas.settings import Recipe
from kdnas.specs import spec
from kdnas.teachers.base import Frozen
from kdnas.training.loop import Training
from tests.distillers.spaces import DATA, TOY
from tests.killing import no_graph  # noqa: F401

RECIPE = Recipe(steps=9, batch_size=12, learning_rate=0.05, warmup=0.0, clip=0.0)
SCHEMES = [Mutual, SelfDistillation, BornAgain]


def network(seed=0):
    return initialised(lambda: Network(TOY.blueprint(TOY.largest)), seed)


def training(distiller, recipe=RECIPE):
    return Training(network(), distiller, DATA, None, recipe)


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("made", "asks"),
    [
        (spec(FromLabels), False),
        (spec(Mutual), False),
        (spec(SelfDistillation), False),
        (spec(BornAgain), False),
        (spec(BornAgain, taught=True), True),
        (spec(FromTeacher), True),
        (spec(FromTeacher, terms=((1.0, spec(CrossEntropy)), (1.0, spec(SelfAttention)))), False),
    ],
)
def test_a_distiller_that_asks_no_teacher_trains_without_one_and_any_other_refuses(made, asks):
    distiller = made.build(Distiller)
    assert distiller.uses_teacher == asks
    if not asks:
        training(distiller).step()
        return
    with pytest.raises(ValueError, match="needs a teacher"):
        training(distiller).step()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_its_own_term_the_student_trains_as_on_labels_alone(scheme):
    without = {
        Mutual: {"weight": 0.0},
        SelfDistillation: {"share": 0.0, "hint": 0.0},
        BornAgain: {"weight": 0.0, "generations": 9},
    }[scheme]
    first, plain = training(scheme(**without)), training(FromLabels())
    if scheme is SelfDistillation:
        with torch.no_grad():  # exits whose scores do not depend on the features send no gradient back
            for exit_ in first.distiller.exits:
                exit_.classifier.weight.zero_()
    first.step()
    plain.step()
    # Running statistics have seen the batch from which the exits were built once more.
    learned = [dict(made.model.named_parameters()) for made in (first, plain)]
    assert same(*learned)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_training_that_is_interrupted_anywhere_ends_as_an_uninterrupted_one(scheme, tmp_path):
    whole = training(scheme())
    states = []
    while not whole.done:
        whole.step()
        save_state(tmp_path / f"{whole.index}", whole.state())
        states.append(whole.index)
    for index in (2, 3, 4, 6):  # born_again begins generations at 3 and 6
        resumed = training(scheme())
        resumed.load(load_state(tmp_path / f"{index}"))
        while not resumed.done:
            resumed.step()
        assert same(weights(resumed.model), weights(whole.model))
        assert same(weights(resumed.distiller), weights(whole.distiller))


def test_peers_begin_apart_learn_and_stay_behind():
    made = training(Mutual(num_peers=2))
    before = [weights(peer) for peer in made.distiller.peers]
    assert not same(*before)
    values = made.step()
    assert list(values) == ["student", "peer 1", "peer 2"]
    for peer, old in zip(made.distiller.peers, before, strict=True):
        assert not same(weights(peer), old)
    assert not any("peer" in name for name in made.model.state_dict())


def test_mutual_losses_are_those_of_the_formula():
    made = training(Mutual(num_peers=2, weight=0.5))
    batch = made._batch(0)
    made.model.eval()
    made.distiller.eval()
    shown = [n(batch.images).logits for n in (made.model, *made.distiller.peers)]
    found = list(made.distiller.losses(made.model, batch, Step(0, 9, 0)))
    for k, (_, loss) in enumerate(found):
        kl = [F.kl_div(shown[k].log_softmax(1), shown[j].softmax(1), reduction="batchmean") for j in range(3) if j != k]
        expected = F.cross_entropy(shown[k], batch.labels) + 0.5 * (kl[0] + kl[1]) / 2
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_peer_is_taught_by_fixed_targets():
    made = training(Mutual())
    batch = made._batch(0)
    losses = dict(made.distiller.losses(made.model, batch, Step(0, 9, 0)))
    losses["peer 1"].backward(retain_graph=True)
    assert all(p.grad is None for p in made.model.parameters())
    assert any(p.grad is not None for p in made.distiller.peers.parameters())


def test_only_the_exits_learn_from_the_networks_end():
    made = training(SelfDistillation(share=1.0, hint=1.0))
    batch = made._batch(0)
    end = made.model(batch.images)
    (_, loss), *_ = made.distiller.losses(made.model, batch, Step(0, 9, 0))
    loss.backward()
    # The last stage and the head hear the cross-entropy alone: what they teach is given to the exits as it is.
    alone = network()
    alone.load_state_dict(made.model.state_dict())
    F.cross_entropy(alone(batch.images).logits, batch.labels).backward()
    expected = dict(alone.named_parameters())
    last = f"stages.{len(end.features) - 1}."
    for name, parameter in made.model.named_parameters():
        if name.startswith((last, "head")):
            assert torch.allclose(parameter.grad, expected[name].grad, atol=1e-6), name
    assert len(made.distiller.exits) == len(end.features) - 1


def test_the_exits_losses_are_those_of_the_formula():
    made = training(SelfDistillation(share=0.4, temperature=2.0, hint=0.5))
    batch = made._batch(0)
    made.model.eval()
    made.distiller.eval()
    ((_, found),) = made.distiller.losses(made.model, batch, Step(0, 9, 0))
    end = made.model(batch.images)
    expected = F.cross_entropy(end.logits, batch.labels)
    for feature, exit_ in zip(end.features, made.distiller.exits, strict=False):
        pooled, logits = exit_(feature)
        kl = F.kl_div((logits / 2).log_softmax(1), (end.logits / 2).softmax(1), reduction="batchmean")
        distance = (pooled - end.features[-1].mean((2, 3))).square().mean()
        expected = expected + 0.6 * F.cross_entropy(logits, batch.labels) + 0.4 * 4 * kl + 0.5 * distance
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_generation_s_loss_is_that_of_the_formula():
    made = training(BornAgain(weight=0.7, temperature=2.0))
    for _ in range(5):
        made.step()
    batch = made._batch(5)
    made.model.eval()
    ((name, found),) = made.distiller.losses(made.model, batch, Step(5, 9, 0))
    p, q = (n(batch.images).logits for n in (made.model, made.distiller.parent))
    kl = F.kl_div((p / 2).log_softmax(1), (q / 2).softmax(1), reduction="batchmean")
    assert name == "generation 1" and kl > 1e-4
    assert found.item() == pytest.approx((F.cross_entropy(p, batch.labels) + 0.7 * 4 * kl).item(), abs=1e-5)


def test_the_first_generation_has_the_run_s_teacher_where_it_is_asked_for():
    taught = Frozen(network(5), preprocessing=DATA.preprocessing)
    losses = []
    for scheme in (BornAgain(taught=True, weight=0.7), BornAgain(weight=0.7)):
        made = Training(network(), scheme, DATA, taught, RECIPE)
        batch = made._batch(0)
        made.model.eval()
        ((name, loss),) = made.distiller.losses(made.model, batch, Step(0, 9, 0))
        assert name == "generation 0"
        losses.append(loss.item())
    p, q = made.model(batch.images).logits, taught(batch.pixels).logits
    kl = F.kl_div(p.log_softmax(1), q.softmax(1), reduction="batchmean")
    assert losses[1] == pytest.approx(F.cross_entropy(p, batch.labels).item(), abs=1e-5)
    assert losses[0] == pytest.approx(losses[1] + 0.7 * kl.item(), abs=1e-5) and kl > 1e-4


def test_a_network_of_one_stage_has_no_shallower_exit():
    one = dataclasses.replace(TOY.blueprint(TOY.largest))
    one = dataclasses.replace(one, stages=(tuple(layer for stage in one.stages for layer in stage),))
    with pytest.raises(ValueError, match="at least 2 stages"):
        Training(Network(one), SelfDistillation(), DATA, None, RECIPE)


def test_each_generation_begins_anew_and_its_parent_is_frozen_bit_for_bit():
    made = training(BornAgain())
    seen = {}
    while not made.done:
        index = made.index
        if index in (3, 6):
            ended = weights(made.model)
        name = next(iter(made.step()))
        seen.setdefault(name, []).append(index)
        if index in (3, 6):
            assert same(weights(made.distiller.parent), ended)
            assert not same(weights(made.model), ended)
    assert seen == {"generation 0": [0, 1, 2], "generation 1": [3, 4, 5], "generation 2": [6, 7, 8]}
    assert same(weights(made.distiller.parent), ended)
    assert not any(p.requires_grad for p in made.distiller.parent.parameters())


def test_each_generation_has_the_whole_curve_of_the_learning_rate():
    made = training(BornAgain())
    rates = []
    while not made.done:
        made.step()
        rates.append(made.optimizer.param_groups[0]["lr"])
    assert rates[:3] == rates[3:6] == rates[6:]
    assert rates[0] == pytest.approx(0.05) and rates[2] < rates[1] < rates[0]


def test_generations_differ_in_their_first_weights():
    made = training(BornAgain(generations=3, weight=0.0), dataclasses.replace(RECIPE, learning_rate=1e-30))
    begun = []
    while not made.done:
        made.step()
        if made.index in (1, 4, 7):
            begun.append(made.model.state_dict()["head.linear.weight"].clone())
    assert not torch.equal(begun[0], begun[1]) and not torch.equal(begun[1], begun[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mutual(num_peers=0), "`num_peers` must be at least 1"),
        (lambda: Mutual(weight=-1.0), "`weight` must not be negative"),
        (lambda: SelfDistillation(share=1.5), "`share` must be in"),
        (lambda: BornAgain(generations=1), "`generations` must be at least 2"),
        (lambda: training(BornAgain(generations=10)), "need at least as many steps"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_student_that_teaches_itself_needs_no_teacher():
    terms = ((1.0, spec(CrossEntropy)), (0.1, spec(SelfAttention, start=0.0)))
    taught = Frozen(network(5), preprocessing=DATA.preprocessing)
    alone, beside = (Training(network(), FromTeacher(terms=terms), DATA, t, RECIPE) for t in (None, taught))
    plain = training(FromLabels())
    for _ in range(2):
        alone.step()
        beside.step()
        plain.step()
    assert same(weights(alone.model), weights(beside.model))
    assert not same(weights(alone.model), weights(plain.model))
    with pytest.raises(ValueError, match="needs a teacher"):
        Training(network(), FromTeacher(), DATA, None, RECIPE)


def test_from_the_command_line_too(tmp_path, capsys):
    folder = tmp_path / "run"
    main(["train", "tests/toy.py:alone", "--out", str(folder)])
    main(["search", str(folder), "--num-evaluations", "3"])
    main(["export", str(folder)])
    arguments = ["retrain", str(folder / "students" / "place-1"), "--teacher", "none", "--steps", "3"]
    main([*arguments, "--loss", "self_attention"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*arguments, "--loss", "hint", "--out", str(tmp_path / "no")])
    assert "--loss needs a teacher, got --teacher none" in capsys.readouterr().err
