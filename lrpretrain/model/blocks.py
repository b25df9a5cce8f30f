"""The blocks of a network, before they are laid out: activations recomputed, code compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from torch.utils import checkpoint

aten = torch.ops.aten
KEPT = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""The costly operations, matmuls and attention, whose results selective checkpointing keeps."""


def of(model: Module) -> list[Module]:
    """Return the blocks that a transformer repeats, the first one first."""
    return list(next(module for module in model.modules() if isinstance(module, ModuleList)))


def recompute(model: Module, mode: Literal["none", "full", "selective"], every: int) -> None:
    """Let every `every`-th decoder block keep its input alone (full), or what KEPT return too (selective).

    The rest is computed again in backward. That happens inside the block's forward: the hooks of engines,
    which stand around it, run once, and parameters keep their names.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here is random
    if mode == "selective":
        options["context_fn"] = partial(checkpoint.create_selective_checkpoint_contexts, KEPT)
    for block in of(model)[::every] if mode != "none" else ():
        block.forward = _checkpointed(block.forward, options)


def _checkpointed(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    def recomputing(*args: Any, **inputs: Any) -> Tensor:  # a frame of our own: the compiler skips torch's
        return checkpoint.checkpoint(forward, *args, **options, **inputs)

    return recomputing


def compile(model: Module) -> None:
    """Compile the decoder blocks in place: they share their code, and parameters keep their names."""
    for block in of(model):
        block.forward = torch.compile(block.forward)
