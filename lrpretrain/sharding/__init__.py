"""Where the pieces of a matrix lie, and how to multiply a matrix that lies in pieces."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from lrpretrain.sharding import fsdp, local, zero
from lrpretrain.sharding.tiles import Holding, Piece, Tile, Tiles

__all__ = ["Holding", "Piece", "Tile", "Tiles", "hold"]


def hold(name: str, param: Tensor) -> Holding:
    """Return what this process holds of a parameter, whichever engine laid it out."""
    if isinstance(param, zero.Shard):
        return zero.hold(name, param)
    return fsdp.hold(name, param) if isinstance(param, DTensor) else local.hold(name, param)
