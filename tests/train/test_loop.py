"""Runs in which numbers go wrong."""

import json
import math

import pytest
import torch.distributed as dist

from lrpretrain.engine import Engine
from lrpretrain.pretrain import main
from lrpretrain.train.judge import Judge

SHORT = dict(train__micro_batch=12, train__steps=12)


def run(argv):
    try:
        return main([str(a) for a in argv])
    finally:
        dist.destroy_process_group()


def fails(capfd, argv, *said):
    assert run(argv) == 5
    error = capfd.readouterr().err
    assert error.startswith("lrpretrain: ") and all(words in error for words in said), error


def spoil(monkeypatch, *calls):
    """Make the loss of some calls of backward, counted from 0, infinite."""
    plain, count = Engine.backward, iter(range(10**6))

    def backward(self, loss):
        plain(self, loss * (math.inf if next(count) in calls else 1.0))

    monkeypatch.setattr(Engine, "backward", backward)


def test_an_unsound_step_stops_with_a_checkpoint_behind_it(bench, capfd, monkeypatch):
    """It is seen in the step after it, which is done; the next start goes on with the batch that follows."""
    argv = bench.options("stop", **SHORT, train__log_every=100)
    spoil(monkeypatch, 4)
    fails(capfd, argv, "step 5: ", "not finite", "nothing was updated", "train.unsound=skip")
    assert (bench.status("stop")["step"], bench.status("stop")["exit_code"]) == (6, 5)
    monkeypatch.undo()
    assert run(argv) == 0
    skipped = bench.options("passed", **SHORT, train__unsound="skip", train__log_every=100)
    spoil(monkeypatch, 4)
    assert run(skipped) == 0
    ends = [bench.metrics(run)[-1] for run in ("stop", "passed")]
    assert ends[0]["train/skipped"] == ends[1]["train/skipped"] == 1
    for key in ("train/loss", "train/grad_norm", "tokens"):
        assert ends[0][key] == ends[1][key]


def test_too_many_skipped_steps_in_a_row_stop_the_run(bench, capfd, monkeypatch):
    spoil(monkeypatch, 2, 3, 5, 6, 7)
    argv = bench.options("row", **SHORT, train__unsound="skip", train__max_skipped=2)
    fails(capfd, argv, "step 8: ")
    assert [e["step"] for e in bench.metrics("row") if e["train/loss"] is not None] == list(range(1, 8))


def test_a_spike_is_skipped_and_known_after_a_resume(bench, capfd, monkeypatch):
    plain = Judge.__call__
    count = iter(range(100))
    monkeypatch.setattr(Judge, "__call__", lambda self, loss: plain(self, loss + 100 * (next(count) == 7)))
    options = dict(train__unsound="skip", train__spike_window=5, train__log_every=1)
    assert run(bench.options("spike", **SHORT | options)) == 0
    assert "step 8: the loss" in capfd.readouterr().out
    assert [e["train/skipped"] for e in bench.metrics("spike")] == [0] * 7 + [1] * 5
    saved = json.loads((bench.folder / "spike/checkpoints/step_00000012/run.json").read_text())
    losses = bench.losses("spike")
    expected = [losses[step] for step in (7, 9, 10, 11, 12)]
    assert saved["losses"][1:] == pytest.approx(expected[1:], rel=1e-6) and len(saved["losses"]) == 5
    monkeypatch.undo()
    lines = bench.options("spike", **SHORT | options | dict(train__steps=14, train__unsound="stop"))
    monkeypatch.setattr(Judge, "__call__", lambda self, loss: plain(self, loss + 100))
    fails(capfd, lines, "step 13: the loss", "is a spike", "train.spike_sigmas")
