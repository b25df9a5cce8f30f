"""The embedded corpus: English technical prose from the docstrings of installed packages.

It lets everything run without a network. A document is the prose of one module, and the files look
like C4's. They are read as text: no package is imported.
"""

from __future__ import annotations

import ast
import gc
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from lrpretrain.data import prose
from lrpretrain.data import tokenizer as tokenizers
from lrpretrain.data.sources import FileShards
from lrpretrain.errors import DataError

FORMAT = 1  # raise it whenever the same packages give other documents
PACKAGES = [
    "torch",
    "transformers",
    "sympy",
    "pandas",
    "networkx",
    "numpy",
    "huggingface_hub",
    "deepspeed",
    "datasets",
    "mpmath",
    "tensorboard",
]
SKIPPED_FOLDERS = {"_vendor", "third_party", "ext", "test", "tests", "testing", "_testing", "benchmarks"}
TRAIN_SHARDS = 8
VALIDATION_ONE_IN = 50
SHORTEST_DOCUMENT = 200  # characters
VOCAB_SIZE = 4000
TOKENIZER_CHARS = 4_000_000
TIMESTAMP = "2024-01-01T00:00:00Z"  # C4 has one; a fixed one keeps the files the same

_log = logging.getLogger(__name__)


def corpus(cache_dir: Path) -> Path:
    """Return the folder of the embedded corpus, built on first use (20 s).

    It holds ``c4-train.0000i-of-00008.json.gz`` and ``c4-validation.00000-of-00001.json.gz``. The
    same versions of the packages give the same bytes. Processes may call it at the same time: one
    builds, the others wait. Raises DataError if none of the packages is installed.
    """
    versions = _versions()
    if not versions:
        raise DataError(
            f"data.source='sample': none of {', '.join(PACKAGES)} is installed, so there are no docstrings "
            "to read. Install the project's requirements, or set data.source=files."
        )
    identity = json.dumps([FORMAT, sys.version_info[:2], versions])  # an older Python skips newer syntax
    folder = cache_dir / f"sample-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _build(versions, folder)
    return folder


def tokenizer(cache_dir: Path) -> Path:
    """Return the corpus's own tokenizer, a sentencepiece model of 4000 ids, trained on first use."""
    folder = corpus(cache_dir)
    model = folder / f"bpe_{VOCAB_SIZE}.model"
    with FileLock(f"{folder}.lock"):
        if not model.exists():
            shards = FileShards(sorted(folder.glob("c4-train.*.json.gz")))
            texts = (text for i in range(len(shards.names)) for text in shards.read(i))
            tokenizers.train(texts, model, VOCAB_SIZE, max_chars=TOKENIZER_CHARS)
    return model


def _versions() -> dict[str, str]:
    """Return the version of each package that is there. The others are said, once, in the log."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            _log.info("The embedded corpus goes without %s, which is not installed", package)
    return found


def _build(versions: dict[str, str], folder: Path) -> None:
    start = time.monotonic()
    _log.info("Building the embedded corpus from the docstrings of %s, once", ", ".join(versions))
    collecting = gc.isenabled()
    gc.disable()  # syntax trees hold no cycles; to search them takes a fifth of the time
    try:
        # In the order of their hashes neighbours differ, and the first shards are a fair sample.
        documents = sorted(_documents(versions), key=lambda document: _digest(document[0]))
    finally:
        if collecting:
            gc.enable()
    train: list[dict[str, str]] = []
    validation: list[dict[str, str]] = []
    for name, text in documents:
        package = name.partition("/")[0]
        url = f"pypi://{package}/{versions[package]}/{name}"
        split = train if _digest(name) % VALIDATION_ONE_IN else validation
        split.append({"text": text, "timestamp": TIMESTAMP, "url": url})
    partial = folder.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for i in range(TRAIN_SHARDS):
        _write(partial / f"c4-train.{i:05d}-of-{TRAIN_SHARDS:05d}.json.gz", train[i::TRAIN_SHARDS])
    _write(partial / "c4-validation.00000-of-00001.json.gz", validation)
    partial.rename(folder)
    _log.info("Built %s: %d documents in %.0f s", folder, len(documents), time.monotonic() - start)


def _documents(versions: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of each module that has enough to say which none before it has said."""
    said: set[str] = set()
    for package in versions:
        for name, path in _modules(package):
            fresh = []
            for paragraph in _paragraphs(path):
                # Its plain words, so that sentences that differ in a name or a number count as one.
                key = " ".join(re.findall(r"\b[a-z]+\b", paragraph))
                if key not in said:
                    said.add(key)
                    fresh.append(paragraph)
            text = "\n".join(fresh)
            if len(text) >= SHORTEST_DOCUMENT:
                yield name, text


def _modules(package: str) -> list[tuple[str, Path]]:
    """Return the source files of a package, sorted by name; a top level is found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} has metadata, so it has a folder"
    root = Path(spec.submodule_search_locations[0])
    names = {path.relative_to(root.parent).as_posix(): path for path in root.rglob("*.py")}
    return sorted((name, path) for name, path in names.items() if not SKIPPED_FOLDERS & set(name.split("/")))


def _paragraphs(path: Path) -> Iterator[str]:
    """Yield the prose of a module's docstrings in order of appearance."""
    source = path.read_bytes()
    if b'"""' not in source:
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes, say
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template, or for another version of Python
        return
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from prose.paragraphs(ast.get_docstring(node) or "")
        body = getattr(node, "body", [])
        nodes += reversed(body if isinstance(body, list) else [])


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def _write(path: Path, documents: list[dict[str, str]]) -> None:
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    # The file's time and name would go into the header, and the bytes would differ.
    with open(path, "wb") as file, gzip.GzipFile("", "wb", mtime=0, fileobj=file) as zipped:
        zipped.write(lines.encode())
