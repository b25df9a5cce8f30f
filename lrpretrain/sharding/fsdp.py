"""FSDP2: parameters are DTensors, cut along one dimension."""

from __future__ import annotations

from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lrpretrain.errors import ConfigError
from lrpretrain.sharding.tiles import Holding, Tile


def hold(name: str, param: DTensor) -> Holding:
    """Return what this process holds of a DTensor that is sharded along at most one dimension.

    Uneven and empty shards are fine. Raises ConfigError for any other placement.
    """
    mesh = param.device_mesh
    sharded = [i for i, placement in enumerate(param.placements) if type(placement) is Shard]
    others = [p for i, p in enumerate(param.placements) if i not in sharded and p != Replicate()]
    if len(sharded) > 1 or others:
        raise ConfigError(
            [
                f"{name} has the placements {param.placements}: only Replicate() and one Shard(dim) are"
                " supported. Shard it along one mesh dimension, without tensor parallelism."
            ]
        )
    sizes, offsets = compute_local_shape_and_global_offset(param.shape, mesh, param.placements)
    split, group = None, None
    if sharded and mesh.size(sharded[0]) > 1:
        split, group = param.placements[sharded[0]].dim, mesh.get_group(sharded[0])  # type: ignore[attr-defined]
    return Holding(name, param, tuple(param.shape), Tile(tuple(offsets), tuple(sizes)), split, group)
