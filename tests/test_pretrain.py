"""The training command as a user meets it: killed, stopped, misused, and going on."""

import gzip
import json
import shutil
import signal
from pathlib import Path

import pytest
import tiny
from hub_server import FakeHub
from started import Run
from tiny import finish, kill_at, launch

from lrpretrain.artifacts import checkpoint
from lrpretrain.pretrain import main


@pytest.fixture(scope="module")
def uninterrupted(bench):
    argv = bench.options(
        "uninterrupted", train__steps=60, train__save_every=7, train__eval_every=20, train__eval_tokens=500
    )
    assert launch(1, [argv]) == [0]
    return bench.metrics("uninterrupted")


def measured(metrics):
    """Return what must repeat to the bit: losses, rates, norms and counts by step, no times."""
    return [{k: v for k, v in e.items() if not k.startswith(("perf/", "mem/"))} for e in metrics]


def test_the_run_folder_is_as_contracted(bench, uninterrupted):
    folder = bench.folder / "uninterrupted"
    assert bench.status("uninterrupted") == {
        "state": "finished", "step": 60, "reason": "", "exit_code": 0, "launch_id": None
    }  # fmt: skip
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step_00000049", "step_00000056", "step_00000060"
    ]  # fmt: skip
    assert json.loads((folder / "environment.json").read_text())["n_procs"] == 1
    assert list((folder / "tensorboard").glob("events.*"))
    first, last = uninterrupted[0], uninterrupted[-1]
    assert first["step"] == 0
    assert first["valid/loss"] > last["valid/loss"]
    for key in (
        "tokens train/loss train/lr train/grad_norm perf/tokens_per_s perf/step_ms perf/data_wait_ms".split()
    ):
        assert key in last
    refreshed = [e for e in uninterrupted if "subspace/energy" in e]
    assert [e["step"] for e in refreshed] == list(range(1, 61, 7))
    assert all(0 < e["subspace/energy"] <= 1.001 and e["perf/refresh_ms"] > 0 for e in refreshed)
    assert all(0 <= e["subspace/overlap"] <= 1.001 for e in refreshed[1:])
    # The written configuration is a valid --config of the same run.
    assert finish(["--config", str(folder / "config.yaml")])[0] == 0


def test_every_rule_trains_in_bfloat16(bench):
    rules = ["adamw", "galore", "gradnormlorp", "loro"]
    pure = dict(
        precision__params="bfloat16", precision__compute="bfloat16", optim__exact_every=3, train__steps=8
    )
    assert launch(1, [bench.options(f"bf16-{rule}", optim__rule=rule, **pure) for rule in rules]) == [0] * 4
    for rule in rules:
        losses = bench.losses(f"bf16-{rule}")
        assert losses[8] < losses[1] - 0.5, rule


@pytest.mark.parametrize(("engine", "n_procs"), [("local", 1), ("ddp", 2), ("fsdp", 2)])
def test_moments_and_bases_have_a_precision_of_their_own_beside_bfloat16(bench, engine, n_procs):
    pure = dict(precision__params="bfloat16", precision__compute="bfloat16", train__steps=8)
    kinds = {
        "int8": ("gradnormlorp", "float32"),
        "float32": ("galore", "float32"),
        "bfloat16": ("loro", None),
    }
    lines = [
        bench.options(
            f"{kind}-{engine}",
            engine__kind=engine,
            optim__rule=rule,
            optim__moments=kind,
            optim__basis=basis,
            optim__exact_every=3,
            **pure,
        )
        for kind, (rule, basis) in kinds.items()
    ]
    assert launch(n_procs, lines) == [0] * len(kinds)
    for kind in kinds:
        losses = bench.losses(f"{kind}-{engine}")
        assert losses[8] < losses[1] - 0.5, kind


