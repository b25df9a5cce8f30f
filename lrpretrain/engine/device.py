"""Which device a process trains on, and how the processes find each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from lrpretrain.sharding.procs import Procs


def env_procs() -> tuple[int, int, int]:
    """Return (process, processes, process on this node) as the launcher set them, or of a single process."""
    return tuple(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # type: ignore[return-value]


def pick_device() -> torch.device:
    """Return this process's GPU, or the CPU where torch has none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", env_procs()[2])
    torch.cuda.set_device(device)
    return device


def unusable_gpu() -> str | None:
    """Return a line about a GPU that is there and that torch cannot use, with both versions; else None."""
    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    if found.returncode != 0 or not found.stdout.strip():
        return None
    name, driver = (part.strip() for part in found.stdout.splitlines()[0].split(",")[:2])
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return (
        f"This machine has a GPU ({name}, driver {driver}) that torch {torch.__version__} ({built})"
        " cannot use: training on the CPU. Install a driver or a torch build that fit each other."
    )


def join(device: torch.device, timeout_s: float) -> Procs:
    """Join the process group that the launcher announced, or make one of this process alone."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    elif os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        dist.init_process_group(backend, timeout=timeout)
    else:
        store, proc, n_procs = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(meet(store, proc, n_procs, timeout_s), store)
        dist.init_process_group(backend, store=store, rank=proc, world_size=n_procs, timeout=timeout)
    return Procs.of_default_group()


def meet(store: dist.Store, proc: int, n_procs: int, timeout_s: float) -> str:
    """Return a name that processes which start together share, and earlier ones had not; collective.

    torchrun keeps its store when it restarts processes, and the addresses of the dead in it (PyTorch issue
    135712); its count of restarts is not the same on all nodes. So process 0 answers with a name to
    what each one says by itself, until it has heard that the answer came. Raises TimeoutError there where
    one does not come.
    """
    if proc != 0:
        hello = uuid.uuid4().hex
        store.set(f"hello/{proc}", hello)
        name: str = store.get(f"answer/{hello}").decode()
        store.set(f"heard/{name}/{proc}", "")
        return name
    name = uuid.uuid4().hex
    expected = list(range(1, n_procs))
    until = time.monotonic() + timeout_s
    while expected:
        if time.monotonic() > until:
            raise TimeoutError(f"processes {expected} did not start within {timeout_s:g} s")
        for other in expected:
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", name)
        expected = [other for other in expected if not store.check([f"heard/{name}/{other}"])]
        time.sleep(0.02)
    return name
