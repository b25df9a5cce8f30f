"""Runs of several processes that are stopped, and runs of which a process dies or fails."""

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
from started import Run
from tiny import Bench, _free_port

from lrpretrain.artifacts import checkpoint
from lrpretrain.engine import Engine
from lrpretrain.sharding import Piece
from lrpretrain.sharding.procs import Procs

SEED = 20261122


def tensors(path):
    """Return all tensors of a checkpoint, whole, by name."""
    index = checkpoint.read_index(path).items()
    whole = {name: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"])) for name, e in index}
    checkpoint.load(path, {name: Piece.whole(tensor) for name, tensor in whole.items()}, Procs())
    return whole


def check_same(bench, run, other, step):
    """See that two runs came to the same weights and state at a step, bit for bit, and logged the same."""
    ours, theirs = (tensors(bench.folder / r / "checkpoints" / f"step_{step:08d}") for r in (run, other))
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert differing == []
    assert measured(bench.metrics(run)) == measured(bench.metrics(other))


def measured(metrics):
    """Return what must repeat to the bit, by step: losses, rates, norms and counts."""
    steps = {}
    for entry in metrics:
        kept = {k: v for k, v in entry.items() if not k.startswith(("perf/", "mem/"))}
        steps.setdefault(entry["step"], {}).update(kept)
    return steps


def slow_down(owner, name, seconds):
    """Make a function take longer."""
    function = getattr(owner, name)

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    setattr(owner, name, slow)


def slow_start():
    slow_down(Engine, "hold", 2.0)


def slow_steps():
    slow_down(Engine, "train_step", 0.5)


def slow_evaluation():
    slow_down(Engine, "loss_sum", 0.5)  # 12 s for 8 batches


def slow_saves():
    slow_down(checkpoint, "_identity", 0.2)


def hang():
    """Keep all processes from the collectives of the fifth step, and of all others."""
    step, steps = Engine.train_step, []

    def train_step(*args):
        steps.append(None)
        if len(steps) == 5:
            print("hangs", flush=True)
            time.sleep(600)
        return step(*args)

    Engine.train_step = train_step


def fail():
    """Let the second process meet a bug in the fifth step."""
    if os.environ["RANK"] == "1":
        step, steps = Engine.train_step, []

        def train_step(*args):
            steps.append(None)
            assert len(steps) < 5, "a bug"
            return step(*args)

        Engine.train_step = train_step


@pytest.fixture(scope="module")
def slow_bench(tmp_path_factory):
    """A bench one of whose shards is not compressed and so large that it takes several reads."""
    bench = Bench(tmp_path_factory.mktemp("slow"))
    packed = sorted(bench.text.glob("*train*"))[-1]
    lines = gzip.decompress(packed.read_bytes()).splitlines()
    padded = [json.dumps(json.loads(line) | {"url": "x" * 10_000}) for line in lines]
    packed.with_suffix("").write_text("\n".join(padded) + "\n")
    packed.unlink()
    bench.slow_shard = packed.with_suffix("")
    return bench


class Stalled:
    """While it is entered, a file is a pipe that gives the first half of its content, and then nothing."""

    def __init__(self, path):
        self.path, self.whole = path, path.with_name("whole")

    def __enter__(self):
        self.path.rename(self.whole)
        os.mkfifo(self.path)
        self._pipe = os.open(self.path, os.O_RDWR)
        content = self.whole.read_bytes()
        threading.Thread(
            target=os.write, args=(self._pipe, content[: len(content) // 2]), daemon=True
        ).start()

    def __exit__(self, *_):
        self.whole.replace(self.path)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


def test_a_run_stopped_again_and_again_is_the_run_that_was_not(slow_bench, stack):
    bench, runs = slow_bench, []
    same = dict(
        engine__kind="fsdp", data__lanes=4, train__steps=40, train__save_every=15, train__eval_every=10,
        train__eval_tokens=3000, data__path=bench.text,
    )  # fmt: skip
    runs.append(stack.enter_context(Run(2, bench.options("whole", **same), bench.folder / "outputs")))

    def stop(number, proc, happened, before=None, settle_s=0.0, **options):
        """Start the run, stop it at some moment; return the step, its run.json, and the seconds it took."""
        argv = bench.options("stopped", **same | options)
        runs.append(run := stack.enter_context(Run(2, argv, bench.folder / f"outputs{len(runs)}", before)))
        if number is not None:
            run.wait_for(happened)
            time.sleep(settle_s)
            run.send(number, proc)
        began = time.monotonic()
        assert run.end(procs=1) == [75], run.said()
        took = time.monotonic() - began
        status = bench.status("stopped")
        why = "time limit" if number is None else number.name
        assert (status["state"], status["reason"], status["exit_code"]) == ("stopped", why, 75)
        assert f"stopped by {why} at step {status['step']}, " in run.said()
        if status["step"] == 0:
            assert "nothing to save" in run.said()
            return 0, {}, took
        newest = checkpoint.complete(bench.folder / "stopped" / "checkpoints")[0]
        assert checkpoint.read_manifest(newest)["step"] == status["step"]
        return status["step"], checkpoint.read_run(newest), took

    # While the model is built, in the evaluation before the first step, and in a step.
    assert stop(signal.SIGTERM, 0, "parameters of", slow_start)[0] == 0
    step, _, took = stop(signal.SIGINT, 0, "parameters of", slow_evaluation, settle_s=1.5)
    assert step == 0 and took < 8.0
    step, state, _ = stop(signal.SIGTERM, 1, "step 000004/")
    assert 4 <= step <= 8 and not state["owes_evaluation"]
    # In an evaluation, which is done when the run goes on.
    step, state, took = stop(signal.SIGHUP, 1, "step 000009/", slow_evaluation, settle_s=1.0)
    assert step == 10 and state["owes_evaluation"] and took < 8.0
    # During a save: that one is enough.
    saving = bench.folder / "stopped" / "checkpoints" / "step_00000015"
    step, _, _ = stop(signal.SIGUSR1, 0, saving.exists, slow_saves)
    assert step in (15, 16)
    # By the time limit.
    began = time.monotonic()
    stop(None, None, None, slow_steps, run__time_limit_s=7)
    assert time.monotonic() - began < 7.5

    # While a process waits for data, be that the one that hears of it or the other one.
    def is_quiet():
        return "resumed" in runs[-1].said() and time.time() - runs[-1].outputs[0].stat().st_mtime > 2

    for number in (signal.SIGTERM, signal.SIGINT):
        before = bench.status("stopped")["step"]
        with Stalled(bench.slow_shard):
            step, _, took = stop(number, proc=number == signal.SIGINT, happened=is_quiet)
        assert took < 5.0
    assert step == before
    stop(signal.SIGTERM, 1, "step 000039/", slow_evaluation, settle_s=1.0)
    with Run(2, bench.options("stopped", **same), bench.folder / "outputs") as run:
        assert run.end() == [0, 0], run.said()
    assert [run.end() for run in runs] == [[0, 0], *[[75, 75]] * (len(runs) - 1)]
    check_same(bench, "stopped", "whole", 40)


@pytest.mark.parametrize("kind", ["fsdp", "zero"])
def test_processes_killed_at_random_moments_change_nothing(bench, stack, request, kind):
    kills = 30 if request.config.getoption("--full") else 3
    steps, rng = 10 + 5 * kills, random.Random(SEED)
    same = dict(engine__kind=kind, train__steps=steps, train__save_every=2)
    whole = stack.enter_context(Run(2, bench.options(f"whole-{kind}", **same), bench.folder / "whole"))
    argv = bench.options(f"killed-{kind}", **same)
    folder = bench.folder / f"killed-{kind}" / "checkpoints"

    def is_saving():
        for path in folder.glob("step_*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime > began and not (path / "manifest.json").exists():
                    return True
        return False

    step = saves_hit = 0
    for kill in range(kills):
        began = time.time()
        with Run(2, argv, bench.folder / "killed") as run:
            target = min(step + rng.randint(0, 6), steps - 4)
            victim, in_save = rng.randint(0, 1), rng.random() < 0.5
            run.wait_for(f"step {target:06d}/" if target > step else "optimizer state: ")
            if in_save:
                run.wait_for(is_saving)
            time.sleep(rng.uniform(0, 0.05 if in_save else 0.2))
            run.send(signal.SIGKILL, victim)
            codes = run.end(timeout_s=10)
        which = f"seed {SEED}, kill {kill}: process {victim} near step {target}"
        assert codes == ([-signal.SIGKILL, 1] if victim == 0 else [1, -signal.SIGKILL]), which
        status = bench.status(f"killed-{kind}")
        assert (status["state"], status["reason"]) == ("failed", f"process {victim} died"), which
        saves_hit += is_saving()
        for path in checkpoint.complete(folder):
            assert not checkpoint.verify(path, Procs()), which
            step = max(step, checkpoint.read_run(path)["step"])
    assert saves_hit or kills < 30
    with Run(2, argv, bench.folder / "killed") as run:
        assert run.end() == [0, 0], f"seed {SEED}"
        assert f"resumed from {folder}/step_{step:08d}" in run.said()
    assert whole.end() == [0, 0]
    check_same(bench, f"killed-{kind}", f"whole-{kind}", steps)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_dies_ends_those_that_do_not_wait_for_it(bench, victim):
    argv = bench.options(f"hung{victim}", engine__kind="ddp")
    with Run(3, argv, bench.folder / "hung", hang) as run:
        run.wait_for("hangs")
        run.send(signal.SIGKILL, victim)
        assert sorted(run.end(timeout_s=5)) == [-signal.SIGKILL, 1, 1]
        output = "".join(run.said(proc) for proc in range(3))
    assert output.count(f"lrpretrain: process {victim} died") == 1
    status = bench.status(f"hung{victim}")
    assert (status["state"], status["reason"], status["exit_code"]) == ("failed", f"process {victim} died", 1)


def test_a_bug_in_one_process_ends_the_others(bench):
    with Run(2, bench.options("buggy", engine__kind="fsdp"), bench.folder / "buggy-output", fail) as run:
        assert run.end() == [1, 1]
        assert "AssertionError: a bug" in run.said(1)
        assert "Traceback" not in run.said(0)
    status = bench.status("buggy")
    assert (status["state"], status["reason"], status["step"]) == ("failed", "process 1 died", 4)


@pytest.mark.parametrize("ends", [True, False])
def test_data_that_ends_or_breaks_on_one_process_ends_all(bench, ends):
    folder = bench.folder / "broken"
    if not ends:  # the last lane, which process 1 reads
        shutil.copytree(bench.text, folder)
        shard = sorted(folder.glob("*train*"))[3]
        shard.write_bytes(shard.read_bytes()[:-200])
    run_name = f"data-{'ends' if ends else 'breaks'}"
    data = dict(data__epochs=1) if ends else dict(data__path=folder, data__lanes=4)
    argv = bench.options(run_name, engine__kind="fsdp", train__steps=500, **data)
    with Run(2, argv, bench.folder / "data-output") as run:
        assert run.end() == [3, 3]
        assert ("the data ended" if ends else shard.name) in run.said()
    status = bench.status(run_name)
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    newest = checkpoint.complete(bench.folder / run_name / "checkpoints")[0]
    assert checkpoint.read_manifest(newest)["step"] == status["step"] > 0


def test_a_process_whose_peers_never_come_can_be_stopped(bench):
    place = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    with Run(1, bench.options("lonely", engine__kind="fsdp"), bench.folder / "lonely-output", **place) as run:
        run.wait_for((bench.folder / "lonely" / "checkpoints").exists)
        time.sleep(1.0)  # it waits in C, where no handler of Python is called
        run.send(signal.SIGTERM)
        assert run.end(timeout_s=5) == [75]
    assert not (bench.folder / "lonely" / "status.json").exists()  # it cannot tell a stop from a failure
