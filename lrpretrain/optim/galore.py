"""GaLore: Adam in the leading subspace of the gradient.

Source: Zhao et al., arXiv 2403.03507, algorithm 2 (Adam with GaLore).

Legend, for a matrix W (m, n) with gradient G (m, n), projected on the right; a left projection of
G is the right projection of Gᵀ:

    P (n, r)   orthonormal basis: leading right-singular vectors of G, renewed every T updates
    R (m, r)   = G P, the projected gradient; its moments are exp_avg, exp_avg_sq (m, r)
    N (m, r)   Adam's direction for R
    W ← W − η_t α N Pᵀ,   then   W ← W − lr λ W

Moments and bases may be stored in fewer bits than W (optim/moments.py); products are in the dtype of W.

With `full`, A (m, r) and P (n, r) project both sides: R = Aᵀ G P (r, r) and W ← W − η_t α A N Pᵀ.

The basis is renewed at t = 0, T, 2T … (t updates done before), from the gradient of that same step;
`staggered`, every matrix of a group has its own place in the gap after t = 0, so that no step is much slower
than another. α multiplies the normalised update, not the weight decay. At a refresh the moments are

    keep     left as they are (the authors)
    reset    zeroed, and their bias correction starts anew
    rotate   taken to the new basis with Q = P_oldᵀ P: exp_avg ← exp_avg Q, exp_avg_sq ← exp_avg_sq Q∘Q (the
             second as if the entries of R were uncorrelated; Robert et al., arXiv 2410.16103)

Differs from the authors' code in: the side is stored, not inferred from shapes (which breaks
reverse_std); a non-finite gradient skips the step; state is tensors, no objects; other methods than
the SVD may find the basis.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrpretrain.optim.adamw import Group, adam, is_sound, step_sizes
from lrpretrain.optim.moments import KEYS, float_dtype, load, store, stored
from lrpretrain.optim.optimizer import ShardedOptimizer
from lrpretrain.optim.rule import Refresh, Slot
from lrpretrain.optim.subspace import leading_subspace, leading_subspaces
from lrpretrain.sharding.algebra import Matrices

SIDES = {"right": 0, "left": 1, "full": 2}


def side_of(shape: Sequence[int], proj_type: str) -> str:
    """Return which side of a matrix (m, n) is projected: right, left or full.

    `std` projects the shorter dimension (a square matrix on the right), `reverse_std` the longer one.
    """
    tall = shape[0] >= shape[1]
    if proj_type == "std":
        return "right" if tall else "left"
    if proj_type == "reverse_std":
        return "left" if tall else "right"
    return proj_type


class GaLore:
    """The rule; one object serves all batches of matrices of an optimizer."""

    reads_weights = False
    whole_only = False
    decays = False

    def __init__(self) -> None:
        self.refreshes: list[Refresh] = []
        self._drawn: dict[str, tuple[int, Tensor]] = {}  # random bases and their turns

    def transposed(self, shape: Sequence[int], hp: Group) -> bool:
        """Say whether matrices of this shape are handled as their transposes."""
        return side_of(shape, hp["proj_type"]) == "left"

    def needs_whole(self, hp: Group) -> bool:
        """Say whether the gradient is needed whole: for an SVD."""
        return hp["proj_type"] == "full" or hp["subspace"] == "svd"

    def state(self, W: Matrices, hp: Group) -> dict[str, Slot]:
        """Return the initial state: side, basis, moments; for `full` the left basis as well.

        Random bases are no state: they follow from the name and the count of refreshes.
        """
        (m, n), r = W.shape, hp["rank"]
        side = side_of(W.holdings[0].shape, hp["proj_type"])
        basis = torch.zeros(len(W), n, r, dtype=float_dtype(hp["basis"], W.dtype), device=W.device)
        state = {
            "side": Slot.whole(torch.full((len(W),), SIDES[side])),
            "age": Slot.whole(torch.zeros(len(W), dtype=torch.int64)),
        }
        state |= self.moments(W, hp)
        if side == "full":
            state["basis_left"] = Slot.whole(basis.new_zeros(len(W), m, r))
        if side == "full" or hp["subspace"] != "random":
            state["basis"] = Slot.whole(basis)
        return state

    def moments(self, W: Matrices, hp: Group) -> dict[str, Slot]:
        """Return the initial moments of the projected gradients, (b, m', r) or with `full` (b, r, r)."""
        r = hp["rank"]

        def zeros(width: int, dtype: torch.dtype) -> Slot:
            if hp["proj_type"] == "full":
                return Slot.whole(torch.zeros(len(W), r, width, dtype=dtype, device=W.device))
            return Slot(W.zeros(0, width).to(dtype), *W.lying(0, width))

        return {key: zeros(*kept) for key, kept in stored(hp["moments"], r, W.dtype).items()}

    def update(self, W: Matrices, G: Matrices, s: dict[str, Tensor], hp: Group) -> None:
        """Update a batch of matrices and its state in place. All processes that hold a tile must call it."""
        for due in self._due(s, hp):
            self._refresh(G[due], s, due, hp)
        P = self._bases(G, s, hp)  # (b, n, r)
        s["step"] += 1
        s["age"] += 1
        R = G @ P  # (b, m', r)
        if "basis_left" in s:
            A = G.rows(s["basis_left"]).to(R)  # (b, m', r)
            R = G.inner(A, R)  # (b, r, r)
        N, etas = self.direction(R, W, s, hp)
        if "basis_left" in s:
            N = A @ N  # (b, m', r)
        W.add_lowrank(N, P, [-eta * hp["scale"] for eta in etas])

    def direction(
        self, R: Tensor, W: Matrices, s: dict[str, Tensor], hp: Group
    ) -> tuple[Tensor, list[float]]:
        """Update the moments with R; return N, shaped as R, and η_t of every matrix."""
        (N,) = adam([R], [s], hp)
        return N, step_sizes(s["age"].tolist(), hp)

    def _due(self, s: dict[str, Tensor], hp: Group) -> list[list[int]]:
        """Return which matrices need a new basis in this update: those without one, and those with one.

        None where the step is not sound, for which the host waits if any is due.
        """
        clocks = list(enumerate(zip(s["step"].tolist(), s["phase"].tolist(), strict=True)))
        first = [i for i, (t, _) in clocks if t == 0]
        again = [i for i, (t, phase) in clocks if t > 0 and (t - phase) % hp["update_proj_gap"] == 0]
        dues = [due for due in (first, again) if due]
        return dues if dues and is_sound(hp) else []

    def _turns(self, s: dict[str, Tensor], hp: Group) -> list[int]:
        """Return how many bases each matrix had before the one of this update."""
        clocks = zip(s["step"].tolist(), s["phase"].tolist(), strict=True)
        return [(t - phase) // hp["update_proj_gap"] + (phase > 0) for t, phase in clocks]

    def _bases(self, G: Matrices, s: dict[str, Tensor], hp: Group) -> Tensor:
        """Return the bases (b, n, r) to multiply G by, in its dtype."""
        return (s["basis"] if "basis" in s else self._draw(G, self._turns(s, hp), hp)).to(G.dtype)

    def _draw(self, G: Matrices, turns: list[int], hp: Group) -> Tensor:
        """Return random bases (b, n, r); kept until the next refresh unless the placement is `seeded`."""
        bases = []
        for i, (name, turn) in enumerate(zip(G.names, turns, strict=True)):
            drawn = self._drawn.get(name)
            if drawn is None or drawn[0] != turn:
                P = leading_subspace(G[[i]], hp["rank"], "random", None, [turn])[0]
                drawn = turn, P.to(float_dtype(hp["basis"], G.dtype))
                if hp["placement"] != "seeded":
                    self._drawn[name] = drawn
            bases.append(drawn[1])
        return torch.stack(bases)

    def _refresh(self, G: Matrices, s: dict[str, Tensor], due: list[int], hp: Group) -> None:
        """Find bases from the gradients G; all of these matrices have one already, or none has."""
        began = time.perf_counter()
        first = int(s["step"][due[0]]) == 0
        turns = [self._turns(s, hp)[i] for i in due]
        if "basis" not in s:
            old = None if first else self._draw(G, [turn - 1 for turn in turns], hp)
            P = self._draw(G, turns, hp)
        else:
            old = None if first else s["basis"][due]
            if "basis_left" in s:
                A, P = leading_subspaces(G, hp["rank"])
                s["basis_left"][due] = A.to(s["basis_left"])
            else:
                P = G.agreed(leading_subspace(G, hp["rank"], hp["subspace"], old, turns))
            s["basis"][due] = P.to(s["basis"])
        if old is not None and hp["moments_at_refresh"] == "reset":
            for key in (*KEYS, "age"):
                s[key][due] = 0
        if old is not None and hp["moments_at_refresh"] == "rotate":
            m, v = (load(s, key, due) for key in KEYS)
            Q = (old.mT.to(P.dtype) @ P).to(m)  # (b, r, r)
            store(s, "exp_avg", m @ Q, due)
            store(s, "exp_avg_sq", v @ Q.square(), due)
        self._measure(G, P.float(), None if old is None else old.float(), began)

    def _measure(self, G: Matrices, P: Tensor, old: Tensor | None, began: float) -> None:
        """Note the energy that P keeps of G, its overlap with the old basis, and the time taken."""
        R = (G @ P.to(G.dtype)).float()
        kept = G.inner(R, R).diagonal(dim1=-2, dim2=-1).sum(-1)  # ‖G P‖²
        energy = kept / G.square_sum().clamp_min(torch.finfo(torch.float32).tiny)
        overlap = None if old is None else (old.mT @ P).square().sum((-2, -1)) / P.shape[-1]
        if P.is_cuda:
            torch.cuda.synchronize()
        self.refreshes.append(Refresh(G.names, energy, overlap, (time.perf_counter() - began) * 1e3))


class GaLoreAdamW(ShardedOptimizer):
    """GaLore with AdamW; takes the param groups of `galore_torch`.

    Groups with a `rank` are projected, the others are plain AdamW. Options of a projected group:
    `rank`; `update_proj_gap`, updates between two refreshes of the basis (200); `scale` (0.25);
    `proj_type`: std, reverse_std, left, right or full (std); `subspace`: svd, gram, warm, randomized or
    random (the constructor's); `refresh`: fixed or staggered (fixed); `moments_at_refresh`: keep, reset or
    rotate (keep; not with full); `placement` under sharding: auto, aligned, owner or seeded (auto);
    `moments` and `basis`, the dtypes that moments (float32, bfloat16 or int8) and bases (float32, bfloat16)
    are stored in (the constructor's; None: the parameter's). int8 is block-wise (optim/moments.py) and for
    projected gradients: other parameters then keep moments of their own dtype.
    A rank above min(m, n) is clamped with a warning.

    Supported: plain tensors, DTensors with one sharded dimension and shards of ZeRO's masters, in float32,
    float64 and bfloat16. With proj_type full bases are found by SVD, whatever `subspace` says.
    Raises ConfigError for an unknown or impossible option.
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
        subspace: str = "svd",
        moments: str | None = None,
        basis: str | None = None,
        check_finite: bool = True,
    ):
        del no_deprecation_warning  # accepted for galore_torch's callers
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        defaults |= projection_defaults(subspace, moments, basis)
        super().__init__(params, defaults, GaLore(), check_finite)


def projection_defaults(
    subspace: str, moments: str | None = None, basis: str | None = None
) -> dict[str, Any]:
    """Return the defaults of the options of a projected group."""
    return {
        "rank": None,
        "update_proj_gap": 200,
        "scale": 0.25,
        "proj_type": "std",
        "subspace": subspace,
        "refresh": "fixed",
        "moments_at_refresh": "keep",
        "placement": "auto",
        "moments": moments,
        "basis": basis,
    }
