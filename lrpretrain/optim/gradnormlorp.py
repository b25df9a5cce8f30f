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

Mode `lowrank_wn` is the authors' `LowRankWeightNormAdamW`, step for step. It keeps v (m, n), a copy of W:

    R = G P,  N Adam's direction for R      v' = v − η_t α N Pᵀ
    n Adam's direction for ⟨G, v⟩ / ‖v‖     W ← (‖v‖ − η_t n) v' / ‖v'‖,   then   W ← W − lr λ W
                                            v ← v' − lr λ v'

No change of a magnitude outlives its step. Every parameter is trained so: matrices without a rank take
Adam's direction for G itself, and a vector is one row. Differs from the authors' code in: a row (or vector)
is trained without normalisation as long as it is zero, where theirs becomes NaN; W is written in place.

Mode `dora` is GaLore as it stands, for the adapters of the layers of model/dora.py, which are the paper's
W = M (W0 + B A) / ‖W0 + B A‖ with B A in the place of its I J.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrpretrain.errors import ConfigError
from lrpretrain.optim.adafactor import Adafactor, GaLoreAdafactor
from lrpretrain.optim.adamw import Group, adam_direction, adamw, decay, step_sizes
from lrpretrain.optim.galore import GaLore, projection_defaults
from lrpretrain.optim.moments import KEYS
from lrpretrain.optim.optimizer import ShardedOptimizer
from lrpretrain.optim.rule import Slot
from lrpretrain.sharding import Holding, Piece, hold
from lrpretrain.sharding.algebra import Matrices

SMALLEST = 1e-18  # of a magnitude: W keeps a direction only as long as it is not zero


class WeightNorm(GaLore):
    """The rule in its mode `weightnorm`."""

    reads_weights = True

    def state(self, W: Matrices, hp: Group) -> dict[str, Slot]:
        """Return GaLore's state, and magnitude, norm and the magnitude's moments, a number for each row."""
        dim = _along(W)
        norm = W.dot(W, dim).sqrt()
        vectors = {"magnitude": norm, "norm": norm.clone()}
        vectors |= {f"magnitude_{key}": torch.zeros_like(norm) for key in KEYS}
        return super().state(W, hp) | {key: Slot(v, *W.lying(1 - dim)) for key, v in vectors.items()}

    def update(self, W: Matrices, G: Matrices, s: dict[str, Tensor], hp: Group) -> None:
        """Update a batch of matrices and its state in place. All processes that hold a tile must call it."""
        dim = _along(W)
        g, norm = s["magnitude"], s["norm"]
        live = norm > 0
        grad_g = torch.where(live, G.dot(W, dim) / g, 0)  # W / g = v / ‖v‖
        stretch = torch.where(live, g / norm, 1)
        radial = torch.where(live, grad_g / g, 0)
        for due in self._due(s, hp):
            V = G[due].less(W[due], radial[due], dim)
            V.stretch(stretch[due], dim)  # ∇v = stretch (G − radial W)
            self._refresh(V, s, due, hp)
        P = self._bases(G, s, hp)
        s["step"] += 1
        s["age"] += 1
        if dim == 1:
            R = stretch[..., None] * (G @ P - radial[..., None] * (W @ P))  # (b, m', r)
        else:
            R = G.matmul(P, stretch) - W.matmul(P, stretch * radial)
        N, steps = self.direction(R.to(P), W, s, hp)
        moments = [s["magnitude_exp_avg"]], [s["magnitude_exp_avg_sq"]]
        (n,) = adam_direction([grad_g], *moments, hp)
        etas = step_sizes(s["age"].tolist(), hp)

        moves = live if hp.get("sound") is None else live & hp["sound"]
        W.stretch(torch.where(moves, 1 / stretch, 1), dim)  # now W holds v
        W.add_lowrank(N, P, [-eta * hp["scale"] for eta in steps])
        moved = W.dot(W, dim).sqrt()
        torch._foreach_mul_(list(n), etas)
        g -= n * live
        smallest = torch.copysign(torch.full_like(g, SMALLEST), g)
        g.copy_(torch.where(moves & (g.abs() < SMALLEST), smallest, g))
        norm.copy_(torch.where(moves, moved, norm))
        W.stretch(torch.where(moves, g / moved, 1), dim)
        decay([g], hp)


class WeightNormAdafactor(WeightNorm, Adafactor):
    """The rule in its mode `weightnorm` with Adafactor for the directions; magnitudes, vectors, keep Adam."""

    decays = False

    def update(self, W: Matrices, G: Matrices, s: dict[str, Tensor], hp: Group) -> None:
        """Update a batch of whole matrices and its state in place. No communication."""
        super().update(W, G, s, {**hp, "betas": (0.9, 0.999), "eps": 1e-6, "correct_bias": True})

    def direction(
        self, R: Tensor, W: Matrices, s: dict[str, Tensor], hp: Group
    ) -> tuple[Tensor, list[float]]:
        """Return Adafactor's step for R, its rate included, and ones; W is decayed later, as by Adam."""
        return super().direction(R, W, s, {**hp, "weight_decay": 0.0})


class LowRankWN(GaLore):
    """The rule in its mode `lowrank_wn`."""

    reads_weights = True
    whole_only = True

    def state(self, W: Matrices, hp: Group) -> dict[str, Slot]:
        """Return GaLore's state, v and the magnitude's moments."""
        zeros = torch.zeros_like(W.dot(W, _along(W)))  # (b, m)
        moments = {f"magnitude_{key}": Slot.whole(zeros.clone()) for key in KEYS}
        return super().state(W, hp) | moments | {"v": Slot.whole(torch.stack(W.locals))}

    def update(self, W: Matrices, G: Matrices, s: dict[str, Tensor], hp: Group) -> None:
        """Update a batch of whole matrices and its state in place. No communication."""
        v = Matrices(W.holdings, list(s["v"]), W.transposed)
        renormalised(W, v, G, s, hp, partial(super().update, v, G, s, hp))
        decay([s["v"]], hp)


