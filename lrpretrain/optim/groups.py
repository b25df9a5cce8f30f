"""Which parameters the rule applies to: from a configuration to param groups and an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from lrpretrain.config import OptimConfig
from lrpretrain.errors import Problem
from lrpretrain.optim.optimizer import AdamW, GaLoreAdamW, ShardedOptimizer


def matched(names: Iterable[str], optim: OptimConfig) -> dict[str, int]:
    """Return the rank of every parameter that the rule applies to, by the parameter's name."""
    ranks = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and any(fnmatchcase(layer, f"*{pattern}") for pattern in optim.targets):
            own = optim.attn_rank if "attn" in layer else optim.mlp_rank if "mlp" in layer else None
            ranks[name] = own or optim.rank
    return ranks


def problems(shapes: Mapping[str, tuple[int, ...]], optim: OptimConfig) -> list[Problem | str]:
    """Return what cannot work: a pattern that matches nothing, a rank larger than a matrix."""
    if optim.rule == "adamw":
        return []
    found: list[Problem | str] = []
    for pattern in optim.targets:
        only = OptimConfig(targets=[pattern])
        if not matched((name for name, shape in shapes.items() if len(shape) == 2), only):
            remedy = "Use names of linear layers such as *.self_attn.q_proj"
            found.append(Problem("optim.targets", pattern, "matches no matrix of the model", remedy))
    too_large: dict[int, list[str]] = {}
    for name, rank in matched(shapes, optim).items():
        if rank > min(shapes[name]):
            too_large.setdefault(rank, []).append(name)
    for rank, names in too_large.items():
        name = min(names, key=lambda n: min(shapes[n]))
        reason = f"is larger than the smallest matched matrix ({name}: {shapes[name][0]} × {shapes[name][1]})"
        remedy = "Lower it, or exclude the matrix in optim.targets"
        found.append(Problem("optim.rank", rank, reason, remedy))
    return found


def build_optimizer(params: Iterable[tuple[str, Tensor]], optim: OptimConfig) -> ShardedOptimizer:
    """Return the configured optimizer of named parameters, laid out by an engine already.

    Every param group carries its peak rate as `peak_lr`. Non-finite gradients are the engine's business.
    """
    named = list(params)
    regular_lr = optim.lr if optim.lr_regular is None else optim.lr_regular
    common: dict[str, Any] = {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "check_finite": False,
    }
    if optim.rule == "adamw":
        return AdamW([{"params": named, "lr": optim.lr, "peak_lr": optim.lr}], **common)
    ranks = matched((name for name, _ in named), optim)
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in named if n not in ranks], "lr": regular_lr, "peak_lr": regular_lr}
    ]
    for rank in sorted(set(ranks.values())):
        groups.append(
            {
                "params": [(n, p) for n, p in named if ranks.get(n) == rank],
                "peak_lr": optim.lr,
                "rank": rank,
                "update_proj_gap": optim.refresh_every,
                "scale": optim.scale,
                "proj_type": optim.side,
                "subspace": optim.subspace,
                "refresh": optim.refresh,
                "moments_at_refresh": optim.moments_at_refresh,
            }
        )
    return GaLoreAdamW([g for g in groups if g["params"]], **common)
