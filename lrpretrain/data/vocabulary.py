"""Which tokenizer a configuration means."""

from __future__ import annotations

from lrpretrain.config import Config
from lrpretrain.data import sample, tokenizer
from lrpretrain.data.sources import cache_dir
from lrpretrain.data.tokenizer import Tokenizer


def configured(config: Config, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a run, checked against the model's vocabulary. Raises ConfigError, DataError."""
    spec = config.data.tokenizer or str(sample.tokenizer(cache_dir(config.data)))
    return tokenizer.load(spec, vocab_size)