def renormalised(
    W: Matrices, v: Matrices, G: Matrices, s: dict[str, Tensor], hp: Group, move: Callable[[], None]
) -> None:
    """Take v to v' by `move`, which counts `step`, and W to (‖v‖ − η_t n) v' / ‖v'‖."""
    dim = _along(W)
    norm = v.dot(v, dim).sqrt()  # (b, m)
    grad_g = torch.where(norm > 0, G.dot(v, dim) / norm, 0)
    move()
    moved = v.dot(v, dim).sqrt()
    exp_avg, exp_avg_sq = (s[f"magnitude_{key}"] for key in KEYS)
    (n,) = adam_direction([grad_g], [exp_avg], [exp_avg_sq], hp)
    etas = torch.tensor(step_sizes(s["step"].tolist(), hp), dtype=norm.dtype, device=norm.device)
    stretch = (norm - etas[:, None] * n) / moved
    torch._foreach_copy_(W.locals, v.locals)
    W.stretch(torch.where((norm > 0) & (moved > 0), stretch, 1), dim)


def _along(W: Matrices) -> int:
    """Return the dimension along which an output unit lies: its row, a column where W stands transposed."""
    return 0 if W.transposed else 1


RULES = {"weightnorm": WeightNorm, "lowrank_wn": LowRankWN, "dora": GaLore}


class GradNormLoRPAdamW(ShardedOptimizer):
    """GradNormLoRP with AdamW: GaLore on the directions of the output units, and learned magnitudes.

    Takes the param groups and options of `GaLoreAdamW`; groups without a `rank` are plain AdamW. `mode`:

    weightnorm   magnitudes persist; not with `proj_type` full. Build it on the weights that training starts
                 from: the magnitudes are theirs.
    lowrank_wn   the authors' `LowRankWeightNormAdamW`, which keeps a copy of all weights, and normalises
                 those of groups without a `rank` too; matrices and vectors, whole (one process, DDP). No
                 int8 moments.
    dora         plain GaLore: give it the lora_A and lora_B of model.dora's layers with a `rank`, and their
                 magnitudes without one.

    Supported: plain tensors, DTensors with one sharded dimension and shards of ZeRO's masters, in float32 and
    float64; bfloat16 weights are rounded three times a step. Raises ConfigError for an unknown or impossible
    option.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = True,
        *,
        mode: str = "weightnorm",
        subspace: str = "svd",
        moments: str | None = None,
        basis: str | None = None,
        check_finite: bool = True,
    ):
        del no_deprecation_warning  # accepted for callers of the authors' classes
        if mode not in RULES:
            raise ConfigError([f"mode={mode!r}: must be one of {', '.join(RULES)}."])
        self.mode = mode
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        defaults |= projection_defaults(subspace, moments, basis)
        super().__init__(params, defaults, RULES[mode](), check_finite)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group and create its state. Raises ConfigError for what the mode cannot do."""
        if self.mode == "weightnorm" and param_group.get("proj_type") == "full":
            raise ConfigError(["proj_type='full': is not defined for weight-normalised directions. Use std."])
        if self.mode == "lowrank_wn" and param_group.get("moments", self.defaults["moments"]) == "int8":
            raise ConfigError(["moments='int8': mode='lowrank_wn' keeps floats. Use bfloat16 or float32."])
        super().add_param_group(param_group)

    def _add_regular(self, group: dict[str, Any], holdings: list[Holding]) -> None:
        super()._add_regular(group, holdings)
        for h in holdings if self.mode == "lowrank_wn" else ():
            if len(h.shape) not in (1, 2):
                reason = f"mode='lowrank_wn' takes matrices and vectors only, not {h.name} {h.shape}"
                raise ConfigError([f"{reason}. Leave it out, or use mode='weightnorm'."])
            W = _rows(h.weight)
            zeros = torch.zeros_like(W.dot(W, 1)[0])  # (m)
            pieces = {f"magnitude_{key}": Piece.whole(zeros.clone()) for key in KEYS}
            pieces["v"] = h.of(h.weight.clone())
            self._pieces[h.name] |= pieces
            self.state[h.param] |= {key: piece.tensor for key, piece in pieces.items()}

    def _update_regular(self, group: dict[str, Any], ready: list[Holding]) -> None:
        if self.mode != "lowrank_wn":
            return super()._update_regular(group, ready)
        for h in ready:
            assert h.grad is not None
            s, undecayed = self.state[h.param], group | {"weight_decay": 0.0}
            W, v, G = (_rows(tensor) for tensor in (h.weight, s["v"], h.grad))
            batch = {key: tensor[None] for key, tensor in s.items()}
            renormalised(W, v, G, batch, group, partial(adamw, [s["v"]], [h.grad], [s], undecayed))
            decay([h.weight, s["v"]], group)


class GradNormLoRPAdafactor(GaLoreAdafactor):
    """GradNormLoRP in its mode `weightnorm` with Adafactor; as `GaLoreAdafactor`, with a given `lr`."""

    matrix_rule = WeightNormAdafactor


def _rows(tensor: Tensor) -> Matrices:
    """Return a whole matrix as a batch of one; a vector as its one row."""
    return Matrices.weights([hold("", torch.atleast_2d(tensor))])
