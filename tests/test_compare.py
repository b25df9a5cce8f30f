"""`lrpretrain compare` and `lrpretrain report`: what is trained when, and what the report says of it."""

import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from tiny import ROOT

from lrpretrain import cli, compare, pretrain, report
from lrpretrain.artifacts.rundir import RunDir
from lrpretrain.config import ModelConfig, from_dict, to_yaml
from lrpretrain.errors import EXIT_STOPPED, LrpretrainError
from lrpretrain.model import llama
from lrpretrain.train.guard import Guard

FINISHED = {"state": "finished", "step": 8, "exit_code": 0}
DIVERGED = {"state": "failed", "step": 5, "exit_code": 5, "reason": "UnsoundError: step 5"}


def write_run(
    folder, losses, lr=0.01, seed=0, status=FINISHED, step_ms=(100, 200), optim_ms=(4, 8), **sections
):
    """Write a run folder by hand: evaluations at steps 0, 4 and 8, the first 3 steps logged by themselves."""
    folder.mkdir(parents=True)
    values = {"optim": {"rule": "adamw"}, "train": {"steps": 8}, "model": {"config": "llama_toy"}} | sections
    values["optim"] |= {"lr": lr}
    values["train"] |= {"seed": seed}
    (folder / "config.yaml").write_text(to_yaml(from_dict(values)))
    lines = [{"step": 0, "tokens": 0, "valid/loss": losses[0], "mem/optim_gib": 0.5, "mem/peak_gib": 1.0}]
    for step, ms, update in (
        (3, step_ms[0], optim_ms[0]),
        (4, step_ms[1], optim_ms[1]),
        (8, *(step_ms[1], 8)),
    ):
        lines.append({"step": step, "tokens": 1000 * step, "train/loss": 3.0, "mem/peak_gib": 2.0 + seed})
        lines[-1] |= {"perf/step_ms": ms, "perf/optim_ms": update}
    lines[2] |= {"valid/loss": losses[1]}
    lines[3] |= {"valid/loss": losses[2]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    (folder / "environment.json").write_text(
        json.dumps({"n_procs": 1, "device": "cpu", "packages": {"torch": "2.13.0"}})
    )
    (folder / "status.json").write_text(json.dumps({"reason": "", **status}))
    return folder


def tables(text):
    """Return the tables of a Markdown text, each as a list of {column: cell}."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("| "):
            names, _, *rows = [line.strip("| ").split(" | ") for line in block.splitlines()]
            found.append([dict(zip(names, row, strict=False)) for row in rows])
    return found


def run(*argv):
    return cli.main([str(a) for a in argv])


def test_a_report_of_runs(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "a", [9, 4, 3.0], lr=0.003),
        write_run(tmp_path / "b", [9, 4, 2.0], lr=0.01),
        write_run(tmp_path / "c", [9, 4, 2.2], lr=0.01, seed=1),
        write_run(tmp_path / "d", [9, 4, 2.5], lr=0.03),
        write_run(tmp_path / "e", [9, 4, 1.0], lr=0.03, seed=1),  # chosen by a seed that is not the lowest
        write_run(tmp_path / "f", [9, 3, 1.5], optim={"rule": "galore"}),
        write_run(tmp_path / "g", [9, 3, 1.0], lr=0.1, optim={"rule": "galore"}, status=DIVERGED),
        write_run(tmp_path / "h", [9, 3, None], optim={"rule": "loro"}),
    ]
    assert run("report", *runs, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    (adamw, galore, loro), every = tables(text)
    assert tables(capsys.readouterr().out) == [[adamw, galore, loro]]
    ppls = [math.exp(2.0), math.exp(2.2)]
    assert adamw["validation perplexity"] == f"{statistics.mean(ppls):.2f} ± {statistics.stdev(ppls):.2f}"
    assert (adamw["rule"], adamw["learning rate"], adamw["runs"]) == ("adamw", "0.01", "2")
    seconds = (3 * 100 + 1 * 200 + 4 * 200) / 1e3
    assert adamw["tokens/s"] == f"{8000 / seconds:,.0f}"
    assert adamw["optimizer ms a step"] == f"{(3 * 4 + 5 * 8) / 8:.2f}"
    assert (adamw["optimizer state"], adamw["peak"]) == ("0.5", "3")
    numbers = sum(p.numel() for p in llama.build(llama.load_config(ModelConfig("llama_toy"))).parameters())
    assert adamw["GiB: weights"] == adamw["gradients"] == f"{numbers * 4 / 2**30:.3g}"
    assert (galore["learning rate"], galore["runs"]) == ("0.01 (the smallest tried)", "1")
    assert galore["validation perplexity"] == f"{math.exp(1.5):.2f}"
    assert (loro["runs"], loro["validation perplexity"]) == (
        "0",
        no_loss := "finished without a finite validation loss",
    )
    cells = {row["folder"]: (row["learning rate"], row["validation loss"], row["state"]) for row in every}
    assert cells["../b"] == ("**0.01**", "2.0000", "finished")
    assert cells["../d"] == ("0.03", "2.5000", "finished")
    assert cells["../g"] == ("0.1", "–", "diverged at step 5 of 8")
    assert cells["../h"] == ("0.01", "–", no_loss)
    assert len(every) == len(runs)
    assert "the runs differ in" not in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_axes_of_the_curves(tmp_path, monkeypatch):
    figure = report.canvas()
    monkeypatch.setattr(report, "canvas", lambda: figure)
    runs = [write_run(tmp_path / str(seed), [9, 4, 3 + seed], seed=seed) for seed in (0, 1)]
    report.write([report.read(path) for path in runs], tmp_path / "out")
    left, right = figure.axes
    assert [line.get_xydata().tolist() for line in left.lines] == [
        [[4000, 4], [8000, 3]],
        [[4000, 4], [8000, 4]],
    ]
    minutes = [0.5 / 60, 1.3 / 60]
    assert [line.get_xdata().tolist() for line in right.lines] == [pytest.approx(minutes)] * 2
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["adamw, 0.01"]


def test_runs_with_other_settings_are_not_averaged(tmp_path):
    losses = [9, 4, 3]
    runs = [
        write_run(tmp_path / str(rank), losses, optim={"rule": "galore", "rank": rank}) for rank in (4, 8)
    ]
    runs += [write_run(tmp_path / "adamw", losses, train={"steps": 8, "micro_batch": 2})]
    assert run("report", *runs, "--out", tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert [row["rule"] for row in tables(text)[0]] == ["galore optim.rank=4", "galore optim.rank=8", "adamw"]
    assert (
        "differ in:\n\n- optim.rank: 4 (galore); 8 (galore); 128 (adamw)\n- train.micro_batch: 16 (galore); 2"
        in text
    )


def test_what_cannot_be_reported(tmp_path, capsys, monkeypatch):
    assert run("report", tmp_path) == 3
    assert f"{tmp_path} is not a run folder" in capsys.readouterr().err
    begun = write_run(tmp_path / "begun", [9, 4, 3], status={"state": "running", "step": 4})
    (begun / "metrics.jsonl").unlink()
    assert run("report", begun, "--out", tmp_path / "out") == 0
    ((row,), (one,)) = tables((tmp_path / "out" / "report.md").read_text())
    assert row["validation perplexity"] == one["state"] == "running at step 4 of 8"
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run("report", begun, "--out", tmp_path / "none") == 2
    assert "pip install 'lrpretrain[report]'" in capsys.readouterr().err


def options(bench, **more):
    """Return the options of tiny runs, without those that a comparison has for itself."""
    few = {"train__steps": 4, "train__warmup_steps": 1, "train__eval_every": 2, "train__eval_tokens": 200}
    few |= {"train__prompt": "null", "train__global_batch": 4, "train__save_every": 2, "train__log_every": 2}
    return bench.options("", **(few | {"run__dir": None} | more))


def train(folder):
    """Train in this process what `compare.launch` would in others."""
    try:
        with Guard() as guard:
            return False, pretrain.pretrain(report.read(folder).config, guard)
    except LrpretrainError as error:
        return False, error.exit_code
    finally:
        dist.destroy_process_group()


def test_what_is_trained_and_what_is_not_again(bench, tmp_path, capsys, monkeypatch):
    launched = []
    monkeypatch.setattr(compare, "launch", lambda folder, _: launched.append(folder.name) or train(folder))
    argv = ["compare", "--out", tmp_path, "--rules", "adamw,loro", "--lrs", "0.03,0.01", "--seeds", "1,0"]
    argv += options(bench)
    assert run(*argv) == 0
    runs = {name: report.read(tmp_path / name) for name in launched}
    best = {}
    for rule in ("adamw", "loro"):
        losses = {lr: runs[f"{rule}_lr{lr}_seed0"].loss for lr in ("0.01", "0.03")}
        best[rule] = min(losses, key=losses.get)
    trained = [f"{rule}_lr{lr}_seed0" for rule in best for lr in ("0.01", "0.03")]
    others = [f"{rule}_lr{best[rule]}_seed1" for rule in best]
    assert launched == [*trained[:2], others[0], *trained[2:], others[1]]
    rows, every = tables((tmp_path / "report.md").read_text())
    assert [row["learning rate"].split()[0] for row in rows] == list(best.values())
    assert [row["runs"] for row in rows] == ["2", "2"] and len(every) == 6
    assert all(float(row["tokens/s"].replace(",", "")) > 0 for row in rows)
    assert float(rows[0]["optimizer state"]) > 0

    launched.clear()
    capsys.readouterr()
    interrupted = tmp_path / others[1]
    bench.forget_after(interrupted, 2)  # an absolute path stays what it is
    RunDir(interrupted).write_status("running", 3)
    assert run(*argv) == 0
    assert launched == [others[1]]
    assert "resumed from" in capsys.readouterr().out
    assert report.read(interrupted).loss == runs[others[1]].loss

    launched.clear()
    for _ in range(2):
        assert run(*argv, "--rules", "adamw", "--lrs", f"{best['adamw']},1e30") == 0
        assert launched == ["adamw_lr1e+30_seed0"]  # in the first of the two
    (row,), every = tables((tmp_path / "report.md").read_text())
    assert row["learning rate"] == f"{best['adamw']} (the smallest tried)"
    (diverged,) = [row["state"] for row in every if row["learning rate"] == "1e+30"]
    assert re.fullmatch(r"diverged at step \d of 4", diverged)

    assert run(*argv, "--optim.eps", "1e-7") == 2
    assert f"optim.eps=1e-07: a run in {tmp_path} has 1e-06" in capsys.readouterr().err


def test_a_run_that_fails_is_told_and_the_others_go_on(bench, tmp_path, capsys, monkeypatch):
    def launch(folder, n_procs):
        if folder.name.startswith("loro"):
            RunDir(folder).write_status("failed", 0, "OutOfMemoryError: CUDA out of memory", 1)
            return False, 1
        return train(folder)

    monkeypatch.setattr(compare, "launch", launch)
    one = ["--out", tmp_path, "--lrs", "0.01", "--seeds", "0", *options(bench, train__steps=2)]
    assert run("compare", "--rules", "loro,adamw", *one) == 1
    folder = tmp_path / "loro_lr0.01_seed0"
    told = f"{folder}: OutOfMemoryError: CUDA out of memory; see {folder / 'output.log'}"
    assert told in capsys.readouterr().err
    rows, every = tables((tmp_path / "report.md").read_text())
    assert [(row["rule"], row["runs"]) for row in rows] == [("loro", "0"), ("adamw", "1")]
    assert every[0]["state"] == "failed at step 0 of 2: OutOfMemoryError: CUDA out of memory"


def test_a_signal_stops_a_comparison_and_it_goes_on(bench, tmp_path, monkeypatch):
    """With real processes, by torchrun."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    argv = [
        "compare",
        "--procs",
        "2",
        "--out",
        str(tmp_path),
        "--rules",
        "galore",
        "--lrs",
        "0.01",
        "--seeds",
        "0",
    ]
    argv += options(bench, train__steps=150, train__eval_every=150, train__save_every=0, engine__kind="ddp")
    process = subprocess.Popen([sys.executable, "-m", "lrpretrain.cli", *argv], cwd=ROOT)
    log = tmp_path / "galore_lr0.01_seed0" / "output.log"
    until = time.monotonic() + 120
    while not (log.exists() and "step 000002/" in log.read_text()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == EXIT_STOPPED
    stopped = report.read(log.parent)
    assert stopped.status["state"] == "stopped" and 2 <= stopped.status["step"] < 40
    assert run(*argv) == 0
    assert f"resumed from {log.parent}" in log.read_text()
    assert report.read(log.parent).environment["n_procs"] == 2
    assert tables((tmp_path / "report.md").read_text())[0][0]["runs"] == "1"


def test_configurations_that_cannot_work(tmp_path, capsys):
    argv = [
        "--rules",
        "adamw,muon",
        "--lrs",
        "0",
        "--train.eval_every=0",
        "--optim.rule",
        "loro",
        "--out",
        tmp_path,
    ]
    assert run("compare", *argv) == 2
    err = capsys.readouterr().err
    assert "4 problems" in err
    assert "--optim.rule is varied here. Use --rules." in err
    assert "train.eval_every=0: nothing would be compared" in err
    assert "optim.lr=0.0: must be a number above 0" in err
    assert "--rules='muon': is no rule. Use some of adamw,galore" in err
    assert list(tmp_path.iterdir()) == []
    for option in ("--lrs", "--seeds"):
        with pytest.raises(SystemExit):
            run("compare", option, "0,x")
        assert f"argument {option}: '0,x' is not" in capsys.readouterr().err
