"""Runs beside each other: report.md, a table, and report.png, curves, from what lies in their folders.

`lrpretrain report` makes them of any runs, `lrpretrain compare` of those that it trains. Runs that differ in
nothing but learning rate and seed are a rule's; others have names of their own.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lrpretrain.artifacts.metrics import perplexity
from lrpretrain.artifacts.rundir import RunDir, write_atomically
from lrpretrain.config import Config, flat, from_dict
from lrpretrain.errors import ConfigError, DataError, UnsoundError
from lrpretrain.model import llama
from lrpretrain.train import memory

COLUMNS = [
    *("rule", "learning rate", "runs", "validation perplexity", "tokens/s", "optimizer ms a step"),
    *("GiB: weights", "gradients", "optimizer state", "peak"),
]
ALL_COLUMNS = ["rule", "learning rate", "seed", "validation loss", "perplexity", "state", "folder"]
CAPTION = """\
Each rule at the best of its learning rates, by the last validation loss of the lowest seed of each, which
counts in the mean as well. ± is the standard deviation over runs that differ in the seed only. Times and
tokens/s are those of training, without evaluating and saving. Memory is of a process: weights and gradients
by arithmetic (`lrpretrain show`), optimizer state and peak as measured on the first one (a GPU's allocator;
on a CPU, resident).
"""


class Point(NamedTuple):
    """An evaluation: after so many tokens, and seconds of training."""

    tokens: int
    seconds: float
    loss: float


@dataclass(frozen=True, eq=False)
class Run:
    """What a run folder holds."""

    path: Path
    config: Config
    status: dict[str, Any]
    environment: dict[str, Any]
    entries: list[dict[str, Any]]
    """The lines of metrics.jsonl."""

    @property
    def finished(self) -> bool:
        return self.status.get("state") == "finished" and self.status["step"] >= self.config.train.steps

    @property
    def diverged(self) -> bool:
        return self.status.get("exit_code") == UnsoundError.exit_code

    @property
    def machine(self) -> dict[str, Any]:
        return {key: self.environment.get(key) for key in ("n_procs", "device")}

    @property
    def state(self) -> str:
        """Say how the run ended, or how far it is."""
        if self.finished:
            return "finished" if self.loss is not None else "finished without a finite validation loss"
        how = "diverged" if self.diverged else self.status.get("state", "not begun")
        return f"{how} at step {self.status.get('step', 0):,} of {self.config.train.steps:,}"

    @functools.cached_property
    def points(self) -> list[Point]:
        """Its evaluations. A loss that is not finite counts as infinite."""
        points, seconds, before = [], 0.0, 0
        for entry in self.entries:
            if "perf/step_ms" in entry:  # the mean since the line before
                seconds += entry["perf/step_ms"] / 1e3 * (entry["step"] - before)
                before = entry["step"]
            if "valid/loss" in entry:
                loss = math.inf if entry["valid/loss"] is None else entry["valid/loss"]
                points.append(Point(entry["tokens"], seconds, loss))
        return points

    @property
    def loss(self) -> float | None:
        """The validation loss at the end; None of a run that did not get there, or to none that is finite."""
        losses = [point.loss for point in self.points]
        return losses[-1] if self.finished and losses and losses[-1] < math.inf else None

    @property
    def tokens_per_s(self) -> float:
        """Tokens in a second of training."""
        return self.points[-1].tokens / max(self.points[-1].seconds, 1e-9)

    @property
    def optim_ms(self) -> float:
        """Milliseconds that the update of a step took on average."""
        before, total = 0, 0.0
        for entry in self.entries:
            if "perf/optim_ms" in entry:
                total += entry["perf/optim_ms"] * (entry["step"] - before)
                before = entry["step"]
        return total / max(before, 1)

    def gib(self, key: str) -> float:
        """Return the most memory that was logged as `key`."""
        return max((entry[key] for entry in self.entries if key in entry), default=math.nan)


def read(path: Path) -> Run:
    """Read a run folder. Raises DataError where there is none, ConfigError for one of another version."""
    try:
        config = from_dict(yaml.safe_load((path / "config.yaml").read_text()))
    except OSError as error:
        raise DataError(f"{path} is not a run folder: it has no config.yaml. Name one that has.") from error
    environment, metrics = path / "environment.json", RunDir(path).metrics
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return Run(
        path,
        config,
        RunDir(path).read_status(),
        json.loads(environment.read_text()) if environment.exists() else {},
        [json.loads(line) for line in lines if line.endswith("\n")],  # the last one may be in the making
    )


def settings(config: Config) -> dict[str, Any]:
    """Return all fields but those that runs of a rule may differ in: rule, learning rate, seed, folder."""
    apart = ("optim.rule", "optim.lr", "train.seed", "run.dir", "run.resume")
    return {key: value for key, value in flat(config).items() if key not in apart}


def by_name(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the runs by rule, or, where runs of a rule have other settings, by rule and these."""
    rules: dict[str, list[Run]] = {}
    for run in runs:
        rules.setdefault(run.config.optim.rule, []).append(run)
    named: dict[str, list[Run]] = {}
    for rule, its in rules.items():
        varied = _varied([settings(run.config) for run in its])
        for run in its:
            name = [rule, *(f"{key}={settings(run.config)[key]}" for key in varied)]
            named.setdefault(" ".join(name), []).append(run)
    for its in named.values():
        its.sort(key=lambda run: (run.config.optim.lr, run.config.train.seed))
    return named


