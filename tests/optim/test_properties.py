"""What every optimizer keeps, whatever the shapes, options and gradients."""

import math
import random
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spawn import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lrpretrain.optim import AdamW, GaLoreAdamW, GradNormLoRPAdamW, LOROAdamW
from lrpretrain.optim.galore import side_of

CLASSES = {"adamw": AdamW, "galore": GaLoreAdamW, "gradnormlorp": GradNormLoRPAdamW, "loro": LOROAdamW}
SIDES = ["std", "reverse_std", "left", "right", "full"]
SUBSPACES = ["svd", "gram", "warm", "randomized", "random"]
LR = 0.01

few = settings(max_examples=40, deadline=None, derandomize=True)
quiet = pytest.mark.filterwarnings("ignore:rank .* clamped", "ignore:a gradient is not finite")


def draw(key, shape):
    """Return normals (shape) that depend on the key only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


@dataclass
class Case:
    """An optimizer and its parameters, built anew as often as a test likes."""

    rule: str
    shapes: list[tuple[int, int]]
    """Of the matrices; for LORO, of the products that its pairs stand for."""
    options: dict[str, Any]
    """Of the projected group; for LORO the rank only."""
    kwargs: dict[str, Any]
    dtype: torch.dtype = torch.float32
    zero_rows: bool = False

    def build(self, place=torch.clone):
        """Return the parameters by name, one of them frozen, and the optimizer."""

        def param(name, *shape):
            values = draw(name, shape).to(self.dtype)
            if self.zero_rows and len(shape) == 2:
                values[: shape[0] // 2] = 0
            return name, torch.nn.Parameter(place(values), requires_grad=name != "frozen")

        groups = [{"params": [param("vector", 5), param("frozen", 3, 2)]}]
        if self.rule == "loro":
            for side, dim in (("in", 1), ("out", 0)):
                factors = [
                    param(f"{side}{i}", shape[dim], self.options["rank"])
                    for i, shape in enumerate(self.shapes)
                ]
                groups.append({"params": factors, "type": f"lowrank_{side}"})
        else:
            matrices = [param(f"matrix{i}", *shape) for i, shape in enumerate(self.shapes)]
            groups.append({"params": matrices} | self.options)
        params = dict(pair for group in groups for pair in group["params"])
        return params, CLASSES[self.rule](groups, lr=LR, **self.kwargs)


def partner(name):
    """Return the other factor of a pair of LORO; any other parameter stands alone."""
    return name.replace("in", "out") if name.startswith("in") else name.replace("out", "in")


class Step(NamedTuple):
    """Gradients to give: their size, which parameters get none, what spoils one of them, or rank 1."""

    scale: float = 1.0
    without: frozenset[int] = frozenset()
    bad: tuple[int, float] | None = None
    rank_one: bool = False


def any_case(choose, rule):
    """Return a case of the rule; `choose` picks one of what it is given."""
    pool = [(choose(range(1, 9)), choose(range(1, 9))) for _ in range(2)]
    shapes = [choose(pool) for _ in range(choose(range(1, 5)))]
    options, kwargs = {}, {"weight_decay": choose([0.0, 0.1])}
    if rule == "loro":
        options["rank"] = choose(range(1, 1 + min(min(shape) for shape in shapes)))
        kwargs |= {"exact_every": choose(range(4)), "loro_type": choose(["loro", "loro", "eucl"])}
    elif rule != "adamw":
        side = choose(SIDES if rule == "galore" else SIDES[:-1])
        options = {
            "rank": choose(range(1, 11)),
            "update_proj_gap": choose(range(1, 5)),
            "proj_type": side,
            "subspace": choose(SUBSPACES),
            "refresh": choose(["fixed", "staggered"]),
            "moments_at_refresh": choose(
                ["keep", "reset"] if side == "full" else ["keep", "reset", "rotate"]
            ),
            "moments": choose([None, None, "float32", "bfloat16", "int8"]),
            "basis": choose([None, None, "float32", "bfloat16"]),
        }
    return Case(rule, shapes, options, kwargs, zero_rows=choose([False, False, True]))


@st.composite
def cases(pick, rules=tuple(CLASSES), dtypes=(torch.float32, torch.float64, torch.bfloat16)):
    case = any_case(lambda options: pick(st.sampled_from(options)), pick(st.sampled_from(rules)))
    return replace(case, dtype=pick(st.sampled_from(dtypes)))


missing = st.frozensets(st.integers(0, 9), max_size=4)
spoilers = st.tuples(st.integers(0, 9), st.sampled_from([math.nan, math.inf, -math.inf]))
scales = st.sampled_from([1.0, 1.0, 0.0, 1e-30, 1e12])
plans = st.lists(
    st.builds(Step, scales, missing, st.none() | spoilers, st.booleans()), min_size=3, max_size=8
)
calm = st.lists(st.builds(Step, st.just(1.0), missing, st.none(), st.just(False)), min_size=3, max_size=8)


def give(params, t, step, only=None):
    """Set the gradients of step t, of all parameters or of some; return whether one is not finite."""
    trained = [name for name, p in params.items() if p.requires_grad]
    for i, name in enumerate(trained):
        grad = draw(f"{name} {t}", params[name].shape)
        if step.rank_one and grad.ndim == 2:
            grad = grad[:, :1] * grad[:1]
        given = i not in step.without and name in (only or trained)
        params[name].grad = (grad * step.scale).to(params[name].dtype) if given else None
    have = [name for name in trained if params[name].grad is not None]
    if step.bad is None or not have:
        return False
    which, value = step.bad
    params[have[which % len(have)]].grad.view(-1)[-1] = value
    return True


def snapshot(params, optimizer):
    """Return copies of each parameter's weight, gradient and state."""
    return {
        name: {"weight": p.detach().clone(), "grad": None if p.grad is None else p.grad.clone()}
        | {key: t.clone() for key, t in optimizer.state[p].items()}
        for name, p in params.items()
    }


