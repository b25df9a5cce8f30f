"""Tiles: the rectangles of a parameter that this process holds.

However an engine cuts a parameter, a process is left with a few rectangles of it: one under FSDP2, up to
three where a range of a flat buffer begins and ends within rows (ZeRO). Layouts (`local`, `fsdp`, `zero`)
say which; the algebra multiplies them; the checkpoint stores them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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

    @property
    def numel(self) -> int:
        return torch.Size(self.sizes).numel()

    def span(self, dim: int) -> slice:
        """Return where the tile lies along a dimension."""
        return slice(self.offsets[dim], self.offsets[dim] + self.sizes[dim])

    def along(self, dim: int, *widths: int) -> Tile:
        """Return the tile of a vector (or matrix, with a width) that shares this one's dimension `dim`."""
        return Tile((self.offsets[dim], *(0 for _ in widths)), (self.sizes[dim], *widths))


Tiles = tuple[Tile, ...]


def cut(shape: tuple[int, ...], begin: int, end: int) -> Tiles:
    """Return the tiles of the range [begin, end) of a tensor laid out row by row.

    Up to three of a matrix: the end of a row, whole rows, the beginning of a row. More than two dimensions
    are not cut: Raises ValueError.
    """
    if begin >= end:
        return ()
    if len(shape) < 2:
        return (Tile((begin,), (end - begin,)) if shape else Tile((), ()),)
    if len(shape) > 2:
        raise ValueError(f"a tensor of shape {shape} has no tiles")
    n = shape[1]
    tiles = []
    if begin % n:
        stop = min(end, begin - begin % n + n)
        tiles.append(Tile((begin // n, begin % n), (1, stop - begin)))
        begin = stop
    if rows := (end - begin) // n:
        tiles.append(Tile((begin // n, 0), (rows, n)))
        begin += rows * n
    if begin < end:
        tiles.append(Tile((begin // n, 0), (1, end - begin)))
    return tuple(tiles)


@dataclass(frozen=True)
class Piece:
    """A tensor of this process and the places that it takes in the whole one.

    The tensor holds the tiles one after the other, each row by row; with one tile it may have its shape.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    tiles: Tiles

    @classmethod
    def whole(cls, tensor: Tensor) -> Piece:
        """Return the piece that is the whole tensor, which every process holds."""
        return cls(tensor, tuple(tensor.shape), (Tile.whole(tuple(tensor.shape)),))

    @property
    def parts(self) -> Iterator[tuple[Tile, Tensor]]:
        """Yield each tile with its numbers, shaped as the tile; writing to them changes the tensor."""
        if len(self.tiles) == 1 and self.tensor.shape == self.tiles[0].sizes:
            yield self.tiles[0], self.tensor
            return
        flat, begin = self.tensor.view(-1), 0
        for tile in self.tiles:
            yield tile, flat[begin : begin + tile.numel].view(tile.sizes)
            begin += tile.numel


@dataclass(frozen=True)
class Holding:
    """What this process holds of one parameter.

    `spread` is what each process of `group` holds, in its order, and `split` the dimension along which they
    lie side by side (rows for ranges of a flat buffer); without a group every process holds all of it. `even`
    is false where a parameter is cut as it happens to lie in a buffer: then matrices of one shape are cut
    differently. `replicas` is the group of those that hold the same (HSDP).
    """

    name: str
    param: Tensor
    shape: tuple[int, ...]
    tiles: Tiles
    spread: tuple[Tiles, ...] = ()
    split: int | None = None
    group: dist.ProcessGroup | None = None
    even: bool = True
    replicas: dist.ProcessGroup | None = None

    @property
    def weight(self) -> Tensor:
        """The values that this process holds; writing to them changes the parameter."""
        return _local(self.param.detach())

    @property
    def grad(self) -> Tensor | None:
        """The gradient of these values, or None."""
        return None if self.param.grad is None else _local(self.param.grad)

    @property
    def piece(self) -> Piece:
        """The weight as a checkpoint stores it."""
        return Piece(self.weight, self.shape, self.tiles)

    def of(self, tensor: Tensor) -> Piece:
        """Return another tensor that lies as the parameter does."""
        return replace(self.piece, tensor=tensor)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
