"""Classifiers to fine-tune: BERT, RoBERTa and LLaMA of transformers, with adapters where they are wanted.

They are small beside what is pretrained here: each process loads the model whole, before it is laid out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from lrpretrain.config import FinetuneConfig, FinetuneOptimConfig
from lrpretrain.errors import ConfigError, Problem
from lrpretrain.model import blocks
from lrpretrain.model.dense import check_merged, make_dense
from lrpretrain.model.dora import adapt
from lrpretrain.model.lowrank import LowRankAdapter
from lrpretrain.optim.groups import matched

KINDS = ("bert", "roberta", "llama")
DROPOUTS = {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout"}


def shape_of(config: FinetuneConfig, labels: int) -> Any:
    """Return the transformers config of the classifier. Raises ConfigError."""
    name = config.model.init_from
    if name is None:
        remedy = "Name a Hugging Face folder, or a model of the hub such as roberta-base"
        raise ConfigError([Problem("model.init_from", None, "is needed", remedy)])
    shape = _load(AutoConfig.from_pretrained, name, num_labels=labels)
    if shape.model_type not in KINDS:
        reason = f"is a model of type {shape.model_type!r}"
        raise ConfigError([Problem("model.init_from", name, reason, f"Use one of {', '.join(KINDS)}")])
    if config.model.dropout is not None:
        for key in DROPOUTS & vars(shape).keys():
            setattr(shape, key, config.model.dropout)
    return shape


def open_tokenizer(config: FinetuneConfig) -> Any:
    """Return the tokenizer of the pretrained model, which pads with its end where it has no pad."""
    assert config.model.init_from is not None
    tokenizer = _load(AutoTokenizer.from_pretrained, config.model.init_from)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        reason, remedy = "its tokenizer has neither a pad nor an end token", "Give it a pad_token"
        raise ConfigError([Problem("model.init_from", config.model.init_from, reason, remedy)])
    tokenizer.padding_side = "right"
    return tokenizer


def _load(load: Any, name: str, **options: Any) -> Any:
    try:
        return load(name, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = f"cannot be loaded: {str(error).splitlines()[0].rstrip('.')}"
        remedy = "Name a folder with config.json, model.safetensors and a tokenizer, or a model of the hub"
        raise ConfigError([Problem("model.init_from", name, reason, remedy)]) from error


def outline(shape: Any) -> PreTrainedModel:
    """Return the classifier of a config without memory: names and shapes."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(shape)
    return model


def targeted(model: nn.Module, optim: FinetuneOptimConfig) -> FinetuneOptimConfig:
    """Return the options with the targets that stand for the default: the linear layers of all blocks."""
    if optim.targets:
        return optim
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names[id(blocks.of(model)[0])].removesuffix("0")
    layers = (n for n, m in blocks.of(model)[0].named_modules() if isinstance(m, nn.Linear))
    return replace(optim, targets=[f"{prefix}*.{name}" for name in layers])


def build(
    config: FinetuneConfig, shape: Any, seed: int, dtype: torch.dtype
) -> tuple[PreTrainedModel, set[str]]:
    """Load the pretrained model with a head and, if wanted, adapters; return it and what was drawn, by name.

    Only the seed decides what is drawn: what the pretrained model does not have, or for another number of
    labels. That and the head are trained beside adapters, too, unless `optim.compat` leaves them.
    """
    torch.manual_seed(seed)
    load, name = AutoModelForSequenceClassification.from_pretrained, str(config.model.init_from)
    with _quiet():
        model, told = _load(load, name, config=shape, ignore_mismatched_sizes=True, output_loading_info=True)
    for param in model.parameters():
        param.data = param.data.to(dtype)  # not buffers: positions are not rounded
    model.config.use_cache = False
    drawn = {*told["missing_keys"], *(mismatch[0] for mismatch in told["mismatched_keys"])}
    base = f"{model.base_model_prefix}."
    if lacking := sorted(name for name in drawn if name.startswith(base) and ".pooler." not in name):
        reason = f"has no {lacking[0]} of that shape ({len(lacking)} such parameters)"
        remedy = "Name a folder whose weights are those of its config.json"
        raise ConfigError([Problem("model.init_from", name, reason, remedy)])
    head = {name for name, _ in model.named_parameters() if not name.startswith(base)}
    _adapt(model, config, set() if config.optim.compat else head | drawn)
    return model, drawn


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from telling of each process how far it is, and what it drew."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _adapt(model: PreTrainedModel, config: FinetuneConfig, trained: set[str]) -> None:
    """Put adapters beside the targeted layers, in place, and freeze all else but what is `trained`."""
    optim, kind = config.optim, config.model.adapter
    ranks = matched({name: tuple(p.shape) for name, p in model.named_parameters()}, optim)
    if optim.mode == "dora":
        adapt(model, ranks, optim.adapter_rank, optim.adapter_alpha)
    elif optim.rule == "loro":
        model.requires_grad_(False)
        for name, rank in ranks.items():
            _replace(
                model,
                name.removesuffix(".weight"),
                functools.partial(
                    LowRankAdapter,
                    rank=rank,
                    alpha=optim.adapter_alpha,
                    init=optim.init,
                    init_range=model.config.initializer_range,
                    zero_bias=optim.compat,
                ),
            )
    elif kind != "none":
        from peft import LoraConfig, inject_adapter_in_model

        layers = [name.removesuffix(".weight") for name in ranks]
        alpha: Any = optim.adapter_alpha  # PEFT says int, and divides
        lora = LoraConfig(
            r=optim.adapter_rank,
            lora_alpha=alpha,
            target_modules=layers,
            use_dora=kind == "dora",
        )
        inject_adapter_in_model(lora, model)
    else:
        return
    for name in trained - ranks.keys():
        model.get_parameter(name).requires_grad_(True)


def _replace(model: nn.Module, name: str, make: Any) -> None:
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, child, make(getattr(module, child)))


def logits(forward: nn.Module, micro: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the logits (b, labels) of a micro-batch in float32, and its labels (b)."""
    inputs = {key: value.to(device, non_blocking=True) for key, value in micro.items()}
    labels = inputs.pop("labels")
    return forward(**inputs).logits.float(), labels


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy, or squared error for a single logit; not of labels −100."""
    if logits.shape[1] == 1:
        errors = (logits[:, 0] - labels).square()
        return torch.where(labels >= 0, errors, 0).sum()
    return F.cross_entropy(logits, labels.long(), reduction="sum")


@torch.no_grad()
def merge(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with adapters merged into plain linear layers; it is changed.

    It is in float32 then, and goes back to its dtype. Raises CheckpointError where the logits of some rows
    differ by more than rounding, or are not finite.
    """
    dtype = model.dtype
    nn.Module.float(model)
    ids = torch.randint(
        model.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0)
    ).clamp_min(4)  # the first ones are special
    expected = model.eval()(input_ids=ids).logits
    make_dense(model)
    check_merged(model(input_ids=ids).logits, expected, "Train with a lower optim.lr, or export another run")
    nn.Module.to(model, dtype)
    return model.requires_grad_(True)
