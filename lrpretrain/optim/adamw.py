"""AdamW in the Hugging Face form, which GaLore and its descendants use.

Source: Loshchilov & Hutter, arXiv 1711.05101, with eps added to the root of the second moment
*before* its bias correction, and weight decay last, on the updated weight, with the plain rate:

    m ← β1 m + (1 − β1) g          v ← β2 v + (1 − β2) g²
    w ← w − η_t m / (√v + ε)       η_t = lr √(1 − β2^t) / (1 − β1^t)
    w ← w − lr λ w

torch.optim.AdamW adds eps to the corrected root instead: with the same eps the two differ.
Everything is element-wise: any distribution over processes will do.

`sound` in the options of a group, a bool on the device, says whether a step counts: one that does not leaves
moments and weights as they are, to the bit, whatever its gradients hold, and the host need not know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrpretrain.optim import moments

Group = Mapping[str, Any]
PART = 2**22  # numbers of moments that are converted at a time


def adam_direction(
    g: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], hp: Group
) -> list[Tensor]:
    """Update the moments with the gradients and return m / (√v + ε), each shaped as its gradient.

    Zeros where the step is not sound: the moments, drawn towards themselves, stay.
    """
    beta1, beta2 = hp["betas"]
    if (sound := hp.get("sound")) is None:
        torch._foreach_mul_(exp_avg, beta1)
        torch._foreach_add_(exp_avg, g, alpha=1 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, g, g, 1 - beta2)
    else:
        pairs = zip(g, exp_avg, strict=True), zip(g, exp_avg_sq, strict=True)
        torch._foreach_lerp_(exp_avg, [torch.where(sound, x, m) for x, m in pairs[0]], 1 - beta1)
        squares = [torch.where(sound, x.square(), v) for x, v in pairs[1]]
        torch._foreach_lerp_(exp_avg_sq, squares, 1 - beta2)
        del squares  # no more than two tensors of each gradient's size at a time
    root = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_add_(root, hp["eps"])
    N = list(torch._foreach_div(exp_avg, root))
    del root
    return counted(N, hp)


def counted(changes: list[Tensor], hp: Group) -> list[Tensor]:
    """Return finite changes as they are, and zeros where the step is not sound."""
    sound = hp.get("sound")
    return changes if sound is None else list(torch._foreach_mul(changes, sound.to(changes[0].dtype)))


def decay(w: list[Tensor], hp: Group) -> None:
    """Take lr λ w from every w, in place."""
    if hp["weight_decay"]:
        torch._foreach_add_(w, counted(w, hp), alpha=-hp["lr"] * hp["weight_decay"])


def is_sound(hp: Group) -> bool:
    """Say on the host whether the step counts. Waits for the device."""
    return hp.get("sound") is None or bool(hp["sound"])


def adam(g: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], hp: Group) -> list[Tensor]:
    """Update the moments in `states`, as they are stored, and return m / (√v + ε), each as its gradient."""
    if all(s["exp_avg"].dtype == x.dtype for x, s in zip(g, states, strict=True)):
        return adam_direction(list(g), [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], hp)
    return [_part_by_part(x, s, hp) for x, s in zip(g, states, strict=True)]


def _part_by_part(g: Tensor, s: Mapping[str, Tensor], hp: Group) -> Tensor:
    """Do what `adam` does for a state of another dtype, in the wider one of both."""
    N = torch.empty_like(g)
    for part in _parts(g):
        m, v = (moments.load(s, key, part) for key in moments.KEYS)
        dtype = torch.promote_types(g.dtype, m.dtype)
        m, v = m.to(dtype), v.to(dtype)
        (N[part],) = adam_direction([g[part].to(dtype)], [m], [v], hp)
        for key, moment in zip(moments.KEYS, (m, v), strict=True):
            moments.store(s, key, moment, part, hp.get("sound"))
    return N


def _parts(g: Tensor) -> list[Any]:
    """Return slices of the first dimension, of PART numbers or a little less each, that make up g."""
    if g.dim() == 0:
        return [...]
    height = max(PART * len(g) // max(g.numel(), 1), 1)
    return [slice(i, i + height) for i in range(0, len(g), height)]


def step_sizes(steps: Sequence[int], hp: Group) -> list[float]:
    """Return η_t for each parameter, from its count of updates, this one included."""
    beta1, beta2 = hp["betas"]
    if not hp["correct_bias"]:
        return [hp["lr"]] * len(steps)
    return [hp["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t) for t in steps]


def adamw(w: list[Tensor], g: list[Tensor], state: Sequence[Mapping[str, Tensor]], hp: Group) -> None:
    """Update the tensors `w` in place with their gradients `g`; `state` holds step, exp_avg, exp_avg_sq."""
    for s in state:
        s["step"].add_(1)
    N = adam(g, state, hp)
    torch._foreach_mul_(N, [-eta for eta in step_sizes([int(s["step"]) for s in state], hp)])
    torch._foreach_add_(w, N)
    decay(w, hp)
