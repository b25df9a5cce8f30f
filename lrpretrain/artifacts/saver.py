"""Saving beside the training: it waits for a copy of its state, and a thread writes the files."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrpretrain.artifacts import checkpoint
from lrpretrain.artifacts.metrics import say
from lrpretrain.errors import CheckpointError
from lrpretrain.sharding import Piece, Tile
from lrpretrain.sharding.procs import Procs


@dataclass
class Saver:
    """Writes the checkpoints of a run, one at a time. All processes have one and call its methods together.

    A save that fails leaves the checkpoints that there are, is reported, and does not stop the training,
    unless it is the last one. What a process copies is what it writes: of tiles that several hold, one
    process copies each.
    """

    folder: Path
    procs: Procs
    timeout_s: float
    """How long processes wait for each other."""
    keep: int
    """How many of the newest checkpoints stay. 0: all."""
    keep_every: int
    """Checkpoints at multiples of it stay. 0: none."""
    beside: bool
    """False: the training waits for the files."""
    saved: int = 0
    """Step of the newest checkpoint."""
    took_s: float = 0.0
    """What the last save that succeeded took, all in all."""
    failures: int = 0
    error: CheckpointError | None = field(default=None, init=False)
    """Why the last save failed."""

    def __post_init__(self) -> None:
        self._procs = self.procs.apart(self.timeout_s) if self.beside else self.procs
        self._staged: dict[str, Piece] = {}
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None
        self._stall_s = 0.0

    def save(self, pieces: Mapping[str, Piece], run: Mapping[str, Any], *, last: bool = False) -> None:
        """Write a checkpoint of `pieces` as they are now; the `last` one of a process is written on return.

        `run` must not change afterwards. Raises CheckpointError if the last one cannot be written.
        """
        began = time.perf_counter()
        self.wait()
        if self.beside and not last:
            self._stage(pieces)
            self._thread = threading.Thread(target=self._write, args=(self._staged, run), daemon=True)
            self._thread.start()
        else:
            self._write(pieces, run)
            self.wait()
            self.procs.barrier()  # nobody leaves while the first process removes older ones
        self._stall_s += time.perf_counter() - began
        if last and self.error is not None:
            raise self.error

    def wait(self) -> None:
        """Wait until no save is in flight. Raises what broke it but no disk did: a process is gone."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._broken is not None:
            raise self._broken

    def pop_metrics(self) -> dict[str, float]:
        """Return for how long the training waited since the last call, and how many saves failed so far."""
        stall_s, self._stall_s = self._stall_s, 0.0
        values = {"perf/save_stall_ms": stall_s * 1e3} if stall_s else {}
        return values | ({"save/failures": self.failures} if self.failures else {})

    def _write(self, pieces: Mapping[str, Piece], run: Mapping[str, Any]) -> None:
        began, self.error = time.perf_counter(), None
        try:
            path = checkpoint.save(self.folder, pieces, run, self._procs)
            self.saved, self.took_s = run["step"], time.perf_counter() - began
            line = f"saved {path} in {self.took_s:.1f} s"
        except CheckpointError as error:
            self.error, self.failures = error, self.failures + 1
            line = f"no checkpoint of step {run['step']}: {error} The last one is of step {self.saved}."
        except BaseException as error:
            self._broken = error
            return
        if self.procs.is_first:
            say(line)
            if self.error is None:
                self._prune(path)

    def _prune(self, path: Path) -> None:
        try:
            checkpoint.prune(path, self.keep, self.keep_every)
        except OSError as error:
            say(f"older checkpoints cannot be removed: {error}. Remove them by hand.")

    def _stage(self, pieces: Mapping[str, Piece]) -> None:
        """Copy this process's share to host memory, where it stays until it is written."""
        if not self._staged:
            share = _share(pieces, self.procs)
            self._staged = {name: _empty_like(piece, share[name]) for name, piece in pieces.items()}
        for name, piece in pieces.items():
            parts = dict(piece.parts)
            for tile, buffer in self._staged[name].parts:
                buffer.copy_(parts[tile], non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _share(pieces: Mapping[str, Piece], procs: Procs) -> dict[str, list[Tile]]:
    """Return the tiles that this process writes: of those that hold a tile, the one that has least so far."""
    own: dict[str, list[Tile]] = {name: [] for name in pieces}
    held = procs.gather({name: [t for t in piece.tiles if t.numel] for name, piece in pieces.items()})
    loads = [0] * procs.n_procs
    for name in sorted(pieces):
        holders: dict[Tile, list[int]] = {}
        for proc, tiles in enumerate(held):
            for tile in dict.fromkeys(tiles[name]):
                holders.setdefault(tile, []).append(proc)
        for tile, among in holders.items():
            writer = min(among, key=loads.__getitem__)
            loads[writer] += tile.numel
            if writer == procs.proc:
                own[name].append(tile)
    return own


def _empty_like(piece: Piece, tiles: list[Tile]) -> Piece:
    """Return some tiles of a piece in host memory; the GPU's own can copy to it."""
    size = sum(tile.numel for tile in tiles)
    buffer = torch.empty(size, dtype=piece.tensor.dtype, pin_memory=piece.tensor.is_cuda)
    return Piece(buffer, piece.shape, tuple(tiles))
