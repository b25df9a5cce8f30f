"""What a matrix rule is to the optimizer that runs it. See optim/galore.py for one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from lrpretrain.optim.adamw import Group
from lrpretrain.sharding.algebra import Matrices
from lrpretrain.sharding.tiles import Tile


class Slot(NamedTuple):
    """A state of a batch of b matrices: stacked, and where one entry lies in its whole."""

    tensor: Tensor
    """(b, …): this process's tile of each matrix's state."""
    shape: tuple[int, ...]
    """Of the whole state of one matrix."""
    tile: Tile


@dataclass(frozen=True)
class Refresh:
    """What a refresh of bases was like, as means over its matrices."""

    matrices: int
    energy: Tensor
    """‖G P‖² / ‖G‖²: how much of the gradient the new basis keeps."""
    overlap: Tensor | None
    """‖P_oldᵀ P‖² / r: how much of the old subspace lies in the new one; None at the first refresh."""
    ms: float


class Rule(Protocol):
    """A rule for batches of equal-shaped matrices. It never asks where they lie."""

    refreshes: list[Refresh]

    def transposed(self, shape: tuple[int, ...], hp: Group) -> bool:
        """Say whether matrices of this shape are handled as their transposes."""

    def state(self, W: Matrices, hp: Group) -> dict[str, Slot]:
        """Return the initial state of a batch, by key."""

    def update(self, W: Matrices, G: Matrices, s: dict[str, Tensor], hp: Group) -> None:
        """Update a batch and its state in place; `s` holds `step` (b,) besides, which the rule advances."""
