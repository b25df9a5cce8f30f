"""Which rule is better? Each at the best of a few learning rates, with several seeds, on the same data.

`lrpretrain compare` trains one run after the other, each in processes of its own and in a run folder of its
own, and goes on where it was stopped. lrpretrain/report.py writes what comes out.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lrpretrain.artifacts.metrics import say
from lrpretrain.artifacts.rundir import RunDir, write_atomically
from lrpretrain.config import Config, OptimConfig, RunConfig, to_yaml
from lrpretrain.errors import EXIT_STOPPED, LrpretrainError, Problem
from lrpretrain.report import Run, best, read, settings
from lrpretrain.train import plan

BASE = ["--config=llama_toy_galore"]  # without --config
VARIED = {"optim.rule": "--rules", "optim.lr": "--lrs", "train.seed": "--seeds"}
VARIED |= {"run.dir": "--out", "run.resume": "--out"}


class StoppedError(LrpretrainError):
    """A comparison that a signal stopped; started again, it goes on."""

    exit_code = EXIT_STOPPED


class Comparison:
    """Rules, learning rates and seeds to be compared by a configuration, in folders below `out`."""

    def __init__(
        self, config: Config, rules: Sequence[Any], lrs: Sequence[float], seeds: Sequence[int], out: Path
    ):
        self.config, self.out = config, out
        self.rules, self.lrs, self.seeds = dict.fromkeys(rules), sorted(set(lrs)), sorted(set(seeds))

    def of(self, rule: Any, lr: float, seed: int) -> Config:
        """Return the configuration of one run."""
        config, folder = self.config, self.out / f"{rule}_lr{lr:g}_seed{seed}"
        optim, train = replace(config.optim, rule=rule, lr=lr), replace(config.train, seed=seed)
        return replace(config, optim=optim, train=train, run=RunConfig(str(folder)))

    def problems(self, n_procs: int) -> list[Problem | str]:
        """Return everything that cannot work in any of the runs, or in going on with those there are."""
        found: list[Problem | str] = []
        if self.config.train.eval_every == 0:
            reason, remedy = "nothing would be compared", "Give the steps between two evaluations"
            found.append(Problem("train.eval_every", 0, reason, remedy))
        known = get_args(get_type_hints(OptimConfig)["rule"])
        remedy = f"Use some of {','.join(known)}"
        found += [Problem("--rules", rule, "is no rule", remedy) for rule in self.rules if rule not in known]
        rules = [rule for rule in self.rules if rule in known]
        for choice in itertools.product(rules, self.lrs, self.seeds):
            config = self.of(*choice)
            wrong = plan.problems(config, n_procs) + _others(config, self.out)
            found += [problem for problem in wrong if problem not in found]
        return found

    def train(self, n_procs: int) -> tuple[list[Run], list[str]]:
        """Train what is not trained yet; return all runs, and what went wrong other than diverging.

        Of each rule all learning rates have the first seed, and the best one the other seeds. Raises
        StoppedError on a signal.
        """
        runs: list[Run] = []
        failed: list[str] = []

        def train(rule: str, lr: float, seed: int) -> Run:
            run, wrong = _train(self.of(rule, lr, seed), n_procs)
            runs.append(run)
            failed.extend(wrong)
            said = run.state if run.loss is None else f"validation loss {run.loss:.4f}"
            say(f"{run.path}: {said}")
            return run

        for rule in self.rules:
            chosen = best([train(rule, lr, self.seeds[0]) for lr in self.lrs])
            if chosen is not None:
                for seed in self.seeds[1:]:
                    train(rule, chosen, seed)
        return runs, failed


def _others(config: Config, out: Path) -> list[Problem | str]:
    """Return what was configured otherwise in a run that lies there already."""
    if not Path(config.run.dir, "config.yaml").exists():
        return []
    wanted, there = settings(config), settings(read(Path(config.run.dir)).config)
    remedy = "Go on with that value, or name another folder as --out"
    return [
        Problem(key, wanted[key], f"a run in {out} has {there[key]!r}", remedy)
        for key in wanted
        if wanted[key] != there[key]
    ]


def _train(config: Config, n_procs: int) -> tuple[Run, list[str]]:
    """Train one run, unless it is finished or has diverged; return it, with what else went wrong."""
    folder, run_dir = Path(config.run.dir), RunDir(config.run.dir)
    if (folder / "config.yaml").exists():
        run = read(folder)
        if run.finished or run.diverged:
            return run, []
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", to_yaml(config))  # again: the folder may have been moved
    say(f"{folder}: training; what it prints is in {folder / 'output.log'}")
    before = run_dir.read_status().get("step", 0)
    run_dir.write_status("running", before)  # what is there afterwards is of this start
    stopped, code = launch(folder, n_procs)
    run = read(folder)
    if stopped or run.status.get("exit_code") == EXIT_STOPPED:
        raise StoppedError(f"{folder} is stopped, {run.state}. The same command goes on.")
    if run.finished or run.diverged:
        return run, []
    reason = run.status.get("reason") or f"ended with exit code {code}"
    return run, [f"{folder}: {reason}; see {folder / 'output.log'}"]


def launch(folder: Path, n_procs: int) -> tuple[bool, int]:
    """Run the training of a folder's config.yaml in processes of their own, signals passed on to them.

    Returns whether there was one, and the exit code: torchrun's is 1 for any failure.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_procs)]
    training = ["-m", "lrpretrain.pretrain", "--config", str(folder / "config.yaml")]
    command = [sys.executable, *(torchrun if n_procs > 1 else []), *training]
    passed_on: list[int] = []
    with open(folder / "output.log", "a") as log:
        # In a session of its own: the signals of a terminal reach it by way of us, once.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def pass_on(number: int, _: Any) -> None:
        passed_on.append(number)
        process.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return bool(passed_on), code
