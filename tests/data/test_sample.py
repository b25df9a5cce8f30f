"""The embedded corpus, built from small packages that are made here and must never be imported."""

import gzip
import json
import multiprocessing
import sys
import time

import pytest

from lrpretrain.data import sample, tokenizer
from lrpretrain.errors import DataError

NOUNS = ["matrix", "vector", "kernel", "tensor", "layer", "batch", "token", "shard", "lane", "row"]
VERBS = ["adds", "divides", "rotates", "stores", "reads", "writes", "merges", "splits", "sorts", "cuts"]


def sentences(i):
    return [
        f"Here the {noun} {VERBS[i % 10]} with {VERBS[i // 10]} and {verb} calmly."
        for noun, verb in zip(NOUNS, VERBS, strict=True)
    ]


def module(i):
    """Return a module with ten docstrings of its own and one that all share; it cannot be imported."""
    functions = "".join(f'def f{j}():\n    """{line}"""\n' for j, line in enumerate(sentences(i)))
    return f'"""The sentence that all modules share."""\nraise RuntimeError("imported")\n{functions}'


def make_package(root, name, version, modules):
    (root / f"{name}-{version}.dist-info").mkdir(parents=True)
    (root / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    for path, source in {"__init__.py": "raise RuntimeError", **modules}.items():
        (root / name / path).parent.mkdir(parents=True, exist_ok=True)
        (root / name / path).write_text(source)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    root = tmp_path / "site"
    make_package(root, "pkga", "1.2", {f"sub/m{i:03d}.py": module(i) for i in range(100)})
    skipped = {f"{folder}/m.py": module(3) for folder in ["tests", "sub/_vendor"]}
    broken = {"old.py": 'print "no"\n"""' + "A sentence that nobody reads. " * 20 + '"""'}
    make_package(root, "pkgb", "3.4", {"m.py": module(1).replace("calmly", "boldly"), **skipped, **broken})
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    monkeypatch.setattr(sample, "PACKAGES", ["pkga", "pkg_missing", "pkgb"])
    return root


def documents(folder, split):
    shards = sorted(folder.glob(f"c4-{split}.*.json.gz"))
    return [json.loads(line) for shard in shards for line in gzip.open(shard)]


def test_format_is_that_of_c4(packages, tmp_path):
    folder = sample.corpus(tmp_path / "cache")
    names = [f"c4-train.{i:05d}-of-00008.json.gz" for i in range(8)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "c4-validation.00000-of-00001.json.gz"]
    train, validation = documents(folder, "train"), documents(folder, "validation")
    assert len(train) + len(validation) == 101
    assert len(validation) == sum(sample._digest(f"pkga/sub/m{i:03d}.py") % 50 == 0 for i in range(100)) > 0
    for document in train + validation:
        assert set(document) == {"text", "timestamp", "url"}
    by_url = {document["url"]: document["text"] for document in train + validation}
    assert "pypi://pkgb/3.4/pkgb/m.py" in by_url
    assert not any("tests" in url or "_vendor" in url or "old.py" in url for url in by_url)
    assert by_url["pypi://pkga/1.2/pkga/sub/m057.py"].split("\n") == sentences(57)


def test_a_paragraph_comes_once(packages, tmp_path):
    folder = sample.corpus(tmp_path / "cache")
    lines = [
        x
        for split in ("train", "validation")
        for d in documents(folder, split)
        for x in d["text"].split("\n")
    ]
    assert len(lines) == len(set(lines))
    assert lines.count("The sentence that all modules share.") == 1


def test_sentences_that_differ_in_a_name_count_as_one(packages, tmp_path):
    text = module(1).replace("calmly", "boldly")
    (packages / "pkgb" / "n.py").write_text(text.replace("Here", "There").replace("boldly.", "boldly 7."))
    folder = sample.corpus(tmp_path / "cache")
    assert not any(
        d["url"].endswith("pkgb/n.py") for d in documents(folder, "train") + documents(folder, "validation")
    )


def test_same_versions_same_bytes_and_built_once(packages, tmp_path, monkeypatch):
    one, two = sample.corpus(tmp_path / "one"), sample.corpus(tmp_path / "two")
    assert one.name == two.name
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}
    assert all(p.read_bytes()[4:8] == bytes(4) for p in one.iterdir()), "gzip's header has no time"
    before = {p.name: p.stat().st_mtime_ns for p in one.iterdir()}
    assert sample.corpus(tmp_path / "one") == one
    assert {p.name: p.stat().st_mtime_ns for p in one.iterdir()} == before


def test_other_versions_go_elsewhere(packages, tmp_path):
    folder = sample.corpus(tmp_path / "cache")
    (packages / "pkgb-3.4.dist-info" / "METADATA").write_text("Name: pkgb\nVersion: 3.5\n")
    assert sample.corpus(tmp_path / "cache") != folder


def test_an_interrupted_build_starts_again(packages, tmp_path):
    folder = sample.corpus(tmp_path / "cache")
    folder.rename(folder.with_suffix(".part"))
    (folder.with_suffix(".part") / "c4-train.00009-of-00008.json.gz").write_text("rubbish")
    assert len(list(sample.corpus(tmp_path / "cache").iterdir())) == 9


def test_a_missing_package_is_said(packages, tmp_path, caplog):
    with caplog.at_level("INFO", logger="lrpretrain.data.sample"):
        sample.corpus(tmp_path / "cache")
    assert "without pkg_missing, which is not installed" in caplog.text


def test_no_package_at_all(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "PACKAGES", ["pkg_missing"])
    with pytest.raises(DataError, match=r"pkg_missing.*data\.source=files"):
        sample.corpus(tmp_path / "cache")


def build_in_process(arguments):
    root, cache = arguments
    sys.path.insert(0, str(root))
    sample.PACKAGES = ["pkga", "pkgb"]
    built = []
    original = sample._build
    sample._build = lambda *a: (built.append(1), time.sleep(0.2), original(*a))
    return sample.corpus(cache), len(built)


def test_processes_build_once(packages, tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        results = pool.map(build_in_process, [(packages, tmp_path / "cache")] * 3, chunksize=1)
    assert len({folder for folder, _ in results}) == 1
    assert sum(built for _, built in results) == 1


def test_its_tokenizer(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "VOCAB_SIZE", 320)
    model = sample.tokenizer(tmp_path / "cache")
    assert model.parent == sample.corpus(tmp_path / "cache")
    before = model.stat().st_mtime_ns
    assert sample.tokenizer(tmp_path / "cache").stat().st_mtime_ns == before
    tok = tokenizer.load(str(model), 320)
    text = documents(model.parent, "train")[0]["text"]
    assert tok.decode(tok.encode(text)) == text
