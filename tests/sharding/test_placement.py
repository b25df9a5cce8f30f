"""Who updates which matrix, and what that costs each process."""

import itertools

import pytest
import torch
import torch.distributed as dist
from spawn import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lrpretrain.optim import GaLoreAdamW, GradNormLoRPAdamW, LOROAdamW
from lrpretrain.sharding.fsdp import _spread
from lrpretrain.sharding.placement import MANY_PROCS, assign, choose
from lrpretrain.sharding.tiles import Holding, Tile, cut

WEIGHT = torch.empty(0)
GROUP = object()  # stands for a process group, which the choice only counts


def holding(shape, split, n_procs, even=True):
    spread = _spread(shape, split, n_procs)
    return Holding("w", WEIGHT, shape, spread[0], spread, split, GROUP, even)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((holding((64, 48), 0, 4), 0, 16, False), "aligned"),
        ((holding((64, 48), 0, 4), 1, 16, False), "owner"),  # projected on the left, cut by rows
        ((holding((64, 48), 1, 4), 1, 16, False), "aligned"),
        ((holding((64, 48), 0, 4), 0, 16, True), "owner"),  # an exact SVD
        ((holding((64, 48), 0, 4, even=False), 0, 16, False), "owner"),  # ZeRO-1, ZeRO-2
        ((holding((4096, 4096), 0, MANY_PROCS), 0, 1024, False), "aligned"),
        ((holding((4096, 4096), 0, MANY_PROCS + 1), 0, 1024, False), "owner"),
        ((holding((4096, 4096), 0, 64), 0, 256, False), "aligned"),  # a narrow basis may be everywhere
        ((Holding("w", WEIGHT, (64, 48), (Tile.whole((64, 48)),)), 1, 16, True), "aligned"),
    ],
)
def test_the_choice_follows_from_shapes_and_processes(args, expected):
    place, reason = choose(*args)
    assert place == expected and reason


@pytest.mark.parametrize("n_procs", [2, 3, 8, 64])
@pytest.mark.parametrize("even", [True, False])
def test_no_owner_gets_more_than_a_share_and_a_matrix(n_procs, even):
    """A LLaMA of 24 layers; in a buffer, most matrices lie whole on one process, which then keeps them."""
    shapes = [(2048, 2048)] * 4 + [(5461, 2048)] * 2 + [(2048, 5461)]
    shapes = shapes * 24
    total, begin, holdings = sum(m * n for m, n in shapes), 0, []
    size = -(-total // n_procs)
    for shape in shapes:
        ends = [min(max(k * size - begin, 0), shape[0] * shape[1]) for k in range(n_procs + 1)]
        in_buffer = tuple(cut(shape, *ends[k : k + 2]) for k in range(n_procs))
        spread = _spread(shape, 0, n_procs) if even else in_buffer
        holdings.append(Holding("w", WEIGHT, shape, spread[0], spread, 0, GROUP, even))
        begin += shape[0] * shape[1]
    costs = [512.0 * (min(s) + 2 * max(s)) for s in shapes]
    loads = [0.0] * n_procs
    owners = assign(holdings, costs, loads)
    assert sum(loads) == sum(costs)
    assert max(loads) <= 1.15 * sum(costs) / n_procs + max(costs)
    assert [sum(c for c, o in zip(costs, owners, strict=True) if o == p) for p in range(n_procs)] == loads
    if not even and n_procs == 2:
        assert sum(not h.spread[o] for h, o in zip(holdings, owners, strict=True)) < len(shapes) / 8


def held():
    """Return the bytes of state on this process for owners, and of a whole copy."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = {}
    for rule, shapes in [
        (GaLoreAdamW, [(40, 30)] * 9),
        (GradNormLoRPAdamW, [(40, 30), (30, 50), (31, 31)] * 5),
    ]:
        whole = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
        cut_ = [torch.nn.Parameter(distribute_tensor(torch.ones(s), mesh, [Shard(0)])) for s in shapes]
        options = {"rank": 8, "placement": "owner"}
        sizes = []
        for params in (whole, cut_):
            optimizer = rule([{"params": params, **options}])
            each = [sum(t.numel() * t.element_size() for t in optimizer.state[p].values()) for p in params]
            sizes.append(each)
        results[rule.__name__] = sum(sizes[1]), sum(sizes[0]), max(sizes[0])
        assert all(optimizer.state[p].keys() == optimizer.state[params[0]].keys() for p in params)
    return results


@pytest.mark.parametrize("n_procs", [2, 3])
def test_state_shrinks_with_the_processes(n_procs):
    results = spawn(held, n_procs)
    for rule in results[0]:
        _, total, largest = results[0][rule]
        assert max(r[rule][0] for r in results) <= 1.15 * total / n_procs + largest
        assert sum(r[rule][0] for r in results) == total


def counts():
    """Return the collectives of a step by rule, placement and layers; ordinary steps and refreshes."""
    mesh = init_device_mesh("cpu", (2,))

    def cut_(*shape):
        return torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)]))

    found = {}
    cases = itertools.product(["galore", "gradnormlorp", "loro"], ["aligned", "owner"], [2, 24])
    for rule, place, layers in cases:
        torch.manual_seed(0)
        if rule == "loro":
            ins, outs = [cut_(9, 3) for _ in range(layers)], [cut_(12, 3) for _ in range(layers)]
            groups = [{"params": ins, "type": "lowrank_in"}, {"params": outs, "type": "lowrank_out"}]
            optimizer = LOROAdamW(groups, exact_every=2)
            params = ins + outs
        else:
            params = [cut_(*s) for s in [(12, 9), (9, 12)] * layers]
            options = {"rank": 3, "update_proj_gap": 2, "subspace": "warm", "placement": place}
            kind = {"galore": GaLoreAdamW, "gradnormlorp": GradNormLoRPAdamW}[rule]
            optimizer = kind([{"params": params, **options}])
        for t in range(4):
            for p in params:
                p.grad = distribute_tensor(torch.randn(p.shape), mesh, [Shard(0)])
            with CommDebugMode() as mode:
                optimizer.step()
            found[rule, place, layers, t] = mode.get_total_counts()
    return found


def test_the_collectives_of_a_step_do_not_grow_with_the_layers():
    for found in spawn(counts, 2):
        assert len(found) == 48
        for (rule, place, layers, t), count in found.items():
            assert count == found[rule, place, 2, t], (rule, place, layers, t)
            assert count > 0  # the check of the gradients, at least
