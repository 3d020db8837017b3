import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.relation import _singular_vectors
from kdnas.losses.relation._singular_vectors import leading_vectors, signs
from kdnas.losses.relation.singular_value import SingularValue
from kdnas.outputs import Outputs

LABELS = torch.zeros(1, dtype=torch.int64)


def outputs(*maps):
    return Outputs(torch.zeros(len(maps[0]), 2, dtype=maps[0].dtype), maps)


def prepared(**options):
    student, teacher, labels = example()
    loss = SingularValue(**options)
    loss.prepare(student, teacher)
    fill(loss.double())
    return loss, student, teacher, labels


def test_a_value_worked_by_hand():
    # Maps of one position: the only right vector is the map's direction, turned to a positive largest entry.
    student = outputs(torch.tensor([[[[3.0]], [[4.0]]]]), torch.tensor([[[[0.0]], [[-2.0]]]]))
    teacher = outputs(torch.tensor([[[[-5.0]], [[0.0]]]]), torch.tensor([[[[0.0]], [[1.0]]]]))
    # student (0.6, 0.8) -> (0, 1); teacher (1, 0) -> (0, 1)
    s = np.exp(-(np.subtract.outer([0.6, 0.8], [0, 1]) ** 2) / 8)
    t = np.exp(-(np.subtract.outer([1, 0], [0, 1]) ** 2) / 8)
    found = float(SingularValue()(student, teacher, LABELS))
    assert found == pytest.approx(((s - t) ** 2).sum(), rel=1e-6)


def reference(loss, student, teacher, k, flip=1):
    total = 0.0
    for b in range(len(student.logits)):
        described = []
        for i, (mine, target) in enumerate(zip(student.features, teacher.features, strict=True)):
            weight = loss.taps.adapters[str(i)].weight.detach().numpy()
            x = (weight @ mine[b].flatten(1).numpy()).T
            y = target[b].flatten(1).numpy().T
            _, s, v_s = np.linalg.svd(x)
            v_s = v_s[: min(k + 3, (s > 1e-5 * s[0]).sum())].T * flip  # without the vectors of no singular value
            s, v_t = np.linalg.svd(y)[1][:k], np.linalg.svd(y)[2][:k].T
            v_t = v_t * [np.sign(v[np.abs(v).argmax()]) for v in v_t.T]
            matched = []
            for v in v_t.T:
                cosines = v @ v_s
                best = np.abs(cosines).argmax()
                matched.append(v_s[:, best] * np.sign(cosines[best]))
            sigma = s / np.linalg.norm(s)
            described.append((np.array(matched).T * sigma, v_t * sigma))
        relations = [
            [
                [[np.exp(-((p - q) ** 2) / 8) for q in second[:, n]] for p in first[:, n]]
                for n, (first, second) in enumerate([(described[0][who], described[1][who])] * k)
            ]
            for who in (0, 1)
        ]
        total += ((np.array(relations[0]) - np.array(relations[1])) ** 2).sum()
    return total / len(student.logits)


@pytest.mark.parametrize("k", [1, 2])
def test_it_agrees_with_loops_over_numpys_decomposition(k):
    loss, student, teacher, labels = prepared(num_vectors=k)
    expected = reference(loss, student, teacher, k)
    assert reference(loss, student, teacher, k, flip=-1) == pytest.approx(expected)
    assert float(loss(student, teacher, labels).detach()) == pytest.approx(expected, rel=1e-9)
    if k == 1:
        assert SingularValue.golden == pytest.approx(expected, rel=1e-9)


def test_it_does_not_depend_on_the_signs_the_decomposition_gives(monkeypatch):
    loss, student, teacher, labels = prepared(num_vectors=3)
    student = student.map(lambda x: x.clone().requires_grad_())

    def run():
        value = loss(student, teacher, labels)
        return value.detach(), torch.autograd.grad(value, student.features)

    plain, gradients = run()
    eigh = torch.linalg.eigh
    generator = torch.Generator().manual_seed(0)

    def flipped(matrix):
        values, vectors = eigh(matrix)
        signs = torch.randint(2, vectors[:, :1].shape, generator=generator) * 2 - 1
        assert (signs < 0).any()
        return values, vectors * signs

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    for _ in range(3):
        again, others = run()
        assert float(again) == pytest.approx(float(plain), rel=1e-12)
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, other)


