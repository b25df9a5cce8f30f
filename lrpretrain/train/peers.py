"""A process that dies takes the others with it at once, wherever they hang by then."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from lrpretrain.errors import LrpretrainError
from lrpretrain.sharding.procs import Procs

GOODBYE = -1
BEHIND_S = 60.0


class Peers:
    """While it is entered, a thread of each process listens to the next one, in a ring of gloo connections.

    One that ends in good order says goodbye. One whose connection breaks without is dead: its number goes
    round the ring, and all others end with exit code 1, after process 0 (process 1 for want of it) has
    called `report` with it. NCCL, and nodes whose launcher sees no failure of its own, would else wait for
    engine.timeout_s. Entering is collective.
    """

    def __init__(self, procs: Procs, report: Callable[[int], None]):
        self._procs, self._report = procs, report
        self._closed = threading.Event()

    def __enter__(self) -> Peers:
        if self._procs.n_procs > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._procs.n_procs == 1:
            return
        if kind is None or issubclass(kind, LrpretrainError):
            self._closed.set()
            self._tell(GOODBYE)
            self._thread.join(5.0)
        else:
            self._thread.join(1.0)  # a collective that failed because of a death: that is what to report
            self._closed.set()

    def _listen(self) -> None:
        following = (self._procs.proc + 1) % self._procs.n_procs
        said = torch.tensor([following])
        with contextlib.suppress(RuntimeError):  # the connection broke
            dist.recv(said, following, group=self._group)
        dead = int(said)
        if dead == GOODBYE:  # the end is near for this process too, unless it hangs for want of the other
            self._closed.wait(BEHIND_S)
            dead = following
        if not self._closed.is_set():
            self._tell(dead)
            try:
                if self._procs.proc == (1 if dead == 0 else 0):
                    self._report(dead)
            finally:
                os._exit(1)

    def _tell(self, what: int) -> None:
        before = (self._procs.proc - 1) % self._procs.n_procs
        with contextlib.suppress(RuntimeError):
            dist.send(torch.tensor([what]), before, group=self._group)
