"""The leading right-singular subspace of a gradient, by several methods.

Each returns an orthonormal P (b, n, r) such that G P Pᵀ keeps as much of G (b, m, n) as r
directions can.

svd    exact, as the GaLore authors do it: the gradient is gathered, in float32.
warm   one subspace iteration from the previous basis, then Rayleigh–Ritz (Halko, Martinsson & Tropp,
       arXiv 0909.4061, algorithm 4.4 without the random start), columns by falling singular value, each
       with the sign that agrees with the previous one. Only (·, r) products travel. Without a previous
       basis: four iterations from a seeded random start.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lrpretrain.sharding.algebra import Matrices

COLD_ITERATIONS = 4


def leading_subspace(G: Matrices, rank: int, method: str, start: Tensor | None) -> Tensor:
    """Return the leading right-singular vectors (b, n, rank), in float32 or better.

    `start` is the previous basis (b, n, rank), or None at the first refresh. Every process of the
    matrices' group must call this; all of them get the same result.
    """
    if method == "svd":
        return leading_subspaces(G, rank)[1]
    return _warm(G, rank, start)


def leading_subspaces(G: Matrices, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading left and right singular vectors (b, m, rank) and (b, n, rank), by SVD."""
    U, V = [], []
    for matrix in G.whole().float():  # one by one: batched drivers on GPUs lose accuracy for large matrices
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


def _warm(G: Matrices, rank: int, start: Tensor | None) -> Tensor:
    dtype = torch.promote_types(G.tensors[0].dtype, torch.float32)
    cold = start is None
    X = _random_start(G, rank) if start is None else start
    for _ in range(COLD_ITERATIONS if cold else 1):
        Y = G.t_matmul(G @ X.to(G.tensors[0].dtype))  # (b, n, r)
        X = torch.linalg.qr(Y.to(dtype)).Q
    B = (G @ X.to(G.tensors[0].dtype)).to(dtype)  # (b, m', r)
    _, V = torch.linalg.eigh(G.inner(B, B))  # ascending
    P = X @ V.flip(-1)
    if start is not None:
        P = P * torch.where((P * start).sum(-2, keepdim=True) < 0, -1.0, 1.0)
    return P


def _random_start(G: Matrices, rank: int) -> Tensor:
    """Draw (b, n, rank) normals that depend on the names of the matrices only."""
    draws = []
    for name in G.names:
        seed = int.from_bytes(hashlib.sha256(f"subspace {name}".encode()).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        draws.append(torch.randn(G.shape[1], rank, generator=generator))
    return torch.stack(draws).to(G.tensors[0].device)
