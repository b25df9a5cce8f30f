"""The training loop. It knows engines, loaders and run folders by their interfaces only."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrpretrain.artifacts import checkpoint
from lrpretrain.artifacts.metrics import Metrics, say
from lrpretrain.artifacts.rundir import RunDir
from lrpretrain.config import Config
from lrpretrain.data.loader import Batch, Loader
from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.engine import Engine, Step
from lrpretrain.errors import ConfigError, DataError, NonFiniteError, Problem, Stopped
from lrpretrain.sharding.procs import Procs
from lrpretrain.train.evaluate import Evaluator, continue_prompt, split
from lrpretrain.train.guard import Guard
from lrpretrain.train.recorder import recorder
from lrpretrain.train.schedule import lr_ratio


@dataclass
class Progress:
    """How far a run is: optimizer steps done, non-pad tokens seen, the step of its last checkpoint, and
    whether the evaluation at this step is still to be done."""

    step: int = 0
    tokens: int = 0
    saved: int | None = None
    owes_evaluation: bool = True


@dataclass
class Trainer:
    """Everything that a run is made of. All processes have one and call its methods together."""

    config: Config
    procs: Procs
    engine: Engine
    loader: Loader
    evaluator: Evaluator | None
    tokenizer: Tokenizer
    run_dir: RunDir
    metrics: Metrics | None
    guard: Guard
    progress: Progress = field(default_factory=Progress)

    def train(self) -> None:
        """Train to the last step.

        Raises Stopped where the guard of a process asked for that, and DataError where the data ends early
        or breaks, both with a checkpoint saved, and NonFiniteError before a gradient that is not finite could
        touch anything.
        """
        steps = self.config.train.profile_steps if self.procs.is_first else 0
        try:
            with recorder(self.run_dir.path / "profile", self.config.train.profile_from, steps) as record:
                self._train(record)
        except (DataError, Stopped):
            if self.progress.step not in (0, self.progress.saved):
                self.save()
            raise

    def _train(self, record: Callable[[int], None]) -> None:
        train, progress = self.config.train, self.progress
        if self.evaluator is not None and progress.owes_evaluation:
            self._log(self._evaluate())
        while progress.step < train.steps:
            batch = self._next_batch()
            step = self._step(batch)
            record(progress.step)
            last = progress.step == train.steps
            stops = bool(batch.flag) and not last
            due = last or (train.eval_every > 0 and progress.step % train.eval_every == 0)
            progress.owes_evaluation = due and self.evaluator is not None
            evaluates = progress.owes_evaluation and not stops
            if evaluates or stops or last or progress.step % train.log_every == 0:
                values = {
                    "train/loss": float(self.engine.total(step.loss_sum)) / max(batch.targets, 1),
                    "train/lr": self.config.optim.lr * lr_ratio(progress.step - 1, train),
                    "train/grad_norm": step.grad_norm,
                }
                self._log(values | (self._evaluate(values) if evaluates else {}))
            if stops:
                raise Stopped(batch.flag)
            if last or (train.save_every and progress.step % train.save_every == 0):
                self.save()
                if not last:
                    self.procs.agree(self.guard.flag())  # or the next step would save again

    def save(self) -> Path:
        """Write a checkpoint of this step, and remove the oldest beyond train.keep_checkpoints."""
        began = time.perf_counter()
        run = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "owes_evaluation": self.progress.owes_evaluation,
            "data": self.loader.state_dict(),
            "random": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "config": asdict(self.config),
            "tokenizer": self.tokenizer.identity,
        }
        path = checkpoint.save(self.run_dir.checkpoints, self.engine.pieces(), run, self.procs)
        self.progress.saved = self.progress.step
        self.guard.saved(time.perf_counter() - began)
        if self.procs.is_first:
            checkpoint.keep_newest(self.run_dir.checkpoints, self.config.train.keep_checkpoints)
            self.run_dir.write_status("running", self.progress.step)
            say(f"saved {path} in {time.perf_counter() - began:.1f} s")
        if self.metrics is not None:
            self.metrics.pause(time.perf_counter() - began)
        return path

    def _next_batch(self) -> Batch:
        """Return the next global batch; agree on stopping by its flag."""
        batch = self.loader.next(self.guard.flag)
        if batch is None:
            raise DataError(
                f"the data ended after {self.progress.step} of {self.config.train.steps} steps"
                f" ({self.loader.dropped} sequences left over). Raise data.epochs, or lower train.steps."
            )
        return batch

    def _step(self, batch: Batch) -> Step:
        """Do one optimizer step. Raises NonFiniteError where it could not be done."""
        train, engine, progress = self.config.train, self.engine, self.progress
        step = engine.train_step(
            split(batch.ids, train.micro_batch),
            batch.targets,
            train.clip_norm,
            lr_ratio(progress.step, train),
        )
        if not math.isfinite(step.grad_norm):
            self.save()  # with the position after this batch: started again, the run goes on behind it
            raise NonFiniteError(
                f"the gradient of step {progress.step + 1} is not finite (norm {step.grad_norm}): nothing was"
                " updated, the checkpoint goes on with the next batch. Lower optim.lr or set train.clip_norm."
            )
        progress.step += 1
        progress.tokens += batch.tokens
        if self.metrics is not None:
            self.metrics.count(batch.tokens, self.loader.wait_ms, step.update_ms)
        return step

    def _evaluate(self, trained: dict[str, float] | None = None) -> dict[str, float]:
        """Return what was measured. Stopped on the way, log what was `trained`."""
        assert self.evaluator is not None
        try:
            values = self.evaluator.evaluate(self.engine, self.guard.flag)
        except Stopped:
            if trained is not None:
                self._log(trained)
            raise
        self.progress.owes_evaluation = False
        if self.metrics is not None:
            self.metrics.pause(values["perf/eval_s"])
        return values

    def _log(self, values: dict[str, float]) -> None:
        prompt = self.config.train.prompt if "valid/loss" in values else None
        began = time.perf_counter()
        text = None if prompt is None else continue_prompt(self.engine, self.tokenizer, prompt)
        values |= self.engine.optimizer.pop_metrics(self.procs)
        if self.metrics is not None:
            self.metrics.pause(time.perf_counter() - began)
            values["mem/optim_gib"] = self.engine.optimizer_bytes() / 2**30
            self.metrics.log(self.progress.step, self.progress.tokens, values, text)


# What a checkpoint's optimizer state and data position mean nothing without; shapes and lanes are
# checked where they are loaded.
IDENTITY = (
    "data.source",
    "data.sequences",
    "data.seq_len",
    "optim.rule",
    "optim.base",
    "optim.mode",
    "optim.moments",
    "optim.side",
    "optim.targets",
    "optim.adapter_rank",
    "optim.adapter_alpha",
)


def resume(
    path: Path, engine: Engine, config: Config, procs: Procs, tokenizer: Tokenizer
) -> tuple[Progress, dict[str, Any]]:
    """Read a checkpoint into the engine; return the progress and the data's position.

    Raises CheckpointError for one that is damaged or of another model, ConfigError for one whose run was
    configured otherwise in what cannot change on the way.
    """
    run = checkpoint.read_run(path)
    problems = check_tokenizer(path, run, config, tokenizer)
    for key in IDENTITY:
        section, name = key.split(".")
        now = asdict(config)[section][name]
        then = run["config"][section].get(name, now)  # older checkpoints know fewer fields
        if then != now:
            remedy = "Go on with that value, or start another run in another run.dir"
            problems.append(Problem(key, now, f"the checkpoint {path} was written with {then!r}", remedy))
    if problems:
        raise ConfigError(problems)
    checkpoint.load(path, engine.pieces(), procs)
    engine.publish()
    owes_evaluation = run.get("owes_evaluation", False)
    if run["step"] >= config.train.steps and not owes_evaluation:
        reason = f"{path} is at step {run['step']} already"
        raise ConfigError([Problem("train.steps", config.train.steps, reason, "Raise it")])
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(run["random"])), dtype=torch.uint8))
    return Progress(run["step"], run["tokens"], run["step"], owes_evaluation), run["data"]


def check_tokenizer(
    path: Path, run: dict[str, Any], config: Config, tokenizer: Tokenizer
) -> list[Problem | str]:
    """Return what is wrong if a checkpoint was trained with another tokenizer."""
    if run["tokenizer"] == tokenizer.identity:
        return []
    reason = f"is {tokenizer.identity}, but {path} was trained with {run['tokenizer']}"
    remedy = "Name that one, such as the tokenizer.model of its run folder"
    return [Problem("data.tokenizer", config.data.tokenizer, reason, remedy)]