def test_the_vectors_are_those_of_the_singular_value_decomposition():
    for shape in ((2, 5, 4, 3), (2, 12, 2, 3)):  # more positions than channels, and fewer
        maps = wave(*shape).float()
        values, vectors = leading_vectors(maps, 3)
        for b in range(2):
            _, s, v = np.linalg.svd(maps[b].flatten(1).double().numpy().T)
            np.testing.assert_allclose(np.abs(vectors[b].numpy().T), np.abs(v[:3]), atol=1e-5)
            np.testing.assert_allclose(values[b] / values[b, 0], s[:3] / s[0], rtol=1e-5)


def test_of_entries_equal_within_rounding_the_first_decides_the_sign():
    vectors = torch.tensor([[[-0.5, 0.5, 0.0], [0.5 + 1e-7, -0.5 - 1e-7, 0.0], [0.1, 0.1, 0.0]]])
    assert signs(vectors).tolist() == [[-1, 1, 1]]


def test_equal_singular_values_and_zero_maps_have_finite_gradients():
    eye = torch.eye(4).reshape(1, 4, 2, 2).repeat(2, 1, 1, 1)
    for hard in (eye, torch.zeros(2, 4, 2, 2), eye + 1e-7 * wave(2, 4, 2, 2).float(), torch.ones(2, 4, 2, 2)):
        student = hard.clone().requires_grad_()
        value = SingularValue()(outputs(student, student), outputs(wave(2, 4, 2, 2).float(), hard), LABELS)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(student.grad).all()
        assert student.grad.abs().max() < 1e3


def test_absent_vectors_are_zero():
    maps = torch.ones(1, 3, 2, 2)  # rank 1
    values, vectors = leading_vectors(maps, 3)
    assert torch.equal(values[0, 1:], torch.zeros(2)) and torch.equal(vectors[0, :, 1:], torch.zeros(3, 2))


def test_the_gradient_is_damped_only_where_values_nearly_coincide():
    matrix = torch.diag(torch.tensor([1.0, 0.9, 0.5], dtype=torch.float64))[None].requires_grad_()
    asked = torch.zeros(1, 3, 3, dtype=torch.float64)
    asked[0, 0, 2] = 1.0
    damped, exact = (
        torch.autograd.grad((f(matrix)[1] * asked).sum(), matrix)[0]
        for f in (_singular_vectors._Eigh.apply, torch.linalg.eigh)
    )
    torch.testing.assert_close(damped, (exact + exact.transpose(1, 2)) / 2, rtol=1e-5, atol=1e-6)


def test_too_many_vectors_are_refused():
    maps = outputs(wave(2, 2, 4, 4), wave(2, 2, 4, 4))
    with pytest.raises(ValueError, match="2 channels and 16 positions has fewer than 3 singular vectors"):
        SingularValue(num_vectors=3)(maps, maps, LABELS)
    with pytest.raises(ValueError, match="`num_vectors` must be at least 1"):
        SingularValue(num_vectors=0)


