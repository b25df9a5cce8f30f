"""AdamW against a plain loop over the formulas of its docstring."""

import copy
import math
import warnings

import pytest
import torch

from lrpretrain.errors import ConfigError
from lrpretrain.optim import AdamW


def loop(w, gradients, lr, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.0, correct_bias=True):
    """Return the weights after each gradient; `lr` is a list of rates. One entry at a time, in float64."""
    w, m, v = list(w), [0.0] * len(w), [0.0] * len(w)
    trajectory = []
    for t, g in enumerate(gradients, start=1):
        eta = lr[t - 1]
        if correct_bias:
            eta = eta * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        for i, x in enumerate(g):
            m[i] = beta1 * m[i] + (1 - beta1) * x
            v[i] = beta2 * v[i] + (1 - beta2) * x * x
            w[i] = w[i] - eta * m[i] / (math.sqrt(v[i]) + eps)
            w[i] = w[i] - lr[t - 1] * weight_decay * w[i]
        trajectory.append(list(w))
    return trajectory


def gradients(steps, size, seed=0):
    """Return gradients (steps, size) of sizes from 1e-7, where eps counts, to 1."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-7, 0, size, dtype=torch.float64)
    return torch.randn(steps, size, generator=generator, dtype=torch.float64) * scales


CASES = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "no correction": {"correct_bias": False},
    "decay, no correction": {"weight_decay": 0.1, "correct_bias": False},
    "other betas and eps": {"betas": (0.5, 0.75), "eps": 1e-3},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_a_plain_loop(options, dtype, tolerance):
    W = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).to(dtype))
    G = gradients(20, 12)
    rates = [0.01 * (1 + t % 4) for t in range(20)]
    twin_options = {k: v for k, v in options.items() if k != "betas"}
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    twin = loop(W.detach().double().flatten().tolist(), G.tolist(), rates, beta1, beta2, **twin_options)
    optimizer = AdamW([W], lr=1.0, **options)
    for t in range(20):
        optimizer.param_groups[0]["lr"] = rates[t]
        W.grad = G[t].view(3, 4).to(dtype)
        optimizer.step()
        expected = torch.tensor(twin[t], dtype=torch.float64).view(3, 4)
        torch.testing.assert_close(W.detach().double(), expected, rtol=tolerance, atol=tolerance)


def test_every_parameter_counts_its_own_updates():
    G = gradients(4, 3)
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    optimizer = AdamW(params, lr=0.1)
    for t in range(4):
        params[0].grad = G[t].clone()
        params[1].grad = G[t].clone() if t >= 2 else None
        optimizer.step()
    for param, grads in zip(params, (G, G[2:]), strict=True):
        expected = loop([1.0] * 3, grads.tolist(), [0.1] * 4)[-1]
        torch.testing.assert_close(
            param.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        )
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 2]


def test_groups_have_options_of_their_own():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    options = [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.2, "eps": 1e-2}]
    optimizer = AdamW([{"params": [p], **o} for p, o in zip(params, options, strict=True)])
    G = gradients(5, 3)
    for g in G:
        for p in params:
            p.grad = g.clone()
        optimizer.step()
    for param, (rate, own) in zip(params, ((0.1, {"weight_decay": 0.5}), (0.2, {"eps": 1e-2})), strict=True):
        expected = loop([1.0] * 3, G.tolist(), [rate] * 5, **own)[-1]
        torch.testing.assert_close(
            param.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        )


def test_equals_torchs_where_eps_counts_for_nothing():
    G = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    theirs = copy.deepcopy(ours)
    pair = AdamW([ours], lr=0.1, eps=1e-15), torch.optim.AdamW([theirs], lr=0.1, eps=1e-15, weight_decay=0)
    for g in G:
        for param, optimizer in zip((ours, theirs), pair, strict=True):
            param.grad = g.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_a_rate_of_zero_moves_nothing_but_the_moments():
    W = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([W], lr=0.0, weight_decay=0.1)
    W.grad = torch.ones(3)
    optimizer.step()
    assert (W == 1).all() and int(optimizer.state[W]["step"]) == 1
    torch.testing.assert_close(optimizer.state[W]["exp_avg"], torch.full((3,), 0.1))
    torch.testing.assert_close(optimizer.state[W]["exp_avg_sq"], torch.full((3,), 0.001))


def test_gradients_of_zero_keep_the_weights_finite_and_still():
    W = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([W], lr=0.1)
    W.grad = torch.zeros(3)
    optimizer.step()
    assert (W == 1).all()


def test_step_takes_a_closure():
    W = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([W], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = W.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (W < 1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("checked", [True, False])
def test_a_gradient_that_is_not_finite_is_skipped_unless_the_engine_looks(bad, checked):
    W = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([W], lr=0.1, check_finite=checked)
    W.grad = torch.tensor([1.0, bad, 1.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert optimizer.skipped_steps == len(caught) == checked
    assert bool((W == 1).all()) == checked
    assert int(optimizer.state[W]["step"]) == (not checked)


@pytest.mark.parametrize(
    "option",
    [{"lr": -1.0}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}],
)
def test_options_that_cannot_work_are_named(option):
    ((name, value),) = option.items()
    with pytest.raises(ConfigError) as error:
        AdamW([torch.nn.Parameter(torch.ones(1))], **option)
    assert f"{name}={value!r}: must be " in str(error.value)
