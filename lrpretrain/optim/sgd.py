"""SGD with momentum, in torch's form, for comparison.

u ← μ u + g + λ w,   then   w ← w − lr u          without momentum u = g + λ w, and nothing is kept
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lrpretrain.errors import ConfigError
from lrpretrain.optim.adamw import is_sound
from lrpretrain.optim.moments import float_dtype
from lrpretrain.optim.optimizer import ShardedOptimizer
from lrpretrain.sharding import Holding


class SGD(ShardedOptimizer):
    """SGD; `moments` is the dtype that u is stored in, float32 or bfloat16 (None: the parameter's).

    `step_if` waits for the device. Raises ConfigError for a negative rate or weight decay, or a momentum
    outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        moments: str | None = None,
        check_finite: bool = True,
    ):
        if not 0 <= momentum < 1:
            raise ConfigError([f"momentum={momentum!r}: must be in [0, 1)."])
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, moments=moments)
        super().__init__(params, defaults, None, check_finite)

    def _add_regular(self, group: dict[str, Any], holdings: list[Holding]) -> None:
        for h in holdings:
            dtype = float_dtype(group["moments"], h.weight.dtype)
            kept = {"momentum": h.of(torch.zeros_like(h.weight, dtype=dtype))} if group["momentum"] else {}
            self._register(h, kept)
        self._regular.append((group, holdings))

    def _update_regular(self, group: dict[str, Any], ready: list[Holding]) -> None:
        if not is_sound(group):
            return
        for h in ready:
            assert h.grad is not None
            u = h.grad + group["weight_decay"] * h.weight
            if group["momentum"]:
                u = self.state[h.param]["momentum"].mul_(group["momentum"]).add_(u)
            h.weight.sub_(group["lr"] * u)
