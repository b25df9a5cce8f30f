"""DoRA layers against the paper's formula, and models that start from the files of a Hugging Face folder."""

import pytest
import torch
from tiny import TINY
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lrpretrain.config import Config, ModelConfig, OptimConfig
from lrpretrain.errors import ConfigError
from lrpretrain.model import llama
from lrpretrain.model.dora import DoRALinear, adapt
from lrpretrain.model.pretrained import Pretrained
from lrpretrain.optim import AdamW, GaLoreAdamW
from lrpretrain.optim.groups import build_optimizer
from lrpretrain.sharding import Holding, Tile, hold


def layer(bias=False, dtype=torch.float64, trained=True):
    torch.manual_seed(0)
    dora = DoRALinear(nn.Linear(7, 11, bias=bias, dtype=dtype), rank=3, alpha=6.0)
    if trained:
        with torch.no_grad():
            dora.lora_B.normal_()
            dora.magnitude.mul_(torch.rand_like(dora.magnitude) + 0.5)
    return dora


@pytest.mark.parametrize("bias", [False, True])
def test_equals_autograd_through_the_formula(bias):
    dora = layer(bias)
    W0, M, A, B = dora.weight, dora.magnitude, dora.lora_A, dora.lora_B
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    V = W0 + 6.0 / 3 * B @ A
    expected = nn.functional.linear(x, M[:, None] * V / V.norm(dim=1, keepdim=True), dora.bias)
    torch.testing.assert_close(dora(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nn.functional.linear(x, dora.dense(), dora.bias), expected)
    wanted = torch.randn_like(expected)
    ours = torch.autograd.grad((dora(x) * wanted).sum(), [x, M, A, B])
    theirs = torch.autograd.grad((expected * wanted).sum(), [x, M, A, B])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_starts_as_the_dense_layer_to_the_bit(dtype):
    dora = layer(dtype=dtype, trained=False)
    if dtype == torch.bfloat16:  # whose magnitudes are rounded
        torch.testing.assert_close(dora.dense(), dora.weight, rtol=1e-2, atol=0)
    else:
        x = torch.randn(4, 7, dtype=dtype)
        assert torch.equal(dora.dense(), dora.weight) and torch.equal(dora(x), x @ dora.weight.T)


def test_only_magnitude_and_adapters_are_trained():
    dora = layer(bias=True)
    assert {n for n, p in dora.named_parameters() if p.requires_grad} == {"magnitude", "lora_A", "lora_B"}


def test_a_row_of_zeros_stays_and_spoils_nothing():
    linear = nn.Linear(7, 11, bias=False)
    with torch.no_grad():
        linear.weight[3] = 0
    dora = DoRALinear(linear, rank=3, alpha=6.0)
    dora(torch.randn(4, 7)).square().sum().backward()
    assert dora(torch.randn(4, 7))[:, 3].eq(0).all()
    assert all(p.grad.isfinite().all() for p in dora.parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a tiny model, in two files."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model*.safetensors"))) > 1
    return folder


def run_config(folder, **optim):
    return Config(ModelConfig(str(folder / "config.json"), str(folder)), optim=OptimConfig(**optim))


def filled(config, dtype=torch.float32):
    model = llama.configured(config, dtype)
    llama.materialize(model, torch.device("cpu"))
    holdings = [hold(name, param) for name, param in model.named_parameters()]
    llama.initialize(holdings, 0, 0.02, init_from=config.model.init_from)
    return model


def test_a_model_starts_from_the_files(folder):
    model, theirs = filled(run_config(folder)), LlamaForCausalLM.from_pretrained(folder)
    for name, param in theirs.named_parameters():
        assert torch.equal(param, model.get_parameter(name)), name


