"""Pretrain a model: `torchrun … -m lrpretrain.pretrain --config FILE [--section.field VALUE …]`.

Starts under `python -m` (one process), `torchrun` and `deepspeed`. Everything that can be wrong with a
configuration is reported before any process group or model exists. Exit codes: see lrpretrain/errors.py.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from lrpretrain.artifacts import checkpoint
from lrpretrain.artifacts.metrics import Metrics, say, summary
from lrpretrain.artifacts.rundir import RunDir
from lrpretrain.config import Config, parse
from lrpretrain.data.inputs import open_tokenizer
from lrpretrain.data.loader import build_loader
from lrpretrain.data.pack import document_mask
from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.engine import build_engine
from lrpretrain.engine.device import env_procs, join, pick_device, unusable_gpu
from lrpretrain.errors import EXIT_STOPPED, CheckpointError, ConfigError, LrpretrainError, Problem
from lrpretrain.model import llama
from lrpretrain.train import plan
from lrpretrain.train.evaluate import Evaluator
from lrpretrain.train.guard import Guard, launch_id, restarted_after_stop
from lrpretrain.train.loop import Progress, Trainer, resume

LAST_WORD_S = 3.0


Reader = Callable[[Sequence[str]], tuple[Config, list[Problem | str]]]


def main(argv: Sequence[str] | None = None, read: Reader = parse) -> int:
    """Run a pretraining from its command line, as `read` understands it; return the exit code."""
    proc, n_procs, local_proc = env_procs()
    try:
        config, problems = read(sys.argv[1:] if argv is None else argv)
        problems += plan.problems(config, n_procs)
        if problems:
            raise ConfigError(problems)
        return pretrain(config)
    except LrpretrainError as error:
        # What all processes meet is said once; what is wrong with a node, by that node.
        if proc == 0 or (local_proc == 0 and not dist.is_initialized()):
            print(f"lrpretrain: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def pretrain(config: Config) -> int:
    """Run a checked configuration; return the exit code, and leave it in status.json.

    Raises LrpretrainError for what a user can mend. All processes of the launch call this.
    """
    run_dir = RunDir(config.run.dir)
    status = run_dir.read_status()
    if restarted_after_stop(status):
        return EXIT_STOPPED
    start = _start(config, run_dir)
    proc = env_procs()[0]
    own = start if start is not None and start.parent == run_dir.checkpoints else None
    if own is not None and checkpoint.read_manifest(own)["step"] >= config.train.steps:
        if proc == 0:
            say(f"This run is complete: {own}")
            say(summary(run_dir))
            say("To start another, give another --run.dir; to train this one on, raise --train.steps.")
        return 0
    run_dir.create(fresh=start is None and config.run.resume == "never")
    progress = Progress()
    try:
        tokenizer = open_tokenizer(config, llama.load_config(config.model).vocab_size)
        with Guard() as guard:
            code = _run(config, run_dir, tokenizer, pick_device(), guard, start, progress)
    except BaseException as error:
        if proc == 0:
            code = error.exit_code if isinstance(error, LrpretrainError) else 1
            reason = f"{type(error).__name__}: {error}"
            step = progress.step or status.get("step", 0)  # a refused resume does not undo the run
            run_dir.write_status("failed", step, reason, code, launch_id=launch_id())
        raise
    if proc == 0:
        state, reason = (
            ("finished", "") if code == 0 else ("stopped", guard.reason or "a signal on another process")
        )
        run_dir.write_status(state, progress.step, reason, code, launch_id=launch_id())
        stopped = f"stopped by {reason} at step {progress.step}, checkpoint saved; start again to go on"
        say(summary(run_dir) if code == 0 else stopped)
    return code


def _start(config: Config, run_dir: RunDir) -> Path | None:
    """Return the checkpoint to go on from, or None. Raises CheckpointError for a path that is none."""
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        return next(iter(checkpoint.complete(run_dir.checkpoints)), None)
    path = Path(config.run.resume)
    checkpoint.read_manifest(path)
    newest = next(iter(checkpoint.complete(run_dir.checkpoints)), path)
    if path.resolve().parent == run_dir.checkpoints.resolve() and path.resolve() != newest.resolve():
        reason = f"run.dir goes on to {newest.name}, which would be lost"
        remedy = "Give another run.dir to go on from here, or remove the later checkpoints"
        raise ConfigError([Problem("run.resume", config.run.resume, reason, remedy)])
    return path


def _run(
    config: Config,
    run_dir: RunDir,
    tokenizer: Tokenizer,
    device: torch.device,
    guard: Guard,
    start: Path | None,
    progress: Progress,
) -> int:
    procs = join(device, config.engine.timeout_s)
    seen = procs.gather(None if start is None else str(start))
    if len(set(seen)) > 1:
        where = "; ".join(f"process {proc}: {path}" for proc, path in enumerate(seen))
        raise CheckpointError(
            f"the processes see different checkpoints ({where}). Let all nodes share run.dir."
        )
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
    trainer = Trainer(config, procs, engine, loader, evaluator, tokenizer, run_dir, metrics, guard, progress)
    try:
        code = trainer.train()
        mapped = int(procs.sum([tokenizer.sentinels_mapped])[0])
        if mapped and procs.is_first:
            say(f"{mapped} sentinel ids of the tokenizer became unknown ids: the model lacks them")
        return code
    finally:
        loader.close()
        engine.close()
        if metrics is not None:
            metrics.close()


def leave(exit_code: int) -> NoReturn:
    """End the process with an exit code that launchers see."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if exit_code and env_procs()[0] != 0:
        # Launchers end all processes once one has failed: let the one that speaks go first.
        time.sleep(LAST_WORD_S)
    # All that a run leaves is written and closed. Native threads of torch's process groups now and then abort
    # the interpreter while it is torn down (1 exit in 25 under gloo), which would replace the exit code.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    leave(main())
