"""Fine-tuning on GLUE: tiny classifiers on rows that the test writes, in process."""

import json
import random

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

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


def write_model(folder, kind):
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
    AutoModelForSequenceClassification.from_config(SHAPES[kind](**SIZES)).save_pretrained(folder)
    return folder


def write_rows(path, n, seed):
    """Write rows for SST-2: a row is good if its telling words are."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(n):
            label = rng.randrange(2)
            words = [*rng.choices(OTHER, k=rng.randint(1, 3)), *rng.choices((BAD, GOOD)[label], k=4)]
            rng.shuffle(words)
            file.write(json.dumps({"sentence": " ".join(words), "label": label}) + "\n")


class Glue:
    """A folder with tiny models and rows, and the command line."""

    def __init__(self, folder):
        self.folder = folder
        for kind in SHAPES:
            write_model(folder / kind, kind)
        (folder / "sst2").mkdir()
        write_rows(folder / "sst2/train.jsonl", 100, seed=0)
        write_rows(folder / "sst2/validation.jsonl", 31, seed=1)

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
        try:
            return main([*self.options(run, kind, **options), *map(str, extra)])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def results(self, run):
        return json.loads((self.folder / run / "results.json").read_text())

    def losses(self, run, seed=0):
        lines = (self.folder / run / f"seed_{seed}/metrics.jsonl").read_text().splitlines()
        return {e["step"]: e["train/loss"] for e in map(json.loads, lines) if "train/loss" in e}


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
def test_a_method_learns_the_rows(task, method):
    kind, options = METHODS[method]
    assert task.run(method, kind, **options, train__epochs=4) == 0
    results = task.results(method)
    (run,) = results["runs"]
    assert [e["epoch"] for e in run["epochs"]] == [1, 2, 3, 4]
    assert run["last"]["accuracy"] > 0.9  # 16 of the 31 rows are bad
    assert run["best"]["accuracy"] == max(e["accuracy"] for e in run["epochs"])
    assert run["last"] == run["epochs"][-1]
    assert results["last"]["accuracy"] == {"mean": run["last"]["accuracy"], "std": None}
