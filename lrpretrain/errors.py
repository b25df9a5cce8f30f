"""The errors that a user can meet, each with the exit code of the training process.

Exit codes: 0 finished; 1 a bug of ours; 2 configuration; 3 data; 4 checkpoint; 5 a loss or
gradient that is not finite, or a spike; 75 stopped on a signal or by the time limit, with a
checkpoint saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXIT_STOPPED = 75


class LrpretrainError(Exception):
    """What a user can mend; printed without a traceback."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: the field, its value, the reason and the remedy."""

    field: str
    value: object
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}={self.value!r}: {self.reason}. {self.remedy}."


class Stopped(LrpretrainError):
    """All processes agreed to stop because one of them was asked to; `flag` says by what (train/guard.py)."""

    exit_code = EXIT_STOPPED

    def __init__(self, flag: int):
        super().__init__(flag)
        self.flag = flag


class ConfigError(LrpretrainError, ValueError):
    """A configuration that cannot work: all of its problems at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem | str]):
        self.problems = list(problems)
        lines = "\n".join(f"  - {p}" for p in self.problems)
        many = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(f"{many} in the configuration:\n{lines}")

    def __reduce__(self) -> tuple[type, tuple[list[Problem | str]]]:
        return type(self), (self.problems,)


class DataError(LrpretrainError, ValueError):
    """Text or tokens that are missing or broken."""

    exit_code = 3


class CheckpointError(LrpretrainError, ValueError):
    """A checkpoint that cannot be written or read."""

    exit_code = 4


class DamageError(CheckpointError):
    """A checkpoint whose files are not as they were written."""


class UnsoundError(LrpretrainError, ArithmeticError):
    """A loss or gradient that is not finite, or a loss that is a spike."""

    exit_code = 5
