"""Low-rank layers and adapters as the plain linear layers that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lrpretrain.errors import CheckpointError
from lrpretrain.model.dora import DoRALinear
from lrpretrain.model.lowrank import LowRankAdapter, LowRankLinear

ROUNDING = 1e-4
"""What merging may change of the logits, relative to their norm: float32 sums in another order (1e-6 for the
LORO layers of llama_350m at their start)."""


@torch.no_grad()
def make_dense(model: nn.Module) -> None:
    """Replace low-rank layers and adapters, PEFT's too, by linear ones in float32, in place.

    Only one layer exists twice at a time.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear | LowRankAdapter | DoRALinear):
            bias = getattr(module.double(), "bias", None)
            linear = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(module.dense().float())
            if bias is not None:
                linear.bias = nn.Parameter(bias.float())
        elif hasattr(module, "base_layer"):
            module.merge(safe_merge=True)  # type: ignore[operator]  # a layer of PEFT, which has no base class
            linear = module.get_base_layer()  # type: ignore[operator]
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)


def check_merged(found: Tensor, expected: Tensor, remedy: str) -> None:
    """Compare logits after and before. Raises CheckpointError where they differ by more than rounding."""
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= ROUNDING:
        raise CheckpointError(
            f"the logits of the merged model differ from the checkpoint's by {difference:.1e} of their norm, "
            f"which is more than rounding ({ROUNDING:.0e}): its numbers are not finite, or too far apart for "
            f"float32. {remedy}."
        )
