"""Processes that follow the first, and what is said where one of them ends or does something else."""

import os
import random
import signal

import pytest
import torch

from kdnas.distillers.base import ObjectiveDistiller
from kdnas.randomness import initialised
from kdnas.ranks import team, tensors
from kdnas.settings import Recipe
from kdnas.supernet import Supernet
from kdnas.teachers.cache import INDEX, TeacherCache, open_cache
from kdnas.training.loop import Training
from tests.distillers.spaces import OPERATIONS
from tests.processes import outcome, started, together
from tests.teachers.test_cache import DATA, teacher
from tests.toy import data

RECIPE = Recipe(steps=20, batch_size=12, learning_rate=0.05)


class Other(ObjectiveDistiller):
    """The single path, but for what one process does from the second step on."""

    parallel = "any"

    def __init__(self, act):
        super().__init__((), label_smoothing=0.0)
        self.act = act

    def losses(self, model, batch, step):
        rng = step.rng("architectures")
        if step.index >= 1 and tensors.rank() == 1:
            rng = self.act() or rng
        path = model.space.sample(rng)
        yield from self.student_losses("path", model(batch.images, path), model, batch, step, path)


def draw_otherwise():
    return random.Random(5)


def refuse():
    raise ValueError("this image cannot be read")


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def train(act):
    model = initialised(lambda: Supernet(OPERATIONS), 0)
    training = Training(model, Other(act), data(), None, RECIPE)
    for _ in range(5):
        training.step()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            draw_otherwise,
            "process 1 differs from process 0 in its architectures at step 1: [0-9.]+ there, [0-9.]+ in process 0",
        ),
        (refuse, "process 1 at step 1: this image cannot be read"),
        (end, "process 1 of 2 has ended at step 1"),
    ],
)
def test_a_process_that_does_something_else_ends_all_with_a_sentence(act, message):
    with pytest.raises(team.Lost, match=message):
        together(lambda: train(act))


def test_a_first_process_that_ends_ends_the_others_with_a_sentence():
    with started(end) as (_, readers):
        assert outcome(readers[0]) is None
        assert "process 0 of 2 has ended" in str(outcome(readers[1]))


def test_a_process_with_other_tensors_is_named_by_what_both_exchange():
    def uneven():
        return team.everywhere(exchange_uneven)

    with pytest.raises(team.Lost, match=r"process 0 has come to a tensor of \[2\], process 1 to a tensor of \[3\]"):
        together(uneven)


def exchange_uneven():
    team.meet("a test", careful=True)
    tensors.averaged([torch.zeros(2 + tensors.rank())])


def test_means_and_gathered_rows_have_the_gradient_of_the_whole():
    def all_of(value):
        return together(lambda: team.everywhere(gradients, value))

    mean, rows, own, gradient = all_of(3.0)
    assert (mean, rows) == (3.5, [[3.0], [6.0], [4.0], [8.0]])
    # Of the mean of all: the process's own share of it, times the number of processes.
    assert (own, gradient) == (1.0, [[2 * 2 * 3.0], [2 * 2 * 6.0]])


def gradients(value):
    """Mean and gathered rows of (value + rank), and what their functions' gradients are in the first process."""
    x = torch.tensor(value + tensors.rank(), requires_grad=True)
    rows = torch.stack([x.detach(), 2 * x.detach()])[:, None].requires_grad_()
    mean, whole = tensors.mean(x), tensors.gathered(rows)
    mean.backward()
    whole.square().sum().backward()
    return float(mean.detach()), whole.tolist(), float(x.grad), rows.grad.tolist()


def test_batch_norm_in_processes_is_that_of_the_whole_batch():
    norm = torch.nn.BatchNorm1d(3).double()
    images = torch.rand(8, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = norm(images.requires_grad_())
    expected.square()[:4].sum().backward()
    output, mean, variance = together(lambda: team.everywhere(normalise, images.detach()))
    torch.testing.assert_close(output, expected[:4].detach())
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(variance, norm.running_var)


def normalise(images):
    norm = torch.nn.BatchNorm1d(3).double()
    with tensors.sharing("nothing"):
        output = norm(images[tensors.part(len(images))])
    return output.detach(), norm.running_mean, norm.running_var


def test_one_process_is_left_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    x = torch.rand(2, 3)
    with team.joined() as is_first:
        assert is_first and team.number() == 1 and tensors.size() == 1 and not tensors.sees_whole()
        assert tensors.gathered(x) is x and tensors.mean(x) is x and tensors.averaged([x])[0] is x
        assert team.everywhere(len, "abc") == 3


def test_what_cannot_be_sent_is_a_sentence():
    with pytest.raises(ValueError, match="cannot be sent to the other processes"):
        together(lambda: team.everywhere(len, lambda: None))


def test_two_processes_write_the_files_of_a_teacher_cache_and_any_reads_them(tmp_path):
    def written(name):
        options = {"seed": 3, "views": 2, "limit": 1.0}
        cache = open_cache(tmp_path / name, teacher(), DATA, **options)
        return {path.name: path.read_bytes() for path in cache.folder.iterdir() if path.name != INDEX}

    one, two = written("one"), together(lambda: written("two"))
    assert one == two and len(one) == 4
    ids = torch.arange(5)
    pixels = DATA.view(ids, 3, 1)
    outputs = TeacherCache(tmp_path / "two", teacher(), DATA, seed=3, views=2).outputs(ids, 1, pixels)
    torch.testing.assert_close(outputs.logits, teacher()(pixels).logits)