def separated(*squares, batch=3, channels=70, height=9, width=8):
    """Float32 maps whose singular values are the roots of `squares`, then 0.05, 0.04, ..."""
    generator = torch.Generator().manual_seed(len(squares))
    normal = torch.randn(batch, channels, height * width, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(normal, full_matrices=False)
    s = 0.05 * torch.linspace(1, 0, s.shape[1], dtype=torch.float64).expand_as(s).clone()
    s[:, : len(squares)] = torch.tensor(squares, dtype=torch.float64).sqrt()
    return (u * s[:, None] @ v).unflatten(2, (height, width)).float()


def by_both(maps, count, like=None):
    """Values, vectors and gradient in float32, by iteration, and in float64, in full."""
    found = []
    for dtype in (torch.float32, torch.float64):
        x = maps.to(dtype).clone().requires_grad_()
        values, vectors = leading_vectors(x, count, None if like is None else like.to(dtype))
        asked = torch.cos(torch.arange(vectors.numel(), dtype=torch.float64)).reshape(vectors.shape).to(dtype)
        found.append((values, vectors.detach(), torch.autograd.grad((vectors * asked).sum(), x)[0].flatten(1)))
    return found


def assert_equal(found, *, vectors=1e-5, gradient=1e-4):
    (values, mine, slope), (expected_values, expected, exact) = found
    torch.testing.assert_close(values.double(), expected_values, rtol=1e-5, atol=1e-6)
    assert (mine - expected).norm(dim=1).max() < vectors
    assert ((slope - exact).norm(dim=1) / exact.norm(dim=1)).max() < gradient


@pytest.mark.parametrize("turned", [False, True])
def test_the_iteration_agrees_with_the_full_decomposition(monkeypatch, turned):
    maps = separated(1, 0.6, 0.3, 0.1, **({"channels": 80, "width": 8} if turned else {"channels": 70, "width": 9}))
    target = leading_vectors(maps.double(), 2)[1]
    monkeypatch.setattr(_singular_vectors, "_in_full", forbid_in_float32(_singular_vectors._in_full))
    assert_equal(by_both(maps, 4))
    assert_equal(by_both(maps, 4, like=target + 0.01))
    # The gradient of a vector whose square is a fiftieth of the first.
    assert_equal(by_both(separated(1, 0.06, 0.04, 0.02), 4), vectors=1e-4)


def forbid_in_float32(in_full):
    def checked(rows, *arguments):
        assert rows.dtype == torch.float64, "the iteration did not settle"
        return in_full(rows, *arguments)

    return checked


def test_a_match_beyond_doubt_needs_no_other_vector(monkeypatch):
    # The second to the fifth value are equal: no vectors of their own. The first is matched.
    maps = separated(1, 0.2, 0.2, 0.2, 0.2)
    monkeypatch.setattr(_singular_vectors, "_in_full", forbid_in_float32(_singular_vectors._in_full))
    assert_equal(by_both(maps, 4, like=leading_vectors(maps.double(), 1)[1]))


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 0.0])
def test_near_equal_singular_values_are_decomposed_in_full(gap):
    hard, easy = separated(1, 1 - gap, 0.3), separated(1, 0.5, 0.3)
    maps = torch.cat([hard[:1], easy])
    assert _singular_vectors._iterated(maps.flatten(2), 1, None).enough.tolist() == [False, True, True, True]
    rows = _singular_vectors.rescale(maps.flatten(2), (1, 2))
    values, vectors = leading_vectors(maps, 1)
    expected_values, expected = _singular_vectors._in_full(rows, 1, None)
    torch.testing.assert_close(values, expected_values)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)
    assert_equal([tuple(x[1:] for x in found) for found in by_both(maps, 1)])
    # Near enough for the damping to be seen in the gradient, though not for the residual.
    assert not _singular_vectors._iterated(separated(1, 0.03, 0.029).flatten(2), 2, None).enough.any()


def test_a_zero_map_among_others_has_no_vector_and_no_gradient():
    maps = torch.cat([torch.zeros(1, 70, 9, 8), separated(1, 0.5)])
    found = by_both(maps, 2, like=leading_vectors(maps.double().flip(0), 1)[1])
    for values, vectors, gradient in found:
        assert not values[0].any() and not vectors[0].any() and not gradient[0].any()
    assert_equal([(v[1:], w[1:], g[1:]) for v, w, g in found])


def test_the_loss_is_that_of_the_full_decomposition():
    student, teacher = (outputs(separated(1, 0.5), separated(1, 0.4, 0.1).flip(shift)) for shift in (1, 2))
    values = [
        float(SingularValue()(*(o.map(lambda x, d=dtype: x.to(d)) for o in (student, teacher)), LABELS))
        for dtype in (torch.float32, torch.float64)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4) and values[1] > 0.1
    assert float(SingularValue()(student, student, LABELS)) == pytest.approx(0, abs=1e-10)