def test_a_complete_run_says_so(bench, uninterrupted):
    argv = bench.options("uninterrupted", train__steps=60, train__save_every=7)
    code, output = finish(argv)
    assert code == 0
    for said in ("complete", "--run.dir", "validation perplexity", "tensorboard --logdir"):
        assert said in output


def test_a_signal_stops_one_process_too(bench):
    with Run(1, bench.options("signalled", train__steps=2000), bench.folder / "signalled-output") as run:
        run.wait_for("step 000020/")
        run.send(signal.SIGTERM)
        assert run.end() == [75]
    status = bench.status("signalled")
    assert (status["state"], status["exit_code"], status["reason"]) == ("stopped", 75, "SIGTERM")
    step = f"step_{status['step']:08d}"
    assert (bench.folder / "signalled" / "checkpoints" / step / "manifest.json").exists()


def test_torchrun_does_not_restart_a_deliberate_stop(bench, monkeypatch, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"exit_code": 75, "launch_id": "job"}))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(bench.options("x", run__dir=folder)) == 75
    assert not (folder / "metrics.jsonl").exists()


def fails(capfd, argv, code, *said):
    """Run in this process and expect an exit code and words in the message, which is no traceback."""
    assert launch_one(argv) == code
    error = capfd.readouterr().err
    assert error.startswith("lrpretrain: "), error
    for words in said:
        assert words in error, error


def launch_one(argv):
    import torch.distributed as dist

    try:
        return main([str(a) for a in argv])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def broken_text(bench, name, damage):
    """Return a copy of the text with its first shard damaged."""
    folder = bench.folder / name
    shutil.copytree(bench.text, folder)
    damage(sorted(folder.glob("*train*"))[0])
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def append(text):
    def damage(path):
        lines = gzip.decompress(path.read_bytes()) + text.encode() + b"\n"
        path.write_bytes(gzip.compress(lines))

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("truncated", truncate, "c4-train.00000"),
        ("not-json", append("{nope"), "line 61"),
        ("no-text", append('{"url": "x"}'), "text"),
    ],
)
def test_broken_text(bench, capfd, name, damage, said):
    folder = broken_text(bench, name, damage)
    # With as many lanes as shards the shards are read as they come: the run gets somewhere first.
    argv = bench.options(
        f"run-{name}", data__path=folder, data__lanes=4, train__steps=500, train__warmup_steps=1
    )
    fails(capfd, argv, 3, said, str(folder))
    status = bench.status(f"run-{name}")
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert status["step"] > 0
    saved = bench.folder / f"run-{name}" / "checkpoints" / f"step_{status['step']:08d}"
    assert (saved / "manifest.json").exists()


def test_missing_text(bench, capfd, tmp_path):
    fails(capfd, bench.options("r1", data__path=tmp_path / "nowhere"), 3, "nowhere")
    fails(capfd, bench.options("r2", data__path=str(tmp_path / "*.gz")), 3, "*.gz")
    only_train = tmp_path / "train"
    only_train.mkdir()
    shutil.copy(sorted(bench.text.glob("*train*"))[0], only_train)
    fails(capfd, bench.options("r3", data__path=only_train, train__eval_every=10), 3, "validation")


@pytest.fixture
def hub(bench, monkeypatch):
    """A stand-in for the hub that serves the bench's text."""
    server = FakeHub({path.name: path.read_bytes() for path in bench.text.iterdir()})
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


def test_training_from_the_hub_through_its_moods_equals_training_from_files(bench, hub, tmp_path):
    shards = [name for name in hub.files if "train" in name]
    hub.faults = {
        "tree": [500],
        shards[0]: [(429, {"Retry-After": "1"}), "drop"],
        shards[1]: [503],
        shards[2]: ["drop", 500],
    }
    same = dict(train__steps=20, train__eval_every=10, train__eval_tokens=300)
    at_hub = dict(
        data__source="hub", data__path="nobody/c4", data__cache_dir=tmp_path, data__hub_patience_s=30
    )
    assert launch_one(bench.options("from-files", **same)) == 0
    assert launch_one(bench.options("from-hub", **same, **at_hub)) == 0
    assert not any(hub.faults.values())
    assert measured(bench.metrics("from-hub")) == measured(bench.metrics("from-files"))


