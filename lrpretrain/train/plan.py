"""What a configuration amounts to, before anything of it exists: its problems, and its arithmetic."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lrpretrain.config import Config
from lrpretrain.engine import ds_config
from lrpretrain.errors import ConfigError, Problem
from lrpretrain.model import llama
from lrpretrain.model.lowrank import initial_factor
from lrpretrain.model.pretrained import Pretrained
from lrpretrain.optim import groups
from lrpretrain.sharding.placement import PLACEMENTS
from lrpretrain.train import memory
from lrpretrain.train.schedule import RESTARTING

VARIANTS: list[tuple[Any, Any]] = [
    ("adamw", "auto"),
    *itertools.product(groups.PROJECTED, PLACEMENTS),
    ("loro", "auto"),
]


def problems(config: Config, n_procs: int) -> list[Problem | str]:
    """Return everything that cannot work in a configuration, with a look at the files that it names."""
    found = check(config, n_procs)
    if config.engine.kind == "zero":
        found += ds_config.problems(config, n_procs)
    try:
        shape = llama.load_config(config.model)
    except ConfigError as error:
        return [*found, *error.problems]
    found += too_long(config, shape.max_position_embeddings)
    shapes = llama.shapes(llama.build(shape))
    if config.model.init_from is not None:
        try:
            found += Pretrained(config.model.init_from).problems(shapes)
        except ConfigError as error:
            found += error.problems
    return found + groups.problems(shapes, config.optim)


def too_long(config: Config, positions: int) -> list[Problem | str]:
    """Return what is wrong where rows are longer than the model's positions."""
    if config.data.seq_len <= positions:
        return []
    reason, remedy = f"is longer than the model's {positions} positions", "Lower it, or use another model"
    return [Problem("data.seq_len", config.data.seq_len, reason, remedy)]


