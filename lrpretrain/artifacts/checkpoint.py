"""Checkpoints: tiles under their parameters' names, which any layout can read back.

A checkpoint is a folder `step_XXXXXXXX` with

    tensors/        PyTorch DCP: weights and optimizer state, each process writes the tiles that it holds;
                    index.json says where each tile lies (DCP's own metadata would be a pickle)
    run.json        step, tokens, data position, random state, configuration
    manifest.json   format, step, size and sha256 of every file; written last

A folder without a manifest is incomplete and is skipped. Reading one runs no code of it: JSON, and tensors
under `weights_only`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lrpretrain.artifacts.rundir import write_atomically
from lrpretrain.errors import CheckpointError, DamageError
from lrpretrain.sharding import Piece
from lrpretrain.sharding.procs import Procs

FORMAT = 2  # 1 had a pickle of DCP's for index.json
INDEX = "tensors/index.json"
T = TypeVar("T")
logger = logging.getLogger(__name__)
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # what DCP says of one process


def save(folder: Path, pieces: Mapping[str, Piece], run: Mapping[str, Any], procs: Procs) -> Path:
    """Write a checkpoint and return its folder. All processes must call it; `run` is taken from the first.

    Raises CheckpointError on all processes if one of them cannot write. Older checkpoints then stay as they
    are, one of the same step too, and nothing is left of the new one.
    """
    path = folder / f"step_{run['step']:08d}"
    aside = path.with_suffix(".old")
    try:
        _write(path, aside, pieces, run, procs)
    except CheckpointError:
        if procs.is_first and not (path / "manifest.json").exists():  # the older one, still in its place
            with suppress(OSError):
                _remove(path)
                aside.rename(path)
        raise
    if procs.is_first:
        with suppress(OSError):
            _remove(aside)
    return path


def _write(
    path: Path, aside: Path, pieces: Mapping[str, Piece], run: Mapping[str, Any], procs: Procs
) -> None:
    what = f"{path} cannot be written"
    remedy = "Make room there, or see that it can be written to"

    def prepare() -> None:
        if (path / "manifest.json").exists():
            _remove(aside)
            path.rename(aside)
        _remove(path)
        path.mkdir(parents=True)

    def write_tensors() -> None:
        state = {name: _Tiles(piece) for name, piece in pieces.items()}
        alone = procs.n_procs == 1
        dcp.save(state, storage_writer=_Writer(path / "tensors"), process_group=procs.group, no_dist=alone)

    def hash_own() -> dict[str, Any]:
        names = [f"tensors/{p.name}" for p in (path / "tensors").glob(f"__{procs.proc}_*")]
        if procs.is_first:
            write_atomically(path / "run.json", json.dumps(run))
            names += ["run.json", INDEX]
        return {name: _identity(path / name) for name in names}

    def write_manifest(files: dict[str, Any]) -> None:
        manifest = {"format": FORMAT, "step": run["step"], "files": files}
        write_atomically(path / "manifest.json", json.dumps(manifest))

    _together(lambda: prepare() if procs.is_first else None, procs, what, remedy)
    _together(write_tensors, procs, what, remedy)
    files = {name: file for part in _together(hash_own, procs, what, remedy) for name, file in part.items()}
    _together(lambda: write_manifest(files) if procs.is_first else None, procs, what, remedy)


def load(path: Path, pieces: Mapping[str, Piece], procs: Procs, *, checked: bool = False) -> None:
    """Read a checkpoint into the tensors of `pieces`. All processes must call it.

    Raises CheckpointError if it is incomplete, of another model or optimizer, or of another format, and
    DamageError unless its files are as they were written, or `checked` before.
    """
    if not checked:
        try:
            check(path, procs)
        except DamageError as error:
            raise DamageError(f"{error} Use another checkpoint.") from error
    index = read_index(path)
    saved = {name: tuple(entry["shape"]) for name, entry in index.items()}
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
    state = {name: _Tiles(piece) for name, piece in pieces.items()}
    reader, alone = _Reader(path / "tensors", index), procs.n_procs == 1
    _together(
        lambda: dcp.load(state, storage_reader=reader, process_group=procs.group, no_dist=alone),
        procs,
        f"{path} cannot be read",
        "Use another checkpoint",
    )


def find_intact(paths: Sequence[Path], procs: Procs) -> tuple[Path | None, list[str]]:
    """Return the first of some checkpoints whose files are as they were written, and what is wrong with
    those before it. All processes must call it.

    Raises CheckpointError for one of another format, which is no damage to go back from, and if all of
    them are damaged.
    """
    wrong: list[str] = []
    for path in paths:
        try:
            check(path, procs)
        except DamageError as error:
            wrong.append(str(error))
        else:
            return path, wrong
    if wrong:
        remedy = "No intact checkpoint is left: bring back a copy of one, or start anew in another run.dir."
        raise DamageError("\n".join([*wrong, remedy]))
    return None, []


def check(path: Path, procs: Procs) -> None:
    """Compare the files of a checkpoint with its manifest. All processes must call it; each reads a share.

    Raises DamageError on all of them where a file is not as it was written, and CheckpointError for a
    checkpoint that is incomplete or of another format.
    """
    wrong = verify(path, procs)
    for name, what in sorted(wrong.items())[:1]:
        more = f" ({len(wrong) - 1} more files are wrong)" if len(wrong) > 1 else ""
        raise DamageError(f"{path} is damaged: {name} {what}{more}.")


def verify(path: Path, procs: Procs) -> dict[str, str]:
    """Return the files that are not as they were written and what is wrong with them; see `check`."""
    wrong: dict[str, str] = {}
    error: CheckpointError | None = None
    try:
        files = read_manifest(path)["files"]
        for name in sorted(files)[procs.proc :: procs.n_procs]:
            try:
                if _identity(path / name) != files[name]:
                    wrong[name] = "is not as it was written (size or sha256)"
            except FileNotFoundError:
                wrong[name] = "is missing"
            except OSError as failure:
                wrong[name] = f"cannot be read ({failure.strerror})"
    except CheckpointError as failure:
        error = failure
    outcomes = procs.gather((error, wrong))
    for error, part in outcomes:
        if error is not None:
            raise error
        wrong |= part
    return wrong


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises CheckpointError where there is none and for another format, DamageError where it cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        known = manifest["format"] == FORMAT
        if known and not manifest["files"].keys() >= {"run.json", INDEX}:
            raise ValueError("files are absent")
    except FileNotFoundError as error:
        remedy = "Name a folder step_XXXXXXXX that holds one"
        raise CheckpointError(
            f"{path} holds no manifest.json: it is no complete checkpoint. {remedy}."
        ) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamageError(f"{path} is damaged: manifest.json is not as it was written.") from error
    if not known:
        later = str(manifest["format"]) > str(FORMAT)
        remedy = "Use the lrpretrain that wrote it" + (", or a newer one" if later else "")
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this version reads {FORMAT}. {remedy}."
        )
    return manifest


def read_run(path: Path) -> dict[str, Any]:
    """Return run.json of a checkpoint: step, tokens, data position, random state, configuration.

    Raises DamageError where it cannot be read.
    """
    return _read(path, "run.json")


def read_index(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds: dtype and shape of each tensor, and its tiles.

    A tile is (offsets, sizes, file, first byte, bytes). Raises DamageError where it cannot be read.
    """
    return _read(path, INDEX)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((path / name).read_text())
    except (OSError, ValueError) as error:
        raise DamageError(f"{path} is damaged: {name} cannot be read ({error}).") from error
    return content


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the newest first."""
    return [path for path in _all(folder) if (path / "manifest.json").exists()]


def incomplete(folder: Path) -> list[Path]:
    """Return what is left of saves that did not end, the newest first."""
    return [path for path in _all(folder) if not (path / "manifest.json").exists()]


def newest(path: Path) -> Path:
    """Return a checkpoint itself, or the newest complete one of a run folder. Raises CheckpointError."""
    found = [path] if (path / "manifest.json").exists() else complete(path / "checkpoints")
    if not found:
        raise CheckpointError(
            f"{path} is neither a checkpoint nor a run folder with a complete one. Name one of these."
        )
    return found[0]


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.stem.removeprefix("step_"))


def prune(path: Path, keep: int, keep_every: int) -> None:
    """Remove what a new checkpoint makes superfluous, among those of its folder that are not newer.

    The newest `keep` stay (0: all), and those at multiples of `keep_every` (0: none); incomplete ones go.
    """
    done = [p for p in complete(path.parent) if step_of(p) <= step_of(path)]
    half = [p for p in incomplete(path.parent) if step_of(p) < step_of(path)]
    beyond = [p for p in done[keep:] if not keep_every or step_of(p) % keep_every] if keep else []
    for superfluous in beyond + half:
        _remove(superfluous)


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
            TensorWriteData(chunk, TensorProperties(self._piece.tensor.dtype), self.size())
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


class _Writer(FileSystemWriter):
    """DCP's writer; where each tile lies goes into index.json."""

    def __init__(self, path: Path):
        # It could copy from the GPU while it writes, with a stream of the thread's device: not of this one.
        super().__init__(path, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch.save covers what the disk said
                raise error.__context__ from None
            raise

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {written.index: written.storage_data for part in results for written in part}
        index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            tiles = []
            for chunk in tensor.chunks:
                at = places[MetadataIndex(name, chunk.offsets)]
                tiles.append((chunk.offsets, chunk.sizes, at.relative_path, at.offset, at.length))
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            index[name] = {"dtype": dtype, "shape": tensor.size, "tiles": tiles}
        write_atomically(Path(self.path) / "index.json", json.dumps(index))


class _Reader(FileSystemReader):
    """DCP's reader of what `_Writer` wrote."""

    def __init__(self, path: Path, index: Mapping[str, Any]):
        super().__init__(path)
        self._index = index

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        tensors: dict[str, Any] = {}
        places = {}
        for name, entry in self._index.items():
            chunks = []
            for offsets, sizes, file, begin, length in entry["tiles"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                places[MetadataIndex(name, offsets)] = _StorageInfo(file, begin, length)
            properties = TensorProperties(getattr(torch, entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(tensors, storage_data=places)


def _together(action: Callable[[], T], procs: Procs, what: str, remedy: str) -> list[T]:
    """Do something that touches the disk and return what it gave on each process.

    Raises CheckpointError on all processes if one of them fails.
    """
    result: Any = None
    message: str | None = None
    try:
        result = action()
    except (Exception, CheckpointException) as error:  # DCP's own is a BaseException
        logger.debug("checkpoint", exc_info=True)
        message = "; ".join(dict.fromkeys(f"{type(e).__name__}: {e}".splitlines()[0] for e in _causes(error)))
    outcomes = procs.gather((result, message))
    for _, message in outcomes:
        if message is not None:
            raise CheckpointError(f"{what}: {message}. {remedy}.")
    return [result for result, _ in outcomes]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield what lies below DCP's collection of the failures of all processes."""
    if isinstance(error, CheckpointException):
        yield from (cause for cause, _ in error.failures.values())
    else:
        yield error


def _all(folder: Path) -> list[Path]:
    """Return all folders of checkpoints, the newest first; `.old` is what another of its step replaces."""
    found = [p for p in folder.glob("step_*/") if re.fullmatch(r"step_\d+(\.old)?", p.name)]
    return sorted(found, key=lambda p: (step_of(p), not p.suffix), reverse=True)


def _remove(path: Path) -> None:
    if path.exists():
        (path / "manifest.json").unlink(missing_ok=True)  # first, so that what is left counts as incomplete
        shutil.rmtree(path)


def _identity(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
