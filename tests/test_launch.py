"""The ways to start: torchrun, deepspeed, and quickstart.sh from its first line to its last."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, _free_port

from lrpretrain import config
from lrpretrain.train import plan

BIN = Path(sys.prefix) / "bin"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
TRAIN = "lrpretrain.pretrain"
SHORT = {"train__steps": 3, "train__warmup_steps": 1, "engine__kind": "fsdp"}


def torchrun(*options):
    port = f"--master-port={_free_port()}"
    return [BIN / "torchrun", "--standalone", port, "--nproc-per-node", "2", "-m", TRAIN, *options]


def deepspeed(*options):
    port = f"--master_port={_free_port()}"
    return [BIN / "deepspeed", port, "--num_gpus", "2", "--module", TRAIN, *options]


def start(command, **env):
    """Start a command in a process group of its own, with stderr in stdout."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=ENVIRONMENT | {"PATH": f"{BIN}:{os.environ['PATH']}"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(command, **env):
    """Run a command to its end; return (exit code, output)."""
    process = start(command, **env)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_a_launcher_trains(bench, launcher):
    run = f"launched-{launcher.__name__}"
    code, output = finish(launcher(*bench.options(run, **SHORT)))
    assert code == 0, output
    status = bench.status(run)
    assert (status["state"], status["step"], status["exit_code"]) == ("finished", 3, 0)
    assert json.loads((bench.folder / run / "environment.json").read_text())["n_procs"] == 2
    assert sorted(bench.losses(run)) == [1, 2, 3]
    assert output.count("step 000003/000003") == 1, "one process speaks"


@pytest.mark.parametrize(("launcher", "code"), [(torchrun, 1), (deepspeed, 2)])
def test_a_bad_configuration_is_said_once_and_before_any_process_group(bench, tmp_path, launcher, code):
    # Process 0, which speaks, comes late: launchers end it as soon as another one has failed.
    late = 'import os, time\ntime.sleep(2 * (os.environ.get("RANK") == "0"))\n'
    (tmp_path / "sitecustomize.py").write_text(late)
    options = bench.options("refused", **SHORT, optim__rank=99, train__global_batch=9)
    found, output = finish([*launcher(*options), "--no.such_field", "1"], PYTHONPATH=str(tmp_path))
    assert found == code, output
    assert output.count("lrpretrain: 3 problems in the configuration") == 1, output
    for part in ("optim.rank=99: ", "train.global_batch=9: ", "no.such_field='1': "):
        assert output.count(part) == 1, output
    assert "parameters:" not in output
    assert not (bench.folder / "refused").exists()


# tests/run.sh makes .venv and notes that it is complete; without the note quickstart.sh would install.
quickstarts = pytest.mark.skipif(
    not (ROOT / ".venv" / "installed").exists(), reason="no .venv that tests/run.sh made"
)
SCRIPT = ["bash", ROOT / "launch" / "quickstart.sh"]


@pytest.mark.parametrize(
    "script", [*sorted(ROOT.glob("launch/*.s*")), ROOT / "tests" / "run.sh"], ids=lambda path: path.name
)
def test_the_scripts_are_bash(script):
    assert (
        subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True, check=True).stderr == ""
    )


def test_quickstart_explains_itself():
    code, output = finish([*SCRIPT, "--help"])
    assert code == 0
    assert "bash launch/quickstart.sh [--run.dir DIR]" in output
    assert "set -euo" not in output


@quickstarts
def test_quickstart_on_the_embedded_corpus(tmp_path):
    run = tmp_path / "runs of mine" / "first"
    command = [
        *SCRIPT,
        "--run.dir",
        run,
        "--train.steps",
        3,
        "--train.warmup_steps=1",
        "--train.eval_tokens",
        2000,
    ]
    code, output = finish(command)
    assert code == 0, output
    report, _, following = output.partition("\ntry next:\n")
    assert re.search(r"validation perplexity: \d+\.\d at step 0, \d+\.\d at step 3\n", report), output
    assert f"run folder: {run}\n" in report
    check_commands(following.splitlines(), run)

    code, output = finish(command)
    assert code == 0
    assert "This run is complete" in output
    assert "give another --run.dir" in output
    assert "step 000003/000003" not in output


def check_commands(lines, run):
    """See that what quickstart.sh printed to try next works as it is printed."""
    generate, train, board = (shlex.split(line) for line in lines)
    found = subprocess.run(generate, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert found.stdout.startswith("The function returns"), found.stderr
    procs, argv = int(train[train.index("--nproc-per-node") + 1]), train[train.index(TRAIN) + 1 :]
    read, problems = config.parse(argv)
    assert [*problems, *plan.problems(read, procs)] == []
    assert (ROOT / train[0]).is_file()
    assert (ROOT / board[0]).is_file()
    assert list(Path(board[board.index("--logdir") + 1]).glob(f"{run.name}/tensorboard/events*"))
    assert Path(read.run.dir).parent == run.parent, "the comparison lies where tensorboard looks"


@quickstarts
def test_quickstart_refuses_a_bad_option(tmp_path):
    run = tmp_path / "run"
    code, output = finish([*SCRIPT, f"--run.dir={run}", "--train.stepps", "3"])
    assert code == 2, output
    assert output.count("Perhaps train.steps is meant") == 1
    assert "Traceback" not in output
    assert not run.exists()


@quickstarts
def test_quickstart_does_not_exit_with_the_code_of_an_older_run(bench):
    run = bench.folder / "older"
    run.mkdir()
    (run / "status.json").write_text('{"exit_code": 75}')
    os.utime(run / "status.json", (0, 0))
    code, output = finish([*SCRIPT, *bench.options("older", **SHORT, run__resume=run / "nowhere")])
    assert code == 1, "torchrun's: this run recorded none"
    assert output.count("holds no manifest.json") == 1, output
    assert "try next" not in output


@quickstarts
def test_quickstart_stopped_by_a_signal_leaves_a_checkpoint(bench):
    options = bench.options("stopped", engine__kind="fsdp", train__steps=2000)
    process = start([*SCRIPT, *options])
    try:
        for line in process.stdout:
            if line.startswith("step 000003/"):
                process.send_signal(signal.SIGTERM)  # to the script alone
                break
        rest, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, rest
    status = bench.status("stopped")
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    checkpoint = bench.folder / "stopped" / "checkpoints" / f"step_{status['step']:08d}"
    assert (checkpoint / "manifest.json").is_file()
    assert "start again to go on" in rest
