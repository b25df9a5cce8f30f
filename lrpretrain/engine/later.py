"""What the device will have done: numbers and times that the host asks for now and reads later."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Later:
    """A vector of the device, on its way to the host."""

    def __init__(self, values: Tensor):
        # Where the device is the host itself, a copy, which what comes after cannot change.
        self._values = values.to("cpu", non_blocking=True, copy=True)
        self._there = torch.cuda.Event() if values.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self) -> list[float]:
        """Return the numbers; wait for what the device had to do up to them, not for what came after."""
        if self._there is not None:
            self._there.synchronize()
        return [float(value) for value in self._values]


class Stopwatch:
    """Time that the device takes for what stands under `with`, all together."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._times: list[Any] = []

    def __enter__(self) -> None:
        self._times.append(self._now())

    def __exit__(self, *_: object) -> None:
        self._times.append(self._now())

    def ms(self) -> float:
        """Return milliseconds; wait until the device has come to the end."""
        pairs = list(zip(self._times[::2], self._times[1::2], strict=True))
        if not self._cuda:
            return sum(ended - began for began, ended in pairs) * 1e3
        self._times[-1].synchronize()
        return float(sum(began.elapsed_time(ended) for began, ended in pairs))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
