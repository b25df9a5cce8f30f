"""The optimizers on DTensors, against the same optimizer on whole tensors: rule × side × cut × processes."""

import itertools

import pytest
import torch
import torch.distributed as dist
from spawn import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lrpretrain.errors import ConfigError
from lrpretrain.optim import AdamW, GaLoreAdamW, GradNormLoRPAdamW, LOROAdamW

SHAPES = [
    (13, 6),
    (6, 12),
    (13, 6),
    (12, 12),
    (2, 6),
    (6, 12),
]  # odd, wide, repeated, square; (2, 6) leaves a shard empty
STEPS = 7


def tensors(seed, shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def build(params, options):
    if options is None:
        return AdamW(params, lr=0.01, weight_decay=0.1)
    options = dict(options)
    optimizer = {"galore": GaLoreAdamW, "gradnormlorp": GradNormLoRPAdamW}[options.pop("rule", "galore")]
    groups = [{"params": params, "rank": 2, "update_proj_gap": 3, "scale": 0.5} | options]
    return optimizer(groups, lr=0.01, weight_decay=0.1)


def train(shapes, options, place):
    """Run some steps; return the whole weights."""
    params = [torch.nn.Parameter(place(t)) for t in tensors(0, shapes)]
    optimizer = build(params, options)
    for t in range(STEPS):
        for p, grad in zip(params, tensors(t + 1, shapes), strict=True):
            p.grad = place(grad)
        optimizer.step()
    return [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]


OPTIONS = [None] + [
    {"proj_type": side, "subspace": subspace}
    for side, subspace in itertools.product(["std", "reverse_std", "left", "right", "full"], ["svd", "warm"])
]
OPTIONS += [
    {"proj_type": "std", "subspace": "gram", "refresh": "staggered", "moments_at_refresh": "rotate"},
    {"proj_type": "left", "subspace": "randomized", "refresh": "fixed", "moments_at_refresh": "reset"},
    {"proj_type": "right", "subspace": "random", "refresh": "staggered", "moments_at_refresh": "keep"},
    {"proj_type": "reverse_std", "subspace": "gram", "refresh": "fixed", "moments_at_refresh": "keep"},
]
OPTIONS += [
    {"rule": "gradnormlorp", "proj_type": side, "subspace": subspace}
    for side, subspace in [("std", "warm"), ("left", "svd"), ("right", "gram")]
]


def train_pairs(place):
    """Run LORO over lazy steps, an exact one and a refresh; return the whole products."""
    ranks = [(13, 9, 3), (12, 12, 4), (13, 9, 3)]
    ins = [torch.nn.Parameter(place(t)) for t in tensors(0, [(n, r) for _, n, r in ranks])]
    outs = [torch.nn.Parameter(place(t)) for t in tensors(1, [(m, r) for m, _, r in ranks])]
    groups = [{"type": "lowrank_in", "params": ins}, {"type": "lowrank_out", "params": outs}]
    optimizer = LOROAdamW(groups, lr=0.01, exact_every=3, refresh="all")
    for t in range(STEPS):
        for params, seed in ((ins, 2 * t + 10), (outs, 2 * t + 11)):
            for p, grad in zip(params, tensors(seed, [tuple(p.shape) for p in params]), strict=True):
                p.grad = place(grad)
        optimizer.step()
    assert optimizer.deficient_pairs == 0
    full = [[p.full_tensor() if isinstance(p, DTensor) else p for p in params] for params in (ins, outs)]
    return [(b @ a.T).detach() for a, b in zip(*full, strict=True)]


def compare():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    differences = {}
    for options, dim in itertools.product(OPTIONS, [0, 1]):
        shapes = SHAPES if dim == 0 else [(5, 6), (12, 6), (6, 12)]
        sharded = train(shapes, options, lambda t, dim=dim: distribute_tensor(t, mesh, [Shard(dim)]))
        whole = train(shapes, options, torch.clone)
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(sharded, whole, strict=True))
        differences[f"{options} Shard({dim})"] = worst
    sharded = train_pairs(lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    whole = train_pairs(torch.clone)
    pairs = zip(sharded, whole, strict=True)
    differences["loro"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return differences


@pytest.mark.parametrize("n_procs", [2, 3])
def test_sharded_equals_whole(n_procs):
    for differences in spawn(compare, n_procs):
        assert len(differences) == 2 * len(OPTIONS) + 1
        for case, worst in differences.items():
            assert worst < 1e-5, case


def communication():
    """Return the collectives of an ordinary step: aligned, and misaligned with few and with many matrices."""
    mesh = init_device_mesh("cpu", (2,))
    counts = []
    for side, n in [("right", 3), ("left", 3), ("left", 9)]:
        params = [
            torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)])) for t in tensors(0, [(8, 6)] * n)
        ]
        options = dict(rank=2, update_proj_gap=5, proj_type=side, subspace="warm")
        optimizer = GaLoreAdamW([{"params": params, **options}], check_finite=False)
        for _ in range(2):
            for p in params:
                p.grad = distribute_tensor(torch.randn(8, 6), mesh, [Shard(0)])
            with CommDebugMode() as mode:
                optimizer.step()
        counts.append(mode.get_total_counts())
    return counts


def test_an_aligned_step_communicates_nothing_and_no_step_more_for_more_matrices():
    for aligned, few, many in spawn(communication, 2):
        assert aligned == 0
        assert few == many == 1


def refusals():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    twice = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
    with pytest.raises(ConfigError, match="only Replicate"):
        GaLoreAdamW([{"params": [twice], "rank": 2}])
    once = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate(), Shard(0)]))
    optimizer = GaLoreAdamW([{"params": [once], "rank": 2}])
    value = 1.0 if dist.get_rank() == 0 else float("nan")
    once.grad = DTensor.from_local(torch.full((4, 4), value), mesh, [Replicate(), Shard(0)], run_check=False)
    sharded = torch.nn.Parameter(
        distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
    )
    optimizer = GaLoreAdamW([{"params": [sharded], "rank": 2}])
    sharded.grad = DTensor.from_local(
        torch.full((2, 4), value), sharded.device_mesh, [Shard(0)], run_check=False
    )
    optimizer.step()
    return optimizer.skipped_steps, sharded.to_local().detach()


def test_unsupported_placements_are_refused_and_one_bad_shard_skips_all():
    for skipped, weight in spawn(refusals, 2):
        assert skipped == 1
        assert torch.equal(weight, torch.ones(2, 4))
