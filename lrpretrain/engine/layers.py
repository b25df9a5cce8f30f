"""Updates layer by layer: in the backward, so that the gradients of one decoder block exist at a time.

Source: Lv et al., arXiv 2306.09782 (LOMO), and Zhao et al., arXiv 2403.03507 (GaLore), section 4.3. The unit
is a decoder block, all matrices of which are updated together; parameters outside of the blocks are units of
their own. A unit is updated by the same rule as ever, once its gradients are complete: in the backward of a
step's last micro-batch, under FSDP2 after its reduce-scatter. With several micro-batches gradients are kept
up to the last one.

What is known of a whole step only when its backward is over cannot decide about it:

    clipping    by the norm of the last sound step's gradient; there is none before the first one, which is
                not clipped
    soundness   the loss decides about the step, before its last backward; the gradient of a unit, if it is
                not finite, about that unit, when others may have been updated

Units are updated one after the other, each with the waits and exchanges of an update of its own: at owners a
refresh decomposes no more matrices at a time than a block has. The time of updates, measured in the backward,
contains waits for what that sends.

Differs from the authors' code in: one step, and one turn of the schedule, for all micro-batches together;
clipping, which theirs leaves out; FSDP2; checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from lrpretrain.engine.later import Stopwatch
from lrpretrain.optim import ShardedOptimizer
from lrpretrain.sharding import Holding


def unit_of(name: str) -> str:
    """Return the decoder block that a parameter belongs to, or the parameter's own name."""
    block = re.match(r".*\blayers?\.\d+\.", name)
    return block[0] if block else name


def total_norm(params: Iterable[Tensor]) -> Tensor:
    """Return the norm () of all gradients together. Communicates it where they are sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, torch.distributed.tensor.DTensor) else norm


class Layers:
    """Updates units of a model between `begin`, before the last backward of a step, and `end`, after it.

    The gradient of every parameter must arrive in that backward, on all processes in the same order; each
    unit takes a scalar all-reduce where it is sharded. `norm` () is what clips: 0 where none is known.
    """

    def __init__(self, holdings: Sequence[Holding], optimizer: ShardedOptimizer, device: torch.device):
        self.norm = torch.zeros((), device=device)
        self._optimizer = optimizer
        self._units: dict[str, list[Tensor]] = {}
        self._missing: dict[str, int] = {}  # gradients to come, while units are updated
        self._norms: list[Tensor] = []
        for h in holdings:
            if h.param.requires_grad:
                self._units.setdefault(unit_of(h.name), []).append(h.param)
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._arrived, unit))
            for unit, params in self._units.items()
            for param in params
        ]

    def close(self) -> None:
        """Let the parameters go: torch keeps what their hooks refer to, where Python finds no circle."""
        for hook in self._hooks:
            hook.remove()

    def begin(self, loss: Tensor, fine: Tensor, clip_norm: float | None, watch: Stopwatch) -> None:
        """Update what becomes complete from here on, if the loss is `fine`, a bool (); time it."""
        self._loss, self._fine, self._clip_norm, self._watch = loss, fine, clip_norm, watch
        self._missing = {unit: len(params) for unit, params in self._units.items()}

    def end(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, the norm of the raw gradient, and whether that is finite and the loss was fine."""
        assert not any(self._missing.values()), "a parameter has no gradient"
        self._missing = {}
        norm = torch.linalg.vector_norm(torch.stack(self._norms))
        self._norms = []
        sound = self._fine & norm.isfinite()
        self.norm = torch.where(sound, norm, self.norm)
        return self._loss, norm, sound

    @torch.no_grad()
    def _arrived(self, unit: str, _: Tensor) -> None:
        if unit not in self._missing:
            return  # in another micro-batch than the last
        self._missing[unit] -= 1
        if self._missing[unit]:
            return
        params = self._units[unit]
        with self._watch:
            norm = total_norm(params).float()
            if self._clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(params, self._clip_norm, self.norm)
            self._optimizer.step_if(self._fine & norm.isfinite(), params)
            for param in params:
                param.grad = None
        self._norms.append(norm)
