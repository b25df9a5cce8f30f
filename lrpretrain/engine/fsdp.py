"""FSDP2: parameters, gradients and optimizer state in shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from lrpretrain.engine.base import Engine
from lrpretrain.model import blocks
from lrpretrain.model.llama import materialize


class FSDP(Engine):
    """Every decoder block is a unit of its own; embeddings, the last norm and the head are the root's."""

    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32
    accumulate_unsharded: bool = False
    replicas: int = 1
    reshard_after_forward: bool = True
    prefetch_blocks: int = 0
    by_columns: frozenset[str] = frozenset()

    def lay_out(self) -> None:
        """Shard the model over all processes, then give it memory: it never exists whole."""
        shards = self.procs.n_procs // self.replicas
        if self.replicas == 1:
            mesh = init_device_mesh(self.device.type, (shards,), mesh_dim_names=("shard",))
        else:
            shape, dims = (self.replicas, shards), ("replicate", "shard")
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=dims)
        names = {param: name for name, param in self.model.named_parameters()}

        def place(param: nn.Parameter) -> Shard | None:
            fits = names[param] in self.by_columns and param.shape[1] % shards == 0
            return Shard(1) if fits else None

        policy = MixedPrecisionPolicy(param_dtype=self.compute, reduce_dtype=self.reduce)
        reshard = self.reshard_after_forward
        layers = [
            fully_shard(
                block, mesh=mesh, mp_policy=policy, shard_placement_fn=place, reshard_after_forward=reshard
            )
            for block in blocks.of(self.model)
        ]
        fully_shard(self.model, mesh=mesh, mp_policy=policy, shard_placement_fn=place)
        materialize(self.model, self.device)
        if ahead := self.prefetch_blocks:
            for i, block in enumerate(layers):
                block.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + ahead])
                block.set_modules_to_backward_prefetch(layers[max(i - ahead, 0) : i][::-1])

    @contextlib.contextmanager
    def accumulation(self, last: bool) -> Iterator[None]:
        """Reduce-scatter after every micro-batch, or once a step with `accumulate_unsharded`."""
        assert isinstance(self.model, FSDPModule)  # fully_shard changed its class
        self.model.set_requires_gradient_sync(last or not self.accumulate_unsharded)
        yield
