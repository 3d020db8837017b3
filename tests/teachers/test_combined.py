"""How several teachers become one, and how they need not be in memory together."""

import pytest
import torch
from torch import nn

from kdnas.cli.commands import main
from kdnas.jobs._run import Run
from kdnas.outputs import Moment
from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.combined import Ensemble, Streamed
from kdnas.teachers.load import load_teacher

GREY = Preprocessing(height=2, width=2, mean=(0.0,), std=(1.0,))
PIXELS = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1])


class Linear(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            self.head.weight.normal_(0, 3, generator=torch.Generator().manual_seed(seed))
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(x.flatten(1))


def teacher(seed):
    return Frozen(Linear(seed), preprocessing=GREY, stages=())


def logits(*seeds):
    return [teacher(seed)(PIXELS).logits for seed in seeds]


def test_weights_weigh_distributions_or_logits():
    one, two = logits(1, 2)
    made = [teacher(1), teacher(2)]
    found = Ensemble(made, weights=(3.0, 1.0))(PIXELS).logits
    assert torch.allclose(found.softmax(1), 0.75 * one.softmax(1) + 0.25 * two.softmax(1), atol=1e-6)
    found = Ensemble(made, mean="logits", weights=(3.0, 1.0))(PIXELS).logits
    assert torch.allclose(found, 0.75 * one + 0.25 * two, atol=1e-6)
    alone = Ensemble(made, weights=(0.0, 1.0))(PIXELS).logits
    assert torch.isfinite(alone).all() and torch.allclose(alone.softmax(1), two.softmax(1), atol=1e-6)


def test_equal_weights_are_the_mean():
    one, two, three = logits(1, 2, 3)
    found = Ensemble([teacher(seed) for seed in (1, 2, 3)])(PIXELS).logits
    assert torch.allclose(found.softmax(1), (one.softmax(1) + two.softmax(1) + three.softmax(1)) / 3, atol=1e-6)


def test_a_temperature_comes_after_the_mean_which_matters_for_probabilities_alone():
    one, two = logits(1, 2)
    made = [teacher(1), teacher(2)]
    geometric = ((one / 4).log_softmax(1) + (two / 4).log_softmax(1)) / 2
    found = (Ensemble(made, mean="logits")(PIXELS).logits / 4).softmax(1)
    assert torch.allclose(found, geometric.softmax(1), atol=1e-6)
    found = (Ensemble(made)(PIXELS).logits / 4).softmax(1)
    powers = ((one.softmax(1) + two.softmax(1)) / 2) ** 0.25
    assert torch.allclose(found, powers / powers.sum(1, keepdim=True), atol=1e-6)
    assert (found - ((one / 4).softmax(1) + (two / 4).softmax(1)) / 2).abs().max() > 0.01


def test_one_at_random_is_one_of_them_drawn_anew_and_alike_for_the_same_step():
    made, each = Ensemble([teacher(seed) for seed in (1, 2, 3)], mean="random"), logits(1, 2, 3)
    counts = [0, 0, 0]
    for step in range(60):
        at = Moment(step / 60)
        found = made(PIXELS, at=at).logits
        assert torch.equal(made(PIXELS, at=at).logits, found)
        counts[[torch.equal(found, one) for one in each].index(True)] += 1
    assert min(counts) > 8


def test_who_is_wrong_counts_less_sample_by_sample():
    one, two = logits(1, 2)
    found = Ensemble([teacher(1), teacher(2)], mean="reliable")(PIXELS, LABELS).logits.softmax(1)
    wrong = torch.stack([-z.log_softmax(1)[range(5), LABELS] for z in (one, two)])
    share = 1 - wrong.softmax(0)
    assert torch.allclose(found, share[0, :, None] * one.softmax(1) + share[1, :, None] * two.softmax(1), atol=1e-6)
    three = Ensemble([teacher(seed) for seed in (1, 2, 3)], mean="reliable")(PIXELS, LABELS).logits.exp()
    assert torch.allclose(three.sum(1), torch.ones(5))  # the weights of any number of teachers add up to 1
    right = found[range(5), LABELS]
    assert (right >= Ensemble([teacher(1), teacher(2)])(PIXELS).logits.softmax(1)[range(5), LABELS] - 1e-6).all()
    plain = Ensemble([teacher(1), teacher(2)])(PIXELS).logits
    assert torch.equal(Ensemble([teacher(1), teacher(2)], mean="reliable")(PIXELS).logits, plain)


def test_the_order_of_the_teachers_does_not_matter():
    for mean in ("probabilities", "logits", "reliable"):
        first = Ensemble([teacher(1), teacher(2)], mean=mean)(PIXELS, LABELS).logits
        assert torch.allclose(first, Ensemble([teacher(2), teacher(1)], mean=mean)(PIXELS, LABELS).logits, atol=1e-6)


def test_a_streamed_teacher_says_the_same_and_holds_nothing():
    alive = []

    class Watched(Linear):
        def __init__(self, seed):
            super().__init__(seed)
            alive.append(seed)

        def __del__(self):
            alive.pop()

    def make(seed):
        return Streamed(lambda: Frozen(Watched(seed), preprocessing=GREY, stages=()))

    made = Ensemble([make(1), make(2)])
    found = made(PIXELS).logits
    assert torch.allclose(found, Ensemble([teacher(1), teacher(2)])(PIXELS).logits, atol=1e-6)
    assert alive == []
    assert not list(made.parameters())


def test_they_are_named_on_the_command_line(tmp_path):
    main(["train", "tests/toy.py", "--out", str(tmp_path / "run")])
    one = f"checkpoint:{tmp_path}/run/teacher"
    run = Run(tmp_path / "run")
    options = {"classes": 3, "preprocessing": run.data.preprocessing}
    pixels = run.data.test.take(torch.arange(4))
    plain = load_teacher(one).build(Teacher, **options)(pixels).logits
    for text in (f"streamed:{one}", f"ensemble+logits:{one},{one}", f"ensemble+reliable:{one},streamed:{one}"):
        found = load_teacher(text).build(Teacher, **options)
        assert torch.allclose(found(pixels).logits.softmax(1), plain.softmax(1), atol=1e-5), text
    weighed = load_teacher(f"ensemble+logits:{one}=3,{one}=1").build(Teacher, **options)
    assert isinstance(weighed, Ensemble) and weighed.weights == (0.75, 0.25)
    assert load_teacher("ensemble:checkpoint:a=b/one,checkpoint:a=b/two")["members"][0]["path"].endswith("a=b/one")
    with pytest.raises(ValueError, match="either all teachers of an ensemble have weights or none"):
        load_teacher(f"ensemble:{one}=3,{one}")
    with pytest.raises(ValueError, match="have no weights"):
        load_teacher(f"route:{one}=3,{one}=1").build(Teacher, **options)
    with pytest.raises(ValueError, match="must be a trained one"):
        load_teacher("streamed:fit")
    with pytest.raises(ValueError, match="a teacher is fit"):
        load_teacher(f"ensemble+median:{one},{one}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "median"}, "`mean` must be one of"),
        ({"weights": (1.0,)}, "must be one per teacher"),
        ({"mean": "random", "weights": (1.0, 1.0)}, "must be one per teacher"),
        ({"weights": (-1.0, 2.0)}, "not be negative"),
        ({"weights": (0.0, 0.0)}, "not be negative"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Ensemble([teacher(1), teacher(2)], **options)
