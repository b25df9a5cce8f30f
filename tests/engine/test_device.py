"""A GPU that torch cannot use is said, with both versions; processes find each other after a restart."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lrpretrain.engine import device


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put an nvidia-smi on the path; returns a function that sets what it prints and its exit code."""

    def install(output, code=0):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine")
def test_a_gpu_that_torch_cannot_use_is_said(nvidia_smi):
    nvidia_smi("NVIDIA A100-SXM4-80GB, 470.82.01")
    said = device.unusable_gpu()
    assert "NVIDIA A100-SXM4-80GB" in said
    assert "470.82.01" in said
    assert torch.__version__ in said
    assert "CUDA" in said


def test_nothing_is_said_of_a_gpu_that_is_not_there(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA-SMI has failed", code=9)
    assert device.unusable_gpu() is None
    nvidia_smi("NVIDIA A100, 470")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.unusable_gpu() is None


def test_processes_come_from_the_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert device.env_procs() == (0, 1, 0)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert device.env_procs() == (5, 8, 1)


@pytest.mark.parametrize("lost", [[0], [2], [1, 2]])
def test_processes_that_start_again_do_not_meet_the_dead(lost):
    """What those of earlier starts have left in the store, complete or not, misleads nobody."""
    store, names = dist.HashStore(), []
    for absent in ([], lost, [], lost, []):
        timeout_s = 0.2 if absent else 10
        store.set_timeout(timedelta(seconds=timeout_s))
        present = [proc for proc in range(3) if proc not in absent]
        with ThreadPoolExecutor(3) as pool:
            calls = {proc: pool.submit(device.meet, store, proc, 3, timeout_s) for proc in present}
        if absent:
            assert calls[present[0]].exception() is not None
        else:
            (name,) = {call.result() for call in calls.values()}
            names.append(name)
    assert len(set(names)) == 3
