"""What each process holds of a model's parameters, and which one updates what, before any of it exists.

The same cuts and choices as those of FSDP2, DeepSpeed and the optimizers, from shapes alone:

    FSDP2       as many rows for each process, the last ones fewer; columns where `shard_columns` applies
    ZeRO-1, 2   ranges of two flat buffers: what the rule treats as matrices, and the rest
    ZeRO-3      as many numbers of each parameter, the last processes fewer
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lrpretrain.config import Config
from lrpretrain.engine import ds_config
from lrpretrain.model import llama
from lrpretrain.optim import groups
from lrpretrain.optim.galore import side_of
from lrpretrain.sharding import Holding, Tile, Tiles
from lrpretrain.sharding.placement import choose
from lrpretrain.sharding.tiles import cut

SHARDED: Any = object()  # stands for the process group

Amounts = npt.NDArray[Any]
"""A number for each of the N processes that share the weights."""


@dataclass
class Matrix:
    """A matrix of a rule, (m, n) and projected to (m, r) as the rule sees it."""

    holding: Holding
    rank: int
    transposed: bool
    at_owner: bool
    owner: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.holding.shape[::-1] if self.transposed else self.holding.shape

    @property
    def across(self) -> bool:
        """Whether the cut runs across the projection: no process has a whole row of the (m, n)."""
        return self.holding.split == (0 if self.transposed else 1)

    @functools.cached_property
    def shared(self) -> int:
        """The lines of which no process has all, because a flat buffer is cut within them."""
        dim = self.holding.split or 0
        width = self.holding.shape[1 - dim]
        tiles = itertools.chain.from_iterable(self.holding.spread)
        return len({tile.offsets[dim] for tile in tiles if tile.sizes[1 - dim] < width})


class Layout:
    """The parameters of `model` on N of the `n_procs` processes, which share the weights.

    The configuration must have no problems; `model` is its own (`model.llama.configured`), without memory.
    """

    def __init__(self, config: Config, model: nn.Module, n_procs: int):
        self.optim, self.engine, self.n_procs = config.optim, config.engine, n_procs
        self.stage = ds_config.stage(config) if self.engine.kind == "zero" else 0
        self.ds = ds_config.load(config, n_procs) if self.stage else {}
        # DeepSpeed's choice for float32 gradients of bfloat16 weights at stage 1.
        wide = self.stage == 1 and self.ds["data_types"]["grad_accum_dtype"] == "fp32"
        self.bf16_optimizer = wide and config.precision.compute == "bfloat16"
        self.N = {"fsdp": n_procs // self.engine.replicas, "zero": n_procs}.get(self.engine.kind, 1)

        params = dict(model.named_parameters())
        self.shapes = llama.shapes(model)
        self.trained = [name for name, p in params.items() if p.requires_grad]
        self.projected = groups.projected(self.shapes, self.optim)
        spreads = dict(self._spreads()) if self.N > 1 else {}
        self.holdings = {}
        for name, shape in self.shapes.items():
            split, spread = spreads.get(name, (None, ()))
            where = (spread, split, SHARDED if spread else None, self.stage not in (1, 2))
            self.holdings[name] = Holding(name, params[name], shape, (Tile.whole(shape),), *where)
        self.held = {name: self.along(h) for name, h in self.holdings.items()}

    def along(self, h: Holding, dim: int | None = None) -> Amounts:
        """Return how many numbers of a parameter each process has, or lines along a dimension."""
        if dim is not None and dim != h.split:
            return np.full(self.N, h.shape[dim])
        spread = h.spread or (h.tiles,) * self.N
        return np.array([sum(t.numel if dim is None else t.sizes[dim] for t in tiles) for tiles in spread])

    def own(self, names: Iterable[str]) -> Amounts:
        """Return how many numbers of the parameters each process has."""
        return sum((self.held[name] for name in names), np.zeros(self.N, np.int64))

    def whole(self, names: Iterable[str]) -> Amounts:
        """Return how many numbers the parameters have, for each process."""
        return np.full(self.N, sum(math.prod(self.shapes[name]) for name in names))

    def batches(self) -> Iterator[list[list[Matrix]]]:
        """Yield for each rank the matrices that the rule projects, together those that are updated together.

        Owners are left to the caller, who knows how much state each would keep.
        """
        if self.optim.rule not in groups.PROJECTED:
            return
        ranks = groups.projection_ranks({name: self.shapes[name] for name in self.trained}, self.optim)
        for rank in sorted(set(ranks.values())):
            batches = defaultdict[Any, list[Matrix]](list)
            for h in (self.holdings[name] for name in ranks if ranks[name] == rank):
                x = self._matrix(h, rank)
                batches[h.shape, h.split, x.at_owner or h.spread].append(x)
            yield list(batches.values())

    def _matrix(self, h: Holding, rank: int) -> Matrix:
        optim = self.optim
        transposed = side_of(h.shape, optim.side) == "left"
        place = choose(h, int(transposed), rank, optim.side == "full" or optim.subspace == "svd")[0]
        if optim.placement != "auto" and h.group is not None:
            place = optim.placement
        return Matrix(h, rank, transposed, place == "owner")

    def _spreads(self) -> Iterator[tuple[str, tuple[int, tuple[Tiles, ...]]]]:
        """Yield the dimension along which each parameter is cut, and what each process has of it."""
        if self.stage in (1, 2):
            for name, ends in self._in_buffers():
                yield name, (0, tuple(cut(self.shapes[name], *pair) for pair in itertools.pairwise(ends)))
            return
        columns = groups.projected_on_the_left(self.shapes, self.optim) if self.engine.shard_columns else ()
        for name, shape in self.shapes.items():
            if self.stage == 0 and name in columns and shape[1] % self.N == 0:
                width = shape[1] // self.N
                yield name, (1, tuple((Tile((0, k * width), (shape[0], width)),) for k in range(self.N)))
            else:
                yield name, (0, _evenly(shape, 1 if self.stage == 3 else math.prod(shape[1:]), self.N))

    def _in_buffers(self) -> Iterator[tuple[str, list[int]]]:
        """Yield where ZeRO-1 and 2 cut each parameter."""
        robin = self.ds["zero_optimization"].get("round_robin_gradients") and not self.bf16_optimizer
        for kind in (False, True):
            names = [name for name in self.trained if (name in self.projected) == kind]
            if robin:
                names = [name for first in range(self.N) for name in names[first :: self.N]]
            numels = [math.prod(self.shapes[name]) for name in names]
            part = -(-sum(numels) // (2 * self.N)) * 2  # the buffer is padded to a multiple of 2 N
            for name, numel, end in zip(names, numels, itertools.accumulate(numels), strict=True):
                yield name, [min(max(k * part - end + numel, 0), numel) for k in range(self.N + 1)]


@functools.cache
def _evenly(shape: tuple[int, ...], line: int, n_procs: int) -> tuple[Tiles, ...]:
    """Return the tiles of each process: as many lines of so many numbers, the last processes fewer."""
    numel = math.prod(shape)
    part = -(-numel // (line * n_procs)) * line
    return tuple(cut(shape, min(k * part, numel), min((k + 1) * part, numel)) for k in range(n_procs))
