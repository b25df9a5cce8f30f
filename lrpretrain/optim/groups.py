"""Which parameters the rule applies to: from a configuration to param groups and an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from lrpretrain.config import OptimConfig
from lrpretrain.errors import Problem
from lrpretrain.optim.adafactor import GaLoreAdafactor
from lrpretrain.optim.adamw8bit import AdamW8bit
from lrpretrain.optim.galore import GaLoreAdamW, side_of
from lrpretrain.optim.gradnormlorp import GradNormLoRPAdafactor, GradNormLoRPAdamW
from lrpretrain.optim.loro import LOROAdamW
from lrpretrain.optim.optimizer import AdamW, ShardedOptimizer
from lrpretrain.optim.sgd import SGD
from lrpretrain.sharding import hold

PROJECTED = {"galore": GaLoreAdamW, "gradnormlorp": GradNormLoRPAdamW}
FACTORED = ("loro", "factored")


def matched(
    shapes: Mapping[str, tuple[int, ...]], optim: OptimConfig, kinds: Sequence[str] = ("weight",)
) -> dict[str, int]:
    """Return the rank of every matrix that the rule applies to, by the parameter's name.

    `kinds` are the last parts of the names that count, in the layers of `optim.targets`.
    """
    ranks = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        targeted = any(fnmatchcase(layer, f"*{pattern}") for pattern in optim.targets)
        if kind in kinds and len(shape) == 2 and targeted:
            ranks[name] = getattr(optim, _rank_field(name, optim))
    return ranks


def projection_ranks(shapes: Mapping[str, tuple[int, ...]], optim: OptimConfig) -> dict[str, int]:
    """Return the rank for every matrix that is projected, by name: the matched ones, or their adapters."""
    return matched(shapes, optim, ("lora_A", "lora_B") if optim.mode == "dora" else ("weight",))


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
    if optim.rule not in (*PROJECTED, *FACTORED):
        return found
    if optim.rule == "gradnormlorp" and optim.mode == "weightnorm" and optim.side == "full":
        reason = "is not defined for the weight-normalised directions of gradnormlorp"
        found.append(Problem("optim.side", optim.side, reason, "Use std"))
    if optim.side == "full" and optim.moments_at_refresh == "rotate":
        reason = "is not defined for optim.side=full"
        found.append(Problem("optim.moments_at_refresh", "rotate", reason, "Use keep or reset"))
    if optim.placement == "seeded" and (optim.subspace != "random" or optim.side == "full"):
        reason = f"draws random bases anew: optim.subspace={optim.subspace}, optim.side={optim.side}"
        found.append(Problem("optim.placement", "seeded", reason, "Use auto, or optim.subspace=random"))
    if optim.placement == "aligned" and optim.side == "full":
        reason = "optim.side=full needs whole matrices"
        found.append(Problem("optim.placement", "aligned", reason, "Use auto or owner"))
    dora, names = optim.mode == "dora", matched(shapes, optim)
    for field in sorted({_rank_field(name, optim) for name in names}) if dora else ():
        if getattr(optim, field) > optim.adapter_rank:
            reason = f"is larger than optim.adapter_rank={optim.adapter_rank}, the rank of what is projected"
            remedy = "Lower it, or raise optim.adapter_rank"
            found.append(Problem(f"optim.{field}", getattr(optim, field), reason, remedy))
    too_large: dict[str, list[str]] = {}
    for name in names:
        field = "adapter_rank" if dora else _rank_field(name, optim)
        if getattr(optim, field) > min(shapes[name]):
            too_large.setdefault(field, []).append(name)
    for field, members in too_large.items():
        name = min(members, key=lambda n: min(shapes[n]))
        reason = f"is larger than the smallest matched matrix ({name}: {shapes[name][0]} × {shapes[name][1]})"
        remedy = "Lower it, or exclude the matrix in optim.targets"
        found.append(Problem(f"optim.{field}", getattr(optim, field), reason, remedy))
    return found


def projected(shapes: Mapping[str, tuple[int, ...]], optim: OptimConfig) -> frozenset[str]:
    """Return the parameters that the rule treats as matrices, by name; low-rank factors as well."""
    if optim.rule in FACTORED:
        return frozenset(name for name in shapes if name.endswith(("weight_in", "weight_out")))
    return frozenset(projection_ranks(shapes, optim) if optim.rule in PROJECTED else ())


def projected_on_the_left(shapes: Mapping[str, tuple[int, ...]], optim: OptimConfig) -> frozenset[str]:
    """Return the matrices of which the rule needs whole columns rather than whole rows."""
    if optim.rule not in PROJECTED:
        return frozenset()
    names = projected(shapes, optim)
    return frozenset(name for name in names if side_of(shapes[name], optim.side) == "left")


def build_optimizer(
    params: Iterable[tuple[str, Tensor]], optim: OptimConfig, hidden_size: int
) -> ShardedOptimizer:
    """Return the configured optimizer of the named parameters that are trained, laid out already.

    Every param group carries its peak rate as `peak_lr`. Non-finite gradients are the engine's business.
    """
    named = {name: param for name, param in params if param.requires_grad}
    regular_lr = optim.lr if optim.lr_regular is None else optim.lr_regular
    if optim.rule in FACTORED:
        groups = _factor_groups(named, optim, hidden_size)
    else:
        groups = _matrix_groups(named, optim)
    targeted = {name for group in groups for name, _ in group["params"]}
    rest = [(name, param) for name, param in named.items() if name not in targeted]
    groups = [{"params": rest, "lr": regular_lr, "peak_lr": regular_lr}, *groups]
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {
        "lr": optim.lr,
        "weight_decay": optim.weight_decay,
        "check_finite": False,
    }
    if optim.rule == "sgd":
        return SGD(groups, **common, momentum=optim.momentum, moments=optim.moments)
    if "adafactor" in (optim.rule, optim.base):  # as the authors' training script sets it
        adafactor = GradNormLoRPAdafactor if optim.rule == "gradnormlorp" else GaLoreAdafactor
        common |= {"beta1": optim.momentum or None, "scale_parameter": False, "relative_step": False}
        return adafactor(groups, **common)
    common |= {"betas": optim.betas, "eps": optim.eps}
    if optim.rule == "adamw" and optim.moments == "int8":
        return AdamW8bit(groups, **common)
    common["moments"] = optim.moments
    if optim.rule in FACTORED:
        common["refresh"] = None if optim.refresh_moments == "none" else optim.refresh_moments
        common["refresh_every"] = optim.refresh_moments_every
        if optim.rule == "factored":
            return LOROAdamW(groups, **common, loro_type="eucl")
        return LOROAdamW(groups, **common, exact_every=optim.exact_every, exact_steps=optim.refresh)
    if optim.rule == "gradnormlorp":
        return GradNormLoRPAdamW(groups, **common, mode=optim.mode)
    return PROJECTED.get(optim.rule, AdamW)(groups, **common)


def _matrix_groups(named: Mapping[str, Tensor], optim: OptimConfig) -> list[dict[str, Any]]:
    """Return a group for each rank, with the rule's options in the words of its authors."""
    ranks = projection_ranks({name: hold(name, param).shape for name, param in named.items()}, optim)
    groups: list[dict[str, Any]] = []
    for rank in sorted(set(ranks.values())):
        group = {"params": [(n, p) for n, p in named.items() if ranks.get(n) == rank], "peak_lr": optim.lr}
        if optim.rule in PROJECTED:
            group |= {
                "rank": rank,
                "update_proj_gap": optim.refresh_every,
                "scale": optim.scale,
                "proj_type": optim.side,
                "subspace": optim.subspace,
                "refresh": optim.refresh,
                "moments_at_refresh": optim.moments_at_refresh,
                "placement": optim.placement,
                "basis": optim.basis,
            }
        groups.append(group)
    return groups


def _factor_groups(named: Mapping[str, Tensor], optim: OptimConfig, hidden_size: int) -> list[dict[str, Any]]:
    """Return the factors of low-rank layers, in and out in the same order."""
    layers = [name.removesuffix(".weight_in") for name in named if name.endswith(".weight_in")]
    options = {"peak_lr": optim.lr, "lr_scaler": optim.lr_scaler, "hidden_size": hidden_size}
    return [
        {
            "type": f"lowrank_{side}",
            "params": [(n, named[n]) for n in (f"{layer}.weight_{side}" for layer in layers)],
            **options,
        }
        for side in ("in", "out")
    ]
