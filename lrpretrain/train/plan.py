"""What a configuration amounts to, before anything of it exists: its problems, and its arithmetic."""

from __future__ import annotations

import math

from lrpretrain.config import Config, check
from lrpretrain.errors import ConfigError, Problem
from lrpretrain.model import llama
from lrpretrain.optim import groups


def problems(config: Config, n_procs: int) -> list[Problem | str]:
    """Return everything that cannot work in a configuration, with a look at the model's shapes."""
    found = check(config, n_procs)
    try:
        shape = llama.load_config(config.model)
    except ConfigError as error:
        return [*found, *error.problems]
    if config.data.seq_len > shape.max_position_embeddings:
        reason = f"is longer than the model's {shape.max_position_embeddings} positions"
        found.append(
            Problem("data.seq_len", config.data.seq_len, reason, "Lower it, or use another model.config")
        )
    return found + groups.problems(llama.shapes(llama.build(shape)), config.optim)


def describe(config: Config, n_procs: int) -> str:
    """Return the numbers that follow from a configuration, each with its arithmetic."""
    train, data = config.train, config.data
    micros = max(train.global_batch // max(n_procs * train.micro_batch, 1), 1)
    shapes = llama.shapes(llama.build(llama.load_config(config.model)))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    ranks = {} if config.optim.rule == "adamw" else groups.matched(shapes, config.optim)
    projected = sum(sizes[name] for name in ranks)
    moments = sum(max(shapes[name]) * rank for name, rank in ranks.items())
    bases = sum(min(shapes[name]) * rank for name, rank in ranks.items())
    regular = sum(sizes.values()) - projected
    per_step = train.global_batch * data.seq_len
    lines = [
        f"{n_procs} processes × {train.micro_batch} micro-batch × {micros} accumulation"
        f" × {data.seq_len} tokens = {n_procs * train.micro_batch * micros * data.seq_len:,} tokens per step",
        f"{train.steps:,} steps × {per_step:,} tokens = {train.steps * per_step:,} tokens"
        + (" (pads included)" if data.sequences == "pad" else ""),
        f"{len(shapes)} parameters: {projected:,} projected + {regular:,} regular = {sum(sizes.values()):,}",
    ]
    if ranks and config.optim.side == "std":
        lines.append(
            f"optimizer state: 2 × {regular:,} + 2 × {moments:,} + {bases:,} (bases)"
            f" = {2 * regular + 2 * moments + bases:,} numbers; AdamW: {2 * sum(sizes.values()):,}"
        )
    return "\n".join(lines)


def flops_per_token(config: Config) -> float:
    """Return the FLOPs of forward and backward for one token: 6 per weight, 12 l h s for attention.

    Source: Chowdhery et al., arXiv 2204.02311, appendix B; embeddings are looked up, not multiplied.
    """
    shape = llama.load_config(config.model)
    sizes = {name: math.prod(s) for name, s in llama.shapes(llama.build(shape)).items()}
    weights = sum(size for name, size in sizes.items() if "embed_tokens" not in name)
    return 6.0 * weights + 12.0 * shape.num_hidden_layers * shape.hidden_size * config.data.seq_len
