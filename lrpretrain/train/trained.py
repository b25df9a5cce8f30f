"""A trained model where it lies: a checkpoint, a run folder, or a folder in the Hugging Face format."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch

from lrpretrain.artifacts import checkpoint
from lrpretrain.config import Config, ModelConfig, PrecisionConfig, TrainConfig, from_dict, parse
from lrpretrain.data.inputs import open_tokenizer
from lrpretrain.data.loader import build_loader
from lrpretrain.data.pack import document_mask
from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.engine.local import Local
from lrpretrain.errors import ConfigError, Problem
from lrpretrain.model import llama
from lrpretrain.sharding import hold
from lrpretrain.sharding.procs import Procs
from lrpretrain.train import plan
from lrpretrain.train.evaluate import Evaluator
from lrpretrain.train.loop import check_tokenizer

CPU = torch.device("cpu")


class Trained:
    """The model of a checkpoint, or of the newest complete one of a run folder.

    `config` is that of its run, with the run's own tokenizer; what is set there is what is opened. Weights
    are read when they are asked for. Raises CheckpointError where there is no checkpoint.
    """

    def __init__(self, path: Path):
        self.path = checkpoint.newest(path)
        self._saved = checkpoint.read_run(self.path)
        self.config = from_dict(self._saved["config"])
        self.shape = llama.load_config(self.config.model)
        own = self.path.resolve().parents[1] / "tokenizer.model"
        self.config.data.tokenizer = str(own) if own.is_file() else self.config.data.tokenizer

    def tokenizer(self) -> Tokenizer:
        """Open the tokenizer. Raises ConfigError for one that the model was not trained with."""
        tokenizer = open_tokenizer(self.config, self.shape.vocab_size)
        if problems := check_tokenizer(self.path, self._saved, self.config, tokenizer):
            raise ConfigError(problems)
        return tokenizer

    def model(self, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> llama.Llama:
        """Read the model as it was trained, in factors or with adapters. Raises CheckpointError."""
        model = llama.configured(self.config, dtype)
        llama.materialize(model, device)
        holdings = [hold(name, param) for name, param in model.named_parameters()]
        checkpoint.load(self.path, {f"model/{h.name}": h.piece for h in holdings}, Procs())
        return model


class Exported(Trained):
    """The model of a folder in the Hugging Face format, dense or as `lrpretrain export` writes factors.

    `config` holds the defaults but for model, tokenizer and precision. Raises ConfigError for a model that is
    not one of ours.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shape = llama.load_config(ModelConfig(str(path / "config.json")), llama.KINDS)
        stored: Literal["float32", "bfloat16"] = (
            "bfloat16" if self.shape.dtype == torch.bfloat16 else "float32"
        )
        self.config = Config(
            ModelConfig(str(path / "config.json")), precision=PrecisionConfig(stored, stored)
        )
        if (path / "tokenizer.model").is_file():
            self.config.data.tokenizer = str(path / "tokenizer.model")
        elif (path / "tokenizer_config.json").is_file():
            self.config.data.tokenizer = str(path)

    def tokenizer(self) -> Tokenizer:
        """Open the tokenizer: the folder's own, unless another one is set."""
        if self.config.data.tokenizer is None and self.config.data.source != "tokens":
            reason = f"{self.path} holds no tokenizer"
            remedy = "Name the one that the model was trained with"
            raise ConfigError([Problem("data.tokenizer", None, reason, remedy)])
        return open_tokenizer(self.config, self.shape.vocab_size)

    def model(self, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> llama.Llama:
        """Read the model. Raises ConfigError where the files do not hold it."""
        model = llama.from_pretrained(self.path, dtype, device)
        model.loss_chunk = self.config.model.loss_chunk
        return model


def find(path: Path) -> Trained:
    """Return the model of a checkpoint, a run folder or a Hugging Face folder, which has a config.json."""
    return Exported(path) if (path / "config.json").is_file() else Trained(path)


# What an evaluation may choose for itself; all else is the model's.
FREE = ("data.*", "train.micro_batch", "train.global_batch", "train.eval_tokens", "precision.compute")


def configure(model: Trained, argv: Sequence[str]) -> None:
    """Set what a command line of --section.field VALUE says for an evaluation. Raises ConfigError.

    A source other than that of the run has paths of its own.
    """
    read, problems = parse(argv, "lrpretrain eval MODEL", onto=model.config)
    if read.data.source != model.config.data.source:
        data = replace(model.config.data, path=None, validation_path=None)
        read, problems = parse(argv, "lrpretrain eval MODEL", onto=replace(model.config, data=data))
    was = asdict(model.config)
    for section, values in asdict(read).items():
        for name, value in values.items():
            key = f"{section}.{name}"
            if value != was[section][name] and not any(fnmatchcase(key, pattern) for pattern in FREE):
                remedy = f"Leave it out: an evaluation chooses {', '.join(FREE)}"
                problems.append(Problem(key, value, "is settled by the model", remedy))
    train = TrainConfig(
        micro_batch=read.train.micro_batch,
        global_batch=read.train.global_batch,
        eval_tokens=read.train.eval_tokens,
    )
    problems += plan.check(Config(data=read.data, train=train), 1)
    problems += plan.too_long(read, model.shape.max_position_embeddings)
    if problems:
        raise ConfigError(problems)
    model.config = read


def evaluate(model: Trained, device: torch.device) -> dict[str, float]:
    """Return loss and perplexity on the validation data that `model.config` names, as a run measures them.

    The same configuration gives what the run logged. With the authors' biased figures: see `biased_loss`.
    """
    config, tokenizer = model.config, model.tokenizer()
    mask = functools.partial(document_mask, eos_id=tokenizer.eos_id) if config.data.document_mask else None
    dtype, train = getattr(torch, config.precision.compute), config.train
    with contextlib.closing(build_loader(config, "validation", Procs(), tokenizer)) as loader:
        engine = Local(model.model(dtype, device), Procs(), device, tokenizer.pad_id, mask)
        return Evaluator(loader, train.eval_tokens, train.micro_batch).evaluate(engine, biased=True)
