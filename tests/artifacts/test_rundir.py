"""The run folder: metrics are cut back, files are written whole."""

import json
import math

import pytest

from lrpretrain.artifacts import metrics
from lrpretrain.artifacts.rundir import RunDir
from lrpretrain.errors import ConfigError


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    run = RunDir(tmp_path)
    lines = [json.dumps({"step": s}) + "\n" for s in (1, 2, 3)]
    run.metrics.write_text("".join(lines) + '{"step": 4, "tra')
    run.cut_metrics(2)
    assert run.metrics.read_text() == "".join(lines[:2])


def test_status_is_read_back_and_a_broken_one_is_none(tmp_path):
    run = RunDir(tmp_path)
    assert run.read_status() == {}
    run.write_status("stopped", 5, "SIGTERM", 75, launch_id="x")
    assert run.read_status() == {
        "state": "stopped", "step": 5, "reason": "SIGTERM", "exit_code": 75, "launch_id": "x"
    }  # fmt: skip
    (tmp_path / "status.json").write_text("{")
    assert run.read_status() == {}


def test_a_run_is_not_overwritten(tmp_path):
    run = RunDir(tmp_path / "run")
    run.create(fresh=True)
    run.metrics.write_text('{"step": 1}\n')
    run.create(fresh=False)
    with pytest.raises(ConfigError, match="holds a run"):
        run.create(fresh=True)


def test_the_line_of_a_step():
    values = {
        "step": 1200, "train/loss": 3.4121, "train/lr": 4.8e-3, "train/grad_norm": 0.71,
        "perf/tokens_per_s": 182e3, "perf/step_ms": 400.0, "perf/mfu": 0.412, "mem/peak_gib": 31.4,
        "subspace/refreshes": 3, "subspace/matrices": 168,
    }  # fmt: skip
    assert metrics.console_line(values, 100_000) == (
        "step 001200/100000 | loss 3.4121 | ppl 30.3 | lr 4.8e-03 | gnorm 0.71 | 182.0k tok/s | mfu 41.2%"
        " | mem 31.4 GiB | refresh 3/168 | eta 10h58"
    )


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 0),
    ],
)
def test_peaks_are_those_of_known_devices_only(monkeypatch, name, peak):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    assert metrics.peak_flops() == peak


def test_no_utilisation_is_claimed_on_a_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert metrics.peak_flops() == 0


def test_perplexity_overflows_to_infinity():
    assert metrics.perplexity(1e4) == math.inf
