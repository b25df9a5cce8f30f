"""The learning rate as a pure function of the step, so that a resume needs no state.

Each schedule gives a ratio of the peak rate. The first ones start with a linear warm-up from 0 (the first
update has rate 0, as in GaLore's code):

linear    straight down to `min_lr_ratio`
cosine    half a cosine down to `min_lr_ratio` (Loshchilov & Hutter, arXiv 1608.03983)
wsd       warm-up, stable, decay: 1 until the last `decay_steps`, then straight down (arXiv 2404.06395)

Those of LORO's script (openreview i0zzO7Hslk) have a ramp of `restart_warmup_steps` steps after every refresh
of the moments, and a cosine that is late by `peak_delay_steps`, so that the warm-up ends on its way up:

cosine_restart         warm-up from `min_lr_ratio`, ramps from 1e-6
cosine_restart_zero    warm-up from 0, ramps from a tenth of the rate

Differs from the script in: ramps begin where refreshes are. There both are counted apart after the warm-up,
where the ramps lie `peak_delay_steps` later, and the first refreshes have none (`restart_at=compat`).
"""

from __future__ import annotations

import math

from lrpretrain.config import TrainConfig

RESTARTING = ("cosine_restart", "cosine_restart_zero")


def lr_ratio(step: int, train: TrainConfig) -> float:
    """Return the ratio of the peak rate for the update after `step` updates (0 … train.steps − 1)."""
    if train.schedule in RESTARTING:
        return _restarting(step, train)
    if step < train.warmup_steps:
        return step / train.warmup_steps
    progress = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    low = train.min_lr_ratio
    if train.schedule == "linear":
        return 1 - (1 - low) * progress
    if train.schedule == "wsd":
        decay = train.decay_steps or min(max(train.steps // 5, 1), train.steps - train.warmup_steps)
        left = train.steps - step
        return 1.0 if left >= decay else low + (1 - low) * left / decay
    return low + (1 - low) * _wave(progress)


def _restarting(step: int, train: TrainConfig) -> float:
    """Return the late cosine, or the ramp up to where it was when the ramp began."""
    assert train.restart_every is not None
    late = train.restart_at == "compat" and step >= train.warmup_steps
    counted = step - train.peak_delay_steps if late else step
    after = counted % train.restart_every
    ramps = counted >= train.restart_every and after < train.restart_warmup_steps
    if not ramps or (step - after < train.warmup_steps and not train.restart_in_warmup):
        return _late_cosine(step, train)
    top = _late_cosine(step - after, train)
    bottom = 1e-6 if train.schedule == "cosine_restart" else 0.1 * top
    return bottom + (top - bottom) * after / train.restart_warmup_steps


def _late_cosine(step: int, train: TrainConfig) -> float:
    low, warmup, span = train.min_lr_ratio, train.warmup_steps, train.steps - train.warmup_steps
    if step >= warmup:
        return low + (1 - low) * _wave((step - train.peak_delay_steps - warmup) / max(span, 1))
    first = low if train.schedule == "cosine_restart" else 0.0
    last = _wave(-train.peak_delay_steps / max(span, 1))  # a little below the cosine, as in the script
    return first + (last - first) * step / warmup


def _wave(x: float) -> float:
    """Return half a cosine from 1 (x = 0) to 0 (x = 1)."""
    return (1 + math.cos(math.pi * x)) / 2
