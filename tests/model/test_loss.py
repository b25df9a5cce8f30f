"""The loss as a sum over tokens, against transformers' own."""

import pytest
import torch
from tiny import TINY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lrpretrain.model.loss import token_loss_sum


def example(seed=0, b=3, length=11, v=13):
    """Return logits (b, l, v) and ids (b, l)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, length, v, generator=generator), torch.randint(v, (b, length), generator=generator)


def test_equals_the_loss_of_transformers_times_the_targets():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    ids = torch.randint(1, 300, (4, 12))
    labels = ids.clone()
    for row, tokens in enumerate((12, 7, 2, 1)):  # the last one has nothing to predict
        labels[row, tokens:] = -100
    out = model(input_ids=ids, labels=labels)
    targets = 11 + 6 + 1 + 0
    ours = token_loss_sum(nn.Identity(), out.logits, labels)
    torch.testing.assert_close(ours, out.loss * targets, rtol=1e-6, atol=0)
    ours_grad = torch.autograd.grad(ours / targets, model.lm_head.weight, retain_graph=True)
    torch.testing.assert_close(ours_grad, torch.autograd.grad(out.loss, model.lm_head.weight))


def test_equals_a_plain_loop():
    logits, labels = example()
    labels[1, 4:] = -100
    total = 0.0
    for b in range(3):
        for i in range(10):
            if labels[b, i + 1] != -100:
                total -= logits[b, i].double().log_softmax(-1)[labels[b, i + 1]]
    torch.testing.assert_close(
        token_loss_sum(nn.Identity(), logits, labels).double(), total, rtol=1e-6, atol=0
    )


def test_pads_count_for_nothing():
    logits, labels = example()
    logits.requires_grad_()
    labels[0, 5:], labels[2, :] = -100, -100
    loss = token_loss_sum(nn.Identity(), logits, labels)
    loss.backward()
    assert logits.grad[0, :4].all() and logits.grad[1, :-1].all()
    assert not logits.grad[0, 4:].any() and not logits.grad[2].any() and not logits.grad[:, -1].any()
    torch.testing.assert_close(
        loss.detach(),
        token_loss_sum(nn.Identity(), logits[:1, :5], labels[:1, :5])
        + token_loss_sum(nn.Identity(), logits[1:2], labels[1:2]),
    )


def test_rows_without_targets_are_zero_and_finite():
    logits, labels = example()
    assert token_loss_sum(nn.Identity(), logits, torch.full_like(labels, -100)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, labels = example(b=8, length=200)
    logits = logits.to(dtype)
    loss = token_loss_sum(nn.Identity(), logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, token_loss_sum(nn.Identity(), logits.float(), labels), rtol=0, atol=0)


def head_and_hidden():
    """Return a head (d = 8, v = 50) without bias, states (b = 3, l = 11, d) and labels (b, l)."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(8, 50, bias=False)
    head.weight.data = torch.randn(50, 8, generator=generator)
    labels = torch.randint(50, (3, 11), generator=generator)
    labels[1, 4:] = -100
    return head, torch.randn(3, 11, 8, generator=generator, requires_grad=True), labels


@pytest.mark.parametrize(
    ("chunk", "compiled"), [(c, False) for c in (1, 7, 11, 32, 33, 1000)] + [(11, True), (33, True)]
)
def test_chunks_change_nothing(chunk, compiled):
    head, hidden, labels = head_and_hidden()
    loss_sum = torch.compile(token_loss_sum, backend="aot_eager") if compiled else token_loss_sum
    whole, parts = (f(head, hidden, labels, c) for f, c in ((token_loss_sum, 0), (loss_sum, chunk)))
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    inputs = [hidden, head.weight]
    for ours, theirs in zip(
        torch.autograd.grad(parts, inputs), torch.autograd.grad(whole, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(loss_sum(head, hidden, labels, chunk), whole, rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_whole_logits_never_exist():
    head, hidden, labels = head_and_hidden()
    found = {}
    for chunk in (0, 11, 4):
        with Largest() as largest:
            token_loss_sum(head, hidden, labels, chunk).backward()
        found[chunk] = largest.numel
    assert found == {0: 33 * 50, 11: 11 * 50, 4: 8 * 50}  # 8 × 50: the gradient of the head
