"""DeepSpeed ZeRO: float32 masters are ranges of flat buffers, a range for each process.

    ZeRO-1, ZeRO-2   the parameters of a group lie one after the other in a buffer, which is cut into one
                     equal partition for each process: most matrices lie whole on one process
    ZeRO-3           every parameter is cut by itself, into ceil(numel / processes) numbers for each process

What is not trained has no master and lies in no buffer: whole on every process, and under ZeRO-3 cut like
the others.

Where a parameter lies is read from addresses and positions, not from DeepSpeed's own mapping, which is
wrong with `round_robin_gradients`. The attributes are those of deepspeed 0.19.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lrpretrain.sharding.tiles import Holding, Tiles, cut

Ranges = tuple[tuple[int, int], ...]


class Shard(Tensor):
    """This process's range of a parameter, as a view of the flat master `flat`.

    whole is the parameter's shape, ranges what each process of `group` holds of it.
    """

    whole: tuple[int, ...]
    ranges: Ranges
    group: dist.ProcessGroup
    flat: Tensor
    span: slice
    even: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(
        cls,
        flat: Tensor,
        begin: int,
        whole: tuple[int, ...],
        ranges: Ranges,
        group: dist.ProcessGroup,
        even: bool,
    ) -> Shard:
        """Return the shard that begins at `begin` of the flat buffer."""
        own = ranges[dist.get_rank(group)]
        span = slice(begin, begin + own[1] - own[0])
        shard = flat.detach()[span].as_subclass(cls)
        shard.requires_grad_(flat.requires_grad)
        shard.whole, shard.ranges, shard.group = whole, ranges, group
        shard.flat, shard.span, shard.even = flat, span, even
        return shard


def hold(name: str, shard: Shard) -> Holding:
    """Return what this process holds of a parameter under ZeRO."""
    spread = _spread(shard.whole, shard.ranges)
    own = spread[dist.get_rank(shard.group)]
    if len(spread) == 1:
        return Holding(name, shard, shard.whole, own)
    return Holding(name, shard, shard.whole, own, spread, 0, shard.group, shard.even)


def shards(optimizer: Any) -> Iterator[tuple[Tensor, Shard]]:
    """Yield the model's parameters, each with this process's range of its master.

    `optimizer` is what `deepspeed.initialize` made: ZeRO-1, 2, 3 or BF16_Optimizer.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _stage3(optimizer)
        return
    if hasattr(optimizer, "bf16_groups"):
        lists = optimizer.bf16_groups, optimizer.bf16_groups_flat, optimizer.fp32_groups_flat_partition
    else:
        masters = optimizer.single_partition_of_fp32_groups
        lists = optimizer.bit16_groups, optimizer.bit16_groups_flat, masters
    for params, flat, master, group in zip(*lists, optimizer.real_dp_process_group, strict=True):
        yield from _buffer(params, flat, master, group)


def _buffer(
    params: Sequence[Tensor], flat: Tensor, master: Tensor, group: dist.ProcessGroup
) -> Iterator[tuple[Tensor, Shard]]:
    size, n_procs, proc = master.numel(), dist.get_world_size(group), dist.get_rank(group)
    for param in params:
        begin = (param.data_ptr() - flat.data_ptr()) // param.element_size()
        cuts = [min(max(k * size - begin, 0), param.numel()) for k in range(n_procs + 1)]
        ranges = tuple(itertools.pairwise(cuts))
        at = max(begin - proc * size, 0) if ranges[proc][0] < ranges[proc][1] else 0
        yield param, Shard.of(master, at, tuple(param.shape), ranges, group, even=False)


def _stage3(optimizer: Any) -> Iterator[tuple[Tensor, Shard]]:
    for sub_group, params in enumerate(optimizer.fp16_groups):
        group = optimizer.sub_group_process_groups[sub_group]
        master = optimizer.fp32_partitioned_groups_flat[sub_group]
        for param in params:
            at, begin, part = optimizer.grad_position[optimizer.get_param_id(param)]
            assert at == sub_group
            yield param, _even_shard(param, master, begin, part, group)


def frozen(param: Any) -> Any:
    """Return what this process has of a parameter that is not trained: the network's own numbers."""
    if not hasattr(param, "ds_tensor"):
        return param
    return _even_shard(param, param.ds_tensor, 0, param.ds_tensor.numel(), param.ds_process_group)


def _even_shard(param: Any, flat: Tensor, begin: int, part: int, group: dist.ProcessGroup) -> Shard:
    """Return the shard of a parameter of which every process has `part` numbers, the last ones fewer."""
    cuts = [min(k * part, param.ds_numel) for k in range(dist.get_world_size(group) + 1)]
    return Shard.of(flat, begin, tuple(param.ds_shape), tuple(itertools.pairwise(cuts)), group, even=True)


@functools.cache
def _spread(shape: tuple[int, ...], ranges: Ranges) -> tuple[Tiles, ...]:
    return tuple(cut(shape, *range_) for range_ in ranges)
