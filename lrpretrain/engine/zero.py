"""DeepSpeed ZeRO-1, 2 and 3: DeepSpeed runs forward, backward, reduction and clipping, and lets us update.

It steps a `Client`, an optimizer of its own flat buffers. The real one works on this process's ranges of
those buffers (lrpretrain/sharding/zero.py), under the parameters' names.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lrpretrain.engine.base import Engine
from lrpretrain.errors import ConfigError
from lrpretrain.model import blocks
from lrpretrain.model.llama import materialize
from lrpretrain.optim import ShardedOptimizer
from lrpretrain.sharding import Holding, hold, zero


class Client(torch.optim.Optimizer):
    """What DeepSpeed steps: once for all groups, for each group, or for each sub-group."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {"lr": 0.0})
        self.shards: dict[int, list[zero.Shard]] = {}  # by the flat buffer that they are views of
        self.optimizer: ShardedOptimizer | None = None
        self.fine = True  # else it leaves everything as it is

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what lies in the buffers that DeepSpeed shows now, with their gradients."""
        assert self.optimizer is not None, "DeepSpeed stepped before there was an optimizer"
        flats = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not flats or not self.fine:
            return
        active = [(shard, flat.grad) for flat in flats for shard in self.shards[id(flat)]]
        for shard, grad in active:
            shard.grad = grad[shard.span]
        # As the other engines do, to the rounding; DeepSpeed does not come here with a broken gradient.
        self.optimizer.step_if(torch.tensor(True, device=flats[0].device))
        for shard, _ in active:
            shard.grad = None


class Zero(Engine):
    """DeepSpeed's engine; `ds_config` is its configuration, `projected` names the matrices of the rule."""

    ds_config: dict[str, Any]
    projected: frozenset[str] = frozenset()

    def lay_out(self) -> None:
        """Give the model memory and hand it to DeepSpeed; under ZeRO-3 it never exists whole."""
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, also without a launcher
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        deepspeed.init_distributed(dist_init_required=False)
        if self.ds_config["zero_optimization"]["stage"] == 3:

            def partition(module: nn.Module) -> None:
                deepspeed.zero.Init(module=module, config_dict_or_path=self.ds_config)

            materialize(self.model, self.device, each=partition)
            # Blocks are gathered whole, as under FSDP2: no hook within them stops the compiler. Not with
            # frozen weights (DoRA), which DeepSpeed then lets go before their norms' gradient is taken.
            if all(param.requires_grad for param in self.model.parameters()):
                deepspeed.utils.set_z3_leaf_modules(self.model, [type(blocks.of(self.model)[0])])
        else:
            materialize(self.model, self.device)
        # What a rule treats as matrices is a group by itself, so that it is spread evenly. LORO's factors lie
        # in it pair by pair.
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                groups[name in self.projected].append(param)
        self.client = Client([{"params": params} for params in groups.values() if params])
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its use of memory, whatever one asks for
            self.forward, *_ = deepspeed.initialize(
                model=self.model, optimizer=self.client, config=self.ds_config, dist_init_required=False
            )

    @property
    def deepspeed(self) -> Any:
        """The engine that DeepSpeed made."""
        return self.forward

    def hold(self) -> list[Holding]:
        """Return this process's ranges of the float32 masters, and of what is not trained."""
        shards = dict(zero.shards(self.deepspeed.optimizer))
        for shard in shards.values():
            self.client.shards.setdefault(id(shard.flat), []).append(shard)
        for name, param in self.model.named_parameters():
            twin = name.removesuffix("weight_in") + "weight_out"
            if name.endswith("weight_in") and shards[param].flat is not shards[self._param(twin)].flat:
                reason = f"{name} and {twin} lie in different sub-groups, and LORO needs them together"
                raise ConfigError([f"{reason}. Raise zero_optimization.sub_group_size."])
        own = (
            (n, shards[p] if p.requires_grad else zero.frozen(p)) for n, p in self.model.named_parameters()
        )
        return [hold(name, part) for name, part in own]

    def publish(self) -> None:
        """Copy the masters into the network's own parameters."""
        optimizer = self.deepspeed.optimizer
        if hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
            return
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        if kept := optimizer.persistent_parameters:  # whole copies, which would stay as they were
            kept[0].partition(kept, has_been_updated=False)
            kept[0].all_gather(kept)

    @contextlib.contextmanager
    def accumulation(self, last: bool) -> Iterator[None]:
        """Tell DeepSpeed which micro-batch is the last one of the step."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Run backward for one micro-batch."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def update(self, clip_norm: float | None, fine: Tensor) -> tuple[Tensor, Tensor]:
        """Let DeepSpeed clip, to the norm of its configuration, and update; see Engine.update.

        The host waits for the device, as DeepSpeed does: it decides there about gradients.
        """
        self.client.optimizer, self.client.fine = self.optimizer, bool(fine)
        self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        norm = self.deepspeed.get_global_grad_norm() if applied else torch.inf
        return torch.as_tensor(norm, device=fine.device), fine & applied

    def settle(self) -> None:
        """Let the last step be: one that is not sound never comes to the optimizer."""
        self.optimizer.settle(True)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self.deepspeed.destroy()

    def _param(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)
