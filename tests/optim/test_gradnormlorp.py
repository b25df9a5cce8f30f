"""GradNormLoRP: weightnorm against autograd through W = g v / ‖v‖, lowrank_wn against the authors' code."""

import pytest
import torch
from recordings import assert_followed, replay

from lrpretrain.errors import ConfigError
from lrpretrain.optim import AdamW, GaLoreAdamW, GradNormLoRPAdamW

SHAPES = [(9, 6), (6, 9), (9, 6)]


def draw(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(W, t):
    """A loss that depends on W in a curved way, different in every step."""
    return (torch.tanh(W @ draw(100 + t, (W.shape[1], 4))) - draw(200 + t, (W.shape[0], 4))).square().sum()


class Twin:
    """The rule as the paper writes it, one matrix, v kept whole and the gradients from autograd."""

    def __init__(self, W, rank, gap, scale, lr, side, decay):
        self.v, self.g = W.clone().requires_grad_(), W.norm(dim=1).clone().requires_grad_()
        self.rank, self.gap, self.scale, self.lr, self.side, self.decay = rank, gap, scale, lr, side, decay
        self.t, self.m, self.moments = 0, None, None

    def weight(self):
        return self.g[:, None] * self.v / self.v.norm(dim=1, keepdim=True)

    def step(self, t):
        dv, dg = torch.autograd.grad(loss(self.weight(), t), (self.v, self.g))
        left = self.side == "left" or (self.side == "std" and dv.shape[0] < dv.shape[1])
        D = dv.T if left else dv
        if self.t % self.gap == 0:
            u, _, vh = torch.linalg.svd((D.T if left else D).float(), full_matrices=False)
            self.P = (u[:, : self.rank] if left else vh[: self.rank].T).double()
        R = D @ self.P
        if self.m is None:
            self.m, self.moments = (
                [torch.zeros_like(x) for x in (R, R)],
                [torch.zeros_like(dg) for _ in range(2)],
            )
        self.t += 1
        eta = self.lr * (1 - 0.999**self.t) ** 0.5 / (1 - 0.9**self.t)
        N, n = self.adam(R, self.m), self.adam(dg, self.moments)
        update = N @ self.P.T
        with torch.no_grad():
            self.v -= eta * self.scale * (update.T if left else update)
            self.g -= eta * n
            self.g *= 1 - self.lr * self.decay

    def adam(self, x, moments):
        moments[0].mul_(0.9).add_(x, alpha=0.1)
        moments[1].mul_(0.999).addcmul_(x, x, value=0.001)
        return moments[0] / (moments[1].sqrt() + 1e-6)


@pytest.mark.parametrize("side", ["std", "left", "right"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_autograd_through_the_parametrisation(side, decay):
    params = [torch.nn.Parameter(draw(i, s)) for i, s in enumerate(SHAPES)]
    twins = [Twin(p.detach(), 3, 4, 0.5, 0.05, side, decay) for p in params]
    options = dict(rank=3, update_proj_gap=4, scale=0.5, proj_type=side)
    optimizer = GradNormLoRPAdamW([{"params": params, **options}], lr=0.05, weight_decay=decay)
    for t in range(11):
        for p in params:
            p.grad = torch.autograd.grad(loss(p, t), p)[0]
        optimizer.step()
        for p, twin in zip(params, twins, strict=True):
            twin.step(t)
            torch.testing.assert_close(p.detach(), twin.weight().detach(), rtol=1e-5, atol=1e-6)


def build(weights, **options):
    params = [torch.nn.Parameter(W.clone()) for W in weights]
    options = dict(rank=2, update_proj_gap=3) | options
    return params, GradNormLoRPAdamW([{"params": params, **options}], lr=0.01)


def test_the_magnitude_is_the_norm_of_the_row():
    params, optimizer = build([draw(0, (9, 6)).float(), draw(1, (6, 9)).float()])
    for t in range(7):
        for i, p in enumerate(params):
            p.grad = draw(10 * t + i, p.shape).float()
        optimizer.step()
        for p in params:
            torch.testing.assert_close(p.norm(dim=1), optimizer.state[p]["magnitude"], rtol=1e-5, atol=1e-6)


def test_a_gradient_along_the_weight_only_changes_the_magnitude():
    (p,), optimizer = build([draw(0, (9, 6)).float()])
    direction = p.detach() / p.detach().norm(dim=1, keepdim=True)
    p.grad = p.detach().clone()
    optimizer.step()
    assert not torch.allclose(p.norm(dim=1), draw(0, (9, 6)).float().norm(dim=1), rtol=1e-4)
    # What rounding leaves of the tangential part is noise that Adam would blow up, were eps not there.
    torch.testing.assert_close(p / p.norm(dim=1, keepdim=True), direction, rtol=0, atol=5e-3)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_zero_rows_do_not_become_nan_and_are_trained(shape):
    W = draw(0, shape).float()
    W[2] = 0
    (p,), optimizer = build([W])
    for t in range(5):
        p.grad = draw(t, shape).float()
        optimizer.step()
    assert p.isfinite().all()
    assert p[2].norm() > 0
    assert float(optimizer.state[p]["norm"][2]) == 0


def test_state_is_two_vectors_and_their_moments_beyond_galore():
    (p,), optimizer = build([draw(0, (9, 6)).float()])
    sizes = {key: tuple(t.shape) for key, t in optimizer.state[p].items()}
    assert sizes["magnitude"] == sizes["norm"] == sizes["magnitude_exp_avg"] == (9,)
    assert not any(shape == (9, 6) for shape in sizes.values())


def test_vectors_are_plain_adamw():
    vector, twin = (torch.nn.Parameter(draw(0, (5,)).float()) for _ in range(2))
    ours, theirs = GradNormLoRPAdamW([vector], lr=0.1), AdamW([twin], lr=0.1)
    vector.grad = twin.grad = draw(1, (5,)).float()
    ours.step()
    theirs.step()
    assert torch.equal(vector, twin)


def test_what_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="mode='magic'"):
        GradNormLoRPAdamW([torch.nn.Parameter(torch.ones(2, 2))], mode="magic")
    with pytest.raises(ConfigError, match="full"):
        build([draw(0, (4, 4))], proj_type="full")


@pytest.mark.parametrize("case", ["std", "std_wd"])
def test_lowrank_wn_equals_the_authors(case, monkeypatch):
    name = f"lowrank_wn_adamw_{case}_f32"
    assert_followed(replay(name, GradNormLoRPAdamW, monkeypatch, mode="lowrank_wn"), 1e-5)


@pytest.mark.parametrize(("shape", "rank"), [((9, 6), 2), ((6, 9), 2), ((9, 6), None), ((7,), None)])
def test_lowrank_wn_trains_zero_rows_as_without_normalisation(shape, rank):
    """A first step: what is zero moves as under GaLore or AdamW, and the rest of the matrix does not mind."""
    W, grad = draw(0, shape), draw(1, shape)
    W[2 if len(shape) == 2 else ...] = 0
    moved = {}
    for name, make in {"normalised": GradNormLoRPAdamW, "plain": GaLoreAdamW}.items():
        p = torch.nn.Parameter(W.clone())
        p.grad = grad.clone()
        options = {"mode": "lowrank_wn"} if make is GradNormLoRPAdamW else {}
        make([{"params": [p], "rank": rank}], lr=0.01, weight_decay=0.1, **options).step()
        moved[name] = p.detach()
    zero = W == 0
    torch.testing.assert_close(moved["normalised"][zero], moved["plain"][zero], rtol=1e-9, atol=1e-12)
    assert moved["normalised"].isfinite().all() and (moved["normalised"][zero] != 0).all()


def test_lowrank_wn_goes_on_where_rows_were_zero():
    params = [torch.nn.Parameter(torch.zeros(s)) for s in [(9, 6), (6, 9), (6, 5), (7,)]]
    groups = [{"params": params[:2], "rank": 2, "update_proj_gap": 3}, {"params": params[2:]}]
    optimizer = GradNormLoRPAdamW(groups, lr=0.01, mode="lowrank_wn")
    for t in range(7):
        for i, p in enumerate(params):
            p.grad = draw(10 * t + i, p.shape).float()
        optimizer.step()
    assert all(p.isfinite().all() and p.norm() > 0 for p in params)


def test_lowrank_wn_loads_its_state_to_the_bit():
    def fresh():
        params = [
            torch.nn.Parameter(draw(i, s).float()) for i, s in enumerate([(9, 6), (6, 9), (6, 5), (7,)])
        ]
        groups = [{"params": params[:2], "rank": 2, "update_proj_gap": 3}, {"params": params[2:]}]
        return params, GradNormLoRPAdamW(groups, lr=0.01, weight_decay=0.1, mode="lowrank_wn")

    def run(params, optimizer, steps):
        for t in steps:
            for i, p in enumerate(params):
                p.grad = draw(10 * t + i, p.shape).float()
            optimizer.step()

    params, optimizer = fresh()
    run(params, optimizer, range(4))
    others, again = fresh()
    for a, b in zip(others, params, strict=True):
        a.data.copy_(b.data)
    again.load_state_dict(optimizer.state_dict())
    for p, o in ((params, optimizer), (others, again)):
        run(p, o, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_lowrank_wn_takes_matrices_and_vectors_only():
    with pytest.raises(ConfigError, match="matrices and vectors"):
        GradNormLoRPAdamW([torch.nn.Parameter(torch.ones(2, 3, 4))], mode="lowrank_wn")
