"""Pre-tokenised shards: the ids of all documents end to end, and where each document begins.

A folder holds ``tokens.json`` and, for each shard of a split, ``<split>-00000-of-0000N.tokens``
(little-endian uint16, or uint32 where the vocabulary needs it) with ``….offsets.npy`` (int64,
documents + 1). Ids include the eos that ends each document.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from lrpretrain.data.sources import Source
from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.errors import DataError

FORMAT = 1
MANIFEST = "tokens.json"
AGAIN = "Run `lrpretrain tokenize` again with the same arguments: it writes what is missing"

_log = logging.getLogger(__name__)


def tokenize(
    source: Source,
    names: Sequence[str],
    tokenizer: Tokenizer,
    folder: Path,
    split: str,
    *,
    processes: int = 1,
) -> None:
    """Write the shards `names` of a source as ids into `folder`, for data.source=tokens.

    A folder takes several splits of one tokenizer. A shard appears when it is complete, so a call
    that was interrupted can be repeated. Raises DataError where the folder holds something else,
    and what the source raises.
    """
    header: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": tokenizer.identity,
        "vocab_size": tokenizer.size,
        "dtype": "uint16" if tokenizer.size <= 1 << 16 else "uint32",
        "pad": tokenizer.pad_id,
        "eos": tokenizer.eos_id,
    }
    shards = [{"source": name} for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    _register(folder, header, split, shards)
    stems = [_stem(split, i, len(names)) for i in range(len(names))]
    write = partial(_write_shard, source, tokenizer, folder, np.dtype(header["dtype"]))
    indices = [source.names.index(name) for name in names]
    if processes == 1:
        written = list(map(write, indices, stems))
    else:
        # Threads would not do: sentencepiece keeps the interpreter's lock.
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            written = list(pool.map(write, indices, stems))
    _register(folder, header, split, [shard | counts for shard, counts in zip(shards, written, strict=True)])


def _stem(split: str, shard: int, count: int) -> str:
    return f"{split}-{shard:05d}-of-{count:05d}"


def _register(folder: Path, header: dict[str, Any], split: str, shards: list[dict[str, Any]]) -> None:
    """Enter a split into the folder's manifest, or raise DataError where it does not fit what is there."""
    path = folder / MANIFEST
    with FileLock(folder / f".{MANIFEST}.lock"):
        manifest = read_manifest(folder) if path.exists() else header | {"splits": {}}
        for name, value in header.items():
            if manifest[name] != value:
                raise DataError(
                    f"{path} has {name}={manifest[name]!r}, but now it is {value!r}. "
                    "Write the tokens of another tokenizer into another folder."
                )
        there = manifest["splits"].setdefault(split, shards)
        if [shard["source"] for shard in there] != [shard["source"] for shard in shards]:
            raise DataError(
                f"{path} lists the split {split!r} with other source shards ({len(there)}, now "
                f"{len(shards)}). Choose another folder, or delete this one."
            )
        if all("tokens" in shard for shard in shards):
            manifest["splits"][split] = shards
        part = folder / f".{MANIFEST}.part"
        part.write_text(json.dumps(manifest, indent=1))
        part.replace(path)


