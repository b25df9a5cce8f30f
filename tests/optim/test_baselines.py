"""Rules for comparison: SGD, eight-bit AdamW, plain low-rank weights, GradNormLoRP on Adafactor."""

import pytest
import torch
from transformers.optimization import Adafactor

from lrpretrain.config import OptimConfig
from lrpretrain.errors import ConfigError
from lrpretrain.optim import AdamW
from lrpretrain.optim.groups import build_optimizer


def draw(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(optim, shapes, steps=8):
    """Return parameters after some steps of a configured optimizer on drawn gradients."""
    params = {name: torch.nn.Parameter(draw(i, shape)) for i, (name, shape) in enumerate(shapes.items())}
    train(list(params.values()), build_optimizer(params.items(), optim, 16), steps)
    return list(params.values())


def train(params, optimizer, steps):
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = draw(100 * t + i, p.shape)
        optimizer.step()


DENSE = {"model.embed_tokens.weight": (20, 6), "model.layers.0.self_attn.q_proj.weight": (9, 6), "norm": (6,)}
FACTORS = {"self_attn.q_proj.weight_in": (6, 3), "self_attn.q_proj.weight_out": (9, 3), "norm": (6,)}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torch(momentum):
    ours = trained(OptimConfig("sgd", lr=0.1, momentum=momentum, weight_decay=0.1), DENSE)
    theirs = [torch.nn.Parameter(draw(i, shape)) for i, shape in enumerate(DENSE.values())]
    train(theirs, torch.optim.SGD(theirs, lr=0.1, momentum=momentum, weight_decay=0.1), 8)
    for p, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, twin)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_adafactor_equals_hugging_face_as_the_authors_script_sets_it(momentum):
    ours = trained(OptimConfig("adafactor", lr=0.1, momentum=momentum, weight_decay=0.1), DENSE)
    theirs = [torch.nn.Parameter(draw(i, shape)) for i, shape in enumerate(DENSE.values())]
    options = dict(scale_parameter=False, relative_step=False, weight_decay=0.1, beta1=momentum or None)
    train(theirs, Adafactor(theirs, lr=0.1, **options), 8)
    for p, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_a_step_that_is_not_sound_changes_nothing(rule):
    optim = OptimConfig(
        rule, momentum=0.9 if rule == "sgd" else 0, moments="int8" if rule == "adamw" else None
    )
    params = [(name, torch.nn.Parameter(draw(i, s))) for i, (name, s) in enumerate(DENSE.items())]
    optimizer = build_optimizer(params, optim, 16)
    train([p for _, p in params], optimizer, 2)
    everything = [p.detach() for _, p in params] + [t for s in optimizer.state.values() for t in s.values()]
    before = [tensor.clone() for tensor in everything]
    for _, p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step_if(torch.tensor(False))
    optimizer.settle(False)
    assert all(torch.equal(a, b) for a, b in zip(everything, before, strict=True))


def test_eight_bits_follow_adamw():
    shapes = DENSE | {"lm_head.weight": (5, 300)}  # rows of three blocks
    eight = trained(OptimConfig("adamw", moments="int8", weight_decay=0.1), shapes, 30)
    floats = trained(OptimConfig("adamw", weight_decay=0.1), shapes, 30)
    start = [draw(i, shape) for i, shape in enumerate(shapes.values())]
    for p, twin, first in zip(eight, floats, start, strict=True):
        assert (p - twin).norm() < 0.05 * (twin - first).norm()
    assert torch.equal(eight[2], floats[2]) and not torch.equal(eight[0], floats[0])


def test_eight_bits_take_a_quarter_of_the_memory():
    def state(moments):
        params = [("a.weight", torch.nn.Parameter(torch.ones(64, 256)))]
        optimizer = build_optimizer(params, OptimConfig("adamw", moments=moments), 16)
        return sum(p.tensor.nbytes for _, _, p in optimizer.pieces())

    assert state("int8") < 0.27 * state(None)


def test_factored_is_adamw_on_the_factors():
    ours = trained(OptimConfig("factored", lr=0.01, exact_every=2), FACTORS)
    theirs = [torch.nn.Parameter(draw(i, shape)) for i, shape in enumerate(FACTORS.values())]
    train(theirs, AdamW(theirs, lr=0.01), 8)
    for p, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, twin)


@pytest.mark.parametrize("kind", ["all", "lrk", "reg"])
@pytest.mark.parametrize("rule", ["loro", "factored"])
def test_moments_can_be_zeroed_apart_from_exact_steps(rule, kind):
    params = {name: torch.nn.Parameter(draw(i, s)) for i, (name, s) in enumerate(FACTORS.items())}
    optim = OptimConfig(rule, refresh_moments=kind, exact_every=4, refresh_moments_every=3)
    optimizer = build_optimizer(params.items(), optim, 16)
    counts = {"weight_in": [], "norm": []}
    for _ in range(7):
        train(list(params.values()), optimizer, 1)
        for name, seen in counts.items():
            (s,) = [
                s for p, s in optimizer.state.items() if any(p is q for n, q in params.items() if name in n)
            ]
            assert (int(s["step"]) == 0) == (float(s["exp_avg_sq"].norm()) == 0)
            seen.append(int(s["step"]))
    zeroed, running = [1, 2, 0, 1, 2, 0, 1], [1, 2, 3, 4, 5, 6, 7]
    assert counts["weight_in"] == (running if kind == "reg" else zeroed)
    assert counts["norm"] == (running if kind == "lrk" else zeroed)


def test_gradnormlorp_on_adafactor():
    """Against weight normalisation by autograd, with Hugging Face's Adafactor on the projected direction."""
    name, lr = "model.layers.0.self_attn.q_proj.weight", 0.05
    optim = OptimConfig(
        "gradnormlorp", base="adafactor", lr=lr, rank=3, scale=0.5, subspace="svd", refresh_every=99
    )
    W = torch.nn.Parameter(draw(0, (9, 6)))
    optimizer = build_optimizer([(name, W)], optim, 16)
    v0, g = W.detach().clone(), torch.nn.Parameter(W.detach().norm(dim=1))
    Y = torch.nn.Parameter(torch.zeros(9, 3))  # what Adafactor trains: v = v0 + α Y Pᵀ
    factored, magnitudes = (
        Adafactor([Y], lr=lr, relative_step=False, scale_parameter=False),
        AdamW([g], lr=lr),
    )
    P = None
    for t in range(6):
        G = draw(t + 1, (9, 6))
        W.grad = G.clone()
        optimizer.step()
        P = optimizer.state[W]["basis"] if P is None else P
        v = (v0 + 0.5 * Y.detach() @ P.T).requires_grad_()
        ((g[:, None] * v / v.norm(dim=1, keepdim=True)) * G).sum().backward()
        Y.grad = v.grad @ P
        factored.step()
        magnitudes.step()
        g.grad = None
        v = v0 + 0.5 * Y.detach() @ P.T
        torch.testing.assert_close(W, g[:, None] * v / v.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ConfigError, match="momentum"):
        build_optimizer([("a", torch.nn.Parameter(torch.ones(2)))], OptimConfig("sgd", momentum=momentum), 4)
