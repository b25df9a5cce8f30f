"""What is particular to DeepSpeed: where masters lie, what is skipped, what is refused."""

import pytest
import torch
from matrix import LAYOUTS, LENGTH, ROWS, ZERO3, batches, configure, whole_weights
from spawn import spawn

from lrpretrain.engine import build_engine
from lrpretrain.errors import ConfigError
from lrpretrain.model.llama import initial_tile
from lrpretrain.optim import GaLoreAdamW
from lrpretrain.sharding import Tile
from lrpretrain.sharding.procs import Procs

ZEROS = [layout for layout in LAYOUTS if layout.startswith("zero")]
BF16 = {"precision": {"compute": "bfloat16"}}


def build(folder, layout, rule="galore-std", **sections):
    procs = Procs.of_default_group()
    config = configure(folder, rule, layout, 1, procs.n_procs, **sections)
    return build_engine(config, procs, torch.device("cpu"), pad_id=0)


def step(engine, rows, scale=1.0):
    own = rows.split(ROWS // engine.procs.n_procs)[engine.procs.proc]
    return engine.train_step([own], ROWS * (LENGTH - 1), 0.5, scale)


def starts(folder):
    """Return, by layout, whether masters and network start as the names and the seed say."""
    found = {}
    for layout, sections in [*((layout, {}) for layout in ZEROS), ("zero1", BF16), ("zero3", BF16)]:
        engine = build(folder, layout, **sections)
        for name, weight in whole_weights(engine, engine.procs).items():
            shape = tuple(weight.shape)
            drawn = initial_tile(name, shape, Tile.whole(shape), 0) * 0.02 if weight.dim() == 2 else 1
            assert torch.equal(weight, torch.as_tensor(drawn).expand(shape)), (layout, name)
        rows = batches()[0][:2]
        exact = build_reference(folder).loss_sum(rows)
        loss = engine.loss_sum(rows)  # the network's own parameters, through DeepSpeed's hooks
        assert float(loss) == pytest.approx(float(exact), rel=1e-2 if sections else 1e-6)
        found[layout, bool(sections)] = sum(h.weight.numel() for h in engine.holdings)
        engine.close()
    return found


def build_reference(folder):
    config = configure(folder, "galore-std", "local", 1, 1)
    return build_engine(config, Procs(), torch.device("cpu"), pad_id=0)


def test_masters_start_as_on_one_process_and_are_spread(tmp_path):
    results = spawn(starts, 3, tmp_path)
    total = sum(p.numel() for p in build_reference(tmp_path).model.parameters())
    for layout in results[0]:
        shares = [r[layout] for r in results]
        assert sum(shares) == total
        assert max(shares) < 0.36 * total


def refusals(folder):
    LAYOUTS["split"] = ({"kind": "zero"}, ZERO3 | {"sub_group_size": 100})
    with pytest.raises(ConfigError, match=r"weight_in and .*weight_out lie in different sub-groups"):
        build(folder, "split", "loro")

    import deepspeed

    layer = torch.nn.Linear(6, 4, bias=False)
    optimizer = GaLoreAdamW([{"params": [layer.weight], "rank": 2}])
    config = {
        "train_batch_size": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = deepspeed.initialize(model=layer, optimizer=optimizer, config=config)
    engine.backward(engine(torch.ones(1, 6)).sum())
    with pytest.raises(ConfigError, match=r"other buffers.*engine.kind=zero"):
        engine.step()
    return True


def test_what_cannot_be_run_raises(tmp_path):
    assert spawn(refusals, 2, tmp_path) == [True, True]
