"""Text to ids: one interface over sentencepiece models and the tokenizers of the hub.

T5's tokenizer, which the papers use with a model vocabulary of 32000, has 100 sentinels
(``<extra_id_0>`` …) above it. Text that happens to contain one gets the unknown id.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers

from lrpretrain.data.fast import of_sentencepiece
from lrpretrain.errors import ConfigError, DataError, Problem

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


def train(texts: Iterable[str], out: Path, vocab_size: int, *, max_chars: int = 50_000_000) -> None:
    """Train a sentencepiece BPE tokenizer and write it to `out`.

    Takes whole documents until `max_chars` characters are used. Decoding gives back the text to
    the letter (but for ▁, sentencepiece's own space): nothing is normalised, and characters
    outside the vocabulary, the newline among them, become bytes. The same texts give the same
    file. Raises DataError where the texts do not suffice for `vocab_size` ids, with the largest
    size that works.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, max_chars),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 24,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_why_untrainable(str(error), vocab_size)) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.part")
    partial.write_bytes(model.getvalue())
    partial.replace(out)


def _lines(texts: Iterable[str], max_chars: int) -> Iterator[str]:
    used = 0
    for text in texts:
        yield from (line for line in text.splitlines() if line)
        used += len(text)
        if used >= max_chars:
            return


def _why_untrainable(error: str, vocab_size: int) -> str:
    if largest := re.search(r"a value <= (\d+)", error):
        return (
            f"vocab_size={vocab_size}: the text is too short for so many ids. "
            f"The largest size that works is {largest[1]}; give more text or lower the size."
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return (
            f"vocab_size={vocab_size}: the text has too many different characters for so few ids. "
            f"Raise the size to more than {smallest[1]}."
        )
    if "sentences_.empty()" in error:
        return "There is no text to train a tokenizer on. Give shards that hold documents."
    return f"The tokenizer could not be trained with vocab_size={vocab_size}: {error}"


class _Backend(Protocol):
    """What is asked of a tokenizer library."""

    identity: str
    size: int
    pad_id: int | None
    eos_id: int | None
    unk_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def piece(self, index: int) -> str: ...
    def fast(self, size: int) -> tokenizers.Tokenizer: ...


class Tokenizer:
    """A tokenizer that fits a model; made by `load`. All methods may be called from several threads.

    ``size`` is the number of ids that it can give; ``identity`` tells tokenizers apart: the SHA-256
    of a sentencepiece ``file``, or the name; ``sentinels_mapped`` counts the ids that became ``unk_id``
    because they were sentinels at or above the model's vocabulary.
    """

    def __init__(self, spec: str, vocab_size: int, backend: _Backend):
        self._spec, self._vocab_size, self._backend = spec, vocab_size, backend
        self.identity = backend.identity
        self.file = path if (path := Path(spec).expanduser()).is_file() else None
        self.size = min(backend.size, vocab_size)
        self.pad_id, self.eos_id, self.unk_id = _special_ids(spec, backend)
        self.sentinels_mapped = 0
        self._counting = threading.Lock()

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Return the ids of a text, with eos appended, (n + 1,)."""
        text = text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
        ids = np.array([*self._backend.encode(text), self.eos_id], dtype=np.int64)
        sentinels = ids >= self.size
        if sentinels.any():
            ids[sentinels] = self.unk_id
            with self._counting:
                self.sentinels_mapped += int(sentinels.sum())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; eos and pad leave nothing, and what only the model knows is unknown."""
        silent = (self.eos_id, self.pad_id)
        known = (int(i) if i < self.size else self.unk_id for i in ids if i not in silent)
        return self._backend.decode(list(known))

    def fast(self) -> tokenizers.Tokenizer:
        """Return what gives the same ids, less the eos, in the tokenizers library.

        Sentinels at or above the model's vocabulary are no pieces of it. Raises ConfigError where there is
        no such thing.
        """
        try:
            return self._backend.fast(self.size)
        except (ImportError, ValueError) as error:
            remedy = "Name another form of the same tokenizer, or do without its files (--no_tokenizer)"
            raise _problem(self._spec, f"transformers has no tokenizer for it: {error}", remedy) from error

    def special(self) -> dict[str, str]:
        """Return the pieces of pad, eos and unknown, by the names that transformers has for them."""
        ids = {"pad_token": self.pad_id, "eos_token": self.eos_id, "unk_token": self.unk_id}
        return {name: self._backend.piece(index) for name, index in ids.items()}

    def __reduce__(self) -> tuple[Callable[[str, int], Tokenizer], tuple[str, int]]:
        # Backends hold locks and foreign objects: another process loads its own.
        return load, (self._spec, self._vocab_size)


def load(spec: str, vocab_size: int) -> Tokenizer:
    """Load a tokenizer for a model with `vocab_size` ids.

    `spec` is a sentencepiece ``.model`` file, or the folder or hub name of a transformers
    tokenizer. Raises ConfigError where it cannot be had or gives ids that the model lacks.
    """
    path = Path(spec).expanduser()
    backend: _Backend
    if path.is_file() or path.suffix == ".model":
        backend = _SentencePiece(spec, path)
    else:
        backend = _Pretrained(spec, path)
    strange = [i for i in range(vocab_size, backend.size) if not backend.piece(i).startswith("<extra_id_")]
    if strange:
        raise _problem(
            spec,
            f"it has {strange[-1] + 1} ids, but model.config has a vocabulary of {vocab_size}",
            f"Choose a tokenizer of at most {vocab_size} ids, or a model.config whose vocab_size "
            f"is at least {strange[-1] + 1}",
        )
    return Tokenizer(spec, vocab_size, backend)


def _special_ids(spec: str, backend: _Backend) -> tuple[int, int, int]:
    """Return pad, eos and unk; one stands in for the other (Llama's tokenizers have no pad)."""
    pad = backend.pad_id if backend.pad_id is not None else backend.unk_id
    unk = backend.unk_id if backend.unk_id is not None else backend.pad_id
    if pad is None or unk is None or backend.eos_id is None or pad == backend.eos_id:
        raise _problem(
            spec,
            "it must have an end-of-text id, and a pad or unknown id that differs from it "
            f"(eos {backend.eos_id}, pad {backend.pad_id}, unk {backend.unk_id})",
            "Choose another tokenizer, such as t5-base, or train one with `lrpretrain tokenizer train`",
        )
    return pad, backend.eos_id, unk


def _problem(spec: str, reason: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("data.tokenizer", spec, reason, remedy)])


