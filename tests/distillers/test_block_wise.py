import itertools

import numpy as np
import pytest
import torch

from kdnas.distillers.base import Batch, Step
from kdnas.distillers.block_wise import BlockWise, stages_of
from kdnas.jobs._block_rating import rate_blocks
from kdnas.network import Network, batch_statistics
from kdnas.outputs import Outputs
from kdnas.randomness import initialised, torch_rng
from kdnas.ranking.exact import best
from kdnas.scorers.base import Evidence
from kdnas.scorers.blocks import Blocks
from kdnas.settings import Recipe
from kdnas.spaces.macro import Macro
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.training.loop import Training
from tests.toy import data

SPACE = Macro(depths=(2, 2), widths=(4, 6), stem_width=4, head_width=8, resolutions=(8,), classes=3)
OTHER = load_space("toy").fitted(classes=3, image_channels=3)
DATA = data()
RECIPE = Recipe(steps=6, batch_size=12, learning_rate=0.05, clip=0.0, optimizer="adamw")


def supernet(seed=0):
    return initialised(lambda: Supernet(SPACE), seed)


def teacher():
    return Frozen(initialised(lambda: Network(OTHER.blueprint(OTHER.largest)), 5), preprocessing=DATA.preprocessing)


def batch(taught=None):
    ids = torch.arange(12)
    return Batch(DATA.train.take(ids), DATA.train.labels[ids], ids, DATA, taught or teacher())


def prepared(model, one, **options):
    distiller = BlockWise(**options)
    initialised(lambda: distiller.prepare(model, one), 3)
    return distiller


def evidence(outputs=None):
    one = batch()
    return Evidence(one.pixels, one.images, one.labels, outputs or one.teacher)


def touched(model, distiller):
    names = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    return names + [n for n, p in distiller.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]


def test_a_block_s_loss_is_the_mean_of_squares_worked_out_with_numpy():
    model, one = supernet(), batch()
    distiller = prepared(model, one)
    largest = SPACE.largest
    blueprint = SPACE.blueprint(largest)
    before, wanted = one.teacher.features
    assert before.shape == (12, 8, 8, 8) and wanted.shape == (12, 8, 4, 4)
    # Block 1 is given the teacher's first feature at the student's 4 channels and 4 x 4 positions.
    pooled = before.detach().numpy().reshape(12, 8, 4, 2, 4, 2).mean((3, 5))
    given = np.einsum("sc,bchw->bshw", distiller.state_dict()["entries.0.weight"].numpy(), pooled)
    x = torch.from_numpy(given.astype(np.float32))
    for place, layer in enumerate(blueprint.stages[1]):
        x = model.run(f"stages.1.{place}", layer, x)
    mine = x.detach().numpy()
    theirs = wanted.numpy().reshape(12, 8, 2, 2, 2, 2).mean((3, 5))
    mapped = np.einsum("ts,bshw->bthw", distiller.state_dict()["exits.1.weight"].numpy(), mine)
    assert mine.shape == (12, 6, 2, 2)
    loss = distiller.loss(model, 1, largest, one.images, one.teacher)
    assert loss.item() == pytest.approx(np.square(mapped - theirs).mean(), rel=1e-4)


def test_a_block_s_gradient_touches_the_block_and_its_adapters_only():
    model, one = supernet(), batch()
    distiller = prepared(model, one)
    for block, own in ((0, ("bank.stem", "bank.stages_0", "exits.0")), (1, ("bank.stages_1", "entries.0", "exits.1"))):
        model.zero_grad()
        distiller.zero_grad()
        distiller.loss(model, block, SPACE.largest, one.images, one.teacher).backward()
        names = touched(model, distiller)
        assert names and all(name.startswith(own) for name in names), (block, names)
        assert {next(o for o in own if name.startswith(o)) for name in names} == set(own)