def test_a_dora_model_starts_as_the_dense_one(folder):
    config = run_config(folder, rule="gradnormlorp", mode="dora", rank=2, adapter_rank=4)
    model, theirs = filled(config), LlamaForCausalLM.from_pretrained(folder)
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    kinds = {n.rpartition(".")[2] for n in trained}
    assert len(trained) == 2 * 7 * 3 and kinds == {"magnitude", "lora_A", "lora_B"}
    optimizer = build_optimizer(model.named_parameters(), config.optim, 32)
    regular, adapters = optimizer.param_groups
    assert all(n.endswith("magnitude") for n in regular["param_names"]) and len(regular["params"]) == 14
    assert adapters["rank"] == 2 and len(adapters["params"]) == 28


def test_a_process_reads_its_own_tile(folder):
    config = run_config(folder, rule="gradnormlorp", mode="dora", adapter_rank=4)
    whole = filled(config)
    layer = "model.layers.1.mlp.gate_proj"
    tiles = [("weight", Tile((19, 8), (37, 16))), ("weight", Tile((56, 0), (0, 32)))]
    tiles += [("magnitude", Tile((19,), (37,))), ("magnitude", Tile((56,), (0,)))]
    tiles += [("lora_A", Tile((0, 8), (4, 16))), ("lora_B", Tile((3, 0), (9, 4)))]
    for kind, tile in tiles:
        name = f"{layer}.{kind}"
        expected = whole.get_parameter(name).detach()
        own = torch.full(tile.sizes, torch.nan)
        holding = Holding(name, own, tuple(expected.shape), (tile,))
        llama.initialize([holding], 0, 0.02, init_from=str(folder))
        spans = tuple(tile.span(dim) for dim in range(len(tile.sizes)))
        assert torch.equal(own, expected[spans]), (kind, tile)


def test_the_optimizer_is_galore_on_the_adapters():
    """By hand: GaLoreAdamW on copies of A and B, AdamW on a copy of M, gradients from the formula."""
    model = nn.ModuleDict({"q_proj": nn.Linear(12, 20, bias=False), "head": nn.Linear(20, 3)})
    torch.manual_seed(0)
    adapt(model, ["q_proj.weight"], rank=4, alpha=8.0)
    optim = OptimConfig(rule="gradnormlorp", mode="dora", rank=2, refresh_every=3, targets=["q_proj"])
    optim.subspace, optim.weight_decay = "svd", 0.1
    optimizer = build_optimizer(model.named_parameters(), optim, 12)
    dora = model["q_proj"]
    M, A, B = (nn.Parameter(p.detach().clone()) for p in (dora.magnitude, dora.lora_A, dora.lora_B))
    group = {"params": [A, B], "rank": 2, "update_proj_gap": 3, "scale": 0.25}
    twins = [GaLoreAdamW([group], lr=0.01, weight_decay=0.1), AdamW([M], lr=0.01, weight_decay=0.1)]
    for t in range(8):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(t))
        for o in (optimizer, *twins):
            o.zero_grad()
        model["head"](dora(x)).square().sum().backward()
        V = dora.weight + 2.0 * B @ A
        model["head"](x @ (M[:, None] * V / V.norm(dim=1, keepdim=True)).T).square().sum().backward()
        for o in (optimizer, *twins):
            o.step()
    for ours, theirs in ((dora.magnitude, M), (dora.lora_A, A), (dora.lora_B, B)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert model["head"].weight.grad is None and dora.weight.grad is None


def test_files_that_do_not_fit_are_named(folder, tmp_path):
    shapes = llama.shapes(llama.build(LlamaConfig(**TINY)))
    assert Pretrained(str(folder)).problems(shapes) == []
    wider = llama.shapes(llama.build(LlamaConfig(**TINY | {"intermediate_size": 60, "num_hidden_layers": 3})))
    missing, other = Pretrained(str(folder)).problems(wider)
    assert "lacks 9 tensors of model.config, such as model.layers.2." in missing.reason
    assert "has 6 tensors of other shapes" in other.reason and "(56, 32), not (60, 32)" in other.reason
    with pytest.raises(ConfigError, match=r"model.init_from='.*nowhere'.*no model\*.safetensors"):
        Pretrained(str(tmp_path / "nowhere"))
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(ConfigError, match=r"model.safetensors cannot be read"):
        Pretrained(str(tmp_path))
