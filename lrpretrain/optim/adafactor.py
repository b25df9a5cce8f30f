"""GaLore on Adafactor: the second moment of the projected gradient kept as a row and a column.

Source: Shazeer & Stern, arXiv 1804.04235, algorithms 4 and 5, in the Hugging Face form, as the GaLore
authors use it; the projection as in optim/galore.py.

Legend, for a gradient G (m, n), or in its place the projected one R (m, r):

    β_t = 1 − t^decay_rate
    a ← β_t a + (1 − β_t) row means of G² + ε1      (m)
    c ← β_t c + (1 − β_t) column means of G² + ε1   (n)
    U = G / √(a cᵀ / mean(a))                 vectors keep v ← β_t v + (1 − β_t) (G² + ε1) and U = G / √v
    U ← ρ_t U / max(1, RMS(U) / d)            d = clip_threshold
    M ← β1 M + (1 − β1) U,  U ← M             only with a beta1
    W ← W − ρ_t λ W,   then   W ← W − U       projected: W ← W − α U Pᵀ

ρ_t is lr, or with relative_step min(1e-2, 1/√t) (with warmup_init 1e-6 t in the place of 1e-2), and with
scale_parameter max(ε2, RMS(W)) times that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lrpretrain.errors import ConfigError
from lrpretrain.optim.adamw import Group
from lrpretrain.optim.galore import GaLore, projection_defaults
from lrpretrain.optim.optimizer import ShardedOptimizer
from lrpretrain.optim.rule import Slot
from lrpretrain.sharding import Holding, Piece
from lrpretrain.sharding.algebra import Matrices


class Adafactor(GaLore):
    """The rule for projected matrices."""

    reads_weights = True
    whole_only = True
    decays = True

    def moments(self, W: Matrices, hp: Group) -> dict[str, Slot]:
        """Return row, column and, with a beta1, the first moment."""
        m, r = hp["rank"] if hp["proj_type"] == "full" else W.shape[0], hp["rank"]
        shapes = moment_shapes((m, r), hp)
        return {key: Slot.whole(_zeros(W.locals[0], (len(W), *shape))) for key, shape in shapes.items()}

    def direction(
        self, R: Tensor, W: Matrices, s: dict[str, Tensor], hp: Group
    ) -> tuple[Tensor, list[float]]:
        """Decay W, and return the step for R, its rate included, and ones."""
        rates = step_rates(W.locals, s["step"].tolist(), hp)
        torch._foreach_mul_(W.locals, list(1 - rates * hp["weight_decay"]))
        return adafactor_step(R, rates, s, hp).to(R), [1.0] * len(W)


def moment_shapes(shape: tuple[int, ...], hp: Group) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the moments of a gradient of this shape, by key."""
    second = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
    first = {} if hp["beta1"] is None else {"exp_avg": shape}
    return (second if len(shape) > 1 else {"exp_avg_sq": shape}) | first


def step_rates(weights: Sequence[Tensor], steps: Sequence[int], hp: Group) -> Tensor:
    """Return ρ_t of b weights (b,), from their counts of updates, this one included."""
    rates = [hp["lr"]] * len(steps)
    if hp["relative_step"]:
        rates = [min(1e-6 * t if hp["warmup_init"] else 1e-2, t**-0.5) for t in steps]
    rho = torch.tensor(rates, dtype=_wide(weights[0]), device=weights[0].device)
    if hp["scale_parameter"]:
        rho *= torch.stack([_rms(W) for W in weights]).clamp_min(hp["eps2"])
    return rho


def adafactor_step(g: Tensor, rates: Tensor, s: Mapping[str, Tensor], hp: Group) -> Tensor:
    """Update the moments of b gradients g (b, …) and return U, shaped alike; `rates` holds ρ_t (b,)."""
    g = g.to(rates.dtype)
    steps = s["step"].to(rates)
    fresh = steps ** hp["decay_rate"]  # 1 − β_t
    square = g.square() + hp["eps1"]
    if "exp_avg_sq" in s:
        U = g * s["exp_avg_sq"].lerp_(square, _per_entry(fresh, square)).rsqrt()
    else:
        row, column = s["exp_avg_sq_row"], s["exp_avg_sq_col"]
        row.lerp_(square.mean(-1), _per_entry(fresh, row))
        column.lerp_(square.mean(-2), _per_entry(fresh, column))
        U = g * (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
    clip = torch.stack([_rms(u) for u in U]) / hp["clip_threshold"]
    U *= _per_entry(rates / clip.clamp_min(1), U)
    return U if hp["beta1"] is None else s["exp_avg"].lerp_(U, 1 - hp["beta1"])


def _per_entry(x: Tensor, like: Tensor) -> Tensor:
    """Shape x (b,) so that it multiplies the b entries of `like` (b, …)."""
    return x.view(-1, *[1] * (like.dim() - 1))


def _rms(x: Tensor) -> Tensor:
    return x.to(_wide(x)).square().mean().sqrt()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_zeros(shape, dtype=_wide(like))


class GaLoreAdafactor(ShardedOptimizer):
    """GaLore with Adafactor; takes the param groups of `galore_torch`, and its arguments.

    Groups with a `rank` are projected, with the options of `GaLoreAdamW` but for `moments_at_refresh` and
    `moments`; the others are plain Adafactor. `lr` or relative_step, not both.

    Supported: whole tensors (one process, DDP), float32, float64 and bfloat16 (moments in float32 or better).
    Raises ConfigError for sharded ones and for an unknown or impossible option.
    """

    matrix_rule: type[Adafactor] = Adafactor

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        subspace: str = "svd",
        check_finite: bool = True,
    ):
        if relative_step == (lr is not None):
            raise ConfigError([f"lr={lr!r}: give either lr and relative_step=False, or neither."])
        if warmup_init and not relative_step:
            raise ConfigError(["warmup_init=True: is the warm-up of relative_step. Leave it out."])
        defaults = dict(
            lr=0.0 if lr is None else lr,
            eps1=eps[0],
            eps2=eps[1],
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            beta1=beta1,
            weight_decay=weight_decay,
            scale_parameter=scale_parameter,
            relative_step=relative_step,
            warmup_init=warmup_init,
        )
        super().__init__(params, defaults | projection_defaults(subspace), self.matrix_rule(), check_finite)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group and create its state. Raises ConfigError for what Adafactor cannot do."""
        kind = param_group.get("moments_at_refresh", "keep")
        if kind != "keep":
            raise ConfigError([f"moments_at_refresh={kind!r}: Adafactor's moments are kept. Use keep."])
        dtype = param_group.get("moments")
        if dtype not in (None, "float32"):
            raise ConfigError([f"moments={dtype!r}: Adafactor's are few, in float32. Leave it out."])
        super().add_param_group(param_group)

    def _add_regular(self, group: dict[str, Any], holdings: list[Holding]) -> None:
        for h in holdings:
            moments = {key: _zeros(h.weight, part) for key, part in moment_shapes(h.shape, group).items()}
            state = {"step": torch.zeros((), dtype=torch.int64)} | moments
            self._register(h, {key: Piece.whole(tensor) for key, tensor in state.items()})
        self._regular.append((group, holdings))

    def _update_regular(self, group: dict[str, Any], ready: list[Holding]) -> None:
        for h in ready:
            assert h.grad is not None
            s = {key: tensor[None] for key, tensor in self.state[h.param].items()}
            s["step"] += 1
            rates = step_rates([h.weight], s["step"].tolist(), group)
            (U,) = adafactor_step(h.grad[None], rates, s, group)
            h.weight.mul_(1 - float(rates) * group["weight_decay"]).sub_(U)
