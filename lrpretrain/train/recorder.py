"""What torch.profiler sees of a few steps: chrome traces in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def recorder(folder: Path, wait: int, steps: int) -> Iterator[Callable[[int], None]]:
    """Record `steps` steps after the first `wait`; yield what to call after every step, with its number.

    The trace, for Perfetto or chrome://tracing, is step_XXXXXXXX.json.gz, named after its last step. It holds
    fewer steps if training ends before. The step before the recorded ones warms the profiler up.
    """
    if steps == 0:
        yield lambda step: None
        return
    from torch.profiler import profile, schedule

    done = 0

    def write(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"step_{done:08d}.json.gz"))

    def record(step: int) -> None:
        nonlocal done
        done = step
        profiler.step()

    warmup = min(wait, 1)
    phases = schedule(wait=wait - warmup, warmup=warmup, active=steps, repeat=1)
    with profile(schedule=phases, on_trace_ready=write) as profiler:
        yield record
