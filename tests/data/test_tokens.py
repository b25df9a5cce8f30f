"""Pre-tokenised shards: the rows of the text, and no silence about what is missing or broken."""

import gzip
import json

import numpy as np
import pytest

from lrpretrain.config import DataConfig
from lrpretrain.data import tokenizer, tokens
from lrpretrain.data.inputs import open_source
from lrpretrain.data.loader import Loader
from lrpretrain.data.sources import FileShards, IndexedSource, indexed
from lrpretrain.errors import DataError
from lrpretrain.sharding.procs import Procs

SHARD, DOCUMENTS = 3, 40


def text(shard, i):
    return f"document {i} of shard {shard} tells of {'many ' * (i * 7 % 23)}things.\nEnd."


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    model = tmp_path_factory.mktemp("tokenizer") / "spm.model"
    tokenizer.train([text(s, i) for s in range(SHARD) for i in range(DOCUMENTS)], model, 300)
    return tokenizer.load(str(model), 300)


@pytest.fixture
def source(tmp_path):
    paths = [tmp_path / "text" / f"c4-train.{s}.json.gz" for s in range(SHARD)]
    paths[0].parent.mkdir()
    for s, path in enumerate(paths):
        lines = "".join(json.dumps({"text": text(s, i)}) + "\n" for i in range(DOCUMENTS if s else 1))
        path.write_bytes(gzip.compress(lines.encode()))
    return FileShards(paths)


@pytest.fixture
def folder(source, tok, tmp_path):
    tokens.tokenize(source, source.names, tok, tmp_path / "tokens", "train")
    return tmp_path / "tokens"


def test_the_ids_of_every_document(folder, source, tok):
    shards = tokens.TokenShards(folder, "train")
    assert isinstance(shards, IndexedSource)
    assert shards.names == [f"train-{i:05d}-of-00003.tokens" for i in range(SHARD)]
    assert shards.counts == [1, DOCUMENTS, DOCUMENTS]
    for s in range(SHARD):
        expected = [tok.encode(document).tolist() for document in source.read(s)]
        assert [ids.tolist() for ids in shards.read(s)] == expected
        assert [ids.tolist() for ids in shards.read(s, start=5)] == expected[5:]
        assert [shards.document(s, i).tolist() for i in range(shards.counts[s])] == expected
    assert shards.document(1, 0).dtype == np.int64
    assert (folder / shards.names[1]).stat().st_size == 2 * sum(map(len, shards.read(1)))
    assert sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) == sorted(
        ["tokens.json", *shards.names, *(name.replace(".tokens", ".offsets.npy") for name in shards.names)]
    )


@pytest.mark.parametrize("sequences", ["pad", "pack"])
def test_the_same_batches_as_from_the_text(folder, source, tok, tmp_path, sequences):
    data = DataConfig(sequences=sequences, seq_len=16, lanes=4)

    def batches(documents, encode):
        loader = Loader(
            documents, encode, data, pad_id=0, eos_id=1, seed=3, global_batch=8, procs=Procs(), epochs=2
        )
        result = []
        while batch := loader.next():
            result.append(batch.ids.tolist())
        loader.close()
        return result

    from_text = batches(indexed(source, tmp_path / "cache"), tok.encode)
    assert len(from_text) > 10
    assert batches(tokens.TokenShards(folder, "train"), lambda ids: ids) == from_text


def test_open_source(folder, source, tok):
    tokens.tokenize(source, source.names[:1], tok, folder, "validation")
    data = DataConfig(source="tokens", path=str(folder))
    assert open_source(data, "train").counts == [1, DOCUMENTS, DOCUMENTS]
    assert open_source(data, "validation").counts == [1]


def test_some_shards_and_several_processes(folder, source, tok, tmp_path):
    other = tmp_path / "other"
    tokens.tokenize(source, source.names[1:], tok, other, "train", processes=2)
    for i in range(2):
        one, two = folder / f"train-0000{i + 1}-of-00003.tokens", other / f"train-0000{i}-of-00002.tokens"
        assert one.read_bytes() == two.read_bytes()