def best(runs: Sequence[Run]) -> float | None:
    """Return the learning rate whose lowest seed has the lowest loss at the end; None where none has one."""
    lowest = {}
    for run in sorted(runs, key=lambda run: run.config.train.seed, reverse=True):
        lowest[run.config.optim.lr] = run.loss
    ended = {lr: loss for lr, loss in lowest.items() if loss is not None}
    return min(ended, key=lambda lr: ended[lr], default=None)


def write(runs: Sequence[Run], out: Path) -> str:
    """Write report.md and report.png into a folder; return the table. Raises ConfigError as `canvas` does."""
    out.mkdir(parents=True, exist_ok=True)
    named = by_name(runs)
    chosen = {name: [r for r in its if r.config.optim.lr == best(its)] for name, its in named.items()}
    _draw(chosen, out / "report.png")
    table = _table(COLUMNS, (_row(name, its) for name, its in named.items()))
    each = ((name, run) for name, its in named.items() for run in its)
    every = _table(ALL_COLUMNS, (_one(name, run, run in chosen[name], out) for name, run in each))
    parts = ["# Comparison", _where(runs[0]), *_differing(runs), table, CAPTION.strip()]
    parts += ["![validation loss against tokens and against time](report.png)", "## Every run", every]
    write_atomically(out / "report.md", "\n\n".join(parts) + "\n")
    return table


def _row(name: str, runs: Sequence[Run]) -> list[str]:
    """Return the line of a rule: of its runs at the best learning rate."""
    lr, lrs = best(runs), sorted({run.config.optim.lr for run in runs})
    if lr is None:
        return [name, ", ".join(f"{each:g}" for each in lrs), "0", "; ".join(sorted({r.state for r in runs}))]
    at_edge = "the only one" if len(lrs) == 1 else {lrs[0]: "the smallest", lrs[-1]: "the largest"}.get(lr)
    its = [run for run in runs if run.config.optim.lr == lr]
    ended = [run for run in its if run.loss is not None]
    ppls = [perplexity(run.loss) for run in ended if run.loss is not None]
    spread = f" ± {statistics.stdev(ppls):.2f}" if len(ppls) > 1 else ""
    return [
        name,
        f"{lr:g}" + (f" ({at_edge} tried)" if at_edge else ""),
        f"{len(ended)}" + (f" of {len(its)}" if len(ended) < len(its) else ""),
        f"{statistics.mean(ppls):.2f}{spread}",
        f"{statistics.mean(run.tokens_per_s for run in ended):,.0f}",
        f"{statistics.mean(run.optim_ms for run in ended):,.2f}",
        *_by_arithmetic(ended[0]),
        *(f"{max(run.gib(key) for run in ended):.3g}" for key in ("mem/optim_gib", "mem/peak_gib")),
    ]


