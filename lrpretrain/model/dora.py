"""DoRA layers, which GradNormLoRP's paper trains: frozen weights, a low-rank change, learned magnitudes.

Source: Huang et al., arXiv 2412.19616, after Liu et al., arXiv 2402.09353, equation 5:

    W = M (W0 + s B A) / ‖W0 + s B A‖       ‖·‖ (m) of the rows, one for each output unit; s = α / r

W0 (m, n) is frozen; M (m), B (m, r) and A (r, n) are trained. The norm is not formed from W0 + s B A but by

    ‖W0 + s B A‖² = ‖W0‖² + 2 s ⟨W0 Aᵀ, B⟩ + s² ⟨B A Aᵀ, B⟩     row by row,

so that no (m, n) temporary is kept for the backward pass.

Differs from the authors' code, which wraps models by PEFT, in: the gradient goes through the norm (PEFT takes
it for a constant); no dropout, which no resume could repeat.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST = 1e-12  # norm of a row: one of zeros, whose magnitude is 0, stays as it is


class DoRALinear(nn.Module):
    """A linear layer x Wᵀ (+ bias) that takes over a dense one; at first W is its weight W0.

    Parameters: weight W0 (m, n) and bias, frozen; magnitude M (m), lora_A (r, n), lora_B (m, r).
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank, self.scale = rank, alpha / rank
        self.weight, self.bias = linear.requires_grad_(False).weight, linear.bias
        self.magnitude = nn.Parameter(self.weight.new_empty(linear.out_features))
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        if not self.weight.is_meta:
            with torch.no_grad():
                self.magnitude.copy_(row_norms(self.weight))
                self.lora_A.normal_(std=initial_A_std(linear.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ (+ bias), (…, m) for x (…, n)."""
        # Under ZeRO-3 x @ W.T would keep the gathered weight until the backward pass, which takes the norm
        # first: what is formed last.
        y = F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)
        y = y * (self.magnitude / self.norm()).to(y.dtype)
        return y if self.bias is None else y + self.bias

    def norm(self) -> Tensor:
        """Return ‖W0 + s B A‖ of every row (m), in float32 or better."""
        W, A, B, s = self.weight, self.lora_A, self.lora_B, self.scale
        norm = row_norms(W)
        cross = (F.linear(W, A).to(norm.dtype) * B).sum(1)
        square = ((B @ (A @ A.T)).to(norm.dtype) * B).sum(1)
        return (norm.square() + 2 * s * cross + s**2 * square).clamp_min(SMALLEST**2).sqrt()

    def dense(self) -> Tensor:
        """Return the weight that the layer stands for, (m, n)."""
        W = self.weight + self.scale * self.lora_B @ self.lora_A
        return W * (self.magnitude / self.norm()).to(W.dtype)[:, None]

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank={self.rank}, scale={self.scale:g}"


def row_norms(W: Tensor) -> Tensor:
    """Return the norm of every row (m), in float32 or better."""
    return torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32))


def initial_A_std(n: int) -> float:
    """Return the standard deviation of an initial A (r, n), which is PEFT's."""
    return 1 / math.sqrt(3 * n)


def adapt(model: nn.Module, names: Iterable[str], rank: int, alpha: float) -> None:
    """Freeze a model and replace linear layers by DoRA layers, in place; `names` are their weights'."""
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, child, DoRALinear(getattr(module, child), rank, alpha))
