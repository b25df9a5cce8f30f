"""Runs that start from the files of a Hugging Face folder: the same losses on one process and in shards."""

import pytest
import torch
from matrix import MODEL, configure, difference, train
from spawn import spawn
from tiny import TINY, finish, launch
from transformers import LlamaConfig, LlamaForCausalLM

from lrpretrain.sharding.procs import Procs

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
        "dora-zero": line("dora-zero", "zero", engine__ds_config="zero3", train__save_every=10),
    }
    assert launch(2, list(runs.values())) == [0] * 4
    for run in runs:
        assert bench.losses(run) == pytest.approx(reference, rel=1e-5), run
    bench.forget_after("dora-fsdp", 20)
    bench.forget_after("dora-zero", 20)
    assert launch(1, [line("dora-fsdp", "local"), line("dora-zero", "zero", engine__ds_config="zero2")]) == [
        0,
        0,
    ]
    for run in ("dora-fsdp", "dora-zero"):
        assert bench.losses(run) == pytest.approx(reference, rel=1e-5)


def compare_with_one_process(folder, layouts):
    """Train DoRA layers; return by layout how losses and weights differ, what was kept, and what learned."""
    procs = Procs.of_default_group()
    dora = {"mode": "dora", "adapter_rank": 6, "weight_decay": 0.1}
    hf = {"model": {"config": str(folder / "hf" / "config.json"), "init_from": str(folder / "hf")}}
    theirs = LlamaForCausalLM.from_pretrained(folder / "hf").state_dict()
    alone = train(configure(folder, "gradnormlorp", "local", 3, 1, dora, **hf), Procs())
    results = {}
    for layout in layouts:
        config = configure(folder, "gradnormlorp", layout, 3, procs.n_procs, dora, **hf)
        ours = train(config, procs)
        kept = all(torch.equal(ours[2][name], weight) for name, weight in theirs.items())
        results[layout] = *difference(ours, alone), kept, abs(ours[0][-1] - ours[0][0])
    return results


@pytest.mark.parametrize(
    ("n_procs", "layouts"), [(2, ["zero2", "zero3"]), (3, ["zero1", "zero3-persistent"])]
)
def test_dora_is_the_same_under_zero(tmp_path, n_procs, layouts):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(tmp_path / "hf")
    for results in spawn(compare_with_one_process, n_procs, tmp_path, layouts):
        assert list(results) == layouts
        for layout, (losses, weights, kept, learned) in results.items():
            assert losses < 1e-5 and weights < 1e-5 and kept and learned > 1e-3, (layout, results[layout])


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
