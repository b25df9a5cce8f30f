"""The wire between the rules and the tiles: torch optimizers that work on any sharding.

Matrices of one shape are worked on as a batch. Their state lies stacked, and `optimizer.state` shows
each parameter its own slice of it, so that state is created eagerly, with the same keys on every process.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrpretrain.errors import ConfigError
from lrpretrain.optim.adamw import adamw
from lrpretrain.optim.rule import Rule, Slot
from lrpretrain.optim.subspace import METHODS
from lrpretrain.sharding import Holding, Piece, Tile, hold
from lrpretrain.sharding.algebra import Matrices


@dataclass
class Batch:
    """Equal-shaped matrices of one param group, with their stacked state."""

    holdings: list[Holding]
    transposed: bool
    group: dict[str, Any]
    state: dict[str, Tensor]

    def update(self, rule: Rule) -> None:
        """Apply the rule to the matrices that have a gradient."""
        have = [i for i, h in enumerate(self.holdings) if h.param.grad is not None]
        if not have:
            return
        holdings, state = [self.holdings[i] for i in have], self.state
        if len(have) < len(self.holdings):
            state = {key: tensor[have] for key, tensor in self.state.items()}
        W = Matrices.weights(holdings, self.transposed)
        G = Matrices.gradients(holdings, self.transposed)
        rule.update(W, G, state, self.group)
        if state is not self.state:
            for key, tensor in state.items():
                self.state[key][have] = tensor


class ShardedOptimizer(torch.optim.Optimizer):
    """AdamW, and a matrix rule for the param groups that have a `rank`.

    Parameters may be plain tensors (one process, DDP) or DTensors with at most one sharded dimension
    (FSDP2, HSDP). Under sharding all processes must construct it and call `step` together; the
    communication of a step does not grow with the number of matrices.

    A step with a non-finite gradient changes nothing, is counted in `skipped_steps` and warned of
    (`check_finite`; it costs one wait for the device, and one scalar all-reduce under sharding).
    """

    def __init__(
        self, params: Any, defaults: dict[str, Any], rule: Rule | None = None, check_finite: bool = True
    ):
        self.rule = rule
        self.check_finite = check_finite
        self.skipped_steps = 0
        self._batches: list[Batch] = []
        self._pieces: dict[str, dict[str, Piece]] = {}
        self._regular: list[tuple[dict[str, Any], list[Holding]]] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group and create its state."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        start = sum(len(g["params"]) for g in self.param_groups[:-1])
        names = group.get("param_names") or [f"param_{start + i}" for i in range(len(group["params"]))]
        holdings = [hold(name, param) for name, param in zip(names, group["params"], strict=True)]
        if group.get("rank") is None or self.rule is None:
            self._add_regular(group, holdings)
        else:
            self._add_matrices(group, holdings, self.rule)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.check_finite and not self._gradients_are_finite():
            self.skipped_steps += 1
            warnings.warn(
                f"a gradient is not finite: step skipped ({self.skipped_steps} so far)", stacklevel=2
            )
            return loss
        for group, holdings in self._regular:
            self._update_regular(group, [h for h in holdings if h.param.grad is not None])
        if self.rule is not None:
            for batch in self._batches:
                batch.update(self.rule)
        return loss

    def pieces(self) -> Iterator[tuple[str, str, Piece]]:
        """Yield the state as (parameter's name, key, piece), for a checkpoint that any sharding can load."""
        for name, pieces in self._pieces.items():
            for key, piece in pieces.items():
                yield name, key, piece

    def pop_metrics(self) -> dict[str, float]:
        """Return what was measured at refreshes since the last call: means of energy, overlap, time."""
        if self.rule is None or not self.rule.refreshes:
            return {}
        notes, self.rule.refreshes = self.rule.refreshes, []
        matrices = sum(note.matrices for note in notes)
        values = {
            "subspace/refreshes": matrices,
            "subspace/matrices": sum(len(batch.holdings) for batch in self._batches),
            "subspace/energy": sum(float(n.energy) * n.matrices for n in notes) / matrices,
            "perf/refresh_ms": sum(n.ms for n in notes),
        }
        renewed = [(float(n.overlap), n.matrices) for n in notes if n.overlap is not None]
        if renewed:
            values["subspace/overlap"] = sum(o * k for o, k in renewed) / sum(k for _, k in renewed)
        return values

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, on the same sharding.

        Tensors are copied into the state as it is, without torch's cast to the parameter's dtype.
        Raises ConfigError if the parameters or their state do not match.
        """
        own = self.state_dict()
        ours, theirs = own["param_groups"], state_dict["param_groups"]
        if [g["params"] for g in ours] != [g["params"] for g in theirs] or own["state"].keys() != state_dict[
            "state"
        ].keys():
            raise ConfigError(
                ["the state to load is of other parameters. Build the optimizer as it was built then."]
            )
        for index, tensors in own["state"].items():
            for key, tensor in tensors.items():
                saved = state_dict["state"][index].get(key)
                if (
                    saved is None
                    or saved.shape != tensor.shape
                    or (key == "side" and int(saved) != int(tensor))
                ):
                    what = f"the saved state of parameter {index} has no matching {key!r}"
                    raise ConfigError([f"{what}. Use the same rule, rank and side."])
                tensor.copy_(saved)
        for group, saved in zip(self.param_groups, theirs, strict=True):
            group.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})

    def _update_regular(self, group: dict[str, Any], ready: list[Holding]) -> None:
        if ready:
            state = [self.state[h.param] for h in ready]
            adamw([h.weight for h in ready], [_grad(h) for h in ready], state, group)

    def _add_regular(self, group: dict[str, Any], holdings: list[Holding]) -> None:
        for h in holdings:
            whole = torch.zeros((), dtype=torch.int64)
            pieces = {"step": Piece.whole(whole)}
            for key in ("exp_avg", "exp_avg_sq"):
                pieces[key] = Piece(torch.zeros_like(h.weight), h.shape, h.tile)
            self._register(h, pieces)
        self._regular.append((group, holdings))

    def _add_matrices(self, group: dict[str, Any], holdings: list[Holding], rule: Rule) -> None:
        # Spread over the group, not over a batch: what counts is the work of a step.
        gap, spread = group.get("update_proj_gap", 1), group.get("refresh") == "staggered"
        phases = {h.name: i * gap // len(holdings) if spread else 0 for i, h in enumerate(holdings)}
        alike: dict[tuple[Any, ...], list[Holding]] = {}
        for h in holdings:
            if len(h.shape) != 2:
                raise ConfigError(
                    [f"{h.name} has the shape {h.shape}: a group with a rank takes matrices only."]
                )
            alike.setdefault((h.shape, h.split, h.param.dtype, h.param.device), []).append(h)
        for (shape, *_), members in alike.items():
            hp = group
            if group["rank"] > min(shape):
                warnings.warn(
                    f"rank {group['rank']} is larger than {shape}: clamped to {min(shape)}", stacklevel=5
                )
                hp = _Clamped(group, min(shape))
            transposed = rule.transposed(shape, hp)
            slots = rule.state(Matrices.weights(members, transposed), hp)
            slots["step"] = Slot(torch.zeros(len(members), dtype=torch.int64), (), Tile.whole(()))
            slots["phase"] = Slot(torch.tensor([phases[h.name] for h in members]), (), Tile.whole(()))
            for i, h in enumerate(members):
                self._register(h, {key: Piece(t[i], shape, tile) for key, (t, shape, tile) in slots.items()})
            self._batches.append(
                Batch(members, transposed, hp, {key: slot[0] for key, slot in slots.items()})
            )

    def _register(self, holding: Holding, pieces: dict[str, Piece]) -> None:
        self._pieces[holding.name] = pieces
        self.state[holding.param] = {key: piece.tensor for key, piece in pieces.items()}

    def _gradients_are_finite(self) -> bool:
        holdings = [h for _, hs in self._regular for h in hs] + [h for b in self._batches for h in b.holdings]
        grads = [_grad(h) for h in holdings if h.param.grad is not None]
        if not grads:
            return True
        broken = (~torch.isfinite(torch.stack(torch._foreach_norm(grads)))).any().float()
        for group in {h.group for h in holdings if h.group is not None}:
            dist.all_reduce(broken, group=group)
        return not bool(broken)


class AdamW(ShardedOptimizer):
    """AdamW in the Hugging Face form (eps on the uncorrected root), on any supported sharding.

    Raises ConfigError for a negative learning rate, eps or weight decay, or betas outside [0, 1).
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
        check_finite: bool = True,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        super().__init__(params, defaults, None, check_finite)


class _Clamped(dict[str, Any]):
    """A param group seen with a smaller rank; everything else follows the group."""

    def __init__(self, group: dict[str, Any], rank: int):
        super().__init__(rank=rank)
        self.group = group

    def __missing__(self, key: str) -> Any:
        return self.group[key]


def _grad(holding: Holding) -> Tensor:
    grad = holding.grad
    assert grad is not None
    return grad


def _check(group: dict[str, Any]) -> None:
    """Raise ConfigError naming everything in a param group that cannot work."""
    known: dict[str, tuple[Callable[[Any], bool], str]] = {
        "lr": (lambda x: x >= 0, "at least 0"),
        "eps": (lambda x: x >= 0, "at least 0"),
        "weight_decay": (lambda x: x >= 0, "at least 0"),
        "betas": (lambda x: all(0 <= beta < 1 for beta in x), "in [0, 1)"),
        "rank": (lambda x: x is None or (isinstance(x, int) and x >= 1), "a whole number from 1"),
        "update_proj_gap": (lambda x: isinstance(x, int) and x >= 1, "a whole number from 1"),
    }
    choices = {
        "proj_type": ("std", "reverse_std", "left", "right", "full"),
        "subspace": METHODS,
        "refresh": ("fixed", "staggered"),
        "moments_at_refresh": ("keep", "reset", "rotate"),
    }
    wrong = [
        f"{k}={group[k]!r}: must be {must}."
        for k, (fits, must) in known.items()
        if k in group and not fits(group[k])
    ]
    wrong += [
        f"{k}={group[k]!r}: must be one of {', '.join(known)}."
        for k, known in choices.items()
        if k in group and group[k] not in known
    ]
    if group.get("proj_type") == "full" and group.get("moments_at_refresh") == "rotate":
        wrong.append("moments_at_refresh='rotate': is not defined for proj_type='full'. Use keep or reset.")
    if wrong:
        raise ConfigError(wrong)
