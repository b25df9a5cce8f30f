"""Which tokenizer a configuration means."""

from __future__ import annotations

from pathlib import Path

from lrpretrain.config import Config
from lrpretrain.data import sample, tokenizer
from lrpretrain.data.sources import cache_dir
from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.data.tokens import read_manifest
from lrpretrain.errors import ConfigError, Problem


def configured(config: Config, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a run, for a model with `vocab_size` ids.

    With data.source=tokens and no data.tokenizer it knows the ids that tokens.json records, which is all
    that training needs, and no text. Raises ConfigError for a tokenizer that does not fit the model, did
    not write the tokens, or is missing for train.prompt; DataError for tokens that cannot be read.
    """
    if config.data.source == "tokens":
        return _of_tokens(config, vocab_size)
    spec = config.data.tokenizer or str(sample.tokenizer(cache_dir(config.data)))
    return tokenizer.load(spec, vocab_size)


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

    def lacks_text(self) -> ConfigError:
        reason = f"text needs a tokenizer, and {self._folder}/tokens.json only records its ids"
        return ConfigError(
            [
                Problem(
                    "data.tokenizer",
                    None,
                    reason,
                    f"Name the one that is {self.identity}, or do without a prompt",
                )
            ]
        )
