"""What a configuration reads: its documents and its tokenizer."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import tokenizers

from lrpretrain.config import Config, DataConfig
from lrpretrain.data import sample, tokenizer
from lrpretrain.data.hub import HubShards
from lrpretrain.data.sources import SUFFIXES, FileShards, IndexedSource, PackedSource, Split, cache_dir
from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.data.tokens import TokenShards, read_manifest
from lrpretrain.errors import ConfigError, DataError, Problem


def open_source(data: DataConfig, split: Split) -> IndexedSource | PackedSource:
    """Return the documents of a split of data.source.

    Raises ConfigError for a missing data.path, and DataError where the split has no shards.
    """
    if data.source == "sample":
        return FileShards(sorted(sample.corpus(cache_dir(data)).glob(f"c4-{split}.*.json.gz")))
    if data.source == "hub":
        return HubShards(data, split)
    if data.path is None:
        reason = f"data.source={data.source} reads a folder of yours"
        raise ConfigError([Problem("data.path", None, reason, "Set data.path")])
    if data.source == "tokens":
        return TokenShards(Path(_split_path(data, split)).expanduser(), split)
    return FileShards(_split_files(data, split))


def open_tokenizer(config: Config, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a run, for a model with `vocab_size` ids.

    With data.source=tokens and no data.tokenizer it knows the ids that tokens.json records, which is all
    that training needs, and no text. Raises ConfigError for a tokenizer that does not fit the model, did
    not write the tokens, or is missing for train.prompt; DataError for tokens that cannot be read.
    """
    if config.data.source == "tokens":
        return _of_tokens(config, vocab_size)
    spec = config.data.tokenizer or str(sample.tokenizer(cache_dir(config.data)))
    return tokenizer.load(spec, vocab_size)


def _split_path(data: DataConfig, split: Split) -> str:
    assert data.path is not None
    return data.validation_path if split == "validation" and data.validation_path else data.path


def _split_files(data: DataConfig, split: Split) -> list[Path]:
    """Return the shards of a split, sorted; what is validated on is never trained on."""
    assert data.path is not None
    held_out = _files(data.validation_path) if data.validation_path else []
    if split == "train":
        field, pattern = "data.path", data.path
        found = [p for p in _files(pattern) if "validation" not in p.name and p not in held_out]
        remedy = "Give a folder or glob with training shards (names with 'validation' are left out)"
    elif data.validation_path:
        field, pattern, found = "data.validation_path", data.validation_path, held_out
        remedy = "Give a folder or glob with validation shards"
    else:
        field, pattern = "data.path", data.path
        folder = pattern if Path(pattern).expanduser().is_dir() else os.path.dirname(pattern)
        found = [p for p in _files(folder or ".") if "validation" in p.name]
        remedy = "Set data.validation_path, or put shards with 'validation' in their names beside the others"
    if not found:
        suffixes = ", ".join(SUFFIXES)
        raise DataError(f"{field}={pattern!r}: no {split} shards ({suffixes}) are there. {remedy}.")
    return found


def _files(pattern: str) -> list[Path]:
    """Return the shards that a folder holds or that a path or glob names."""
    pattern = os.path.expanduser(pattern)
    inside = os.path.join(pattern, "*") if os.path.isdir(pattern) else pattern
    return sorted(Path(p) for p in glob.glob(inside, recursive=True) if p.endswith(SUFFIXES))


def _of_tokens(config: Config, vocab_size: int) -> Tokenizer:
    data = config.data
    assert data.path is not None
    recorded = _Recorded(data.path)
    if data.validation_path and (other := _Recorded(data.validation_path)).identity != recorded.identity:
        reason = f"its tokens are of {other.identity}, those of {data.path} of {recorded.identity}"
        remedy = "Tokenize both with the same tokenizer"
        raise ConfigError([Problem("data.validation_path", data.validation_path, reason, remedy)])
    if data.tokenizer is None:
        if config.train.prompt:
            raise recorded.lacks_text()
        return Tokenizer(data.path, vocab_size, recorded)
    given = tokenizer.load(data.tokenizer, vocab_size)
    if given.identity != recorded.identity:
        reason = f"it is {given.identity}, but the tokens of {data.path} are of {recorded.identity}"
        remedy = "Name that one, or leave data.tokenizer out: only prompts need it"
        raise ConfigError([Problem("data.tokenizer", data.tokenizer, reason, remedy)])
    return given


class _Recorded:
    """What tokens.json records of a tokenizer: its ids, but nothing that text could be encoded with."""

    def __init__(self, folder: str):
        manifest = read_manifest(Path(folder).expanduser())
        self._folder = folder
        self.identity: str = manifest["tokenizer"]
        self.size: int = manifest["vocab_size"]
        self.pad_id: int | None = manifest["pad"]
        self.eos_id: int | None = manifest["eos"]
        self.unk_id: int | None = None

    def encode(self, text: str) -> list[int]:
        raise self.lacks_text()

    def decode(self, ids: list[int]) -> str:
        raise self.lacks_text()

    def piece(self, index: int) -> str:
        raise self.lacks_text()

    def fast(self, size: int) -> tokenizers.Tokenizer:
        raise self.lacks_text("do without its files (--no_tokenizer)")

    def lacks_text(self, otherwise: str = "do without a prompt") -> ConfigError:
        reason = f"text needs a tokenizer, and {self._folder}/tokens.json only records its ids"
        remedy = f"Name the one that is {self.identity}, or {otherwise}"
        return ConfigError([Problem("data.tokenizer", None, reason, remedy)])
