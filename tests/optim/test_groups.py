"""From a configuration to param groups: what the rule applies to, and with which rank."""

import re

import pytest
import torch

from lrpretrain.config import ModelConfig, OptimConfig
from lrpretrain.model import llama
from lrpretrain.optim import AdamW, GaLoreAdamW
from lrpretrain.optim.groups import build_optimizer, matched, problems

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def toy():
    """The shapes of llama_toy: 4 blocks of width 128 and 352."""
    return llama.shapes(llama.build(llama.load_config(ModelConfig("llama_toy"))))


def named_params(shapes):
    return [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def test_all_linear_layers_of_the_blocks_are_matched(toy):
    ranks = matched(toy, OptimConfig(rank=16))
    layers = [f"self_attn.{p}" for p in ATTENTION] + [f"mlp.{p}" for p in MLP]
    assert ranks == {f"model.layers.{i}.{layer}.weight": 16 for i in range(4) for layer in layers}


@pytest.mark.parametrize(
    ("attn_rank", "mlp_rank", "expected"),
    [(None, None, (16, 16)), (4, None, (4, 16)), (None, 8, (16, 8)), (4, 8, (4, 8))],
)
def test_attention_and_mlp_may_have_ranks_of_their_own(toy, attn_rank, mlp_rank, expected):
    ranks = matched(toy, OptimConfig(rank=16, attn_rank=attn_rank, mlp_rank=mlp_rank))
    assert len(ranks) == 28
    for name, rank in ranks.items():
        assert rank == expected["mlp" in name], name


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 4),
        ("*.q_proj", 4),
        ("*.self_attn.?_proj", 16),
        ("model.layers.[01].mlp.*_proj", 6),
        ("lm_head", 1),
        ("*.Q_PROJ", 0),
        ("self_attn", 0),
        ("*.q_proj.weight", 0),
    ],
)
def test_patterns(toy, pattern, count):
    assert len(matched(toy, OptimConfig(targets=[pattern]))) == count


def test_biases_are_never_matched():
    shapes = {"a.q_proj.weight": (4, 4), "a.q_proj.bias": (4,), "q_proj": (4, 4), "q_proj.norm.weight": (4,)}
    assert list(matched(shapes, OptimConfig(targets=["*q_proj*"]))) == ["a.q_proj.weight"]


def test_a_pattern_that_matches_nothing_is_a_problem(toy):
    assert problems(toy, OptimConfig()) == []
    targets = ["*.c_attn", "*.q_proj", "*norm"]  # a norm is no matrix
    found = [str(p) for p in problems(toy, OptimConfig(targets=targets))]
    assert [line.split(":")[0] for line in found] == ["optim.targets='*.c_attn'", "optim.targets='*norm'"]
    assert all("matches no matrix of the model. Use names of linear layers" in line for line in found)


def test_a_rank_that_is_too_large_names_the_smallest_matrix():
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (5461, 2048),
        "model.layers.0.self_attn.k_proj.weight": (512, 2048),
        "model.layers.0.self_attn.q_proj.weight": (2048, 2048),
    }
    assert problems(shapes, OptimConfig(rank=512)) == []
    (problem,) = problems(shapes, OptimConfig(rank=1024))
    assert re.fullmatch(
        r"optim\.rank=1024: is larger than the smallest matched matrix"
        r" \(model\.layers\.0\.self_attn\.k_proj(\.weight)?: 512 × 2048\)\."
        r" Lower it, or exclude the matrix in optim\.targets\.",
        str(problem),
    )
    (problem,) = problems(shapes, OptimConfig(rank=3000))
    assert "k_proj" in problem.reason, "the smallest of all three"


def test_every_rank_that_is_too_large_is_a_problem(toy):
    assert problems(toy, OptimConfig(rank=128)) == []
    assert problems(toy, OptimConfig(rank=4000, attn_rank=128, mlp_rank=128)) == []
    both = problems(toy, OptimConfig(attn_rank=129, mlp_rank=200))
    assert sorted(p.value for p in both) == [129, 200]
    assert ["self_attn" in p.reason for p in sorted(both, key=lambda p: p.value)] == [True, False]


def test_what_adapters_are_too_small_or_too_large_for_is_a_problem(toy):
    dora = {"rule": "gradnormlorp", "mode": "dora"}
    assert problems(toy, OptimConfig(**dora, rank=8)) == []
    assert problems(toy, OptimConfig(**dora, rank=9, attn_rank=2, mlp_rank=2)) == []
    (problem,) = problems(toy, OptimConfig(**dora, rank=9, attn_rank=2))
    assert str(problem).startswith("optim.rank=9: is larger than optim.adapter_rank=8")
    (problem,) = problems(toy, OptimConfig(**dora, rank=8, adapter_rank=129))
    assert str(problem).startswith("optim.adapter_rank=129: is larger than the smallest matched matrix")


