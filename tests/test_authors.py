"""The authors' command lines: translated, refused, and run; their recorded run, reproduced."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from tiny import launch

from lrpretrain import pretrain
from lrpretrain.authors import pretraining
from lrpretrain.config import parse
from lrpretrain.engine import build_engine
from lrpretrain.errors import ConfigError
from lrpretrain.sharding.procs import Procs
from lrpretrain.train import plan

GRADNORMLORP_README = """gradnormlorp --model_config configs/llama_60m.json --lr 0.01 --galore_scale 0.25
    --rank 128 --update_proj_gap 250 --batch_size 256 --total_batch_size 512 --num_training_steps 10000
    --warmup_steps 1000 --weight_decay 0 --dtype bfloat16 --eval_every 1000
    --optimizer weight_norm_galore_adamw""".split()
LORO_README = """loro --single_gpu --model_config configs/llama_60m.json --dtype bfloat16 --batch_size 256
    --total_batch_size 512 --num_training_steps 10000 --save_every 1000 --eval_every 1000 --lr 0.01
    --scheduler cosine_restart --warmup_steps 1000 --min_lr_ratio 0.1 --cosine_restart_freq 500
    --lr_adjust_steps -1000 --weight_decay 0 --optimizer loro_adamw --loro_refresh all
    --loro_refresh_freq 500 --loro_scope all --loro_init xavier --loro_attn_rank 128 --loro_mlp_rank 128
    --loro_type loro --loro_freq 500 --loro_lr_scaler -1""".split()
GALORE_7B = """galore --model_config configs/llama_7b.json --lr 0.005 --galore_scale 0.25 --rank 1024
    --update_proj_gap 500 --batch_size 8 --total_batch_size 512 --num_training_steps 150000
    --warmup_steps 15000 --weight_decay 0 --grad_clipping 1.0 --dtype bfloat16 --eval_every 1000
    --optimizer galore_adamw""".split()
SMALL = ["--model_config", "llama_toy", "--batch_size", "4"]


def read(project, *argv):
    """Return the configuration of a command line that is sound."""
    config, problems = pretraining.read(project, [str(a) for a in argv])
    assert problems == []
    return config


def run(line):
    """Run a line, a project and its flags, in this process or in one of several; return the exit code."""
    try:
        return pretraining.main(line[0], line[1:])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if deepspeed := sys.modules.get("deepspeed"):
            deepspeed.utils.groups._WORLD_GROUP = None  # else another run under ZeRO would take the old one


@pytest.fixture
def in_eight(monkeypatch):
    """Let this process take itself for the first of eight."""
    monkeypatch.setenv("WORLD_SIZE", "8")


# The parsers' names and defaults, as their sources have them; * stands for required, a switch has no value.
COMMON = """model_config=* use_hf_model continue_from=None batch_size=* gradient_accumulation=None
    total_batch_size=None max_length=256 optimizer=adam lr=0.0001 scheduler=cosine min_lr_ratio=0.1
    activation_checkpointing weight_decay=0.0 warmup_steps=1000 eval_every=5000 num_training_steps=10000
    max_train_tokens=None save_every=10000 save_dir=None tags=None dtype=bfloat16 workers=8 seed=0 name=test
    grad_clipping=0.0 beta1=0.0 rank=128 update_proj_gap=50 galore_scale=1.0 proj_type=std single_gpu"""
LORO = """loro_type=loro loro_freq=1 loro_refresh=None loro_refresh_freq=0 loro_attn_rank=128
    loro_mlp_rank=128 loro_init=xavier loro_scope=None loro_lr_scaler=1.0 loro_mlp_dense
    cosine_restart_freq=None cosine_restart_warmup=5 lr_jag_after_warmup lr_adjust_steps=0 save_ckpt"""


@pytest.mark.parametrize("project", pretraining.FLAGS)
def test_flags_and_defaults_are_the_authors(project):
    def shown(flag):
        return (
            "" if flag.kind is None else "=*" if flag.default is pretraining.REQUIRED else f"={flag.default}"
        )

    ours = {f"{name}{shown(flag)}" for name, flag in pretraining.FLAGS[project].items()}
    assert ours == {*COMMON.split(), *(LORO.split() if project == "loro" else ()), "to_config=None"}


def test_the_readme_of_gradnormlorp(capsys):
    config = read(*GRADNORMLORP_README)
    assert plan.problems(config, 1) == []
    said = capsys.readouterr().out
    assert yaml.safe_load(said.split("\nDiffers")[0].partition("\n")[2]) == {
        "data": {"source": "hub", "tokenizer": "t5-base", "workers": 8},
        "optim": {"rule": "gradnormlorp", "refresh_every": 250, "subspace": "svd"},
        "train": {"micro_batch": 256, "save_every": 10000},
        "precision": {"params": "bfloat16", "compute": "bfloat16"},
        "run": {"dir": "runs/llama_60m_weight_norm_galore_adamw"},
    }
    assert "Differs from GradNormLoRP's code" in said and "changes no weight" in said
    optim, train = config.optim, config.train
    assert (config.model.config, optim.mode, optim.lr, optim.rank, optim.scale) == (
        ("llama_60m", "weightnorm", 0.01, 128, 0.25)
    )
    assert (train.global_batch, train.steps, train.warmup_steps, train.eval_every) == (512, 10000, 1000, 1000)
    assert (config.data.seq_len, config.data.sequences, config.engine.kind) == (256, "pad", "local")


def test_the_readme_of_loro(capsys):
    config = read(*LORO_README)
    assert plan.problems(config, 1) == []
    optim, train = config.optim, config.train
    assert (optim.rule, optim.exact_every, optim.refresh_moments, optim.refresh_moments_every) == (
        ("loro", 500, "all", None)
    )
    assert (optim.attn_rank, optim.mlp_rank, optim.init, optim.lr_scaler) == (128, 128, "xavier", -1)
    assert optim.targets == ["*.self_attn.*_proj", "*.mlp.*_proj"]
    assert (train.schedule, train.restart_every, train.restart_warmup_steps, train.peak_delay_steps) == (
        ("cosine_restart", 500, 5, 1000)
    )
    assert (train.restart_at, train.restart_in_warmup, train.save_every) == ("refresh", True, 1000)
    assert "counted apart after the warm-up" in " ".join(capsys.readouterr().out.split())
    compat = read(*LORO_README, "--train.restart_at", "compat", "--lr_jag_after_warmup")
    assert (compat.train.restart_at, compat.train.restart_in_warmup) == ("compat", False)
    assert "counted apart" not in capsys.readouterr().out


def test_the_script_of_galore_for_7b(in_eight):
    config = read(*GALORE_7B)
    assert plan.check(config, 8) == []
    assert (config.engine.kind, config.optim.subspace, config.optim.side) == ("ddp", "svd", "std")
    assert (config.optim.lr, config.optim.rank, config.optim.refresh_every) == (0.005, 1024, 500)
    assert (config.train.clip_norm, config.train.micro_batch, config.train.global_batch) == (1.0, 8, 512)


def test_own_options_win_wherever_they_stand(in_eight, tmp_path):
    own = ["--optim.rank=9", "--engine.kind", "fsdp", "--local-rank", "3", "--data.source", "sample"]
    config = read(GALORE_7B[0], *own, *GALORE_7B[1:], "--run.dir", tmp_path)
    assert (config.optim.rank, config.engine.kind, config.run.dir) == (9, "fsdp", str(tmp_path))
    assert (config.data.source, config.data.tokenizer) == ("sample", None)
    assert (config.precision.params, config.precision.compute) == ("bfloat16", "bfloat16")


def test_bfloat16_under_zero_is_the_arithmetic(in_eight, capsys):
    config = read(*GALORE_7B, "--engine.kind=zero")
    assert (config.precision.params, config.precision.compute) == ("float32", "bfloat16")
    assert "ZeRO updates float32 weights" in capsys.readouterr().out
    assert plan.check(config, 8) == []


def test_a_config_is_written_and_only_that(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    with pytest.raises(SystemExit) as stop:
        run([*LORO_README, "--to_config", str(path), "--train.keep_checkpoints=1"])
    assert stop.value.code == 0
    assert parse(["--config", str(path)]) == (read(*LORO_README, "--train.keep_checkpoints=1"), [])
    assert run([*LORO_README, "--to_config", str(tmp_path / "nowhere" / "config.yaml")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_models_by_path_by_stem_and_by_name(tmp_path):
    path = tmp_path / "llama_60m.json"
    assert read("galore", "--model_config", path, "--batch_size", 4).model.config == "llama_60m"
    path.write_text("{}")
    assert read("galore", "--model_config", path, "--batch_size", 4).model.config == str(path)
    config = read("galore", "--model_config", "configs/llama_94m.json", "--batch_size", 4)
    assert [p.field for p in plan.problems(config, 1)] == ["model.config"]


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ("--batch_size 8 --gradient_accumulation 3", {"train.micro_batch": 8, "train.global_batch": 192}),
        ("--max_train_tokens 2M --max_length 100", {"train.steps": 2 * 10**6 // (32 * 100)}),
        ("--max_train_tokens 1B", {"train.steps": 10**9 // (32 * 256)}),
        ("--scheduler linear", {"train.schedule": "linear", "train.min_lr_ratio": 0.0}),
        ("--activation_checkpointing", {"model.checkpointing": "full"}),
        ("--continue_from here --save_dir there", {"run.resume": "here", "run.dir": "there"}),
        ("--dtype float32", {"precision.params": "float32", "precision.compute": "float32"}),
        ("--optimizer ADAM", {"optim.rule": "adamw", "optim.eps": 1e-8, "optim.rank": 128}),
        ("--optimizer galore_adamw", {"optim.rule": "galore", "optim.refresh_every": 50, "optim.scale": 1.0}),
        ("--optimizer galore_adamw8bit", {"optim.moments": "int8", "optim.eps": 1e-8}),
        ("--optimizer galore_adafactor --beta1 0.9", {"optim.base": "adafactor", "optim.momentum": 0.9}),
        ("--optimizer sgd --beta1 0.9", {"optim.rule": "sgd", "optim.momentum": 0.9}),
        (
            "--optimizer galore_adamw8bit_per_layer --update_proj_gap 100 --warmup_steps 50",
            {
                "optim.per_layer": True,
                "optim.rule": "galore",
                "optim.moments": "int8",
                "optim.refresh_every": 100,
                "train.warmup_steps": 50,
            },
        ),
        ("--optimizer adam --beta1 0.9", {"optim.momentum": 0.0, "optim.betas": (0.9, 0.999)}),
    ],
)
def test_flags_become_fields(in_eight, argv, values):
    config = read("galore", *SMALL, *argv.split())
    for field, value in values.items():
        section, name = field.split(".")
        assert getattr(getattr(config, section), name) == value, field


SCOPED = "--optimizer loro_adamw --loro_scope all "


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ("--optimizer loro_adamw", {"optim.rule": "adamw", "optim.eps": 1e-6}),
        ("--scheduler const", {"train.schedule": "linear", "train.min_lr_ratio": 1.0}),
        (SCOPED, {"optim.rule": "loro", "optim.exact_every": 1, "optim.refresh_moments": "none"}),
        (SCOPED + "--loro_type eucl", {"optim.rule": "factored"}),
        ("--optimizer adam --loro_scope all", {"optim.rule": "factored", "optim.eps": 1e-8}),
        ("--optimizer loro_adamw --loro_scope mlp", {"optim.targets": ["*.mlp.*_proj"]}),
        (SCOPED + "--loro_mlp_dense", {"optim.targets": ["*.self_attn.*_proj"], "optim.mlp_rank": None}),
        (
            SCOPED + "--loro_freq 8 --loro_refresh lrk --loro_refresh_freq 4",
            {"optim.exact_every": 8, "optim.refresh_moments": "lrk", "optim.refresh_moments_every": 4},
        ),
        (
            SCOPED + "--scheduler cosine_restart_zero --cosine_restart_freq 6 --loro_refresh all"
            " --loro_refresh_freq 4 --loro_freq 4 --cosine_restart_warmup 2",
            {
                "train.schedule": "cosine_restart_zero",
                "train.restart_every": 4,
                "train.restart_warmup_steps": 2,
            },
        ),
        (SCOPED + "--scheduler cosine_restart --cosine_restart_freq 6", {"train.restart_every": 6}),
    ],
)
def test_flags_of_loro_become_fields(argv, values):
    config = read("loro", *SMALL, *argv.split())
    assert plan.check(config, 1) == []
    for field, value in values.items():
        section, name = field.split(".")
        assert getattr(getattr(config, section), name) == value, field


def test_flags_without_a_meaning_are_named(capsys):
    read("loro", *SMALL, "--tags", "a", "--name", "b", "--save_ckpt", "--use_hf_model")
    line = "--use_hf_model, --tags, --name, --save_ckpt: accepted, without a meaning here"
    assert line in capsys.readouterr().out
    read("galore", *SMALL)
    assert "without a meaning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("project", "argv", "words"),
    [
        ("galore", "--optimizer galore_adamw_per_layer --engine.kind ddp", ["optim.per_layer=True", "fsdp"]),
        ("loro", SCOPED.replace("adamw", "adamw_per_layer"), ["optim.per_layer=True", "pairs"]),
        ("galore", "--optimizer lowrank", ["--optimizer='lowrank'", "galore_adafactor"]),
        ("galore", "--optimizer loro_adamw_per_layer", ["is not known"]),
        ("galore", "--scheduler cosine_restarts", ["lacks its arguments", "Use cosine"]),
        ("galore", "--scheduler warm", ["--scheduler='warm'", "linear, cosine"]),
        (
            "galore",
            "--galore_scal 2 --lr fast --rank",
            ["--galore_scale is meant", "a number", "has no value"],
        ),
        ("galore", "--single_gpu=1 stray", ["takes no value", "'stray' is not an option"]),
        ("galore", "--total_batch_size 16 --gradient_accumulation 2", ["1 processes × 4 × 2"]),
        ("galore", "--dtype float16", ["--dtype='float16'", "bfloat16"]),
        ("galore", "--optim.rnk 3", ["optim.rnk='3'", "Perhaps optim.rank"]),
        ("galore", "--optim.rank", ["optim.rank=None", "has no value"]),
        ("galore", "--optimizer sgd --engine.kind zero", ["optim.rule='sgd'", "engine.kind=ddp"]),
        ("galore", "--max_train_tokens many", ["whole number"]),
        ("loro", "--loro_lr_scaler auto", ["--loro_lr_scaler='auto'", "is not a number"]),
        ("loro", "--loro_refresh all", ["needs low-rank weights"]),
        ("loro", SCOPED + "--loro_refresh all", ["loro_refresh_freq=0", "at least 1"]),
        ("loro", "--optimizer galore_adamw --loro_scope all", ["low-rank weights", "loro_adamw"]),
        ("loro", SCOPED + "--loro_init spiral", ["optim.init='spiral'"]),
        ("loro", "--scheduler cosine_restart", ["cosine_restart_freq=None"]),
        ("loro", "--lr_adjust_steps -5", ["is for cosine_restart"]),
        ("loro", "--scheduler cosine_restart --cosine_restart_freq 5 --lr_adjust_steps 5", ["not above 0"]),
    ],
)
def test_what_cannot_be_is_refused(capsys, project, argv, words):
    assert run([project, *SMALL, *argv.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lrpretrain: "), error
    assert all(word in error for word in words), error


def test_required_flags_are_asked_for_all_at_once(capsys):
    assert run(["galore", "--foo", "--lr", "1"]) == 2
    error = capsys.readouterr().err
    assert "3 problems" in error and "--model_config" in error and "--batch_size" in error


def test_a_single_gpu_is_one_process(in_eight):
    _, (problem,) = pretraining.read("galore", [*SMALL, "--single_gpu"])
    assert (problem.field, problem.reason) == ("--single_gpu", "8 processes were started")
    with pytest.raises(ConfigError, match="single_gpu"):
        pretraining.read("galore", [*SMALL, "--single_gpu", "--to_config", "x"])


@pytest.mark.parametrize("project", pretraining.FLAGS)
def test_every_project_has_an_entry_that_exits_with_the_code(monkeypatch, capsys, project):
    codes = []
    monkeypatch.setattr(pretrain, "leave", lambda main: codes.append(main()))
    monkeypatch.setattr(sys, "argv", ["entry", *SMALL, "--optimizer", "none"])
    runpy.run_module(f"lrpretrain.authors.{project}", run_name="__main__")
    assert codes == [2]
    assert f"Use one of {', '.join(pretraining.OPTIMIZERS[project])}." in capsys.readouterr().err


def test_help_lists_flags_with_what_they_become(capsys):
    with pytest.raises(SystemExit) as stop:
        pretraining.main("loro", ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert (
        "--batch_size REQUIRED → train.micro_batch" in words and "--loro_scope None one of all, attn" in words
    )


# Per name: flags besides, and by how much eight steps lower the loss.
NAMES = {
    ("galore", "adam"): ("", 0.3),
    ("galore", "adamw"): ("", 0.3),
    ("galore", "sgd"): ("--lr 1 --beta1 0.5", 0.1),
    ("galore", "adafactor"): ("--beta1 0.5", 0.3),
    ("galore", "adam8bit"): ("", 0.3),
    ("galore", "galore_adamw"): ("", 0.3),
    ("galore", "galore_adafactor"): ("", 0.3),
    ("galore", "galore_adamw8bit"): ("", 0.3),
    ("galore", "galore_adamw8bit_per_layer"): ("--grad_clipping 1", 0.3),
    ("gradnormlorp", "lowrank"): ("", 0.3),
    ("gradnormlorp", "weight_norm_galore_adamw"): ("", 0.3),
    ("gradnormlorp", "weight_norm_galore_adamw8bit"): ("", 0.3),
    ("gradnormlorp", "weight_norm_galore_adamw8bit_per_layer"): ("", 0.3),
    ("gradnormlorp", "weight_norm_galore_adafactor"): ("", 0.3),
    ("loro", "galore_adamw"): ("", 0.3),
    ("loro", "loro_adamw"): ("--loro_scope all --loro_freq 3 --loro_lr_scaler -1 --loro_init orth", 0.3),
    ("loro", "adamw"): ("--loro_scope attn", 0.3),
}


def tiny(bench, project, name, folder, *more):
    """Return a line for eight steps of the tests' model."""
    loro = "--loro_attn_rank 4 --loro_mlp_rank 4" if project == "loro" else ""
    line = f"""{project} --model_config {bench.model} --batch_size 6 --total_batch_size 12 --max_length 32
        --lr 0.02 --rank 4 --update_proj_gap 3 --num_training_steps 8 --warmup_steps 1 --eval_every 0
        --workers 1 --save_dir {bench.folder / folder} --optimizer {name} {loro} {NAMES[project, name][0]}
        --data.source files --data.path {bench.text} --data.tokenizer {bench.tokenizer} --data.lanes 6
        --data.cache_dir {bench.folder / "cache"} --train.log_every 1"""
    return [*line.split(), *more]


