"""Saving beside the training: what was there is written, one save at a time, and failures are survived."""

import resource
import threading

import pytest
import torch
from spawn import spawn
from test_checkpoint import RUN, build, sharded

from lrpretrain.artifacts import checkpoint
from lrpretrain.artifacts.saver import Saver
from lrpretrain.errors import CheckpointError
from lrpretrain.sharding import Piece
from lrpretrain.sharding.procs import Procs


def saver_in(folder, procs=None, *, beside=True, keep=0):
    return Saver(folder, procs or Procs(), 60.0, keep, 0, beside)


def content(path):
    """Return the whole tensors of a checkpoint by name."""
    index = checkpoint.read_index(path)
    tensors = {name: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"])) for name, e in index.items()}
    checkpoint.load(path, {name: Piece.whole(tensor) for name, tensor in tensors.items()}, Procs())
    return tensors


@pytest.fixture
def gate(monkeypatch):
    """An event that every save waits for."""
    opened, write = threading.Event(), checkpoint.save

    def wait_and_write(*args):
        assert opened.wait(60)
        return write(*args)

    monkeypatch.setattr(checkpoint, "save", wait_and_write)
    return opened


def test_what_changes_after_the_copy_is_not_written(tmp_path, gate):
    pieces = build(torch.clone, seed=0)
    before = {name: piece.tensor.clone() for name, piece in pieces.items()}
    saver = saver_in(tmp_path)
    saver.save(pieces, RUN)
    for piece in pieces.values():  # the training goes on
        piece.tensor.add_(1)
    assert (saver.saved, checkpoint.complete(tmp_path)) == (0, [])
    gate.set()
    # The second save, into the same buffers, waits for the first.
    saver.save(pieces, RUN | {"step": 8})
    assert content(tmp_path / "step_00000007").keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in content(tmp_path / "step_00000007").items())
    saver.wait()
    assert saver.saved == 8
    assert all(torch.equal(t, pieces[n].tensor) for n, t in content(tmp_path / "step_00000008").items())
    assert saver.pop_metrics()["perf/save_stall_ms"] > 0
    assert saver.pop_metrics() == {}


def test_the_last_save_is_waited_for(tmp_path, gate):
    saver = saver_in(tmp_path)
    threading.Timer(0.3, gate.set).start()
    saver.save(build(torch.clone, seed=0), RUN, last=True)
    assert gate.is_set()
    assert checkpoint.complete(tmp_path) == [tmp_path / "step_00000007"]


@pytest.mark.parametrize("beside", [True, False])
def test_a_save_that_fails_is_survived_unless_it_is_the_last(tmp_path, capsys, beside):
    pieces, saver = build(torch.clone, seed=0), saver_in(tmp_path, beside=beside)
    saver.save(pieces, RUN)
    for step in (8, 9):
        (tmp_path / f"step_{step:08d}").write_text("in the way")
    saver.save(pieces, RUN | {"step": 8})
    saver.wait()
    assert saver.pop_metrics()["save/failures"] == 1
    said = capsys.readouterr().out
    assert "no checkpoint of step 8: " in said
    assert "Make room there" in said
    assert "The last one is of step 7." in said
    with pytest.raises(CheckpointError, match="step_00000009 cannot be written"):
        saver.save(pieces, RUN | {"step": 9}, last=True)
    saver.save(pieces, RUN | {"step": 10}, last=True)
    assert [checkpoint.step_of(p) for p in checkpoint.complete(tmp_path)] == [10, 7]
    assert (saver.saved, saver.failures) == (10, 2)


def test_what_broke_a_save_is_no_matter_of_disks(tmp_path, monkeypatch):
    def gone(*args):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(checkpoint, "save", gone)
    saver = saver_in(tmp_path)
    saver.save(build(torch.clone, seed=0), RUN)
    with pytest.raises(RuntimeError, match="closed by peer"):
        saver.wait()


def two_save(folder):
    """Save sharded and replicated pieces; files of the second process have no room in one of the saves."""
    procs = Procs.of_default_group()
    copies = {f"optim/copy{i}/m": Piece.whole(torch.full((64, 64), i)) for i in range(4)}
    pieces = build(sharded, seed=0) | copies
    saver, failed = saver_in(folder, procs, keep=2), []
    for step in (1, 2, 3, 4):
        saver.wait()
        if procs.proc == 1:
            limit = 1000 if step == 3 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        saver.save(pieces, RUN | {"step": step}, last=step == 4)
        failed.append(saver.failures)
    staged = {name: sum(t.numel for t in piece.tiles) for name, piece in saver._staged.items()}
    return failed[-1], str(saver.error), saver.saved, staged


def test_processes_share_the_writing_and_learn_together_of_a_full_disk(tmp_path):
    results = spawn(two_save, 2, tmp_path)
    assert [result[:3] for result in results] == [(1, "None", 4)] * 2
    assert [checkpoint.step_of(p) for p in checkpoint.complete(tmp_path)] == [4, 2]
    for path in checkpoint.complete(tmp_path):
        checkpoint.check(path, Procs())
    # Every number is copied by one process, and what both hold is spread.
    whole = {name: torch.Size(e["shape"]).numel() for name, e in checkpoint.read_index(path).items()}
    assert {name: sum(result[3][name] for result in results) for name in whole} == whole
    for _, _, _, staged in results:
        assert sum(staged[f"optim/copy{i}/m"] for i in range(4)) == 2 * 64 * 64


def stall_ms(folder, *, beside, mib):
    """Return for how long a save of some MiB kept the training waiting: the second one, with warm buffers."""
    pieces = {f"model/{i}": Piece.whole(torch.ones(mib * 2**16)) for i in range(4)}
    saver = saver_in(folder, beside=beside, keep=1)
    for step in (1, 2):
        saver.wait()
        saver.pop_metrics()
        saver.save(pieces, RUN | {"step": step})
    stall = saver.pop_metrics()["perf/save_stall_ms"]
    saver.wait()
    return stall


def test_the_training_waits_for_a_copy_only(tmp_path):
    waits = {beside: stall_ms(tmp_path / str(beside), beside=beside, mib=64) for beside in (False, True)}
    print(f"stall of a save of 64 MiB: {waits[False]:.0f} ms, beside the training {waits[True]:.0f} ms")
    assert waits[True] < waits[False]


@pytest.mark.slow
def test_stall_of_a_gibibyte(tmp_path, capsys):
    waits = {beside: stall_ms(tmp_path / str(beside), beside=beside, mib=1024) for beside in (False, True)}
    ratio = waits[False] / waits[True]
    with capsys.disabled():
        print(f"\nsave of 1 GiB: stall {waits[False]:.0f} ms, beside {waits[True]:.0f} ms, ratio {ratio:.0f}")
    assert ratio > 2
