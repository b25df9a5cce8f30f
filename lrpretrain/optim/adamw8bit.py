"""AdamW with moments of eight bits, without a projection, for comparison.

The rule is that of optim/adamw.py, the storage that of optim/moments.py: blocks lie within rows of a matrix.
Dettmers et al., arXiv 2110.02861, cut the flattened tensor instead.
"""

from __future__ import annotations

from typing import Any

import torch

from lrpretrain.optim.adamw import adam, decay, step_sizes
from lrpretrain.optim.moments import stored
from lrpretrain.optim.optimizer import AdamW, require_whole
from lrpretrain.sharding import Holding, Piece


class AdamW8bit(AdamW):
    """AdamW, with eight-bit moments for matrices and the parameter's dtype for vectors.

    Supported: whole tensors (one process, DDP). Raises ConfigError for sharded ones.
    """

    def _add_regular(self, group: dict[str, Any], holdings: list[Holding]) -> None:
        require_whole(holdings, "AdamW8bit")
        matrices = [h for h in holdings if len(h.shape) == 2]
        super()._add_regular(group, [h for h in holdings if len(h.shape) != 2])
        for h in matrices:
            m, n = h.shape
            moments = {
                key: torch.zeros(m, width, dtype=dtype, device=h.weight.device)
                for key, (width, dtype) in stored("int8", n, h.weight.dtype).items()
            }
            state = {"step": torch.zeros((), dtype=torch.int64)} | moments
            self._register(h, {key: Piece.whole(tensor) for key, tensor in state.items()})
        self._regular.append((group, matrices))

    def _update_regular(self, group: dict[str, Any], ready: list[Holding]) -> None:
        super()._update_regular(group, [h for h in ready if len(h.shape) != 2])
        for h in (h for h in ready if len(h.shape) == 2):
            assert h.grad is not None
            s = {key: tensor[None] for key, tensor in self.state[h.param].items()}
            s["step"] += 1
            (N,) = adam([h.grad[None]], [s], group)
            (eta,) = step_sizes(s["step"].tolist(), group)
            h.weight.sub_(eta * N[0])
            decay([h.weight], group)
