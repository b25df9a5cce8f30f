"""Adapters of classifiers: the network starts as it was, and what is trained beside them is the head."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, LlamaConfig, RobertaConfig

from lrpretrain.config import ClassifierConfig, FinetuneConfig, FinetuneOptimConfig
from lrpretrain.data.glue import IGNORED
from lrpretrain.errors import CheckpointError, ConfigError
from lrpretrain.model import classifier
from lrpretrain.model.lowrank import SPECTRAL, LowRankAdapter

SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
IDS = torch.arange(12).view(2, 6) + 4


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folders of BERT with a head of three labels, without pooler and head, RoBERTa and LLaMA."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    bert = BertConfig(**SIZES, num_labels=3)
    models = {
        "bert": AutoModelForSequenceClassification.from_config(bert),
        "encoder": BertModel(bert, add_pooling_layer=False),
        "roberta": AutoModelForSequenceClassification.from_config(RobertaConfig(**SIZES)),
        "llama": AutoModelForSequenceClassification.from_config(LlamaConfig(**SIZES, pad_token_id=0)),
    }
    for name, model in models.items():
        with torch.no_grad():
            for key, param in model.named_parameters():
                if key.endswith("bias"):
                    param.normal_()
        model.save_pretrained(folder / name)
    return folder


def build(folder, labels=2, adapter="none", dropout=None, dtype=torch.float32, **optim):
    optim = FinetuneOptimConfig(rank=4, adapter_rank=4, **optim)
    config = FinetuneConfig(model=ClassifierConfig(str(folder), adapter, dropout), optim=optim)
    shape = classifier.shape_of(config, labels)
    shape.pad_token_id = 0
    config = replace(config, optim=classifier.targeted(classifier.outline(shape), optim))
    return classifier.build(config, shape, 0, dtype)


def trained(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


ADAPTERS = {
    "lora": dict(adapter="lora"),
    "dora": dict(adapter="dora"),
    "gradnormlorp": dict(rule="gradnormlorp", mode="dora"),
    "loro": dict(rule="loro"),
}


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_beside_adapters_the_head_is_trained_and_nothing_else(pretrained, kind, adapter):
    before, _ = build(pretrained / kind, labels=3 if kind == "bert" else 2)
    model, drawn = build(pretrained / kind, labels=3 if kind == "bert" else 2, **ADAPTERS[adapter])
    assert drawn == set()
    expected, found = (m.eval()(input_ids=IDS).logits for m in (before, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    own = ("lora_", "magnitude", "weight_in", "weight_out")
    rest = {name for name in trained(model) if not any(part in name for part in own)}
    heads = {
        "bert": {"classifier.weight", "classifier.bias"},
        "roberta": {f"classifier.{x}.{y}" for x in ("dense", "out_proj") for y in ("weight", "bias")},
        "llama": {"score.weight"},
    }
    assert rest == heads[kind]


def test_what_the_pretrained_model_lacks_is_drawn_by_the_seed_and_trained(pretrained):
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    head = {"classifier.weight", "classifier.bias"}
    model, drawn = build(pretrained / "encoder", rule="loro")
    assert drawn == pooler | head <= trained(model)
    again, _ = build(pretrained / "encoder", rule="loro")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other, drawn = build(pretrained / "bert", labels=2, rule="loro")  # the head there has three labels
    assert drawn == head and not pooler & trained(other)


def test_weights_of_another_model_are_refused(pretrained, tmp_path):
    model, _ = build(pretrained / "bert")
    other = {name.replace("query", "q"): weight for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=other)
    with pytest.raises(
        ConfigError, match=r"query.bias of that shape \(2 such.*weights are those of its config"
    ):
        build(tmp_path)


def test_positions_are_not_rounded_with_the_weights(pretrained):
    plain, _ = build(pretrained / "llama")
    model, _ = build(pretrained / "llama", dtype=torch.bfloat16)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_compat_is_what_the_authors_script_does(pretrained):
    before, _ = build(pretrained / "bert", labels=3)
    model, _ = build(pretrained / "bert", labels=3, rule="loro", compat=True)
    assert {name.rpartition(".")[2] for name in trained(model)} == {"weight_in", "weight_out"}
    adapted = {name for name, module in model.named_modules() if isinstance(module, LowRankAdapter)}
    assert len(adapted) == 6
    for name, param in before.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "bias":
            now = model.get_parameter(name)
            assert not now.any() if layer in adapted else torch.equal(now, param)


@pytest.mark.parametrize("init", ["xavier", "auto", "kaiming", "orth", "xavorth", "randn_0.1", *SPECTRAL])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_an_adapter_starts_as_the_layer_that_it_takes_over(init, shape):
    torch.manual_seed(0)
    linear = nn.Linear(*shape)
    x, weight = torch.randn(5, shape[0]), linear.weight.detach().clone()
    expected = linear(x)
    adapter = LowRankAdapter(linear, 3, alpha=6.0, init=init, init_range=0.02)
    torch.testing.assert_close(adapter(x), expected)
    torch.testing.assert_close(adapter.dense(), weight)
    A, B = adapter.weight_in.detach(), adapter.weight_out.detach()
    assert (A.shape, B.shape) == ((shape[0], 3), (shape[1], 3))
    assert B.norm() > 0 and not torch.allclose(adapter.weight, weight)
    if init not in SPECTRAL:
        return
    # LORO's script: singular vectors, the first or the last, √(2 / (d + r)) long; eig_low times √σ.
    U, sigma, Vh = torch.linalg.svd(weight)
    which = range(3) if init == "spec_top" else range(len(sigma) - 3, len(sigma))
    for i, k in enumerate(which):
        root = math.sqrt(sigma[k]) if init == "eig_low" else 1.0
        sign = torch.sign(B[:, i] @ U[:, k])
        torch.testing.assert_close(B[:, i], sign * U[:, k] * root * math.sqrt(2 / (shape[1] + 3)))
        torch.testing.assert_close(A[:, i], sign * Vh[k] * root * math.sqrt(2 / (shape[0] + 3)))


def test_dropout_is_that_of_the_model_or_as_told(pretrained):
    for kind in ("bert", "roberta", "llama"):
        model, _ = build(pretrained / kind, labels=3 if kind == "bert" else 2, dropout=0.3)
        rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        assert rates == ({0.3} if kind != "llama" else set())
        block = classifier.blocks.of(model)[0]
        attention = block.self_attn.attention_dropout if kind == "llama" else block.attention.self.dropout.p
        assert attention == 0.3
    model, _ = build(pretrained / "roberta")
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}


def test_rows_without_a_label_have_no_loss():
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.1], [3.0, 4.0]], requires_grad=True)
    labels = torch.tensor([0.0, IGNORED, 1.0])
    expected = -(logits.log_softmax(1)[0, 0] + logits.log_softmax(1)[2, 1])
    torch.testing.assert_close(classifier.loss_sum(logits, labels), expected)
    numbers = torch.tensor([[2.0], [7.0], [0.5]])
    torch.testing.assert_close(
        classifier.loss_sum(numbers, torch.tensor([1.0, IGNORED, 0.0])), torch.tensor(1.25)
    )


def test_a_merge_that_changes_the_model_is_refused(pretrained, monkeypatch):
    model, _ = build(pretrained / "roberta", rule="loro")
    monkeypatch.setattr(LowRankAdapter, "dense", lambda layer: layer.weight)  # the factors are forgotten
    with pytest.raises(CheckpointError, match=r"differ from the .* Train with a lower optim.lr"):
        classifier.merge(model)
