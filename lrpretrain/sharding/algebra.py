"""Products with matrices that lie in tiles over the processes.

The rules see a batch of equal-shaped matrices (b, m, n) and never ask where it lies. Each process
multiplies its own tile; what no process holds whole is added up over the group, for the whole
batch in one collective.

Letters: b matrices in the batch; m×n their shape; m', n' the rows and columns of this process's
tile. Arguments with n rows are whole on every process; arguments with m' rows lie like the tile's rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lrpretrain.sharding.tiles import Holding, Tile


class Matrices:
    """A batch of equal-shaped matrices of which this process holds one tile each.

    With `transposed` every matrix stands for its transpose, so that a rule needs one side only.
    All processes of the group must call each method together; what is communicated, and when, is
    said there.
    """

    def __init__(self, holdings: Sequence[Holding], tensors: Sequence[Tensor], transposed: bool = False):
        first = holdings[0]
        self.holdings = list(holdings)
        self.transposed = transposed
        self.names = [h.name for h in holdings]
        self.shape = first.shape[::-1] if transposed else first.shape
        self.tile: Tile = first.tile.T if transposed else first.tile
        self.group = first.group
        self.split = None if first.split is None else (1 - first.split if transposed else first.split)
        self.tensors = [t.T if transposed else t for t in tensors]  # b × (m', n')

    @classmethod
    def weights(cls, holdings: Sequence[Holding], transposed: bool = False) -> Matrices:
        """Return the weights; what is done in place is done to the parameters."""
        return cls(holdings, [h.weight for h in holdings], transposed)

    @classmethod
    def gradients(cls, holdings: Sequence[Holding], transposed: bool = False) -> Matrices:
        """Return the gradients, which must be there."""
        return cls(holdings, [g for h in holdings if (g := h.grad) is not None], transposed)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, which: Sequence[int]) -> Matrices:
        """Return the batch of some of the matrices."""
        return self.like([self.tensors[i] for i in which], [self.holdings[i] for i in which])

    def like(self, tensors: Sequence[Tensor], holdings: Sequence[Holding] | None = None) -> Matrices:
        """Return matrices of other values (b × (m', n')) that lie as these do."""
        batch = Matrices(holdings or self.holdings, tensors)
        batch.transposed, batch.shape, batch.tile, batch.split = (
            self.transposed,
            self.shape,
            self.tile,
            self.split,
        )
        return batch

    def __matmul__(self, X: Tensor) -> Tensor:
        """Return the tile's rows of G X (b, m', k) for X (b, n, k). Communicates where columns are split."""
        return self.matmul(X)

    def matmul(self, X: Tensor, stretch: Tensor | None = None) -> Tensor:
        """Return G X, with the columns of G stretched by factors (b, n') first. Communicates as `@` does."""
        X = X[:, self.tile.span(1)]
        if stretch is not None:
            X = stretch.to(X)[..., None] * X
        return self._sum(torch.stack([G @ x for G, x in zip(self.tensors, X, strict=True)]), over=1)

    def t_matmul(self, Y: Tensor) -> Tensor:
        """Return Gᵀ Y (b, n, k) for the tile's rows of Y (b, m', k). Communicates where anything is split."""
        part = torch.stack([G.T @ y for G, y in zip(self.tensors, Y, strict=True)])  # (b, n', k)
        if self.split == 1:
            whole = part.new_zeros(len(self), self.shape[1], Y.shape[2])
            whole[:, self.tile.span(1)] = part
            return self._sum(whole, over=1)
        return self._sum(part, over=0)

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return Xᵀ Y (b, j, k) for the tile's rows of X and Y. Communicates where rows are split."""
        return self._sum(X.mT @ Y, over=0)

    def gram(self) -> Tensor:
        """Return GᵀG (b, n, n) in float32 or better. Communicates where anything is split."""
        tensors = list(self.whole()) if self.split == 1 else self.tensors
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        return self._sum(torch.stack([G.to(dtype).T @ G.to(dtype) for G in tensors]), over=0)

    def square_sum(self) -> Tensor:
        """Return the squared Frobenius norm of each matrix (b,). Communicates where anything is split."""
        part = torch.stack([G.float().square().sum() for G in self.tensors])
        return part if self.split is None else self._sum(part, over=self.split)

    def whole(self) -> Tensor:
        """Return the matrices (b, m, n), whole on every process. Communicates them where they are split."""
        if self.split is None:
            return torch.stack(self.tensors)
        whole = self.tensors[0].new_zeros(len(self), *self.shape)
        whole[:, self.tile.span(0), self.tile.span(1)] = torch.stack(self.tensors)
        return self._sum(whole, over=self.split)

    def add_lowrank(self, N: Tensor, P: Tensor, alpha: Sequence[float]) -> None:
        """Add alpha N Pᵀ in place, for the tile's rows of N (b, m', r) and P (b, n, r). No communication."""
        P = P[:, self.tile.span(1)]
        for G, L, R, a in zip(self.tensors, N, P, alpha, strict=True):
            G.addmm_(L, R.T, alpha=a)

    def scale(self, factor: float) -> None:
        """Multiply in place. No communication."""
        if factor != 1:
            torch._foreach_mul_(self.tensors, factor)

    def dot(self, other: Matrices, dim: int) -> Tensor:
        """Return inner products with another batch, of columns (dim 0) or rows (dim 1), in float32 or more.

        Lies like the tile along the other dimension: (b, n') for dim 0, (b, m') for dim 1. Communicates where
        `dim` is split.
        """
        dtype = torch.promote_types(self.tensors[0].dtype, torch.float32)
        pairs = zip(self.tensors, other.tensors, strict=True)
        return self._sum(torch.stack([(A.to(dtype) * B.to(dtype)).sum(dim) for A, B in pairs]), over=dim)

    def stretch(self, factors: Tensor, dim: int) -> None:
        """Multiply rows (dim 1; factors (b, m')) or columns (dim 0; (b, n')) in place. No communication."""
        torch._foreach_mul_(
            self.tensors, [f.to(T).unsqueeze(dim) for T, f in zip(self.tensors, factors, strict=True)]
        )

    def _sum(self, tensor: Tensor, over: int) -> Tensor:
        """Add up over the group where dimension `over` of the matrices is split."""
        if self.split == over and self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor
