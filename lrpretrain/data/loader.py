"""Global batches of rows, the same ones on any number of processes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lrpretrain.config import Config, DataConfig
from lrpretrain.data.inputs import open_source
from lrpretrain.data.lanes import Deal, Encode, Lane, Position
from lrpretrain.data.pack import Ids
from lrpretrain.data.prefetch import Prefetch
from lrpretrain.data.sources import (
    Document,
    IndexedSource,
    PackedSource,
    Source,
    Split,
    cache_dir,
    indexed,
)
from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.data.turns import Turns
from lrpretrain.errors import ConfigError, DataError, LrpretrainError, Problem, Stopped
from lrpretrain.sharding.procs import Procs

LOOK_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """This process's rows of a global batch, and what all processes know of the whole."""

    ids: npt.NDArray[np.int64]
    """(S/N, seq_len): S sequences on N processes."""
    tokens: int
    """Non-pad tokens of the global batch."""
    targets: int
    """Ids that the loss is taken over, in the global batch: the non-pad ones but the first of each row."""
    flag: int
    """The largest flag of the processes, as next() asked for them."""


class Loader:
    """Deals a source to lanes and takes global batches from them in turns.

    Lane l is read by process l mod N alone. Every process makes the same plan, from how many rows
    each lane has left: a lane's reader takes its rows until its share of the batch is full, and only
    what it has too much of travels. One small vector is exchanged in a step; it also carries what
    the next plan needs, where that has been read by then.

    Collective, like next() and state_dict(). With ``drop_last`` a last partial batch is dropped and
    counted in ``dropped``, without it is filled up with rows of pad. Raises DataError on all
    processes for what one of them cannot read, and ConfigError for a state of other lanes or seed.
    """

    def __init__(
        self,
        source: IndexedSource | PackedSource,
        encode: Encode,
        data: DataConfig,
        *,
        pad_id: int,
        eos_id: int,
        seed: int,
        global_batch: int,
        procs: Procs,
        epochs: int | None,
        state: dict[str, Any] | None = None,
        drop_last: bool = True,
    ):
        assert global_batch % procs.n_procs == 0, (global_batch, procs.n_procs)
        self._procs, self._size, self._drop_last = procs, global_batch, drop_last
        self._seq_len, self._pad_id = data.seq_len, pad_id
        self._identity = _identity(source, data, seed, procs)
        self._turns = Turns(data.lanes, epochs)
        self._own = range(procs.proc, data.lanes, procs.n_procs)
        self._positions = dict.fromkeys(self._own, Position())
        if state is not None:
            self._restore(state)
        if len(source.names) < data.lanes:
            source = together(procs, lambda: indexed(source, cache_dir(data) / "unpacked"))
        deal = Deal(source, data.lanes, seed)
        form = partial(Lane, deal=deal, encode=encode, seq_len=data.seq_len, pad_id=pad_id, eos_id=eos_id)
        form = partial(form, packed=data.sequences == "pack", epochs=epochs, flush=not drop_last)
        self._prefetch = Prefetch(
            {lane: form(lane, position=position) for lane, position in self._positions.items()},
            share=-(-global_batch // data.lanes),
            ahead=data.prefetch,
            workers=data.workers,
        )
        self._known: list[int] | None = None
        self._saved = self._snapshot()
        self.dropped = 0
        self.wait_ms = 0.0

    def next(self, flag: Callable[[], int] = int) -> Batch | None:
        """Return the next batch, or None, on all processes, where the data has ended.

        ``flag`` tells what asks this process to stop, or 0. It is called with every exchange: once in a
        step, and each second while a process waits for its data. Raises, on all processes, Stopped where
        one is asked to stop while one waits, which loses no rows, and DataError at the first batch for
        which a lane cannot be read.
        """
        self.wait_ms = 0.0
        slots: list[int] = []  # the lane of each sequence
        rows: dict[int, Ids] = {}  # those that are read here, by slot
        while len(slots) < self._size and not self._turns.ended:
            lanes, closed = self._take_turns(self._size - len(slots), flag)
            for slot, lane in enumerate(lanes, len(slots)):
                if lane in self._own:
                    row, self._positions[lane] = self._prefetch.take(lane)
                    assert row is not None, f"lane {lane} has fewer rows than it counted"
                    rows[slot] = row
            slots += lanes
            for lane in set(closed).intersection(self._own):
                self._positions[lane] = self._prefetch.take(lane).position  # the start of its next pass
            if self._turns.pass_is_over:
                self._turns.begin_pass()
        if not slots or (self._drop_last and len(slots) < self._size):
            self.dropped += len(slots)
            return None
        ids = self._spread(slots, rows)
        batch = self._agree(ids, flag())
        self._saved = self._snapshot()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to go on after the last batch, on any number of processes; collective."""
        turns, positions = self._saved
        whole: dict[int, Any] = {}
        for part in self._procs.gather({lane: at.as_json() for lane, at in positions.items()}):
            whole |= part
        return {**self._identity, **turns, "positions": [whole[lane] for lane in sorted(whole)]}

    def close(self) -> None:
        """End the threads that read ahead."""
        self._prefetch.close()

    def _take_turns(self, need: int, flag: Callable[[], int]) -> tuple[list[int], list[int]]:
        """Return the lanes of the next sequences, as far as one exchange tells, and those that closed."""
        have, self._known = self._known, None
        if have is None:
            started = time.perf_counter()
            have = self._ask(need, flag)
            self.wait_ms += (time.perf_counter() - started) * 1e3
        return self._turns.take(need, have)

    def _ask(self, need: int, flag: Callable[[], int]) -> list[int]:
        """Wait until all processes know how many of the next `need` rows each of their lanes has.

        A process that still waits says so each second: nobody sits in a collective that does not end.
        """
        want = self._own_of(self._turns.want(need))
        while True:
            counts: dict[int, int] | None = None
            error: Exception | None = None
            try:
                counts = self._prefetch.count(want, wait_s=LOOK_S)
            except Exception as e:
                error = e
            unknown = counts is None
            told = self._procs.max([*self._by_lane(counts), unknown, flag(), error is not None]).tolist()
            have, (unknown, flags, failed) = told[:-3], told[-3:]
            if failed:
                raise_together(self._procs, error)
            if not unknown:
                return have
            if flags:
                raise Stopped(flags)

    def _agree(self, ids: Ids, flag: int) -> Batch:
        """Exchange the one vector of a step: sums of the batch, the flag, and the next plan's counts."""
        full = ids != self._pad_id
        tokens, targets = np.zeros((2, self._procs.n_procs), np.int64)
        tokens[self._procs.proc], targets[self._procs.proc] = full.sum(), full[:, 1:].sum()
        want = [0] * len(self._turns.is_open) if self._turns.ended else self._turns.want(self._size)
        counts = self._prefetch.count(self._own_of(want), wait_s=0)
        # The largest entry is the only one, but for the flag: one reduction serves all.
        told = self._procs.max([*self._by_lane(counts), counts is None, flag, *tokens, *targets]).tolist()
        have, (unknown, flag), sums = told[: len(want)], told[len(want) :][:2], told[len(want) + 2 :]
        self._known = None if unknown else have
        half = len(sums) // 2
        return Batch(ids, sum(sums[:half]), sum(sums[half:]), flag)

    def _spread(self, slots: list[int], rows: dict[int, Ids]) -> Ids:
        """Return this process's share of the batch (S/N, seq_len), swapping only what is too much."""
        readers = [lane % self._procs.n_procs for lane in slots]
        places = _places(readers, self._procs.n_procs, self._size // self._procs.n_procs)
        parts: dict[int, list[Ids]] = {}
        for slot, row in rows.items():
            parts.setdefault(places[slot], []).append(row)
        share = parts.pop(self._procs.proc, [])
        if places != readers:
            share += list(self._procs.swap({p: np.stack(part) for p, part in parts.items()}, self._seq_len))
        blank = np.full(self._seq_len, self._pad_id, np.int64)
        return np.stack(share + [blank] * (self._size // self._procs.n_procs - len(share)))

    def _own_of(self, want: list[int]) -> dict[int, int]:
        return {lane: want[lane] for lane in self._own}

    def _by_lane(self, counts: dict[int, int] | None) -> list[int]:
        return [(counts or {}).get(lane, 0) for lane in range(self._turns.lanes)]

    def _snapshot(self) -> tuple[dict[str, Any], dict[int, Position]]:
        turns = self._turns
        done = {"epoch": turns.epoch, "turn": turns.turn, "given": turns.given, "is_open": [*turns.is_open]}
        return done, dict(self._positions)

    def _restore(self, state: dict[str, Any]) -> None:
        remedy = "Go on with the value of the checkpoint, or start anew with run.resume=never"
        problems = [
            Problem(field, now, f"the checkpoint was written with {state[field]!r}", remedy)
            for field, now in self._identity.items()
            if state[field] != now
        ]
        if problems:
            raise ConfigError(problems)
        for field in ("epoch", "turn", "given", "is_open"):
            setattr(self._turns, field, copy(state[field]))
        self._positions = {lane: Position.from_json(state["positions"][lane]) for lane in self._own}


def build_loader(
    config: Config, split: Split, procs: Procs, tokenizer: Tokenizer, *, state: dict[str, Any] | None = None
) -> Loader:
    """Return the batches of a split as configured; collective.

    The validation data is passed once, to its last sequence, in an order that does not depend on
    train.seed: where an evaluation stops after train.eval_tokens, runs of different seeds have been
    measured on the same sequences. Raises what `open_source` and `Loader` raise.
    """
    data = config.data
    source = together(procs, lambda: open_source(data, split))
    if hasattr(source, "vocab_size"):  # tokenised shards check their ids against it
        source.vocab_size = tokenizer.size

    def encode(document: Document) -> Ids:
        return tokenizer.encode(document) if isinstance(document, str) else document.astype(np.int64)

    training = split == "train"
    once = 1 if data.source == "hub" else None
    return Loader(
        source,
        encode,
        data,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        seed=config.train.seed if training else 0,
        global_batch=config.train.global_batch,
        procs=procs,
        epochs=(data.epochs or once) if training else 1,
        state=state,
        drop_last=training,
    )


def together(procs: Procs, action: Callable[[], T]) -> T:
    """Return what an action gives on this process, once it has worked out on all; collective.

    Raises on all processes where it fails on one.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as e:
        error = e
    raise_together(procs, error)
    return result


def raise_together(procs: Procs, error: Exception | None) -> None:
    """Raise DataError where a process has an error, or this process's own of ours; collective."""
    messages = [message for message in procs.gather(error and (str(error) or repr(error))) if message]
    if isinstance(error, OSError):  # a full disk, a file system that is gone
        raise DataError(f"{error}. Mend what keeps the data from being read, and start again.") from error
    if isinstance(error, LrpretrainError):
        raise error
    if messages:
        raise DataError("\n".join(dict.fromkeys(messages))) from error


def _identity(source: Source, data: DataConfig, seed: int, procs: Procs) -> dict[str, Any]:
    """Return what positions are worth nothing without. Raises DataError where the processes disagree."""
    digest = hashlib.sha256("\n".join(source.names).encode()).hexdigest()
    shards = f"{len(source.names)} shards, names of sha256 {digest[:12]}"
    seen = procs.gather(shards)
    if len(set(seen)) > 1:
        nodes = "; ".join(f"process {proc}: {shards}" for proc, shards in enumerate(seen))
        raise DataError(f"the processes see different shards ({nodes}). Give all nodes the same files.")
    return {"data.lanes": data.lanes, "train.seed": seed, "the shards of data.path": shards}


def _places(readers: list[int], n_procs: int, share: int) -> list[int]:
    """Return the process of each row: its reader as long as that has room, else the first that has."""
    room = [share] * n_procs
    places = []
    for reader in readers:
        places.append(reader if room[reader] else -1)
        room[reader] -= room[reader] > 0
    spare = (proc for proc in range(n_procs) for _ in range(room[proc]))
    return [next(spare) if place < 0 else place for place in places]
