"""Global batches: the same sequences whatever the number of processes, each exactly once, through resumes."""

import json
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lrpretrain.config import Config, DataConfig
from lrpretrain.data.lanes import Deal, Lane
from lrpretrain.data.loader import Loader, build_loader
from lrpretrain.data.sources import indexed
from lrpretrain.errors import ConfigError, DataError, Stopped
from lrpretrain.sharding.procs import Procs

PAD, EOS = 0, 1
PROCS = [1, 2, 3, 4]


class Shards:
    """Documents in memory. Document d of shard s is a text of length lengths[s][d]; None is a broken one."""

    def __init__(self, lengths, tag="t"):
        self.names = [f"{tag}{i}" for i in range(len(lengths))]
        self.lengths = lengths

    def read(self, shard, start=0):
        for d, length in enumerate(self.lengths[shard][start:], start):
            if length is None:
                raise DataError(f"{self.names[shard]}, line {d + 1}: is broken. Mend it.")
            yield f"{10_000 * shard + 100 * d + 2} {length}"

    def key(self, shard):
        return f"{self.names[shard]} {self.lengths[shard]}"


def encode(text):
    """A text names its first id and how many consecutive ones it has; ids are unique in the corpus."""
    first, length = map(int, text.split())
    return np.append(np.arange(first, first + length), EOS)


MANY = Shards([[3, 9, 1, 5], [2], [8, 8, 8, 8, 8, 8, 8], [], [1, 2, 3], [6, 30, 4], [7, 7]])  # 7 shards
FEW = Shards([[3, 9, 1, 5, 2, 2, 2, 17, 1], [4] * 14])
LANES = 4


class Exchange:
    def __init__(self, n):
        self.barrier = threading.Barrier(n)
        self.things = [None] * n


class ThreadProcs(Procs):
    """Threads instead of processes."""

    def __init__(self, proc, n_procs, exchange):
        super().__init__(proc, n_procs)
        self.exchange = exchange
        self.swaps = 0

    def gather(self, thing):
        self.exchange.things[self.proc] = thing
        self.exchange.barrier.wait(timeout=20)
        things = list(self.exchange.things)
        self.exchange.barrier.wait(timeout=20)
        return things

    def sum(self, values):
        return np.sum(self.gather(np.array(values, dtype=np.int64)), axis=0)

    def max(self, values):
        return np.max(self.gather(np.array(values, dtype=np.int64)), axis=0)

    def swap(self, rows, width):
        self.swaps += 1
        parts = [part[self.proc] for part in self.gather(rows) if self.proc in part]
        return np.concatenate([*parts, np.empty((0, width), np.int64)])


