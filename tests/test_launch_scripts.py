"""The scripts of launch/ for one node and for SLURM: what they start, pass on, leave behind and exit with."""

import contextlib
import json
import os
import signal
import sys
import time

import fake_slurm
import psutil
import pytest
from test_launch import TRAIN, finish, start, torchrun
from tiny import ROOT, _free_port

RECIPE = "llama_toy_galore"


def script(name, *options):
    """Return the command of a script with a recipe, which the options overrule."""
    return ["bash", ROOT / "launch" / name, RECIPE, *options]


def ports(**env):
    return {"MASTER_PORT": str(_free_port())} | env


def interrupt(command, marker, act, **env):
    """Start a command, call `act` with its process once a line has `marker`; return (exit code, output)."""
    process = start(command, **env)
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if marker in line:
                act(process)
                break
        rest, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, "".join(said) + rest


def check_stopped(bench, run, code, output, reason):
    """See that a run was stopped with a checkpoint; return its step."""
    assert code == 75, output
    status = bench.status(run)
    assert (status["state"], status["reason"], status["exit_code"]) == ("stopped", reason, 75)
    assert (bench.folder / run / "checkpoints" / f"step_{status['step']:08d}" / "manifest.json").is_file()
    return status["step"]


@pytest.mark.parametrize("name", ["fsdp.sh", "zero.sh"])
def test_a_script_explains_itself(name):
    for options in ([], ["--help"]):
        code, output = finish(["bash", ROOT / "launch" / name, *options])
        assert code == 0
        assert f"bash launch/{name} RECIPE [--section.field VALUE …]" in output
        assert "set -euo" not in output


def test_a_bad_option_is_refused_with_its_code(tmp_path):
    run = tmp_path / "run"
    code, output = finish(script("fsdp.sh", "--run.dir", run, "--train.stepps", "3"), PROCS="3")
    assert code == 2, output
    assert "Perhaps train.steps is meant" in output
    assert "is not a multiple of 3 processes" in output
    assert not run.exists()


def test_a_run_is_stopped_under_fsdp_and_zero_and_goes_on(bench):
    common = {"train__steps": 2000, "train__warmup_steps": 1, "data__epochs": 1}
    options = bench.options("scripts", **common)
    traced = ["--train.profile_steps", 1, "--train.profile_from", 1]

    def stop(process):  # the script alone
        process.send_signal(number)

    number = signal.SIGTERM
    ended = interrupt(script("fsdp.sh", *options, *traced), "step 000004/", stop, PROCS="2")
    first = check_stopped(bench, "scripts", *ended, "SIGTERM")
    run = bench.folder / "scripts"
    assert [path.name for path in (run / "profile").iterdir()] == ["step_00000002.json.gz"]
    assert json.loads((run / "environment.json").read_text())["n_procs"] == 2
    assert sorted(path.parent.name for path in run.glob("logs/*/*/attempt_0/*/stdout.log")) == ["0", "1"]

    number = signal.SIGUSR1
    ended = interrupt(script("zero.sh", *options), "| loss ", stop, **ports())
    second = check_stopped(bench, "scripts", *ended, "SIGUSR1")
    assert second > first
    assert f"resumed from {run}/checkpoints/step_{first:08d}" in ended[1]
    logs = {path.name.split("_")[-1]: path.read_text() for path in run.glob("logs/*/*_rank*.log")}
    assert sorted(logs) == ["rank0.log", "rank1.log"]
    assert "start again to go on" in logs["rank0.log"]

    code, output = finish(script("fsdp.sh", *options))
    assert code == 3, "torchrun returns 1\n" + output
    assert "the data ended after" in output


def worker(process, rank):
    """Return the training process of that rank below a launcher."""
    of_rank = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if TRAIN in child.cmdline() and child.environ().get("RANK") == str(rank):
                of_rank.append(child)
    return of_rank[-1]


