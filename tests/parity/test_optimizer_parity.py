"""The optimizers on DTensors, against the same optimizer on whole tensors: rule × side × cut × processes."""

import itertools

import pytest
import torch
import torch.distributed as dist
from spawn import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lrpretrain.errors import ConfigError
from lrpretrain.optim import AdamW, GaLoreAdafactor, GaLoreAdamW, GradNormLoRPAdamW, LOROAdamW
from lrpretrain.sharding.zero import Shard as Range

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


def in_buffer(tensors, alone):
    """Return each tensor as this process's range of a flat buffer, as ZeRO lays it out.

    `alone`: every tensor is cut by itself (ZeRO-3); else all lie one after the other, and the buffer is cut.
    """
    n_procs, proc, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    total = sum(t.numel() for t in tensors)
    size, begin, shards = -(-total // n_procs), 0, []
    for t in tensors:
        part, before = (-(-t.numel() // n_procs), 0) if alone else (size, begin)
        cuts = [min(max(k * part - before, 0), t.numel()) for k in range(n_procs + 1)]
        ranges = tuple(itertools.pairwise(cuts))
        own = t.reshape(-1)[slice(*ranges[proc])].clone()
        shards.append(Range.of(own, 0, tuple(t.shape), ranges, group, even=alone))
        begin += t.numel()
    return shards


def gather(shard):
    """Return the whole tensor that a shard is a range of."""
    whole = torch.zeros(torch.Size(shard.whole).numel(), dtype=shard.dtype)
    whole[slice(*shard.ranges[dist.get_rank()])] = shard.detach()
    dist.all_reduce(whole)
    return whole.view(shard.whole)


def train_in_buffer(shapes, options, alone, dtype=torch.float32):
    def laid(seed):
        return in_buffer([t.to(dtype) for t in tensors(seed, shapes)], alone)

    params = laid(0)
    optimizer = build(params, options)
    for t in range(STEPS):
        for p, grad in zip(params, laid(t + 1), strict=True):
            p.grad = grad.as_subclass(torch.Tensor)
        optimizer.step()
    return [gather(p) for p in params]


def difference(ours, theirs):
    each = [(a - b).norm() / b.norm() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(each).max())  # Python's max may pass over a NaN


def some(n_procs):
    """Return all options for three processes, where shards are uneven, and every third for two."""
    return OPTIONS if n_procs == 3 else OPTIONS[::3]


def places(options):
    if options is None:
        return ["auto"]
    return ["auto", "owner"] if options["proj_type"] == "full" else ["auto", "aligned", "owner"]


def compare():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    differences = {}
    for options, dim in itertools.product(some(dist.get_world_size()), [0, 1]):
        shapes = SHAPES if dim == 0 else [(5, 6), (12, 6), (6, 12)]
        whole = train(shapes, options, torch.clone)
        for place in places(options):
            placed = options and options | {"placement": place}
            sharded = train(shapes, placed, lambda t, dim=dim: distribute_tensor(t, mesh, [Shard(dim)]))
            differences[f"{placed} Shard({dim})"] = difference(sharded, whole)
            if dim == 0:
                for alone in (False, True):
                    flat = train_in_buffer(shapes, placed, alone)
                    differences[f"{placed} buffer, {alone=}"] = difference(flat, whole)
    seeded = dict(proj_type="right", subspace="random", placement="seeded")
    sharded = train(SHAPES, seeded, lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    differences["seeded"] = difference(sharded, train(SHAPES, seeded | {"placement": "auto"}, torch.clone))
    sharded = train_pairs(lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    differences["loro"] = difference(sharded, train_pairs(torch.clone))
    return differences


@pytest.mark.parametrize("n_procs", [2, 3])
def test_sharded_equals_whole(n_procs):
    for differences in spawn(compare, n_procs):
        assert len(differences) == sum(4 * len(places(options)) for options in some(n_procs)) + 2
        for case, worst in differences.items():
            assert worst < 1e-5, case


FEWER_BITS = [
    {"proj_type": "std", "subspace": "warm", "moments_at_refresh": "rotate"},
    {"proj_type": "left", "subspace": "svd", "refresh": "staggered"},
    {"proj_type": "full", "subspace": "svd", "moments_at_refresh": "reset"},
    {"proj_type": "right", "subspace": "random", "basis": "bfloat16"},
    {"rule": "gradnormlorp", "proj_type": "std", "subspace": "warm", "basis": "bfloat16"},
    {"rule": "gradnormlorp", "proj_type": "left", "subspace": "gram"},
]


def compare_fewer_bits():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    differences = {}
    for moments, each in itertools.product(["int8", "bfloat16"], FEWER_BITS):
        options = each | {"rank": 5, "moments": moments}
        shapes = [shape for shape in SHAPES if min(shape) > 2]
        whole = train(shapes, options, torch.Tensor.double)
        assert difference(whole, train(shapes, options | {"moments": None}, torch.Tensor.double)) > 1e-6
        for place in places(options):
            placed = options | {"placement": place}
            sharded = train(shapes, placed, lambda t: distribute_tensor(t.double(), mesh, [Shard(0)]))
            differences[f"{placed} rows"] = difference(sharded, whole)
            for alone in (False, True):
                flat = train_in_buffer(shapes, placed, alone, torch.float64)
                differences[f"{placed} buffer, {alone=}"] = difference(flat, whole)
    return differences


def test_moments_in_fewer_bits_do_not_depend_on_the_sharding():
    """In float64 no rounding of the layouts moves a code to the next level."""
    for differences in spawn(compare_fewer_bits, 3):
        assert len(differences) == 2 * 3 * sum(len(places(options)) for options in FEWER_BITS)
        for case, worst in differences.items():
            assert worst < 1e-9, case


def communication():
    """Return the collectives of an ordinary step by side of the projection, placement and matrices."""
    mesh = init_device_mesh("cpu", (2,))
    counts = {}
    for side, place, n in itertools.product(["right", "left"], ["auto", "aligned", "owner"], [3, 9]):
        params = [
            torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)])) for t in tensors(0, [(8, 6)] * n)
        ]
        options = dict(rank=2, update_proj_gap=5, proj_type=side, subspace="warm", placement=place)
        optimizer = GaLoreAdamW([{"params": params, **options}], check_finite=False)
        for _ in range(2):
            for p in params:
                p.grad = distribute_tensor(torch.randn(8, 6), mesh, [Shard(0)])
            with CommDebugMode() as mode:
                optimizer.step()
        counts[side, place, n] = mode.get_total_counts()
    return counts


def test_an_aligned_step_communicates_nothing_and_no_step_more_for_more_matrices():
    expected = {"right": {"auto": 0, "aligned": 0, "owner": 2}, "left": {"auto": 2, "aligned": 1, "owner": 2}}
    for counts in spawn(communication, 2):
        assert len(counts) == 12
        for (side, place, _), count in counts.items():
            assert count == expected[side][place]


def refusals():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    twice = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
    with pytest.raises(ConfigError, match="only Replicate"):
        GaLoreAdamW([{"params": [twice], "rank": 2}])
    value = 1.0 if dist.get_rank() == 0 else float("nan")
    sharded = torch.nn.Parameter(
        distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
    )
    for rank in (2, None):
        with pytest.raises(ConfigError, match="is cut among processes, and LowRankWN takes whole"):
            GradNormLoRPAdamW([{"params": [sharded], "rank": rank}], mode="lowrank_wn")
        with pytest.raises(ConfigError, match="is cut among processes, and Adafactor takes whole"):
            GaLoreAdafactor([{"params": [sharded], "rank": rank}])
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
