"""Low-rank layers: W = B Aᵀ with trained factors, in the place of dense ones.

`apply_lowrank_param` and `get_lowrank_param` take what LORO's helpers of the same names take, so that a
script of that project runs with the import changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FACTORS = ("weight_in", "weight_out")
SCOPES = {"all": ("self_attn", "mlp"), "attn": ("self_attn",), "mlp": ("mlp",)}


class LowRankLinear(nn.Module):
    """A linear layer x A Bᵀ (+ bias): weight_in A (in, r), weight_out B (out, r).

    `init`: xavier, auto, kaiming, orth, xavorth, randn_<std> or const_<value>; see `initial_factor`.
    """

    def __init__(self, linear: nn.Linear, rank: int, init: str = "xavier", init_range: float | None = None):
        super().__init__()
        self.in_features, self.out_features, self.rank = linear.in_features, linear.out_features, rank
        self.init = init
        self.weight_in = nn.Parameter(linear.weight.new_empty(linear.in_features, rank))
        self.weight_out = nn.Parameter(linear.weight.new_empty(linear.out_features, rank))
        self.bias = None if linear.bias is None else nn.Parameter(torch.zeros_like(linear.bias))
        if not linear.weight.is_meta:
            with torch.no_grad():
                for factor in (self.weight_in, self.weight_out):
                    factor.copy_(initial_factor(torch.randn(factor.shape), init, init_range))

    def forward(self, x: Tensor) -> Tensor:
        """Return x A Bᵀ (+ bias), (…, out) for x (…, in)."""
        out = x @ self.weight_in @ self.weight_out.T
        return out if self.bias is None else out + self.bias

    def dense(self) -> Tensor:
        """Return the weight that the layer stands for, (out, in)."""
        return self.weight_out @ self.weight_in.T

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, rank={self.rank}, init={self.init}"


def initial_factor(normal: Tensor, init: str, init_range: float | None = None) -> Tensor:
    """Turn a standard normal draw (d, r) in float32 into an initial factor.

    xavier      standard deviation √(2 / (d + r))
    auto        standard deviation (init_range² / r)^¼: the product has init_range
    kaiming     standard deviation √(2 / r)
    orth        orthonormal columns (rows where d < r)
    xavorth     orth times √(2 / (d + r))
    randn_<s>   standard deviation s
    const_<c>   every entry c ≠ 0 (rank 1)

    Raises ValueError for another name, or `auto` without init_range.
    """
    d, r = normal.shape
    kind, _, argument = init.partition("_")
    if kind in ("xavier", "auto", "kaiming", "randn") and (kind == "randn") == bool(argument):
        if kind == "auto" and init_range is None:
            raise ValueError("init='auto' needs init_range, such as the model's initializer_range.")
        std = {
            "xavier": lambda: math.sqrt(2 / (d + r)),
            "auto": lambda: math.sqrt((init_range or 0.0) / math.sqrt(r)),
            "kaiming": lambda: math.sqrt(2 / r),
            "randn": lambda: float(argument),
        }[kind]()
        return normal * std
    if init in ("orth", "xavorth"):
        Q = torch.linalg.qr(normal if d >= r else normal.T).Q
        return (Q if d >= r else Q.T) * (math.sqrt(2 / (d + r)) if init == "xavorth" else 1.0)
    if kind == "const" and argument and float(argument) != 0:
        return torch.full_like(normal, float(argument))
    known = "xavier, auto, kaiming, orth, xavorth, randn_<std> and const_<value other than 0>"
    raise ValueError(f"init={init!r} is not known: use one of {known}.")


SPECTRAL = ("spec_top", "spec_low", "eig_low")


class LowRankAdapter(nn.Module):
    """A frozen linear layer with a trained low-rank change: x (W + s B Aᵀ)ᵀ + bias, s = alpha / rank.

    Parameters: weight W (m, n) and bias, frozen; weight_in A (n, r), weight_out B (m, r). At first s B Aᵀ is
    taken off W, so that the layer is the one that it takes over. `init`: as `initial_factor`, or by the
    singular vectors U, V of W, scaled to the size of xavier's columns: spec_top (the first r), spec_low (the
    last), eig_low (the last, times √σ).

    Source: LORO's `run_glue.py`. With `zero_bias` the bias is dropped for zeros, as there.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        alpha: float,
        init: str = "xavier",
        init_range: float | None = None,
        zero_bias: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = alpha / rank
        self.weight, self.bias = linear.requires_grad_(False).weight, linear.bias
        self.weight_in = nn.Parameter(self.weight.new_empty(linear.in_features, rank))
        self.weight_out = nn.Parameter(self.weight.new_empty(linear.out_features, rank))
        if self.weight.is_meta:
            return
        with torch.no_grad():
            if init in SPECTRAL:
                self._spectral(rank, init)
            else:
                for factor in (self.weight_in, self.weight_out):
                    factor.copy_(initial_factor(torch.randn(factor.shape), init, init_range))
            self.weight -= self.scale * self.weight_out @ self.weight_in.T
            if zero_bias and self.bias is not None:
                self.bias.zero_()

    def _spectral(self, rank: int, init: str) -> None:
        U, sigma, Vh = torch.linalg.svd(self.weight.float(), full_matrices=False)
        chosen = slice(0, rank) if init == "spec_top" else slice(len(sigma) - rank, None)
        root = sigma[chosen].sqrt() if init == "eig_low" else torch.ones(rank)
        for factor, vectors in ((self.weight_out, U), (self.weight_in, Vh.T)):
            factor.copy_(vectors[:, chosen] * root * math.sqrt(2 / (len(factor) + rank)))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (W + s B Aᵀ)ᵀ (+ bias), (…, m) for x (…, n)."""
        out = nn.functional.linear(x, self.weight, self.bias)
        return out + self.scale * (x @ self.weight_in @ self.weight_out.T)

    def dense(self) -> Tensor:
        """Return the weight that the layer stands for, (m, n)."""
        return self.weight + self.scale * self.weight_out @ self.weight_in.T


def factorize(model: nn.Module, ranks: Mapping[str, int], init: str) -> None:
    """Replace linear layers by low-rank ones, in place: `ranks` by the name of the layer's weight."""
    for name, rank in ranks.items():
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, child, LowRankLinear(getattr(module, child), rank, init))


