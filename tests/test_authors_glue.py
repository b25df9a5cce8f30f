"""The authors' GLUE command lines: translated, refused, and run."""

import json
import runpy
import sys

import pytest
import torch
import torch.distributed as dist
import yaml
from test_finetune import rows_of, write_model, write_rows
from transformers import get_scheduler

from lrpretrain import finetune, pretrain
from lrpretrain.authors import command_line, glue
from lrpretrain.config import FinetuneConfig, parse
from lrpretrain.train.schedule import lr_ratio

GRADNORMLORP_README = """gradnormlorp --model_name_or_path roberta-base --task_name mrpc --enable_lowrank
    --lora_all_modules --max_length 512 --seed 1234 --lora_r 4 --galore_scale 4
    --per_device_train_batch_size 16 --update_proj_gap 500 --learning_rate 3e-5 --num_train_epochs 30
    --output_dir results_wn/mrpc""".split()
LORO_README = """loro --model_name_or_path roberta-base --task_name mrpc --max_length 512 --seed 0
    --optimizer loro_adamw --per_device_train_batch_size 16 --num_train_epochs 20 --learning_rate 0.0002
    --lr_scheduler_type linear --weight_decay 0 --loro_type loro --loro_rank 8 --loro_alpha 8
    --loro_freq 100 --loro_init xavier --loro_scope qv --loro_lr_scaler 1""".split()
GRADNORMLORP = "gradnormlorp --model_name_or_path roberta-base --task_name rte"
QV = "loro --optimizer loro_adamw --loro_scope qv"


def read(*argv):
    """Return the configuration of a command line that is sound."""
    config, problems = glue.read(argv[0], [str(a) for a in argv[1:]])
    assert problems == []
    return config


def value(config, field):
    section, name = field.split(".")
    return getattr(getattr(config, section), name)


# The parsers' names and defaults, as their sources have them; * stands for required, a switch has no value.
COMMON = """lora_r=8 load_pretrained_model=None train_file=None validation_file=None max_length=128
    pad_to_max_length use_slow_tokenizer per_device_train_batch_size=8 weight_decay=0.0 num_train_epochs=3
    max_train_steps=None gradient_accumulation_steps=1 lr_scheduler_type=linear num_warmup_steps=0
    output_dir=None seed=None push_to_hub hub_model_id=None hub_token=None trust_remote_code=False
    checkpointing_steps=None resume_from_checkpoint=None with_tracking report_to=all ignore_mismatched_sizes
    update_proj_gap=50 galore_scale=1.0 proj_type=std lora_all_modules eval_llama"""
OWN = {
    "gradnormlorp": """task_name=None model_name_or_path=* per_device_eval_batch_size=8 learning_rate=5e-05
        enable_galore enable_lowrank enable_wngalore low_rank_method=None""",
    "loro": """task_name=mrpc model_name_or_path=roberta-base per_device_eval_batch_size=128
        learning_rate=1e-06 save_ckpt optimizer=adamw loro_type=eucl loro_freq=10 loro_rank=128
        loro_init=xavier loro_scope=None loro_lr_scaler=1.0 loro_alpha=1.0""",
}


@pytest.mark.parametrize("project", OWN)
def test_flags_and_defaults_are_the_authors(project):
    def shown(flag):
        required = flag.default is command_line.REQUIRED
        return "" if flag.kind is None else "=*" if required else f"={flag.default}"

    ours = {f"{name}{shown(flag)}" for name, flag in glue.FLAGS[project].items()}
    assert ours == {*COMMON.split(), *OWN[project].split(), "to_config=None"}


READMES = {
    "gradnormlorp": (
        GRADNORMLORP_README,
        {
            "model": {"init_from": "roberta-base"},
            "data": {"seq_len": 512},
            "optim": {"rule": "gradnormlorp", "rank": 4, "mode": "lowrank_wn", "subspace": "svd"},
            "train": {"epochs": 30, "seed": 1234},
            "run": {"dir": "results_wn/mrpc"},
        },
        "theirs turns NaN",
    ),
    "loro": (
        LORO_README,
        {
            "model": {"init_from": "roberta-base"},
            "data": {"seq_len": 512},
            "optim": {"rule": "loro", "lr": 0.0002, "adapter_alpha": 8.0, "targets": ["*.query", "*.value"]},
            "train": {"epochs": 20},
            "run": {"dir": "runs/roberta-base_mrpc_loro"},
        },
        "leaves the head as it was drawn",
    ),
}


