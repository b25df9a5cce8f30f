"""Products with matrices that lie in tiles over the processes.

The rules see a batch of equal-shaped matrices (b, m, n) and never ask where it lies. Each process
multiplies its own tiles; what no process holds whole is added up over the group, for the whole batch in one
collective.

Letters: b matrices in the batch; m×n their shape. Along the dimension that is split among the processes a
vector or matrix *lies like the tiles*: it has m' (n') lines, those that this process's tiles touch, one tile
after the other. Along the other it is whole on every process (m' = m).

A line that two processes hold parts of (a row, where a flat buffer is cut within it) counts on both: its
products are added up, and each keeps a copy.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lrpretrain.sharding.tiles import Holding, Tile, Tiles

CHUNK_BYTES = 2**30  # of whole matrices that a process has at a time, beyond what it holds


class Matrices:
    """A batch of equal-shaped matrices that are all cut alike.

    With `transposed` every matrix stands for its transpose, so that a rule needs one side only.
    All processes of the group must call each method together; what is communicated, and when, is
    said there.
    """

    def __init__(self, holdings: Sequence[Holding], tensors: Sequence[Tensor], transposed: bool = False):
        first = holdings[0]
        self.holdings = list(holdings)
        self.locals = list(tensors)
        self.transposed = transposed
        self.names = [h.name for h in holdings]
        self.shape = first.shape[::-1] if transposed else first.shape
        self.tiles: Tiles = tuple(t.T for t in first.tiles) if transposed else first.tiles
        self.group = first.group
        self.split = None if first.split is None else (1 - first.split if transposed else first.split)
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        # By tile: its b rectangles, and where its rows and columns are in what lies like the tiles.
        parts = zip(*(h.of(t).parts for h, t in zip(holdings, tensors, strict=True)), strict=True)
        self.parts = [[rect.T if transposed else rect for _, rect in part] for part in parts]
        self.lines = self._lines(0), self._lines(1)
        self.height = self._length(0)

    @classmethod
    def weights(cls, holdings: Sequence[Holding], transposed: bool = False) -> Matrices:
        """Return the weights; what is done in place is done to the parameters."""
        return cls(holdings, [h.weight for h in holdings], transposed)

    @classmethod
    def gradients(cls, holdings: Sequence[Holding], transposed: bool = False) -> Matrices:
        """Return the gradients, which must be there."""
        return cls(holdings, [g for h in holdings if (g := h.grad) is not None], transposed)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, which: Sequence[int]) -> Matrices:
        """Return the batch of some of the matrices."""
        chosen = [self.holdings[i] for i in which]
        return Matrices(chosen, [self.locals[i] for i in which], self.transposed)

    def lying(self, dim: int, *widths: int) -> tuple[tuple[int, ...], Tiles]:
        """Return the whole shape and the tiles of what lies like the tiles along a dimension.

        A vector of each matrix, or with a width a matrix with as many columns.
        """
        shape = (self.shape[dim], *widths)
        if self.split != dim:
            return shape, (Tile.whole(shape),)
        return shape, tuple(tile.along(dim, *widths) for tile in self.tiles)

    def zeros(self, dim: int, *widths: int) -> Tensor:
        """Return zeros (b, m', …) for dim 0, (b, n', …) for dim 1."""
        return torch.zeros(len(self), self._length(dim), *widths, dtype=self.dtype, device=self.device)

    def rows(self, X: Tensor) -> Tensor:
        """Return those rows of X (b, m, k) that lie like the tiles (b, m', k). No communication."""
        if self.split != 0:
            return X
        return torch.cat([X[:, :0], *(X[:, tile.span(0)] for tile in self.tiles)], dim=1)

    def __matmul__(self, X: Tensor) -> Tensor:
        """Return G X (b, m', k) for X (b, n, k). Communicates where a row is cut."""
        return self.matmul(X)

    def matmul(self, X: Tensor, stretch: Tensor | None = None) -> Tensor:
        """Return G X, with the columns of G stretched by factors (b, n') first. Communicates as `@` does."""
        out = X.new_zeros(len(self), self.height, X.shape[2])
        for tile, rows, columns, part in zip(self.tiles, *self.lines, self.parts, strict=True):
            x = X[:, tile.span(1)]
            if stretch is not None:
                x = stretch[:, columns].to(X)[..., None] * x
            out[:, rows] += torch.stack([G @ own for G, own in zip(part, x, strict=True)])
        return self._complete(out, 0)

    def t_matmul(self, Y: Tensor) -> Tensor:
        """Return Gᵀ Y (b, n, k), whole, for Y (b, m', k). Communicates where anything is split."""
        out = Y.new_zeros(len(self), self.shape[1], Y.shape[2])
        for tile, rows, part in zip(self.tiles, self.lines[0], self.parts, strict=True):
            out[:, tile.span(1)] += torch.stack([G.T @ y for G, y in zip(part, Y[:, rows], strict=True)])
        return self._sum(out)

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return Xᵀ Y (b, j, k) for X (b, m', j) and Y (b, m', k). Communicates where rows are split."""
        if self.split != 0:
            return X.mT @ Y
        for tile, rows in zip(self.tiles, self.lines[0], strict=True):
            if tile.offsets[1]:  # the row begins on another process, which counts it
                X = X.clone()
                X[:, rows] = 0
        return self._sum(X.mT @ Y)

    def gram(self, scale: Tensor) -> Tensor:
        """Return GᵀG (b, n, n) of G / scale, scale (b,), in float32 or better.

        Communicates where anything is split.
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        if self.split == 1 or self._shared:
            whole = (G.to(dtype) / s for G, s in zip(self.whole(), scale, strict=True))
            return torch.stack([G.T @ G for G in whole])
        out = torch.zeros(len(self), self.shape[1], self.shape[1], dtype=dtype, device=self.device)
        for part in self.parts:
            for at, (G, s) in enumerate(zip(part, scale, strict=True)):
                scaled = G.to(dtype) / s
                out[at].addmm_(scaled.T, scaled)
        return self._sum(out)

    def largest(self) -> Tensor:
        """Return the largest magnitude of each matrix (b,), 1 for zeros. Communicates where it is split."""
        each = [t.abs().max().float() if t.numel() else t.new_zeros(()).float() for t in self.locals]
        out = torch.stack(each)
        if self.group is not None:
            dist.all_reduce(out, dist.ReduceOp.MAX, group=self.group)
        return torch.where(out > 0, out, 1)

    def square_sum(self) -> Tensor:
        """Return the squared Frobenius norm of each matrix (b,). Communicates where anything is split."""
        return self._sum(torch.stack([t.float().square().sum() for t in self.locals]))

    def whole(self) -> Tensor:
        """Return the matrices (b, m, n), whole on every process. Communicates them where they are split."""
        out = torch.zeros(len(self), *self.shape, dtype=self.dtype, device=self.device)
        for tile, part in zip(self.tiles, self.parts, strict=True):
            out[:, tile.span(0), tile.span(1)] = torch.stack(part)
        return self._sum(out)

    def agreed(self, tensor: Tensor) -> Tensor:
        """Return the tensor as the first replica has it, where matrices are replicated. Communicates then.

        Sums over different groups of processes may be rounded differently; replicas must stay equal.
        """
        if (replicas := self.holdings[0].replicas) is not None:
            tensor = tensor.contiguous()
            dist.broadcast(tensor, group=replicas, group_src=0)
        return tensor

    def add_lowrank(self, N: Tensor, P: Tensor, alpha: Sequence[float]) -> None:
        """Add alpha N Pᵀ in place, for N (b, m', r) and P (b, n, r). No communication."""
        for tile, rows, part in zip(self.tiles, self.lines[0], self.parts, strict=True):
            for G, L, R, a in zip(part, N[:, rows], P[:, tile.span(1)], alpha, strict=True):
                G.addmm_(L, R.T, alpha=a)

    def dot(self, other: Matrices, dim: int) -> Tensor:
        """Return inner products with another batch, of columns (dim 0) or rows (dim 1), in float32 or more.

        (b, n') for dim 0, (b, m') for dim 1. Communicates where what is summed is split.
        """
        dtype, along = torch.promote_types(self.dtype, torch.float32), 1 - dim
        out = self.zeros(along).to(dtype)
        for own, As, Bs in zip(self.lines[along], self.parts, other.parts, strict=True):
            pairs = zip(As, Bs, strict=True)
            out[:, own] += torch.stack([(A.to(dtype) * B.to(dtype)).sum(dim) for A, B in pairs])
        return self._complete(out, along)

    def stretch(self, factors: Tensor, dim: int) -> None:
        """Multiply rows (dim 1; factors (b, m')) or columns (dim 0; (b, n')) in place. No communication."""
        for own, part in zip(self.lines[1 - dim], self.parts, strict=True):
            pairs = zip(part, factors[:, own], strict=True)
            torch._foreach_mul_(part, [f.to(G).unsqueeze(dim) for G, f in pairs])

    def less(self, other: Matrices, factors: Tensor, dim: int) -> Matrices:
        """Return self − other, rows (dim 1) or columns (dim 0) of `other` stretched first. No communication.

        Arguments as for `stretch`; the result has memory of its own.
        """
        result = Matrices(self.holdings, [t.clone() for t in self.locals], self.transposed)
        for own, part, others in zip(self.lines[1 - dim], result.parts, other.parts, strict=True):
            for G, other_part, f in zip(part, others, factors[:, own], strict=True):
                G.sub_(f.to(G).unsqueeze(dim) * other_part)
        return result

    def _lines(self, dim: int) -> list[slice]:
        """Return where each tile's lines are in what lies like the tiles along `dim`."""
        if self.split != dim:
            return [tile.span(dim) for tile in self.tiles]
        ends = list(itertools.accumulate(tile.sizes[dim] for tile in self.tiles))
        return [slice(end - t.sizes[dim], end) for end, t in zip(ends, self.tiles, strict=True)]

    def _length(self, dim: int) -> int:
        return sum(t.sizes[dim] for t in self.tiles) if self.split == dim else self.shape[dim]

    def _complete(self, tensor: Tensor, along: int) -> Tensor:
        """Add up what lies like the tiles along a dimension and was summed over the other one."""
        if self.split == 1 - along:
            return self._sum(tensor)
        if shared := self._shared:
            # Only these lines travel, of all matrices together.
            where = {line: i for i, line in enumerate(shared)}
            own = [
                (lines.start, where[tile.offsets[along]])
                for tile, lines in zip(self.tiles, self.lines[along], strict=True)
                if tile.offsets[along] in where and self._is_partial(tile)
            ]
            here, there = [i for i, _ in own], [i for _, i in own]
            buffer = tensor.new_zeros(tensor.shape[0], len(shared), *tensor.shape[2:])
            buffer[:, there] = tensor[:, here]
            tensor[:, here] = self._sum(buffer)[:, there]
        return tensor

    @functools.cached_property
    def _shared(self) -> list[int]:
        """Return the lines along the split dimension of which no process holds all."""
        if self.split is None:
            return []
        dim = self.holdings[0].split or 0
        tiles = itertools.chain.from_iterable(self.holdings[0].spread)
        width = self.holdings[0].shape[1 - dim]
        return sorted({t.offsets[dim] for t in tiles if t.sizes[1 - dim] < width})

    def _is_partial(self, tile: Tile) -> bool:
        across = 1 - (self.split or 0)
        return tile.sizes[across] < self.shape[across]

    def _sum(self, tensor: Tensor) -> Tensor:
        """Add up over the group."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor
