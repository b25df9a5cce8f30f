"""Where the work on a matrix happens, when its tiles lie on several processes.

    aligned   every process works on its own tiles: nothing, or a few vectors, travel in an ordinary step,
              but each process keeps the whole basis
    owner     one process has the whole matrix for the time of the update, and keeps its state: two
              all-to-alls a step for the matrices of a shape and param group (more where they take more than
              a GiB at a time), and state that shrinks with the processes
    seeded    as aligned, with random bases that are drawn anew in every step instead of kept

The choice is a function of shapes and options alone, so that all processes make the same one. The result
does not depend on it, beyond rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lrpretrain.sharding.tiles import Holding

PLACEMENTS = ("auto", "aligned", "owner", "seeded")
# Replicated bases outgrow what sharding saves beyond about this many processes, unless they are narrow.
MANY_PROCS = 16
NARROW = 1 / 16
SLACK = 1.15  # of an even share: so much state a process may get to keep a matrix where most of it lies


def choose(holding: Holding, split_by_rule: int, rank: int, whole: bool) -> tuple[str, str]:
    """Return (placement, reason) for a matrix.

    split_by_rule is the dimension along which a rule can have it split without communication (0 for a
    projection on the right), `whole` says that the rule needs it whole.
    """
    if holding.group is None:
        return "aligned", "not split"
    if whole:
        return "owner", "the rule needs it whole"
    if not holding.even:
        return "owner", "it lies whole on one process, mostly"
    if holding.split != split_by_rule:
        return "owner", "it is split across the projection"
    if len(holding.spread) > MANY_PROCS and rank / min(holding.shape) > NARROW:
        return "owner", f"a basis on each of {len(holding.spread)} processes would outgrow the rest"
    return "aligned", "it is split along the projection"


def assign(holdings: Sequence[Holding], costs: Sequence[float], loads: list[float]) -> list[int]:
    """Return the owner of each matrix among the processes of its group, adding the costs to `loads`.

    The largest costs first, to the process that holds most of the matrix while its load stays within SLACK
    of an even share, else to the one with the least load: no load exceeds the larger of SLACK × an even share
    and an even share + one matrix.
    """
    even = (sum(loads) + sum(costs)) / len(loads)
    owners = [0] * len(holdings)
    for i in sorted(range(len(holdings)), key=lambda i: -costs[i]):
        shares = [sum(tile.numel for tile in tiles) for tiles in holdings[i].spread]
        owner = max(range(len(loads)), key=shares.__getitem__)
        if holdings[i].even or loads[owner] + costs[i] > SLACK * even:
            owner = min(range(len(loads)), key=loads.__getitem__)
        owners[i] = owner
        loads[owner] += costs[i]
    return owners


class Exchange:
    """Brings matrices that lie in tiles to their owners, and back.

    One all-to-all each way, for what does not lie whole on its owner already. All processes of the group must
    call each method together.
    """

    def __init__(self, holdings: Sequence[Holding], owners: Sequence[int]):
        self.group = holdings[0].group
        self.proc = dist.get_rank(self.group)
        self.mine = [i for i, owner in enumerate(owners) if owner == self.proc]
        self._holdings = holdings
        self._home = [
            all(not tiles or proc == owner for proc, tiles in enumerate(h.spread))
            for h, owner in zip(holdings, owners, strict=True)
        ]
        self._travelling: list[list[int]] = [[] for _ in holdings[0].spread]  # to each process
        for i, owner in enumerate(owners):
            if not self._home[i]:
                self._travelling[owner].append(i)

    def gather(self, *kinds: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return, for each kind (gradients, weights …), the matrices that this process owns, whole.

        A kind holds what this process has of every matrix, lying as its holding says. What lies whole here is
        returned as it is, not copied.
        """
        shapes = {i: self._holdings[i].shape for i in self.mine}
        wholes = [
            {
                i: kind[i].view(shape) if self._home[i] else kind[i].new_empty(shape)
                for i, shape in shapes.items()
            }
            for kind in kinds
        ]
        sent = [[kind[i].reshape(-1) for i in which for kind in kinds] for which in self._travelling]
        arriving = self._travelling[self.proc]
        places = [  # from each process: matrix by matrix, kind by kind, tile by tile
            [whole[i][tile.span(0), tile.span(1)] for i in arriving for whole in wholes for tile in tiles[i]]
            for tiles in zip(*(h.spread for h in self._holdings), strict=True)
        ]
        self._swap(sent, places, kinds[0][0])
        return [list(whole.values()) for whole in wholes]

    def scatter(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Return what this process holds of every matrix, each in one dimension, from the owners' wholes."""
        own = dict(zip(self.mine, wholes, strict=True))
        leaving = self._travelling[self.proc]
        sent = [
            [own[i][tile.span(0), tile.span(1)].reshape(-1) for i in leaving for tile in tiles[i]]
            for tiles in zip(*(h.spread for h in self._holdings), strict=True)
        ]
        like = self._holdings[0].weight
        back = [
            like.new_empty(0 if home else sum(tile.numel for tile in h.tiles))
            for h, home in zip(self._holdings, self._home, strict=True)
        ]
        self._swap(sent, [[back[i] for i in which] for which in self._travelling], like)
        return [own[i].view(-1) if self._home[i] and i in own else back[i] for i in range(len(back))]

    def _swap(self, sent: list[list[Tensor]], places: list[list[Tensor]], like: Tensor) -> None:
        """Send tensors to each process, and fill places with what comes from each."""
        if not any(self._travelling):
            return
        flat = torch.cat([like.new_empty(0), *itertools.chain(*sent)])
        sizes = [sum(place.numel() for place in part) for part in places]
        arrived = like.new_empty(sum(sizes))
        dist.all_to_all_single(
            arrived, flat, sizes, [sum(t.numel() for t in part) for part in sent], group=self.group
        )
        begin = 0
        for place in itertools.chain(*places):
            place.copy_(arrived[begin : begin + place.numel()].view(place.shape))
            begin += place.numel()
