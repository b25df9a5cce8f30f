"""What a matrix rule is to the optimizer that runs it. See optim/galore.py for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from lrpretrain.optim.adamw import Group
from lrpretrain.sharding import Tile, Tiles
from lrpretrain.sharding.algebra import Matrices


class Slot(NamedTuple):
    """A state of a batch of b matrices: stacked, and where one entry lies in its whole."""

    tensor: Tensor
    """(b, …): what this process has of each matrix's state."""
    shape: tuple[int, ...]
    """Of the whole state of one matrix."""
    tiles: Tiles

    @classmethod
    def whole(cls, tensor: Tensor) -> Slot:
        """Return a state that every process holds whole."""
        shape = tuple(tensor.shape[1:])
        return cls(tensor, shape, (Tile.whole(shape),))


@dataclass(frozen=True)
class Refresh:
    """What a refresh of the bases of some matrices was like."""

    names: Sequence[str]
    energy: Tensor
    """(b,) ‖G P‖² / ‖G‖²: how much of the gradient the new basis keeps."""
    overlap: Tensor | None
    """(b,) ‖P_oldᵀ P‖² / r: how much of the old subspace lies in the new one; None at the first refresh."""
    ms: float


class Rule(Protocol):
    """A rule for batches of equal-shaped matrices. It never asks where they lie."""

    refreshes: list[Refresh]
    reads_weights: bool
    """Whether `update` looks at W, rather than only adding to it."""
    whole_only: bool
    """Whether the parameters, those of groups without a rank too, must not be cut among processes."""
    decays: bool
    """Whether `update` decays W itself; else the optimizer does after it, with the plain rate."""

    def transposed(self, shape: tuple[int, ...], hp: Group) -> bool:
        """Say whether matrices of this shape are handled as their transposes."""

    def needs_whole(self, hp: Group) -> bool:
        """Say whether the update takes the gradient whole, so that tiles would have to be gathered."""

    def state(self, W: Matrices, hp: Group) -> dict[str, Slot]:
        """Return the initial state of a batch, by key."""

    def update(self, W: Matrices, G: Matrices, s: dict[str, Tensor], hp: Group) -> None:
        """Update a batch and its state in place; `s` holds `step` (b,) besides, which the rule advances."""
