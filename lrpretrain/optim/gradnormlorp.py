"""GradNormLoRP: the weight-normalised low-rank projection of the gradient.

Source: Huang et al., arXiv 2412.19616 (AAAI 2025); weight normalisation after Salimans & Kingma, arXiv
1602.07868, equations 2 and 3; the projection as in optim/galore.py.

Mode `weightnorm`. Every output unit (row of W) has a magnitude g and a direction v (n), W = g v / ‖v‖:

    ∇g = ⟨G, v⟩ / ‖v‖                      ∇v = g/‖v‖ (G − ∇g v/‖v‖)     (tangential: ⟨∇v, v⟩ = 0)
    R = ∇v P,  N Adam's direction for R     v ← v − η_t α N Pᵀ
    n Adam's direction for ∇g               g ← g − η_t n
    W ← g v / ‖v‖,   then   W ← W − lr λ W and g ← g − lr λ g

W is the storage of v, which costs two vectors a matrix (magnitude, norm) and the moments of one, no copy
of W. A row that is zero at first has no direction; it is trained by plain GaLore (its norm stays 0).

Differs from the authors' code, of which the README's `weight_norm_galore_adamw` never changes a weight and
`LowRankWeightNormAdamW` overwrites the magnitude at each step and drops the tangential part, in: the
magnitude is persistent, the gradients are those of the paper's source, zero rows do not become NaN. Vectors
(norms, biases) and unprojected matrices are plain AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lrpretrain.errors import ConfigError
from lrpretrain.optim.adamw import Group, adam_direction, step_sizes
from lrpretrain.optim.galore import GaLore, projection_defaults
from lrpretrain.optim.optimizer import ShardedOptimizer
from lrpretrain.optim.rule import Slot
from lrpretrain.sharding.algebra import Matrices
from lrpretrain.sharding.tiles import Tile

SMALLEST = 1e-18  # of a magnitude: W keeps a direction only as long as it is not zero


class WeightNorm(GaLore):
    """The rule in its mode `weightnorm`."""

    def state(self, W: Matrices, hp: Group) -> dict[str, Slot]:
        """Return GaLore's state, and magnitude, norm and the magnitude's moments, a number for each row."""
        dim = _along(W)
        norm = W.dot(W, dim).sqrt()
        at = 1 - dim
        shape, tile = (W.shape[at],), Tile((W.tile.offsets[at],), (W.tile.sizes[at],))
        vectors = {"magnitude": norm, "norm": norm.clone()}
        vectors |= {f"magnitude_{key}": torch.zeros_like(norm) for key in ("exp_avg", "exp_avg_sq")}
        return super().state(W, hp) | {key: Slot(vector, shape, tile) for key, vector in vectors.items()}

    def update(self, W: Matrices, G: Matrices, s: dict[str, Tensor], hp: Group) -> None:
        """Update a batch of matrices and its state in place. All processes that hold a tile must call it."""
        dim = _along(W)
        g, norm = s["magnitude"], s["norm"]
        live = norm > 0
        grad_g = torch.where(live, G.dot(W, dim) / g, 0)  # W / g = v / ‖v‖
        stretch = torch.where(live, g / norm, 1)
        radial = torch.where(live, grad_g / g, 0)  # ∇v = stretch (G − radial W)
        for due in self._due(s, hp):
            self._refresh(_tangent(G[due], W[due], stretch[due], radial[due], dim), s, due, hp)
        s["step"] += 1
        s["age"] += 1

        P = s["basis"]
        if dim == 1:
            R = stretch[..., None] * (G @ P - radial[..., None] * (W @ P))  # (b, m', r)
        else:
            R = G.matmul(P, stretch) - W.matmul(P, stretch * radial)
        (N,) = adam_direction([R.to(P)], [s["exp_avg"]], [s["exp_avg_sq"]], hp)
        moments = [s["magnitude_exp_avg"]], [s["magnitude_exp_avg_sq"]]
        (n,) = adam_direction([grad_g], *moments, hp)
        etas = step_sizes(s["age"].tolist(), hp)

        W.stretch(1 / stretch, dim)  # now W holds v
        W.add_lowrank(N, P, [-eta * hp["scale"] for eta in etas])
        moved = W.dot(W, dim).sqrt()
        g -= torch.tensor(etas, dtype=g.dtype, device=g.device)[:, None] * n * live
        g.copy_(torch.where(g.abs() < SMALLEST, torch.copysign(torch.full_like(g, SMALLEST), g), g))
        norm.copy_(torch.where(live, moved, 0))
        W.stretch(torch.where(live, g / moved, 1), dim)
        W.scale(1 - hp["lr"] * hp["weight_decay"])
        g *= 1 - hp["lr"] * hp["weight_decay"]


def _along(W: Matrices) -> int:
    """Return the dimension along which an output unit lies: its row, a column where W stands transposed."""
    return 0 if W.transposed else 1


def _tangent(G: Matrices, W: Matrices, stretch: Tensor, radial: Tensor, dim: int) -> Matrices:
    """Return ∇v = stretch (G − radial W) as matrices of their own."""
    pairs = zip(G.tensors, W.tensors, radial, strict=True)
    tangent = G.like([Gi - r.to(Wi).unsqueeze(dim) * Wi for Gi, Wi, r in pairs])
    tangent.stretch(stretch, dim)
    return tangent


class GradNormLoRPAdamW(ShardedOptimizer):
    """GradNormLoRP with AdamW: GaLore on the directions of the output units, and learned magnitudes.

    Takes the param groups and options of `GaLoreAdamW` but for `proj_type` full; groups without a `rank` are
    plain AdamW. Build it on the weights that training starts from: the magnitudes are theirs.

    Supported: plain tensors and DTensors with one sharded dimension, float32 and float64; bfloat16 weights
    are rounded three times a step. Raises ConfigError for an unknown or impossible option.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        mode: str = "weightnorm",
        subspace: str = "svd",
        check_finite: bool = True,
    ):
        if mode != "weightnorm":
            raise ConfigError([f"mode={mode!r}: must be weightnorm, the only mode there is so far."])
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        super().__init__(params, defaults | projection_defaults(subspace), WeightNorm(), check_finite)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group and create its state. Raises ConfigError for the side `full`."""
        if param_group.get("proj_type") == "full":
            raise ConfigError(["proj_type='full': is not defined for weight-normalised directions. Use std."])
        super().add_param_group(param_group)
