"""How fast does it train here, and in how much memory? Rules, compiling and checkpointing against each other.

`lrpretrain bench train` starts each variant in processes of its own, so that its peak memory is its own; they
run `main`, and the first one prints what was measured.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import profile

from lrpretrain.artifacts.metrics import peak_flops, peak_gib
from lrpretrain.config import Config, parse
from lrpretrain.doctor import launch
from lrpretrain.engine import Engine, build_engine
from lrpretrain.engine.device import env_procs, join, pick_device
from lrpretrain.errors import UnsoundError
from lrpretrain.sharding.procs import Procs
from lrpretrain.train import plan

# Without --config: the 1B model of the papers, 64 sequences of 256 tokens a step for each process.
BASE = ["--model.config=llama_1b", "--engine.kind=fsdp", "--precision.compute=bfloat16", "--optim.rank=512"]
SEQUENCES = 64
PERIOD = 4  # steps, of which one refreshes all bases (loro: is exact)
LR_RATIO = 1e-3  # so that the weights stay finite: nothing is learnt from random tokens


class Variant(NamedTuple):
    """What is varied."""

    rule: str
    compile: str
    checkpointing: str

    def of(self, config: Config) -> Config:
        """Return the configuration with this variant's choices, and a refresh in every period."""
        varied = copy.deepcopy(config)
        optim = varied.optim
        optim.rule, varied.model.checkpointing = self.rule, self.checkpointing  # type: ignore[assignment]
        varied.engine.compile = self.compile == "on"
        optim.refresh, optim.refresh_every, optim.exact_every = "fixed", PERIOD, PERIOD
        return varied


COLUMNS = [*Variant._fields, "tokens/s", "MFU", "peak GiB", "step ms", "refresh step ms", "slowest operators"]


def variants(rules: Sequence[str], compile: Sequence[str], checkpointing: Sequence[str]) -> list[Variant]:
    """Return all combinations of the choices."""
    return [Variant(*choice) for choice in itertools.product(rules, compile, checkpointing)]


def compare(
    config: Config, chosen: Sequence[Variant], n_procs: int, steps: int, patience_s: float
) -> Iterator[tuple[str, str | None]]:
    """Yield the lines of a Markdown table, each with what went wrong, and then what they were measured on.

    A variant that does not fit into memory is a line that says so; it went wrong only for another reason.
    """
    yield _line(COLUMNS), None
    yield _line(["---"] * len(COLUMNS)), None
    where = "nothing was measured"
    for variant in chosen:
        answer = launch("lrpretrain.bench", variant.of(config), n_procs, patience_s, str(steps))
        if "error" not in answer:
            yield row(variant, config, n_procs, answer), None
            where = f"{n_procs} × {answer['device']}, torch {torch.__version__}"
        elif "OutOfMemoryError" in answer["error"]:
            yield _line([*variant, "out of memory"]), None
        else:
            yield _line([*variant, "failed"]), f"{' '.join(variant)}: {answer['error']}"
    train, precision = config.train, config.precision
    batch = (
        f"{train.global_batch} × {config.data.seq_len} random tokens a step, micro-batch {train.micro_batch}"
    )
    floats = f"{precision.compute} over {precision.params}"
    yield f"\n{config.model.config}, {config.engine.kind}, {floats}; {batch}; {where}.", None


def row(variant: Variant, config: Config, n_procs: int, found: dict[str, Any]) -> str:
    """Return the line of what was measured; tokens/s and MFU count refreshes as often as `config` says."""
    ordinary, refresh = found["ordinary_ms"], found["refresh_ms"]
    every = config.optim.exact_every if variant.rule == "loro" else config.optim.refresh_every
    ms = ordinary if not refresh or not every else ordinary + (refresh - ordinary) / every
    rate = config.train.global_batch * config.data.seq_len / ms * 1e3
    peak = found["peak_flops"] * n_procs
    mfu = f"{rate * plan.flops_per_token(variant.of(config)) / peak:.1%}" if peak else "–"
    slowest = ", ".join(f"{name} {share:.0%}" for name, share in found["slowest"])
    took = [f"{ordinary:,.1f}", f"{refresh:,.1f}" if refresh else "–"]
    return _line([*variant, f"{rate:,.0f}", mfu, f"{found['peak_gib']:.2f}", *took, slowest])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join([*cells, *[''] * (len(COLUMNS) - len(cells))])} |"


