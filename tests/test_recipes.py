"""What is shipped: every recipe can run, and every model has the size that its name promises."""

import math
import re
from pathlib import Path

import pytest
import yaml

from lrpretrain import cli
from lrpretrain.config import ModelConfig, OptimConfig, parse, shipped_names
from lrpretrain.model import llama
from lrpretrain.train import memory, plan

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.stem for path in (ROOT / "launch" / "recipes").glob("*"))
RECIPES = [name for name in SHIPPED if name.startswith("llama_")]  # the others are of test_finetune.py
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


# GPUs, micro-batch, learning rate, rank, steps between refreshes or exact steps, steps, warm-up, clipping: as
# the authors' scripts have them, but for llama_1b_galore, which has the rank of the paper's table.
SCRIPTS = {
    "60m_galore": (1, 256, 0.01, 128, 200, 10_000, 1_000, None),
    "130m_galore": (1, 256, 0.01, 256, 200, 20_000, 2_000, None),
    "350m_galore": (4, 128, 0.01, 256, 200, 60_000, 6_000, None),
    "1b_galore": (8, 16, 0.01, 512, 200, 100_000, 10_000, None),
    "1b_galore_r1024": (8, 16, 0.01, 1024, 200, 100_000, 10_000, None),
    "7b_galore": (64, 8, 0.005, 1024, 500, 150_000, 15_000, 1.0),
    "7b_galore_int8_1gpu": (1, 16, 0.005, 1024, 500, 150_000, 15_000, 1.0),
    "60m_gradnormlorp": (1, 256, 0.01, 128, 250, 10_000, 1_000, None),
    "60m_gradnormlorp_r256": (1, 128, 0.01, 256, 250, 10_000, 1_000, None),
    "60m_gradnormlorp_lowrank_wn": (1, 64, 0.01, 256, 200, 10_000, 1_000, None),
    "60m_loro": (1, 256, 0.01, 128, 500, 10_000, 1_000, None),
    "130m_loro": (2, 128, 0.01, 256, 500, 20_000, 2_000, None),
    "350m_loro": (2, 64, 0.01, 256, 500, 60_000, 2_000, None),
    "1b_loro": (4, 32, 0.005, 512, 200, 100_000, 10_000, None),
}


def processes(name):
    """Return the number of GPUs in the first line of a recipe, or 1."""
    first = (ROOT / "launch" / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
    found = re.match(r"# (\d+) × ", first)
    return int(found[1]) if found else 1


def test_all_that_is_shipped_is_found_by_name():
    assert shipped_names("recipes") == SHIPPED
    assert {path.suffix for path in (ROOT / "launch" / "recipes").iterdir()} == {".yaml"}
    assert set(shipped_names("model_configs")) == {f"llama_{size}" for size in [*SIZES, "toy"]}


def recipe(name, *argv):
    config, problems = parse(["--config", name, *argv])
    assert problems == []
    return config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_run_on_its_hardware(name, capsys):
    """`show` finds nothing wrong; the name, the first line and what is set agree."""
    assert cli.main(["show", name, "--procs", str(processes(name))]) == 0
    shown = capsys.readouterr().out
    read = yaml.safe_load(re.split(r"^\d+ processes ×", shown, flags=re.MULTILINE)[0])
    parts = name.split("_")
    assert len(parts) >= 3 and all(parts)
    assert read["model"]["config"] == "_".join(parts[:2])
    assert read["optim"]["rule"] == parts[2]
    assert read["run"]["dir"] == f"runs/{name}"
    train, length = read["train"], read["data"]["seq_len"]
    accumulation = train["global_batch"] // (processes(name) * train["micro_batch"])
    expected = [processes(name), train["micro_batch"], accumulation, length, train["global_batch"] * length]
    assert arithmetic(shown) == expected
    if name.removeprefix("llama_") in SCRIPTS:
        every = "exact_every" if parts[2] == "loro" else "refresh_every"
        values = [train["micro_batch"], *(read["optim"][key] for key in ("lr", "rank", every))]
        values += [train[key] for key in ("steps", "warmup_steps", "clip_norm")]
        assert (processes(name), *values) == SCRIPTS[name.removeprefix("llama_")]
        assert (length, train["global_batch"], train["seed"], read["data"]["sequences"]) == (
            256,
            512,
            0,
            "pad",
        )
        assert (read["optim"]["scale"], read["optim"]["weight_decay"], train["min_lr_ratio"]) == (
            0.25,
            0,
            0.1,
        )
        restarts = (
            ("cosine_restart", read["optim"]["exact_every"]) if parts[2] == "loro" else ("cosine", None)
        )
        assert (train["schedule"], train["restart_every"]) == restarts


@pytest.mark.parametrize(("argv", "gib"), [([], 31.4), (["--train.global_batch=16"], 19.2)])
def test_7b_layer_by_layer_has_the_peak_that_is_said(argv, gib):
    config = recipe("llama_7b_galore_int8_1gpu", *argv)
    peak = memory.costs(config, llama.configured(config), 1).peak.max() / 2**30
    assert peak == pytest.approx(gib, abs=0.05)
    for text in ("README.md", "launch/recipes/llama_7b_galore_int8_1gpu.yaml"):
        assert f"{gib} GiB" in (ROOT / text).read_text()


def test_every_script_has_a_recipe():
    assert {f"llama_{name}" for name in SCRIPTS} <= set(RECIPES)


@pytest.mark.parametrize("name", [name for name in RECIPES if "toy" not in name])
def test_figures_of_papers_are_marked(name):
    text = (ROOT / "launch" / "recipes" / f"{name}.yaml").read_text()
    comments = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert re.match(r"\d+ × A100 [48]0 GB: ", comments)
    assert re.search("not run here", comments, re.IGNORECASE)
    assert "erplexity on C4 " not in comments or "(paper, not run here)" in comments


@pytest.mark.parametrize("rule", ["adamw", "galore", "gradnormlorp", "loro"])
def test_a_toy_runs_on_two_processes_as_well(rule):
    # `local` is the engine of one process: several need another.
    assert plan.problems(recipe(f"llama_toy_{rule}", "--engine.kind=fsdp"), 2) == []


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
