"""The training loop. It knows engines, loaders and run folders by their interfaces only."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from lrpretrain.artifacts import checkpoint
from lrpretrain.artifacts.metrics import Metrics, say
from lrpretrain.artifacts.rundir import RunDir
from lrpretrain.artifacts.saver import Saver
from lrpretrain.config import Config
from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.engine import Engine, Step
from lrpretrain.errors import ConfigError, DataError, LrpretrainError, Problem, Stopped, UnsoundError
from lrpretrain.sharding.procs import Procs
from lrpretrain.train.evaluate import continue_prompt, split
from lrpretrain.train.guard import Guard
from lrpretrain.train.judge import Judge
from lrpretrain.train.recorder import recorder
from lrpretrain.train.schedule import lr_ratio


@dataclass
class Progress:
    """How far a run is: optimizer steps done, and non-pad tokens seen."""

    step: int = 0
    tokens: int = 0
    owes_evaluation: bool = True
    """Whether the evaluation at this step is still to be done."""
    skipped: int = 0
    """Steps that were not sound and changed nothing, of those that were done."""
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)
    """The last ones up to the checkpoint, by which spikes are told."""


class Feed(Protocol):
    """What gives the global batches."""

    wait_ms: float
    dropped: int

    def next(self, flag: Callable[[], int] = int) -> Any:
        """Return the next batch, or None on all processes; see Loader.next."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""


class Examiner(Protocol):
    """What evaluates the model."""

    def evaluate(self, engine: Engine, flag: Callable[[], int] = int) -> dict[str, float]:
        """Return what was measured, with the seconds that it took as perf/eval_s; see Evaluator.evaluate."""


