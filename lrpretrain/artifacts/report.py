"""What a checkpoint holds, for people."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch

from lrpretrain.artifacts import checkpoint


def describe(path: Path) -> str:
    """Return the progress, the tensors by kind, and the data position of a checkpoint.

    Raises CheckpointError where it is incomplete, of another format, or cannot be read.
    """
    manifest, run = checkpoint.read_manifest(path), checkpoint.read_run(path)
    optim, data = run["config"]["optim"], run["data"]
    lines = [
        str(path),
        f"step {run['step']:,} of {run['config']['train']['steps']:,}, {run['tokens']:,} tokens,"
        f" format {manifest['format']}",
        f"{run['config']['model']['config']}, {optim['rule']} of rank {optim['rank']}",
        *_tensors(path),
        f"data: pass {data['epoch'] + 1}, {data['given']:,} sequences into it, {sum(data['is_open'])} of"
        f" {len(data['is_open'])} lanes open; {data['the shards of data.path']}; seed {data['train.seed']}",
    ]
    return "\n".join(lines)


def _tensors(path: Path) -> list[str]:
    """Return a table of the weights and of each key of the optimizer's state."""
    tensors: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    for name, entry in checkpoint.read_index(path).items():
        kind = name.rpartition("/")[2] if name.startswith("optim/") else "weights"
        tensors[kind, entry["dtype"]] += 1
        numbers[kind, entry["dtype"]] += math.prod(entry["shape"])
    lines = [f"{'tensors of':<20} {'dtype':<10} {'count':>6} {'numbers':>16} {'bytes':>16}"]
    size = {key: count * getattr(torch, key[1]).itemsize for key, count in numbers.items()}
    for (kind, dtype), count in tensors.items():
        key = kind, dtype
        lines.append(f"{kind:<20} {dtype:<10} {count:>6,} {numbers[key]:>16,} {size[key]:>16,}")
    total = f"{tensors.total():>6,} {numbers.total():>16,} {sum(size.values()):>16,}"
    return [*lines, f"{'all':<20} {'':<10} {total}"]