def test_the_order_in_which_blocks_are_trained_changes_nothing():
    def trained(order):
        model, one = supernet(), batch()
        distiller = prepared(model, one)
        parameters = [*model.parameters(), *distiller.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        for block in order:
            for index in range(2):
                optimizer.zero_grad()
                path = SPACE.sample(Step(index, 2, 0).rng(f"block {block}"))
                distiller.loss(model, block, path, one.images, one.teacher).backward()
                optimizer.step()
        return {**model.state_dict(), **distiller.state_dict()}

    first, second = trained((0, 1)), trained((1, 0))
    untrained = {**supernet().state_dict(), **prepared(supernet(), batch()).state_dict()}
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not torch.equal(first["exits.0.weight"], untrained["exits.0.weight"])
    # The head is no block.
    assert all(torch.equal(t, untrained[n]) for n, t in first.items() if n.startswith("bank.head"))


def test_trained_one_by_one_a_block_is_untouched_by_the_steps_of_the_others():
    made = Training(supernet(), BlockWise(schedule="one_by_one"), DATA, teacher(), RECIPE)

    def state():
        return {n: t.clone() for n, t in {**made.model.state_dict(), **made.distiller.state_dict()}.items()}

    def changed(before):
        return {n for n, t in state().items() if not torch.equal(t, before[n])}

    states = [state()]
    while not made.done:
        assert set(made.step()) == {f"block{(made.index - 1) // 3}"}
        states.append(state())
    first = {n for n in states[0] if not torch.equal(states[0][n], states[3][n])}
    second = {n for n in states[0] if not torch.equal(states[3][n], states[6][n])}
    assert first and all(n.startswith(("bank.stem", "bank.stages_0", "exits.0")) for n in first)
    assert second and all(n.startswith(("bank.stages_1", "exits.1", "entries.0")) for n in second)
    assert made.distiller.schedule(6).restarts == {3}


def test_together_every_block_has_a_path_of_its_own_drawn_from_seed_and_step(monkeypatch):
    model, one = supernet(), batch()
    distiller = prepared(model, one)
    drawn = []
    monkeypatch.setattr(
        BlockWise, "loss", lambda self, model, block, path, *rest: drawn.append((block, path)) or torch.zeros(())
    )
    for index in range(8):
        list(distiller.losses(model, one, Step(index, 8, 0)))
    again, drawn = drawn, []
    for index in range(8):
        list(distiller.losses(model, one, Step(index, 8, 0)))
    assert drawn == again
    assert [block for block, _ in drawn] == [0, 1] * 8
    assert any(drawn[i][1] != drawn[i + 1][1] for i in range(0, 16, 2))


def test_resumed_training_equals_uninterrupted_training():
    def made():
        return Training(supernet(), BlockWise(schedule="one_by_one"), DATA, teacher(), RECIPE)

    whole, first, resumed = made(), made(), made()
    while not whole.done:
        whole.step()
    for _ in range(4):
        first.step()
    resumed.load(first.state())
    while not resumed.done:
        resumed.step()
    for name, tensor in whole.distiller.state_dict().items():
        assert torch.equal(tensor, resumed.distiller.state_dict()[name]), name


def test_ratings_do_not_change_with_the_scale_of_the_teacher_s_features_and_squares_do():
    model, one = supernet(), batch()
    distiller = prepared(model, one)
    predicted = model(one.images, SPACE.largest, batch_statistics=True).features[1]

    def squares(outputs):
        return distiller._aligned(1, predicted, outputs)

    plain = distiller.rating(1, predicted, one.teacher)
    mine, theirs = squares(one.teacher)
    assert plain == pytest.approx(np.abs((mine - theirs).detach().numpy()).mean() / theirs.numpy().std(), rel=1e-5)
    scaled = one.teacher._replace(features=tuple(7 * f for f in one.teacher.features))
    assert distiller.rating(1, 7 * predicted, scaled) == pytest.approx(plain, rel=1e-5)
    a, b = (
        (m - t).square().mean().item() for m, t in (squares(one.teacher), distiller._aligned(1, 7 * predicted, scaled))
    )
    assert b == pytest.approx(49 * a, rel=1e-5)


def test_the_options_a_block_trained_are_counted():
    model, one = supernet(), batch()
    distiller = prepared(model, one)
    model.uses.clear()
    list(distiller.losses(model, one, Step(0, 2, 0)))
    assert sum(model.uses.values()) == len(SPACE.choices)


def test_a_block_that_equals_the_teacher_s_rates_0():
    model = supernet()
    network = model.extract(SPACE.largest)
    with torch.no_grad(), batch_statistics(network):
        outputs = network(batch().images)
    one = batch()
    distiller = BlockWise()
    distiller.prepare(model, Batch(one.pixels, one.labels, one.ids, DATA, lambda *_: outputs))
    found = Blocks().score(network, Evidence(one.pixels, one.images, one.labels, outputs, distiller=distiller))
    assert found.value == pytest.approx(0, abs=1e-6)
    table = rate_blocks(model, distiller, evidence(outputs))
    assert [max(block.scores) for block in table[1:]] == pytest.approx([0, 0], abs=1e-6)
    best_parts = [block.options[block.scores.index(max(block.scores))] for block in table[1:]]
    assert {n: v for part in best_parts for n, v in part.items()} == dict(SPACE.largest)


def test_the_tables_hold_every_path_and_are_those_of_rating_one_network_after_the_other():
    model, one = supernet(), batch()
    distiller, found = prepared(model, one), evidence()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    table = rate_blocks(model, distiller, found)
    assert [block.name for block in table] == ["fixed", "stage0", "stage1"]
    # Nine codes; with an identity behind the first layer's three, canonical or not, all are networks of their own.
    assert [len(block.options) for block in table[1:]] == [9, 9]
    scored = Evidence(found.pixels, found.images, found.labels, found.teacher, distiller=distiller)
    for left, right in itertools.product(range(0, 9, 4), range(0, 9, 3)):
        architecture = SPACE.architecture({**table[1].options[left], **table[2].options[right]})
        score = Blocks().score(model.extract(architecture), scored)
        assert score.value == pytest.approx(table[1].scores[left] + table[2].scores[right], rel=1e-5)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_rating_of_a_path_does_not_depend_on_the_others():
    one = batch()
    model = supernet()
    distiller = prepared(model, one)
    whole = rate_blocks(model, distiller, evidence())[2]
    for name, parameter in model.named_parameters():
        if "stages_1_0:k5e6" in name or "stages_0" in name:
            parameter.data.normal_(generator=torch_rng("others", name))
    changed = rate_blocks(model, distiller, evidence())[2]
    same = [a == b for a, b in zip(whole.scores, changed.scores, strict=True)]
    assert same == [option["stage1.layer0"] != "k5e6" for option in whole.options]


def test_the_exact_search_over_the_tables_equals_scoring_every_network():
    model, one = supernet(), batch()
    distiller, found = prepared(model, one), evidence()
    table = rate_blocks(model, distiller, found)
    scored = Evidence(found.pixels, found.images, found.labels, found.teacher, distiller=distiller)
    scores = {a: Blocks().score(model.extract(a), scored).value for a in SPACE.all()}
    chosen = best(table, {"macs": 1e12})[0]
    assert scores[SPACE.canonical(chosen.architecture)] == pytest.approx(max(scores.values()), rel=1e-6)


def test_every_choice_is_found_in_its_stage_and_shared_widths_are_refused():
    assert stages_of(SPACE) == {c.name: frozenset({int(c.name[5])}) for c in SPACE.choices}
    assert stages_of(OTHER)["stage0.layer0.width"] == {0, 1}
    model = initialised(lambda: Supernet(OTHER), 0)
    one = batch()
    distiller = prepared(model, one)
    with pytest.raises(ValueError, match="every choice must belong to one block"):
        rate_blocks(model, distiller, evidence())


def test_an_elastic_student_is_taught_at_every_width():
    model, one = initialised(lambda: Supernet(OTHER), 0), batch()
    distiller = prepared(model, one)
    for architecture in OTHER.all():
        for block in range(2):
            assert torch.isfinite(distiller.loss(model, block, architecture, one.images, one.teacher))


def test_stages_are_paired_in_order_by_size_and_deeper_where_equal():
    def features(*sides):
        return tuple(torch.zeros(1, 2, side, side) for side in sides)

    distiller = BlockWise()
    assert distiller._pair(features(8, 4), features(8, 8, 4)) == (1, 2)
    assert distiller._pair(features(8, 4, 4), features(16, 8, 4, 2)) == (1, 2, 3)
    assert distiller._pair(features(4, 2), features(16, 8)) == (0, 1)
    with pytest.raises(ValueError, match="needs a teacher stage for each"):
        distiller._pair(features(8, 4, 2), features(8, 4))
    assert BlockWise(pairs=((0, 0), (1, 2)))._pair(features(8, 4), features(8, 8, 4)) == (0, 2)
    with pytest.raises(ValueError, match="`pairs` must name"):
        BlockWise(pairs=((0, 0),))._pair(features(8, 4), features(8, 4))
    with pytest.raises(ValueError, match="`pairs` must ascend"):
        BlockWise(pairs=((0, 1), (1, 1)))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="schedule"):
        BlockWise(schedule="all")
    with pytest.raises(ValueError, match="block-wise"):
        Blocks().score(supernet().extract(SPACE.largest), evidence())
    tokens = Outputs(torch.zeros(12, 3), (torch.zeros(12, 17, 8),) * 2)
    model, one = supernet(), batch()
    distiller = BlockWise()
    distiller.prepare(model, Batch(one.pixels, one.labels, one.ids, DATA, lambda *_: tokens))
    assert torch.isfinite(distiller.loss(model, 1, SPACE.largest, one.images, tokens))