@dataclass
class Trainer:
    """Everything that a run is made of. All processes have one and call its methods together."""

    config: Config
    procs: Procs
    engine: Engine
    loader: Feed
    evaluator: Examiner | None
    tokenizer: Tokenizer
    run_dir: RunDir
    metrics: Metrics | None
    guard: Guard
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        train, folder = self.config.train, self.run_dir.checkpoints
        losses = self.progress.losses
        self._judge = Judge(train.spike_window, train.spike_sigmas, self.engine.device, losses)
        self._unseen: tuple[int, Step] | None = None  # a step, and its number, of which the host knows no end
        keep = train.keep_checkpoints, train.keep_every
        timeout_s, saved = self.config.engine.timeout_s, self.progress.step
        self._saver = Saver(folder, self.procs, timeout_s, *keep, train.async_save, saved=saved)

    def train(self) -> None:
        """Train to the last step.

        Raises Stopped where the guard of a process asked for that, DataError where the data ends early or
        breaks, and UnsoundError after a step that was not sound and changed nothing, all with a checkpoint
        saved; and CheckpointError where that, or the last one of the run, cannot be written.
        """
        steps = self.config.train.profile_steps if self.procs.is_first else 0
        try:
            with recorder(self.run_dir.path / "profile", self.config.train.profile_from, steps) as record:
                self._train(record)
        except LrpretrainError as error:  # which all processes meet together
            self._saver.wait()
            if isinstance(error, DataError | Stopped | UnsoundError):
                try:
                    self._see()  # of the last step, too
                except UnsoundError as unsound:
                    error = error if isinstance(error, UnsoundError) else unsound
                if self.progress.step != self._saver.saved:
                    self.save(last=True)
            raise error

    def _train(self, record: Callable[[int], None]) -> None:
        train, progress = self.config.train, self.progress
        if self.evaluator is not None and progress.owes_evaluation:
            self._log(self._evaluate())
            if progress.step == train.steps:  # a run that was stopped in its last evaluation
                self.save(last=True)
        while progress.step < train.steps:
            batch = self._next_batch()
            step = self._step(batch)
            record(progress.step)
            last = progress.step == train.steps
            stops = bool(batch.flag) and not last
            evaluates = progress.owes_evaluation and not stops
            saves = last or (train.save_every > 0 and progress.step % train.save_every == 0)
            logs = evaluates or stops or last or progress.step % train.log_every == 0
            if saves or logs:
                self._see()
            if logs:
                values = {
                    "train/loss": step.loss,
                    "train/lr": self.config.optim.lr * lr_ratio(progress.step - 1, train),
                    "train/grad_norm": step.grad_norm,
                    "train/skipped": progress.skipped,
                }
                self._log(values | (self._evaluate(values) if evaluates else {}))
            if stops:
                raise Stopped(batch.flag)
            if saves:
                self.save(last=last)
                if not last:
                    self.procs.agree(self.guard.flag())  # or the next step would save again

    def save(self, *, last: bool = False) -> None:
        """Begin to write a checkpoint of this step; the `last` one of a process is written on return.

        Raises CheckpointError if the last one cannot be written; others that cannot are reported only.
        """
        began = time.perf_counter()
        run = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "skipped": self.progress.skipped,
            "skipped_in_a_row": self.progress.skipped_in_a_row,
            "losses": self._judge.losses(),
            "owes_evaluation": self.progress.owes_evaluation,
            "data": self.loader.state_dict(),
            "random": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "config": asdict(self.config),
            "tokenizer": self.tokenizer.identity,
        }
        if self.engine.layers is not None:
            run["clips_by"] = float(self.engine.layers.norm)
        self._saver.save(self.engine.pieces(), run, last=last)
        self.guard.saved(self._saver.took_s)
        if self.procs.is_first:
            self.run_dir.write_status("running", self.progress.step)
        if self.metrics is not None:
            self.metrics.pause(time.perf_counter() - began)

    def _next_batch(self) -> Any:
        """Return the next global batch; agree on stopping by its flag."""
        batch = self.loader.next(self.guard.flag)
        if batch is None:
            raise DataError(
                f"the data ended after {self.progress.step} of {self.config.train.steps} steps"
                f" ({self.loader.dropped} sequences left over). Raise data.epochs, or lower train.steps."
            )
        return batch

    def _step(self, batch: Any) -> Step:
        """Do one optimizer step, and see what came of the one before, while the device is busy with this one.

        Raises UnsoundError, as `_see` does.
        """
        train, progress = self.config.train, self.progress
        step = self.engine.train_step(
            self.micros(batch),
            batch.targets,
            train.clip_norm,
            lr_ratio(progress.step, train),
            self._judge,
        )
        progress.step += 1
        progress.tokens += batch.tokens
        due = progress.step == train.steps or (train.eval_every and progress.step % train.eval_every == 0)
        progress.owes_evaluation = bool(due) and self.evaluator is not None
        if self.metrics is not None:
            self.metrics.count(batch.tokens, self.loader.wait_ms, step.update)
        self._see((progress.step, step))
        return step

    def micros(self, batch: Any) -> Sequence[Any]:
        """Return this process's micro-batches of a batch, as the engine takes them."""
        return split(batch.ids, self.config.train.micro_batch)

    def _see(self, following: tuple[int, Step] | None = None) -> None:
        """See what came of the step not seen yet, and then keep the `following` one for the next time.

        Raises UnsoundError if the run shall stop for it.
        """
        unseen, self._unseen = self._unseen, following
        if unseen is None:
            return
        number, step = unseen
        train, progress = self.config.train, self.progress
        if step.sound:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        broken = not (math.isfinite(step.loss) and math.isfinite(step.grad_norm))
        norm = f" or its gradient, of norm {step.grad_norm:.4g}, is not finite" if broken else " is a spike"
        said = f"step {number}: the loss {step.loss:.4g}{norm}"
        partly = self.engine.layers is not None and math.isfinite(step.loss) and broken
        left = "no block with such a gradient was updated" if partly else "nothing was updated"
        if train.unsound == "skip" and progress.skipped_in_a_row <= train.max_skipped:
            if self.procs.is_first:
                say(f"{said}; skipped, {left} ({progress.skipped} so far)")
            return
        remedy = "Lower optim.lr, set train.clip_norm, or let train.unsound=skip pass over such steps."
        if not broken:
            remedy += " train.spike_sigmas says what a spike is."
        raise UnsoundError(f"{said}; {left}, and the checkpoint goes on with the next batch. {remedy}")

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
        values |= self.engine.optimizer.pop_metrics(self.procs) | self._saver.pop_metrics()
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
    """Read a checkpoint that was checked into the engine; return the progress and the data's position.

    Raises CheckpointError for one of another model, ConfigError for one whose run was
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
    checkpoint.load(path, engine.pieces(), procs, checked=True)
    engine.publish()
    if engine.layers is not None:
        engine.layers.norm.fill_(run.get("clips_by", 0.0))  # none is known of a run that updated at once
    if run["step"] >= config.train.steps and not run["owes_evaluation"]:
        reason = f"{path} is at step {run['step']} already"
        raise ConfigError([Problem("train.steps", config.train.steps, reason, "Raise it")])
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(run["random"])), dtype=torch.uint8))
    progress = Progress()
    for key in vars(progress):
        setattr(progress, key, run[key])
    return progress, run["data"]


def check_tokenizer(
    path: Path, run: dict[str, Any], config: Config, tokenizer: Tokenizer
) -> list[Problem | str]:
    """Return what is wrong if a checkpoint was trained with another tokenizer."""
    if run["tokenizer"] == tokenizer.identity:
        return []
    reason = f"is {tokenizer.identity}, but {path} was trained with {run['tokenizer']}"
    remedy = "Name that one, such as the tokenizer.model of its run folder"
    return [Problem("data.tokenizer", config.data.tokenizer, reason, remedy)]
