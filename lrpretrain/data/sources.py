"""Where documents come from: named shards whose order is part of the run's identity."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lrpretrain.config import DataConfig

# Text, or the ids of a document that is tokenised already (with eos).
Document = str | npt.NDArray[np.integer[Any]]


class Source(Protocol):
    """The documents of one split, in named shards whose order is part of the run's identity."""

    names: list[str]

    def read(self, shard: int, start: int = 0) -> Iterator[Document]:
        """Yield the documents of a shard in file order, from document `start`."""
        ...


class IndexedSource(Source, Protocol):
    """A source whose documents can be fetched in any order."""

    counts: list[int]

    def document(self, shard: int, index: int) -> Document:
        """Return document `index` of a shard."""
        ...


def cache_dir(data: DataConfig) -> Path:
    """Return the folder for corpora and downloads: data.cache_dir, $LRPRETRAIN_CACHE or ~/.cache/lrpretrain."""
    chosen = data.cache_dir or os.environ.get("LRPRETRAIN_CACHE") or "~/.cache/lrpretrain"
    return Path(chosen).expanduser()
