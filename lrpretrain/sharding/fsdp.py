"""FSDP2: parameters are DTensors, cut along one dimension."""

from __future__ import annotations

import functools

from torch.distributed.tensor import DTensor, Replicate, Shard

from lrpretrain.errors import ConfigError
from lrpretrain.sharding import local
from lrpretrain.sharding.tiles import Holding, Tile, Tiles


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
    if not sharded or mesh.size(sharded[0]) == 1:
        return local.hold(name, param)
    split: int = param.placements[sharded[0]].dim  # type: ignore[attr-defined]
    spread = _spread(tuple(param.shape), split, mesh.size(sharded[0]))
    own, group = spread[mesh.get_local_rank(sharded[0])], mesh.get_group(sharded[0])
    copies = [i for i in range(mesh.ndim) if i not in sharded and mesh.size(i) > 1]
    replicas = mesh.get_group(copies[0]) if copies else None
    return Holding(name, param, tuple(param.shape), own, spread, split, group, replicas=replicas)


@functools.cache
def _spread(shape: tuple[int, ...], dim: int, n_procs: int) -> tuple[Tiles, ...]:
    """Return what each process holds of a tensor cut along `dim` into equal parts, the last ones smaller."""
    size = shape[dim]
    part = -(-size // n_procs)
    spread = []
    for proc in range(n_procs):
        begin, end = min(proc * part, size), min((proc + 1) * part, size)
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = begin, end - begin
        spread.append((Tile(tuple(offsets), tuple(sizes)),))
    return tuple(spread)
