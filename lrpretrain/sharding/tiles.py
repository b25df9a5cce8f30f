"""Tiles: the rectangles of a parameter that this process holds.

However an engine cuts a parameter, a process is left with a rectangle of it. Layouts (`local`,
`fsdp`) say which; the algebra multiplies them; the checkpoint stores them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A rectangle of a tensor: where it begins, and how large it is, in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Tile:
        """Return the tile that is all of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def T(self) -> Tile:
        """The same rectangle of the transposed matrix."""
        return Tile(self.offsets[::-1], self.sizes[::-1])

    def span(self, dim: int) -> slice:
        """Return where the tile lies along a dimension."""
        return slice(self.offsets[dim], self.offsets[dim] + self.sizes[dim])

    def along(self, dim: int, width: int) -> Tile:
        """Return the tile of a matrix that shares dimension `dim` with this one and is `width` wide."""
        return Tile((self.offsets[dim], 0), (self.sizes[dim], width))


@dataclass(frozen=True)
class Piece:
    """A tensor of this process and the place that it takes in the whole one."""

    tensor: Tensor
    shape: tuple[int, ...]
    tile: Tile

    @classmethod
    def whole(cls, tensor: Tensor) -> Piece:
        """Return the piece that is the whole tensor, which every process holds."""
        return cls(tensor, tuple(tensor.shape), Tile.whole(tuple(tensor.shape)))


@dataclass(frozen=True)
class Holding:
    """What this process holds of one parameter.

    `split` is the dimension that is cut among the processes of `group`, or None where each of them
    holds all of the parameter. A process's own tile may be empty.
    """

    name: str
    param: Tensor
    shape: tuple[int, ...]
    tile: Tile
    split: int | None = None
    group: dist.ProcessGroup | None = None

    @property
    def weight(self) -> Tensor:
        """The values that this process holds, shaped as `tile`; writing to them changes the parameter."""
        return _local(self.param.detach())

    @property
    def grad(self) -> Tensor | None:
        """The gradient of these values, or None."""
        return None if self.param.grad is None else _local(self.param.grad)

    @property
    def piece(self) -> Piece:
        """The weight as a checkpoint stores it."""
        return Piece(self.weight, self.shape, self.tile)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
