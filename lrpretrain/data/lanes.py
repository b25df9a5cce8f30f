"""The documents dealt to lanes, and how a lane turns its own into rows.

What a lane reads is a function of the shards and the seed, never of the number of processes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from lrpretrain.data.pack import Ids, cut, pad
from lrpretrain.data.shuffle import Shuffle
from lrpretrain.data.sources import Document, IndexedSource, Source

Encode = Callable[[Document], Ids]


class Deal:
    """Which documents each lane reads in a pass, and in which order.

    With as many shards as lanes or more, a lane owns whole shards, the same in every pass, and reads
    them in a new order each time (the documents too, where the source is indexed). With fewer, which
    takes an IndexedSource, the documents of all shards are dealt one by one, anew in each pass.
    """

    def __init__(self, source: Source, lanes: int, seed: int):
        self._source, self._lanes, self._seed = source, lanes, seed
        self._indexed = source if isinstance(source, IndexedSource) else None
        self._n_shards = len(source.names)
        self._by_document = self._n_shards < lanes
        if self._by_document:
            assert self._indexed is not None, "fewer shards than lanes need random access"
            self._starts = [0, *accumulate(self._indexed.counts)]

    def shards(self, lane: int) -> int:
        """Return how many shards the lane reads in a pass; dealt by document, its share counts as one."""
        return 1 if self._by_document else len(range(lane, self._n_shards, self._lanes))

    def read(self, lane: int, epoch: int, nth: int, start: int) -> Iterator[Document]:
        """Yield the documents of the lane's nth shard in this pass, from document `start`."""
        if self._by_document:
            return self._share(lane, epoch, start)
        order = Shuffle(self.shards(lane), self._seed, "shards of a lane", lane, epoch)
        dealt = Shuffle(self._n_shards, self._seed, "shards")
        shard = dealt[lane + self._lanes * order[nth]]
        return self._shuffled(shard, epoch, start) if self._indexed else self._source.read(shard, start)

    def _share(self, lane: int, epoch: int, start: int) -> Iterator[Document]:
        assert self._indexed is not None
        order = Shuffle(self._starts[-1], self._seed, "documents", epoch)
        for i in range(lane + start * self._lanes, len(order), self._lanes):
            document = order[i]
            shard = bisect_right(self._starts, document) - 1
            yield self._indexed.document(shard, document - self._starts[shard])

    def _shuffled(self, shard: int, epoch: int, start: int) -> Iterator[Document]:
        assert self._indexed is not None
        order = Shuffle(self._indexed.counts[shard], self._seed, "documents of a shard", shard, epoch)
        for i in range(start, len(order)):
            yield self._indexed.document(shard, order[i])


class Position(NamedTuple):
    """Where a lane stands: the next document of its nth shard in a pass, and ids not yet in a row."""

    epoch: int = 0
    shard: int = 0
    document: int = 0
    leftover: Ids = np.empty(0, np.int64)

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "leftover": self.leftover.tolist()}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Position:
        return cls(**{**state, "leftover": np.array(state["leftover"], np.int64)})


START = Position()


class Item(NamedTuple):
    """A row (seq_len,) of a lane, or None at the end of a pass, and where the lane stands after it."""

    row: Ids | None
    position: Position


@dataclass(frozen=True)
class Lane:
    """One of the streams of rows that a run is made of; iterating reads on from `position`.

    Every pass is closed by an Item without a row. Packed, what is left over at its end goes into the
    first row of the next one; after the last pass it is lost unless `flush` pads it to a row.
    """

    number: int
    deal: Deal
    encode: Encode
    seq_len: int
    pad_id: int
    eos_id: int
    packed: bool = False
    epochs: int | None = None
    flush: bool = False
    position: Position = START

    def __iter__(self) -> Iterator[Item]:
        at = yield from self._cut(self.position.leftover, self.position)
        while self.epochs is None or at.epoch < self.epochs:
            for nth in range(at.shard, self.deal.shards(self.number)):
                start = at.document if nth == at.shard else 0
                documents = self.deal.read(self.number, at.epoch, nth, start)
                for following, document in enumerate(documents, start + 1):
                    after = at._replace(shard=nth, document=following)
                    at = yield from self._cut(self._stream(at.leftover, document), after)
            if self.flush and at.epoch + 1 == self.epochs and len(at.leftover):
                at = yield from self._cut(self._padded(at.leftover), at)
            at = Position(at.epoch + 1, leftover=at.leftover)
            yield Item(None, at)

    def _stream(self, leftover: Ids, document: Document) -> Ids:
        ids = self.encode(document)
        return np.concatenate([leftover, ids]) if self.packed else self._padded(ids)

    def _padded(self, ids: Ids) -> Ids:
        return pad(ids, self.seq_len, self.pad_id, self.eos_id)

    def _cut(self, stream: Ids, at: Position) -> Generator[Item, None, Position]:
        """Yield the full rows of a stream; return the position with what is left of it."""
        rest = stream
        for row, rest in cut(stream, self.seq_len):
            yield Item(row, at._replace(leftover=rest))
        return at._replace(leftover=rest)