def apply_lowrank_param(
    model: nn.Module,
    model_config: Any,
    model_type: str = "llama",
    scope: str = "all",
    attn_rank: int = 128,
    mlp_rank: int = 128,
    init: str = "xavier",
    verbose: bool = True,
) -> None:
    """Replace the linear layers of every decoder block's attention and MLP by low-rank ones, in place.

    `scope`: all, attn or mlp. Embeddings, head and norms stay dense. Raises ValueError for another model
    type or scope.
    """
    if model_type != "llama":
        raise ValueError(f"model_type={model_type!r}: only llama is supported.")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: use one of {', '.join(SCOPES)}.")
    before = sum(p.numel() for p in model.parameters())
    for block in model.model.layers:  # type: ignore[union-attr]
        for part in SCOPES[scope]:
            module, rank = getattr(block, part), attn_rank if part == "self_attn" else mlp_rank
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, LowRankLinear(child, rank, init, model_config.initializer_range))
    if verbose:
        after = sum(p.numel() for p in model.parameters())
        print(f"low-rank layers: {before:,} parameters became {after:,} ({after / before:.1%})")


def get_lowrank_param(model: nn.Module, model_config: Any, lr_scaler: float = -1) -> list[dict[str, Any]]:
    """Return the param groups that LOROAdamW takes: regular, lowrank_in and lowrank_out, pairs in order."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LowRankLinear)]
    factors = {id(p) for _, layer in layers for p in (layer.weight_in, layer.weight_out)}
    common = {
        "hidden_size": model_config.hidden_size,
        "intermediate_size": model_config.intermediate_size,
        "init_std": model_config.initializer_range,
    }
    regular = [p for p in model.parameters() if id(p) not in factors]
    groups: list[dict[str, Any]] = [{"type": "regular", "params": regular, **common}]
    kinds = ["mlp" if "mlp" in name else "attn" for name, _ in layers]
    for side in ("in", "out"):
        params = [getattr(layer, f"weight_{side}") for _, layer in layers]
        group = {"type": f"lowrank_{side}", "params": params, "params_type": kinds, "lr_scaler": lr_scaler}
        groups.append(group | common)
    return groups