@pytest.mark.parametrize("project", READMES)
def test_the_readme(project, capsys):
    line, changed, difference = READMES[project]
    config = read(*line)
    said = capsys.readouterr().out
    assert yaml.safe_load(said.split("\nDiffers")[0].partition("\n")[2]) == changed
    assert f"Differs from {command_line.NAMES[project]}'s code" in said and difference in said
    # The defaults that the rest of the line happens to ask for.
    optim, train = config.optim, config.train
    assert (config.data.task, train.micro_batch, train.global_batch) == ("mrpc", 16, 16)
    assert (train.schedule, train.min_lr_ratio, train.warmup_steps) == ("linear", 0.0, 0)
    if project == "loro":
        assert (optim.rank, optim.exact_every, optim.init, optim.lr_scaler) == (8, 100, "xavier", 1.0)
        assert (optim.refresh_moments, optim.compat, train.seed) == ("none", False, 0)
    else:
        assert (optim.lr, optim.scale, optim.refresh_every, optim.side) == (3e-5, 4.0, 500, "std")


@pytest.mark.parametrize(
    ("line", "values"),
    [
        (GRADNORMLORP, {"optim.rule": "adamw", "optim.eps": 1e-8, "optim.lr": 5e-5, "optim.targets": []}),
        (
            GRADNORMLORP + " --enable_galore --lora_r 3 --proj_type full",
            {
                "optim.rule": "galore",
                "optim.eps": 1e-6,
                "optim.rank": 3,
                "optim.refresh_every": 50,
                "optim.scale": 1.0,
                "optim.side": "full",
                "optim.subspace": "svd",
                "optim.targets": ["*.query"],
                "run.dir": "runs/roberta-base_rte_galore",
            },
        ),
        (
            GRADNORMLORP + " --enable_wngalore --lora_all_modules",
            {"optim.rule": "gradnormlorp", "optim.mode": "weightnorm", "optim.targets": []},
        ),
        (
            GRADNORMLORP + " --enable_galore --eval_llama --load_pretrained_model exports/llama_60m",
            {"model.init_from": "exports/llama_60m", "optim.targets": ["*.q_proj", "*.v_proj"]},
        ),
        (
            GRADNORMLORP + " --gradient_accumulation_steps 3 --weight_decay 0.1 --num_warmup_steps 9",
            {"train.micro_batch": 8, "train.global_batch": 24, "optim.weight_decay": 0.1}
            | {"train.warmup_steps": 9},
        ),
        (
            GRADNORMLORP + " --train_file rows.csv --validation_file rows.json",
            {"data.path": "rows.csv", "data.validation_path": "rows.json", "data.task": "rte"},
        ),
        (GRADNORMLORP + " --checkpointing_steps 7", {"train.save_every": 7}),
        (GRADNORMLORP + " --checkpointing_steps epoch", {"train.save_every": 0}),
        ("loro", {"model.init_from": "roberta-base", "data.task": "mrpc", "optim.lr": 1e-6}),
        ("loro --optimizer AdamW --output_dir out", {"optim.rule": "adamw", "run.dir": "out"}),
        (
            "loro --optimizer galore_adamw --lora_r 2 --update_proj_gap 9",
            {"optim.rule": "galore", "optim.rank": 2, "optim.refresh_every": 9, "optim.targets": ["*.query"]},
        ),
        (
            QV + " --loro_lr_scaler -1",
            {"optim.exact_every": 0, "optim.lr_scaler": 1.0, "optim.rank": 128, "optim.adapter_alpha": 1.0},
        ),
        (
            QV + " --loro_type loro --loro_lr_scaler -1 --loro_init spec_low --optim.compat true",
            {"optim.exact_every": 10, "optim.lr_scaler": -1, "optim.init": "spec_low", "optim.compat": True},
        ),
        (
            "loro --optimizer loro_adamw --loro_scope mlp --model_name_or_path huggyllama/llama-7b",
            {"optim.targets": ["*.mlp.*_proj"]},
        ),
        ("loro --optimizer loro_adamw --loro_scope all", {"optim.targets": []}),
    ],
)
def test_flags_become_fields(line, values):
    config = read(*line.split())
    assert {field: value(config, field) for field in values} == values