def main(file: str, steps: int) -> int:
    """Measure a configuration in the processes that torchrun started; print what was found."""
    try:
        config, _ = parse(["--config", file])
        device = pick_device()
        procs = join(device, config.engine.timeout_s)
        found = measure(config, procs, device, steps)
    except Exception as error:  # whatever it is, it is the finding
        print(json.dumps({"error": f"process {env_procs()[0]}: {type(error).__name__}: {error}"}), flush=True)
        return 1
    if procs.is_first:
        print(json.dumps(found), flush=True)
    procs.barrier()
    return 0


def measure(config: Config, procs: Procs, device: torch.device, steps: int) -> dict[str, Any]:
    """Train on one batch of random tokens: a period to warm up, then at least `steps` steps in whole periods.

    Returns the medians in milliseconds of ordinary steps and of those that refresh (None without any), the
    peak memory in GiB of the process that needs most, and the two slowest operators of an ordinary step.
    """
    torch.manual_seed(config.train.seed)
    engine = build_engine(config, procs, device, pad_id=-1)
    ordinary: list[float] = []
    refreshing: list[float] = []
    for i in range(PERIOD + math.ceil(steps / PERIOD) * PERIOD):
        ms, refreshed = _step(engine, config)
        if i >= PERIOD:
            (refreshing if refreshed else ordinary).append(ms)
    peak = max(procs.gather(peak_gib()))
    _step(engine, config)  # the first of a period, in which most rules refresh
    with profile() as profiler:
        _step(engine, config)
    engine.close()
    return {
        "ordinary_ms": statistics.median(ordinary),
        "refresh_ms": statistics.median(refreshing) if refreshing else None,
        "peak_gib": peak,
        "peak_flops": peak_flops(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "slowest": slowest(
            profiler, "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        ),
    }


def _step(engine: Engine, config: Config) -> tuple[float, bool]:
    """Do a step; return its milliseconds in the slowest process, and whether it refreshed anything."""
    train, length, procs = config.train, config.data.seq_len, engine.procs
    random = torch.Generator().manual_seed(train.seed + procs.proc)
    rows = train.global_batch // procs.n_procs
    ids = torch.randint(engine.model.config.vocab_size, (rows, length), generator=random)
    targets = train.global_batch * (length - 1)
    procs.barrier()
    began = time.perf_counter_ns()
    step = engine.train_step(ids.split(train.micro_batch), targets, train.clip_norm, LR_RATIO)
    sound = step.sound  # known once the device has done the step
    took = int(procs.max([time.perf_counter_ns() - began])[0])
    if not sound:
        raise UnsoundError("a gradient is not finite: the step did not update, and its time says nothing.")
    return took / 1e6, bool(engine.optimizer.pop_metrics(procs))


def slowest(profiler: profile, time: str) -> list[tuple[str, float]]:
    """Return the two operators that take most of the recorded time by themselves, and their shares of it."""
    events = [
        e for e in profiler.key_averages() if e.device_type == DeviceType.CPU
    ]  # else kernels count twice
    own = {e.key: getattr(e, time) for e in events if not e.is_user_annotation}
    largest = sorted(own, key=lambda name: own[name], reverse=True)[:2]
    return [(name, own[name] / sum(own.values())) for name in largest]


if __name__ == "__main__":
    exit_code = main(sys.argv[1], int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(exit_code)  # as lrpretrain/pretrain.py does, and for the same reason
