"""What saves memory or time never changes the trajectory: every feature of the engines on every layout."""

from functools import partial

import pytest
import torch
from matrix import configure, difference, train
from spawn import spawn

from lrpretrain.sharding.procs import Procs

FEATURES = {
    "accumulation": {},  # as all of them, in three micro-batches
    "chunked loss": {"model.loss_chunk": 20},
    "full checkpointing": {"model.checkpointing": "full"},
    "every second block": {"model.checkpointing": "full", "model.checkpoint_every": 2},
    "selective checkpointing": {"model.checkpointing": "selective"},
    "compiled": {"engine.compile": True},
    "together": {"model.checkpointing": "selective", "model.loss_chunk": 20, "engine.compile": True},
}
OF_FSDP = {
    "prefetch": {"engine.prefetch_blocks": 1},
    "blocks stay gathered": {"engine.reshard_after_forward": False},
    "gradients stay whole": {"engine.accumulate_unsharded": True},
    "together, FSDP2": {
        "engine.prefetch_blocks": 2,
        "engine.reshard_after_forward": False,
        "engine.compile": True,
        "model.checkpointing": "full",
    },
}
RULES = ("galore-std", "loro")
LAYOUTS = ("fsdp", "hsdp", "zero1", "zero2", "zero3")
CASES = [(layout, name) for layout in LAYOUTS for name in FEATURES] + [
    (layout, name) for layout in ("fsdp", "hsdp") for name in OF_FSDP
]


def compare(folder, cases):
    """Run cases (rule, layout, feature); return by case the worst differences from one process without it."""
    torch.compile = partial(
        torch.compile, backend="aot_eager"
    )  # traced as ever, without minutes of compilers
    procs = Procs.of_default_group()
    alone = {rule: train(configure(folder, rule, "local", 1, 1), Procs()) for rule in {c[0] for c in cases}}
    results = {}
    for rule, layout, name in cases:
        config = configure(folder, rule, layout, 3, procs.n_procs)
        for key, value in (FEATURES | OF_FSDP)[name].items():
            section, field = key.split(".")
            setattr(getattr(config, section), field, value)
        results[rule, layout, name] = difference(train(config, procs), alone[rule])
    return results


def check(n_procs, folder, cases):
    for results in spawn(compare, n_procs, folder, cases):
        assert results.keys() == set(cases)
    for (rule, layout, name), (losses, weights) in results.items():
        print(f"{rule:12}{layout:8}{name:25}{losses:10.1e}{weights:10.1e}")
        tolerance = 1e-4 if (FEATURES | OF_FSDP)[name].get("engine.compile") else 1e-5
        assert max(losses, weights) <= tolerance, (rule, layout, name)


def test_every_feature_on_every_layout(tmp_path):
    """Rules alternate: each meets every feature and every layout."""
    check(2, tmp_path, [(RULES[i % 2], *case) for i, case in enumerate(CASES)])


@pytest.mark.slow
def test_every_feature_on_every_layout_with_both_rules(tmp_path):
    check(2, tmp_path, [(rule, *case) for rule in RULES for case in CASES])
    check(4, tmp_path, [(rule, *case) for rule in RULES for case in CASES if case[0] == "hsdp"])