def _write_shard(
    source: Source, tokenizer: Tokenizer, folder: Path, dtype: np.dtype[Any], shard: int, stem: str
) -> dict[str, int]:
    """Write one shard unless it is there; the ids come last, their presence says that it is complete."""
    tokens, offsets = folder / f"{stem}.tokens", folder / f"{stem}.offsets.npy"
    if not (tokens.exists() and offsets.exists()):
        ends = [0]
        part = folder / f".{stem}.part"
        with open(part, "wb") as file:
            for document in source.read(shard):
                ids = tokenizer.encode(document) if isinstance(document, str) else document
                file.write(ids.astype(dtype.newbyteorder("<")).tobytes())
                ends.append(ends[-1] + len(ids))
        with open(folder / f".{stem}.offsets.part", "wb") as file:
            np.save(file, np.array(ends, np.int64))
        Path(file.name).replace(offsets)
        part.replace(tokens)
        _log.info("%s: %d documents, %d tokens", tokens, len(ends) - 1, ends[-1])
    return {"documents": len(np.load(offsets)) - 1, "tokens": tokens.stat().st_size // dtype.itemsize}


class TokenShards:
    """The shards of one split of a folder that `tokenize` wrote: an `IndexedSource` of ids.

    Ids at or above `vocab_size`, where it is set, are a DataError when they are read; so is,
    from the start, a shard that is missing or cut short. ``tokenizer`` is the identity of the
    tokenizer that made them, ``eos_id`` what ends a document.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int | None = None):
        manifest = read_manifest(folder)
        self._folder = folder
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shards = _complete_split(manifest, folder, split)
        self._open: dict[int, tuple[npt.NDArray[Any], npt.NDArray[np.int64]]] = {}
        self.vocab_size = vocab_size
        self.tokenizer: str = manifest["tokenizer"]
        self.eos_id: int = manifest["eos"]
        self.names = [f"{_stem(split, i, len(self._shards))}.tokens" for i in range(len(self._shards))]
        self.counts: list[int] = [shard["documents"] for shard in self._shards]
        for name, shard in zip(self.names, self._shards, strict=True):
            _check_size(folder / name, shard["tokens"] * self._dtype.itemsize)

    def read(self, shard: int, start: int = 0) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the ids of the documents of a shard in file order, from document `start`."""
        for index in range(start, self.counts[shard]):
            yield self.document(shard, index)

    def document(self, shard: int, index: int) -> npt.NDArray[np.int64]:
        """Return the ids of a document, eos included. Raises DataError for one that the model lacks."""
        if shard not in self._open:
            self._open[shard] = self._map(shard)
        tokens, offsets = self._open[shard]
        ids = tokens[offsets[index] : offsets[index + 1]].astype(np.int64)
        if self.vocab_size is not None and ids.max(initial=0) >= self.vocab_size:
            raise DataError(
                f"{self._folder / self.names[shard]}, document {index}: id {ids.max()} is not in the "
                f"vocabulary of {self.vocab_size}. Choose a model.config with the vocabulary of what wrote "
                f"the tokens ({self.tokenizer}), or tokenize again."
            )
        return ids

    def key(self, shard: int) -> str:
        """Return where the file is, its size and when it was written."""
        path = self._folder / self.names[shard]
        stat = path.stat()
        return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"

    def _map(self, shard: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        path, count = self._folder / self.names[shard], self._shards[shard]["tokens"]
        offsets_path = path.with_suffix(".offsets.npy")
        try:
            offsets = np.load(offsets_path, mmap_mode="r")
            tokens = np.memmap(path, self._dtype, "r") if count else np.empty(0, self._dtype)
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{offsets_path}: it cannot be read ({error}). Delete it. {AGAIN}.") from error
        ends = (offsets[0], offsets[-1]) if offsets.shape == (self.counts[shard] + 1,) else None
        if ends != (0, count) or (np.diff(offsets) < 0).any():
            raise DataError(f"{offsets_path}: it does not fit {path.name}. Delete both. {AGAIN}.")
        return tokens, offsets


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what tokens.json of a folder says. Raises DataError where there is none that can be read."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["format"]
    except OSError as error:
        remedy = "Set data.path to a folder that `lrpretrain tokenize` wrote"
        raise DataError(f"{path}: it cannot be read ({error.strerror}). {remedy}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: it is not a manifest of tokens. Tokenize into a new folder.") from error
    if version != FORMAT:
        raise DataError(
            f"{path}: format={version!r}, but this version reads format {FORMAT}. Tokenize into a new folder."
        )
    return manifest


def _complete_split(manifest: dict[str, Any], folder: Path, split: str) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = manifest["splits"].get(split, [])
    if not shards:
        held = ", ".join(manifest["splits"]) or "none"
        remedy = f"Write it with `lrpretrain tokenize --split {split}`"
        raise DataError(f"{folder} has no split {split!r} (it has: {held}). {remedy}.")
    if not all("tokens" in shard for shard in shards):
        raise DataError(f"{folder}: the split {split!r} is not complete. {AGAIN}.")
    return shards


def _check_size(path: Path, size: int) -> None:
    if not path.exists():
        raise DataError(f"{path}: the shard is missing. {AGAIN}.")
    if path.stat().st_size != size:
        raise DataError(f"{path} has {path.stat().st_size} bytes, not {size}. Delete it. {AGAIN}.")
