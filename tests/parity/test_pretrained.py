"""Runs that start from the files of a Hugging Face folder: the same losses on one process and in shards."""

import pytest
import torch
from tiny import TINY, finish, launch
from transformers import LlamaConfig, LlamaForCausalLM

DORA = dict(optim__rule="gradnormlorp", optim__mode="dora", optim__adapter_rank=6, optim__lr=0.03)


@pytest.fixture(scope="module")
def folder(bench):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(bench.folder / "hf", max_shard_size="60KB")
    return bench.folder / "hf"


def test_dora_trains_and_resumes_on_any_layout(bench, folder):
    def line(run, engine, **more):
        return bench.options(run, engine__kind=engine, model__init_from=folder, **DORA, **more)

    assert launch(1, [line("dora-local", "local")]) == [0]
    reference = bench.losses("dora-local")
    assert reference[30] < reference[1] - 0.2  # it learns, under a frozen random head
    runs = {
        "dora-fsdp": line("dora-fsdp", "fsdp", train__save_every=10),
        "dora-rows": line("dora-rows", "fsdp", engine__shard_columns="false"),
        "dora-ddp": line("dora-ddp", "ddp"),
    }
    assert launch(2, list(runs.values())) == [0] * 3
    for run in runs:
        assert bench.losses(run) == pytest.approx(reference, rel=1e-5), run
    bench.forget_after("dora-fsdp", 20)
    assert launch(1, [line("dora-fsdp", "local")]) == [0]
    assert bench.losses("dora-fsdp") == pytest.approx(reference, rel=1e-5)


def test_a_rule_starts_from_the_files(bench, folder):
    def line(run, engine, **more):
        return bench.options(run, engine__kind=engine, model__init_from=folder, train__steps=5, **more)

    assert launch(1, [line("hf-local", "local"), line("hf-dora", "local", **DORA)]) == [0, 0]
    assert launch(2, [line("hf-fsdp", "fsdp")]) == [0]
    assert bench.losses("hf-fsdp") == pytest.approx(bench.losses("hf-local"), rel=1e-5)
    assert bench.losses("hf-dora")[1] == pytest.approx(bench.losses("hf-local")[1], rel=1e-6)


def test_files_that_do_not_fit_are_refused_before_training(bench, folder):
    wrong = {"model__config": "llama_toy", "model__init_from": folder, "optim__rank": 9}
    code, output = finish(bench.options("hf-wrong", **DORA, **wrong))
    assert code == 2, output
    assert "lacks" in output and "of other shapes than model.config" in output and "optim.rank=9" in output
    assert not (bench.folder / "hf-wrong").exists()
