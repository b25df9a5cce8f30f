"""`lrpretrain doctor`: what it finds, and that it finds what is wrong."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hub_server import FakeHub

from lrpretrain import cli, doctor
from lrpretrain.config import Config, from_dict
from lrpretrain.sharding.procs import Procs

SMALL = {"train": {"global_batch": 8, "micro_batch": 2, "clip_norm": 1.0}}


def check(*argv, capsys):
    """Run the tool; return (exit code, {name: (state, found)}, stderr)."""
    code = cli.main(["doctor", *(str(a) for a in argv)])
    out, err = capsys.readouterr()
    header, *rows = out.splitlines()
    assert header.split() == ["check", "state", "found"]
    cut = [(row[:20].strip(), row[20:29].strip(), row[29:]) for row in rows]
    return code, {name: (state, found) for name, state, found in cut}, err


def test_a_node_on_which_all_is_well(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    argv = ["--procs", 2, "--engine.kind", "zero", "--optim.rule", "galore", "--run.dir", tmp_path / "run"]
    code, rows, err = check(*argv, "--train.global_batch", 8, "--train.micro_batch=2", capsys=capsys)
    assert (code, err) == (0, ""), rows
    assert {"python", "torch", "deepspeed", "transformers", "disk", "hub", "all-reduce"} <= rows.keys()
    assert {name for name, (state, _) in rows.items() if state != "ok"} == {"GPUs"}
    assert rows["all-reduce"][1].startswith("64 MiB over gloo in ")
    assert rows["galore, zero"][1].startswith("4 steps in 2 processes are ")
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_answer(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_hub", lambda config: doctor.Check("hub", "ok", ""))
    argv = ["--procs", 1, "--patience_s", 1, "--train.global_batch=8", "--train.micro_batch=8"]
    code, rows, err = check(*argv, capsys=capsys)
    assert code == 1
    assert rows["galore, fsdp"] == ("failed", "the processes were not done after 1 s")
    assert err == "lrpretrain: 1 of the checks failed\n"


def test_what_a_process_raises_is_the_answer(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(doctor, "join", lambda *_: 1 / 0)
    assert doctor.main("llama_toy_galore") == 1
    error = "process 1: ZeroDivisionError: division by zero"
    assert json.loads(capsys.readouterr().out) == {"error": error}


def test_a_configuration_that_cannot_work(capsys):
    assert cli.main(["doctor", "--procs", "3", "--engine.kind", "local", "--optim.rank", "0"]) == 2
    assert "3 problems in the configuration" in capsys.readouterr().err


def train(config):
    return doctor.train(config, Procs(), torch.device("cpu"))


@pytest.fixture(scope="module")
def plain():
    """Losses and gradient norms of GaLore in one process."""
    return train(doctor.shrink(from_dict(SMALL)))


def test_the_steps_learn_and_repeat(plain):
    losses = [loss for loss, _ in plain]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1
    assert train(doctor.shrink(from_dict(SMALL))) == plain


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("optim", {"lr": 1e-9}),
        ("optim", {"lr": 0.02}),
        ("optim", {"scale": 0.5}),
        ("train", {"clip_norm": None}),
        ("train", {"seed": 1}),
    ],
)
def test_a_mistake_is_found_in_either_precision(plain, section, values):
    config = doctor.shrink(from_dict(SMALL))
    vars(getattr(config, section)).update(values)
    wrong = train(config)
    config.engine.kind = "zero"
    for compute in doctor.TOLERANCE:
        config.precision.compute = compute
        assert doctor.compare(config, 2, plain, wrong).state == "failed"
        assert doctor.compare(config, 2, plain, plain).state == "ok"


def test_what_no_small_model_can_be_trained_with():
    config = from_dict({"optim": {"targets": ["model.layers.9.mlp.*_proj"]}})
    ((name, state, found),) = doctor._training(config, 1, 0.0)
    assert (name, state) == ("galore, local", "warning")
    assert "optim.targets" in found


def test_comparisons_of_nothing(plain):
    nan = [[math.nan, math.nan] for _ in plain]
    assert doctor.compare(from_dict({"engine": {"kind": "fsdp"}}), 2, plain, nan).state == "failed"
    assert doctor.compare(Config(), 1, plain, plain).state == "warning"


def test_the_disk(tmp_path):
    config = Config()
    config.run.dir = str(tmp_path / "not" / "yet")
    assert doctor._disk(config).state == "ok"
    assert f"free in {tmp_path}; 4 checkpoints of " in doctor._disk(config).found
    config.train.keep_checkpoints = 10**9
    assert doctor._disk(config).state == "failed"
    (tmp_path / "file").write_text("")
    config.run.dir = str(tmp_path / "file")
    assert "cannot be written to: Not a directory" in doctor._disk(config).found
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize(("source", "state"), [("sample", "warning"), ("hub", "failed")])
def test_the_hub(monkeypatch, source, state):
    config = from_dict({"data": {"source": source}})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    fake = FakeHub({})
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake.url)
    assert doctor._hub(config) == ("hub", "ok", f"{fake.url} answers")
    fake.close()
    assert doctor._hub(config).state == state
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "nonsense")
    assert doctor._hub(config).state == state


def test_versions(monkeypatch):
    def version(name):
        if name == "deepspeed":
            raise doctor.metadata.PackageNotFoundError
        return {"transformers": "4.1", "torch": "2.12.0a0+1"}.get(name, "5")

    asked = [
        "torch>=2.11,<3",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5",
        "datasets",
        "ruff; extra == 'dev'",
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: asked)
    monkeypatch.setattr(doctor.metadata, "version", version)
    states = {name: state for name, state, _ in doctor._versions()}
    assert states == {"python": "ok", "torch": "ok", "deepspeed": "failed", "transformers": "warning"}


def test_gpus(monkeypatch):
    monkeypatch.setattr(doctor, "unusable_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._gpus(2).state == "warning"
    monkeypatch.setattr(doctor, "unusable_gpu", lambda: "an old driver")
    assert doctor._gpus(2) == ("GPUs", "failed", "an old driver")
    names = ["H100", "H100"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    properties = lambda i: SimpleNamespace(name=names[i], total_memory=80 * 2**30)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert doctor._gpus(2) == ("GPUs", "ok", "2 × H100 (80 GiB)")
    assert doctor._gpus(3).state == "failed"
    names[1] = "A100"
    assert doctor._gpus(2).state == "warning"
