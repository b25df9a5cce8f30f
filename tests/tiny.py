"""Small runs for tests: a tiny model, text and tokenizer, and ways to start the training command."""

import gzip
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]
WORDS = (
    "the a gradient of low rank model learns matrix basis projects onto subspace and moments are kept".split()
)
TINY = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def write_shards(folder, n_train=4, documents=60, seed=0):
    """Write C4-format shards of random sentences, and one of validation."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    names = [f"c4-train.{i:05d}-of-{n_train:05d}.json.gz" for i in range(n_train)]
    for name in [*names, "c4-validation.00000-of-00001.json.gz"]:
        with gzip.open(folder / name, "wt") as file:
            for i in range(documents):
                text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60)))
                file.write(json.dumps({"text": text, "timestamp": "", "url": f"test://{name}/{i}"}) + "\n")
    return folder


class Bench:
    """A folder with everything that a tiny run needs."""

    def __init__(self, folder):
        from lrpretrain.data import tokenizer

        self.folder = Path(folder)
        self.text = write_shards(self.folder / "text")
        self.model = self.folder / "tiny.json"
        self.model.write_text(json.dumps(TINY))
        self.tokenizer = self.folder / "tiny.model"
        with gzip.open(sorted(self.text.glob("*train*"))[0], "rt") as file:
            documents = [json.loads(line)["text"] for line in file]
        tokenizer.train(documents, self.tokenizer, 290)

    def options(self, run, **options):
        """Return the command line of a run named `run`; options are written section__field=value."""
        defaults = {
            "model.config": self.model,
            "data.source": "files",
            "data.path": self.text,
            "data.tokenizer": self.tokenizer,
            "data.sequences": "pack",
            "data.seq_len": 32,
            "data.lanes": 6,
            "data.workers": 1,
            "data.cache_dir": self.folder / "cache",
            "optim.rank": 4,
            "optim.refresh_every": 7,
            "train.steps": 30,
            "train.warmup_steps": 3,
            "train.micro_batch": 2,
            "train.global_batch": 12,
            "train.log_every": 1,
            "train.eval_every": 0,
            "train.save_every": 0,
            "train.clip_norm": 1.0,
            "run.dir": self.folder / run,
        }
        given = {key.replace("__", "."): value for key, value in options.items()}
        return [f"--{key}={value}" for key, value in (defaults | given).items() if value is not None]

    def metrics(self, run):
        """Return the logged steps of a run."""
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def losses(self, run):
        """Return the training losses of a run by step."""
        return {e["step"]: e["train/loss"] for e in self.metrics(run) if "train/loss" in e}

    def forget_after(self, run, step):
        """Remove the checkpoints of a run after a step, as if it had been killed before them."""
        for path in (self.folder / run / "checkpoints").glob("step_*"):
            if int(path.name.removeprefix("step_")) > step:
                shutil.rmtree(path)

    def status(self, run):
        """Return status.json of a run."""
        return json.loads((self.folder / run / "status.json").read_text())


def launch(n_procs, command_lines, main=None):
    """Run training command lines one after the other in `n_procs` processes; return their exit codes.

    `main` takes a command line, instead of that of lrpretrain.pretrain.
    """
    lines = [(_free_port(), [str(a) for a in line]) for line in command_lines]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_train, (n_procs, lines, Path(folder), main), n_procs, start_method="spawn")
        return json.loads((Path(folder) / "0.json").read_text())


def _train(proc, n_procs, lines, folder, main):
    import torch
    import torch.distributed as dist

    from lrpretrain import pretrain

    main = main or pretrain.main
    torch.set_num_threads(1)
    codes = []
    for port, argv in lines:
        if n_procs > 1:
            os.environ.update(RANK=str(proc), WORLD_SIZE=str(n_procs), LOCAL_RANK=str(proc))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        codes.append(main(argv))
        if dist.is_initialized():
            dist.destroy_process_group()
    (folder / f"{proc}.json").write_text(json.dumps(codes))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as lrpretrain/pretrain.py does, and for the same reason


def start(argv, **env):
    """Start `python -m lrpretrain.pretrain` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "lrpretrain.pretrain", *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(argv, **env):
    """Run `python -m lrpretrain.pretrain` to its end; return (exit code, output)."""
    process = start(argv, **env)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def kill_at(argv, marker, number=signal.SIGKILL):
    """Start a run and send it a signal once a line contains `marker`; return (exit code, output)."""
    process = start(argv)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if marker in line:
            os.killpg(process.pid, number)
            break
    lines.append(process.stdout.read())
    return process.wait(timeout=300), "".join(lines)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
