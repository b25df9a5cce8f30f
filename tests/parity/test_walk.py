"""A run that moves: saved on one layout and number of processes, it goes on from there on any other."""

import random

import pytest
import torch
import torch.distributed as dist
from matrix import LENGTH, ROWS, RULES, STEPS, STORED, batches, configure
from spawn import spawn

from lrpretrain.artifacts import checkpoint
from lrpretrain.engine import build_engine
from lrpretrain.sharding.procs import Procs

SEED = 20261122
PLACES = [("local", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("hsdp", 2), ("zero1", 2), ("zero1", 3)]
PLACES += [("zero2", 3), ("zero2-round-robin", 2), ("zero3", 2), ("zero3", 3), ("zero3-persistent", 2)]
WALKED = RULES | {name: STORED[name] for name in ("galore-int8", "galore-bfloat16", "loro-bfloat16")}
STEPS_A_LEG = 2


def walk(seed, moves=6):
    """Return places, of which no two that follow each other are alike; ZeRO and FSDP2 are among them."""
    rng = random.Random(seed)
    while True:
        places = rng.sample(PLACES, moves + 1)
        if {"fsdp", "zero2", "zero3"} <= {layout for layout, _ in places}:
            return places


def rows_of(step):
    return batches()[step % STEPS]


def take(engine, step):
    """Do a step; return its loss."""
    procs = engine.procs
    own = rows_of(step).split(ROWS // procs.n_procs)[procs.proc]
    return engine.train_step([own], ROWS * (LENGTH - 1), 0.5, 1.0).loss


def everything(engine, procs):
    """Return all that a checkpoint stores, whole, by name; what no process has is left NaN."""
    whole = {}
    own = {name: [(t, part.clone()) for t, part in piece.parts] for name, piece in engine.pieces().items()}
    shapes = {name: (piece.shape, piece.tensor.dtype) for name, piece in engine.pieces().items()}
    for parts in procs.gather(own):
        for name, tiles in parts.items():
            shape, dtype = shapes[name]
            start = torch.nan if dtype.is_floating_point else -1
            whole.setdefault(name, torch.full(shape, start, dtype=dtype))
            for tile, part in tiles:
                whole[name][tuple(tile.span(dim) for dim in range(part.dim()))] = part
    return whole


def leg(folder, places, i, names=tuple(WALKED)):
    """Go on from the checkpoint of the leg before, in its state to the bit; return the losses by rule."""
    layout, n_procs = places[i]
    procs = Procs.of_default_group() if n_procs > 1 else Procs()
    losses = {}
    for rule in names:
        kept = folder / rule
        config = configure(folder, rule, layout, 1, n_procs)
        engine = build_engine(config, procs, torch.device("cpu"), pad_id=0)
        step = i * STEPS_A_LEG
        if i:
            checkpoint.load(kept / f"step_{step:08d}", engine.pieces(), procs)
            engine.publish()
            before, now = torch.load(kept / "whole.pt"), everything(engine, procs)
            assert now.keys() == before.keys()
            for name, tensor in now.items():
                assert torch.equal(tensor, before[name]), (rule, name, places[: i + 1])
        losses[rule] = [take(engine, step + k) for k in range(STEPS_A_LEG)]
        kept.mkdir(exist_ok=True)
        checkpoint.save(kept, engine.pieces(), {"step": step + STEPS_A_LEG}, procs)
        whole = everything(engine, procs)
        if procs.is_first:
            torch.save(whole, kept / "whole.pt")
        procs.barrier()
        engine.close()
    return losses


def alone(folder, rule, steps):
    engine = build_engine(configure(folder, rule, "local", 1, 1), Procs(), torch.device("cpu"), pad_id=0)
    return [take(engine, step) for step in range(steps)]


@pytest.mark.parametrize(
    "seed", [SEED, *(pytest.param(SEED + i, marks=pytest.mark.slow) for i in range(1, 4))]
)
def test_a_run_moves_anywhere(tmp_path, seed):
    places = walk(seed)
    losses = {rule: [] for rule in WALKED}
    for i, (_, n_procs) in enumerate(places):
        for rule, found in spawn(leg, n_procs, tmp_path, places, i)[0].items():
            losses[rule] += found
    assert not dist.is_initialized()
    for rule, found in losses.items():
        expected = alone(tmp_path, rule, STEPS_A_LEG * len(places))
        # Rounding moves a number to the next level of bfloat16, or of eight bits, now and then.
        tolerance = 1e-4 if rule in STORED else 1e-5
        assert found == pytest.approx(expected, rel=tolerance), (rule, places)
