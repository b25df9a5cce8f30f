"""LLaMA built without memory: initial values that no layout changes, and what `to_empty` would lose."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from lrpretrain.config import ModelConfig
from lrpretrain.errors import ConfigError
from lrpretrain.model import llama
from lrpretrain.sharding import Holding, Tile, hold


@st.composite
def tiles(draw):
    """Draw the shape of a matrix and a rectangle of it, which may be empty."""
    shape = draw(st.integers(1, 400)), draw(st.integers(1, 9))
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return shape, Tile(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@settings(deadline=None, max_examples=100)
@given(tiles(), st.integers(0, 2**32))
def test_any_tile_is_that_slice_of_the_whole(shape_and_tile, seed):
    shape, tile = shape_and_tile
    whole = llama.initial_tile("a.weight", shape, Tile.whole(shape), seed)
    part = llama.initial_tile("a.weight", shape, tile, seed)
    assert whole.shape == shape and part.shape == tile.sizes
    assert torch.equal(part, whole[tile.span(0), tile.span(1)])


@pytest.mark.parametrize(
    "tile",
    [
        Tile((0, 0), (128, 5)),
        Tile((128, 0), (128, 5)),
        Tile((127, 0), (2, 5)),
        Tile((100, 1), (200, 3)),
        Tile((255, 4), (45, 1)),
        Tile((300, 0), (0, 5)),
        Tile((128, 0), (0, 5)),
        Tile((3, 5), (9, 0)),
    ],
)
def test_tiles_at_the_edges_of_blocks(tile):
    whole = llama.initial_tile("a.weight", (300, 5), Tile.whole((300, 5)), 0)
    part = llama.initial_tile("a.weight", (300, 5), tile, 0)
    assert part.shape == tile.sizes and torch.equal(part, whole[tile.span(0), tile.span(1)])


def test_values_depend_on_seed_name_and_block():
    shape = (256, 8)

    def draw(name, seed):
        return llama.initial_tile(name, shape, Tile.whole(shape), seed)

    values = draw("a.weight", 0)
    assert torch.equal(values, draw("a.weight", 0))
    for other in (draw("a.weight", 1), draw("b.weight", 0), values[128:].repeat(2, 1)):
        assert not torch.isclose(values[:128], other[:128]).any(dim=1).all()


def test_values_do_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    llama.initial_tile("a.weight", (200, 3), Tile.whole((200, 3)), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_values_are_standard_normal():
    shape = (1000, 100)
    values = llama.initial_tile("a.weight", shape, Tile.whole(shape), 0)
    assert values.dtype == torch.float32
    # Standard errors: of the mean 1/√100000 = 0.0032, of the deviation 0.0022; of one block 0.0088, 0.0063.
    assert abs(values.mean()) < 0.013 and abs(values.std() - 1) < 0.009
    for block in values.split(llama.BLOCK_ROWS)[:-1]:
        assert abs(block.mean()) < 0.04 and abs(block.std() - 1) < 0.03
    assert abs((values > 1).float().mean() - 0.1587) < 0.005


def initialized(config, seed=0, dtype=torch.float32):
    """Return a model on the CPU that went through the meta device."""
    model = llama.build(config, dtype)
    llama.materialize(model, torch.device("cpu"))
    for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "rotary" not in n)]:
        tensor.detach().fill_(torch.nan)  # what memory happened to hold
    holdings = [hold(n, p) for n, p in model.named_parameters()]
    llama.initialize(holdings, seed, config.initializer_range)
    return model


ROPES = {
    "default": {},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_equal_those_of_a_model_built_normally(rope, dtype):
    config = LlamaConfig(**TINY, **rope)
    model, plain = initialized(config, dtype=dtype), LlamaForCausalLM(LlamaConfig(**TINY, **rope))
    buffers, expected = dict(model.named_buffers()), dict(plain.named_buffers())
    assert {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"} <= expected.keys()
    assert buffers.keys() == expected.keys()
    for name, buffer in expected.items():
        torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_after_initialization(dtype):
    model = initialized(LlamaConfig(**TINY, initializer_range=0.5), dtype=dtype)
    for name, param in model.named_parameters():
        assert param.dtype == dtype and param.device.type == "cpu"
        if "norm" in name:
            assert (param == 1).all(), name
        else:
            draw = llama.initial_tile(name, tuple(param.shape), Tile.whole(tuple(param.shape)), 0)
            torch.testing.assert_close(param.detach(), (0.5 * draw).to(dtype), rtol=0, atol=0)


def test_a_process_fills_its_own_tile_with_the_same_values():
    model = initialized(LlamaConfig(**TINY), seed=5)
    name = "model.layers.1.mlp.gate_proj.weight"
    whole = model.get_parameter(name).detach()
    for tile in (
        Tile((0, 0), (19, 32)),
        Tile((19, 0), (37, 32)),
        Tile((56, 0), (0, 32)),
        Tile((0, 8), (56, 16)),
    ):
        own = torch.full(tile.sizes, torch.nan)
        llama.initialize([Holding(name, own, tuple(whole.shape), (tile,))], 5, 0.02)
        assert torch.equal(own, whole[tile.span(0), tile.span(1)])


def test_a_model_from_the_meta_device_computes_what_a_normal_one_does():
    model = initialized(LlamaConfig(**TINY)).eval()
    plain = LlamaForCausalLM._from_config(LlamaConfig(**TINY), attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_building_takes_no_memory():
    model = llama.build(llama.load_config(ModelConfig("llama_60m")), torch.bfloat16)
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == llama.ATTENTION


def test_a_config_comes_from_a_name_or_a_file(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(TINY))
    config = llama.load_config(ModelConfig(str(path)))
    assert (config.hidden_size, config.vocab_size) == (32, 300)
    assert llama.load_config(ModelConfig("llama_60m")).hidden_size == 512


@pytest.mark.parametrize(
    ("text", "reason", "remedy"),
    [
        (None, "is neither a file nor a shipped model", "one of .*llama_130m.*llama_toy"),
        ("{", "cannot be read: Expecting property name", "Mend the file"),
        ("", "cannot be read: ", "Mend the file"),
        ("[1]", "cannot be read: ", "Mend the file"),
        (json.dumps(TINY | {"model_type": "mistral"}), "is a model of type 'mistral'", '"llama"'),
        ("{}", "is a model of type None", '"llama"'),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(tmp_path, text, reason, remedy):
    path = tmp_path / "own.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"own.json': {reason}.*{remedy}"):
        llama.load_config(ModelConfig(str(path)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("tie_word_embeddings", True), ("attention_bias", True), ("mlp_bias", True), ("attention_dropout", 0.1)],
)
def test_what_would_train_another_model_is_refused(tmp_path, key, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", key: value}))
    with pytest.raises(ConfigError, match=f"{key}={value}.*Set {key} to"):
        llama.load_config(ModelConfig(str(path)))
