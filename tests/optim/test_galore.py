"""GaLore against trajectories of the authors' code, and its invariants."""

import json
import math

import numpy as np
import pytest
import torch
from recordings import GOLDEN, assert_followed, replay

from lrpretrain.errors import ConfigError
from lrpretrain.optim import AdamW, GaLoreAdamW
from lrpretrain.optim.galore import side_of


@pytest.mark.parametrize("case", ["std", "left", "right", "full", "std_wd", "std_nobias", "std_rankclip"])
def test_equals_the_authors(case, monkeypatch):
    assert_followed(replay(f"galore_adamw_{case}_f32", GaLoreAdamW, monkeypatch), 1e-5)


def test_equals_the_authors_in_bfloat16(monkeypatch):
    assert_followed(replay("galore_adamw_std_bf16", GaLoreAdamW, monkeypatch, torch.bfloat16), 6e-2)


def tiny_llama(z, prefix):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**json.loads(str(z["meta"]))["cfg"]))
    weights = {k.removeprefix(prefix): torch.tensor(z[k]) for k in z.files if k.startswith(prefix)}
    model.load_state_dict(weights)
    return model


def test_llama_forward_equals_the_authors():
    z = np.load(GOLDEN / "llama_tiny_forward.npz")
    model = tiny_llama(z, "w/")
    ids = torch.tensor(z["input_ids"])
    out = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100))
    out.loss.backward()
    torch.testing.assert_close(out.loss.item(), float(z["loss"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.logits, torch.tensor(z["logits"]), rtol=1e-5, atol=1e-5)
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, torch.tensor(z[f"g/{name}"]), rtol=1e-4, atol=1e-5)


def test_llama_run_equals_the_authors():
    z = np.load(GOLDEN / "llama_tiny_galore.npz")
    meta = json.loads(str(z["meta"]))
    model = tiny_llama(z, "init/")
    matrices = [p for n, p in model.named_parameters() if "attn" in n or "mlp" in n]
    others = [p for n, p in model.named_parameters() if not ("attn" in n or "mlp" in n)]
    options = dict(
        rank=meta["rank"], update_proj_gap=meta["gap_or_freq"], scale=meta["scale"], proj_type="std"
    )
    optimizer = GaLoreAdamW([{"params": others}, {"params": matrices, **options}])
    for t, lr in enumerate(z["lr"]):
        ids = torch.tensor(z["input_ids"][t])
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
        assert math.isclose(loss.item(), float(z["loss"][t]), rel_tol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
    for name, param in model.named_parameters():
        theirs = torch.tensor(z[f"step20/{name}"])
        assert (param - theirs).norm() < 1e-4 * theirs.norm(), name


def fresh(shapes=((24, 10), (10, 24), (24, 10)), seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    options = dict(rank=4, update_proj_gap=3, scale=0.25) | options
    return params, GaLoreAdamW([{"params": params, **options}], lr=0.01)


def step(params, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("subspace", ["svd", "warm"])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_repeats_to_the_bit_and_keeps_an_orthonormal_basis(side, subspace):
    runs = []
    for _ in range(2):
        params, optimizer = fresh(proj_type=side, subspace=subspace)
        for t in range(7):
            step(params, optimizer, t)
        runs.append([p.detach().clone() for p in params])
        for p in params:
            basis = optimizer.state[p]["basis"]
            torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_update_stays_in_the_subspace():
    params, optimizer = fresh(shapes=((24, 10),))
    before = params[0].detach().clone()
    step(params, optimizer, 0)
    assert torch.linalg.matrix_rank((params[0] - before).double(), rtol=1e-5) == 4


def test_rank_of_the_whole_matrix_and_no_refresh_is_rotated_adam():
    """With P square and orthogonal, G P Pᵀ = G: only Adam's element-wise root sees the basis."""
    params, optimizer = fresh(shapes=((6, 6),), rank=6, scale=1.0)
    W = params[0].detach().clone()
    step(params, optimizer, 0)
    P = optimizer.state[params[0]]["basis"]
    twin = torch.nn.Parameter(W @ P)
    twin.grad = params[0].grad @ P
    AdamW([twin], lr=0.01).step()
    torch.testing.assert_close(params[0].detach(), twin.detach() @ P.T, rtol=1e-5, atol=1e-6)


def test_batches_equal_one_by_one():
    together, optimizer = fresh()
    singles = [fresh(shapes=(p.shape,)) for p in together]
    for (single, _), p in zip(singles, together, strict=True):
        single[0].data.copy_(p.data)
    for t in range(5):
        step(together, optimizer, t)
        for (single, own), p in zip(singles, together, strict=True):
            single[0].grad = p.grad.clone()
            own.step()
    for (single, _), p in zip(singles, together, strict=True):
        torch.testing.assert_close(single[0], p)


def test_a_matrix_without_gradient_is_left_alone():
    params, optimizer = fresh()
    step(params, optimizer, 0)
    before, moments = params[0].detach().clone(), optimizer.state[params[0]]["exp_avg"].clone()
    other = params[2].detach().clone()
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], before) and torch.equal(optimizer.state[params[0]]["exp_avg"], moments)
    assert not torch.equal(params[2], other)
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 2, 2]


def test_a_gradient_that_is_not_finite_changes_nothing():
    params, optimizer = fresh()
    step(params, optimizer, 0)
    before = [p.detach().clone() for p in params]
    state = {k: v.clone() for k, v in optimizer.state[params[1]].items()}
    params[0].grad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert all(torch.equal(v, optimizer.state[params[1]][k]) for k, v in state.items())


@pytest.mark.parametrize(
    "option", [{"rank": 0}, {"update_proj_gap": 0}, {"proj_type": "up"}, {"subspace": "magic"}, {"lr": -1.0}]
)
def test_bad_options_are_named(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        fresh(**option)


def test_converges_and_any_scheduler_may_set_the_rate():
    torch.manual_seed(0)
    target = torch.randn(20, 6) @ torch.randn(6, 30)
    W = torch.nn.Parameter(torch.zeros(20, 30))
    optimizer = GaLoreAdamW([{"params": [W], "rank": 6, "update_proj_gap": 10, "scale": 1.0}], lr=0.3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=200)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (W - target).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert loss < 1e-2 * target.square().mean()


@pytest.mark.parametrize(
    ("shape", "proj_type", "side"),
    [
        ((3, 2), "std", "right"),
        ((2, 2), "std", "right"),
        ((2, 3), "std", "left"),
        ((2, 3), "reverse_std", "right"),
    ],
)
def test_side(shape, proj_type, side):
    assert side_of(shape, proj_type) == side


def schedule_of(refresh, gap=6, n=4, steps=20):
    """Return, for each step, how many bases were refreshed."""
    params, optimizer = fresh(shapes=((8, 6),) * n, rank=2, update_proj_gap=gap, refresh=refresh)
    counts = []
    for t in range(steps):
        step(params, optimizer, t)
        counts.append(sum(len(note.names) for note in optimizer.rule.refreshes))
        optimizer.rule.refreshes = []
    return counts


def test_staggered_refreshes_are_as_many_and_spread():
    fixed, staggered = schedule_of("fixed"), schedule_of("staggered")
    assert fixed == [4, 0, 0, 0, 0, 0] * 3 + [4, 0]
    assert staggered[0] == 4  # there is no basis before
    assert max(staggered[1:]) == 1
    assert sum(staggered[1:19]) == sum(fixed[1:19])


def test_reset_starts_the_moments_anew():
    params, optimizer = fresh(shapes=((8, 6),), rank=2, moments_at_refresh="reset", scale=1.0)
    for t in range(3):
        step(params, optimizer, t)
    before = params[0].detach().clone()
    step(params, optimizer, 3)  # the refresh of t = 3, with a gap of 3
    state = optimizer.state[params[0]]
    assert (int(state["step"]), int(state["age"])) == (4, 1)
    # A first Adam update moves every coordinate of the subspace by lr (eps aside).
    moved = (params[0].detach() - before) @ state["basis"]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.01), rtol=1e-3, atol=0)


def test_rotate_takes_the_moments_to_the_new_basis():
    params, optimizer = fresh(shapes=((8, 6),), rank=6, moments_at_refresh="rotate", scale=1.0, eps=1e-30)
    for t in range(3):
        step(params, optimizer, t)
    state = optimizer.state[params[0]]
    whole = (state["exp_avg"] @ state["basis"].T).clone()  # (m, n): rank 6 of 6 keeps everything
    step(params, optimizer, 3)
    expected = 0.9 * whole + 0.1 * params[0].grad
    torch.testing.assert_close(state["exp_avg"] @ state["basis"].T, expected, rtol=1e-4, atol=1e-5)
    assert (state["exp_avg_sq"] >= 0).all()


def test_rotating_a_two_sided_projection_is_refused():
    with pytest.raises(ConfigError, match="full"):
        fresh(proj_type="full", moments_at_refresh="rotate")
