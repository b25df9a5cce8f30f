"""Fine-tune on GLUE: `torchrun … -m lrpretrain.finetune --config FILE [--section.field VALUE …]`.

Starts under `python -m` (one process) and `torchrun`; the engines are local, ddp and fsdp. The output folder,
`run.dir`, holds results.json and, for each seed, a run folder. `--export DIR` writes the run that ends best
as a model that plain transformers loads, with adapters merged. Exit codes: see lrpretrain/errors.py.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml

from lrpretrain.artifacts import checkpoint
from lrpretrain.artifacts.export import draft, refuse_taken
from lrpretrain.artifacts.metrics import Metrics, say
from lrpretrain.artifacts.rundir import RunDir, write_atomically
from lrpretrain.config import Config, FinetuneConfig, flat, from_dict, parse
from lrpretrain.data import glue
from lrpretrain.data.glue import TASKS, Encoder, RowLoader, Rows, steps_of_epoch
from lrpretrain.engine import DTYPES, Engine, assemble
from lrpretrain.engine.device import env_procs, unusable_gpu
from lrpretrain.errors import EXIT_STOPPED, ConfigError, DataError, Problem
from lrpretrain.model import classifier
from lrpretrain.model.llama import shapes
from lrpretrain.model.lowrank import SPECTRAL, initial_factor
from lrpretrain.optim import groups
from lrpretrain.pretrain import Work, answer_for, find_intact, find_starts, is_complete, leave, supervise
from lrpretrain.sharding import hold
from lrpretrain.sharding.procs import Procs
from lrpretrain.train import plan
from lrpretrain.train.guard import Guard, restarted_after_stop
from lrpretrain.train.loop import Progress, Trainer, resume
from lrpretrain.train.score import Scorer

Reader = Callable[[Sequence[str]], tuple[FinetuneConfig, list[Problem | str]]]
OWN = functools.partial(parse, prog="lrpretrain.finetune [--export DIR]", kind=FinetuneConfig)


def main(argv: Sequence[str] | None = None, read: Reader = OWN) -> int:
    """Fine-tune from a command line, as `read` understands it; return the exit code."""

    def train(guard: Guard) -> int:
        out, rest = _export_of(sys.argv[1:] if argv is None else argv)
        config, problems = read(rest)
        config, found = check(config, env_procs()[1])
        if problems := [*problems, *found]:
            raise ConfigError(problems)
        return finetune(config, guard, out)

    return answer_for(train)


def _export_of(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the folder of `--export DIR`, and the other arguments."""
    rest, out = list(argv), None
    for i, argument in enumerate(rest):
        name, equals, value = argument.partition("=")
        if name == "--export":
            value = value if equals else "".join(rest[i + 1 : i + 2])
            if not value or (value.startswith("--") and not equals):
                raise ConfigError(["--export: has no value. Write --export DIR."])
            out, rest = Path(value), rest[:i] + rest[i + (1 if equals else 2) :]
            refuse_taken(out)
            break
    return out, rest


def check(config: FinetuneConfig, n_procs: int) -> tuple[FinetuneConfig, list[Problem | str]]:
    """Return the configuration with its targets, and everything that cannot work in it.

    How many steps an epoch has is not known before the rows are read.
    """
    found = glue.problems(config.data)
    for package in ("sklearn", *([] if config.model.adapter == "none" else ["peft"])):
        if find_spec(package) is None:
            found.append(f"the package {package} is not installed. Run pip install 'lrpretrain[glue]'")
    # What pretraining says of these two fields is not so here.
    anew = ("model.init_from", "optim.init")
    epochs = max(config.train.epochs, 1)
    some = replace(config, train=replace(config.train, epochs=epochs)).of_run(0, 10**6)
    known = plan.check(some, n_procs)
    found += [p for p in known if not (isinstance(p, Problem) and p.field in anew)]
    found += _own_problems(config)
    try:
        shape = classifier.shape_of(config, TASKS[config.data.task].labels)
    except ConfigError as error:
        return config, [*found, *error.problems]
    model = classifier.outline(shape)
    config = replace(config, optim=classifier.targeted(model, config.optim))
    positions = shape.max_position_embeddings - (2 if shape.model_type == "roberta" else 0)
    if config.data.seq_len > positions:
        reason = f"is longer than the model's {positions} positions"
        found.append(Problem("data.seq_len", config.data.seq_len, reason, "Lower it"))
    optim = config.optim
    if config.model.adapter != "none":  # whose rank must fit as that of GradNormLoRP's adapters
        optim = replace(optim, rule="gradnormlorp", mode="dora", rank=1, attn_rank=None, mlp_rank=None)
    return config, found + groups.problems(shapes(model), optim) + _others(config)


