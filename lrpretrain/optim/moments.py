"""Adam's moments as they are stored: floats of a dtype of their own, or eight bits a number.

Source: Dettmers et al., arXiv 2110.02861: blocks of numbers, each with a scale, and codes that are spread
over the orders of magnitude (dynamic quantization).

int8: a block is up to 128 numbers along the rank, within one row of R, and its scale the largest of them, in
float32. Rows are whole wherever they lie, so codes do not depend on the sharding, and nothing travels for
them. A code stands for its level times the scale. Levels lie evenly within a decade: 64, 32 … 1 in the seven
decades below 1 for exp_avg (int8: these and their negatives), 128, 64 … 1 in eight for exp_avg_sq (uint8).

Differs from the paper, as columns of R, which come by falling singular value, span decades, in:

- exp_avg_sq is stored by its root √v, which Adam divides by and which spans half the decades.
- What is above zero in √v stays so: else Adam's direction explodes (Li et al., arXiv 2309.01507).
- A number goes up to the next level in that share of the updates that its way from the level below has; in
  which, say multiples of irrationals, by update and column, the same on every process. Rounded to the
  nearest, v would stay where it is: 1 − β2 is a smaller step than half the way between two levels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import EllipsisType

import torch
from torch import Tensor

KINDS = (None, "float32", "bfloat16", "int8")
KEYS = ("exp_avg", "exp_avg_sq")
BLOCK = 128

Rows = slice | Sequence[int] | EllipsisType


def float_dtype(kind: str | None, own: torch.dtype) -> torch.dtype:
    """Return the dtype of a state that stays float: that of its kind; for None and int8 the parameter's."""
    return own if kind in (None, "int8") else getattr(torch, kind)


def stored(kind: str | None, width: int, own: torch.dtype) -> dict[str, tuple[int, torch.dtype]]:
    """Return what is stored of moments `width` numbers wide: its width and dtype, by key."""
    if kind != "int8":
        return {key: (width, float_dtype(kind, own)) for key in KEYS}
    scales = {f"{key}_scale": (-(-width // BLOCK), torch.float32) for key in KEYS}
    return dict(zip(KEYS, [(width, torch.int8), (width, torch.uint8)], strict=True)) | scales


def load(s: Mapping[str, Tensor], key: str, rows: Rows = ...) -> Tensor:
    """Return a moment as floats: the tensor that stores it where that is one, or a new one in float32."""
    x = s[key][rows]
    if f"{key}_scale" not in s:
        return x
    x = dequantised(x, s[f"{key}_scale"][rows])
    return x.square() if key == "exp_avg_sq" else x


def store(
    s: Mapping[str, Tensor], key: str, x: Tensor, rows: Rows = ..., sound: Tensor | None = None
) -> None:
    """Store a moment; for eight bits `s` holds `step` (b,) besides, the updates of each matrix.

    Where the step is not `sound`, x is what is stored already, and eight bits stay as they are.
    """
    if f"{key}_scale" not in s:
        s[key][rows] = x
        return
    x = x.sqrt() if key == "exp_avg_sq" else x
    for name, new in zip((key, f"{key}_scale"), quantised(x, s[key].dtype, s["step"][rows]), strict=True):
        s[name][rows] = new if sound is None else torch.where(sound, new, s[name][rows])


def quantised(x: Tensor, dtype: torch.dtype, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of x (b, m, r), shaped alike, and their scales (b, m, ⌈r / 128⌉); `step` is (b,)."""
    x, L = x.float(), levels(dtype, x.device)
    largest = torch.stack([block.abs().amax(-1) for block in x.split(BLOCK, -1)], -1)
    scale = largest.clamp(max=torch.finfo(torch.float32).max)
    x = x / _spread(torch.where(scale > 0, scale, 1), x.shape[-1])
    below = (torch.bucketize(x, L, out_int32=True) - 1).clamp(0, len(L) - 2)
    share = (x - L[below]) / (L[below + 1] - L[below])
    thresholds = _thresholds(step, x.shape[-1])
    if x.is_cuda:
        thresholds = thresholds.pin_memory()  # else the host would wait for the copy
    codes = below + (share > thresholds.to(x, non_blocking=True)[:, None])
    if dtype == torch.uint8:
        return torch.where(x > 0, codes.clamp(min=1), codes).to(dtype), scale
    return (codes - len(L) // 2).to(dtype), scale


def dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the numbers (b, m, r) that codes and their scales stand for, in float32."""
    L = levels(codes.dtype, codes.device)
    first = len(L) // 2 if codes.dtype == torch.int8 else 0
    return L[codes.int() + first] * _spread(scale, codes.shape[-1])


@functools.cache
def levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what codes stand for in a block of scale 1, rising: those of int8 from −127, of uint8 from 0."""
    decades = 7 if dtype == torch.int8 else 8
    above = [
        10.0 ** (d + 1 - decades) * (0.1 + 0.9 * i / 2**d) for d in range(decades) for i in range(1, 2**d + 1)
    ]
    below = [-level for level in reversed(above)] if dtype == torch.int8 else []
    return torch.tensor([*below, 0.0, *above], device=device)


def _thresholds(step: Tensor, width: int) -> Tensor:
    """Return numbers in [0, 1) for each matrix and column (b, width), even over the updates."""
    columns = torch.arange(width, dtype=torch.float64)
    return (step[:, None] * 0.6180339887498949 + columns * 0.7548776662466927) % 1


def _spread(scale: Tensor, width: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, -1)[..., :width]
