"""What engines do to a model: initial weights, memory, clipping, accumulation, masks."""

import resource

import pytest
import torch
import torch.distributed as dist
from spawn import spawn
from tiny import TINY
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from lrpretrain.config import Config, DataConfig, EngineConfig, OptimConfig, PrecisionConfig
from lrpretrain.data.pack import document_mask
from lrpretrain.engine import build_engine
from lrpretrain.engine.later import Later
from lrpretrain.model.llama import initial_tile
from lrpretrain.sharding import Tile
from lrpretrain.sharding.procs import Procs
from lrpretrain.train.judge import Judge


def tiny_config(folder, **sections):
    import json

    path = folder / "model.json"
    path.write_text(json.dumps(TINY))
    config = Config(optim=OptimConfig(rank=4, lr=0.01), **sections)
    config.model.config = str(path)
    return config


def whole_weights(engine):
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in engine.model.named_parameters()
    }


def one_step(folder):
    """Return whole weights before and after a step, and the norm, for fsdp and for local in each process."""
    results = []
    for kind, procs in [("fsdp", Procs.of_default_group()), ("local", Procs())]:
        config = tiny_config(folder / str(dist.get_rank()), engine=EngineConfig(kind=kind))
        engine = build_engine(config, procs, torch.device("cpu"), pad_id=0)
        before = whole_weights(engine)
        rows = torch.randint(2, 300, (6, 16), generator=torch.Generator().manual_seed(1))
        own = rows.split(6 // procs.n_procs)[procs.proc]
        step = engine.train_step(list(own.split(1)), 6 * 15, clip_norm=0.1, lr_ratio=1.0)
        total = engine.total(step.loss_sum) if kind == "fsdp" else step.loss_sum
        results.append((before, whole_weights(engine), step.grad_norm, float(total)))
    return results


def test_initial_weights_are_bitwise_the_same_on_any_layout_and_a_step_is_too(tmp_path):
    for proc in range(3):
        (tmp_path / str(proc)).mkdir()
    for sharded, local in spawn(one_step, 3, tmp_path):
        for name, weight in local[0].items():
            assert torch.equal(sharded[0][name], weight), name
            torch.testing.assert_close(sharded[1][name], local[1][name], rtol=1e-3, atol=1e-6)
        assert local[2] > 0.2  # clipped: the norm returned is the raw one
        assert sharded[2] == pytest.approx(local[2], rel=1e-5)
        assert sharded[3] == pytest.approx(local[3], rel=1e-6)


def share_of_7b():
    """Build one of 256 shards of a 7B model; return the peak memory (GiB) and this process's parameters."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=256)
    config = Config(engine=EngineConfig(kind="fsdp"))
    config.model.config = "llama_7b"
    config.optim.rank = 1024
    engine = build_engine(config, Procs(3, 256), torch.device("cpu"), pad_id=0)
    held = sum(h.weight.numel() for h in engine.holdings)
    finite = all(bool(torch.isfinite(h.weight).all()) for h in engine.holdings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return peak, held, finite


def test_7b_never_exists_whole():
    """Whole it takes 25 GiB in float32, a 256th 0.1; the bases of GaLore come on top (2.6 GiB in float32)."""
    ((peak, held, finite),) = spawn(share_of_7b, 1)
    assert finite
    assert held == pytest.approx(6_738_415_616 / 256, rel=0.01)
    assert peak < 8


def test_bfloat16_compute_keeps_float32_weights(tmp_path):
    config = tiny_config(
        tmp_path, engine=EngineConfig(kind="fsdp"), precision=PrecisionConfig(compute="bfloat16")
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        engine = build_engine(config, Procs(), torch.device("cpu"), pad_id=0)
        rows = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(1))
        engine.accumulate([rows], 30)
        assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
        assert {p.grad.dtype for p in engine.model.parameters()} == {torch.float32}
        assert engine.model(input_ids=rows).logits.dtype == torch.bfloat16
        # A forward alone leaves FSDP2's root unsharded and in bfloat16: no checkpoint must see that.
        engine.loss_sum(rows)
        weights = {n: p.tensor for n, p in engine.pieces().items() if n.startswith("model/")}
        assert {w.dtype for w in weights.values()} == {torch.float32}
        exact = initial_tile("lm_head.weight", (300, 32), Tile.whole((300, 32)), 0) * 0.02
        assert torch.equal(weights["model/lm_head.weight"], exact)
    finally:
        dist.destroy_process_group()


def test_padding_changes_nothing_and_accumulation_is_exact(tmp_path):
    config = tiny_config(tmp_path)
    engine = build_engine(config, Procs(), torch.device("cpu"), pad_id=0)
    rows = torch.randint(2, 300, (4, 12), generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(rows, (0, 8))
    assert float(engine.loss_sum(padded)) == pytest.approx(float(engine.loss_sum(rows)), rel=1e-6)
    whole = engine.accumulate([rows], 44)
    gradient = [p.grad.clone() for p in engine.model.parameters()]
    engine.optimizer.zero_grad()
    parts = engine.accumulate(list(padded.split(1)), 44)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
    for p, g in zip(engine.model.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def gathers(folder, **policy):
    """Return how often FSDP2 gathers: until the first block has run, and in a whole micro-batch."""
    config = tiny_config(folder / str(dist.get_rank()), engine=EngineConfig(kind="fsdp", **policy))
    engine = build_engine(config, Procs.of_default_group(), torch.device("cpu"), pad_id=0)
    counts = []
    with CommDebugMode() as comm:

        def count(*_):
            counts.append(sum(n for op, n in comm.get_comm_counts().items() if "gather" in str(op)))

        engine.model.model.layers[0].register_forward_hook(count)
        engine.accumulate([torch.arange(32).view(2, 16)], 30)
        count()
    return counts


def policies(folder):
    return gathers(folder), gathers(folder, prefetch_blocks=1), gathers(folder, reshard_after_forward=False)


def test_policies_of_fsdp2(tmp_path):
    for proc in range(2):
        (tmp_path / str(proc)).mkdir()
    for plain, prefetch, gathered in spawn(policies, 2, tmp_path):
        assert plain == [2, 5]  # the root once, both blocks in forward and in backward
        assert prefetch == [3, 5]
        assert gathered == [2, 3]


def test_a_document_mask_hides_the_documents_before(tmp_path):
    config = tiny_config(tmp_path, data=DataConfig(document_mask=True, sequences="pack"))
    mask = lambda ids: document_mask(ids, 1)  # noqa: E731
    engine = build_engine(config, Procs(), torch.device("cpu"), pad_id=0, mask=mask)
    rows = torch.randint(2, 300, (1, 12), generator=torch.Generator().manual_seed(1))
    rows[0, 5] = 1  # the end of the first document
    other = rows.clone()
    other[0, :5] = torch.arange(7, 12)
    masked = [engine.model(input_ids=r, attention_mask=mask(r)).logits[0, 6:] for r in (rows, other)]
    plain = [engine.model(input_ids=r).logits[0, 6:] for r in (rows, other)]
    # Rotary positions are relative: what comes before is hidden, and where a document begins does not matter.
    torch.testing.assert_close(masked[0], masked[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain[0], plain[1], rtol=1e-3, atol=1e-3)
    assert float(engine.loss_sum(rows)) != pytest.approx(float(engine.loss_sum(other)), rel=1e-6)


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host reads of tensors of the device: floats and bools."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is not torch.int64:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["adamw", "galore", "galore per layer", "gradnormlorp", "loro"])
def test_the_host_does_not_wait_for_ordinary_steps(rule, tmp_path, monkeypatch):
    """Counters are the host's own; what is read later, of the step before, is read without waiting."""
    monkeypatch.setattr(Later, "read", lambda self: [1.0, 1.0, 1.0])
    config = tiny_config(tmp_path)
    rule, _, per_layer = rule.partition(" ")
    config.optim.rule, config.optim.exact_every, config.optim.per_layer = rule, 3, bool(per_layer)
    engine = build_engine(config, Procs(), torch.device("cpu"), pad_id=0)
    reads = []
    for t in range(3):
        judge = Judge(4, 3.0, engine.device)
        with HostReads() as mode:
            engine.train_step([torch.full((1, 16), t + 1)], 15, 1.0, 1.0, judge)
        reads.append(mode.count)
    assert reads[1] == 0
    # At a refresh and at an exact step the host asks whether the step is sound.
    assert [n > 0 for n in reads] == [rule in ("galore", "gradnormlorp"), False, rule == "loro"]


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["adamw", "galore", "galore per layer", "gradnormlorp", "loro"])
def test_a_gpu_is_not_waited_for_in_ordinary_steps(rule, tmp_path):
    config = tiny_config(tmp_path)
    rule, _, per_layer = rule.partition(" ")
    config.optim.rule, config.optim.exact_every, config.optim.per_layer = rule, 30, bool(per_layer)
    config.optim.moments = "int8" if rule in ("galore", "gradnormlorp") else None
    engine = build_engine(config, Procs(), torch.device("cuda", 0), pad_id=0)
    judge = Judge(4, 3.0, engine.device)
    for t in range(4):
        torch.cuda.set_sync_debug_mode("error" if t > 1 else "default")  # the first step refreshes
        try:
            engine.train_step([torch.full((1, 16), t + 1)], 15, 1.0, 1.0, judge)
        finally:
            torch.cuda.set_sync_debug_mode("default")