def on(n_procs, function):
    """Call function(procs) as each of `n_procs` processes; return the results, exceptions among them."""
    exchange = Exchange(n_procs)
    results = [None] * n_procs

    def run(proc):
        try:
            results[proc] = function(ThreadProcs(proc, n_procs, exchange))
        except Exception as error:
            results[proc] = error

    threads = [threading.Thread(target=run, args=(proc,)) for proc in range(n_procs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "deadlock"
    return results


@pytest.fixture
def data(tmp_path):
    return DataConfig(seq_len=8, lanes=LANES, cache_dir=str(tmp_path), workers=2)


def make(procs, source, data, state=None, **options):
    settings = {"pad_id": PAD, "eos_id": EOS, "seed": 5, "global_batch": 12, "epochs": 1, **options}
    return Loader(source, encode, data, procs=procs, state=state, **settings)


def drain(loader, steps=None):
    return list(islice(iter(loader.next, None), steps))


def deliver(n_procs, source, data, steps=None, **options):
    """Return the global batches (sorted rows), the state after them, and the loaders' common `dropped`."""

    def run(procs):
        loader = make(procs, source, data, **options)
        batches = drain(loader, steps)
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        return batches, state, loader.dropped

    results = on(n_procs, run)
    for result in results:
        if isinstance(result, Exception):
            raise result
    parts = list(zip(*(batches for batches, _, _ in results), strict=True))
    for batch in parts:
        whole = np.concatenate([part.ids for part in batch])
        assert len({len(part.ids) for part in batch}) == 1
        assert {part.tokens for part in batch} == {(whole != PAD).sum()}
        assert {part.targets for part in batch} == {(whole[:, 1:] != PAD).sum()}
    (state,) = {json.dumps(state, sort_keys=True) for _, state, _ in results}
    (dropped,) = {dropped for _, _, dropped in results}
    return [rows(*(part.ids for part in batch)) for batch in parts], json.loads(state), dropped


def rows(*parts):
    return sorted(map(tuple, np.concatenate(parts).tolist()))


def counted(batches):
    """How often each id but pad and eos was delivered."""
    return Counter(i for batch in batches for row in batch for i in row if i not in (PAD, EOS))


def in_order(source, data, epochs, flush=False):
    """The simple twin: the sequences of a run, one lane after another, without threads or processes."""
    if len(source.names) < data.lanes:
        source = indexed(source, Path(data.cache_dir))
    deal = Deal(source, data.lanes, 5)
    form = {"seq_len": data.seq_len, "pad_id": PAD, "eos_id": EOS, "packed": data.sequences == "pack"}
    lanes = [iter(Lane(i, deal, encode, epochs=epochs, flush=flush, **form)) for i in range(data.lanes)]
    for _ in range(epochs):
        opened = list(lanes)
        while opened:
            for lane in list(opened):
                row = next(lane).row
                if row is None:
                    opened.remove(lane)
                else:
                    yield tuple(row.tolist())


@pytest.mark.parametrize("source", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("sequences", ["pad", "pack"])
@pytest.mark.parametrize("batch", [12, 24])
def test_same_batches_on_any_number_of_processes(source, sequences, batch, data):
    data.sequences = sequences
    expected = list(in_order(source, data, 3))
    for n_procs in PROCS:
        batches, _, dropped = deliver(n_procs, source, data, epochs=3, global_batch=batch)
        assert batches == [
            sorted(expected[k : k + batch]) for k in range(0, len(expected) - batch + 1, batch)
        ]
        assert dropped == len(expected) % batch


@pytest.mark.parametrize("source", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("sequences", ["pad", "pack"])
@pytest.mark.parametrize("n_procs", PROCS)
def test_every_document_once_in_a_pass(source, sequences, n_procs, data):
    data.sequences = sequences
    batches, _, dropped = deliver(n_procs, source, data, drop_last=False)
    assert dropped == 0
    texts = [text for shard in range(len(source.names)) for text in source.read(shard)]
    kept = (lambda ids: ids[:7] if len(ids) > 8 else ids) if sequences == "pad" else (lambda ids: ids)
    assert counted(batches) == Counter(i for text in texts for i in kept(encode(text)).tolist() if i != EOS)
    assert sum(EOS in row for batch in batches for row in batch) > 0
    assert all(len(batch) == 12 for batch in batches)


@pytest.mark.parametrize("source", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("sequences", ["pad", "pack"])
def test_goes_on_after_any_batch_on_another_number_of_processes(source, sequences, data):
    data.sequences = sequences
    options = {"epochs": 6}
    whole, end, dropped = deliver(2, source, data, **options)
    assert len(whole) > 5
    for step in range(len(whole) + 1):
        before, after = PROCS[step % 4], PROCS[(step + 1 + step // 4) % 4]
        first, state, _ = deliver(before, source, data, step, **options)
        nothing, again, _ = deliver(after, source, data, 0, state=state, **options)
        assert again == state
        assert nothing == []
        rest, last, dropped_then = deliver(before, source, data, state=again, **options)
        assert first + rest == whole
        assert last == end
        assert dropped_then == dropped


def test_fewer_slots_than_lanes(data):
    data.lanes = 7
    expected = list(in_order(MANY, data, 2))
    for n_procs in (1, 2):
        batches, state, _ = deliver(n_procs, MANY, data, 5, epochs=2, global_batch=4)
        rest, _, _ = deliver(3 - n_procs, MANY, data, state=state, epochs=2, global_batch=4)
        assert batches + rest == [sorted(expected[k : k + 4]) for k in range(0, len(expected) - 3, 4)]


def test_passes_differ_and_a_partial_batch_carries_over(data):
    batches, _, dropped = deliver(2, FEW, data, epochs=2)  # 23 sequences a pass
    assert (len(batches), dropped) == (3, 46 - 36)
    everything = [row for batch in batches for row in batch]
    twin = list(in_order(FEW, data, 2))
    assert twin[:23] != twin[23:]
    assert sorted(twin[:23]) == sorted(twin[23:])
    assert Counter(everything) == Counter(twin[:36])


def test_evaluation_fills_the_last_batch_with_pad(data):
    batches, _, dropped = deliver(4, FEW, data, drop_last=False)
    assert (len(batches), dropped) == (2, 0)
    assert batches[1].count((PAD,) * 8) == 1


def test_the_end_is_the_end(data):
    def run(procs):
        loader = make(procs, FEW, data)
        drain(loader)
        state, dropped = loader.state_dict(), loader.dropped
        assert loader.next() is None
        assert (loader.state_dict(), loader.dropped) == (state, dropped)
        loader.close()
        return dropped

    assert on(3, run) == [11, 11, 11]


def test_more_epochs_go_on_with_what_was_left(data):
    _, state, dropped = deliver(2, FEW, data, epochs=1)
    assert dropped == 11
    rest, _, _ = deliver(1, FEW, data, state=state, epochs=2)
    assert [row for batch in rest for row in batch] != []
    whole, _, _ = deliver(1, FEW, data, epochs=2)
    assert rest == whole[1:]


def test_rows_travel_only_where_a_reader_has_too_many(data):
    def run(procs):
        loader = make(procs, Shards([[1] * 50] * LANES), data)
        drain(loader, 3)
        loader.close()
        return procs.swaps

    assert on(1, run) == [0]
    assert on(2, run) == [0, 0]
    assert on(4, run) == [0, 0, 0, 0]
    assert on(3, run) == [3, 3, 3]


def test_flags_are_agreed_on(data):
    def run(procs):
        loader = make(procs, FEW, data, epochs=None)
        flags = [loader.next(lambda flag=flag: flag).flag for flag in (0, 3 * procs.proc, 0)]
        assert loader.wait_ms >= 0
        loader.close()
        return flags

    assert on(3, run) == [[0, 6, 0]] * 3


@pytest.mark.parametrize("n_procs", PROCS)
def test_broken_document_ends_all_processes_at_the_batch_that_needs_it(n_procs, data):
    source = Shards([[1] * 20, [1] * 20, [1] * 10 + [None], [1] * 20])

    def run(procs):
        loader = make(procs, source, data)
        batches = drain(loader, 3)
        with pytest.raises(DataError) as first:
            loader.next()
        with pytest.raises(DataError):
            loader.next()
        state = loader.state_dict()
        loader.close()
        return len(batches), str(first.value), state["positions"][0]["document"]

    assert on(n_procs, run) == [(3, "t2, line 11: is broken. Mend it.", 9)] * n_procs


class Panic(BaseException):
    """What a bug in the Rust of a tokenizer raises."""


@pytest.mark.parametrize("bug", [ZeroDivisionError("a bug"), Panic("a bug")])
def test_bug_in_a_thread_shows_where_it_happened_and_ends_the_others(data, bug):
    def read(*_):
        raise bug

    def run(procs):
        source = Shards([[1] * 5] * 4)
        if procs.proc == 1:
            source.read = read
        return make(procs, source, data).next()

    own, other = on(2, run)[::-1]
    assert own is bug or repr(own) == f"RuntimeError({repr(bug)!r})"
    assert isinstance(other, DataError)
    assert "a bug" in str(other)


def test_processes_that_wait_for_data_stop_together_and_lose_nothing(data):
    source, blocked = Shards([[1] * 20] * 4), Shards([[1] * 20] * 4)
    gate = threading.Event()

    def read(shard, start=0):
        yield from islice(source.read(shard), 8)  # enough for two batches
        gate.wait()

    blocked.read = read

    def run(procs):
        loader = make(procs, blocked if procs.proc == 1 else source, data)
        batches = drain(loader, 2)
        with pytest.raises(Stopped) as stop:
            loader.next(lambda: 7 * (procs.proc == 0))
        gate.set()
        loader.close()
        return [batch.ids for batch in batches], loader.state_dict(), stop.value.flag

    (first, state, flag), (second, _, other) = on(2, run)
    assert flag == other == 7
    ours = [rows(*parts) for parts in zip(first, second, strict=True)]
    assert len(ours) == 2
    assert ours + deliver(1, source, data, state=state)[0] == deliver(1, source, data)[0]


@pytest.mark.parametrize("sequences", ["pad", "pack"])
def test_pass_without_a_sequence_is_an_error(sequences, data):
    data.sequences = sequences
    source = Shards([[]] * 4) if sequences == "pad" else Shards([[2]] * 4)
    results = on(2, lambda procs: make(procs, source, data, epochs=None).next())
    assert all(isinstance(result, DataError) and "not a single sequence" in str(result) for result in results)


def test_what_one_process_cannot_open_ends_all(data):
    broken = Shards([[1, None]])
    results = on(2, lambda procs: make(procs, [FEW, broken][procs.proc], data))
    assert all(isinstance(result, DataError) and "see different shards" in str(result) for result in results)
    results = on(2, lambda procs: make(procs, broken, data))
    assert all(isinstance(result, DataError) and "line 2" in str(result) for result in results)


def test_state_of_another_deal_is_refused(data):
    _, state, _ = deliver(1, MANY, data, 1)
    with pytest.raises(ConfigError, match=r"train\.seed=6: .*with 5"):
        make(Procs(), MANY, data, state, seed=6)
    with pytest.raises(ConfigError, match="the shards of"):
        make(Procs(), Shards(MANY.lengths, "u"), data, state)
    data.lanes = 3
    with pytest.raises(ConfigError, match=r"data\.lanes=3: .*with 4"):
        make(Procs(), MANY, data, state)


@pytest.mark.parametrize("n_procs", [1, 3])
def test_one_worker_and_no_read_ahead_suffice(n_procs, data):
    data.workers = data.prefetch = 1
    expected, _, _ = deliver(1, MANY, data, epochs=3)
    data.prefetch = 0
    assert deliver(n_procs, MANY, data, epochs=3)[0] == expected


def test_full_queues_do_not_keep_a_worker_from_the_lane_that_is_needed(data):
    data.workers, data.lanes = 1, 2
    lengths = [[1] * 1000, [1] * 1000]
    batches, _, _ = deliver(1, Shards(lengths), data, 20, epochs=None)
    assert len(batches) == 20


def test_close_ends_the_threads(data):
    before = threading.active_count()
    loader = make(Procs(), FEW, data, epochs=None)
    assert threading.active_count() == before + 2
    loader.next()
    loader.close()
    assert threading.active_count() == before


class WordTokenizer:
    pad_id, eos_id, size = PAD, EOS, 1000

    def encode(self, text):
        return np.array([*map(int, text.split()), EOS])


def test_build_loader_follows_the_configuration(tmp_path):
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"{i} {i}"}) for i in range(2, 50)]
        (tmp_path / f"c4-{split}.json").write_text("\n".join(lines))
    data = DataConfig(source="files", path=str(tmp_path), cache_dir=str(tmp_path), seq_len=4, lanes=4)
    config = Config(data=data)
    config.train.global_batch = 10

    def first(split, seed, steps=1):
        config.train.seed = seed
        loader = build_loader(config, split, Procs(), WordTokenizer())
        batches = drain(loader, steps)
        loader.close()
        return [batch.ids.tolist() for batch in batches]

    assert first("train", 1) != first("train", 2)
    assert len(first("train", 1, 9)) == 9
    assert first("validation", 1) == first("validation", 2)
    assert len(first("validation", 1, None)) == 5
    data.epochs = 1
    assert len(first("train", 1, None)) == 4
    data.validation_path = str(tmp_path / "none")
    with pytest.raises(DataError, match="validation"):
        build_loader(config, "validation", Procs(), WordTokenizer())


def test_build_loader_passes_tokens_through_and_bounds_them(tmp_path, monkeypatch):
    class Tokens:
        names, counts, vocab_size = ["a"], [3], None

        def read(self, shard, start=0):
            return iter([self.document(0, i) for i in range(start, 3)])

        def document(self, shard, index):
            assert self.vocab_size == 1000
            return np.array([7, 8, EOS], np.uint16)

    monkeypatch.setattr("lrpretrain.data.loader.open_source", lambda data, split: Tokens())
    config = Config(data=DataConfig(source="tokens", path=str(tmp_path), seq_len=4, lanes=2))
    config.train.global_batch = 3
    loader = build_loader(config, "train", Procs(), WordTokenizer())
    assert loader.next().ids.tolist() == [[7, 8, EOS, PAD]] * 3
    loader.close()
