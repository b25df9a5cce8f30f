"""How a model is spread over processes, and how its steps run there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from lrpretrain.config import Config
from lrpretrain.engine import ds_config
from lrpretrain.engine.base import Engine, Mask, Step
from lrpretrain.engine.fsdp import FSDP
from lrpretrain.engine.layers import Layers
from lrpretrain.engine.local import DDP, Local
from lrpretrain.engine.zero import Zero
from lrpretrain.model import blocks, llama
from lrpretrain.optim import groups
from lrpretrain.sharding import Holding
from lrpretrain.sharding.procs import Procs

__all__ = ["Engine", "Step", "assemble", "build_engine"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_engine(
    config: Config, procs: Procs, device: torch.device, *, pad_id: int, mask: Mask | None = None
) -> Engine:
    """Build, lay out and initialise a model to pretrain, and build its optimizer; see `assemble`."""
    model = llama.configured(config, DTYPES[config.precision.params])
    seed, std = config.train.seed, model.config.initializer_range
    init, init_from = config.optim.init, config.model.init_from

    def fill(holdings: list[Holding]) -> None:
        llama.initialize(holdings, seed, std, init, init_from)

    hidden_size = model.config.hidden_size
    return assemble(model, config, procs, device, fill, hidden_size, pad_id=pad_id, mask=mask)


def assemble(
    model: PreTrainedModel,
    config: Config,
    procs: Procs,
    device: torch.device,
    fill: Callable[[list[Holding]], None],
    hidden_size: int,
    *,
    pad_id: int,
    mask: Mask | None = None,
) -> Engine:
    """Lay out a model, `fill` what this process holds of it with values, and build its optimizer.

    The order matters: a model without memory is laid out first, so that no process ever holds what is
    not its own; values come next, tile by tile; wrappers that broadcast or hook into parameters after that;
    the optimizer last, on the parameters that stay. LORO's factors count by `hidden_size`, or by themselves
    if it is 0. All processes must call this.
    """
    kind = {"local": Local, "ddp": DDP, "fsdp": FSDP, "zero": Zero}[config.engine.kind]
    engine = kind(model, procs, device, pad_id, mask)
    if isinstance(engine, FSDP):
        engine.compute = DTYPES[config.precision.compute]
        engine.reduce = DTYPES[config.precision.reduce]
        engine.accumulate_unsharded = config.engine.accumulate_unsharded
        engine.replicas = config.engine.replicas
        engine.reshard_after_forward = config.engine.reshard_after_forward
        engine.prefetch_blocks = config.engine.prefetch_blocks
        if config.engine.shard_columns:
            engine.by_columns = groups.projected_on_the_left(llama.shapes(model), config.optim)
    if isinstance(engine, Zero):
        engine.ds_config = ds_config.load(config, procs.n_procs)
        engine.projected = groups.projected(llama.shapes(model), config.optim)
    _lay_out(engine, config)
    engine.holdings = engine.hold()
    fill(engine.holdings)
    engine.publish()
    if isinstance(engine, DDP):
        engine.wrap()
    params = ((h.name, h.param) for h in engine.holdings)
    engine.optimizer = groups.build_optimizer(params, config.optim, hidden_size)
    if config.optim.per_layer:
        engine.layers = Layers(engine.holdings, engine.optimizer, device)
    return engine


def _lay_out(engine: Engine, config: Config) -> None:
    """Checkpoint, compile and shard the model, in this order.

    The checkpoint lies inside what is compiled, so that the compiler sees what is computed again. Both act
    on blocks as they are, whose code is compiled once for all. Engines come last: their hooks, which gather
    parameters, stand around the other two.
    """
    blocks.recompute(engine.model, config.model.checkpointing, config.model.checkpoint_every)
    if config.engine.compile:
        blocks.compile(engine.model)
    engine.lay_out()