def test_a_hub_that_is_gone_for_good_leaves_a_checkpoint(bench, hub, capfd, tmp_path):
    serve = hub.answer

    def answer_until_two_shards_are_out(request):
        serve(request)
        hub.gone = sum(count for name, count in hub.requests.items() if "train" in name) >= 2

    hub.answer = answer_until_two_shards_are_out
    argv = bench.options(
        "gone", data__source="hub", data__path="nobody/c4", data__cache_dir=tmp_path, data__hub_patience_s=1,
        data__lanes=2, train__steps=500, train__warmup_steps=1,
    )  # fmt: skip
    fails(capfd, argv, 3, "lrpretrain download")
    step = bench.status("gone")["step"]
    assert step > 0
    assert (bench.folder / "gone" / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()


def test_data_that_ends_early_is_no_success(bench, capfd):
    argv = bench.options("short", data__epochs=1, train__steps=5000, train__warmup_steps=1)
    fails(capfd, argv, 3, "data ended", "data.epochs")
    step = bench.status("short")["step"]
    assert (bench.folder / "short" / "checkpoints" / f"step_{step:08d}" / "manifest.json").exists()


def test_configurations_that_cannot_work(bench, capfd, tmp_path):
    wrong = bench.options("bad", optim__rank=1000, train__global_batch=7, nope__key=1)
    fails(
        capfd,
        wrong,
        2,
        "optim.rank",
        "larger than the smallest matched matrix",
        "train.global_batch",
        "nope.key",
    )
    assert not (bench.folder / "bad").exists()
    blocked = tmp_path / "file"
    blocked.write_text("")
    fails(capfd, bench.options("x", run__dir=blocked / "run"), 2, "run.dir", "cannot be written")


def test_a_run_is_not_overwritten(bench, capfd, uninterrupted):
    argv = bench.options("uninterrupted", run__resume="never")
    fails(capfd, argv, 2, "run.dir", "holds a run")
    assert bench.metrics("uninterrupted") == uninterrupted


def test_checkpoints_that_do_not_fit(bench, capfd, uninterrupted):
    path = bench.folder / "uninterrupted" / "checkpoints" / "step_00000060"
    small = bench.folder / "small.json"
    small.write_text(json.dumps(tiny.TINY | {"num_hidden_layers": 1}))
    argv = bench.options("other-model", model__config=small, run__resume=path)
    fails(capfd, argv, 4, "another model", "model.layers.1")
    fails(
        capfd, bench.options("other-rank", optim__rank=3, run__resume=path), 4, "another model or optimizer"
    )
    fails(capfd, bench.options("no-checkpoint", run__resume=bench.folder), 4, "manifest.json")
    argv = bench.options(
        "other-data", data__seq_len=16, optim__side="right", run__resume=path, train__steps=99
    )
    fails(capfd, argv, 2, "data.seq_len", "optim.side")
    argv = bench.options("other-seed", train__seed=5, run__resume=path, train__steps=99)
    fails(capfd, argv, 2, "train.seed")


def test_another_tokenizer_is_refused(bench, capfd, uninterrupted):
    from lrpretrain.cli import main as tool
    from lrpretrain.data import tokenizer

    run = bench.folder / "uninterrupted"
    assert (run / "tokenizer.model").read_bytes() == bench.tokenizer.read_bytes()
    other = bench.folder / "other.model"
    tokenizer.train(["another text of other words and letters xyz"] * 50, other, 280)
    path = run / "checkpoints" / "step_00000060"
    argv = bench.options("other-tokenizer", data__tokenizer=other, run__resume=path, train__steps=99)
    fails(capfd, argv, 2, "data.tokenizer", "was trained with sha256:")
    assert tool(["generate", str(run), "the", "--tokenizer", str(other)]) == 2
    assert "was trained with sha256:" in capfd.readouterr().err
    # The run's own copy serves where the original is gone.
    moved = bench.tokenizer.rename(bench.tokenizer.with_suffix(".gone"))
    try:
        assert tool(["generate", str(run), "the", "--tokens", "3"]) == 0
    finally:
        moved.rename(bench.tokenizer)


def test_going_back_within_a_run_would_lose_what_came_after(bench, capfd, uninterrupted):
    path = bench.folder / "uninterrupted" / "checkpoints" / "step_00000049"
    argv = bench.options("uninterrupted", run__resume=path, train__steps=99)
    fails(capfd, argv, 2, "run.resume", "step_00000060", "another run.dir")
    assert len(bench.metrics("uninterrupted")) == len(uninterrupted)
    assert bench.status("uninterrupted")["state"] == "finished"


def test_a_refused_resume_leaves_the_records_of_the_run(bench, capfd, uninterrupted):
    folder = bench.folder / "uninterrupted"
    before = (folder / "config.yaml").read_text()
    argv = bench.options("uninterrupted", data__seq_len=16, train__steps=99)
    fails(capfd, argv, 2, "data.seq_len")
    assert (folder / "config.yaml").read_text() == before
    status = bench.status("uninterrupted")
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 60, 2)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(bench):
    argv = bench.options("early", train__eval_every=20, train__eval_tokens=500, train__steps=25)
    code, output = kill_at(argv, "step 000003/")
    assert code == -signal.SIGKILL, output
    assert launch(1, [argv]) == [0]
    assert [e["step"] for e in bench.metrics("early")] == list(range(26))