class _SentencePiece:
    def __init__(self, spec: str, path: Path):
        try:
            proto = path.read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except FileNotFoundError as error:
            remedy = (
                "Give the path of a sentencepiece .model file, or train one with `lrpretrain tokenizer train`"
            )
            raise _problem(spec, "there is no such file", remedy) from error
        except (OSError, RuntimeError) as error:
            remedy = "Give a model that sentencepiece wrote"
            raise _problem(spec, f"it cannot be read as a sentencepiece model ({error})", remedy) from error
        self.identity = f"sha256:{hashlib.sha256(proto).hexdigest()}"
        self.size: int = self._model.vocab_size()
        special = (self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        self.pad_id, self.eos_id, self.unk_id = (i if i >= 0 else None for i in special)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._model.decode(ids)
        return text

    def piece(self, index: int) -> str:
        piece: str = self._model.id_to_piece(index)
        return piece

    def fast(self, size: int) -> tokenizers.Tokenizer:
        return of_sentencepiece(self._model.serialized_model_proto())


class _Pretrained:
    def __init__(self, spec: str, path: Path):
        from transformers import AutoTokenizer  # seconds to import, and not needed for a .model file

        is_path = path.is_dir() or spec.startswith((".", "/", "~")) or spec.count("/") > 1
        if is_path and not path.is_dir():
            raise _problem(
                spec, "there is no such folder", "Give a tokenizer's folder, .model file or hub name"
            )
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path) if is_path else spec)
        except Exception as error:  # transformers raises many kinds, from OSError to KeyError
            raise _problem(
                spec,
                f"it cannot be loaded as a tokenizer ({' '.join(str(error).split())[:300]})",
                "Check the name and the network, fetch it beforehand on a machine that has one "
                f"(`hf download {spec}`), or give the path of a sentencepiece .model file",
            ) from error
        self.identity = spec
        self.size = len(self._tokenizer)
        self.pad_id: int | None = self._tokenizer.pad_token_id
        self.eos_id: int | None = self._tokenizer.eos_token_id
        self.unk_id: int | None = self._tokenizer.unk_token_id
        # The wrapper's own methods set truncation and padding on shared state; the backend's do not.
        self._fast = getattr(self._tokenizer, "backend_tokenizer", None)
        self._slow = threading.Lock()

    def encode(self, text: str) -> list[int]:
        if self._fast is not None:
            ids: list[int] = self._fast.encode(text, add_special_tokens=False).ids
            return ids
        with self._slow:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text

    def piece(self, index: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(index))

    def fast(self, size: int) -> tokenizers.Tokenizer:
        if self._fast is None:
            raise ValueError("it is written in Python alone")
        own = json.loads(self._fast.to_str())
        own |= {"post_processor": None, "truncation": None, "padding": None}  # training adds the eos alone
        own["added_tokens"] = [token for token in own["added_tokens"] if token["id"] < size]
        if own["model"]["type"] == "Unigram":
            own["model"]["vocab"] = own["model"]["vocab"][:size]  # T5's sentinels lie at its end
        return tokenizers.Tokenizer.from_str(json.dumps(own))
