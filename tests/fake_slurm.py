"""Stand-ins for SLURM's commands: two nodes that are processes of this machine, without GPUs.

FAKE_SLURM names a folder: `srun.pid` is the process that stands for the step of a job, and hands a TERM to
all that belongs to it; `state` is what squeue says of the job; `requeued` lists the jobs queued again.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil


def install(folder):
    """Write the commands into folder/bin; return the variables of a shell that finds them."""
    (folder / "bin").mkdir()
    for command in (sbatch, srun, scontrol, squeue):
        path = folder / "bin" / command.__name__
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {command.__name__} "$@"\n')
        path.chmod(0o755)
    (folder / "state").write_text("RUNNING\n")
    return {
        "FAKE_SLURM": str(folder),
        "PATH": f"{folder / 'bin'}:{Path(sys.prefix, 'bin')}:{os.environ['PATH']}",
    }


def sbatch(script, *argv):
    """Run a copy of the script, as SLURM does, with the variables of its job."""
    asked = [line.split()[1] for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"--nodes=2", "--ntasks-per-node=1", "--requeue", "--signal=TERM@300"} <= set(asked)
    copy = _folder() / "slurm_script"
    copy.write_bytes(Path(script).read_bytes())
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_SUBMIT_DIR": os.getcwd(),
    }
    return subprocess.run(["bash", copy, *argv], env=os.environ | job).returncode


def srun(kills, cpus, *command):
    """Run a command on every node. All that came of it gets a TERM with the job, or when a node failed."""
    assert (kills, cpus) == ("--kill-on-bad-exit=1", "--cpus-per-task=1")
    tasks = [
        psutil.Popen(command, env=os.environ | {"SLURM_NODEID": str(node)}, start_new_session=True)
        for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
    ]

    def stop(*_):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()

    signal.signal(signal.SIGTERM, stop)
    (_folder() / "srun.pid").write_text(str(os.getpid()))
    while None in (codes := [task.poll() for task in tasks]) and not any(codes):
        time.sleep(0.2)
    stop()
    return max(task.wait() for task in tasks)


def scontrol(action, *subject):
    """Say the addresses of the nodes, or note that a job is queued again."""
    if action == "show":
        assert subject == ("hostnames", "node[0-1]")
        print("127.0.0.1\n127.0.0.1")
    else:
        assert action == "requeue"
        with open(_folder() / "requeued", "a") as file:
            file.write(f"{subject[0]}\n")


def squeue(*argv):
    """Say the state of the job."""
    assert argv == ("--noheader", "--jobs", os.environ["SLURM_JOB_ID"], "--format", "%T")
    print((_folder() / "state").read_text(), end="")


def _folder():
    return Path(os.environ["FAKE_SLURM"])


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