def assert_same(one, other):
    """Compare two snapshots of a parameter to the bit; what is not finite may stand in gradients."""
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        if tensor is None:
            assert other[key] is None
        else:
            torch.testing.assert_close(tensor, other[key], rtol=0, atol=0, equal_nan=True)


def direction(now, keep):
    """Return what the subspace holds for: W, or v for rows with a magnitude; `keep` is what decay left."""
    W = now["weight"].double() / keep
    if "norm" not in now:
        return W
    live = now["norm"] > 0
    v = now["weight"].double() * (now["norm"].double() / now["magnitude"].double())[:, None]
    return torch.where(live[:, None], v, W)


def outside(before, now, side, keep):
    """Return the part of the change that lies outside the subspace, relative to the matrix."""
    P, old = now["basis"].double(), direction(before, 1.0)
    change = direction(now, keep) - old
    if side == "left":
        inside = P @ P.T @ change
    elif side == "right":
        inside = change @ P @ P.T
    else:
        A = now["basis_left"].double()
        inside = A @ A.T @ change @ P @ P.T
    return float((change - inside).norm() / old.norm())


@quiet
@few
@given(cases(), plans)
def test_every_step_keeps_weights_finite_bases_orthonormal_and_the_rest_untouched(case, plan):
    params, optimizer = case.build()
    updates, skipped = Counter(), 0
    for t, step in enumerate(plan):
        spoiled = give(params, t, step)
        before = snapshot(params, optimizer)
        optimizer.step()
        now = snapshot(params, optimizer)
        skipped += spoiled
        have = {name for name, p in params.items() if p.grad is not None and not spoiled}
        updated = {name for name in have if partner(name) in have}  # a pair only as a whole
        updates.update(updated)
        assert optimizer.skipped_steps == skipped
        for name, state in now.items():
            assert state["weight"].isfinite().all(), name
            assert int(state.get("updates", state["step"])) == updates[name], name
            assert_same({"grad": before[name]["grad"]}, {"grad": state["grad"]})
            if name not in updated:
                assert_same(before[name], state)
            elif "basis" in state:
                rounded = torch.bfloat16 in (case.dtype, state["basis"].dtype)
                for P in (state[key].double() for key in ("basis", "basis_left") if key in state):
                    error = (P.T @ P - torch.eye(P.shape[1], dtype=P.dtype)).abs().max()
                    assert error < (2e-2 if rounded else 1e-5), name
                if not rounded:
                    side = side_of(state["weight"].shape, case.options["proj_type"])
                    keep = 1 - LR * case.kwargs["weight_decay"]
                    assert outside(before[name], state, side, keep) < 1e-5, name


@quiet
@few
@given(cases(), plans)
def test_a_skipped_step_leaves_no_trace(case, plan):
    params, optimizer = case.build()
    twins, twin = case.build()
    for t, step in enumerate(plan):
        if not give(params, t, step):
            give(twins, t, step)
            twin.step()
        optimizer.step()
    assert twin.skipped_steps == 0
    theirs = snapshot(twins, twin)
    for name, ours in snapshot(params, optimizer).items():
        assert_same(ours | {"grad": None}, theirs[name] | {"grad": None})


MATRICES = {"rank": 2, "update_proj_gap": 2, "subspace": "warm", "moments_at_refresh": "rotate"}


@quiet
@few
@given(cases(dtypes=(torch.float64,)), calm)
@example(  # the second matrix begins where the first refreshes
    Case("galore", [(8, 5), (8, 5)], MATRICES, {}, torch.float64),
    [Step(without=frozenset({2}))] * 2 + [Step()] * 3,
)
def test_a_parameter_goes_its_way_whatever_gradients_others_get(case, plan):
    together, optimizer = case.build()
    for t, step in enumerate(plan):
        give(together, t, step)
        optimizer.step()
    for name in (name for name, p in together.items() if p.requires_grad):
        params, alone = case.build()
        for t, step in enumerate(plan):
            give(params, t, step, {name, partner(name)})
            alone.step()
        torch.testing.assert_close(params[name], together[name], rtol=1e-4, atol=1e-5)