def test_an_interrupted_call_is_repeated(source, tok, tmp_path):
    read, failing = [], [2]

    class Breaking(FileShards):
        def read(self, shard, start=0):
            read.append(shard)
            for i, document in enumerate(super().read(shard, start)):
                if shard in failing and i == 20:
                    raise DataError("broken")
                yield document

    breaking = Breaking(source.paths)
    with pytest.raises(DataError, match="broken"):
        tokens.tokenize(breaking, breaking.names, tok, tmp_path / "t", "train")
    with pytest.raises(DataError, match=r"'train' is not complete. Run `lrpretrain tokenize` again"):
        tokens.TokenShards(tmp_path / "t", "train")
    failing.clear()
    tokens.tokenize(breaking, breaking.names, tok, tmp_path / "t", "train")
    assert read == [0, 1, 2, 2]
    assert [len(ids) for ids in tokens.TokenShards(tmp_path / "t", "train").read(2)] == [
        len(tok.encode(document)) for document in source.read(2)
    ]


def test_one_folder_one_tokenizer_one_source(folder, source, tok, tmp_path):
    tokenizer.train([text(0, i) for i in range(30)], tmp_path / "other.model", 295)
    other = tokenizer.load(str(tmp_path / "other.model"), 300)
    with pytest.raises(DataError, match=r"tokenizer='sha256.*another folder"):
        tokens.tokenize(source, source.names, other, folder, "validation")
    with pytest.raises(DataError, match=r"other source shards \(3, now 1\)"):
        tokens.tokenize(source, source.names[:1], tok, folder, "train")
    assert tokens.TokenShards(folder, "train").tokenizer == tok.identity


def test_large_vocabularies_take_four_bytes(source, tmp_path):
    class Large:
        identity, size, pad_id, eos_id = "large", 70_000, 0, 1

        def encode(self, text):
            return np.array([69_999, len(text), self.eos_id])

    tokens.tokenize(source, source.names, Large(), tmp_path / "t", "train")
    shards = tokens.TokenShards(tmp_path / "t", "train")
    assert shards.document(0, 0).tolist() == [69_999, len(text(0, 0)), 1]
    assert (tmp_path / "t" / shards.names[0]).stat().st_size == 12


def test_ids_that_the_model_lacks(folder):
    shards = tokens.TokenShards(folder, "train", vocab_size=300)
    ids = np.fromfile(folder / shards.names[1], np.uint16)
    wrong = len(shards.document(1, 0)) + 2
    ids[wrong] = 300
    ids.tofile(folder / shards.names[1])
    assert tokens.TokenShards(folder, "train").document(1, 1)[2] == 300, (
        "unchecked where no vocabulary is set"
    )
    shards = tokens.TokenShards(folder, "train", vocab_size=300)
    shards.document(1, 0)
    with pytest.raises(
        DataError, match=r"train-00001-of-00003\.tokens, document 1: id 300 .* of 300.*model\.config"
    ):
        list(shards.read(1))
    shards.vocab_size = 301
    assert len(list(shards.read(1))) == DOCUMENTS


def test_a_shard_without_documents(source, tok, tmp_path):
    source.paths[0].write_bytes(gzip.compress(b""))
    tokens.tokenize(source, source.names, tok, tmp_path / "t", "train")
    shards = tokens.TokenShards(tmp_path / "t", "train")
    assert shards.counts[0] == 0
    assert list(shards.read(0)) == []


def test_missing_and_broken_files(folder, tmp_path):
    name = "train-00001-of-00003.tokens"
    with pytest.raises(DataError, match=r"no split 'validation' \(it has: train\).*--split validation"):
        tokens.TokenShards(folder, "validation")
    with pytest.raises(DataError, match=r"tokens\.json: it cannot be read.*data\.path"):
        tokens.TokenShards(tmp_path / "nowhere", "train")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes, not {len(whole)}"):
        tokens.TokenShards(folder, "train")
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: the shard is missing.*tokenize` again"):
        tokens.TokenShards(folder, "train")
    (folder / name).write_bytes(whole)
    offsets = folder / name.replace(".tokens", ".offsets.npy")
    np.save(offsets, np.load(offsets)[::-1])
    with pytest.raises(DataError, match="does not fit"):
        tokens.TokenShards(folder, "train").document(1, 0)
    offsets.write_bytes(offsets.read_bytes()[:100])
    with pytest.raises(DataError, match=r"offsets\.npy: it cannot be read"):
        tokens.TokenShards(folder, "train").document(1, 0)


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "not a manifest"), ("[", "not a manifest"), ('{"format": 9}', "format=9")]
)
def test_other_manifests(folder, content, message):
    (folder / "tokens.json").write_text(content)
    with pytest.raises(DataError, match=message):
        tokens.TokenShards(folder, "train")
