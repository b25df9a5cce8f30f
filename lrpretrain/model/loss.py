"""The loss of a language model as a sum over tokens, so that every token counts the same on any layout."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of the next token, in float32.

    logits (b, l, v); labels (b, l), with -100 where no loss is taken. Position i predicts label i + 1.
    """
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
