"""The processes of a run and the small messages that they exchange on the CPU.

Everything here is control traffic (a few integers or rows of tokens a step). Gradients and
weights go through the engine and the algebra.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from lrpretrain.errors import Stopped

Ints = npt.NDArray[np.int64]


class Procs:
    """This process among the processes of the run.

    Every method is a collective: all processes must call it, in the same order. With one
    process nothing is communicated. The process group (the default one without ``group``) must serve
    CPU tensors (``init_process_group("cpu:gloo,cuda:nccl")``).
    """

    def __init__(self, proc: int = 0, n_procs: int = 1, group: dist.ProcessGroup | None = None):
        self.proc = proc
        self.n_procs = n_procs
        self.group = group

    @classmethod
    def of_default_group(cls) -> Procs:
        """Return the processes of torch's default group, or the single process without one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def apart(self, timeout_s: float) -> Procs:
        """Return the same processes with a group of their own, whose messages another thread may exchange."""
        timeout = timedelta(seconds=timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout) if self.n_procs > 1 else None
        return Procs(self.proc, self.n_procs, group)

    @property
    def is_first(self) -> bool:
        return self.proc == 0

    def sum(self, values: npt.ArrayLike) -> Ints:
        """Add up a vector of integers over the processes."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: npt.ArrayLike) -> Ints:
        """Return the largest of each entry of a vector of integers over the processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def agree(self, flag: int) -> None:
        """Raise Stopped on all processes, with the largest flag, where one of them passes any but 0."""
        if largest := int(self.max([flag])[0]):
            raise Stopped(largest)

    def gather(self, thing: Any) -> list[Any]:
        """Return what each process passed, in the order of the processes, on all of them."""
        if self.n_procs == 1:
            return [thing]
        things: list[Any] = [None] * self.n_procs
        dist.all_gather_object(things, thing, self.group)
        return things

    def swap(self, rows: dict[int, Ints], width: int) -> Ints:
        """Send rows of integers to other processes and return those that came, (k, width).

        ``rows[p]`` (j, width) goes to process p; what arrives is ordered by sender. All
        processes must know from elsewhere how many rows to expect.
        """
        if self.n_procs == 1:
            return np.concatenate([*rows.values(), np.empty((0, width), np.int64)])
        sent = [
            np.ascontiguousarray(rows.get(p, np.empty((0, width), np.int64))) for p in range(self.n_procs)
        ]
        counts = self.gather([len(part) for part in sent])
        arriving = [torch.empty(counts[p][self.proc], width, dtype=torch.int64) for p in range(self.n_procs)]
        flat = torch.empty(sum(len(part) for part in arriving) * width, dtype=torch.int64)
        dist.all_to_all_single(
            flat,
            torch.from_numpy(np.concatenate(sent).reshape(-1)),
            [part.numel() for part in arriving],
            [part.size for part in sent],
            group=self.group,
        )
        return flat.view(-1, width).numpy()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.n_procs > 1:
            dist.all_reduce(torch.zeros(1), group=self.group)

    def _reduce(self, values: npt.ArrayLike, op: Any) -> Ints:
        vector = np.array(values, dtype=np.int64)
        if self.n_procs > 1:
            tensor = torch.from_numpy(vector)
            dist.all_reduce(tensor, op, self.group)
        return vector
