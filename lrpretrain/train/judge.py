"""Whether a loss is one to learn from, decided on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 0.03  # of the mean: the least that a standard deviation counts as


class Judge:
    """Tells spikes: losses more than `sigmas` standard deviations above the mean of the last `window` ones.

    A standard deviation counts as at least 3 % of the mean. What is not finite is never fine; nothing is a
    spike before there are `window` losses, or with 0 sigmas. Every process must see the same losses.
    """

    def __init__(self, window: int, sigmas: float, device: torch.device, losses: Sequence[float] = ()):
        self._sigmas = sigmas
        first = [math.nan] * (window - len(losses))  # so that the mean is none before there are enough
        self._losses = torch.tensor([*first, *losses[-window:]], dtype=torch.float32, device=device)

    def __call__(self, loss: Tensor) -> Tensor:
        """Return whether a loss () is fine, as a bool (); one that is joins the window. The host goes on."""
        std, mean = torch.std_mean(self._losses)
        spike = loss > mean + self._sigmas * torch.maximum(std, FLOOR * mean)
        fine = loss.isfinite() & ~spike if self._sigmas else loss.isfinite()
        self._losses = torch.where(fine, torch.cat([self._losses[1:], loss.float()[None]]), self._losses)
        return fine

    def losses(self) -> list[float]:
        """Return the losses of the window that there are, the oldest first."""
        return [loss for loss in self._losses.tolist() if not math.isnan(loss)]
