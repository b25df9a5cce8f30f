"""Whose turn it is: the plan of the batches, which every process makes for itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from lrpretrain.errors import DataError


@dataclass
class Turns:
    """Lanes give one sequence after another, round after round; where the pass ends for a lane, its
    turns go to the others, and where it has ended for all, the next pass begins with lane 0."""

    lanes: int
    epochs: int | None = None
    epoch: int = 0
    turn: int = 0
    given: int = 0  # sequences of this pass so far
    is_open: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_open = self.is_open or [True] * self.lanes

    @property
    def ended(self) -> bool:
        """Whether the last pass is over."""
        return self.epoch == self.epochs

    @property
    def pass_is_over(self) -> bool:
        return not any(self.is_open)

    def want(self, need: int) -> list[int]:
        """Return how many of the next `need` sequences each lane gives, unless a pass ends before."""
        order = [(self.turn + i) % self.lanes for i in range(self.lanes)]
        opened = [lane for lane in order if self.is_open[lane]]
        counts = [0] * self.lanes
        for i, lane in enumerate(opened):
            counts[lane] = (need - i + len(opened) - 1) // len(opened)
        return counts

    def take(self, need: int, have: list[int]) -> tuple[list[int], list[int]]:
        """Pass on the turn; return the lanes of the next sequences, at most `need`, and those that closed.

        ``have[lane]`` is how many of ``want(need)[lane]`` are left in the lane's pass: one that has
        less closes at its turn. Stops early where a lane has given all that was asked after, or where
        the pass is over for all.
        """
        want, left = self.want(need), list(have)
        taken: list[int] = []
        closed: list[int] = []
        while len(taken) < need and not self.pass_is_over:
            lane = self.turn
            if left[lane]:
                left[lane] -= 1
                taken.append(lane)
            elif self.is_open[lane] and have[lane] == want[lane]:
                break
            elif self.is_open[lane]:
                self.is_open[lane] = False
                closed.append(lane)
            self.turn = (lane + 1) % self.lanes
        self.given += len(taken)
        return taken, closed

    def begin_pass(self) -> None:
        """Open all lanes again. Raises DataError where the pass had nothing: it would go on for ever."""
        if not self.given:
            raise DataError(
                "a whole pass over the data gave not a single sequence. Give data.path more text, "
                "or lower data.lanes or data.seq_len."
            )
        self.epoch, self.turn, self.given = self.epoch + 1, 0, 0
        self.is_open = [True] * self.lanes
