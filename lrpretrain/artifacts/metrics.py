"""Metrics: the console line, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from contextlib import suppress
from typing import Any, Protocol

import torch

from lrpretrain.artifacts.rundir import RunDir

# Dense bfloat16 peak of the tensor cores in FLOP/s, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12}


class Timed(Protocol):
    """What took a time that is known later."""

    def ms(self) -> float:
        """Return milliseconds."""


class Metrics:
    """Writes what a step measured; only the first process has one.

    Without `flops_per_token`, which a classifier does not tell, there is no MFU and no perplexity.
    """

    def __init__(
        self, run_dir: RunDir, start_step: int, total_steps: int, flops_per_token: float | None, n_procs: int
    ):
        self._file = open(run_dir.metrics, "a", buffering=1)  # noqa: SIM115 - lives as long as the run
        self._folder = str(run_dir.tensorboard)
        self._board: Any = self._open_board(start_step + bool(start_step))
        self._steps = total_steps
        self._peak = peak_flops() * n_procs
        self._flops_per_token = flops_per_token
        self._since = time.perf_counter()
        self._step = start_step
        self._tokens, self._wait_ms, self._updates = 0, 0.0, list[Timed]()

    def count(self, tokens: int, wait_ms: float, update: Timed) -> None:
        """Count a step: its tokens, the time that it waited for data and that of its update."""
        self._tokens += tokens
        self._wait_ms += wait_ms
        self._updates.append(update)

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training: evaluation and saving."""
        self._since += seconds

    def log(self, step: int, tokens: int, values: dict[str, float], text: str | None = None) -> None:
        """Write what was measured at a step, trained (`train/…`), evaluated (`valid/…`) or both.

        Adds throughput since the last call, and memory. `text` is a sample of the model's writing.
        """
        if "train/loss" in values:
            values |= self._throughput(step)
        values = {"step": step, "tokens": tokens, **values, "mem/peak_gib": peak_gib()}
        try:
            self._write(values, text)
        except OSError as error:
            self._board = None  # a writer that failed once fails for ever
            say(f"metrics of step {step} cannot be written: {error}. Make room for the run folder.")
        say(console_line(values, self._steps, self._flops_per_token is not None))
        if text is not None:
            say(f"step {step:06d}/{self._steps:06d} | sample: {text}")
        self._since, self._step = time.perf_counter(), step
        self._tokens, self._wait_ms, self._updates = 0, 0.0, list[Timed]()

    def _write(self, values: dict[str, float], text: str | None) -> None:
        known = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(known) + "\n")  # what a full disk refuses stays in its buffer
        self._board = self._board or self._open_board(None)
        step = int(values["step"])
        for tag, value in values.items():
            if "/" in tag:
                self._board.add_scalar(tag, value, step)
        if text is not None:
            self._board.add_text("valid/sample", text, step)
        if "valid/loss" in values:
            self._board.flush()

    def _open_board(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, purge_step=purge_step)

    def _throughput(self, step: int) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rate = self._tokens / elapsed
        steps = max(step - self._step, 1)
        values = {
            "perf/tokens_per_s": rate,
            "perf/step_ms": elapsed / steps * 1e3,
            "perf/data_wait_ms": self._wait_ms / steps,
            "perf/optim_ms": sum(update.ms() for update in self._updates) / steps,
        }
        if self._peak and self._flops_per_token is not None:
            values["perf/mfu"] = rate * self._flops_per_token / self._peak
        return values

    def close(self) -> None:
        """Flush and close the files."""
        for file in filter(None, (self._file, self._board)):
            with suppress(OSError):
                file.close()


def console_line(values: dict[str, float], steps: int, language: bool = True) -> str:
    """Return the line of one step; only that of a `language` model has a perplexity in training."""
    step = int(values["step"])
    parts = [f"step {step:06d}/{steps:06d}"]
    if "train/loss" in values:
        parts += [
            f"loss {values['train/loss']:.4f}",
            *([f"ppl {perplexity(values['train/loss']):.1f}"] if language else []),
            f"lr {values['train/lr']:.1e}",
            f"gnorm {values['train/grad_norm']:.2f}",
            f"{values['perf/tokens_per_s'] / 1e3:.1f}k tok/s",
        ]
    if "perf/mfu" in values:
        parts.append(f"mfu {values['perf/mfu']:.1%}")
    parts.append(f"mem {values['mem/peak_gib']:.1f} GiB")
    if "subspace/refreshes" in values:
        parts.append(f"refresh {values['subspace/refreshes']:.0f}/{values['subspace/matrices']:.0f}")
    if "train/loss" in values:
        seconds = values["perf/step_ms"] / 1e3 * (steps - step)
        parts.append(f"eta {int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}")
    measured = {tag.removeprefix("valid/"): v for tag, v in values.items() if tag.startswith("valid/")}
    measured.pop("targets", None)
    parts += [f"valid {name} {value:.{1 if name == 'ppl' else 4}f}" for name, value in measured.items()]
    return " | ".join(parts)


def summary(run_dir: RunDir) -> str:
    """Return what there is to say about a run at its end: perplexities, and where to look."""
    entries = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    evaluated = [e for e in entries if "valid/ppl" in e]
    lines = []
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        lines.append(
            f"validation perplexity: {first['valid/ppl']:.1f} at step {first['step']},"
            f" {last['valid/ppl']:.1f} at step {last['step']}"
        )
    lines += [f"run folder: {run_dir.path}", f"curves: tensorboard --logdir {run_dir.tensorboard}"]
    return "\n".join(lines)


def say(line: str) -> None:
    """Print a line for the person who watches; only the first process says anything, in any thread."""
    with suppress(OSError):  # into a file on a full disk
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def peak_flops() -> float:
    """Return the peak FLOP/s of this GPU in bfloat16, or 0 where it is not known: no MFU is claimed then."""
    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next(
        (flops for key, flops in PEAK_FLOPS.items() if all(part in name for part in key.split())), 0.0
    )


def peak_gib() -> float:
    """Return the peak memory of this process: of the GPU, or else resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
