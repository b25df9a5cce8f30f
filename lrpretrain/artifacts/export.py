"""A trained model for others: a folder in the Hugging Face format, with its tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.errors import ConfigError, DataError
from lrpretrain.model.dense import check_merged, make_dense
from lrpretrain.model.llama import Llama
from lrpretrain.model.lowrank import LowRankLinear

ROWS, ROW_TOKENS = 3, 32
TEXTS = (
    "",
    " ",
    "a",
    " a  b   c ",
    "Tab\tand\nnew line\r\n\n    indented",
    "naïve café, Ærøskøbing; e\u0301 \u00bd \ufb01",
    "日本語 и русский",
    "\U0001f937\U0001f3fd\u200d\u2640\ufe0f emoji",
    "▁ is a space of sentencepiece's",
    "1234567890 3.14159 1e-4",
    "def f(x):\n    return x**2  # {}[]<>",
    "\u200b\ufeff\x01",
)


def export(
    model: Llama,
    shape: LlamaConfig,
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    form: Literal["dense", "factored"] = "dense",
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
) -> None:
    """Write a model, which is in float32 on the CPU and used up by this, to the new folder `out`.

    dense: what transformers loads by itself; low-rank factors and adapters are merged, and the logits of a
    few rows compared. factored: low-rank factors as they are, for `lrpretrain.model.llama.from_pretrained`.
    The files appear at once, when all are written. Raises ConfigError where `out` is taken, the model has no
    factors, or transformers has no tokenizer that gives the same ids; CheckpointError where merging changed
    the model; DataError where the disk does not take it.
    """
    refuse_taken(out)
    ranks = {f"{name}.weight": m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    if form == "factored" and not ranks:
        raise ConfigError(["--form factored: the model has no low-rank factors. Use --form dense."])
    config: dict[str, Any] = json.loads(shape.to_json_string())
    config |= {"dtype": str(dtype).removeprefix("torch."), "architectures": ["LlamaForCausalLM"]}
    config.pop("lowrank_ranks", None)
    if form == "factored":  # a type that transformers does not know: it would fill what it misses at random
        config |= {"architectures": ["LowRankLlamaForCausalLM"], "model_type": "llama_lowrank"}
        config["lowrank_ranks"] = ranks
    ids = {"bos_token_id": None, "eos_token_id": shape.eos_token_id, "pad_token_id": shape.pad_token_id}
    if tokenizer is not None:
        ids |= {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    with draft(out) as folder:
        (folder / "config.json").write_text(json.dumps(config | ids, indent=2) + "\n")
        GenerationConfig(**ids).save_pretrained(folder)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, folder, shape)
        state = (merge(model, shape) if form == "dense" else model).state_dict()
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        try:
            save_torch_state_dict(state, folder, max_shard_size=shard_size)
        except SafetensorError as error:
            raise DataError(f"{out} cannot be written: {error}. Free some space, or name another.") from error
        for file in folder.glob("*.safetensors"):  # which are written for the owner alone
            file.chmod((folder / "config.json").stat().st_mode)


def refuse_taken(out: Path) -> None:
    """Raise ConfigError unless `out` is a new or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError([f"OUT {str(out)!r} is there already, and not empty. Name another, or remove it."])


@torch.no_grad()
def merge(model: Llama, shape: LlamaConfig) -> LlamaForCausalLM:
    """Return the dense model of transformers that computes the same; the one that is given is taken apart.

    Raises CheckpointError where the logits of some rows differ by more than rounding, or are not finite.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(ROW_TOKENS, shape.max_position_embeddings)
    rows = torch.randint(shape.vocab_size, (ROWS, length), generator=generator)
    expected = model.eval()(rows).logits
    make_dense(model)
    with torch.device("meta"):
        dense = LlamaForCausalLM._from_config(shape, attn_implementation="sdpa")
    dense.load_state_dict(model.state_dict(), assign=True)
    dense.model.rotary_emb = LlamaRotaryEmbedding(shape)
    found = dense.eval()(rows).logits
    check_merged(found, expected, "Use an earlier checkpoint, or --form factored")
    return dense


@contextmanager
def draft(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that becomes it at the end, and goes where it does not come to that."""
    out = out.resolve()
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        yield draft
        os.rename(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, shape: LlamaConfig) -> None:
    """Write what AutoTokenizer loads, and see that it gives the same ids and the same text."""
    written = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.fast(),
        **tokenizer.special(),
        model_max_length=shape.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    written.save_pretrained(folder)
    if tokenizer.file is not None:
        shutil.copyfile(tokenizer.file, folder / "tokenizer.model")
    read = AutoTokenizer.from_pretrained(folder, config=shape)
    shuffled = np.random.default_rng(0).permutation(tokenizer.size)
    everything = [tokenizer.decode(part) for part in np.array_split(shuffled, len(shuffled) // 64 + 1)]
    for text in (*TEXTS, *everything):
        ours = tokenizer.encode(text)[:-1].tolist()
        theirs = read.encode(text, add_special_tokens=False, verbose=False)
        if ours != theirs:
            where = next(i for i in range(len(ours) + len(theirs)) if ours[: i + 1] != theirs[: i + 1])
            raise ConfigError(
                [
                    f"the tokenizer that transformers would load gives other ids than the run's for "
                    f"{text[:60]!r}: {theirs[where : where + 4]} at {where}, not {ours[where : where + 4]}. "
                    "Leave its files out by --no_tokenizer, and load the run's own."
                ]
            )
