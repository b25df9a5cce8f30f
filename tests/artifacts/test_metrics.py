"""Metrics: what a full disk does to them."""

import json
import resource

import pytest

from lrpretrain.artifacts.metrics import Metrics
from lrpretrain.artifacts.rundir import RunDir


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_full_disk_delays_metrics_and_raises_nothing(tmp_path, capsys):
    run_dir = RunDir(tmp_path)
    metrics = Metrics(run_dir, start_step=0, total_steps=9, flops_per_token=1.0, n_procs=1)
    try:
        for step in range(1, 10):
            size = 0 if 3 <= step <= 5 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            metrics.log(step, 10 * step, {"valid/loss": 1.0, "valid/ppl": 2.7})
            run_dir.write_status("running", step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    metrics.close()
    lines = run_dir.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))
    out = capsys.readouterr().out
    for step in range(1, 10):
        assert (f"metrics of step {step} cannot be written" in out) == (3 <= step <= 5)
        assert f"step {step:06d}/000009" in out
    assert run_dir.read_status()["step"] == 9
    assert list(run_dir.tensorboard.glob("events.*"))