# Fields in which the runs of a folder may differ, besides those of `engine` and `run`.
FREE = {f"train.{n}" for n in ("epochs", "steps", "seed", "runs", "micro_batch", "log_every", "save_every")}


def _others(config: FinetuneConfig) -> list[Problem | str]:
    """Return what is otherwise in the runs that lie in run.dir, which would be reported as these."""
    folder = Path(config.run.dir)
    if config.run.resume == "never":
        seeds = range(config.train.seed, config.train.seed + config.train.runs)
        held = [f"seed_{seed}" for seed in seeds if (folder / f"seed_{seed}/metrics.jsonl").exists()]
        reason = f"holds {', '.join(held)}, which would be overwritten"
        remedy = "Name another folder, or use run.resume=auto"
        return [Problem("run.dir", config.run.dir, reason, remedy)] if held else []
    try:
        written = yaml.safe_load((folder / "config.yaml").read_text())
    except FileNotFoundError:
        return []
    wanted, there = flat(config), flat(from_dict(written, kind=FinetuneConfig))
    remedy = "Go on with that value, or name another folder as run.dir"
    return [
        Problem(key, wanted[key], f"the runs in {folder} have {there[key]!r}", remedy)
        for key in wanted
        if key not in FREE and key.split(".")[0] not in ("engine", "run") and wanted[key] != there[key]
    ]


def _own_problems(config: FinetuneConfig) -> list[Problem | str]:
    """Return what cannot work in the fields that pretraining does not have, or has otherwise."""
    found: list[Problem | str] = []
    optim, train = config.optim, config.train

    def refuse(wrong: bool, key: str, reason: str, remedy: str) -> None:
        if wrong:
            section, name = key.split(".")
            found.append(Problem(key, getattr(getattr(config, section), name), reason, remedy))

    refuse(train.seed < 0, "train.seed", "must not be negative", "Raise it")
    for key in ("train.epochs", "train.runs", "data.seq_len"):
        section, name = key.split(".")
        refuse(getattr(getattr(config, section), name) < 1, key, "must be at least 1", "Raise it")
    dropout = config.model.dropout
    refuse(
        dropout is not None and not 0 <= dropout < 1,
        "model.dropout",
        "must lie in [0, 1)",
        "Leave it out for the model's own",
    )
    refuse(train.steps is not None and train.steps < 1, "train.steps", "must be at least 1", "Leave it out")
    refuse(
        config.engine.kind == "zero",
        "engine.kind",
        "is not there for fine-tuning",
        "Use local, ddp or fsdp",
    )
    refuse(
        config.model.adapter != "none" and optim.rule != "adamw",
        "model.adapter",
        f"is trained by AdamW, and optim.rule={optim.rule}",
        "Use optim.rule=adamw, or leave it out (optim.mode=dora has adapters of its own)",
    )
    refuse(optim.compat and optim.rule != "loro", "optim.compat", "is for optim.rule=loro", "Leave it out")
    try:
        initial_factor(torch.ones(2, 1), "xavier" if optim.init in SPECTRAL else optim.init, 1.0)
    except ValueError as error:
        refuse(True, "optim.init", str(error).rstrip("."), f"Use one of those, or {', '.join(SPECTRAL)}")
    refuse(
        config.run.resume not in ("auto", "never"),
        "run.resume",
        "is neither auto nor never: each seed goes on from its own checkpoints",
        "Use auto",
    )
    return found


def finetune(config: FinetuneConfig, guard: Guard, out: Path | None = None) -> int:
    """Run a checked configuration; return the exit code, and leave it in status.json.

    Raises LrpretrainError for what a user can mend. All processes of the launch call this.
    """
    run_dir = RunDir(config.run.dir)
    if restarted_after_stop(run_dir.read_status()):
        return EXIT_STOPPED

    def prepare() -> Work:
        return functools.partial(_Finetuning(config, run_dir, out).run)

    return supervise(config, run_dir, guard, prepare)


