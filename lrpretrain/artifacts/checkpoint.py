"""Checkpoints: tiles under their parameters' names, which any layout can read back.

A checkpoint is a folder `step_XXXXXXXX` with

    tensors/        PyTorch DCP: weights and optimizer state, each process writes the tiles that it holds
    run.json        step, tokens, data position, random state, configuration
    manifest.json   format, step, shapes, size and sha256 of every file; written last

A folder without a manifest is incomplete and is skipped. No pickled objects of ours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lrpretrain.artifacts.rundir import write_atomically
from lrpretrain.errors import CheckpointError
from lrpretrain.sharding import Piece
from lrpretrain.sharding.procs import Procs

FORMAT = 1
logger = logging.getLogger(__name__)


def save(folder: Path, pieces: Mapping[str, Piece], run: Mapping[str, Any], procs: Procs) -> Path:
    """Write a checkpoint and return its folder. All processes must call it; `run` is taken from the first.

    Raises CheckpointError on all processes if one of them cannot write; older checkpoints stay as they are.
    """
    path = folder / f"step_{run['step']:08d}"
    error: str | None = None
    if procs.is_first:
        error = _attempt(lambda: _empty(path))
    _raise_together(error, procs, f"{path} cannot be written")
    state = {name: _Tiles(piece) for name, piece in pieces.items()}
    error = _attempt(
        lambda: dcp.save(state, checkpoint_id=path / "tensors", no_dist=not dist.is_initialized())
    )
    _raise_together(error, procs, f"{path} cannot be written")
    if procs.is_first:
        error = _attempt(lambda: write_atomically(path / "run.json", json.dumps(run)))
    _raise_together(error, procs, f"{path} cannot be written")
    # Hashing is spread: each process takes every n-th file of the list that the first one made.
    names = procs.gather(sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()))[0]
    own: dict[str, Any] = {}
    share = names[procs.proc :: procs.n_procs]
    error = _attempt(lambda: own.update({name: _identity(path / name) for name in share}))
    _raise_together(error, procs, f"{path} cannot be read back")
    hashes: dict[str, Any] = {}
    for part in procs.gather(own):
        hashes |= part
    if procs.is_first:
        shapes = {name: list(piece.shape) for name, piece in pieces.items()}
        manifest = {"format": FORMAT, "step": run["step"], "shapes": shapes, "files": hashes}
        error = _attempt(lambda: write_atomically(path / "manifest.json", json.dumps(manifest)))
    _raise_together(error, procs, f"{path} cannot be written")
    return path


def load(path: Path, pieces: Mapping[str, Piece], procs: Procs) -> None:
    """Read a checkpoint into the tensors of `pieces`. All processes must call it.

    Raises CheckpointError if it is incomplete, damaged, of another model or optimizer, or of a newer format.
    """
    manifest = read_manifest(path)
    saved = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
    ours = {name: piece.shape for name, piece in pieces.items()}
    wrong = [n for n in ours.keys() | saved.keys() if ours.get(n) != saved.get(n)]
    if wrong and ours.keys() <= saved.keys() and all(not n.startswith("model/") for n in wrong):
        wrong = [n for n in wrong if n in ours]  # weights without the optimizer
    if wrong:
        name = min(wrong)
        raise CheckpointError(
            f"{path} is of another model or optimizer ({len(wrong)} tensors differ, such as {name}: "
            f"{saved.get(name, 'absent')} in the checkpoint, {ours.get(name, 'absent')} now). "
            "Use the model and optimizer settings of its run, another run.dir, or run.resume=never."
        )
    error = verify(path, manifest, procs)
    _raise_together(error, procs, f"{path} is damaged")
    state = {name: _Tiles(piece) for name, piece in pieces.items()}
    error = _attempt(
        lambda: dcp.load(state, checkpoint_id=path / "tensors", no_dist=not dist.is_initialized())
    )
    _raise_together(error, procs, f"{path} cannot be read")


def read_run(path: Path) -> dict[str, Any]:
    """Return run.json of a checkpoint: step, tokens, data position, random state, configuration.

    Raises CheckpointError where it cannot be read.
    """
    try:
        run: dict[str, Any] = json.loads((path / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}/run.json cannot be read: {error}. Use another checkpoint.") from error
    return run


def verify(path: Path, manifest: Mapping[str, Any], procs: Procs) -> str | None:
    """Compare this process's share of the files with the manifest; return what is wrong, or None."""
    for name in sorted(manifest["files"])[procs.proc :: procs.n_procs]:
        if not (path / name).is_file():
            return f"{name} is missing"
        if _identity(path / name) != manifest["files"][name]:
            return f"{name} is not as it was written (size or sha256)"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint. Raises CheckpointError where there is none that can be read."""
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError as error:
        remedy = "Name a folder step_XXXXXXXX that holds one"
        raise CheckpointError(
            f"{path} holds no manifest.json: it is no complete checkpoint. {remedy}."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}/manifest.json cannot be read: {error}. Use another checkpoint."
        ) from error
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this version reads {FORMAT}. Use a newer lrpretrain."
        )
    return manifest


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the newest first."""
    return sorted((p.parent for p in folder.glob("step_*/manifest.json")), reverse=True)


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` complete checkpoints; 0 keeps all."""
    for path in complete(folder)[count:] if count else []:
        (path / "manifest.json").unlink()  # first, so that what is left of it counts as incomplete
        shutil.rmtree(path)


class _Tiles(Tensor):
    """A piece as DCP sees it: a tensor of the whole shape, of which this process holds some rectangles."""

    _piece: Piece

    @staticmethod
    def __new__(cls, piece: Piece) -> _Tiles:
        tensor: _Tiles = Tensor._make_wrapper_subclass(cls, piece.shape, dtype=piece.tensor.dtype)  # type: ignore[attr-defined]
        tensor._piece = piece
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} on a tensor that only a checkpoint should touch")

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        data = (
            TensorWriteData(chunk, TensorProperties.create_from_tensor(self._piece.tensor), self.size())
            for chunk in self.__create_chunk_list__()
        )
        return [
            WriteItem(MetadataIndex(fqn, d.chunk.offsets), WriteItemType.SHARD, tensor_data=d) for d in data
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(tile.offsets), torch.Size(tile.sizes))
            for tile in self._piece.tiles
            if 0 not in tile.sizes
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(part for tile, part in self._piece.parts if tile.offsets == tuple(index.offset or ()))


def _attempt(action: Any) -> str | None:
    """Run something that touches the disk; return what went wrong, or None."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            action()
    except (Exception, CheckpointException) as error:  # DCP's own is a BaseException
        logger.debug("checkpoint", exc_info=True)
        causes = list(_causes(error))
        return "; ".join(dict.fromkeys(f"{type(e).__name__}: {e}".splitlines()[0] for e in causes))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield what lies below DCP's collection of the failures of all processes."""
    if isinstance(error, CheckpointException):
        yield from (cause for cause, _ in error.failures.values())
    else:
        yield error


def _raise_together(error: str | None, procs: Procs, what: str) -> None:
    messages = [m for m in procs.gather(error) if m]
    if messages:
        raise CheckpointError(f"{what}: {messages[0]}.")


def _empty(path: Path) -> None:
    if path.exists():
        (path / "manifest.json").unlink(missing_ok=True)  # first, so that what is left counts as incomplete
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _identity(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
