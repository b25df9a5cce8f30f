"""What asks a run to stop: a signal or its time limit. The processes agree on it between steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lrpretrain.errors import EXIT_STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SAME_SIGNAL_S = 5.0
UNMEASURED_ROOM_S = 300.0
TIME_LIMIT = 1000  # a flag beyond all signals


class Guard:
    """Notes the first of the SIGNALS while it is entered, and knows when the time limit comes near.

    A launcher and its process group may both deliver a signal: within 5 s it counts as the same one. A later
    one ends the process at once. A thread sees to it, for the main one may hang in a collective, where Python
    calls no handler. `leave`, where it is set, is what that thread does at the first signal.
    """

    def __init__(self) -> None:
        self.leave: Callable[[int], None] | None = None
        self._signal = 0
        self._deadline: float | None = None
        self._room_s = 0.0
        self._looked: float | None = None
        self._longest_s = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Guard:
        self._ear, self._bell = os.pipe()
        os.set_blocking(self._bell, False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._bell_before = signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._bell_before)
        os.write(self._bell, b"\0")
        self._thread.join()
        os.close(self._ear)
        os.close(self._bell)

    def flag(self) -> int:
        """Return 0, or what asks this process to stop: the number of a signal or TIME_LIMIT.

        The longest time between two calls counts as the time of a step.
        """
        now = time.monotonic()
        self._longest_s = max(self._longest_s, now - (self._looked or now))
        self._looked = now
        if self._signal or self._deadline is None:
            return self._signal
        return TIME_LIMIT if now > self._deadline - self._room_s - 2 * self._longest_s else 0

    def limit(self, seconds: float) -> None:
        """Set the time limit, counted from the start of this process, or of its torchrun."""
        self._deadline = time.monotonic() - _age_s() + seconds
        self._room_s = min(UNMEASURED_ROOM_S, seconds / 10)

    def saved(self, seconds: float) -> None:
        """Note how long a checkpoint took, 0 for unknown: room for the last one before the time limit."""
        self._room_s = 2 * seconds or self._room_s

    def _listen(self) -> None:
        since = 0.0
        while number := os.read(self._ear, 1)[0]:
            if number in SIGNALS and not self._signal:
                self._signal, since = number, time.monotonic()
                if self.leave is not None:
                    self.leave(number)
            elif number in SIGNALS and time.monotonic() - since > SAME_SIGNAL_S:
                os._exit(128 + number)


def reason(flag: int) -> str:
    """Say what a flag stands for."""
    return "time limit" if flag == TIME_LIMIT else signal.Signals(flag).name


def restarted_after_stop(status: dict[str, object]) -> bool:
    """Say whether torchrun restarted this process after a deliberate stop, which it takes for a failure."""
    stopped = status.get("exit_code") == EXIT_STOPPED
    same_launch = launch_id() is not None and status.get("launch_id") == launch_id()
    return stopped and same_launch and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch_id() -> str | None:
    """Return torchrun's id of this launch, or None."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def _age_s() -> float:
    """Return the seconds since this process started, or its torchrun, which may have restarted it."""
    pid = os.getpid() if launch_id() is None else os.getppid()
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    started_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # since boot; field 22 of proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
