"""LORO against trajectories of the authors' code, a dense reference of the exact step, and its invariants."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lrpretrain.errors import ConfigError
from lrpretrain.model.lowrank import LowRankLinear, initial_factor
from lrpretrain.optim import LOROAdamW, loro

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("tall", "wide", "square")


@pytest.fixture
def recorded_signs(monkeypatch):
    """Give each column of new factors the recorded sign, which is the whim of the CPU that LAPACK ran on."""

    def install(targets):
        plain = loro.exact_step

        def exact_step(B, A, dB, dA, eta):
            B, A, exists = plain(B, A, dB, dA, eta)
            for i in range(len(B)):
                theirs = next(t for t in targets() if t.shape == B[i].shape)
                signs = (B[i] * theirs).sum(0).sign()
                B[i], A[i] = B[i] * signs, A[i] * signs
            return B, A, exists

        monkeypatch.setattr(loro, "exact_step", exact_step)

    return install


@pytest.mark.parametrize(
    "case", ["exact5_norefresh", "exact5_refresh_all", "exact5_wd", "lazyonly", "adapter_xavier"]
)
def test_equals_the_authors(case, recorded_signs):
    z = np.load(GOLDEN / f"loro_{case}_f32.npz")
    meta = json.loads(str(z["meta"]))
    regular = [n for n in ("norm", "dense") if f"{n}/init" in z.files]
    sides = {side: [f"mlp.{n}.weight_{side}" for n in NAMES] for side in ("in", "out")}
    names = [*regular, *sides["in"], *sides["out"]]
    params = {n: torch.nn.Parameter(torch.tensor(z[f"{n}/init"])) for n in names}
    hidden = {} if meta["adapter_alpha"] else {"hidden_size": meta["hidden_size"]}
    groups = [{"type": "regular", "params": [params[n] for n in regular]}] if regular else []
    for side, members in sides.items():
        options = {"type": f"lowrank_{side}", "lr_scaler": meta["lr_scaler"], **hidden}
        groups.append({"params": [params[n] for n in members], **options})
    optimizer = LOROAdamW(
        groups, weight_decay=meta["weight_decay"], exact_every=meta["loro_freq"], refresh=meta["refresh"]
    )
    step = 0
    recorded_signs(lambda: [torch.tensor(z[f"{n}/w"][step + 1]) for n in sides["out"]])
    for step, lr in enumerate(z["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        for n in names:
            params[n].grad = torch.tensor(z[f"{n}/grad"][step])
        optimizer.step()
        for n in names:
            theirs = torch.tensor(z[f"{n}/w"][step + 1])
            torch.testing.assert_close(
                params[n].detach(), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max())
            )
    assert optimizer.deficient_pairs == 0
    assert bool(z["exact"].any()) == (case != "lazyonly")


@pytest.mark.parametrize("kind", ["cons", "incons"])
@pytest.mark.parametrize("name", NAMES)
def test_one_exact_step_equals_the_authors_and_the_dense_one(name, kind):
    z = np.load(GOLDEN / "loro_exact_unit.npz")
    lr = json.loads(str(z["meta"]))["lr"]
    given = {k: torch.tensor(z[f"{name}_{kind}/{k}"])[None] for k in ("M", "N", "dM", "dN")}
    B, A, exists = loro.exact_step(*given.values(), torch.tensor([lr]))
    assert bool(exists)
    torch.testing.assert_close((B @ A.mT)[0], torch.tensor(z[f"{name}_{kind}/W_new"]), rtol=1e-5, atol=1e-5)
    if kind == "cons":
        dense = torch.tensor(z[f"{name}_{kind}/W_dense_ref"])
        torch.testing.assert_close((B @ A.mT)[0], dense, rtol=1e-5, atol=1e-5)


def draw(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_exact_step_is_the_best_approximation_of_the_riemannian_gradient_step():
    """Against SVD_r(W − η P(G)) formed densely, with the gradients themselves as directions."""
    B, A, G, eta = draw(0, (12, 3)), draw(1, (8, 3)), draw(2, (12, 8)), 0.3
    QB, QA = (torch.linalg.qr(x).Q for x in (B, A))
    projected = QB @ QB.T @ G + G @ QA @ QA.T - QB @ QB.T @ G @ QA @ QA.T
    U, s, Vh = torch.linalg.svd(B @ A.T - eta * projected)
    dense = U[:, :3] * s[:3] @ Vh[:3]
    new_B, new_A, exists = loro.exact_step(
        B[None], A[None], (G @ A)[None], (G.T @ B)[None], torch.tensor([eta])
    )
    assert bool(exists)
    torch.testing.assert_close((new_B @ new_A.mT)[0], dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new_B.mT @ new_B, new_A.mT @ new_A, rtol=1e-4, atol=1e-5)  # balanced


def pair(B, A, **kwargs):
    B, A = torch.nn.Parameter(B), torch.nn.Parameter(A)
    groups = [{"type": "lowrank_in", "params": [A]}, {"type": "lowrank_out", "params": [B]}]
    return B, A, LOROAdamW(groups, lr=0.01, **kwargs)


@pytest.mark.parametrize("factor", ["zero", "repeated"])
def test_a_factor_of_deficient_rank_takes_a_lazy_step(factor):
    start = torch.zeros(9, 3) if factor == "zero" else draw(0, (9, 1)).float().repeat(1, 3)
    B, A, optimizer = pair(start, draw(1, (7, 3)).float(), exact_every=1)
    twin_B, twin_A, twin = pair(start.clone(), draw(1, (7, 3)).float(), exact_every=0)
    for p, q, seed in ((B, twin_B, 2), (A, twin_A, 3)):
        p.grad = draw(seed, p.shape).float()
        q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert optimizer.deficient_pairs == 1
    assert torch.equal(B, twin_B) and torch.equal(A, twin_A)
    assert torch.equal(B.grad, twin_B.grad)  # gradients are left alone


def test_the_driver_may_decide_which_steps_are_exact_and_when_to_refresh():
    runs = []
    for by_driver in (True, False):
        B, A, optimizer = pair(
            draw(0, (9, 3)).float(), draw(1, (7, 3)).float(), exact_every=0 if by_driver else 2
        )
        for t in range(4):
            B.grad, A.grad = draw(10 + t, (9, 3)).float(), draw(20 + t, (7, 3)).float()
            optimizer.step(use_exact_loro=t % 2 == 1) if by_driver else optimizer.step()
        runs.append((B.detach().clone(), A.detach().clone()))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    optimizer.refresh_states("reg")
    assert int(optimizer.state[B]["step"]) == 4
    optimizer.refresh_states("lrk")
    assert int(optimizer.state[B]["step"]) == 0
    assert not optimizer.state[A]["exp_avg"].any()


def test_eucl_is_adamw_on_the_factors():
    B, A, optimizer = pair(draw(0, (9, 3)).float(), draw(1, (7, 3)).float(), loro_type="eucl", exact_every=1)
    twin = torch.nn.Parameter(B.detach().clone())
    B.grad, A.grad = draw(2, (9, 3)).float(), draw(3, (7, 3)).float()
    twin.grad = B.grad.clone()
    optimizer.step()
    LOROAdamW([twin], lr=0.01).step()
    torch.testing.assert_close(B, twin)


def test_pairs_without_a_gradient_are_left_alone():
    B, A, optimizer = pair(draw(0, (9, 3)).float(), draw(1, (7, 3)).float(), exact_every=1)
    before = B.detach().clone()
    A.grad = torch.ones_like(A)
    optimizer.step()
    assert torch.equal(B, before)


@pytest.mark.parametrize(
    ("groups", "kwargs", "words"),
    [
        ([], {"loro_type": None}, "loro_type"),
        ([], {"refresh": "some"}, "refresh"),
        ([{"type": "low"}], {}, "type='low'"),
        ([{"type": "lowrank_in", "lr_scaler": "auto"}], {}, "lr_scaler='auto'"),
        ([{"type": "lowrank_in"}], {}, "lowrank_out"),
    ],
)
def test_what_cannot_work_is_named(groups, kwargs, words):
    groups = [{"params": [torch.nn.Parameter(torch.ones(3, 2))], **g} for g in groups or [{}]]
    with pytest.raises(ConfigError, match=words):
        LOROAdamW(groups, **kwargs)


def test_low_rank_layers_stand_for_their_product():
    linear = torch.nn.Linear(7, 5)
    layer = LowRankLinear(linear, 3)
    x = torch.randn(2, 4, 7)
    torch.testing.assert_close(layer(x), x @ layer.dense().T + layer.bias)
    assert repr(layer) == "LowRankLinear(in_features=7, out_features=5, rank=3, init=xavier)"


@pytest.mark.parametrize(("d", "r"), [(64, 8), (8, 16)])
def test_inits(d, r):
    normal = torch.randn(d, r, generator=torch.Generator().manual_seed(0))
    for init, std in [("xavier", (2 / (d + r)) ** 0.5), ("kaiming", (2 / r) ** 0.5), ("randn_0.3", 0.3)]:
        torch.testing.assert_close(initial_factor(normal, init), normal * std)
    product = initial_factor(normal, "auto", 0.02).std() ** 2 * r**0.5
    assert float(product) == pytest.approx(0.02, rel=0.2)
    Q = initial_factor(normal, "orth")
    gram = Q.T @ Q if d >= r else Q @ Q.T
    torch.testing.assert_close(gram, torch.eye(min(d, r)), atol=1e-5, rtol=0)
    torch.testing.assert_close(initial_factor(normal, "xavorth"), Q * (2 / (d + r)) ** 0.5)
    assert bool((initial_factor(normal, "const_0.5") == 0.5).all())
    for bad in ("const_0", "randn", "xavier_3", "magic"):
        with pytest.raises(ValueError, match=r"not known|could not"):
            initial_factor(normal, bad)


def test_orth_works_in_bfloat16():
    layer = LowRankLinear(torch.nn.Linear(32, 16, dtype=torch.bfloat16), 4, "orth")
    W = layer.weight_in.float()
    assert float((W.T @ W - torch.eye(4)).abs().max()) < 2e-2


def test_every_group_has_its_own_options():
    torch.manual_seed(0)
    ins, outs = ([torch.nn.Parameter(torch.randn(5, 2)) for _ in range(2)] for _ in "AB")
    groups = [
        {"params": [p], "type": f"lowrank_{kind}", "lr": lr}
        for kind, params in (("in", ins), ("out", outs))
        for p, lr in zip(params, (0.1, 0.0), strict=True)
    ]
    optimizer = LOROAdamW(groups)
    before = [p.detach().clone() for p in ins + outs]
    for p in ins + outs:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(before, ins + outs, strict=True)] == [False, True] * 2


def test_staggered_exact_steps_are_as_many_and_spread():
    counts = {}
    for exact_steps in ("fixed", "staggered"):
        torch.manual_seed(0)
        ins, outs = ([torch.nn.Parameter(torch.randn(5, 2)) for _ in range(3)] for _ in "AB")
        groups = [{"params": ins, "type": "lowrank_in"}, {"params": outs, "type": "lowrank_out"}]
        optimizer = LOROAdamW(groups, exact_every=6, exact_steps=exact_steps)
        counts[exact_steps] = []
        for _ in range(12):
            for p in ins + outs:
                p.grad = torch.randn_like(p)
            optimizer.step()
            counts[exact_steps].append(optimizer.pop_metrics().get("loro/exact_pairs", 0))
    assert counts["fixed"] == [0, 0, 0, 0, 0, 3] * 2
    assert counts["staggered"] == [0, 1, 0, 1, 0, 1] * 2


def test_staggered_steps_need_no_pairs():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = LOROAdamW([{"params": [param]}], lr=0.1, exact_steps="staggered", refresh="all")
    param.grad = torch.ones(3)
    optimizer.step()
    assert (param < 1).all()
