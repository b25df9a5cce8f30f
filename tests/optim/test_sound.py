"""Steps that are not sound: the device decides, and nothing is left of them."""

import math

import pytest
import torch

from lrpretrain.optim import AdamW, GaLoreAdafactor, GaLoreAdamW, GradNormLoRPAdamW, LOROAdamW
from lrpretrain.optim.adamw8bit import AdamW8bit
from lrpretrain.optim.gradnormlorp import GradNormLoRPAdafactor
from lrpretrain.optim.sgd import SGD

GALORE = {
    "warm": {},
    "svd, rotate": {"subspace": "svd", "moments_at_refresh": "rotate"},
    "gram, left, reset": {"subspace": "gram", "proj_type": "left", "moments_at_refresh": "reset"},
    "random, staggered": {"subspace": "random", "refresh": "staggered"},
    "full": {"proj_type": "full"},
    "int8": {"moments": "int8"},
    "bfloat16": {"moments": "bfloat16", "basis": "bfloat16"},
}
CASES = {f"galore, {name}": (GaLoreAdamW, {"subspace": "warm"} | o, {}) for name, o in GALORE.items()}
CASES |= {
    "adamw": (AdamW, {}, {}),
    "adafactor": (GaLoreAdafactor, {}, {"lr": 0.01, "relative_step": False}),
    "weightnorm": (GradNormLoRPAdamW, {"subspace": "warm"}, {}),
    "weightnorm, int8, left": (GradNormLoRPAdamW, {"moments": "int8", "proj_type": "left"}, {}),
    "lowrank_wn": (GradNormLoRPAdamW, {}, {"mode": "lowrank_wn"}),
    "weightnorm, adafactor": (GradNormLoRPAdafactor, {}, {"lr": 0.01, "relative_step": False}),
    "adamw, int8": (AdamW8bit, {}, {}),
    "sgd": (SGD, {}, {"momentum": 0.9}),
    "loro": (LOROAdamW, {}, {"exact_every": 3, "refresh": "all"}),
    "factored": (LOROAdamW, {}, {"loro_type": "eucl", "refresh": "all", "refresh_every": 3}),
    "loro, staggered": (LOROAdamW, {}, {"exact_every": 4, "refresh": "lrk", "exact_steps": "staggered"}),
}


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(kind, options, kwargs, dtype):
    """Return parameters and an optimizer: a vector, and three matrices or two pairs of factors."""
    shapes = [(7, 3), (9, 3), (7, 3), (5, 3)] if kind is LOROAdamW else [(9, 7), (9, 7), (5, 8)]
    params = [torch.nn.Parameter(draw(i, *shape).to(dtype)) for i, shape in enumerate([(5,), *shapes])]
    groups = [{"params": params[:1]}]
    if kind is LOROAdamW:
        groups += [{"params": params[1::2], "type": "lowrank_in"}]
        groups += [{"params": params[2::2], "type": "lowrank_out"}]
    elif kind in (AdamW, AdamW8bit, SGD):
        groups += [{"params": params[1:]}]
    else:
        groups += [{"params": params[1:], "rank": 3, "update_proj_gap": 3} | options]
    kwargs = {"lr": 0.01, "weight_decay": 0.1} | kwargs
    return params, kind(groups, check_finite=False, **kwargs)


def everything(params, optimizer):
    state = {(i, key): t.clone() for i, p in enumerate(params) for key, t in optimizer.state[p].items()}
    return state | {i: p.detach().clone() for i, p in enumerate(params)}


def take(params, optimizer, t, sound=True, spoil=1.0):
    for i, p in enumerate(params):
        p.grad = draw(100 * t + i, *p.shape).to(p.dtype) * (spoil if i % 2 else 1.0)
    optimizer.step_if(torch.tensor(sound))
    optimizer.settle(sound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_sound_leaves_no_trace(case, dtype):
    """At a first step, at refreshes and exact steps (every third or fourth) and between them."""
    runs = []
    for unsound in ((), range(8)):
        params, optimizer = build(*CASES[case], dtype)
        for t in range(8):
            before = everything(params, optimizer)
            if t in unsound:
                take(params, optimizer, 50 + t, sound=False, spoil=(math.nan, math.inf, 1e4)[t % 3])
                torch.testing.assert_close(everything(params, optimizer), before, rtol=0, atol=0)
            take(params, optimizer, t)
            assert not all(torch.equal(before[i], p) for i, p in enumerate(params))
        runs.append(everything(params, optimizer))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_sound_step_is_the_step(case):
    runs = []
    for sound in (False, True):
        params, optimizer = build(*CASES[case], torch.float32)
        for t in range(8):
            if sound:
                take(params, optimizer, t)
                continue
            for i, p in enumerate(params):
                p.grad = draw(100 * t + i, *p.shape)
            optimizer.step()
        runs.append([p.detach() for p in params])
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)
