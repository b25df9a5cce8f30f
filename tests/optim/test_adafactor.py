"""GaLore on Adafactor against a trajectory of the authors' code, torch's Adafactor and Hugging Face's."""

import pytest
import torch
from recordings import assert_followed, replay
from transformers.optimization import Adafactor

from lrpretrain.errors import ConfigError
from lrpretrain.optim import GaLoreAdafactor

GIVEN = dict(lr=0.01, relative_step=False)


def test_equals_the_authors(monkeypatch):
    assert_followed(replay("galore_adafactor_std_f32", GaLoreAdafactor, monkeypatch), 1e-5)


def draw(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"warmup_init": True, "weight_decay": 0.1},
        GIVEN | {"scale_parameter": False, "weight_decay": 0.1},
        GIVEN | {"beta1": 0.9, "clip_threshold": 0.5, "decay_rate": -0.5, "eps": (1e-4, 2.0)},
    ],
)
def test_without_a_rank_equals_hugging_face(options):
    params, twins = (
        [torch.nn.Parameter(draw(i, s).float()) for i, s in enumerate([(9, 6), (7,), (2, 3, 4)])]
        for _ in range(2)
    )
    ours, theirs = GaLoreAdafactor(params, **options), Adafactor(twins, **options)
    for t in range(8):
        for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
            p.grad, twin.grad = (draw(10 * t + i, p.shape).float() for _ in range(2))
        ours.step()
        theirs.step()
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, GIVEN | {"beta1": 0.9}])
@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_projected_is_adafactor_on_the_projected_gradient(shape, side, options):
    """Within a gap W − W_0 = α Y taken back, where Y starts at zero and is trained on R."""
    options = options | {"scale_parameter": False}
    W, twin = torch.nn.Parameter(draw(0, shape).float()), None
    group = {"params": [W], "rank": 3, "update_proj_gap": 100, "scale": 0.5, "proj_type": side}
    ours = GaLoreAdafactor([group], **options)
    start = W.detach().clone()
    for t in range(5):
        W.grad = draw(t + 1, shape).float()
        ours.step()
        s = ours.state[W]
        P, left = s["basis"], int(s["side"]) == 1
        G = W.grad.T if left else W.grad
        R = s["basis_left"].T @ G @ P if side == "full" else G @ P
        if twin is None:
            twin = torch.nn.Parameter(torch.zeros_like(R))
            theirs = Adafactor([twin], **options)
        twin.grad = R
        theirs.step()
        moved = 0.5 * twin.detach() @ P.T
        moved = s["basis_left"] @ moved if side == "full" else moved
        torch.testing.assert_close(W.detach() - start, moved.T if left else moved, rtol=1e-4, atol=1e-6)


def test_a_decayed_projected_matrix_shrinks_first_and_scales_with_its_own_size():
    W = torch.nn.Parameter(draw(0, (9, 6)).float())
    start = W.detach().clone()
    group = {"params": [W], "rank": 6, "scale": 1.0}
    W.grad = draw(1, (9, 6)).float()
    optimizer = GaLoreAdafactor([group], weight_decay=0.1)
    optimizer.step()
    rate = 1e-2 * start.square().mean().sqrt()
    P = optimizer.state[W]["basis"]
    moved = (W.detach() - (1 - 0.1 * rate) * start) @ P
    # After one update U = R / √(r cᵀ / mean r), clipped to RMS 1.
    square = (W.grad @ P).square()
    U = W.grad @ P / (square.mean(1, keepdim=True) * square.mean(0) / square.mean()).sqrt()
    torch.testing.assert_close(moved, -rate * U / U.square().mean().sqrt().clamp_min(1), rtol=1e-4, atol=1e-6)


def test_bfloat16_keeps_wide_moments_and_learns():
    target = (draw(0, (20, 4)) @ draw(1, (4, 30))).bfloat16()
    W, b = torch.nn.Parameter(torch.zeros_like(target)), torch.nn.Parameter(torch.zeros(30).bfloat16())
    groups = [{"params": [W], "rank": 8, "update_proj_gap": 10, "scale": 1.0}, {"params": [b]}]
    optimizer = GaLoreAdafactor(groups, lr=0.05, relative_step=False, scale_parameter=False)
    for t in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - t / 150)
        optimizer.zero_grad()
        loss = (W + b - target).float().square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 * target.float().square().mean()
    assert {t.dtype for s in optimizer.state.values() for k, t in s.items() if "exp_avg" in k} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.1}, "lr=0.1"),
        ({"relative_step": False}, "lr=None"),
        (GIVEN | {"warmup_init": True}, "warmup_init"),
        (GIVEN | {"subspace": "magic"}, "subspace"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        GaLoreAdafactor([torch.nn.Parameter(torch.ones(2, 2))], **options)


def test_moments_are_kept_at_a_refresh():
    group = {"params": [torch.nn.Parameter(torch.ones(4, 4))], "rank": 2, "moments_at_refresh": "reset"}
    with pytest.raises(ConfigError, match="moments_at_refresh='reset'"):
        GaLoreAdafactor([group], **GIVEN)