class _Finetuning:
    """The rows and the tokenizer of a configuration, and its runs, one after the other."""

    def __init__(self, config: FinetuneConfig, run_dir: RunDir, out: Path | None):
        self.config, self.run_dir, self.out = config, run_dir, out
        self.task = TASKS[config.data.task]
        self.shape = classifier.shape_of(config, self.task.labels)
        tokenizer = classifier.open_tokenizer(config)
        self.encoder = Encoder(tokenizer, config.data.seq_len)
        self.shape.pad_token_id = tokenizer.pad_token_id
        self.rows = glue.read(config.data, "train")
        splits = glue.validation_splits(config.data)
        self.validations: dict[str, Rows] = {p: glue.read(config.data, s) for p, s in splits.items()}
        self.epoch = steps_of_epoch(len(self.rows), config.train.global_batch)
        self.configs = [config.of_run(run, self.epoch) for run in range(config.train.runs)]
        steps = self.configs[0].train.steps
        if config.train.warmup_steps >= steps:
            reason = f"is not below the {steps} steps of the run"
            raise ConfigError([Problem("train.warmup_steps", config.train.warmup_steps, reason, "Lower it")])
        if (largest := max(tokenizer.get_vocab().values())) >= self.shape.vocab_size:
            reason = f"its tokenizer gives ids up to {largest}, and the model knows {self.shape.vocab_size}"
            remedy = "Put the tokenizer that belongs to the model into the folder"
            raise ConfigError([Problem("model.init_from", self.config.model.init_from, reason, remedy)])

    def run(self, device: torch.device, procs: Procs, guard: Guard, progress: Progress) -> None:
        """Do the runs that are not done yet; write results.json after each."""
        if procs.is_first:
            self._say_what(procs)
            self.run_dir.describe(self.config, procs.n_procs, device)
        for done, config in enumerate(self.configs, 1):
            vars(progress).update(vars(Progress()))  # the one that status.json is written by
            if procs.is_first:
                say(f"seed {config.train.seed}: {config.run.dir}")
            self._run(config, device, procs, guard, progress)
            gc.collect()  # the engine, which refers to itself, before there is the next one
            procs.barrier()
            if procs.is_first:
                self._write_results(self.configs[:done])
        if procs.is_first:
            say(self._summary())
            if self.out is not None:
                self._export(self.out)
        procs.barrier()

    def _say_what(self, procs: Procs) -> None:
        train, first = self.config.train, self.configs[0].train
        for line in (
            unusable_gpu(),
            f"{self.config.data.task}: {len(self.rows):,} training rows, "
            + ", ".join(f"{len(rows):,} validation rows" for rows in self.validations.values()),
            f"{len(self.rows):,} / {train.global_batch} = {self.epoch:,} steps an epoch, {first.steps:,} in"
            f" all; {procs.n_procs} × {train.micro_batch} rows at a time",
        ):
            if line is not None:
                say(line)

    def _run(
        self, config: Config, device: torch.device, procs: Procs, guard: Guard, progress: Progress
    ) -> None:
        """Do one of the runs, from its newest checkpoint if there is one."""
        run_dir, train = RunDir(config.run.dir, part_of=self.run_dir), config.train
        if procs.is_first:
            run_dir.create(fresh=False)
        procs.barrier()
        start = find_intact(find_starts(config, run_dir), run_dir, procs)
        if start is not None and is_complete(start, config):
            progress.step = checkpoint.step_of(start)
            if procs.is_first:
                say(f"it is complete: {start}")
            return
        model, drawn = classifier.build(self.config, self.shape, train.seed, DTYPES[config.precision.params])
        engine = assemble(model, config, procs, device, lambda _: None, 0, pad_id=self.shape.pad_token_id)
        engine.objective = functools.partial(_objective, engine)
        position = None
        if start is not None:
            restored, position = resume(start, engine, config, procs, cast(Any, self.encoder))
            vars(progress).update(vars(restored))
        if procs.is_first:
            trained = sum(h.param.numel() for h in engine.holdings if h.param.requires_grad)
            say(engine.optimizer.describe())
            say(f"{trained:,} parameters are trained, of {sum(h.param.numel() for h in engine.holdings):,}")
            if drawn:
                say(f"not in {self.config.model.init_from}, and drawn: {', '.join(sorted(drawn))}")
            if start is not None:
                say(f"resumed from {start}")
            run_dir.write_status("running", progress.step)
        loader = RowLoader(
            self.rows,
            self.encoder,
            task=self.config.data.task,
            seed=train.seed,
            micro_batch=train.micro_batch,
            global_batch=train.global_batch,
            procs=procs,
            state=position,
        )
        scorer = Scorer(self.task, self.validations, self.encoder, train.micro_batch)
        metrics = None
        if procs.is_first:
            run_dir.cut_metrics(progress.step if start is not None else -1)
            metrics = Metrics(run_dir, progress.step, train.steps, None, procs.n_procs)
        encoder = cast(Any, self.encoder)  # asked for its identity alone
        trainer = _Trainer(config, procs, engine, loader, scorer, encoder, run_dir, metrics, guard, progress)
        try:
            trainer.train()
        finally:
            engine.close()
            if metrics is not None:
                metrics.close()

    def _write_results(self, done: Sequence[Config]) -> None:
        primary, config = self.task.metrics[0], self.config
        runs = [results_of_run(RunDir(c.run.dir), c.train.seed, self.epoch, primary) for c in done]
        results = {
            "task": config.data.task,
            "decides": primary,
            "model": config.model.init_from,
            "rule": config.optim.rule,
            "mode": config.optim.mode if config.optim.rule == "gradnormlorp" else None,
            "adapter": config.model.adapter,
            "training_rows": len(self.rows),
            "validation_rows": {f"{prefix}rows": len(rows) for prefix, rows in self.validations.items()},
            "best": summarize([run["best"] for run in runs]),
            "last": summarize([run["last"] for run in runs]),
            "runs": runs,
        }
        write_atomically(self.run_dir.path / "results.json", json.dumps(results, indent=2) + "\n")

    def _results(self) -> dict[str, Any]:
        results: dict[str, Any] = json.loads((self.run_dir.path / "results.json").read_text())
        return results

    def _summary(self) -> str:
        """Return what there is to say at the end."""
        lines = []
        for which in ("best", "last"):
            parts = []
            for name, value in self._results()[which].items():
                spread = "" if value["std"] is None else f" ± {value['std']:.4f}"
                parts.append(f"{name} {value['mean']:.4f}{spread}" if value["mean"] is not None else name)
            lines.append(f"{which} epoch: {', '.join(parts)} ({self.config.train.runs} runs)")
        return "\n".join([*lines, f"results: {self.run_dir.path / 'results.json'}"])

    def _export(self, out: Path) -> None:
        """Write the run whose last epoch is the best."""
        primary = self.task.metrics[0]
        lasts = [_or_worst(run["last"][primary]) for run in self._results()["runs"]]
        config = self.configs[lasts.index(max(lasts))]
        path = checkpoint.complete(RunDir(config.run.dir).checkpoints)[0]
        model, _ = classifier.build(
            self.config, self.shape, config.train.seed, DTYPES[config.precision.params]
        )
        holdings = [hold(name, param) for name, param in model.named_parameters()]
        checkpoint.load(path, {f"model/{h.name}": h.piece for h in holdings}, Procs())
        with draft(out) as folder:
            classifier.merge(model).save_pretrained(folder)
            self.encoder.tokenizer.save_pretrained(folder)
        say(f"exported {path} to {out}")


