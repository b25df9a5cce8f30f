"""Updates layer by layer: what they leave is what an update at once leaves, and gradients go on the way."""

import gc
import json
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from matrix import MODEL
from spawn import spawn
from torch.distributed.tensor import DTensor

from lrpretrain.config import from_dict
from lrpretrain.engine import build_engine
from lrpretrain.pretrain import main
from lrpretrain.sharding.procs import Procs
from lrpretrain.train import plan

ROWS, LENGTH = 8, 12
TARGETS = ROWS * (LENGTH - 1)
CASES = {  # options of the rule, micro-batches
    "galore": ({}, 1),
    "galore, int8, staggered, decay": (
        {"moments": "int8", "refresh": "staggered", "subspace": "random", "weight_decay": 0.1},
        2,
    ),
    "galore, adafactor": ({"base": "adafactor"}, 2),
    "adamw": ({"rule": "adamw"}, 2),
    "adamw, int8": ({"rule": "adamw", "moments": "int8"}, 1),
    "gradnormlorp": ({"rule": "gradnormlorp"}, 1),
    "gradnormlorp, int8": ({"rule": "gradnormlorp", "moments": "int8", "moments_at_refresh": "rotate"}, 2),
    "gradnormlorp, lowrank_wn": ({"rule": "gradnormlorp", "mode": "lowrank_wn"}, 2),
}


def build(folder, procs, *, per_layer, kind="local", **optim):
    path = folder / f"model_{procs.proc}.json"
    path.write_text(json.dumps(MODEL))
    tree = {
        "model": {"config": str(path), "checkpointing": "full"},
        "optim": {"rank": 5, "lr": 0.01, "refresh_every": 2, "per_layer": per_layer} | optim,
        "engine": {"kind": kind},
    }
    return build_engine(from_dict(tree), procs, torch.device("cpu"), pad_id=0)


def rows_of(t):
    return torch.randint(2, 500, (ROWS, LENGTH), generator=torch.Generator().manual_seed(t))


def step(engine, t, micros=1, clip_norm=None, judge=torch.isfinite):
    own = rows_of(t).split(ROWS // engine.procs.n_procs)[engine.procs.proc]
    done = engine.train_step(list(own.chunk(micros)), TARGETS, clip_norm, 0.5, judge)
    assert all(h.param.grad is None for h in engine.holdings)
    return done


def everything(engine):
    return {name: piece.tensor.clone() for name, piece in engine.pieces().items()}


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def compare(folder, procs, kind, optim, micros):
    """Take four steps, two with a refresh, in both ways; a clipping norm that is never reached."""
    found = []
    for per_layer in (False, True):
        engine = build(folder, procs, per_layer=per_layer, kind=kind, **optim)
        before = everything(engine)
        steps = [step(engine, t, micros, clip_norm=1e4) for t in range(4)]
        assert all(s.sound for s in steps)
        found.append((steps, everything(engine)))
    (plain, ours), (layered, theirs) = found
    for name, tensor in ours.items():
        if name.startswith("model/"):  # what is multiplied in one batch decides about the last digits
            assert (theirs[name] - tensor).norm() < 1e-3 * (tensor - before[name]).norm(), name
        elif tensor.dtype is torch.int64:
            assert torch.equal(theirs[name], tensor), name
    assert [s.loss for s in layered] == pytest.approx([s.loss for s in plain], rel=1e-5)
    assert [s.grad_norm for s in layered] == pytest.approx([s.grad_norm for s in plain], rel=1e-4)
    assert all(s.update.ms() > 0 for s in layered)


@pytest.mark.parametrize("case", CASES)
def test_nothing_differs_in_one_process(case, tmp_path):
    optim, micros = CASES[case]
    compare(tmp_path, Procs(), "local", optim, micros)


REFUSED = {2: lambda loss: loss < 0}  # steps whose loss is not fine


def clip_by_hand(engine, clip_norm):
    """Clip by the norm of the last step that was sound, and then update at once."""
    params, last = [h.param for h in engine.holdings], math.inf
    for t in range(5):
        engine.accumulate([rows_of(t)], TARGETS)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))
        for group in engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * 0.5
        for p in params:
            p.grad *= min(1.0, clip_norm / last) if t else 1.0
        if t not in REFUSED:
            engine.optimizer.step()
            last = norm
        engine.optimizer.zero_grad()


@pytest.mark.parametrize(("rule", "lr"), [("sgd", 1.0), ("galore", 0.01)])
def test_gradients_are_clipped_by_the_norm_of_the_step_before(rule, lr, tmp_path):
    """The first step is not clipped, and the third one is refused: it changes nothing, and clips nothing."""
    clip_norm = 0.3
    engine, twin = (build(tmp_path, Procs(), per_layer=x, rule=rule, lr=lr) for x in (True, False))
    for t in range(5):
        before = everything(engine)
        done = step(engine, t, 1, clip_norm, REFUSED.get(t, torch.isfinite))
        assert done.sound == (t not in REFUSED) and done.grad_norm > 1.5 * clip_norm
        if t in REFUSED:
            same(everything(engine), before)
    clip_by_hand(twin, clip_norm)
    torch.testing.assert_close(everything(engine), everything(twin), rtol=1e-4, atol=1e-6)


