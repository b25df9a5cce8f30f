"""Signals: the first one asks for a stop at the next step, a later one ends the process at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from lrpretrain.errors import EXIT_STOPPED

SAME_SIGNAL_S = 5.0


class Guard:
    """Notes SIGTERM, SIGINT, SIGHUP and SIGUSR1 while it is entered; processes agree on a stop in the loop.

    A launcher and its process group may both deliver a signal: within 5 s it counts as the same one.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Guard:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def wants_stop(self) -> bool:
        """Say whether this process was asked to stop."""
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > SAME_SIGNAL_S:
            os._exit(128 + number)


def restarted_after_stop(status: dict[str, object]) -> bool:
    """Say whether torchrun restarted this process after a deliberate stop, which it takes for a failure."""
    stopped = status.get("exit_code") == EXIT_STOPPED
    same_launch = launch_id() is not None and status.get("launch_id") == launch_id()
    return stopped and same_launch and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch_id() -> str | None:
    """Return torchrun's id of this launch, or None."""
    return os.environ.get("TORCHELASTIC_RUN_ID")
