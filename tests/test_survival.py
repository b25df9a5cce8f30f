"""A run and its checkpoints when disks fill up, files rot and signals come at the wrong moment."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch.distributed as dist
from tiny import launch

from lrpretrain.artifacts import checkpoint
from lrpretrain.artifacts.saver import Saver
from lrpretrain.pretrain import main

STEPS = 15
OPTIONS = dict(train__steps=STEPS, train__save_every=3, train__keep_checkpoints=0)


def train(argv):
    """Run in this process; return the exit code."""
    try:
        return main([str(a) for a in argv])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole(bench):
    """The losses of the run that nothing happens to, by step."""
    assert train(bench.options("whole", **OPTIONS)) == 0
    return bench.losses("whole")


@pytest.fixture
def stopped(bench, whole, tmp_path):
    """A copy of that run as if it had been killed after step 13, and the newest of its checkpoints."""
    run = tmp_path / "run"
    shutil.copytree(bench.folder / "whole", run)
    bench.forget_after(run, 12)
    return run, run / "checkpoints" / "step_00000012"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 8
    path.write_bytes(content)


def of_future(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


DAMAGE = {
    "flipped": ("tensors/__0_0.distcp is not as it was written", lambda p: flip(p / "tensors/__0_0.distcp")),
    "truncated": ("tensors/__0_0.distcp is not", lambda p: os.truncate(p / "tensors/__0_0.distcp", 1000)),
    "missing": ("run.json is missing", lambda p: (p / "run.json").unlink()),
    "no JSON": ("manifest.json is not", lambda p: (p / "manifest.json").write_text("{'format'")),
    "no manifest": ("holds no manifest.json", lambda p: (p / "manifest.json").unlink()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used_and_it_says_so(bench, stopped, whole, capsys, kind):
    run, newest = stopped
    said, do = DAMAGE[kind]
    do(newest)
    assert train(bench.options(run, **OPTIONS)) == 0
    out = capsys.readouterr().out
    assert str(newest) in out and said in out
    assert f"resumed from {run}/checkpoints/step_00000009" in out
    assert bench.losses(run) == whole
    # The steps were done again, and saved in place of what was damaged.
    assert [checkpoint.step_of(p) for p in checkpoint.complete(run / "checkpoints")] == [15, 12, 9, 6, 3]
    assert checkpoint.verify(newest, checkpoint.Procs()) == {}


@pytest.mark.parametrize("kind", ["all damaged", "future", "named", "other model"])
def test_what_cannot_be_gone_on_from_is_refused(bench, stopped, capfd, kind):
    run, newest = stopped
    options = dict(OPTIONS)
    if kind == "all damaged":
        for path in checkpoint.complete(run / "checkpoints"):
            flip(path / "run.json")
        said = "No intact checkpoint is left"
    elif kind == "future":
        of_future(newest)
        said = "has format 99"
    elif kind == "named":
        flip(newest / "run.json")
        options["run__resume"] = newest
        said = f"{newest} is damaged: run.json"
    else:
        options["model__config"] = bench.folder / "one_layer.json"
        options["model__config"].write_text(json.dumps(tiny.TINY | {"num_hidden_layers": 1}))
        said = "is of another model"
    before = sorted(run.glob("checkpoints/*")), bench.metrics(run)
    assert train(bench.options(run, **options)) == 4
    assert said in capfd.readouterr().err
    assert (bench.status(run)["state"], bench.status(run)["exit_code"]) == ("failed", 4)
    assert (sorted(run.glob("checkpoints/*")), bench.metrics(run)) == before


def test_processes_decide_alike(bench, stopped, whole, tmp_path):
    run, newest = stopped
    runs = {name: tmp_path / name for name in ("damaged", "rotten", "future")}
    for path in runs.values():
        shutil.copytree(run, path)
    flip(runs["damaged"] / "checkpoints" / newest.name / "tensors" / "index.json")
    for path in checkpoint.complete(runs["rotten"] / "checkpoints"):
        flip(path / "tensors" / "__0_0.distcp")
    of_future(runs["future"] / "checkpoints" / newest.name)
    fsdp = OPTIONS | dict(engine__kind="fsdp")
    assert launch(2, [bench.options(path, **fsdp) for path in runs.values()]) == [0, 4, 4]
    assert bench.losses(runs["damaged"]) == pytest.approx(whole, rel=1e-5)


def test_what_a_kill_in_a_save_leaves_goes_with_the_next(bench, stopped, whole):
    run, _ = stopped
    half = run / "checkpoints" / "step_00000014"
    (half / "tensors").mkdir(parents=True)
    (half / "tensors" / "__0_0.distcp").write_bytes(b"half of it")
    assert train(bench.options(run, **OPTIONS)) == 0
    assert bench.losses(run) == whole
    assert not half.exists()


def test_how_long_the_training_waited_is_in_the_line_after_a_save(bench, whole):
    waits = {e["step"]: e["perf/save_stall_ms"] for e in bench.metrics("whole") if "perf/save_stall_ms" in e}
    assert list(waits) == [4, 7, 10, 13]
    assert all(wait > 0 for wait in waits.values())


def test_a_file_size_limit_costs_checkpoints_and_not_the_run(bench, whole, monkeypatch, capsys):
    full, save = {6, 9}, Saver.save

    def limited(self, pieces, run, *, last=False):
        self.wait()
        size = 100_000 if run["step"] in full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        save(self, pieces, run, last=last)

    monkeypatch.setattr(Saver, "save", limited)
    try:
        assert train(bench.options("limited", **OPTIONS | dict(train__keep_checkpoints=1))) == 0
        assert bench.losses("limited") == whole
        out = capsys.readouterr().out
        assert "no checkpoint of step 9: " in out and "The last one is of step 3." in out
        failures = {e["step"]: e.get("save/failures") for e in bench.metrics("limited")}
        assert (failures[5], failures[11], failures[15]) == (None, 2, 2)
        folders = [p.name for p in (bench.folder / "limited" / "checkpoints").iterdir()]
        assert folders == ["step_00000015"]

        full.add(STEPS)
        assert train(bench.options("limited-end", **OPTIONS)) == 4
        status = bench.status("limited-end")
        assert (status["state"], status["step"], status["exit_code"]) == ("failed", STEPS, 4)
        kept = checkpoint.complete(bench.folder / "limited-end" / "checkpoints")
        assert [checkpoint.step_of(p) for p in kept] == [12, 3]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_signal_while_a_checkpoint_is_written(bench, stopped, whole, monkeypatch):
    run, _ = stopped
    bench.forget_after(run, 6)
    save, write, paths = Saver.save, checkpoint.save, []

    def save_and_signal(self, pieces, run, *, last=False):
        save(self, pieces, run, last=last)
        if not last:
            os.kill(os.getpid(), signal.SIGTERM)

    def write_slowly(*args):
        time.sleep(0.5)
        paths.append(write(*args))
        return paths[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", save_and_signal)
        patch.setattr(checkpoint, "save", write_slowly)
        assert train(bench.options(run, **OPTIONS)) == 75
    assert len(paths) == 1  # it is waited for, and enough
    assert [checkpoint.step_of(p) for p in checkpoint.complete(run / "checkpoints")] == [9, 6, 3]
    assert (bench.status(run)["state"], bench.status(run)["step"]) == ("stopped", 9)
    assert train(bench.options(run, **OPTIONS)) == 0
    assert bench.losses(run) == whole


def unshares():
    """Say whether this machine lets a test have mounts of its own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not unshares(), reason="no mounts of its own for a test here (unshare -rm)")
def test_a_full_disk_and_a_read_only_one(bench, whole):
    """The whole run folder on a disk that is too small, and checkpoints on one that becomes read-only."""
    script = [sys.executable, str(Path(__file__).parent / "small_disk.py"), str(bench.folder)]
    done = subprocess.run(["unshare", "-rm", *script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    # No room for a second checkpoint, then room again.
    assert report["full"] == {"code": 0, "checkpoints": [15, 12, 3]}
    for step in (6, 9):
        assert re.search(rf"no checkpoint of step {step}: .*No space left on device", done.stdout)
    assert {int(step): loss for step, loss in report["losses"].items()} == whole
    # No room at the end.
    assert report["full at the end"] == {"code": 4, "checkpoints": [3]}
    assert report["status"] == ["failed", 15, 4]
    assert report["read-only"] == {"code": 4, "checkpoints": [3]}
    assert re.search(r"no checkpoint of step 6: .*Read-only file system", done.stdout)