def test_adamw_looks_at_no_rank(toy):
    assert problems(toy, OptimConfig(rule="adamw", rank=10**6)) == []
    assert problems(toy, OptimConfig(rule="adamw", targets=["nothing"]))


def test_adamw_trains_the_targets_with_lr_and_the_rest_with_lr_regular(toy):
    params = named_params(toy)
    optim = OptimConfig(rule="adamw", lr=0.5, lr_regular=0.2, weight_decay=0.1, betas=(0.8, 0.9))
    optimizer = build_optimizer(params, optim, 128)
    assert type(optimizer) is AdamW
    regular, targets = optimizer.param_groups
    assert set(targets["param_names"]) == set(matched(toy, optim))
    assert set(regular["param_names"]) == set(toy) - set(targets["param_names"])
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for _, p in params}
    for group, lr in ((regular, 0.2), (targets, 0.5)):
        assert {k: group[k] for k in ("lr", "peak_lr", "weight_decay", "betas", "eps")} == {
            "lr": lr,
            "peak_lr": lr,
            "weight_decay": 0.1,
            "betas": (0.8, 0.9),
            "eps": 1e-6,
        }
        assert group.get("rank") is None
    assert not optimizer.check_finite


def test_galore_groups_by_rank_and_leaves_the_rest_regular(toy):
    optim = OptimConfig(
        lr=0.5, rank=16, mlp_rank=8, scale=0.125, refresh_every=7, side="left", subspace="svd"
    )
    optimizer = build_optimizer(named_params(toy), optim, 128)
    assert type(optimizer) is GaLoreAdamW and not optimizer.check_finite
    regular, mlp, attention = optimizer.param_groups
    assert regular["rank"] is None and mlp["rank"] == 8 and attention["rank"] == 16
    assert set(regular["param_names"]) == {n for n in toy if "_proj" not in n}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(regular["param_names"])
    assert mlp["param_names"] == [n for n in toy if "mlp" in n]
    assert attention["param_names"] == [n for n in toy if "self_attn" in n]
    for group in (mlp, attention):
        assert (group["update_proj_gap"], group["scale"], group["proj_type"], group["subspace"]) == (
            7,
            0.125,
            "left",
            "svd",
        )
        assert group["lr"] == group["peak_lr"] == 0.5
    state = {name: {k for n, k, _ in optimizer.pieces() if n == name} for name in toy}
    assert all(("basis" in keys) == ("_proj" in name) for name, keys in state.items())


@pytest.mark.parametrize(("lr_regular", "expected"), [(None, 0.5), (0.1, 0.1)])
def test_regular_parameters_may_have_a_rate_of_their_own(toy, lr_regular, expected):
    regular, projected = build_optimizer(
        named_params(toy), OptimConfig(lr=0.5, lr_regular=lr_regular, rank=4), 128
    ).param_groups
    assert regular["lr"] == regular["peak_lr"] == expected
    assert projected["lr"] == projected["peak_lr"] == 0.5


def test_no_group_is_empty():
    params = named_params({"a.q_proj.weight": (8, 8)})
    (group,) = build_optimizer(params, OptimConfig(rank=4, targets=["q_proj"]), 128).param_groups
    assert group["rank"] == 4


def test_betas_eps_and_decay_hold_for_all_groups(toy):
    optim = OptimConfig(rank=4, betas=(0.7, 0.8), eps=1e-5, weight_decay=0.3)
    for group in build_optimizer(named_params(toy), optim, 128).param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.7, 0.8), 1e-5, 0.3)


def test_loro_pairs_the_factors_of_its_layers():
    from lrpretrain.config import Config
    from lrpretrain.optim import LOROAdamW

    config = Config(
        ModelConfig("llama_toy"), optim=OptimConfig(rule="loro", rank=4, attn_rank=2, lr_scaler=0.5)
    )
    config.optim.exact_every, config.optim.refresh_moments = 7, "none"
    model = llama.configured(config)
    optimizer = build_optimizer(model.named_parameters(), config.optim, 128)
    assert type(optimizer) is LOROAdamW
    assert (optimizer.exact_every, optimizer.refresh) == (7, None)
    regular, ins, outs = optimizer.param_groups
    assert [g["type"] for g in optimizer.param_groups] == ["regular", "lowrank_in", "lowrank_out"]
    assert len(ins["params"]) == len(outs["params"]) == 28
    for a, b in zip(ins["param_names"], outs["param_names"], strict=True):
        assert a.removesuffix("_in") == b.removesuffix("_out")
    ranks = {n: p.shape[1] for n, p in zip(ins["param_names"], ins["params"], strict=True)}
    assert {r for n, r in ranks.items() if "attn" in n} == {2}
    assert {r for n, r in ranks.items() if "mlp" in n} == {4}
    assert (ins["lr_scaler"], ins["hidden_size"]) == (0.5, 128)
    assert not any("weight_" in name for name in regular["param_names"])
