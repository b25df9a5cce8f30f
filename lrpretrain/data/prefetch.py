"""Threads that read lanes ahead of the step."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from lrpretrain.data.lanes import Item


class _Queue:
    """What was read ahead of a lane. A worker that fills it has it for itself while it is `busy`."""

    def __init__(self, lane: Iterable[Item], goal: int):
        self.lane: Iterator[Item] = iter(lane)
        self.items: deque[Item] = deque()
        self.goal = goal
        self.busy = False
        self.exhausted = False
        self.error: Exception | None = None

    @property
    def lacks(self) -> int:
        """How many items a worker should add now."""
        return 0 if self.busy or self.exhausted or self.error else self.goal - len(self.items)

    def rows(self, want: int) -> int | None:
        """Return how many of `want` rows come before the pass ends; None where it is not known yet."""
        for i, item in enumerate(islice(self.items, want)):
            if item.row is None:
                return i
        return want if len(self.items) >= want else None


class Prefetch:
    """Lanes by number, each read ahead by `ahead` times what is wanted from it, at least `ahead * share`.

    A worker takes the lane that lacks most, reads at most `share` items of it and looks again: no
    lane waits behind another one that is being filled up. Nobody polls: workers sleep while nothing
    lacks, the caller while what it wants is not there. An exception of a lane is kept until
    somebody wants what it stands in the way of.
    """

    def __init__(self, lanes: Mapping[int, Iterable[Item]], *, share: int, ahead: int, workers: int):
        self._share, self._ahead = share, max(ahead, 1)
        self._queues = {n: _Queue(lane, self._ahead * share) for n, lane in lanes.items()}
        self._lock = threading.Lock()
        self._lacking = threading.Condition(self._lock)
        self._filled = threading.Condition(self._lock)
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(max(workers, 1))]
        for thread in self._threads:
            thread.start()

    def count(self, want: dict[int, int], *, wait_s: float) -> dict[int, int] | None:
        """Return how many of the wanted rows each lane has left in its pass.

        Waits until that is known, and raises what kept a lane from being read; returns None where neither
        has happened after `wait_s`.
        """
        until = time.monotonic() + wait_s
        with self._lock:
            for lane, rows in want.items():
                self._queues[lane].goal = self._ahead * max(rows, self._share)
            self._lacking.notify_all()
            for lane, rows in want.items():
                queue = self._queues[lane]
                while queue.rows(rows) is None:
                    left_s = until - time.monotonic()
                    if left_s <= 0:
                        return None
                    if queue.error:
                        raise queue.error
                    self._filled.wait(left_s)
            return {lane: self._queues[lane].rows(rows) or 0 for lane, rows in want.items()}

    def take(self, lane: int) -> Item:
        """Return the next item of a lane, which a count has said is there."""
        with self._lock:
            item = self._queues[lane].items.popleft()
            self._lacking.notify()
        return item

    def close(self) -> None:
        """End the threads; one that is within a document or a download ends after it."""
        with self._lock:
            self._closed = True
            self._lacking.notify_all()
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _work(self) -> None:
        while (queue := self._next_to_fill()) is not None:
            items: list[Item] = []
            error: Exception | None = None
            try:
                for item in islice(queue.lane, self._share):
                    items.append(item)
            except BaseException as e:  # such as a panic in the Rust of a tokenizer
                error = e if isinstance(e, Exception) else RuntimeError(repr(e))
            with self._lock:
                queue.items.extend(items)
                queue.error, queue.busy = error, False
                queue.exhausted = error is None and len(items) < self._share
                self._filled.notify_all()

    def _next_to_fill(self) -> _Queue | None:
        with self._lock:
            while not self._closed:
                queue = max(self._queues.values(), key=lambda q: q.lacks, default=None)
                if queue is not None and queue.lacks > 0:
                    queue.busy = True
                    return queue
                self._lacking.wait()
        return None
