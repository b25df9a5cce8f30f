"""What is shipped: every recipe can run, and every model has the size that its name promises."""

import math
import re
from pathlib import Path

import pytest

from lrpretrain import cli
from lrpretrain.config import ModelConfig, OptimConfig, parse, shipped_names
from lrpretrain.model import llama
from lrpretrain.train import plan

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "launch" / "recipes").glob("*"))
# Parameters: all of them, and those of attention and MLP.
SIZES = {
    "9m": (8995968, 802816),
    "20m": (19548416, 3162112),
    "35m": (35197824, 10616832),
    "40m": (42392480, 15761408),
    "60m": (58073600, 25296896),
    "71m": (70578688, 37797888),
    "100m": (100117120, 59013120),
    "130m": (134105856, 84934656),
    "250m": (247370496, 198180864),
    "350m": (367969280, 302383104),
    "1b": (1339082752, 1207910400),
    "3b": (2685831680, 2521825280),
    "7b": (6738415616, 6476005376),
}


def test_all_that_is_shipped_is_found_by_name():
    assert shipped_names("recipes") == RECIPES
    assert {path.suffix for path in (ROOT / "launch" / "recipes").iterdir()} == {".yaml"}
    assert set(shipped_names("model_configs")) == {f"llama_{size}" for size in [*SIZES, "toy"]}


def recipe(name, *argv):
    config, problems = parse(["--config", name, *argv])
    assert problems == []
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_named_after_its_model_and_rule(name):
    config = recipe(name)
    parts = name.split("_")
    assert len(parts) >= 3 and all(parts)
    assert config.model.config == "_".join(parts[:2])
    assert config.optim.rule == parts[2]
    assert config.run.dir == f"runs/{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_run(name):
    assert plan.problems(recipe(name), 1) == []
    # `local` is the engine of one process: several need another.
    several = [] if recipe(name).engine.kind != "local" else ["--engine.kind=fsdp"]
    assert plan.problems(recipe(name, *several), 2) == []


@pytest.mark.parametrize("name", RECIPES)
def test_show_prints_the_arithmetic_of_a_recipe(name, capsys):
    assert cli.main(["show", name]) == 0
    shown = capsys.readouterr().out
    config = recipe(name)
    batch, micro, length = config.train.global_batch, config.train.micro_batch, config.data.seq_len
    assert arithmetic(shown) == [1, micro, batch // micro, length, batch * length]
    assert f"rank: {config.optim.rank}\n" in shown


def test_show_counts_processes_and_takes_overrides(capsys):
    argv = ["--procs", "2", "--engine.kind=fsdp", "--train.micro_batch=4", "--train.global_batch", "24"]
    assert cli.main(["show", "llama_toy_galore", *argv]) == 0
    assert arithmetic(capsys.readouterr().out) == [2, 4, 3, 128, 3072]


def arithmetic(shown):
    """Return the factors and the product of the line about tokens per step."""
    line = r"(\d+) processes × (\d+) micro-batch × (\d+) accumulation × (\d+) tokens = ([\d,]+) tokens"
    (numbers,) = re.findall(line, shown)
    return [int(n.replace(",", "")) for n in numbers]


def test_show_refuses_what_cannot_run_with_exit_code_2(capsys):
    assert cli.main(["show", "llama_toy_galore", "--procs", "2", "--optim.rank", "4000"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "2 problems" in printed.err
    assert "engine.kind='local'" in printed.err and "optim.rank=4000" in printed.err


def test_a_plan_looks_at_the_model():
    config = recipe("llama_toy_galore", "--data.seq_len=1024", "--optim.targets", '["*.c_attn"]')
    fields = [p.field for p in plan.problems(config, 1)]
    assert fields == ["data.seq_len", "optim.targets"]
    config.model.config = "llama_2b"
    assert [p.field for p in plan.problems(config, 1)] == ["model.config"]


@pytest.mark.parametrize("size", SIZES)
def test_a_model_has_the_papers_size(size):
    model = llama.build(llama.load_config(ModelConfig(f"llama_{size}")))
    shapes = llama.shapes(model)
    inner = {n: s for n, s in shapes.items() if "self_attn" in n or "mlp" in n}
    assert (count(shapes), count(inner)) == SIZES[size]
    assert plan.groups.matched(shapes, OptimConfig()).keys() == inner.keys()


def count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", shipped_names("model_configs"))
def test_a_model_is_as_the_papers_have_it(name):
    model = llama.build(llama.load_config(ModelConfig(name)))
    config = model.config
    assert config.vocab_size == {"llama_100m": 32100, "llama_toy": 4000}.get(name, 32000)
    assert config.pad_token_id is None
    assert not any(n.endswith("bias") for n, _ in model.named_parameters())
    assert "lm_head.weight" in dict(model.named_parameters()) and not config.tie_word_embeddings
    assert config._attn_implementation == llama.ATTENTION
    assert {p.device.type for p in model.parameters()} == {"meta"}
