"""LLaMA from Hugging Face transformers: built without memory, filled piece by piece.

A model is built on the meta device, laid out by an engine, and only then given memory and values,
each process for its own tiles. An initial value depends on the seed, the parameter's name and the
block of 128 rows that it lies in, never on the layout.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lrpretrain.config import Config, ModelConfig, find_shipped, shipped_names
from lrpretrain.errors import ConfigError, Problem
from lrpretrain.model.dora import adapt, initial_A_std, row_norms
from lrpretrain.model.loss import token_loss_sum
from lrpretrain.model.lowrank import FACTORS, factorize, initial_factor
from lrpretrain.model.pretrained import Pretrained
from lrpretrain.optim.groups import FACTORED, matched
from lrpretrain.sharding import Holding, Tile

BLOCK_ROWS = 128
# PyTorch's own attention under a name without a maker of masks: for "sdpa" transformers looks for packed
# sequences in the positions, in every forward, and the host waits for the device to answer.
ATTENTION = "causal_sdpa"
AttentionInterface.register(ATTENTION, sdpa_attention_forward)
KINDS = ("llama", "llama_lowrank")
"""Types of model that we write: transformers', and one that it does not know, for models in factors."""


class Llama(LlamaForCausalLM):
    """transformers' model, which takes the loss within its forward, where the head's weights are gathered."""

    loss_chunk = 0
    """Tokens whose logits exist at a time where there are labels. 0: all."""

    @functools.wraps(LlamaForCausalLM.forward, assigned=())  # `generate` looks at the signature
    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Return the sum of the token losses of `labels`; without them, what transformers' model returns."""
        if labels is None:
            return super().forward(input_ids, **options)
        hidden = self.model(input_ids, **options).last_hidden_state
        return token_loss_sum(self.lm_head, hidden, labels, self.loss_chunk)


def load_config(model: ModelConfig, kinds: Sequence[str] = ("llama",)) -> LlamaConfig:
    """Return the transformers config of a shipped model or a config.json of `kinds`. Raises ConfigError."""
    path = find_shipped("model_configs", model.config)
    if path is None:
        remedy = f"Give a Hugging Face config.json or one of {', '.join(shipped_names('model_configs'))}"
        raise ConfigError(
            [Problem("model.config", model.config, "is neither a file nor a shipped model", remedy)]
        )
    try:
        values = json.loads(path.read_text())
        kind = values.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        problem = Problem("model.config", model.config, f"cannot be read: {error}", "Mend the file")
        raise ConfigError([problem]) from error
    if kind not in kinds:
        remedy = 'Use a config whose "model_type" is "llama"'
        raise ConfigError([Problem("model.config", model.config, f"is a model of type {kind!r}", remedy)])
    unsupported = {
        "tie_word_embeddings": "shares the embedding with the head, which are trained apart here",
        "attention_bias": "asks for biases, which are not initialised here",
        "mlp_bias": "asks for biases, which are not initialised here",
        "attention_dropout": "asks for dropout, which no resume could repeat",
    }
    problems = [
        Problem(
            "model.config",
            model.config,
            f"{key}={values[key]!r} {why}",
            f"Set {key} to {type(values[key])()}",
        )
        for key, why in unsupported.items()
        if values.get(key)
    ]
    if problems:
        raise ConfigError(problems)
    return LlamaConfig(**values | {"model_type": "llama"})


