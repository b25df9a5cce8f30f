"""Which parameters the rule applies to: from a configuration to param groups and an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from lrpretrain.config import OptimConfig
from lrpretrain.errors import Problem
from lrpretrain.optim.galore import side_of
from lrpretrain.optim.optimizer import AdamW, GaLoreAdamW, GradNormLoRPAdamW, ShardedOptimizer

RULES = {"adamw": AdamW, "galore": GaLoreAdamW, "gradnormlorp": GradNormLoRPAdamW}


def matched(shapes: Mapping[str, tuple[int, ...]], optim: OptimConfig) -> dict[str, int]:
    """Return the rank of every matrix that the rule applies to, by the parameter's name."""
    ranks = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        targeted = any(fnmatchcase(layer, f"*{pattern}") for pattern in optim.targets)
        if kind == "weight" and len(shape) == 2 and targeted:
            ranks[name] = getattr(optim, _rank_field(name, optim))
    return ranks


def _rank_field(name: str, optim: OptimConfig) -> str:
    if "attn" in name and optim.attn_rank is not None:
        return "attn_rank"
    if "mlp" in name and optim.mlp_rank is not None:
        return "mlp_rank"
    return "rank"


def problems(shapes: Mapping[str, tuple[int, ...]], optim: OptimConfig) -> list[Problem | str]:
    """Return what cannot work: a pattern that matches nothing, a rank larger than a matrix."""
    found: list[Problem | str] = []
    for pattern in optim.targets:
        if not matched(shapes, OptimConfig(targets=[pattern])):
            remedy = "Use names of linear layers such as *.self_attn.q_proj"
            found.append(Problem("optim.targets", pattern, "matches no matrix of the model", remedy))
    if optim.rule == "adamw":
        return found
    if optim.rule == "gradnormlorp" and optim.side == "full":
        reason = "is not defined for the weight-normalised directions of gradnormlorp"
        found.append(Problem("optim.side", optim.side, reason, "Use std"))
    if optim.side == "full" and optim.moments_at_refresh == "rotate":
        reason = "is not defined for optim.side=full"
        found.append(Problem("optim.moments_at_refresh", "rotate", reason, "Use keep or reset"))
    too_large: dict[str, list[str]] = {}
    for name, rank in matched(shapes, optim).items():
        if rank > min(shapes[name]):
            too_large.setdefault(_rank_field(name, optim), []).append(name)
    for field, names in too_large.items():
        name = min(names, key=lambda n: min(shapes[n]))
        reason = f"is larger than the smallest matched matrix ({name}: {shapes[name][0]} × {shapes[name][1]})"
        remedy = "Lower it, or exclude the matrix in optim.targets"
        found.append(Problem(f"optim.{field}", getattr(optim, field), reason, remedy))
    return found


def projected_on_the_left(shapes: Mapping[str, tuple[int, ...]], optim: OptimConfig) -> frozenset[str]:
    """Return the matrices of which the rule needs whole columns rather than whole rows."""
    if optim.rule == "adamw":
        return frozenset()
    names = matched(shapes, optim)
    return frozenset(name for name in names if side_of(shapes[name], optim.side) == "left")


def build_optimizer(params: Iterable[tuple[str, Tensor]], optim: OptimConfig) -> ShardedOptimizer:
    """Return the configured optimizer of named parameters, laid out by an engine already.

    Every param group carries its peak rate as `peak_lr`. Non-finite gradients are the engine's business.
    """
    named = dict(params)
    ranks = matched({name: tuple(param.shape) for name, param in named.items()}, optim)
    regular_lr = optim.lr if optim.lr_regular is None else optim.lr_regular
    groups: list[dict[str, Any]] = [
        {
            "params": [(n, p) for n, p in named.items() if n not in ranks],
            "lr": regular_lr,
            "peak_lr": regular_lr,
        }
    ]
    for rank in sorted(set(ranks.values())):
        members = [(n, p) for n, p in named.items() if ranks.get(n) == rank]
        groups.append({"params": members, "peak_lr": optim.lr, **_rule_options(optim, rank)})
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "check_finite": False,
    }
    return RULES[optim.rule](groups, **common)


def _rule_options(optim: OptimConfig, rank: int) -> dict[str, Any]:
    """Return the options of a param group, in the words of the rule's authors."""
    if optim.rule == "adamw":
        return {}
    return {
        "rank": rank,
        "update_proj_gap": optim.refresh_every,
        "scale": optim.scale,
        "proj_type": optim.side,
        "subspace": optim.subspace,
        "refresh": optim.refresh,
        "moments_at_refresh": optim.moments_at_refresh,
    }