def test_flags_in_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = read(*GRADNORMLORP_README, "--engine.kind=fsdp", "--data.seq_len", 64)
    assert (config.engine.kind, config.data.seq_len, config.train.global_batch) == ("fsdp", 64, 64)
    assert read(*LORO_README).engine.kind == "ddp"


@pytest.mark.parametrize("kind", glue.SCHEDULES)
def test_schedules_are_those_of_hugging_face(kind):
    """Their own six, for steps that are not a whole number of epochs."""
    flags = f"--lr_scheduler_type {kind} --max_train_steps 22 --num_warmup_steps 4 --learning_rate 2e-7"
    train = read(*GRADNORMLORP.split(), *flags.split()).of_run(0, epoch=5).train
    assert train.steps == 22
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-7)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=4, num_training_steps=22)
    for step in range(22):
        assert 2e-7 * lr_ratio(step, train) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-18), step
        optimizer.step()
        theirs.step()


def test_the_family_is_that_of_the_folder(tmp_path):
    """Whatever its name is; a model of the hub is what its name says, as in the scripts."""
    line = f"{GRADNORMLORP} --enable_galore --model_name_or_path {tmp_path / 'roberta'}".split()
    assert read(*line).optim.targets == ["*.query"]
    (tmp_path / "roberta").mkdir()
    (tmp_path / "roberta/config.json").write_text('{"model_type": "llama"}')
    assert read(*line).optim.targets == ["*.q_proj", "*.v_proj"]
    (tmp_path / "roberta/config.json").write_text("{")
    assert read(*line).optim.targets == ["*.query"]


