"""Runs on a disk of 3 MiB that fills up and is emptied again, and with checkpoints that become read-only.

Started by tests/test_survival.py under `unshare -rm`: mounts are its own and go with it. Its last line is
what came of the runs, as JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from tiny import Bench

from lrpretrain.artifacts import checkpoint
from lrpretrain.artifacts.saver import Saver
from lrpretrain.pretrain import main

ROOM = 300_000  # bytes that are left on the full disk: enough for metrics, too little for a checkpoint


def run(bench, name, at_step, part="."):
    """Train with a part of the run folder on a small disk; before saves of `at_step`, do something to it."""
    disk = bench.folder / name / part
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=True)
    save = Saver.save

    def save_then(self, pieces, run, *, last=False):
        self.wait()
        at_step.get(run["step"], lambda disk: None)(disk)
        save(self, pieces, run, last=last)

    Saver.save = save_then
    options = dict(train__steps=15, train__save_every=3, train__keep_checkpoints=0)
    try:
        code = main([str(a) for a in bench.options(name, **options)])
    finally:
        Saver.save = save
        dist.destroy_process_group()
    kept = checkpoint.complete(bench.folder / name / "checkpoints")
    return {"code": code, "checkpoints": [checkpoint.step_of(path) for path in kept]}


def fill(disk):
    left = subprocess.run(["df", "--output=avail", "-B1", disk], capture_output=True, text=True, check=True)
    (disk / "ballast").write_bytes(bytes(int(left.stdout.split()[1]) - ROOM))


def empty(disk):
    (disk / "ballast").unlink()


def lock(disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    bench = Bench.__new__(Bench)
    bench.folder = Path(sys.argv[1])
    bench.text, bench.model, bench.tokenizer = (bench.folder / n for n in ("text", "tiny.json", "tiny.model"))
    report = {"full": run(bench, "small", {6: fill, 12: empty})}
    report["losses"] = bench.losses("small")
    report["full at the end"] = run(bench, "small-end", {6: fill})
    status = bench.status("small-end")
    report["status"] = [status["state"], status["step"], status["exit_code"]]
    report["read-only"] = run(bench, "locked", {6: lock}, "checkpoints")
    print(json.dumps(report))