class _Trainer(Trainer):
    """The training loop on rows; the random numbers of a step are a function of seed, step and process."""

    def micros(self, batch: Any) -> Sequence[Any]:
        """Return this process's micro-batches, before dropout draws anything."""
        which = self.config.train.seed, self.progress.step, self.procs.proc
        torch.manual_seed(int(np.random.SeedSequence(which).generate_state(1, np.uint64)[0]) >> 1)
        return cast(Sequence[Any], batch.micros)


def _objective(engine: Engine, micro: dict[str, torch.Tensor]) -> torch.Tensor:
    return classifier.loss_sum(*classifier.logits(engine.forward, micro, engine.device))


def results_of_run(run_dir: RunDir, seed: int, epoch: int, primary: str) -> dict[str, Any]:
    """Return what a run measured after each epoch, the best of them by `primary`, and the last."""
    entries = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    by_step = {  # a resumed run may have logged a step again
        entry["step"]: {"epoch": entry["step"] / epoch, "step": entry["step"]}
        | {k.removeprefix("valid/"): v for k, v in entry.items() if k.startswith("valid/")}
        for entry in entries
        if "valid/loss" in entry and entry["step"] > 0
    }
    epochs = list(by_step.values())
    if not epochs:
        raise DataError(f"{run_dir.metrics} holds no evaluation: remove {run_dir.path} and run again.")
    best = max(epochs, key=lambda values: _or_worst(values[primary]))
    return {"seed": seed, "best": best, "last": epochs[-1], "epochs": epochs}


def _or_worst(value: float | None) -> float:
    return -math.inf if value is None else value


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return mean and standard deviation (of a sample; None for one run) of each metric over the runs."""
    summary: dict[str, dict[str, float | None]] = {}
    for name in runs[0]:
        if name in ("epoch", "step"):
            continue
        values = [run[name] for run in runs]
        known = all(value is not None for value in values)
        summary[name] = {
            "mean": statistics.mean(values) if known else None,
            "std": statistics.stdev(values) if known and len(values) > 1 else None,
        }
    return summary


if __name__ == "__main__":
    leave(main)
