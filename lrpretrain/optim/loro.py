"""LORO: low-rank weights W = B Aᵀ, trained along the manifold of matrices of rank r.

Source: Mo, Huang & Pan, "LORO", ICLR 2025 (openreview i0zzO7Hslk), algorithm 1; retraction and tangent space
as in Vandereycken, arXiv 1209.3834.

Legend: B (m, r) weight_out, A (n, r) weight_in; d_B, d_A Adam's directions for their gradients; η_t Adam's
bias-corrected step; every K-th update is exact, the others are lazy.

lazy     B ← B − η_t c d_B,  A ← A − η_t c d_A,  then  B ← B − η_t λ B,  A ← A − η_t λ A     (equation 12)
exact    the best rank-r approximation of B Aᵀ − η_t P(G), P(G) the gradient's part in the tangent space,
         without forming any (m, n) matrix                                                  (equation 10)
             B = Q_B R_B,  A = Q_A R_A                              thin QR
             Z_B = d_B R_A⁻¹,  Z_A = d_A R_B⁻¹                       (G Q_A and Gᵀ Q_B)
             Q̄_B R̄_B = Z_B − Q_B Q_Bᵀ Z_B,  Q̄_A R̄_A likewise        thin QR
             [[R_B R_Aᵀ − η_t Z_Aᵀ Q_A, −η_t R̄_Aᵀ], [−η_t R̄_B, 0]] = U Σ Vᵀ    (2r, 2r), r largest kept
             B ← [Q_B Q̄_B] U √Σ,  A ← [Q_A Q̄_A] V √Σ
refresh  zero the moments and their counters, of the factors (lrk), all others (reg) or both (all)

c is `lr_scaler`; −1 stands for r / hidden_size. With `eucl` every step is lazy with c = 1. As in the authors'
code an exact step has neither c nor weight decay, and Adam's directions stand for the gradients.

Differs from the authors' code in: a pair with a factor of deficient rank, which has no exact step, takes a
lazy one and is counted, where theirs explodes; gradients are not overwritten; factors without a gradient are
left alone; the model is not held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrpretrain.errors import ConfigError
from lrpretrain.optim.adamw import adam, counted, is_sound, step_sizes
from lrpretrain.optim.optimizer import ShardedOptimizer, merge_notes
from lrpretrain.sharding import Holding, Piece
from lrpretrain.sharding.placement import Exchange, assign
from lrpretrain.sharding.procs import Procs

# Smallest over largest entry of R's diagonal: below it, what R⁻¹ gives is float32's rounding, magnified.
DEFICIENT = 1e-6


def exact_step(B: Tensor, A: Tensor, dB: Tensor, dA: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return new factors (b, m, r) and (b, n, r), and for which pairs (b,) the step exists.

    eta (b,) is the step size. Works in float32 and returns the factors' dtype; what does not exist is left
    as it was.
    """
    if min(B.shape[-2], A.shape[-2]) < B.shape[-1]:  # no product of these has the rank
        return B, A, torch.zeros(len(B), dtype=torch.bool, device=B.device)
    dtype = B.dtype
    olds = B, A
    B, A, dB, dA = (x.float() for x in (B, A, dB, dA))
    eta = eta.float()[:, None, None]
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A)
    exists = _full_rank(RB) & _full_rank(RA)
    eye = torch.eye(RB.shape[-1], device=RB.device).expand_as(RB)
    # What is solved must be regular, for the pairs without an exact step as well.
    RB_, RA_ = (torch.where(exists[:, None, None], R, eye) for R in (RB, RA))
    ZB = torch.linalg.solve_triangular(RA_, dB, upper=True, left=False)
    ZA = torch.linalg.solve_triangular(RB_, dA, upper=True, left=False)
    QB2, RB2 = torch.linalg.qr(ZB - QB @ (QB.mT @ ZB))
    QA2, RA2 = torch.linalg.qr(ZA - QA @ (QA.mT @ ZA))
    S = RB @ RA.mT - eta * (ZA.mT @ QA)
    top = torch.cat([S, -eta * RA2.mT], -1)
    bottom = torch.cat([-eta * RB2, torch.zeros_like(S)], -1)
    K = torch.cat([top, bottom], -2).nan_to_num()  # only pairs that are left as they were can hold such
    U, sigma, Vh = torch.linalg.svd(K)
    r = B.shape[-1]
    root = sigma[:, None, :r].sqrt()
    new = (torch.cat([QB, QB2], -1) @ U[..., :r] * root, torch.cat([QA, QA2], -1) @ Vh.mT[..., :r] * root)
    exists &= torch.stack([x.isfinite().all(-1).all(-1) for x in (*new, dB, dA)]).all(0)
    B, A = (torch.where(exists[:, None, None], x.to(dtype), old) for x, old in zip(new, olds, strict=True))
    return B, A, exists