@pytest.mark.parametrize(("project", "name"), NAMES)
def test_every_optimizer_name_trains(bench, project, name):
    folder = f"{project}-{name}"
    assert run(tiny(bench, project, name, folder)) == 0
    losses = bench.losses(folder)
    assert losses[8] < losses[1] - NAMES[project, name][1]


def test_every_name_is_tried():
    tried = {name.removesuffix("_per_layer") for _, name in NAMES}
    assert tried == {name for known in pretraining.OPTIMIZERS.values() for name in known}


def test_the_authors_recorded_run_has_their_perplexities(tmp_path):
    """20 steps of GaLore's code on a two-layer LLaMA, by its flags on our engine."""
    z = np.load(Path(__file__).parent / "golden" / "llama_tiny_galore.npz")
    meta = json.loads(str(z["meta"]))
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps(meta["cfg"] | {"model_type": "llama"}))
    argv = f"""--model_config {model} --batch_size 4 --optimizer galore_adamw --rank {meta["rank"]} --lr 0.01
        --update_proj_gap {meta["gap_or_freq"]} --galore_scale {meta["scale"]} --dtype float32"""
    config = read("galore", *argv.split())
    engine = build_engine(config, Procs(), torch.device("cpu"), pad_id=0)
    with torch.no_grad():
        for h in engine.holdings:
            h.param.copy_(torch.tensor(z[f"init/{h.name}"]))
    for ids, theirs, lr in zip(z["input_ids"], z["loss"], z["lr"], strict=True):
        step = engine.train_step([torch.tensor(ids)], int((ids[:, 1:] != 0).sum()), None, float(lr) / 0.01)
        assert math.isclose(math.exp(step.loss), math.exp(theirs), rel_tol=1e-5)
    for h in engine.holdings:
        theirs = torch.tensor(z[f"step20/{h.name}"])
        assert (h.param - theirs).norm() < 1e-4 * theirs.norm(), h.name