def build(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Llama:
    """Return the model on the meta device: names and shapes, no memory. Attention is causal SDPA."""
    with torch.device("meta"):
        model = Llama._from_config(config, attn_implementation=ATTENTION)
    model.config.use_cache = False  # training never reads the keys and values again
    return model.to(dtype)


def configured(config: Config, dtype: torch.dtype = torch.float32) -> Llama:
    """Return the model of a run on the meta device: with low-rank or DoRA layers if its rule wants them."""
    model = build(load_config(config.model), dtype)
    model.loss_chunk = config.model.loss_chunk
    if config.optim.rule in FACTORED:
        factorize(model, matched(shapes(model), config.optim), config.optim.init)
    if config.optim.mode == "dora":
        names = matched(shapes(model), config.optim)
        adapt(model, names, config.optim.adapter_rank, config.optim.adapter_alpha)
    return model


def from_pretrained(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Llama:
    """Return the model of a Hugging Face folder, dense or in factors as `lrpretrain export` writes them.

    It is on the CPU unless another device is named. Raises ConfigError for a model that is not LLaMA, and for
    files that do not hold it.
    """
    config = load_config(ModelConfig(str(Path(folder) / "config.json")), KINDS)
    model = build(config, dtype)
    factorize(model, getattr(config, "lowrank_ranks", {}), "xavier")
    files = Pretrained(str(folder))
    if problems := files.problems(shapes(model)):
        raise ConfigError(problems)
    materialize(model, device or torch.device("cpu"))
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(files.read(name, slice(None)))
    model.set_attn_implementation("sdpa")  # which heeds masks of padding
    return model


def materialize(
    model: nn.Module, device: torch.device, each: Callable[[nn.Module], Any] | None = None
) -> None:
    """Give a model from the meta device memory; its parameters hold garbage until `initialize`.

    One that has memory and values already moves to the device.

    `each` is called with every module that has parameters of its own, before the next one gets memory.
    """
    if not next(model.parameters()).is_meta:
        model.to(device)
        return
    for module in model.modules():
        module.to_empty(device=device, recurse=False)
        if each is not None and next(module.parameters(recurse=False), None) is not None:
            each(module)
    # Not in the state dict, and garbage now.
    assert isinstance(model, LlamaForCausalLM)
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)


@torch.no_grad()
def initialize(
    holdings: Iterable[Holding],
    seed: int,
    std: float,
    init: str = "xavier",
    init_from: str | None = None,
) -> None:
    """Fill this process's tiles: normal(0, std) for matrices, `init` for low-rank factors, 1 for norms.

    With `init_from`, a Hugging Face folder, weights are read from there, and DoRA layers start as them.
    """
    files = None if init_from is None else Pretrained(init_from)
    for holding in holdings:
        values = _initial(holding, seed, std, init, files)
        for tile, part in holding.piece.parts:
            part.copy_(values(tile))


def _initial(
    h: Holding, seed: int, std: float, init: str, files: Pretrained | None
) -> Callable[[Tile], Tensor]:
    """Return the function from a tile of a parameter to its initial values."""
    layer, _, kind = h.name.rpartition(".")
    if kind == "lora_B":
        return lambda tile: torch.zeros(tile.sizes)
    if kind == "lora_A":
        return lambda tile: initial_tile(h.name, h.shape, tile, seed).mul_(initial_A_std(h.shape[1]))
    if kind == "magnitude":
        assert files is not None  # optim.mode=dora needs model.init_from
        return lambda tile: row_norms(files.read(f"{layer}.weight", tile.span(0)).to(h.param.dtype))
    if files is not None:
        return lambda tile: files.read(h.name, *(tile.span(dim) for dim in range(len(h.shape))))
    if len(h.shape) == 1:
        return lambda tile: torch.ones(tile.sizes)
    if kind in FACTORS:
        whole = initial_tile(h.name, h.shape, Tile.whole(h.shape), seed)
        factor = initial_factor(whole, init, std)  # `orth` has no tiles: drawn whole, one at a time
        return lambda tile: factor[tile.span(0), tile.span(1)]
    return lambda tile: initial_tile(h.name, h.shape, tile, seed).mul_(std)


def initial_tile(name: str, shape: tuple[int, ...], tile: Tile, seed: int) -> Tensor:
    """Return the tile (rows, columns) of the parameter's standard normal draw, in float32 on the CPU."""
    rows, columns = tile.span(0), tile.span(1)
    parts = [torch.empty(0, tile.sizes[1])]
    for begin in range(rows.start - rows.start % BLOCK_ROWS, rows.stop, BLOCK_ROWS):
        digest = hashlib.sha256(f"{seed} {name} {begin // BLOCK_ROWS}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        block = torch.randn(min(BLOCK_ROWS, shape[0] - begin), shape[1], generator=generator)
        parts.append(block[max(rows.start - begin, 0) : rows.stop - begin, columns])
    return torch.cat(parts)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of every parameter, by name."""
    return {name: tuple(param.shape) for name, param in model.named_parameters()}