@quiet
@few
@given(cases(dtypes=(torch.float64,)), st.integers(1, 5))
def test_gradients_of_zero_move_nothing_but_by_decay(case, steps):
    params, optimizer = case.build()
    before = {name: p.detach().clone() for name, p in params.items()}
    for t in range(steps):
        give(params, t, Step(scale=0.0))
        optimizer.step()
    for name, p in params.items():
        if name.startswith("in"):  # an exact step balances the factors: their product is what stays
            W, was = params[partner(name)] @ p.T, before[partner(name)] @ before[name].T
            torch.testing.assert_close(W / W.norm(), was / was.norm(), rtol=1e-4, atol=1e-5)
        elif not name.startswith("out"):
            keep = 1.0 if name == "frozen" else (1 - LR * case.kwargs["weight_decay"]) ** steps
            torch.testing.assert_close(p.detach(), keep * before[name])
        assert not any(optimizer.state[p][key].any() for key in ("exp_avg", "exp_avg_sq"))


@few
@given(cases(("galore", "gradnormlorp")), st.integers(1, 3), calm)
def test_a_rank_above_the_matrix_is_that_of_the_matrix(case, more, plan):
    case.shapes = case.shapes[:1]
    runs = []
    for rank in (min(case.shapes[0]) + more, min(case.shapes[0])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            params, optimizer = replace(case, options=case.options | {"rank": rank}).build()
        assert [f"clamped to {min(case.shapes[0])}" in str(w.message) for w in caught] == [True] * (not runs)
        for t, step in enumerate(plan):
            give(params, t, step)
            optimizer.step()
        runs.append(snapshot(params, optimizer))
    for name, state in runs[0].items():
        assert_same(state, runs[1][name])


def test_a_pair_with_a_rank_above_the_matrix_takes_lazy_steps():
    params, optimizer = Case("loro", [(2, 7)], {"rank": 3}, {"exact_every": 1}).build()
    give(params, 0, Step())
    optimizer.step()
    assert optimizer.deficient_pairs == 1
    assert all(p.isfinite().all() for p in params.values())


@quiet
@pytest.mark.parametrize(
    ("rule", "empty"),
    [
        ("galore", []),
        ("galore", [{"rank": 2}]),
        ("gradnormlorp", []),
        ("gradnormlorp", [{"rank": 2}]),
        ("loro", []),
        ("loro", [{"type": "lowrank_in"}, {"type": "lowrank_out"}]),
    ],
)
def test_without_matrices_every_optimizer_is_adamw(rule, empty):
    runs = []
    for each, groups in (("adamw", []), (rule, empty)):
        param = torch.nn.Parameter(draw("vector", (5,)))
        groups = [{"params": [param]}, *({"params": [], **group} for group in groups)]
        optimizer = CLASSES[each](groups, lr=LR, weight_decay=0.1)
        for t, bad in enumerate([None, None, (0, math.nan), None]):
            give({"vector": param}, t, Step(bad=bad))
            optimizer.step()
        assert optimizer.skipped_steps == 1
        runs.append(param)
    assert torch.equal(*runs)


def shard_many(n_cases):
    """Train cases on shards and whole; return their differences and how many steps the shards skipped.

    At one step a single process has a gradient that is not finite; the whole twin never sees that step.
    """
    mesh, rng = init_device_mesh("cpu", (dist.get_world_size(),)), random.Random(0)
    results = []
    for i in range(n_cases):
        case, bad = any_case(rng.choice, list(CLASSES)[i % 4]), rng.randrange(5)
        if case.rule == "loro":
            case.kwargs["refresh"] = rng.choice([None, "lrk", "reg", "all"])

        def place(t):
            return distribute_tensor(t, mesh, [Shard(0)])

        params, optimizer = case.build(place)
        twins, twin = case.build()
        for t in range(6):
            step = Step(without=frozenset(rng.sample(range(9), rng.randint(0, 2))))
            give(twins, t, step)
            for name, p in twins.items():
                params[name].grad = None if p.grad is None else place(p.grad)
            have = [p.grad for p in params.values() if p.grad is not None]
            if t == bad:
                grad = rng.choice(have)
                culprit = rng.randrange(len(torch.empty(grad.shape[0]).chunk(mesh.size())))
                if dist.get_rank() == culprit:
                    grad.to_local().fill_(math.nan)
            else:
                twin.step()
            optimizer.step()
        whole = {name: p.detach().full_tensor() for name, p in params.items()}
        theirs = {name: p.detach() for name, p in twins.items()}
        for values in (whole, theirs):  # the signs of factors are free; their products are not
            for name in [name for name in values if name.startswith("in")]:
                A = values.pop(name)
                values[partner(name)] = values[partner(name)] @ A.T
        worst = max(float((whole[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)
        results.append((str(case), worst, optimizer.skipped_steps))
    return results


def test_shards_of_any_shape_equal_the_whole_and_skip_together():
    for results in spawn(shard_many, 3, 40):
        for case, worst, skipped in results:
            assert worst < 1e-4, case
            assert skipped == 1, case
