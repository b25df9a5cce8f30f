"""The leading right-singular subspace of a gradient, by several methods.

Each returns an orthonormal P (b, n, r) such that G P Pᵀ keeps as much of G (b, m, n) as r
directions can (`random` makes no such attempt).

svd         exact, as the GaLore authors do it: the gradient is gathered, in float32
gram        eigenvectors of GᵀG (n, n) in float32 or better: as good, and much faster where m ≫ n or on a GPU
warm        one subspace iteration from the previous basis, then Rayleigh–Ritz; only (·, r) products
            travel; without a previous basis four iterations from a random start
randomized  two subspace iterations from a new random start at every refresh, then Rayleigh–Ritz
            (Halko, Martinsson & Tropp, arXiv 0909.4061, algorithm 4.4)
random      an orthonormal basis that never looks at the gradient (as Flora and APOLLO do)

Columns come by falling singular value. All but `svd`, whose signs are those of LAPACK, give each column
the sign that agrees with the previous basis. Random draws depend on the matrix's name and the number
of the refresh, never on the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lrpretrain.sharding.algebra import CHUNK_BYTES, Matrices

METHODS = ("svd", "gram", "warm", "randomized", "random")
COLD_ITERATIONS = 4
RANDOMIZED_ITERATIONS = 2


def leading_subspace(
    G: Matrices, rank: int, method: str, start: Tensor | None, turns: Sequence[int] | None = None
) -> Tensor:
    """Return the leading right-singular vectors (b, n, rank), in float32 or better.

    `start` is the previous basis (b, n, rank), or None at the first refresh; `turns` counts the refreshes
    of each matrix so far (0). Every process of the matrices' group must call this; all get the same result.
    """
    turns = turns or [0] * len(G)
    if method == "svd":
        return leading_subspaces(G, rank)[1]
    if method == "gram":
        leading = [_eigenvectors(part.gram(part.largest()))[:, :, -rank:] for part in _parts(G)]  # ascending
        P = torch.cat(leading).flip(-1)
    elif method == "random":
        P = torch.linalg.qr(_draw(G, rank, turns)).Q
    elif method == "randomized":
        P = _iterate(G, _draw(G, rank, turns), RANDOMIZED_ITERATIONS)
    elif start is None:
        P = _iterate(G, _draw(G, rank, turns), COLD_ITERATIONS)
    else:
        P = _iterate(G, start, 1)
    if start is None or method == "random":
        return P
    return P * torch.where((P * start).sum(-2, keepdim=True) < 0, -1.0, 1.0)


def leading_subspaces(G: Matrices, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading left and right singular vectors (b, m, rank) and (b, n, rank), by SVD."""
    U, V = [], []
    # One by one: a batched SVD on a GPU loses accuracy for large matrices.
    for matrix in (matrix for part in _parts(G) for matrix in part.whole().float()):
        # The signs of singular vectors are LAPACK's whim: decompose the matrix as the authors see it.
        u, vh = _svd(matrix.T if G.transposed else matrix)
        U.append(u[:, :rank])
        V.append(vh[:rank].T)
    return (torch.stack(V), torch.stack(U)) if G.transposed else (torch.stack(U), torch.stack(V))


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # did not converge in float32
        u, _, vh = (x.to(matrix) for x in torch.linalg.svd(matrix.double().cpu(), full_matrices=False))
    return u, vh


def _iterate(G: Matrices, X: Tensor, iterations: int) -> Tensor:
    """Return the Ritz vectors of GᵀG in the range of (GᵀG)^iterations X, by falling Ritz value."""
    own = G.dtype
    dtype = torch.promote_types(own, torch.float32)
    scale = G.largest()[:, None, None].to(own)  # so that squares of small gradients do not vanish
    for _ in range(iterations):
        Y = G.t_matmul((G @ X.to(own)) / scale) / scale  # (b, n, r)
        X = torch.linalg.qr(Y.to(dtype)).Q
    B = ((G @ X.to(own)) / scale).to(dtype)  # (b, m', r)
    return X @ _eigenvectors(G.inner(B, B)).flip(-1)


def _parts(G: Matrices) -> Iterator[Matrices]:
    """Yield the batch in parts of which whole and Gram matrices take CHUNK_BYTES."""
    count = max(1, CHUNK_BYTES // (4 * max(G.shape) * G.shape[1]))
    for begin in range(0, len(G), count):
        yield G[range(begin, min(begin + count, len(G)))]


def _eigenvectors(symmetric: Tensor) -> Tensor:
    """Return the eigenvectors of symmetric matrices (b, n, n), by rising eigenvalue."""
    try:
        return torch.linalg.eigh(symmetric).eigenvectors
    except torch.linalg.LinAlgError:  # did not converge in float32
        return torch.linalg.eigh(symmetric.double().cpu()).eigenvectors.to(symmetric)


def _draw(G: Matrices, rank: int, turns: Sequence[int]) -> Tensor:
    """Draw (b, n, rank) normals that depend on the names of the matrices and the turns only."""
    draws = []
    for name, turn in zip(G.names, turns, strict=True):
        digest = hashlib.sha256(f"subspace {name} {turn}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        draws.append(torch.randn(G.shape[1], rank, generator=generator))
    return torch.stack(draws).to(G.device)
