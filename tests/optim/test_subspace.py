"""The leading subspace by each method, against the energy that an SVD keeps."""

import pytest
import torch

from lrpretrain.optim.subspace import leading_subspace, leading_subspaces
from lrpretrain.sharding import hold
from lrpretrain.sharding.algebra import Matrices

METHODS = ["svd", "gram", "warm", "randomized"]


def batch(*matrices, transposed=False):
    return Matrices.weights([hold(f"layer{i}", G) for i, G in enumerate(matrices)], transposed)


def matrix(m=96, n=64, seed=0, decay=1.0):
    """Return a matrix with the singular values k^-decay."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(k, min(m, n), generator=generator)).Q for k in (m, n))
    return U * torch.arange(1, min(m, n) + 1.0).pow(-decay) @ V.T


def perturbed(G, ratio, seed):
    noise = torch.randn(G.shape, generator=torch.Generator().manual_seed(seed))
    return G + ratio * G.norm() / noise.norm() * noise


def energy(G, P):
    """Return ‖G P‖² relative to the most that so many directions can keep."""
    best = torch.linalg.svdvals(G)[: P.shape[-1]].square().sum()
    return float((G @ P).square().sum() / best)


def assert_orthonormal(P):
    assert P.isfinite().all()
    eye = torch.eye(P.shape[-1], dtype=P.dtype).expand(*P.shape[:-2], -1, -1)
    torch.testing.assert_close(P.mT @ P, eye, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_svd_is_the_best(shape):
    G = matrix(*shape)
    P = leading_subspace(batch(G), 16, "svd", None)
    assert P.shape == (1, shape[1], 16) and P.dtype == torch.float32
    assert_orthonormal(P)
    assert energy(G, P[0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("seed", range(3))
def test_warm_from_nothing_keeps_the_energy(shape, seed):
    G = matrix(*shape, seed=seed)
    P = leading_subspace(batch(G), 16, "warm", None)
    assert P.shape == (1, shape[1], 16)
    assert_orthonormal(P)
    assert 0.99 <= energy(G, P[0]) <= 1 + 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_one_warm_iteration_follows_the_gradient(seed):
    G = matrix(seed=seed)
    P = leading_subspace(batch(G), 16, "svd", None)
    moved = perturbed(G, 0.3, seed + 100)
    renewed = leading_subspace(batch(moved), 16, "warm", P)
    assert_orthonormal(renewed)
    assert 0.99 <= energy(moved, renewed[0]) <= 1 + 1e-5
    assert energy(moved, renewed[0]) > energy(moved, P[0])


def test_warm_iterations_reach_the_svd():
    G = matrix()
    P = leading_subspace(batch(G), 8, "warm", None)
    for _ in range(100):
        P = leading_subspace(batch(G), 8, "warm", P)
    V = leading_subspace(batch(G), 8, "svd", None)
    torch.testing.assert_close((P.mT @ V).abs(), torch.eye(8)[None], atol=1e-3, rtol=0)  # in order, too


def test_signs_agree_with_the_previous_basis():
    G = matrix()
    P = leading_subspace(batch(G), 16, "warm", None)
    flips = torch.where(torch.arange(16) % 3 == 0, -1.0, 1.0)
    for t, old in enumerate((P, -P, P * flips)):
        new = leading_subspace(batch(perturbed(G, 0.3, t)), 16, "warm", old)
        assert ((old * new).sum(-2) >= 0).all()
    same = leading_subspace(batch(G), 16, "warm", P * flips)
    assert ((P * flips * same).sum(-2)[0, :4] > 0.9).all(), (
        "columns of well-separated values keep their places"
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("rank_of_gradient", [0, 1, 5])
def test_deficient_gradients_give_orthonormal_bases(method, start, rank_of_gradient):
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(k, rank_of_gradient, generator=generator) for k in (96, 64))
    G = A @ B.T
    old = leading_subspace(batch(matrix()), 16, "svd", None) if start else None
    P = leading_subspace(batch(G), 16, method, old)
    assert_orthonormal(P)
    if rank_of_gradient:
        assert energy(G, P[0]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_the_scale_of_the_gradient_does_not_matter(method, scale):
    G = matrix()
    P = leading_subspace(batch(G * scale), 16, method, None)
    assert_orthonormal(P)
    assert energy(G, P[0]) >= 0.99


@pytest.mark.parametrize("method", METHODS)
def test_the_rank_of_the_whole_matrix(method):
    G = matrix(24, 16)
    P = leading_subspace(batch(G), 16, method, None)
    assert_orthonormal(P)
    torch.testing.assert_close(G @ P[0] @ P[0].T, G, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_gradients(method):
    G = matrix().bfloat16()
    P = leading_subspace(batch(G), 16, method, None)
    assert P.dtype == torch.float32
    assert_orthonormal(P)
    assert energy(G.float(), P[0]) >= 0.98


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_batch_gives_the_left_subspace(method):
    G = matrix(64, 96)
    P = leading_subspace(batch(G, transposed=True), 16, method, None)
    assert P.shape == (1, 64, 16)
    assert_orthonormal(P)
    assert energy(G.T, P[0]) >= 0.99
    as_given = leading_subspace(batch(G.T.contiguous()), 16, method, None)
    torch.testing.assert_close((P.mT @ as_given).abs(), torch.eye(16)[None], atol=1e-3, rtol=0)


def test_both_sides_of_a_transposed_batch():
    G = matrix(20, 30)
    U, V = leading_subspaces(batch(G), 4)
    V_of_transpose, U_of_transpose = (x for x in leading_subspaces(batch(G, transposed=True), 4))
    assert torch.equal(U, U_of_transpose) and torch.equal(V, V_of_transpose)
    core = U[0].T @ G @ V[0]
    torch.testing.assert_close(core, torch.diag(1 / torch.arange(1.0, 5)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_its_matrices(method):
    matrices = [matrix(seed=s) for s in range(3)]
    together = batch(*matrices)
    P = leading_subspace(together, 16, method, None)
    for i in range(3):
        own = leading_subspace(together[[i]], 16, method, None)
        torch.testing.assert_close(own[0], P[i], atol=1e-5, rtol=0)
    renewed = leading_subspace(together, 16, method, P)
    assert all(energy(G, renewed[i]) >= 0.99 for i, G in enumerate(matrices))


def test_warm_repeats_to_the_bit_whatever_the_global_generator():
    G = batch(matrix())
    torch.manual_seed(1)
    first = leading_subspace(G, 16, "warm", None)
    torch.manual_seed(2)
    assert torch.equal(first, leading_subspace(G, 16, "warm", None))


def test_an_svd_that_does_not_converge_is_tried_in_float64(monkeypatch):
    G = matrix()
    expected = leading_subspaces(batch(G), 16)
    plain, tried = torch.linalg.svd, []

    def svd(matrix, **options):
        tried.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return plain(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    found = leading_subspaces(batch(G), 16)
    assert tried == [torch.float32, torch.float64]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close((ours.mT @ theirs).abs(), torch.eye(16)[None], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["gram", "warm", "randomized"])
@pytest.mark.parametrize("size", [1e-25, 1e15])
def test_the_size_of_a_gradient_does_not_matter(method, size):
    matrix = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    bases = []
    for factor in (1.0, size):
        param = torch.nn.Parameter(matrix * factor)
        G = Matrices.weights([hold("w", param)])
        bases.append(leading_subspace(G, 3, method, None))
    torch.testing.assert_close(bases[0], bases[1], rtol=1e-3, atol=1e-3)
