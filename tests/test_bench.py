"""`lrpretrain bench train`: what it measures, and the table that it prints."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from lrpretrain import bench, cli
from lrpretrain.bench import Variant
from lrpretrain.config import Config, from_dict
from lrpretrain.engine import build_engine
from lrpretrain.errors import UnsoundError
from lrpretrain.sharding.procs import Procs
from lrpretrain.train import plan

TOY = ["--model.config", "llama_toy", "--optim.rank", 16, "--data.seq_len", 32]
TOY += ["--train.global_batch", 4, "--train.micro_batch", 2]
SMALL = {
    "model": {"config": "llama_toy"},
    "optim": {"rank": 16, "refresh_every": 200},
    "data": {"seq_len": 32},
    "train": {"global_batch": 2, "micro_batch": 1},
}
FOUND = {
    "ordinary_ms": 100.0,
    "refresh_ms": 300.0,
    "peak_gib": 1.5,
    "peak_flops": 1e12,
    "device": "a GPU",
    "slowest": [["aten::mm", 0.5], ["aten::add", 0.25]],
}


def run(*argv, capsys):
    """Run the tool; return (exit code, rows as {column: cell}, last line, stderr)."""
    code = cli.main(["bench", "train", *(str(a) for a in argv)])
    out, err = capsys.readouterr()
    lines = out.splitlines() or [""]
    names, _, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")] or [[], []]
    return code, [dict(zip(names, row, strict=False)) for row in rows], lines[-1], err


def number(cell):
    return float(cell.replace(",", ""))


def test_a_variant_is_measured(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    only = ["--rules", "galore", "--compile", "off", "--checkpointing", "selective", "--steps", 4]
    code, (row,), last, err = run(*only, *TOY, "--optim.refresh_every", 10, capsys=capsys)
    assert (code, err) == (0, "")
    assert (row["rule"], row["checkpointing"], row["MFU"]) == ("galore", "selective", "–")
    step, refresh = number(row["step ms"]), number(row["refresh step ms"])
    assert min(step, refresh) > 0
    assert number(row["tokens/s"]) == pytest.approx(4 * 32 / (step + (refresh - step) / 10) * 1e3, rel=0.01)
    assert 0.1 < number(row["peak GiB"]) < 10
    assert len(row["slowest operators"].split(", ")) == 2 and "aten::mm" in row["slowest operators"]
    assert last == (
        "llama_toy, fsdp, bfloat16 over float32; 4 × 32 random tokens a step, micro-batch 2;"
        f" 1 × CPU, torch {torch.__version__}."
    )


@pytest.mark.parametrize(
    ("rule", "refreshing"), [("adamw", []), ("galore", [0]), ("gradnormlorp", [0]), ("loro", [3])]
)
def test_refreshes_are_told_from_ordinary_steps(rule, refreshing, monkeypatch):
    config = Variant(rule, "off", "full").of(from_dict(SMALL))
    device = torch.device("cpu")
    engine = build_engine(config, Procs(), device, pad_id=-1)
    assert [bench._step(engine, config)[1] for _ in range(8)] == [i % 4 in refreshing for i in range(8)]
    taken = iter((1000.0 if i % 4 in refreshing else 1.0 + i, i % 4 in refreshing) for i in range(8))
    monkeypatch.setattr(bench, "_step", lambda *_: next(taken, (0.0, False)))
    found = bench.measure(config, Procs(), device, steps=3)
    assert found["ordinary_ms"] == {"adamw": 6.5, "loro": 6.0}.get(
        rule, 7.0
    )  # the median of the second period
    assert found["refresh_ms"] == (1000.0 if refreshing else None)


def test_a_step_that_does_not_update_is_not_timed():
    config = Variant("adamw", "off", "none").of(from_dict(SMALL))
    engine = build_engine(config, Procs(), torch.device("cpu"), pad_id=-1)
    with torch.no_grad():
        engine.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(UnsoundError):
        bench._step(engine, config)


def test_the_arithmetic_of_a_row():
    cells = bench.row(Variant("galore", "on", "none"), from_dict(SMALL), 2, FOUND).strip("| ").split(" | ")
    rate = 2 * 32 / (100 + 200 / 200) * 1e3
    mfu = rate * plan.flops_per_token(from_dict(SMALL)) / 2e12
    measured = [f"{rate:,.0f}", f"{mfu:.1%}", "1.50", "100.0", "300.0", "aten::mm 50%, aten::add 25%"]
    assert cells == ["galore", "on", "none", *measured]
    loro = bench.row(Variant("loro", "on", "none"), from_dict(SMALL), 2, FOUND)
    assert f"| {2 * 32 / (100 + 200 / 500) * 1e3:,.0f} |" in loro


def test_what_does_not_fit_is_a_row_and_what_fails_is_told(capsys, monkeypatch):
    answers = {
        "adamw": {"error": "process 0: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"},
        "galore": FOUND,
        "loro": {"error": "process 0: ZeroDivisionError: division by zero"},
    }
    monkeypatch.setattr(bench, "launch", lambda module, config, *_: answers[config.optim.rule])
    few = ["--compile", "off", "--checkpointing", "none", *TOY]
    code, rows, last, err = run("--rules", "adamw", "galore", *few, capsys=capsys)
    assert (code, err) == (0, "")
    assert [row["tokens/s"] for row in rows] == ["out of memory", "1,267"]
    assert "1 × a GPU" in last
    code, rows, _, err = run("--rules", "galore", "loro", *few, capsys=capsys)
    assert code == 1
    assert [row["tokens/s"] for row in rows] == ["1,267", "failed"]
    assert err == "lrpretrain: loro off none: process 0: ZeroDivisionError: division by zero\n"


def test_all_variants_are_taken(capsys, monkeypatch):
    taken = []
    monkeypatch.setenv("CXX", "sh")  # compiling is not refused for want of a compiler
    monkeypatch.setattr(bench, "launch", lambda module, config, *_: taken.append(config) or FOUND)
    code, rows, _, _ = run("--procs", 2, capsys=capsys)
    assert code == 0
    assert len({(row["rule"], row["compile"], row["checkpointing"]) for row in rows}) == len(rows) == 12
    varied = {(c.optim.rule, c.engine.compile, c.model.checkpointing) for c in taken}
    assert varied == {
        (rule, compiles, checkpointing)
        for rule in ("adamw", "galore", "loro")
        for compiles in (False, True)
        for checkpointing in ("none", "selective")
    }
    ((model, batch),) = {(c.model.config, c.train.global_batch) for c in taken}
    assert (model, batch) == ("llama_1b", 128)


def test_the_slowest_operators():
    kernel = SimpleNamespace(key="gemm", device_type=DeviceType.CUDA, is_user_annotation=False, own=90)
    names = {"aten::mm": 60, "aten::add": 30, "aten::mul": 10, "Optimizer.step": 500}
    events = [
        SimpleNamespace(key=k, device_type=DeviceType.CPU, is_user_annotation=k == "Optimizer.step", own=v)
        for k, v in names.items()
    ]
    profiler = SimpleNamespace(key_averages=lambda: [kernel, *events])
    assert bench.slowest(profiler, "own") == [("aten::mm", 0.6), ("aten::add", 0.3)]


def test_configurations_that_cannot_work(capsys):
    argv = ["--optim.rule", "loro", "--engine.compile=true", "--train.micro_batch", 48, "--rules", "galore"]
    code, rows, _, err = run(*argv, "--procs", 1, capsys=capsys)
    assert (code, rows) == (2, [])
    assert "3 problems" in err
    assert "--optim.rule is varied here. Use --rules." in err
    assert "--engine.compile is varied here. Use --compile." in err
    assert "train.global_batch=64" in err


def test_what_a_process_raises_is_the_answer(capsys, monkeypatch):
    monkeypatch.setattr(bench, "join", lambda *_: 1 / 0)
    assert bench.main("llama_toy_galore", 4) == 1
    error = "process 0: ZeroDivisionError: division by zero"
    assert json.loads(capsys.readouterr().out) == {"error": error}


def test_the_configuration_stays_as_it_was():
    config = Config()
    Variant("loro", "on", "full").of(config)
    assert config == Config()
