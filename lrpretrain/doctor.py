"""Is this node fit to train? Versions, GPUs, disk, hub, and a few steps in all processes against one.

`lrpretrain doctor` starts the processes by torchrun; they run `main`, and the first one prints the result.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lrpretrain.config import Config, parse, to_yaml
from lrpretrain.engine import build_engine
from lrpretrain.engine.device import env_procs, join, pick_device, unusable_gpu
from lrpretrain.errors import ConfigError
from lrpretrain.model import llama
from lrpretrain.optim import groups
from lrpretrain.sharding.procs import Procs
from lrpretrain.train import plan

STEPS = 4
SEQ_LEN = 32
MESSAGE_MIB = 64
HUB_TIMEOUT_S = 5.0
# Largest relative difference of a loss or a gradient norm between one process and many. Measured with two:
# rounding 3e-6 and 7e-3; updates left out or doubled, another seed or no clipping from 0.1 on.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


class Check(NamedTuple):
    """What a look at one thing showed; `state` is ok, warning or failed."""

    name: str
    state: str
    found: str

    def __str__(self) -> str:
        return f"{self.name:<20}{self.state:<9}{self.found}"


def examine(config: Config, n_procs: int, patience_s: float) -> Iterator[Check]:
    """Yield the checks of this node, one by one, for a configuration that has no problems."""
    yield from _versions()
    yield _gpus(n_procs)
    yield _disk(config)
    yield _hub(config)
    yield from _training(config, n_procs, patience_s)


def _versions() -> Iterator[Check]:
    """Yield the versions that matter most, and whatever does not fit the project's requirements."""
    from packaging.requirements import Requirement

    yield Check("python", "ok", platform.python_version())
    for wanted in map(Requirement, metadata.requires("lrpretrain") or []):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield Check(wanted.name, "failed", f"is not installed; {wanted} is needed")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            yield Check(wanted.name, "warning", f"{version} is installed; the tests ran with {wanted}")
        elif wanted.name == "torch":
            cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
            yield Check("torch", "ok", f"{torch.__version__}, built {cuda}")
        elif wanted.name in ("deepspeed", "transformers"):
            yield Check(wanted.name, "ok", version)


def _gpus(n_procs: int) -> Check:
    if not torch.cuda.is_available():
        unusable = unusable_gpu()
        return Check("GPUs", "failed" if unusable else "warning", unusable or "none: training on the CPU")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    each = [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus]
    if len(gpus) < n_procs:
        return Check("GPUs", "failed", f"{len(gpus)} for {n_procs} processes: {', '.join(each)}")
    if len({gpu.name for gpu in gpus}) > 1:
        return Check("GPUs", "warning", f"they differ, and the slowest sets the pace: {', '.join(each)}")
    return Check("GPUs", "ok", f"{len(gpus)} × {each[0]}")


def _disk(config: Config) -> Check:
    """Look whether run.dir can be written to and has room for the checkpoints that are kept, and one more."""
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("disk", "failed", f"{folder} cannot be written to: {error.strerror}")
    model = llama.configured(config, getattr(torch, config.precision.params))
    optimizer = groups.build_optimizer(model.named_parameters(), config.optim, model.config.hidden_size)
    tensors = [*model.parameters(), *(piece.tensor for _, _, piece in optimizer.pieces())]
    each = sum(t.numel() * t.element_size() for t in tensors) / 2**30
    free, kept = shutil.disk_usage(folder).free / 2**30, config.train.keep_checkpoints + 1
    found = f"{free:,.1f} GiB free in {folder}; {kept} checkpoints of {each:,.1f} GiB"
    return Check("disk", "ok" if free > kept * each else "failed", found)


