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


@pytest.mark.parametrize(
    ("per_layer", "left"), [("false", "nothing was"), ("true", "no block with such a gradient was")]
)
def test_an_unsound_step_stops_with_a_checkpoint_behind_it(per_layer, left, bench, capfd, monkeypatch):
    """It is seen in the step after it, which is done; the next start goes on with the batch that follows."""
    names = [f"{name}-{per_layer}" for name in ("stop", "passed")]
    options = SHORT | {"train__log_every": 100, "optim__per_layer": per_layer}
    argv = bench.options(names[0], **options)
    spoil(monkeypatch, 4)
    fails(capfd, argv, "step 5: ", "not finite", f"{left} updated", "train.unsound=skip")
    assert (bench.status(names[0])["step"], bench.status(names[0])["exit_code"]) == (6, 5)
    monkeypatch.undo()
    assert run(argv) == 0
    skipped = bench.options(names[1], **options, train__unsound="skip")
    spoil(monkeypatch, 4)
    assert run(skipped) == 0
    ends = [bench.metrics(name)[-1] for name in names]
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


EVALUATED = SHORT | dict(
    train__eval_every=6, train__eval_tokens=500, train__unsound="stop", train__save_every=3
)


@pytest.mark.parametrize(("broken", "ends"), [((10,), (12, 1, 0)), ((4, 5), (6, 2, 2)), ((11,), (12, 1, 1))])
def test_what_an_unsound_step_leaves_is_known_at_the_next_start(bench, capfd, monkeypatch, broken, ends):
    """It is seen after the next step, which may be unsound as well, or owe an evaluation."""
    name = f"left{broken}"
    argv = bench.options(name, **EVALUATED, train__log_every=100)
    spoil(monkeypatch, *broken)
    fails(capfd, argv, f"step {broken[0] + 1}: ")
    monkeypatch.undo()
    step, *skipped = ends
    folder = bench.folder / name / "checkpoints"
    saved = json.loads((folder / f"step_{step:08d}" / "run.json").read_text())
    assert [saved["skipped"], saved["skipped_in_a_row"]] == skipped
    assert saved["owes_evaluation"]
    assert run(argv) == 0
    assert [e["step"] for e in bench.metrics(name) if "valid/loss" in e] == [0, 6, 12]
    assert bench.metrics(name)[-1]["step"] == 12
    assert run(argv) == 0 and "is complete" in capfd.readouterr().out
    assert [e["step"] for e in bench.metrics(name) if "valid/loss" in e] == [0, 6, 12]


def test_an_unsound_last_step_is_told_where_the_data_ends(bench, capfd, monkeypatch):
    argv = bench.options("ended", **SHORT | dict(train__steps=500), data__epochs=1, train__log_every=1000)
    assert run(argv) == 3
    steps = bench.status("ended")["step"]
    argv = bench.options("ended2", **SHORT | dict(train__steps=500), data__epochs=1, train__log_every=1000)
    spoil(monkeypatch, steps - 1)
    capfd.readouterr()
    fails(capfd, argv, f"step {steps}: ", "not finite")
    saved = bench.folder / "ended2" / "checkpoints" / f"step_{steps:08d}" / "run.json"
    assert json.loads(saved.read_text())["skipped"] == 1


def test_a_run_that_starts_elsewhere_goes_on_from_its_own(bench, monkeypatch):
    assert run(bench.options("source", **SHORT, train__save_every=4)) == 0
    path = bench.folder / "source" / "checkpoints" / "step_00000004"
    argv = bench.options("fork", **SHORT | dict(train__steps=14), run__resume=path, train__save_every=4)
    spoil(monkeypatch, 5)  # step 10
    assert run(argv) == 5
    monkeypatch.undo()
    assert run(argv) == 0
    assert [e["step"] for e in bench.metrics("fork")] == [5, 6, 7, 8, 9, 11, 12, 13, 14]
    assert bench.metrics("fork")[-1]["train/skipped"] == 1