def _by_arithmetic(run: Run) -> list[str]:
    """Return the GiB of weights and of gradients on the process with most of them."""
    try:
        found = memory.costs(run.config, llama.configured(run.config), run.environment["n_procs"])
    except (ConfigError, KeyError):  # the file of the model is elsewhere
        return ["–", "–"]
    return [f"{size.max() / 2**30:.3g}" for size in (found.weights, found.gradients)]


def _one(name: str, run: Run, is_chosen: bool, out: Path) -> list[str]:
    """Return the line of a single run; the learning rate is bold where it is the best."""
    lr, seed, loss = run.config.optim.lr, run.config.train.seed, run.loss
    measured = ["–", "–"] if loss is None else [f"{loss:.4f}", f"{perplexity(loss):.2f}"]
    reason = "" if run.finished or run.diverged else run.status.get("reason", "")
    ended = run.state + (f": {reason.splitlines()[0]}" if reason else "")
    rate, folder = f"**{lr:g}**" if is_chosen else f"{lr:g}", os.path.relpath(run.path, out)
    return [name, rate, str(seed), *measured, ended, folder]


def _where(run: Run) -> str:
    """Say what was trained, on what."""
    config, at = run.config, run.environment
    train, data, floats = config.train, config.data, config.precision
    return (
        f"{config.model.config} on data.source={data.source}: {train.steps:,} steps of"
        f" {train.global_batch} × {data.seq_len} tokens; {floats.compute} over {floats.params};"
        f" {config.engine.kind}, {at.get('n_procs', '?')} × {at.get('device', '?')},"
        f" torch {at.get('packages', {}).get('torch', '?')}."
    )


def _differing(runs: Sequence[Run]) -> list[str]:
    """Say what differs between runs beside rule, learning rate and seed: then so may their budgets."""
    seen = [settings(run.config) | run.machine for run in runs]
    lines = []
    for key in _varied(seen):
        whose: dict[str, list[str]] = {}
        for run, its in zip(runs, seen, strict=True):
            whose.setdefault(str(its.get(key, "?")), []).append(run.config.optim.rule)
        values = (f"{value} ({', '.join(dict.fromkeys(rules))})" for value, rules in whose.items())
        lines.append(f"- {key}: {'; '.join(values)}")
    return ["Beside rule, learning rate and seed, the runs differ in:", "\n".join(lines)] if lines else []


def _varied(seen: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values are not all the same."""
    return [key for key in seen[0] if any(its.get(key) != seen[0][key] for its in seen)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([*row, *[""] * (len(columns) - len(row))] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def canvas() -> Any:
    """Return an empty figure of matplotlib, which draws without a display. Raises ConfigError without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "Install the extra `report`: pip install 'lrpretrain[report]'"
        raise ConfigError([f"curves need matplotlib, which is not installed. {remedy}"]) from error
    return Figure(figsize=(12, 4.5), layout="constrained")


def _draw(chosen: dict[str, list[Run]], file: Path) -> None:
    """Draw the validation losses of all seeds, a colour for each rule, without those before training."""
    figure = canvas()
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, runs) in enumerate(chosen.items()):
        for run in runs:
            points = run.points[1:] or run.points
            losses = [point.loss for point in points]
            style = {"color": f"C{number}", "marker": ".", "linewidth": 1}
            if run is runs[0]:
                style["label"] = f"{name}, {run.config.optim.lr:g}"
            left.plot([point.tokens for point in points], losses, **style)
            right.plot([point.seconds / 60 for point in points], losses, **style)
    left.set(xlabel="tokens", ylabel="validation loss")
    right.set(xlabel="training time in minutes")
    if any(chosen.values()):
        left.legend()
    figure.savefig(file, format="png", dpi=120)
