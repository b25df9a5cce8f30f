"""The learning rate as a pure function of the step, so that a resume needs no state.

Each schedule starts with a linear warm-up from 0 (the first update has rate 0, as in GaLore's code)
and gives a ratio of the peak rate.

linear          straight down to `min_lr_ratio`
cosine          half a cosine down to `min_lr_ratio` (Loshchilov & Hutter, arXiv 1608.03983)
wsd             warm-up, stable, decay: 1 until the last `decay_steps`, then straight down (arXiv 2404.06395)
cosine_restart  the cosine, with a ramp of `restart_warmup_steps` steps every `restart_every` steps
"""

from __future__ import annotations

import math

from lrpretrain.config import TrainConfig


def lr_ratio(step: int, train: TrainConfig) -> float:
    """Return the ratio of the peak rate for the update after `step` updates (0 … train.steps − 1)."""
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
    cosine = low + (1 - low) * (1 + math.cos(math.pi * progress)) / 2
    if train.schedule == "cosine_restart":
        assert train.restart_every is not None
        after = step % train.restart_every
        if step >= train.restart_every and after < train.restart_warmup_steps:
            return cosine * (after + 1) / (train.restart_warmup_steps + 1)
    return cosine