@pytest.mark.parametrize(
    "name",
    ["zero.sh", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp.sh", "slurm_fsdp.sbatch"))],
)
def test_a_process_that_is_killed_ends_the_job_in_seconds(bench, tmp_path, name):
    killed = []

    def kill(process):
        worker(process, 1).kill()
        killed.append(time.monotonic())

    run = f"killed-{name}"
    command, env = script(name, *bench.options(run, train__steps=2000)), ports(PROCS="2")
    if name.startswith("slurm"):
        env = fake_slurm.install(tmp_path) | ports(PROCS="1")
        command[0] = "sbatch"
    code, output = interrupt(command, "| loss ", kill, **env)
    assert time.monotonic() - killed[0] < 20
    assert code == 1, output
    status = bench.status(run)
    assert (status["state"], status["reason"], status["exit_code"]) == ("failed", "process 1 died", 1)
    assert not (tmp_path / "requeued").exists()


def test_torchrun_restarts_after_a_death_and_not_after_a_stop(bench):
    options = bench.options("restarted", engine__kind="fsdp", train__steps=2000, train__save_every=5)
    command = torchrun(*options)
    process = start([*command[:1], "--max-restarts", 2, *command[1:]])
    said = []

    def read_until(marker):
        for line in process.stdout:
            said.append(line)
            if marker in line:
                return
        raise AssertionError(f"{marker} did not come\n" + "".join(said))

    try:
        read_until("step 000012/")
        worker(process, 1).kill()
        read_until("resumed from")
        assert int(said[-1].strip()[-8:]) >= 10
        read_until("step 000020/")
        worker(process, 1).send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    step = check_stopped(bench, "restarted", 75 if process.returncode == 1 else 0, rest, "SIGTERM")
    assert "resumed from" not in rest
    assert list(bench.losses("restarted")) == list(range(1, step + 1))


@pytest.mark.parametrize(("begun", "expected"), [(False, 75), (True, 143)])
def test_a_script_that_is_stopped_before_the_training_began_says_so(tmp_path, begun, expected):
    note = f"echo '{{\"exit_code\": null}}' > {tmp_path}/status.json; " if begun else ""
    env = fake(tmp_path / "bin", lrpretrain=f"echo {tmp_path}", torchrun=f"{note}echo begun; exec sleep 60")
    command = script("fsdp.sh")
    ended = interrupt(command, "begun", lambda process: process.send_signal(signal.SIGTERM), **env, PROCS="2")
    assert ended[0] == expected, ended[1]


def test_slurm_nodes_train_together_and_a_stopped_job_is_queued_again(bench, tmp_path):
    env = fake_slurm.install(tmp_path) | ports(PROCS="1")

    def submit(name, options):
        return ["sbatch", ROOT / "launch" / name, RECIPE, *options]

    def time_limit(_):
        os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)

    options = bench.options("slurm", train__steps=2000)
    ended = interrupt(submit("slurm_fsdp.sbatch", options), "| loss ", time_limit, **env)
    step = check_stopped(bench, "slurm", *ended, "SIGTERM")
    assert json.loads((bench.folder / "slurm/environment.json").read_text())["n_procs"] == 2
    assert (tmp_path / "requeued").read_text().count("\n") == 1

    options = bench.options("slurm", train__steps=step + 2)
    code, output = finish(submit("slurm_zero.sbatch", options), **env | ports())
    assert code == 0, output
    assert bench.status("slurm")["step"] == step + 2
    assert "[0] resumed from" in output
    assert (tmp_path / "requeued").read_text().count("\n") == 1


def fake(folder, **commands):
    """Put commands in a folder, and the folder before all others; return the variables for that."""
    folder.mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{sys.prefix}/bin:{os.environ['PATH']}"}


def test_a_cancelled_job_stays_cancelled(tmp_path):
    env = fake_slurm.install(tmp_path)
    (tmp_path / "state").write_text("COMPLETING\n")
    status = json.dumps({"state": "stopped", "exit_code": 75}, indent=2)
    srun = f"echo '{status}' > {tmp_path}/status.json; exit 1"
    fake(tmp_path / "bin", lrpretrain=f"echo {tmp_path}", srun=srun)
    code, output = finish(["sbatch", ROOT / "launch" / "slurm_fsdp.sbatch", RECIPE], **env)
    assert code == 75, output
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("env", "procs", "where"),
    [
        ({"PROCS": "3"}, 3, "--num_gpus 3"),
        ({"PROCS": "2", "CUDA_VISIBLE_DEVICES": "4,5,7"}, 2, "--include localhost:4,5"),
        ({"HOSTFILE": "{}/hosts"}, 6, "--hostfile {}/hosts"),
    ],
)
def test_where_deepspeed_starts_and_what_it_exits_with(tmp_path, env, procs, where):
    (tmp_path / "hosts").write_text("# two nodes\nfirst slots=2\nsecond slots=4\n\n")
    show = f'echo "lrpretrain $*" >&2; echo "{tmp_path}/run"'
    env = {key: value.format(tmp_path) for key, value in env.items()}
    env |= fake(tmp_path / "bin", lrpretrain=show, deepspeed='echo "deepspeed $*"; exit 7')
    code, output = finish(script("zero.sh", "--run.dir", "a b"), **env)
    assert code == 7, output
    assert (
        f"lrpretrain show {RECIPE} --procs {procs} --field run.dir --engine.kind zero --run.dir a b" in output
    )
    assert f"deepspeed {where.format(tmp_path)} --master_port 29500" in output
