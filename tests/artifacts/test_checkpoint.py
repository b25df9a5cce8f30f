"""Checkpoints: what goes in comes out, on another layout too, and what is damaged is found."""

import errno
import json
import pickle

import pytest
import torch
import torch.distributed as dist
from spawn import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lrpretrain.artifacts import checkpoint
from lrpretrain.errors import CheckpointError, DamageError
from lrpretrain.optim import GaLoreAdamW
from lrpretrain.sharding import Piece, hold
from lrpretrain.sharding.procs import Procs

RUN = {"step": 7, "tokens": 70, "data": {}, "random": "", "config": {}}
SHAPES = {"tall": (13, 6), "wide": (6, 13), "norm": (5,), "small": (2, 6)}


def build(place, seed):
    """Return the pieces of a small optimizer that has done a step, laid out by `place`."""
    generator = torch.Generator().manual_seed(seed)
    draws = {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}
    params = {n: torch.nn.Parameter(place(t)) for n, t in draws.items()}
    matrices = [(n, p) for n, p in params.items() if p.dim() == 2]
    groups = [{"params": matrices, "rank": 2}, {"params": [("norm", params["norm"])]}]
    optimizer = GaLoreAdamW(groups, lr=0.1)
    for name, param in params.items():
        param.grad = place(torch.randn(SHAPES[name], generator=generator))
    optimizer.step()
    pieces = {f"model/{n}": hold(n, p).piece for n, p in params.items()}
    return pieces | {f"optim/{n}/{key}": piece for n, key, piece in optimizer.pieces()}


def sharded(tensor):
    return distribute_tensor(tensor, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])


def save_sharded(folder):
    checkpoint.save(folder, build(sharded, seed=0), RUN, Procs.of_default_group())


def load_sharded(path):
    """Load into another optimizer; return this process's tiles."""
    pieces = build(sharded, seed=1)
    checkpoint.load(path, pieces, Procs.of_default_group())
    return {name: [(tile, part.clone()) for tile, part in piece.parts] for name, piece in pieces.items()}


def test_any_layout_reads_back_what_another_wrote_bit_for_bit(tmp_path):
    whole = build(torch.clone, seed=0)
    spawn(save_sharded, 3, tmp_path)
    path = tmp_path / "step_00000007"
    alone = build(torch.clone, seed=1)
    checkpoint.load(path, alone, Procs())
    # The step was done on other layouts: equal to rounding; what is moved is equal to the bit.
    for name, piece in whole.items():
        torch.testing.assert_close(alone[name].tensor, piece.tensor, rtol=1e-4, atol=1e-5)
    checkpoint.save(tmp_path / "alone", alone, RUN, Procs())
    for pieces in spawn(load_sharded, 2, tmp_path / "alone" / "step_00000007"):
        for name, parts in pieces.items():
            for tile, part in parts:
                spans = tuple(tile.span(d) for d in range(part.dim()))
                assert torch.equal(part, alone[name].tensor[spans]), name


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(tmp_path, build(torch.clone, seed=0), RUN, Procs())


def test_load_and_save_again_is_the_same(saved, tmp_path):
    pieces = build(torch.clone, seed=1)
    checkpoint.load(saved, pieces, Procs())
    original = build(torch.clone, seed=0)
    assert all(torch.equal(pieces[n].tensor, p.tensor) for n, p in original.items())
    again = checkpoint.save(tmp_path / "again", pieces, RUN, Procs())
    assert checkpoint.read_index(again) == checkpoint.read_index(saved)
    assert checkpoint.read_run(again) == RUN


def damage(file, how):
    """Flip a bit in the middle of a file, cut its last byte off, or remove it."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "remove":
        file.unlink()
    else:
        file.write_bytes(content if how == "flip" else content[:-1])


FILES = ["tensors/__0_0.distcp", "tensors/index.json", "run.json"]


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(saved, name, how):
    assert sorted(checkpoint.read_manifest(saved)["files"]) == sorted(FILES)
    damage(saved / name, how)
    with pytest.raises(DamageError, match=rf"{saved} is damaged: {name} is (missing|not as it was)"):
        checkpoint.load(saved, build(torch.clone, seed=1), Procs())


def flipped_bits(content):
    """Yield a file's content with one bit of each byte flipped, another one each time."""
    for i in range(len(content)):
        yield content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :]


def test_a_manifest_with_a_flipped_bit_is_refused_or_says_the_same(saved):
    manifest = (saved / "manifest.json").read_bytes()
    files, refused = checkpoint.read_manifest(saved)["files"], []
    for content in flipped_bits(manifest):
        (saved / "manifest.json").write_bytes(content)
        try:
            checkpoint.check(saved, Procs())
            assert checkpoint.read_manifest(saved)["files"] == files
        except CheckpointError as error:
            refused.append(str(error))
    # A flipped format looks like that of another version.
    assert all("is damaged" in text or "has format" in text for text in refused)
    assert len(refused) > len(json.dumps(files)) / 2
    for content in (b"", b"[]", b"null", b"{}", b'{"format": 2, "files": 3}', b'{"format": 2, "files": {}}'):
        (saved / "manifest.json").write_bytes(content)
        with pytest.raises(DamageError, match=r"manifest\.json"):
            checkpoint.check(saved, Procs())


