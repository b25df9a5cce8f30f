"""Where documents come from: named shards whose order is part of the run's identity."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from lrpretrain.config import DataConfig
from lrpretrain.errors import DataError

# Text, or the ids of a document that is tokenised already (with eos).
Document = str | npt.NDArray[np.integer[Any]]
Split = Literal["train", "validation"]

SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl")
# Compressed bytes that are read at a time: zlib works on them without the interpreter's lock, so that
# the threads of the loader decompress side by side.
_BLOCK_BYTES = 1 << 18


class Source(Protocol):
    """The documents of one split, in named shards whose order is part of the run's identity."""

    names: list[str]

    def read(self, shard: int, start: int = 0) -> Iterator[Document]:
        """Yield the documents of a shard in file order, from document `start`."""
        ...


@runtime_checkable
class IndexedSource(Source, Protocol):
    """A source whose documents can be fetched in any order."""

    counts: list[int]

    def document(self, shard: int, index: int) -> Document:
        """Return document `index` of a shard."""
        ...


class PackedSource(Source, Protocol):
    """A source of compressed text, which has to be unpacked for random access."""

    def key(self, shard: int) -> str:
        """Return a text that changes when the content of the shard does; the cache goes by it."""
        ...


def cache_dir(data: DataConfig) -> Path:
    """Return the folder of corpora and downloads: data.cache_dir, $LRPRETRAIN_CACHE, ~/.cache/lrpretrain."""
    chosen = data.cache_dir or os.environ.get("LRPRETRAIN_CACHE") or "~/.cache/lrpretrain"
    return Path(chosen).expanduser()


class FileShards:
    """C4-format shards on disk: a JSON object with `text` on each line, gzip'd (.gz) or plain.

    Empty lines are not documents. Raises DataError, with shard and line, for what is missing or broken.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self.names = [path.name for path in self.paths]

    def read(self, shard: int, start: int = 0) -> Iterator[str]:
        """Yield the texts of a shard in file order; the first `start` ones are counted, not parsed."""
        path = self.paths[shard]
        skip, number = start, 0
        for block in _whole_lines(path):
            lines = block.count(b"\n")
            if skip >= lines and b"\n\n" not in block and not block.startswith(b"\n"):
                skip, number = skip - lines, number + lines
                continue
            for line in block.split(b"\n")[:-1]:
                number += 1
                if line and skip:
                    skip -= 1
                elif line:
                    yield _text(line, path, number)

    def key(self, shard: int) -> str:
        """Return where the file is, its size and when it was written."""
        path = self.paths[shard]
        try:
            stat = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def indexed(source: IndexedSource | PackedSource, cache: Path) -> IndexedSource:
    """Return a source with random access to the same documents, unpacking shards into `cache` once.

    Processes may call it at the same time: one unpacks, the others wait for it.
    Raises DataError for a broken shard or where the cache cannot be written.
    """
    return source if isinstance(source, IndexedSource) else _UnpackedShards(source, cache)


class _UnpackedShards:
    """The texts of every shard end to end in one plain file, with the offsets of the documents."""

    def __init__(self, source: PackedSource, cache: Path):
        self.names, self.read = source.names, source.read
        self._texts, self._offsets = [], []
        for shard in range(len(source.names)):
            stem = hashlib.sha256(source.key(shard).encode()).hexdigest()[:24]
            text, offsets = cache / f"{stem}.text", cache / f"{stem}.npy"
            try:
                cache.mkdir(parents=True, exist_ok=True)
                with FileLock(cache / f"{stem}.lock"):
                    if not offsets.exists():
                        _unpack(source.read(shard), text, offsets)
            except OSError as error:
                remedy = "Free some space, or set data.cache_dir to a folder that can be written"
                raise DataError(f"{source.names[shard]} cannot be unpacked ({error}). {remedy}.") from error
            self._offsets.append(np.load(offsets))
            size = int(self._offsets[-1][-1])
            self._texts.append(np.memmap(text, np.uint8, "r") if size else np.empty(0, np.uint8))
        self.counts = [len(offsets) - 1 for offsets in self._offsets]

    def document(self, shard: int, index: int) -> str:
        start, end = self._offsets[shard][index : index + 2]
        return self._texts[shard][start:end].tobytes().decode("utf-8", "surrogatepass")


def _unpack(documents: Iterator[Document], text: Path, offsets: Path) -> None:
    """Write both files; the offsets come last, their presence says that the shard is complete."""
    ends = [0]
    with open(text.with_suffix(".text.part"), "wb") as file:
        for document in documents:
            # json reads lone surrogates, which strict UTF-8 could not hold.
            ends.append(ends[-1] + file.write(str(document).encode("utf-8", "surrogatepass")))
    os.replace(file.name, text)
    with open(offsets.with_suffix(".npy.part"), "wb") as file:
        np.save(file, np.array(ends, np.int64))
    os.replace(file.name, offsets)


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the file in large pieces that end with a line."""
    rest = b""
    try:
        for chunk in _chunks(path):
            end = chunk.rfind(b"\n") + 1
            if end:
                yield rest + chunk[:end]
                rest = chunk[end:]
            else:
                rest += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    if rest:
        yield rest + b"\n"


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        if path.suffix != ".gz":
            while chunk := file.read(_BLOCK_BYTES):
                yield chunk
            return
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        while block := file.read(_BLOCK_BYTES):
            while block:
                if member.eof:  # another member follows: gzip files may be concatenated
                    member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
                yield member.decompress(block)
                block = member.unused_data
        if not member.eof:
            raise EOFError("it ends in the middle of the gzip stream")


def _text(line: bytes, path: Path, number: int) -> str:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise _broken(path, number, f"is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise _broken(path, number, f"is not a JSON object but {type(document).__name__}")
    text = document.get("text")
    if not isinstance(text, str):
        raise _broken(path, number, "has no string `text`")
    return text


def _broken(path: Path, number: int, reason: str) -> DataError:
    remedy = 'Every line must be an object such as {"text": "..."}: mend the line or remove it'
    return DataError(f"{path}, line {number}: {reason}. {remedy}.")


def _unreadable(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path}: the shard is missing. Put it back, or correct data.path.")
    reason = str(error) if isinstance(error, (EOFError, OSError)) else f"corrupt gzip: {error}"
    return DataError(f"{path}: {reason}. Fetch or write this shard again.")