def cut(line, folder, *more):
    """Return a line of a README for a toy model on the embedded corpus and four steps."""
    values = {"--model_config": "configs/llama_toy.json", "--batch_size": "4", "--total_batch_size": "8"}
    values |= {"--num_training_steps": "4", "--warmup_steps": "1", "--lr_adjust_steps": "-1"}
    values |= dict.fromkeys(("--rank", "--loro_attn_rank", "--loro_mlp_rank"), "16")
    every = ("--update_proj_gap", "--loro_freq", "--loro_refresh_freq", "--cosine_restart_freq")
    values |= dict.fromkeys(every, "2")
    words = [values.get(flag, word) for flag, word in zip(["", *line], line, strict=False)]
    own = "--data.source sample --data.seq_len 48 --train.eval_tokens 2000 --train.log_every 1"
    return [*words, *own.split(), "--run.dir", str(folder), *more]


def losses_of(folder):
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [m["train/loss"] for m in metrics if "train/loss" in m], metrics[-1]["valid/ppl"] / metrics[0][
        "valid/ppl"
    ]


def test_the_commands_run_under_every_engine(bench, tmp_path):
    """Those of the READMEs, in one process as they stand, then under FSDP2 and ZeRO-2 in two; and plain
    low-rank weights. What needs whole matrices, under DDP."""
    eucl = [*LORO_README, "--loro_type", "eucl", "--dtype", "float32", "--lr", "0.01"]
    lines = {"gradnormlorp": GRADNORMLORP_README, "loro": LORO_README, "factored": eucl}
    whole = [("galore", name) for name in ("sgd", "adafactor", "adam8bit")]
    whole += [("gradnormlorp", "weight_norm_galore_adafactor")]
    for name, line in lines.items():
        assert run(cut(line, tmp_path / f"{name}-local")) == 0
    for case in whole:
        assert run(tiny(bench, *case, f"{case[1]}-local", "--dtype=float32")) == 0
    engines = {"fsdp": "--engine.kind=fsdp", "zero": "--engine.kind=zero"}
    split = [
        cut([word for word in line if word != "--single_gpu"], tmp_path / f"{name}-{engine}", option)
        for name, line in lines.items()
        for engine, option in engines.items()
    ]
    split += [tiny(bench, *case, f"{case[1]}-ddp", "--dtype=float32") for case in whole]
    assert launch(2, split, run) == [0] * len(split)
    for name in lines:
        alone, fall = losses_of(tmp_path / f"{name}-local")
        assert fall < 0.9
        for engine in engines:
            losses, fall = losses_of(tmp_path / f"{name}-{engine}")
            assert fall < 0.9
            tolerance = 1e-5 if name == "factored" else 2e-2
            np.testing.assert_allclose(losses, alone, rtol=tolerance)
    for _, name in whole:
        assert bench.losses(f"{name}-ddp") == pytest.approx(bench.losses(f"{name}-local"), rel=1e-5), name
