"""What checkpointing keeps and computes again, and what compilation shares, in the decoder blocks."""

import weakref

import pytest
import torch
from tiny import TINY
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from lrpretrain.model import blocks, llama
from lrpretrain.model.lowrank import factorize
from lrpretrain.sharding import hold

IDS = torch.arange(120).view(3, 40)


def build(mode="none", every=1, rank=None):
    """Return a small model with weights, of four blocks and with low-rank layers if there is a rank."""
    config = LlamaConfig(**TINY | {"num_hidden_layers": 4})
    model = llama.build(config)
    if rank is not None:
        factorize(model, {n: rank for n in llama.shapes(model) if "_proj" in n}, "xavier")
    blocks.recompute(model, mode, every)
    llama.materialize(model, torch.device("cpu"))
    llama.initialize([hold(n, p) for n, p in model.named_parameters()], 0, 0.02)
    return model


class Alive(TorchDispatchMode):
    """Knows the bytes of what operations returned and something still holds."""

    def __init__(self):
        super().__init__()
        self.storages = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage] = storage.nbytes()
        return out

    def total(self):
        return sum(self.storages.values())


def gradients(model):
    """Return the loss, and the gradients by name."""
    loss = model(IDS, labels=IDS)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def measure(model):
    """Return the FLOPs of forward and backward, and the bytes that are alive between the two."""
    flops = FlopCounterMode(display=False)
    with flops, Alive() as alive:
        loss = model(IDS, labels=IDS)
        kept = alive.total()
        loss.backward()
    return flops.get_total_flops(), kept


@pytest.mark.parametrize("rank", [None, 4])
def test_checkpointing_keeps_less_computes_more_and_changes_nothing(rank):
    cases = {"none": ("none", 1), "selective": ("selective", 1), "full": ("full", 1), "second": ("full", 2)}
    flops, kept = ({k: measure(build(*c, rank))[i] for k, c in cases.items()} for i in (0, 1))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        build(rank=rank).model(IDS)
    assert flops["selective"] == flops["none"]
    again = flops["full"] - flops["none"]  # without a block's last matmul, whose result no backward needs
    assert 0.7 * forward.get_total_flops() < again < forward.get_total_flops()
    assert flops["second"] == flops["none"] + again // 2
    assert kept["full"] < kept["second"] < kept["none"] and kept["full"] < kept["selective"] < kept["none"]
    loss, expected = gradients(build(rank=rank))
    for case in cases.values():
        ours = gradients(build(*case, rank))
        assert torch.equal(ours[0], loss) and ours[1].keys() == expected.keys()
        assert all(torch.equal(ours[1][name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(
    ("mode", "backend"),
    [("none", "aot_eager"), ("full", "aot_eager"), ("selective", "aot_eager"), ("selective", "inductor")],
)
def test_compiled_blocks_share_one_graph_and_keep_their_names(mode, backend, monkeypatch):
    counter, plain = CompileCounterWithBackend(backend), torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: plain(forward, backend=counter, fullgraph=True))
    torch.compiler.reset()
    model = build(mode)
    blocks.compile(model)
    ours, theirs = gradients(model), gradients(build())
    assert counter.frame_count == 1
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-5)