def check(config: Config, n_procs: int) -> list[Problem | str]:
    """Return what cannot work in a configuration by itself, without a look at models or data."""
    model, data, optim, train = config.model, config.data, config.optim, config.train
    engine, precision = config.engine, config.precision
    found: list[Problem | str] = []

    def refuse(wrong: bool, key: str, reason: str, remedy: str) -> None:
        if wrong:
            section, name = key.split(".")
            found.append(Problem(key, getattr(getattr(config, section), name), reason, remedy))

    whole = "data.seq_len data.lanes data.prefetch data.workers optim.rank optim.refresh_every train.steps"
    for key in [
        *whole.split(),
        *"optim.adapter_rank train.micro_batch train.global_batch train.log_every train.eval_tokens".split(),
        "model.checkpoint_every",
    ]:
        section, name = key.split(".")
        refuse(getattr(getattr(config, section), name) < 1, key, "must be at least 1", "Raise it")
    for key in [
        *"train.eval_every train.save_every train.keep_checkpoints train.keep_every".split(),
        *"train.warmup_steps train.restart_warmup_steps train.profile_steps".split(),
        *"model.loss_chunk engine.prefetch_blocks train.max_skipped train.spike_sigmas".split(),
    ]:
        section, name = key.split(".")
        refuse(getattr(getattr(config, section), name) < 0, key, "must not be negative", "0 turns it off")
    refuse(train.spike_window < 2, "train.spike_window", "has no deviation", "Raise it to 2 or more")
    refuse(
        train.keep_every > 0 and (not train.save_every or train.keep_every % train.save_every != 0),
        "train.keep_every",
        f"is no multiple of train.save_every={train.save_every}",
        "Use a multiple, of a train.save_every above 0",
    )
    refuse(train.profile_from < 0, "train.profile_from", "must not be negative", "0 records the first steps")
    refuse(
        train.profile_steps > 0 and train.profile_from >= train.steps,
        "train.profile_from",
        f"nothing would be recorded in train.steps={train.steps}",
        "Lower it",
    )
    for key in ("optim.attn_rank", "optim.mlp_rank", "optim.refresh_moments_every"):
        number = getattr(optim, key.removeprefix("optim."))
        refuse(number is not None and number < 1, key, "must be at least 1", "Raise it, or leave it out")
    positive = "optim.lr optim.lr_regular optim.eps optim.scale optim.adapter_alpha engine.timeout_s"
    for key in [*positive.split(), "data.hub_patience_s", "run.time_limit_s"]:
        section, name = key.split(".")
        number = getattr(getattr(config, section), name)
        fits = number is None or (number > 0 and math.isfinite(number))
        refuse(not fits, key, "must be a number above 0", "Raise it")
    refuse(optim.exact_every < 0, "optim.exact_every", "must not be negative", "0 turns exact steps off")
    try:
        initial_factor(torch.ones(2, 1), optim.init, 1.0)
    except ValueError as error:
        refuse(True, "optim.init", str(error).rstrip("."), "Use xavier")
    refuse(not all(0 <= b < 1 for b in optim.betas), "optim.betas", "must lie in [0, 1)", "Use [0.9,0.999]")
    refuse(
        not 0 <= optim.weight_decay < math.inf, "optim.weight_decay", "must not be negative", "0 turns it off"
    )
    refuse(
        train.clip_norm is not None and not train.clip_norm > 0,
        "train.clip_norm",
        "must be above 0",
        "Leave it out",
    )
    refuse(not 0 <= train.min_lr_ratio <= 1, "train.min_lr_ratio", "must lie in [0, 1]", "Use 0.1")
    refuse(data.epochs is not None and data.epochs < 1, "data.epochs", "must be at least 1", "Leave it out")
    refuse(data.seq_len == 1, "data.seq_len", "a row of one token has nothing to predict", "Raise it")

    refuse(
        train.warmup_steps >= train.steps,
        "train.warmup_steps",
        f"is not below train.steps={train.steps}",
        "Lower it",
    )
    decay = train.decay_steps
    if train.schedule == "wsd" and decay is not None:
        room = train.steps - train.warmup_steps
        refuse(
            not 0 < decay <= room,
            "train.decay_steps",
            f"does not fit into {room} steps after the warm-up",
            "Lower it",
        )
    if train.schedule in RESTARTING:
        refuse(
            (train.restart_every or 0) < 1,
            "train.restart_every",
            f"{train.schedule} needs it",
            "Give a number of steps",
        )
        room = train.steps - train.warmup_steps
        refuse(
            not 0 <= train.peak_delay_steps <= max(room, 0),
            "train.peak_delay_steps",
            f"does not fit into {room} steps after the warm-up",
            "Lower it",
        )
        every = optim.refresh_moments_every or (optim.exact_every if optim.rule == "loro" else 0)
        refreshes = every > 0 and optim.rule in groups.FACTORED and optim.refresh_moments != "none"
        refuse(
            refreshes and train.restart_at == "refresh" and train.restart_every != every,
            "train.restart_every",
            f"ramps would not follow the refreshes of moments, every {every} steps",
            f"Use {every}, or train.restart_at=compat",
        )

    slots = max(train.micro_batch, 1) * n_procs
    refuse(
        train.global_batch % slots != 0,
        "train.global_batch",
        f"is not a multiple of {n_procs} processes × train.micro_batch={train.micro_batch}",
        f"Use {max(train.global_batch // slots, 1) * slots}, or another train.micro_batch",
    )
    refuse(
        engine.kind == "local" and n_procs > 1,
        "engine.kind",
        f"local runs in one process, and {n_procs} were started",
        "Use fsdp, zero or ddp",
    )
    refuse(
        engine.replicas < 1 or n_procs % max(engine.replicas, 1) != 0,
        "engine.replicas",
        f"does not divide the {n_procs} processes",
        "Use 1, or the number of nodes",
    )
    refuse(
        engine.replicas > 1 and engine.kind != "fsdp",
        "engine.replicas",
        f"engine.kind={engine.kind} has no shards to replicate",
        "Use engine.kind=fsdp",
    )
    of_fsdp = {
        "accumulate_unsharded": engine.accumulate_unsharded,
        "reshard_after_forward": not engine.reshard_after_forward,
        "prefetch_blocks": engine.prefetch_blocks > 0,
    }
    for name, chosen in of_fsdp.items():
        reason = f"engine.kind={engine.kind} has no such choice"
        refuse(chosen and engine.kind != "fsdp", f"engine.{name}", reason, "Leave it out")
    refuse(
        model.checkpointing == "none" and model.checkpoint_every > 1,
        "model.checkpoint_every",
        "model.checkpointing=none keeps every activation",
        "Use full or selective, or leave it out",
    )
    refuse(
        engine.compile and shutil.which(os.environ.get("CXX", "g++")) is None,
        "engine.compile",
        "there is no C++ compiler here",
        "Install g++, or name one in the environment variable CXX",
    )
    refuse(
        engine.ds_config is not None and engine.kind != "zero",
        "engine.ds_config",
        f"engine.kind={engine.kind} has no use for DeepSpeed's settings",
        "Use engine.kind=zero, or leave it out",
    )
    refuse(
        engine.kind == "zero" and precision.params == "bfloat16",
        "precision.params",
        "ZeRO updates float32 weights, whatever it computes with",
        "Use float32, with precision.compute=bfloat16",
    )
    mixed = precision.compute != precision.params
    refuse(
        mixed and engine.kind != "zero" and (engine.kind != "fsdp" or precision.params == "bfloat16"),
        "precision.compute",
        f"is not supported over precision.params={precision.params} with engine.kind={engine.kind}",
        "Use bfloat16 over float32 with engine.kind=fsdp or zero (one process will do), or the same for both",
    )
    refuse(
        precision.reduce == "bfloat16" and (engine.kind != "fsdp" or precision.compute == "float32"),
        "precision.reduce",
        "is for bfloat16 arithmetic with engine.kind=fsdp",
        'Leave it out; under ZeRO write "communication_data_type": "bf16" into engine.ds_config',
    )
    refuse(
        optim.mode != "weightnorm" and optim.rule != "gradnormlorp",
        "optim.mode",
        f"optim.rule={optim.rule} has no modes",
        "Use optim.rule=gradnormlorp, or leave it out",
    )
    refuse(
        optim.mode == "dora" and config.model.init_from is None,
        "model.init_from",
        "optim.mode=dora trains adapters of given weights",
        "Name a Hugging Face folder with model*.safetensors",
    )
    refuse(
        optim.rule in groups.FACTORED and config.model.init_from is not None,
        "model.init_from",
        f"holds dense weights, and optim.rule={optim.rule} trains low-rank factors from scratch",
        "Leave it out, or use another rule",
    )
    cut = engine.kind == "zero" or (engine.kind == "fsdp" and n_procs > engine.replicas)
    adafactor = "adafactor" in (optim.rule, optim.base)
    refuse(
        optim.base == "adafactor" and (optim.rule not in groups.PROJECTED or optim.mode != "weightnorm"),
        "optim.base",
        f"optim.rule={optim.rule} with optim.mode={optim.mode} runs on adamw only",
        "Use optim.rule=galore, or optim.base=adamw",
    )
    for key in ("optim.base", "optim.rule"):
        refuse(
            getattr(optim, key.removeprefix("optim.")) in ("adafactor", "sgd") and cut,
            key,
            f"runs on whole parameters, which engine.kind={engine.kind} cuts",
            "Use adamw, or engine.kind=ddp",
        )
    refuse(
        adafactor and optim.moments_at_refresh != "keep",
        "optim.moments_at_refresh",
        "the moments of adafactor are kept",
        "Use keep",
    )
    refuse(
        adafactor and optim.moments not in (None, "float32"),
        "optim.moments",
        "the moments of adafactor are few, in float32",
        "Leave it out",
    )
    refuse(not 0 <= optim.momentum < 1, "optim.momentum", "must lie in [0, 1)", "Use 0.9, or 0 for none")
    refuse(
        optim.momentum > 0 and not adafactor and optim.rule != "sgd",
        "optim.momentum",
        f"optim.rule={optim.rule} has its own first moment",
        "Set optim.betas, or leave it out",
    )
    projects = optim.rule in groups.PROJECTED
    refuse(
        optim.moments == "int8" and not (projects or optim.rule == "adamw" or adafactor),
        "optim.moments",
        f"optim.rule={optim.rule} keeps floats",
        "Use bfloat16 or float32",
    )
    refuse(
        optim.moments == "int8" and optim.rule == "adamw" and cut,
        "optim.moments",
        f"its blocks run along rows of whole matrices, which engine.kind={engine.kind} cuts",
        "Use bfloat16 or float32, or engine.kind=ddp",
    )
    refuse(
        optim.moments == "int8" and optim.mode == "lowrank_wn",
        "optim.moments",
        "optim.mode=lowrank_wn keeps floats",
        "Use bfloat16 or float32, or optim.mode=weightnorm",
    )
    refuse(
        optim.basis is not None and not projects,
        "optim.basis",
        f"optim.rule={optim.rule} has no bases",
        "Leave it out",
    )
    refuse(
        optim.mode == "lowrank_wn" and cut,
        "optim.mode",
        f"needs whole matrices, which engine.kind={engine.kind} cuts",
        "Use optim.mode=weightnorm, or engine.kind=ddp",
    )
    refuse(
        optim.per_layer and optim.rule in groups.FACTORED,
        "optim.per_layer",
        f"optim.rule={optim.rule} steps all pairs of factors together, and renews moments of the whole model",
        "Leave it out, or use another rule",
    )
    no_layers = {
        "zero": "DeepSpeed updates once, after the backward, from buffers that hold all gradients",
        "ddp": "DDP adds gradients up in buckets, which hold all of them",
    }
    refuse(
        optim.per_layer and engine.kind in no_layers,
        "optim.per_layer",
        no_layers.get(engine.kind, ""),
        "Use engine.kind=fsdp, or local in one process",
    )
    refuse(
        optim.per_layer and engine.kind == "fsdp" and engine.replicas > 1,
        "optim.per_layer",
        "FSDP2 keeps all gradients that replicas have added up to the end of the backward",
        "Use engine.replicas=1, or leave it out",
    )
    refuse(
        data.document_mask and data.sequences == "pad",
        "data.document_mask",
        "rows of pad hold one document",
        "Use data.sequences=pack",
    )
    needs_path = data.source in ("files", "tokens") and not data.path
    refuse(
        needs_path,
        "data.path",
        f"data.source={data.source} needs it",
        "Name the folder (or glob) of the shards",
    )
    refuse(
        data.source == "sample" and data.path is not None,
        "data.path",
        "the embedded corpus has no path",
        "Use data.source=files",
    )
    refuse(
        data.source in ("files", "hub") and not data.tokenizer,
        "data.tokenizer",
        "text needs a tokenizer",
        "Name a .model file (`lrpretrain tokenizer train` makes one) or one of the hub (t5-base)",
    )
    return found


