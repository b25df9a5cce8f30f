"""One process, or DDP: every process holds whole parameters."""

from __future__ import annotations

from torch import Tensor

from lrpretrain.sharding.tiles import Holding, Tile


def hold(name: str, param: Tensor) -> Holding:
    """Return the holding of a plain tensor: all of it."""
    shape = tuple(param.shape)
    return Holding(name, param, shape, (Tile.whole(shape),))
