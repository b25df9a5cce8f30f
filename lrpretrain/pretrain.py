"""Pretrain a model: `torchrun … -m lrpretrain.pretrain --config FILE [--section.field VALUE …]`.

Starts under `python -m` (one process), `torchrun` and `deepspeed`. Everything that can be wrong with a
configuration is reported before any process group or model exists. Exit codes: see lrpretrain/errors.py.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from lrpretrain.artifacts import checkpoint
from lrpretrain.artifacts.metrics import Metrics, say, summary
from lrpretrain.artifacts.rundir import RunDir
from lrpretrain.config import Config, FinetuneConfig, parse
from lrpretrain.data.inputs import open_tokenizer
from lrpretrain.data.loader import build_loader
from lrpretrain.data.pack import document_mask
from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.engine import build_engine
from lrpretrain.engine.device import env_procs, join, pick_device, unusable_gpu
from lrpretrain.errors import (
    EXIT_STOPPED,
    CheckpointError,
    ConfigError,
    LrpretrainError,
    Problem,
    Stopped,
)
from lrpretrain.model import llama
from lrpretrain.sharding.procs import Procs
from lrpretrain.train import plan
from lrpretrain.train.evaluate import Evaluator
from lrpretrain.train.guard import Guard, launch_id, reason, restarted_after_stop
from lrpretrain.train.loop import Progress, Trainer, resume
from lrpretrain.train.peers import Peers

LAST_WORD_S = 3.0


Reader = Callable[[Sequence[str]], tuple[Config, list[Problem | str]]]


def main(argv: Sequence[str] | None = None, read: Reader = parse) -> int:
    """Run a pretraining from its command line, as `read` understands it; return the exit code."""

    def train(guard: Guard) -> int:
        config, problems = read(sys.argv[1:] if argv is None else argv)
        problems += plan.problems(config, env_procs()[1])
        if problems:
            raise ConfigError(problems)
        return pretrain(config, guard)

    return answer_for(train)


def answer_for(train: Callable[[Guard], int]) -> int:
    """Train, under a guard; return the exit code, after a word about what a user can mend."""
    proc, _, local_proc = env_procs()
    with Guard() as guard:
        guard.leave = lambda _: os._exit(EXIT_STOPPED)
        try:
            return train(guard)
        except LrpretrainError as error:
            # What all processes meet is said once; what is wrong with a node, by that node.
            if proc == 0 or (local_proc == 0 and not dist.is_initialized()):
                print(f"lrpretrain: {error}", file=sys.stderr, flush=True)
            return error.exit_code


def pretrain(config: Config, guard: Guard) -> int:
    """Run a checked configuration; return the exit code, and leave it in status.json.

    Raises LrpretrainError for what a user can mend. All processes of the launch call this.
    """
    run_dir = RunDir(config.run.dir)
    if restarted_after_stop(run_dir.read_status()):
        return EXIT_STOPPED
    starts = find_starts(config, run_dir)

    def prepare() -> Work:
        tokenizer = open_tokenizer(config, llama.load_config(config.model).vocab_size)
        return functools.partial(_run, config, run_dir, tokenizer, starts)

    code = supervise(config, run_dir, guard, prepare)
    if code == 0 and env_procs()[0] == 0:
        say(summary(run_dir))
    return code


Work = Callable[[torch.device, Procs, Guard, Progress], None]


def supervise(
    config: Config | FinetuneConfig, run_dir: RunDir, guard: Guard, prepare: Callable[[], Work]
) -> int:
    """Do what `prepare` returns, once the processes have found each other; leave the end in status.json.

    `prepare` is what can go wrong without them. Returns the exit code. Raises what the work raises, but for
    Stopped. All processes of the launch call this.
    """
    proc = env_procs()[0]
    run_dir.create(fresh=config.run.resume == "never")
    ending = _Ending(run_dir, run_dir.read_status(), Progress())
    if config.run.time_limit_s is not None:
        guard.limit(config.run.time_limit_s)
    guard.leave = ending.leave
    try:
        work = prepare()
        device = pick_device()
        procs = join(device, config.engine.timeout_s)
        guard.leave = None
        with Peers(procs, ending.follow):
            work(device, procs, guard, ending.progress)
    except Stopped as stopped:
        if proc == 0:
            why, step = reason(stopped.flag), ending.progress.step
            ending.record("stopped", why, EXIT_STOPPED)
            kept = "checkpoint saved" if step else "nothing to save"
            say(f"stopped by {why} at step {step}, {kept}; start again to go on")
        return EXIT_STOPPED
    except BaseException as error:
        if proc == 0 or not dist.is_initialized():
            code = error.exit_code if isinstance(error, LrpretrainError) else 1
            ending.record("failed", f"{type(error).__name__}: {error}", code)
        raise
    if proc == 0:
        ending.record("finished", "", 0)
    return 0


@dataclass
class _Ending:
    """What is left in status.json, which said `before` when this process started."""

    run_dir: RunDir
    before: dict[str, Any]
    progress: Progress

    def record(self, state: str, why: str, code: int) -> None:
        """Write the last word."""
        step = self.progress.step or self.before.get("step", 0)  # what came to nothing does not undo the run
        self.run_dir.write_status(state, step, why, code, launch_id=launch_id())

    def leave(self, flag: int) -> None:
        """Stop before there are processes to agree with.

        Of several processes none records that: a launcher also ends them because another one has failed.
        """
        if "RANK" not in os.environ:
            self.record("stopped", reason(flag), EXIT_STOPPED)
        os._exit(EXIT_STOPPED)

    def follow(self, dead: int) -> None:
        """Say what this process ends for, unless process 0 has said so before it died."""
        now = self.run_dir.read_status()
        if now == self.before or now.get("state") == "running":
            self.record("failed", f"process {dead} died", 1)
            print(f"lrpretrain: process {dead} died, see its output; the others end too", file=sys.stderr)


def find_starts(config: Config, run_dir: RunDir) -> list[Path]:
    """Return the checkpoints to go on from, the newest first: from the first of them that is intact.

    Raises CheckpointError for a path that is none.
    """
    if config.run.resume == "never":
        return []
    if config.run.resume == "auto":
        return checkpoint.complete(run_dir.checkpoints)
    path = Path(config.run.resume)
    checkpoint.read_manifest(path)
    own = checkpoint.complete(run_dir.checkpoints)
    if path.resolve().parent != run_dir.checkpoints.resolve():
        return own or [path]
    if path.resolve() != own[0].resolve():
        reason = f"run.dir goes on to {own[0].name}, which would be lost"
        remedy = "Give another run.dir to go on from here, or remove the later checkpoints"
        raise ConfigError([Problem("run.resume", config.run.resume, reason, remedy)])
    return [path]


def find_intact(starts: Sequence[Path], run_dir: RunDir, procs: Procs) -> Path | None:
    """Return the first of the checkpoints that is intact, and say what is wrong with those before it.

    None where there are none. Raises CheckpointError on all processes if all are damaged, or if the
    processes do not see the same newest one.
    """
    seen = procs.gather([str(path) for path in starts])
    if len({tuple(paths[:1]) for paths in seen}) > 1:
        newest = [paths[0] if paths else None for paths in seen]
        where = "; ".join(f"process {proc}: {path}" for proc, path in enumerate(newest))
        raise CheckpointError(
            f"the processes see different checkpoints ({where}). Let all nodes share run.dir."
        )
    start, wrong = checkpoint.find_intact([Path(path) for path in seen[0]], procs)
    if procs.is_first:
        for path in checkpoint.incomplete(run_dir.checkpoints):
            if start is None or checkpoint.step_of(path) > checkpoint.step_of(start):
                say(f"{path} holds no manifest.json: it is of a save that did not end, and is passed over.")
        for damage in wrong:
            say(f"{damage} Going back to {start}.")
    return start


def is_complete(path: Path, config: Config) -> bool:
    """Say whether a checkpoint is of the last step, and that was evaluated."""
    at_end = bool(checkpoint.read_manifest(path)["step"] >= config.train.steps)
    return at_end and not checkpoint.read_run(path)["owes_evaluation"]


def _run(
    config: Config,
    run_dir: RunDir,
    tokenizer: Tokenizer,
    starts: Sequence[Path],
    device: torch.device,
    procs: Procs,
    guard: Guard,
    progress: Progress,
) -> None:
    start = find_intact(starts, run_dir, procs)
    if start is not None and start.parent == run_dir.checkpoints and is_complete(start, config):
        progress.step = checkpoint.step_of(start)
        if procs.is_first:
            say(f"This run is complete: {start}")
            say("To start another, give another --run.dir; to train this one on, raise --train.steps.")
        return
    if procs.is_first:
        for line in (unusable_gpu(), *plan.describe(config, procs.n_procs).splitlines()):
            if line is not None:
                say(line)
    torch.manual_seed(config.train.seed)
    mask = functools.partial(document_mask, eos_id=tokenizer.eos_id) if config.data.document_mask else None
    engine = build_engine(config, procs, device, pad_id=tokenizer.pad_id, mask=mask)
    position = None
    held = procs.gather(engine.optimizer_bytes())
    if procs.is_first:
        say(engine.optimizer.describe())
        say(f"optimizer state: {max(held) / 2**20:.1f} MiB on the process that holds most of it")
    if start is not None:
        restored, position = resume(start, engine, config, procs, tokenizer)
        vars(progress).update(vars(restored))
        if procs.is_first:
            say(f"resumed from {start}")
    if procs.is_first:
        run_dir.describe(config, procs.n_procs, device, tokenizer.file)
        run_dir.write_status("running", progress.step)
    procs.agree(guard.flag())
    evaluator = None
    if config.train.eval_every:
        validation = build_loader(config, "validation", procs, tokenizer)
        evaluator = Evaluator(validation, config.train.eval_tokens, config.train.micro_batch)
    loader = build_loader(config, "train", procs, tokenizer, state=position)
    metrics = None
    if procs.is_first:
        run_dir.cut_metrics(progress.step if start is not None else -1)
        flops = plan.flops_per_token(config)
        metrics = Metrics(run_dir, progress.step, config.train.steps, flops, procs.n_procs)
    procs.agree(guard.flag())
    trainer = Trainer(config, procs, engine, loader, evaluator, tokenizer, run_dir, metrics, guard, progress)
    try:
        trainer.train()
        mapped = int(procs.sum([tokenizer.sentinels_mapped])[0])
        if mapped and procs.is_first:
            say(f"{mapped} sentinel ids of the tokenizer became unknown ids: the model lacks them")
    finally:
        loader.close()
        engine.close()
        if metrics is not None:
            metrics.close()


def leave(run: Callable[[], int]) -> NoReturn:
    """Run a training, and end the process with the exit code."""
    with Guard():  # to the end: the echo of a signal does not change the exit code
        try:
            exit_code = run()
            if dist.is_initialized():
                dist.destroy_process_group()
            if exit_code and env_procs()[0] != 0:
                # Launchers end all processes once one has failed: let the one that speaks go first.
                time.sleep(LAST_WORD_S)
        except Exception:
            traceback.print_exc()
            exit_code = 1
        # All that a run leaves is written and closed. Native threads of torch's process groups now and then
        # abort the interpreter while it is torn down (1 exit in 25 under gloo), which would replace the code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


if __name__ == "__main__":
    leave(main)
