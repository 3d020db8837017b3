import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.feature.factor_transfer import FactorTransfer
from kdnas.outputs import Outputs

LABELS = torch.zeros(2, dtype=torch.long)


def prepared(student, teacher, **arguments):
    loss = FactorTransfer(**arguments)
    loss.prepare(student, teacher)
    return fill(loss.double())


def array(parameter):
    return parameter.detach().numpy()


def convolved(maps, weight, bias):
    """A 3x3 convolution, padded by 1, and a leaky ReLU."""
    padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(maps), len(weight), *maps.shape[2:]))
    for b, c, y, x in np.ndindex(out.shape):
        out[b, c, y, x] = (padded[b, :, y : y + 3, x : x + 3] * weight[c]).sum() + bias[c]
    return np.where(out > 0, out, 0.1 * out)


def chain(maps, layers):
    for layer in layers:
        if not hasattr(layer, "weight"):
            continue
        weight = array(layer.weight)
        if isinstance(layer, torch.nn.ConvTranspose2d):
            # Transposed with stride 1: the mirrored kernel with its channels exchanged.
            weight = weight.swapaxes(0, 1)[:, :, ::-1, ::-1]
        maps = convolved(maps, weight[:, : maps.shape[1]], array(layer.bias))
    return maps


def reference(loss, student, teacher, p):
    factors = chain(student, loss.translators[0]), chain(teacher, loss.encoders[0])
    rows = [[f / np.sqrt((f**2).sum()) for f in factor] for factor in factors]
    return np.mean([(np.abs(s - t) ** p).mean() for s, t in zip(*rows, strict=True)])


def test_factors_by_hand():
    # One pixel: with only the centres of the kernels set, factors are multiples of the pixel, of length 1 and sign.
    one, minus = (Outputs(torch.zeros(1, 2), (torch.full((1, 1, 1, 1), v),)) for v in (2.0, -1.0))
    loss = FactorTransfer()
    loss.prepare(one, one)
    for name, parameter in loss.named_parameters():
        parameter.data.zero_()
        if name.endswith("weight"):
            parameter.data[..., 1, 1] = 1
    loss.mark_trained()
    assert loss(one, one, LABELS[:1]).item() == pytest.approx(0, abs=1e-6)
    assert loss(one, minus, LABELS[:1]).item() == pytest.approx(2)  # |1 - (-1)|
    assert loss.preparation(one).item() == pytest.approx(0)  # 2 stays 2
    # Minus one is multiplied by 0.1 six times.
    assert loss.preparation(minus).item() == pytest.approx((1 - 1e-6) ** 2)


@pytest.mark.parametrize("p", [1, 2])
def test_agrees_with_a_loop(p):
    student, teacher, labels = example()
    loss = prepared(student, teacher, p=p)
    expected = reference(loss, student.features[1].numpy(), teacher.features[1].numpy(), p)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("reconstruction", ["l2", "l1"])
def test_the_reconstruction_agrees_with_a_loop(reconstruction):
    student, teacher, _ = example(batch=2)
    loss = prepared(student, teacher, reconstruction=reconstruction)
    t = teacher.features[1].numpy()
    error = chain(chain(t, loss.encoders[0]), loss.decoders[0]) - t
    expected = (error**2).mean() if reconstruction == "l2" else np.abs(error).mean()
    assert loss.preparation(teacher).item() == pytest.approx(expected, rel=1e-11)


def test_a_narrower_student_uses_the_leading_columns():
    student, teacher, labels = example(batch=2)
    loss = prepared(student, teacher)
    narrow = student._replace(features=tuple(f[:, :2] for f in student.features))
    expected = reference(loss, narrow.features[1].numpy(), teacher.features[1].numpy(), 1)
    assert loss(narrow, teacher, labels).item() == pytest.approx(expected, rel=1e-11)


def test_each_stage_trains_its_own_parts():
    student, teacher, labels = example()
    loss = prepared(student, teacher)
    assert [(s.name, s.trains, s.uses) for s in loss.stages()] == [
        ("paraphraser", "parts", "preparation"),
        ("student", "both", "both"),
    ]

    def trained(value):
        loss.zero_grad()
        value.backward()
        return {n.partition(".")[0] for n, p in loss.named_parameters() if p.grad is not None}

    assert trained(loss.preparation(teacher)) == {"encoders", "decoders"}
    assert trained(loss(student, teacher, labels)) == {"translators"}


def test_without_stages_the_reconstruction_is_part_of_the_loss():
    student, teacher, labels = example()
    staged, joint = prepared(student, teacher), prepared(student, teacher, staged=False)
    assert len(joint.stages()) == 1
    expected = staged(student, teacher, labels) + staged.preparation(teacher)
    assert joint(student, teacher, labels).item() == pytest.approx(expected.item(), rel=1e-12)


def test_some_steps_of_the_preparation_reconstruct_better():
    student, teacher, _ = example()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = FactorTransfer()
        loss.prepare(student, teacher)
    teacher = teacher.map(torch.Tensor.float)
    first = loss.preparation(teacher).item()
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss.preparation(teacher).backward()
        optimizer.step()
    assert loss.preparation(teacher).item() < 0.8 * first


def test_the_factor_has_the_share_of_the_teachers_channels():
    student, teacher, _ = example()
    for rate, channels in ((0.5, 4), (0.75, 6), (2.0, 16), (0.01, 1)):
        loss = prepared(student, teacher, rate=rate)
        assert loss.encoders[0](teacher.features[1]).shape == (4, channels, 4, 3)


def test_factors_of_unequal_size_are_pooled():
    student, teacher, labels = example()
    large = teacher._replace(features=(wave(4, 8, 9, 7),))
    loss = prepared(student, large)
    assert loss(student, large, labels).isfinite()


def test_arguments_are_checked():
    for arguments in ({"rate": 0.0}, {"p": 3}, {"reconstruction": "mse"}):
        with pytest.raises(ValueError, match="must be"):
            FactorTransfer(**arguments)
    with pytest.raises(ValueError, match="prepare"):
        FactorTransfer()(*example())
    with pytest.raises(ValueError, match="prepare"):
        FactorTransfer().preparation(example()[1])
