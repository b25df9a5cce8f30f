"""A GPU that torch cannot use is said, with both versions."""

import pytest
import torch

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