def _hub(config: Config) -> Check:
    """Look whether the hub answers. Only data.source=hub needs it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Check("hub", "ok", "is not asked: HF_HUB_OFFLINE is set")
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except (OSError, ValueError) as error:
        state = "failed" if config.data.source == "hub" else "warning"
        return Check("hub", state, f"{constants.ENDPOINT} cannot be reached: {error}")
    return Check("hub", "ok", f"{constants.ENDPOINT} answers")


def _training(config: Config, n_procs: int, patience_s: float) -> Iterator[Check]:
    """Train a small model in all processes and in one, and compare; measure how fast they communicate."""
    small = shrink(config)
    name = f"{config.optim.rule}, {config.engine.kind}"
    if problems := plan.problems(small, n_procs):
        yield Check(name, "warning", f"a small model cannot be trained like that: {ConfigError(problems)}")
        return
    answer = launch("lrpretrain.doctor", small, n_procs, patience_s)
    if "error" in answer:
        yield Check(name, "failed", answer["error"])
        return
    if n_procs > 1:
        right, seconds = answer["all_reduce"]
        rate = 2 * (n_procs - 1) / n_procs * MESSAGE_MIB * 2**20 / seconds / 1e9
        took = f"{MESSAGE_MIB} MiB over {answer['backend']} in {seconds * 1e3:.1f} ms"
        took += f", {rate:.1f} GB/s of bus bandwidth"
        yield Check("all-reduce", "ok", took) if right else Check("all-reduce", "failed", "a sum is wrong")
    yield compare(config, n_procs, answer["one"], answer["all"])


def shrink(config: Config) -> Config:
    """Return a configuration of the same rule, engine, precision and batch for a model of 1.8M parameters."""
    small = copy.deepcopy(config)
    small.model.config, small.model.init_from, small.data.seq_len = "llama_toy", None, SEQ_LEN
    optim = small.optim
    optim.lr, optim.lr_regular = 0.01, None  # so that every step shows
    optim.rank, optim.attn_rank, optim.mlp_rank = min(optim.rank, 16), None, None
    optim.refresh_every, optim.exact_every = 2, min(optim.exact_every, 2)  # so that one is among the steps
    return small


def compare(config: Config, n_procs: int, one: list[list[float]], many: list[list[float]]) -> Check:
    """Compare [loss, gradient norm] of each step in one process and in many."""
    name = f"{config.optim.rule}, {config.engine.kind}"
    if config.engine.kind == "local":
        return Check(name, "warning", "nothing to compare: name the engine, as in --engine.kind fsdp")
    far = torch.tensor(many).sub(torch.tensor(one)).div(torch.tensor(one)).abs().max().item()
    limit = TOLERANCE[config.precision.compute]
    where = f"{n_procs} processes" if n_procs > 1 else "one process"
    found = f"{STEPS} steps in {where} are {far:.1e} from plain ones in one (limit {limit:.0e})"
    return Check(name, "ok" if far <= limit else "failed", found)


def launch(module: str, config: Config, n_procs: int, patience_s: float, *arguments: str) -> dict[str, Any]:
    """Run a module on a configuration's file, and arguments, in processes of their own.

    Returns what one of them printed as JSON, or {"error": what went wrong}.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(to_yaml(config))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(n_procs), "-m", module, str(file), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = process.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            process.communicate()
            return {"error": f"the processes were not done after {patience_s:.0f} s"}
    answers = [line for line in output.splitlines() if line.startswith('{"')]
    if not answers:
        return {"error": f"the processes ended with code {process.returncode}:\n{output}"}
    answer: dict[str, Any] = json.loads(answers[0])
    return answer


def main(file: str) -> int:
    """Train by a configuration in one process, then in all that torchrun started; print the result."""
    try:
        config, _ = parse(["--config", file])
        device = pick_device()
        one = _alone(config, device) if env_procs()[0] == 0 else []
        procs = join(device, config.engine.timeout_s)
        reduced = _all_reduce(procs, device)
        together = train(config, procs, device)
    except Exception as error:  # whatever it is, it is the finding
        print(json.dumps({"error": f"process {env_procs()[0]}: {type(error).__name__}: {error}"}), flush=True)
        return 1
    if procs.is_first:
        backend = "nccl" if device.type == "cuda" else "gloo"
        print(
            json.dumps({"one": one, "all": together, "all_reduce": reduced, "backend": backend}), flush=True
        )
    procs.barrier()
    return 0


def _alone(config: Config, device: torch.device) -> list[list[float]]:
    """Train in this process alone, in the plainest way that its precision allows."""
    plain = copy.deepcopy(config)
    mixed = config.precision.compute != config.precision.params
    plain.engine = type(plain.engine)(kind="fsdp" if mixed else "local")
    rank = os.environ.pop("RANK")
    procs = join(device, config.engine.timeout_s)
    steps = train(plain, procs, device)
    dist.destroy_process_group()
    os.environ["RANK"] = rank
    return steps


def train(config: Config, procs: Procs, device: torch.device) -> list[list[float]]:
    """Return [loss, gradient norm] of a few steps on one batch of random ids, which is learnt by heart."""
    torch.manual_seed(config.train.seed)
    engine = build_engine(config, procs, device, pad_id=0)
    rows, vocabulary = config.train.global_batch, engine.model.config.vocab_size
    random = torch.Generator().manual_seed(config.train.seed)
    ids = torch.randint(1, vocabulary, (rows, SEQ_LEN), generator=random)
    micros = ids[procs.proc :: procs.n_procs].split(config.train.micro_batch)
    targets = rows * (SEQ_LEN - 1)
    found = []
    for _ in range(STEPS):
        step = engine.train_step(micros, targets, config.train.clip_norm, 1.0)
        found.append([float(engine.total(step.loss_sum)) / targets, step.grad_norm])
    engine.close()
    return found


def _all_reduce(procs: Procs, device: torch.device) -> tuple[bool, float]:
    """Return whether all-reducing a message gives the right sum, and the seconds that it takes."""
    if procs.n_procs == 1:
        return True, 0.0
    message = torch.empty(MESSAGE_MIB * 2**18, device=device)
    seconds = []
    for _ in range(4):
        message.fill_(procs.proc + 1)
        procs.barrier()
        began = time.perf_counter()
        dist.all_reduce(message)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    right = bool((message == procs.n_procs * (procs.n_procs + 1) / 2).all())
    return right, min(seconds)


if __name__ == "__main__":
    exit_code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(exit_code)  # as lrpretrain/pretrain.py does, and for the same reason
