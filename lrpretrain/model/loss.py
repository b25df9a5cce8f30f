"""The loss of a language model as a sum over tokens, so that every token counts the same on any layout."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_loss_sum(
    head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, chunk: int = 0
) -> Tensor:
    """Return the summed cross-entropy of the next token, in float32.

    head makes logits (…, v) of states (…, d); hidden (b, l, d); labels (b, l), with -100 where no loss is
    taken. Position i predicts label i + 1. With a `chunk` below b l, logits exist for that many tokens at a
    time, in forward and again in backward, and never for all. All processes need the same b l, since a head
    in shards communicates at every call.
    """

    def loss_sum(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), labels, ignore_index=-100, reduction="sum")

    hidden, labels = hidden.flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    if chunk == 0 or len(labels) <= chunk:
        return loss_sum(hidden, labels)
    chunks = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    sums = [checkpoint(loss_sum, *part, use_reentrant=False, preserve_rng_state=False) for part in chunks]
    return sum(sums[1:], sums[0])