def test_a_checkpoint_of_elsewhere_starts_another_run(bench, uninterrupted):
    path = bench.folder / "uninterrupted" / "checkpoints" / "step_00000049"
    argv = bench.options(
        "branch", run__resume=path, train__steps=60, train__eval_every=20, train__eval_tokens=500
    )
    assert launch(1, [argv]) == [0]
    after = [e for e in uninterrupted if e["step"] > 49]
    assert measured(bench.metrics("branch")) == measured(after)


def test_a_resume_asks_for_the_same_variant_of_the_rule_where_the_checkpoint_knows_it(
    bench, capfd, monkeypatch, uninterrupted
):
    path = bench.folder / "uninterrupted" / "checkpoints" / "step_00000060"
    options = dict(run__resume=path, train__steps=61)
    other = dict(optim__base="adafactor", optim__adapter_rank=4, optim__adapter_alpha=8)
    words = ["optim.base", "'adamw'", "optim.adapter_rank", "optim.adapter_alpha", "16.0"]
    fails(capfd, bench.options("other", **options, optim__moments="int8"), 2, "optim.moments='int8'", "None")
    fails(capfd, bench.options("other", **options, **other), 2, *words)
    options |= dict(optim__rule="gradnormlorp", optim__mode="lowrank_wn")
    fails(capfd, bench.options("other", **options), 2, "optim.rule", "optim.mode", "'weightnorm'")

    def read_older(path, read=checkpoint.read_run):
        run = read(path)
        for name in ("base", "mode", "adapter_rank", "adapter_alpha"):
            del run["config"]["optim"][name]
        return run

    monkeypatch.setattr(checkpoint, "read_run", read_older)
    assert launch_one(bench.options("older", run__resume=path, train__steps=61)) == 0


def test_a_gradient_that_is_not_finite_stops_before_anything_is_touched(bench, capfd):
    argv = bench.options(
        "wild", optim__lr=1e30, train__warmup_steps=1, train__clip_norm=None, train__save_every=1
    )
    fails(capfd, argv, 5, "not finite", "optim.lr")
    status = bench.status("wild")
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert Path(
        bench.folder / "wild" / "checkpoints" / f"step_{status['step']:08d}" / "manifest.json"
    ).exists()
