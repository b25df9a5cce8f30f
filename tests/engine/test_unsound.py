"""A step that is not sound, for one process's gradient or for the loss of all, changes nothing anywhere."""

import math

import pytest
import torch
import torch.distributed as dist
from matrix import LAYOUTS, LENGTH, ROWS, batches, configure, whole_weights
from spawn import spawn

from lrpretrain.engine import build_engine
from lrpretrain.sharding.procs import Procs

BF16 = {"precision": {"compute": "bfloat16"}}
CASES = [(layout, "galore-std", {}) for layout in LAYOUTS if layout != "hsdp"]
CASES += [("fsdp", rule, {}) for rule in ("gradnormlorp", "loro", "adamw")]
CASES += [("zero1", "galore-std", BF16), ("zero2", "galore-std", BF16), ("zero3", "loro", {})]


def step(engine, rows, judge=torch.isfinite):
    own = rows.split(ROWS // engine.procs.n_procs)[engine.procs.proc]
    return engine.train_step([own], ROWS * (LENGTH - 1), 0.5, 1.0, judge)


def everything(engine):
    return {name: piece.tensor.clone() for name, piece in engine.pieces().items()}


def unsound(folder):
    """Take a NaN of one process, and a loss that is refused, at a first and a later step."""
    procs = Procs.of_default_group()
    said = []
    for layout, rule, sections in CASES:
        config = configure(folder, rule, layout, 1, procs.n_procs, **sections)
        engine = build_engine(config, procs, torch.device("cpu"), pad_id=0)
        plain = engine.backward
        bad = math.nan if dist.get_rank() == 1 else 1.0
        for rows in batches()[:2]:
            before = everything(engine), whole_weights(engine, procs)
            engine.backward = lambda loss, plain=plain, bad=bad: plain(loss * bad)
            broken = step(engine, rows)
            engine.backward = plain
            refused = step(engine, rows, lambda loss: loss < 0)
            torch.testing.assert_close(everything(engine), before[0], rtol=0, atol=0)
            torch.testing.assert_close(whole_weights(engine, procs), before[1], rtol=0, atol=0)
            good = step(engine, rows)
            changed = whole_weights(engine, procs)["lm_head.weight"]
            assert not torch.equal(changed, before[1]["lm_head.weight"]), (layout, rule)
            said.append((broken.sound, refused.sound, good.sound))
            assert not math.isfinite(broken.grad_norm)
            assert math.isfinite(refused.grad_norm) and math.isfinite(good.grad_norm)
            assert good.loss == pytest.approx(refused.loss, rel=1e-6)
        engine.close()
    return said


def test_nothing_changes_on_any_process(tmp_path):
    for said in spawn(unsound, 2, tmp_path):
        assert said == [(False, False, True)] * 2 * len(CASES)
