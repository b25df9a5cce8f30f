"""Shards on disk: what is read, what is skipped, what is refused; random access through the cache."""

import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from lrpretrain.config import DataConfig
from lrpretrain.data import sources
from lrpretrain.data.inputs import open_source
from lrpretrain.data.sources import FileShards, IndexedSource, cache_dir, indexed
from lrpretrain.errors import ConfigError, DataError


def write(path, texts, blanks=False):
    lines = [json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"}) for text in texts]
    content = ("\n\n" if blanks else "\n").join(lines) + ("\n\n\n" if blanks else "\n")
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.fixture(params=[1 << 18, 7], ids=["large blocks", "blocks of 7 bytes"])
def block(request, monkeypatch):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl"])
@pytest.mark.parametrize("blanks", [False, True])
def test_reads_from_any_document_on(tmp_path, name, blanks):
    texts = [f"document {i} with ümlauts\nand a line" for i in range(20)]
    shards = FileShards([write(tmp_path / name, texts, blanks)])
    assert shards.names == [name]
    for start in (0, 1, 7, 19, 20, 25):
        assert list(shards.read(0, start)) == texts[start:]


@pytest.mark.usefixtures("block")
def test_last_line_may_lack_its_end_and_members_may_follow_each_other(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"te') + gzip.compress(b'xt": "b"}\n{"text": ""}'))
    assert list(FileShards([path]).read(0)) == ["a", "b", ""]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "b"', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b'["b"]', "is not a JSON object but list"),
        (b'{"url": "b"}', "no string `text`"),
        (b'{"text": 3}', "no string `text`"),
    ],
)
def test_broken_line_is_named(tmp_path, line, reason):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n\n' + line + b"\n"))
    documents = FileShards([path]).read(0)
    assert next(documents) == "a"
    with pytest.raises(DataError, match=rf"a\.json\.gz, line 3: .*{reason}.*mend the line"):
        next(documents)


def test_broken_gzip_and_missing_shard_are_named(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    path = tmp_path / "a.json.gz"
    for content in (whole[:-20], b"", b"no gzip at all", whole[:30] + b"\xff" * 30 + whole[60:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.json\.gz: .*again"):
            list(FileShards([path]).read(0))
    path.unlink()
    with pytest.raises(DataError, match=r"a\.json\.gz: the shard is missing.*data\.path"):
        list(FileShards([path]).read(0))


def test_indexed_gives_the_same_documents_and_unpacks_once(tmp_path, monkeypatch):
    texts = [["a", "", "lone \ud800 surrogate", "ü"], [], ["b\n", "c"]]
    shards = FileShards([write(tmp_path / f"{i}.json.gz", part) for i, part in enumerate(texts)])
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: indexed(shards, tmp_path / "cache"), range(4)))
    for source in opened:
        assert isinstance(source, IndexedSource)
        assert source.names == shards.names
        assert source.counts == [4, 0, 2]
        assert [[source.document(i, j) for j in range(n)] for i, n in enumerate(source.counts)] == texts
    assert indexed(opened[0], tmp_path / "other") is opened[0]
    monkeypatch.setattr(shards, "read", lambda *_: pytest.fail("unpacked again"))
    assert indexed(shards, tmp_path / "cache").counts == [4, 0, 2]


def test_indexed_notices_another_content_and_leaves_nothing_half_done(tmp_path):
    path = write(tmp_path / "a.json", ["a"])
    assert indexed(FileShards([path]), tmp_path / "cache").document(0, 0) == "a"
    write(path, ["b"])
    os.utime(path, ns=(1, 1))
    assert indexed(FileShards([path]), tmp_path / "cache").document(0, 0) == "b"
    path.write_text('{"text": "c"}\n{"te')
    for _ in range(2):
        with pytest.raises(DataError, match="line 2"):
            indexed(FileShards([path]), tmp_path / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be unpacked .*data\.cache_dir"):
        indexed(FileShards([write(path, ["d"])]), tmp_path / "file" / "cache")


def test_files_are_split_by_name(tmp_path, monkeypatch):
    for name in ("c4-train.1.json.gz", "c4-train.0.json.gz", "c4-validation.0.json.gz", "notes.txt"):
        write(tmp_path / name, ["x"])
    trained = ["c4-train.0.json.gz", "c4-train.1.json.gz"]
    for path in (tmp_path, f"{tmp_path}/*", f"{tmp_path}/*.gz", f"{tmp_path}/c4-train*"):
        data = DataConfig(source="files", path=str(path))
        assert open_source(data, "train").names == trained
        assert open_source(data, "validation").names == ["c4-validation.0.json.gz"]
    held_out = DataConfig(source="files", path=str(tmp_path), validation_path=f"{tmp_path}/*n.1.*")
    assert open_source(held_out, "train").names == trained[:1]
    assert open_source(held_out, "validation").names == trained[1:]
    monkeypatch.chdir(tmp_path)
    assert open_source(DataConfig(source="files", path="c4-train.*"), "validation").names


def test_files_that_are_not_there_are_reported(tmp_path):
    write(tmp_path / "c4-train.0.json.gz", ["x"])
    data = DataConfig(source="files", path=str(tmp_path))
    with pytest.raises(DataError, match=r"no validation shards.*data\.validation_path"):
        open_source(data, "validation")
    with pytest.raises(DataError, match=r"data\.path=.*no train shards"):
        open_source(DataConfig(source="files", path=f"{tmp_path}/*.jsonl"), "train")
    with pytest.raises(DataError, match=r"data\.validation_path=.*no validation shards"):
        open_source(DataConfig(source="files", path=str(tmp_path), validation_path="/nowhere"), "validation")
    for source in ("files", "tokens"):
        with pytest.raises(ConfigError, match=r"data\.path=None"):
            open_source(DataConfig(source=source), "train")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LRPRETRAIN_CACHE", raising=False)
    assert cache_dir(DataConfig()) == tmp_path / ".cache/lrpretrain"
    monkeypatch.setenv("LRPRETRAIN_CACHE", "/elsewhere")
    assert str(cache_dir(DataConfig())) == "/elsewhere"
    assert cache_dir(DataConfig(cache_dir="~/mine")) == tmp_path / "mine"
