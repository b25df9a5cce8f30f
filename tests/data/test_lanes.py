"""What a lane reads, how it makes rows of it, and that a position is all it takes to go on."""

import json
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch

from lrpretrain.data.lanes import Deal, Lane, Position
from lrpretrain.data.pack import document_mask, pad
from lrpretrain.data.shuffle import Shuffle

PAD, EOS = 0, 1


class Shards:
    """Documents in memory: number d of shard s is the ids 100s + d + 2 repeated, and eos."""

    def __init__(self, lengths):
        self.names = [f"shard{i}" for i in range(len(lengths))]
        self.documents = [
            [np.array([100 * s + d + 2] * n + [EOS]) for d, n in enumerate(part)]
            for s, part in enumerate(lengths)
        ]

    def read(self, shard, start=0):
        return iter(self.documents[shard][start:])


class IndexedShards(Shards):
    @property
    def counts(self):
        return [len(part) for part in self.documents]

    def document(self, shard, index):
        return self.documents[shard][index]


def lane(source, number=0, lanes=1, seed=0, **options):
    settings = {"seq_len": 5, "pad_id": PAD, "eos_id": EOS, "epochs": 1, **options}
    return Lane(number, Deal(source, lanes, seed), lambda ids: ids, **settings)


def firsts(items):
    return [int(item.row[0]) for item in items if item.row is not None]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 16, 17, 1000])
def test_shuffle_is_a_permutation_of_its_own_for_each_key(n):
    orders = [list(Shuffle(n, seed, "x", epoch)) for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len(set(map(tuple, orders))) == (9 if n > 10 else len(set(map(tuple, orders))))
    assert list(Shuffle(n, 0, "x", 0)) == orders[0]


def test_shuffle_has_no_favourites():
    seen = Counter(tuple(Shuffle(4, seed)) for seed in range(4800))
    assert len(seen) == 24
    assert max(seen.values()) < 270  # 200 each; five standard deviations are 70
    assert min(seen.values()) > 130
    order = np.array(list(Shuffle(5000, 1)))
    neighbours = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(neighbours) < 0.05
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.05


def test_pad_cuts_but_keeps_eos():
    ids = np.array([5, 6, 7, EOS])
    assert pad(ids, 6, PAD, EOS).tolist() == [5, 6, 7, EOS, PAD, PAD]
    assert pad(ids, 4, PAD, EOS).tolist() == [5, 6, 7, EOS]
    assert pad(ids, 3, PAD, EOS).tolist() == [5, 6, EOS]


def test_document_mask_is_causal_within_documents():
    mask = document_mask(torch.tensor([[5, EOS, 6, 7]]), EOS)
    assert mask.shape == (1, 1, 4, 4)
    assert mask.dtype == torch.bool
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask[0, 0].int().tolist() == expected


@pytest.mark.parametrize(
    ("source", "lanes"),
    [
        (Shards([[1] * n for n in (3, 0, 5, 2, 4)]), 2),
        (IndexedShards([[1] * n for n in (3, 0, 5, 2, 4)]), 2),
        (IndexedShards([[1] * n for n in (30, 0, 11)]), 4),
        (IndexedShards([[1, 1]]), 3),
    ],
)
def test_lanes_share_out_every_document_once_in_every_pass(source, lanes):
    everything = sorted(int(ids[0]) for part in source.documents for ids in part)
    passes = []
    for epoch in range(3):
        read = [
            firsts(lane(source, i, lanes, position=Position(epoch), epochs=epoch + 1)) for i in range(lanes)
        ]
        assert sorted(chain(*read)) == everything
        passes.append(read)
    if len(everything) > 10:
        assert passes[0] != passes[1] != passes[2]
        other = [firsts(lane(source, i, lanes, seed=1)) for i in range(lanes)]
        assert other != passes[0]


def test_lane_owns_the_same_shards_in_every_pass_and_others_with_another_seed():
    source = Shards([[1, 1]] * 9)
    orders = [firsts(lane(source, 1, 2, position=Position(epoch), epochs=epoch + 1)) for epoch in range(5)]
    assert len({frozenset(order) for order in orders}) == 1
    assert len({tuple(order) for order in orders}) > 1
    owned = {frozenset(firsts(lane(source, 1, 2, seed=seed))) for seed in range(5)}
    assert len(owned) > 1
    assert all(b == a + 1 for order in orders for a, b in zip(order[::2], order[1::2], strict=True))


def test_indexed_shards_are_read_in_a_new_order_within():
    orders = [firsts(lane(IndexedShards([[1] * 20]), position=Position(e), epochs=e + 1)) for e in range(2)]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_padded_rows_hold_one_document_each():
    rows = [item.row.tolist() for item in lane(Shards([[2, 9]])) if item.row is not None]
    assert rows == [[2, 2, EOS, PAD, PAD], [3, 3, 3, 3, EOS]]


def test_packed_rows_run_on_over_documents_and_passes():
    items = list(lane(Shards([[2, 9]]), packed=True, epochs=2))  # 3 + 10 ids a pass
    pass_ = [2, 2, EOS, *[3] * 9, EOS]
    rows = [None if item.row is None else item.row.tolist() for item in items]
    stream = pass_ * 2
    assert rows == [stream[:5], stream[5:10], None, stream[10:15], stream[15:20], stream[20:25], None]
    assert items[-1].position.leftover.tolist() == stream[25:]
    flushed = list(lane(Shards([[2, 9]]), packed=True, epochs=2, flush=True))
    assert flushed[-2].row.tolist() == [EOS, PAD, PAD, PAD, PAD]
    assert flushed[-1].row is None
    assert len(flushed) == len(items) + 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(
    "source", [Shards([[3, 17], [], [1, 1, 4]]), IndexedShards([[3, 17], [2, 8]])], ids=["files", "indexed"]
)
def test_goes_on_from_any_position(source, packed, flush):
    options = {"packed": packed, "flush": flush, "epochs": 3}
    lanes = 1 if type(source) is Shards else 3
    whole = list(lane(source, lanes=lanes, **options))
    assert sum(item.row is None for item in whole) == 3
    for i, item in enumerate(whole):
        position = Position.from_json(json.loads(json.dumps(item.position.as_json())))
        rest = list(lane(source, lanes=lanes, position=position, **options))
        assert [str(other) for other in rest] == [str(other) for other in whole[i + 1 :]]


def test_passes_are_not_bounded_without_epochs():
    marks = [item for item in islice(lane(Shards([[1]]), epochs=None), 100) if item.row is None]
    assert [item.position.epoch for item in marks] == list(range(1, 51))