def break_first_block(folder, procs, kind):
    """Let a gradient of the first block be NaN, in the last process: this block is as it was, no other."""
    engine = build(folder, procs, per_layer=True, kind=kind)
    step(engine, 0, clip_norm=1.0)
    before, norm = everything(engine), float(engine.layers.norm)
    held = next(h for h in engine.holdings if h.name == "model.layers.0.mlp.down_proj.weight")
    spoil = math.nan if procs.proc == procs.n_procs - 1 else 1.0

    def damage(_):
        held.grad.mul_(spoil)

    hook = held.param.register_post_accumulate_grad_hook(damage)
    done = step(engine, 1, clip_norm=1.0)
    hook.remove()
    after = everything(engine)
    assert not done.sound and math.isfinite(done.loss) and not math.isfinite(done.grad_norm)
    assert float(engine.layers.norm) == norm
    for name, tensor in after.items():
        changes = ".layers.0." not in name and not name.endswith(("side", "phase")) and tensor.numel() > 0
        assert torch.equal(tensor, before[name]) != changes or "basis" in name, name
    assert step(engine, 2, clip_norm=1.0).sound
    steps = {n: int(t) for n, t in everything(engine).items() if n.endswith("/step") and t.numel()}
    assert set(steps.values()) == {2, 3}
    assert all((count == 2) == (".layers.0." in name) for name, count in steps.items())


def test_a_gradient_that_is_not_finite_leaves_out_its_block(tmp_path):
    break_first_block(tmp_path, Procs(), "local")


def test_an_engine_that_is_closed_is_freed(tmp_path):
    engine = build(tmp_path, Procs(), per_layer=True)
    step(engine, 0)
    optimizer = weakref.ref(engine.optimizer)
    engine.close()
    del engine
    gc.collect()
    assert optimizer() is None


SHARDED = [
    ({}, 1),
    ({"rule": "gradnormlorp", "placement": "owner", "moments": "int8", "side": "left"}, 2),
]


def whole_weights(engine):
    weights = ((h.name, h.param.detach()) for h in engine.holdings)
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in weights}


def sharded(folder):
    """In two processes: as FSDP2 that updates at once, and clipped as in one process."""
    procs = Procs.of_default_group()
    for optim, micros in SHARDED:
        compare(folder, procs, "fsdp", optim, micros)
    ours, theirs = (
        build(folder, x, per_layer=True, kind=k) for k, x in [("fsdp", procs), ("local", Procs())]
    )
    for t in range(3):
        norms = [step(engine, t, clip_norm=0.3).grad_norm for engine in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    torch.testing.assert_close(whole_weights(ours), whole_weights(theirs), rtol=1e-3, atol=1e-5)
    break_first_block(folder, procs, "fsdp")


def test_nothing_differs_under_fsdp2(tmp_path):
    spawn(sharded, 2, tmp_path)


def train(argv):
    try:
        return main([str(a) for a in argv])
    finally:
        dist.destroy_process_group()


def test_a_run_goes_on_to_the_bit(bench):
    """From a step on which the next one depends for its clipping; the schedule counts steps as ever."""
    short = dict(train__micro_batch=6, train__steps=8, train__clip_norm=0.3)
    argv = bench.options("layers", **short, optim__per_layer="true", train__save_every=4)
    assert train(argv) == 0
    once = bench.metrics("layers")
    bench.forget_after("layers", 4)
    assert train(argv) == 0
    again = bench.metrics("layers")
    assert [(e["train/loss"], e["train/grad_norm"]) for e in again] == [
        (e["train/loss"], e["train/grad_norm"]) for e in once
    ]
    assert min(e["train/grad_norm"] for e in once) > 0.4
    assert train(bench.options("at_once", **short)) == 0
    assert [e["train/lr"] for e in bench.metrics("at_once")] == [e["train/lr"] for e in once]


@pytest.mark.parametrize(
    ("engine", "rule", "n_procs", "reason"),
    [
        ({"kind": "zero"}, "galore", 2, "DeepSpeed updates once"),
        ({"kind": "ddp"}, "galore", 2, "in buckets"),
        ({"kind": "fsdp", "replicas": 2}, "galore", 4, "replicas"),
        ({"kind": "fsdp"}, "loro", 2, "all pairs of factors together"),
        ({"kind": "local"}, "factored", 1, "all pairs of factors together"),
    ],
)
def test_where_it_cannot_be_the_reason_is_said(engine, rule, n_procs, reason):
    tree = {
        "optim": {"rule": rule, "per_layer": True},
        "engine": engine,
        "train": {"global_batch": 16 * n_procs},
    }
    (problem,) = plan.check(from_dict(tree), n_procs)
    assert problem.field == "optim.per_layer" and reason in problem.reason and problem.remedy