def test_no_pickle_is_read(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle is read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    checkpoint.load(saved, build(torch.clone, seed=1), Procs())
    assert not (saved / "tensors" / ".metadata").exists()


@pytest.fixture
def three(tmp_path):
    """The folders of three checkpoints, the newest first."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, build(torch.clone, seed=0), RUN | {"step": step}, Procs())
    return checkpoint.complete(tmp_path)


def test_the_newest_intact_one_is_found(three):
    assert checkpoint.find_intact(three, Procs()) == (three[0], [])
    damage(three[0] / "run.json", "flip")
    (three[1] / "manifest.json").write_text("{")
    found, wrong = checkpoint.find_intact(three, Procs())
    assert found == three[2]
    for path, name, line in zip(three, ("run.json", "manifest.json"), wrong, strict=False):
        assert line.startswith(f"{path} is damaged: {name} "), line
    damage(three[2] / "tensors" / "index.json", "remove")
    with pytest.raises(DamageError, match=r"(?s)run\.json.*manifest\.json.*index\.json.*No intact"):
        checkpoint.find_intact(three, Procs())
    assert checkpoint.find_intact([], Procs()) == (None, [])


def test_another_format_is_refused_before_older_checkpoints_are_tried(three):
    damage(three[0] / "run.json", "flip")
    for version in (1, 99):
        (three[1] / "manifest.json").write_text(json.dumps({"format": version}))
        with pytest.raises(CheckpointError, match=f"has format {version}") as caught:
            checkpoint.find_intact(three, Procs())
        assert not isinstance(caught.value, DamageError)


def test_what_is_kept(tmp_path):
    pieces = build(torch.clone, seed=0)
    half = tmp_path / "step_00000005"
    (half / "tensors").mkdir(parents=True)
    stranger = tmp_path / "step_00000002_copy"
    stranger.mkdir()
    kept = []
    for step in (2, 4, 6, 8, 10):
        path = checkpoint.save(tmp_path, pieces, RUN | {"step": step}, Procs())
        checkpoint.prune(path, 2, keep_every=4)
        kept.append([checkpoint.step_of(p) for p in checkpoint.complete(tmp_path)])
        assert half.exists() == (step < 6)
    assert kept == [[2], [4, 2], [6, 4], [8, 6, 4], [10, 8, 4]]
    # A run that went back leaves what lies ahead, and does not count it.
    checkpoint.prune(checkpoint.save(tmp_path, pieces, RUN | {"step": 7}, Procs()), 1, keep_every=0)
    assert [checkpoint.step_of(p) for p in checkpoint.complete(tmp_path)] == [10, 8, 7]
    assert stranger.exists()


def test_what_is_incomplete_newer_or_of_another_model_is_refused(saved):
    pieces = build(torch.clone, seed=1)
    wrong = pieces | {"model/norm": Piece.whole(torch.zeros(6))}
    with pytest.raises(CheckpointError, match=r"another model.*model/norm: \(5,\).*\(6,\)"):
        checkpoint.load(saved, wrong, Procs())
    with pytest.raises(CheckpointError, match="model/tall"):
        checkpoint.load(saved, {n: p for n, p in pieces.items() if n != "model/tall"}, Procs())
    manifest = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.load(saved, pieces, Procs())
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest.json"):
        checkpoint.load(saved, pieces, Procs())
    assert checkpoint.complete(saved.parent) == []


def test_the_newest_are_kept_and_a_half_written_one_is_written_anew(tmp_path):
    pieces = build(torch.clone, seed=0)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, pieces, RUN | {"step": step}, Procs())
    (tmp_path / "step_00000003" / "manifest.json").unlink()
    checkpoint.save(tmp_path, pieces, RUN | {"step": 3}, Procs())
    checkpoint.prune(tmp_path / "step_00000003", 2, 0)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_00000003", "step_00000002"]
    assert not (tmp_path / "step_00000001").exists()
    checkpoint.prune(tmp_path / "step_00000003", 0, 0)
    assert len(checkpoint.complete(tmp_path)) == 2


def test_a_checkpoint_is_replaced_by_a_whole_one_only(saved, tmp_path, monkeypatch):
    pieces = build(torch.clone, seed=0)
    before = checkpoint.read_manifest(saved)

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*Make room"):
            checkpoint.save(tmp_path, pieces, RUN | {"tokens": 71}, Procs())
    assert checkpoint.read_manifest(saved) == before
    checkpoint.check(saved, Procs())
    in_the_way = saved.with_suffix(".old")
    in_the_way.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(tmp_path, pieces, RUN | {"tokens": 71}, Procs())
    checkpoint.check(saved, Procs())
    in_the_way.unlink()
    checkpoint.save(tmp_path, pieces, RUN | {"tokens": 71}, Procs())
    assert checkpoint.read_run(saved)["tokens"] == 71
    assert list(tmp_path.iterdir()) == [saved]


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(tmp_path / "file", build(torch.clone, seed=0), RUN, Procs())