def describe(config: Config, n_procs: int) -> str:
    """Return the numbers that follow from a configuration, each with its arithmetic."""
    train, data = config.train, config.data
    slots = n_procs * train.micro_batch
    micros = max(train.global_batch // max(slots, 1), 1)
    per_step = train.global_batch * data.seq_len
    model = llama.configured(config)
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    optimizer = groups.build_optimizer(model.named_parameters(), config.optim, model.config.hidden_size)
    state: Counter[str] = Counter()
    for _, key, piece in optimizer.pieces():
        if piece.tensor.dtype != torch.int64:  # the counters
            state[key] += piece.tensor.numel()
    total = sum(sizes.values())
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    return "\n".join(
        [
            f"{n_procs} processes × {train.micro_batch} micro-batch × {micros} accumulation"
            f" × {data.seq_len} tokens = {slots * micros * data.seq_len:,} tokens per step",
            f"{train.steps:,} steps × {per_step:,} tokens = {train.steps * per_step:,} tokens"
            + (" (pads included)" if data.sequences == "pad" else ""),
            f"{len(sizes)} parameters of {total:,} numbers"
            + (f", {trained:,} of them trained" if trained < total else ""),
            f"optimizer state: {' + '.join(f'{key} {count:,}' for key, count in state.items())}"
            f" = {state.total():,} numbers, {state.total() / total:.2f} a parameter",
            *memory.describe(config, model, n_procs),
            *([ds_config.describe(config, n_procs)] if config.engine.kind == "zero" else []),
        ]
    )


def table(config: Config, n_procs: Sequence[int]) -> str:
    """Return a Markdown table of memory by rule, placement and number of processes, all else as configured.

    A step has one micro-batch of a row; `seeded` draws random bases. A rule that the configuration does not
    suit is left out. Raises ConfigError if the configuration itself cannot work.
    """
    if found := problems(_one_micro_batch(config, n_procs[0]), n_procs[0]):
        raise ConfigError(found)
    header = ["GiB", *(f"{n}: {column}" for n in n_procs for column in memory.COLUMNS)]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for rule, placement in VARIANTS:
        subspace = "random" if placement == "seeded" else config.optim.subspace
        optim = replace(config.optim, rule=rule, placement=placement, subspace=subspace)
        row = [f"{rule} {placement}" if rule in groups.PROJECTED else rule]
        for n in n_procs:
            point = _one_micro_batch(replace(config, optim=optim), n)
            if not problems(point, n):
                row += memory.row(point, llama.configured(point), n)
        if len(row) == len(header):
            rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _one_micro_batch(config: Config, n_procs: int) -> Config:
    return replace(config, train=replace(config.train, micro_batch=1, global_batch=n_procs))


def flops_per_token(config: Config) -> float:
    """Return the FLOPs of forward and backward for one token: 6 per weight, 12 l h s for attention.

    Source: Chowdhery et al., arXiv 2204.02311, appendix B; embeddings are looked up, not multiplied, and
    frozen weights, which have no gradient, count 4.
    """
    model = llama.configured(config)
    shape = model.config
    multiplied = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
    weights = sum((6.0 if p.requires_grad else 4.0) * p.numel() for p in multiplied)
    return weights + 12.0 * shape.num_hidden_layers * shape.hidden_size * config.data.seq_len