@pytest.mark.parametrize(
    ("line", "note"),
    [
        (GRADNORMLORP + " --pad_to_max_length", "--pad_to_max_length: rows are padded to the longest"),
        (
            GRADNORMLORP + " --hub_token t --hub_model_id m",
            "--hub_model_id, --hub_token: nothing is uploaded",
        ),
        (GRADNORMLORP + " --with_tracking --report_to wandb", "--with_tracking, --report_to: curves"),
        (GRADNORMLORP + " --low_rank_method galore", "--low_rank_method: a label"),
        (GRADNORMLORP + " --trust_remote_code True --use_slow_tokenizer", "--trust_remote_code: no code"),
        ("loro --save_ckpt --ignore_mismatched_sizes", "--save_ckpt: the newest checkpoint"),
        ("loro --per_device_eval_batch_size 4", "--per_device_eval_batch_size: evaluation takes"),
        ("loro --gradient_accumulation_steps 2", "theirs the first one, and then every 2"),
        ("loro --weight_decay 0.1", "theirs but for biases and norms"),
        ("loro", "without --seed the seed is 0"),
        ("loro --task_name mnli", "theirs the latter"),
        ("loro --optimizer galore_adamw", "theirs freezes it"),
        (GRADNORMLORP + " --enable_wngalore", "theirs changes no weight"),
        (GRADNORMLORP + " --eval_llama", "theirs draws new ones"),
        (GRADNORMLORP + " --lr_scheduler_type constant --num_warmup_steps 2", "constant has no warm-up"),
        (GRADNORMLORP + " --train_file rows.csv", "theirs takes the hub's"),
    ],
)
def test_what_differs_is_said_where_it_does(line, note, capsys):
    read(*line.split())
    assert note in capsys.readouterr().out
    read("loro", "--seed=1", *QV.split()[1:], "--optim.compat=true")
    assert note not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gradnormlorp", ["--model_name_or_path", "is required"]),
        ("gradnormlorp --model_name_or_path x --train_file f.csv", ["--task_name", "stsb, wnli"]),
        (GRADNORMLORP + " --task_name squad", ["--task_name='squad'", "cola, mnli"]),
        (GRADNORMLORP + " --enable_galore --enable_lowrank", ["--enable_galore", "with --enable_lowrank"]),
        (GRADNORMLORP + " --enable_lowrnk", ["--enable_lowrank is meant"]),
        (GRADNORMLORP + " --push_to_hub", ["nothing is uploaded", "--export DIR"]),
        (GRADNORMLORP + " --resume_from_checkpoint out/epoch_1", ["--output_dir", "Leave it out"]),
        (GRADNORMLORP + " --checkpointing_steps often", ["--checkpointing_steps='often'", "epoch"]),
        (GRADNORMLORP + " --proj_type up", ["reverse_std"]),
        (GRADNORMLORP + " --optim.rnk 3", ["Perhaps optim.rank"]),
        ("loro --optimizer lion", ["--optimizer='lion'", "adamw, galore_adamw, loro_adamw"]),
        ("loro --optimizer loro_adamw", ["--loro_scope=None", "all, qkv, qv"]),
        ("loro --optimizer loro_adamw --loro_scope mlp", ["not a part of bert models"]),
        ("loro --lora_r four", ["--lora_r='four'", "whole number"]),
    ],
)
def test_what_cannot_be_is_refused(line, words, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "check", lambda config, n_procs: (config, []))  # it would ask the hub
    project, *argv = line.split()
    assert glue.main(project, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("lrpretrain: ") and all(word in error for word in words), error


def test_a_config_is_written_and_only_that(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    with pytest.raises(SystemExit) as stop:
        glue.main("loro", [*LORO_README[1:], "--to_config", str(path), "--train.runs=2"])
    assert stop.value.code == 0
    written = parse(["--config", str(path)], kind=FinetuneConfig)
    assert written == (read(*LORO_README, "--train.runs=2"), [])


@pytest.mark.parametrize("project", glue.FLAGS)
def test_every_project_has_an_entry_that_exits_with_the_code(monkeypatch, capsys, project):
    codes = []
    monkeypatch.setattr(pretrain, "leave", lambda main: codes.append(main()))
    monkeypatch.setattr(sys, "argv", ["entry", "--lora_q"])
    runpy.run_module(f"lrpretrain.authors.{project}_glue", run_name="__main__")
    assert codes == [2]
    assert "--lora_r is meant" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        glue.main(project, ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "GLUE script. Options of lrpretrain.finetune may be added." in words
    assert "--max_length 128 → data.seq_len" in words
    assert ("--optimizer: adamw, galore_adamw, loro_adamw" in words) == (project == "loro")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a tiny RoBERTa and rows of MRPC: the second sentence says nothing."""
    folder = tmp_path_factory.mktemp("glue")
    write_model(folder / "roberta", "roberta")
    for seed, (split, n) in enumerate((("train", 100), ("validation", 31))):
        rows = rows_of("sst2", n, seed)
        rows = [{"sentence1": r["sentence"], "sentence2": "the film", "label": r["label"]} for r in rows]
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


@pytest.mark.parametrize("line", [GRADNORMLORP_README, LORO_README], ids=lambda line: line[0])
def test_the_command_of_the_readme_runs(task, line):
    """Cut to 8 epochs of 13 steps on a tiny model, at its rate."""
    values = {"--model_name_or_path": task / "roberta", "--max_length": 24, "--num_train_epochs": 8}
    values |= {"--per_device_train_batch_size": 8, "--learning_rate": 0.01, "--update_proj_gap": 5}
    values |= {"--loro_freq": 5, "--loro_rank": 4, "--galore_scale": 1, "--output_dir": task / line[0]}
    words = [str(values.get(flag, word)) for flag, word in zip(["", *line], line, strict=False)]
    own = ["--data.path", str(task), "--run.dir", str(task / line[0]), "--train.log_every=1"]
    try:
        code = glue.main(words[0], [*words[1:], *own, "--export", str(task / f"{line[0]}_model")])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert code == 0
    results = json.loads((task / line[0] / "results.json").read_text())
    (run,) = results["runs"]
    assert [e["step"] for e in run["epochs"]] == list(range(13, 105, 13))
    assert run["last"]["accuracy"] > 0.9 and run["last"]["f1"] > 0.9
    assert (task / f"{line[0]}_model" / "model.safetensors").is_file()