def lazy_scale(shape: tuple[int, ...], hp: Mapping[str, Any]) -> float:
    """Return the factor c of a lazy step for a factor (d, r)."""
    scaler = float(hp["lr_scaler"])
    return scaler if scaler >= 0 else min(shape) / (hp.get("hidden_size") or max(shape))


def _full_rank(R: Tensor) -> Tensor:
    diagonal = R.diagonal(dim1=-2, dim2=-1).abs()
    return diagonal.amin(-1) > DEFICIENT * diagonal.amax(-1)


Pair = tuple[Holding, Holding]  # A, B


class LOROAdamW(ShardedOptimizer):
    """LORO with AdamW; takes the param groups of `loro_torch`.

    Groups carry a `type`: regular (plain AdamW), lowrank_in and lowrank_out, whose factors are paired in
    order; `lr_scaler` (−1) and `hidden_size` as above. Every `exact_every`-th update of a pair is exact
    (0: never); with `exact_steps` staggered every pair has its own place in that count. With `refresh` (lrk,
    reg or all) the moments of a pair are zeroed after its exact step, those of a regular parameter after
    every `exact_every`-th update; after every `refresh_every`-th instead, if that is given.
    `step(use_exact_loro=…)` and `refresh_states(mode)` decide instead, for drivers that count. `moments` is
    the dtype that moments are stored in, float32 or bfloat16 (None: the parameter's). `model` is accepted
    and not kept.

    `deficient_pairs` counts exact steps of this process that were taken as lazy ones for want of rank.

    Supported: plain tensors, DTensors with one sharded dimension, shards of ZeRO's masters; an exact step
    brings the factors and their directions of each pair to one process, and the factors back. Raises
    ConfigError for options that are unknown, or factors that do not pair.
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
        loro_type: str = "loro",
        model: torch.nn.Module | None = None,
        *,
        exact_every: int = 500,
        exact_steps: str = "fixed",
        refresh: str | None = None,
        refresh_every: int | None = None,
        moments: str | None = None,
        check_finite: bool = True,
    ):
        del no_deprecation_warning, model
        if loro_type not in ("loro", "eucl"):
            raise ConfigError([f"loro_type={loro_type!r}: must be loro or eucl."])
        if exact_steps not in ("fixed", "staggered"):
            raise ConfigError([f"exact_steps={exact_steps!r}: must be fixed or staggered."])
        if refresh not in (None, "lrk", "reg", "all"):
            raise ConfigError([f"refresh={refresh!r}: must be lrk, reg, all or None."])
        self.loro_type, self.exact_every, self.refresh = loro_type, exact_every, refresh
        self.exact_steps, self.refresh_every = exact_steps, refresh_every
        self.deficient_pairs = 0
        self._exact_notes: list[tuple[str, bool]] = []
        self._factors: dict[str, list[Holding]] = {"lowrank_in": [], "lowrank_out": []}
        self._use_exact: bool | None = None
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        defaults |= {"moments": moments, "type": "regular", "lr_scaler": -1}
        super().__init__(params, defaults, None, check_finite)
        self._pair()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group and create its state. Raises ConfigError for an unknown type or lr_scaler."""
        kind, scaler = param_group.get("type", "regular"), param_group.get("lr_scaler", -1)
        if kind not in ("regular", *self._factors):
            raise ConfigError([f"type={kind!r}: must be regular, lowrank_in or lowrank_out."])
        try:
            float(scaler)
        except (TypeError, ValueError) as error:
            raise ConfigError([f"lr_scaler={scaler!r}: must be a number; -1 is r / hidden_size."]) from error
        super().add_param_group(param_group)
        holdings = self._regular[-1][1]
        for h in holdings:
            updates = torch.zeros((), dtype=torch.int64)  # unlike `step` a refresh does not touch it
            self._pieces[h.name]["updates"] = Piece.whole(updates)
            self.state[h.param]["updates"] = updates
        if kind != "regular":
            self._factors[kind] += holdings

    def step(self, closure: Callable[[], Any] | None = None, use_exact_loro: bool | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returned.

        `use_exact_loro` makes the step exact or lazy for all pairs, instead of the own count.
        """
        self._use_exact = use_exact_loro
        if any(len(factors) != self._paired for factors in self._factors.values()):
            self._pair()  # param groups were added
        skipped = self.skipped_steps
        loss = super().step(closure)
        if self.skipped_steps == skipped:
            self._update_pairs()
        return loss

    def pop_metrics(self, procs: Procs | None = None) -> dict[str, float]:
        """Return the pairs that took an exact step since the last call, and those that lacked the rank."""
        notes, self._exact_notes = self._exact_notes, []
        existed = merge_notes(notes, procs)
        if not existed:
            return {}
        return {"loro/exact_pairs": sum(existed), "loro/deficient_pairs": len(existed) - sum(existed)}

    def refresh_states(self, mode: str) -> None:
        """Zero moments and their counters: of the factors (lrk), the regular parameters (reg) or all."""
        if mode not in ("lrk", "reg", "all"):
            raise ConfigError([f"refresh_states({mode!r}): must be lrk, reg or all."])
        for group, holdings in self._regular:
            if mode == "all" or (mode == "reg") == (group["type"] == "regular"):
                self._forget(holdings)

    def _forget(self, holdings: Iterable[Holding]) -> None:
        for h in holdings:
            for key in ("step", "exp_avg", "exp_avg_sq"):
                self.state[h.param][key].zero_()

    def _update_regular(self, group: dict[str, Any], ready: list[Holding]) -> None:
        if group["type"] != "regular":
            return
        super()._update_regular(group, ready)
        for h in ready:
            self.state[h.param]["updates"] += 1
        if self.refresh in ("reg", "all"):
            self._forget(h for h in ready if self._is_refreshed(h))

    @torch.no_grad()
    def _update_pairs(self) -> None:
        groups = {h.param: group for group, holdings in self._regular for h in holdings}
        numbered = enumerate(zip(self._factors["lowrank_in"], self._factors["lowrank_out"], strict=True))
        pairs = {i: (a, b) for i, (a, b) in numbered if a.param.grad is not None and b.param.grad is not None}
        steps: dict[Tensor, tuple[Tensor, float, float, float]] = {}  # of each factor: d, η_t, c, η_t λ
        for group in self.param_groups:
            factors = [h for pair in pairs.values() for h in pair if groups[h.param] is group]
            if factors:
                steps |= self._directions(factors, group | {"sound": self.sound})
        exact = {i: pair for i, pair in pairs.items() if self._is_exact(pair[1], i)}
        lazy = [h for i, pair in pairs.items() if i not in exact for h in pair]
        _lazy_step([h.weight for h in lazy], [steps[h.param] for h in lazy], self.sound)
        self._exact(exact, steps)
        if self.refresh in ("lrk", "all"):
            renewed = [pair for i, pair in pairs.items() if self._is_refreshed(pair[1], i)]
            self._forget(h for pair in renewed for h in pair)

    def _directions(
        self, factors: list[Holding], hp: Mapping[str, Any]
    ) -> dict[Tensor, tuple[Tensor, float, float, float]]:
        states = [self.state[h.param] for h in factors]
        for s in states:
            s["step"] += 1
            s["updates"] += 1
        ds = adam([g for h in factors if (g := h.grad) is not None], states, hp)
        etas = step_sizes([int(s["step"]) for s in states], hp)
        scales = [lazy_scale(h.shape, hp) if self.loro_type == "loro" else 1.0 for h in factors]
        decays = [eta * hp["weight_decay"] for eta in etas]
        return {h.param: four for h, *four in zip(factors, ds, etas, scales, decays, strict=True)}  # type: ignore[misc]

    def _is_exact(self, holding: Holding, pair: int = 0) -> bool:
        """Say whether the step is exact; the host waits for the device to know that one is sound."""
        if self._use_exact is not None or self.loro_type == "eucl" or self.exact_every == 0:
            return bool(self._use_exact) and self.loro_type == "loro"
        return self._is_due(holding, pair, self.exact_every)

    def _is_refreshed(self, holding: Holding, pair: int = 0) -> bool:
        """Say whether moments are zeroed after the step."""
        if self.refresh_every is None:
            return self._is_exact(holding, pair)
        return self._is_due(holding, pair, self.refresh_every)

    def _is_due(self, holding: Holding, pair: int, every: int) -> bool:
        pairs = max(len(self._factors["lowrank_out"]), 1)
        phase = pair * every // pairs if self.exact_steps == "staggered" else 0
        due = (int(self.state[holding.param]["updates"]) + phase) % every == 0
        return due and is_sound({"sound": self.sound})

    def _exact(
        self, pairs: Mapping[int, Pair], steps: Mapping[Tensor, tuple[Tensor, float, float, float]]
    ) -> None:
        """Take exact steps, each pair on the process that owns it; a lazy one where there is none."""
        if not pairs:
            return
        holdings = [h for pair in pairs.values() for h in pair]
        ds = [steps[h.param][0] for h in holdings]
        weights = [h.weight for h in holdings]
        if holdings[0].group is None:
            wholes, whole_ds = (
                [t.view(h.shape) for h, t in zip(holdings, x, strict=True)] for x in (weights, ds)
            )
            self._exact_whole(pairs, wholes, whole_ds, steps)
            return
        owners = [self._owners[i] for i in pairs for _ in "AB"]
        exchange = Exchange(holdings, owners)
        wholes, whole_ds = exchange.gather(weights, ds)
        own = {i: pair for i, pair in pairs.items() if self._owners[i] == exchange.proc}
        self._exact_whole(own, wholes, whole_ds, steps)
        for weight, new in zip(weights, exchange.scatter(wholes), strict=True):
            weight.copy_(new.view_as(weight))

    def _exact_whole(
        self,
        pairs: Mapping[int, Pair],
        wholes: list[Tensor],
        ds: list[Tensor],
        steps: Mapping[Tensor, tuple[Tensor, float, float, float]],
    ) -> None:
        """Update whole factors A, B, A, B … in place, all pairs of a shape together."""
        alike: dict[Any, list[int]] = {}
        for at, (a, b) in enumerate(pairs.values()):
            alike.setdefault((a.shape, b.shape), []).append(2 * at)
        holdings = [h for pair in pairs.values() for h in pair]
        for ats in alike.values():
            A, dA = (torch.stack([x[at] for at in ats]) for x in (wholes, ds))
            B, dB = (torch.stack([x[at + 1] for at in ats]) for x in (wholes, ds))
            eta = torch.tensor([steps[holdings[at + 1].param][1] for at in ats], device=B.device)
            B, A, exists = exact_step(B, A, dB, dA, eta)
            for at, new_a, new_b, there in zip(ats, A, B, exists.tolist(), strict=True):
                self._exact_notes.append((holdings[at + 1].name, there))
                if there:
                    wholes[at].copy_(new_a)
                    wholes[at + 1].copy_(new_b)
                else:
                    self.deficient_pairs += 1
                    of = [(ds[k], *steps[holdings[k].param][1:]) for k in (at, at + 1)]
                    _lazy_step(wholes[at : at + 2], of)

    def _pair(self) -> None:
        """Check that the factors pair, and choose the owner of each pair's exact step, with equal work."""
        ins, outs = self._factors["lowrank_in"], self._factors["lowrank_out"]
        fit = len(ins) == len(outs) and all(
            a.shape[1:] == b.shape[1:] for a, b in zip(ins, outs, strict=True)
        )
        if not fit or any(len(h.shape) != 2 for h in ins + outs):
            raise ConfigError(
                ["lowrank_in and lowrank_out must hold as many matrices, (n, r) and (m, r), in one order."]
            )
        if len({h.group for h in ins + outs}) > 1:
            raise ConfigError(["the factors lie on several meshes. Shard all of them over one group."])
        self._paired, self._owners = len(outs), []
        self.placements.clear()
        if not outs or outs[0].group is None:
            self.placements["aligned", "not split"] = len(outs)
            return
        self.placements["owner", "for exact steps, pair by pair"] = len(outs)
        sizes = ((a.shape[0] + b.shape[0], b.shape[1]) for a, b in zip(ins, outs, strict=True))
        costs = [(mn + 8 * r) * r**2 for mn, r in sizes]  # of the QRs and the SVD
        self._owners = assign(outs, costs, [0.0] * len(outs[0].spread))


def _lazy_step(
    weights: list[Tensor], steps: list[tuple[Tensor, float, float, float]], sound: Tensor | None = None
) -> None:
    """Take lazy steps (d, η_t, c, η_t λ) in place, where they are sound; d is zero where not."""
    if not weights:
        return
    moves = torch._foreach_mul([d for d, *_ in steps], [-eta * c for _, eta, c, _ in steps])
    torch._foreach_add_(weights, moves)
    if any(decays := [-decay for *_, decay in steps]):
        torch._foreach_add_(weights, torch._foreach_mul(counted(weights, {"sound": sound}), decays))
