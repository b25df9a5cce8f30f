"""The flags of the authors' pretraining scripts, and what they become here.

Source: the parsers of GaLore (jiaweizzhao/GaLore at 2cc66f8, `torchrun_main.py`), GradNormLoRP (Jhhuangkay's
repository at 66c8e76, the same and `test_train.py`) and LORO (mzf666/LORO-main at 4da57b6, `run_c4.py`). The
names and defaults are theirs. Options of our own, --section.field VALUE, may stand among them and win; with
`--to_config FILE` the configuration is only written.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lrpretrain import pretrain
from lrpretrain.artifacts.metrics import say
from lrpretrain.config import Config, find_shipped, from_dict, parse, to_yaml
from lrpretrain.engine.device import env_procs
from lrpretrain.errors import ConfigError, Problem
from lrpretrain.optim.groups import PROJECTED


class Flag(NamedTuple):
    """A flag of a script."""

    kind: Callable[[str], Any] | tuple[str, ...] | None
    """Reads the value; a tuple lists what it can be; None: a switch, which takes none."""
    default: Any = None
    becomes: str | None = None
    """The field that gets its value; None: see `_Translation`."""


REQUIRED = object()


def _tokens(text: str) -> int:
    """Read a number of tokens; 100M and 1B are as they sound."""
    factor = {"M": 10**6, "B": 10**9}.get(text[-1:].upper(), 1)
    return int(text[:-1] if factor > 1 else text) * factor


COMMON = {
    "model_config": Flag(str, REQUIRED),
    "use_hf_model": Flag(None, False),
    "continue_from": Flag(str, None, "run.resume"),
    "batch_size": Flag(int, REQUIRED, "train.micro_batch"),
    "gradient_accumulation": Flag(int),
    "total_batch_size": Flag(int),
    "max_length": Flag(int, 256, "data.seq_len"),
    "optimizer": Flag(str.lower, "adam"),
    "lr": Flag(float, 1e-4, "optim.lr"),
    "scheduler": Flag(("linear", "cosine", "cosine_restarts"), "cosine"),
    "min_lr_ratio": Flag(float, 0.1, "train.min_lr_ratio"),
    "activation_checkpointing": Flag(None, False),
    "weight_decay": Flag(float, 0.0, "optim.weight_decay"),
    "warmup_steps": Flag(int, 1000, "train.warmup_steps"),
    "eval_every": Flag(int, 5000, "train.eval_every"),
    "num_training_steps": Flag(int, 10_000, "train.steps"),
    "max_train_tokens": Flag(_tokens),
    "save_every": Flag(int, 10_000, "train.save_every"),
    "save_dir": Flag(str),
    "tags": Flag(str),
    "dtype": Flag(("bfloat16", "bf16", "float32", "fp32"), "bfloat16"),
    "workers": Flag(int, 8, "data.workers"),
    "seed": Flag(int, 0, "train.seed"),
    "name": Flag(str, "test"),
    "grad_clipping": Flag(float, 0.0),
    "beta1": Flag(float, 0.0),
    "rank": Flag(int, 128),
    "update_proj_gap": Flag(int, 50),
    "galore_scale": Flag(float, 1.0),
    "proj_type": Flag(("std", "reverse_std", "left", "right", "full"), "std"),
    "single_gpu": Flag(None, False),
    "to_config": Flag(str),  # ours
}
LORO = {
    "scheduler": Flag(("linear", "cosine", "const", "cosine_restart", "cosine_restart_zero"), "cosine"),
    "loro_type": Flag(("loro", "eucl"), "loro"),
    "loro_freq": Flag(int, 1),
    "loro_refresh": Flag(("all", "lrk", "reg")),
    "loro_refresh_freq": Flag(int, 0),
    "loro_attn_rank": Flag(int, 128),
    "loro_mlp_rank": Flag(int, 128),
    "loro_init": Flag(str, "xavier"),
    "loro_scope": Flag(("all", "attn", "mlp")),
    "loro_lr_scaler": Flag(float, 1.0),
    "loro_mlp_dense": Flag(None, False),
    "cosine_restart_freq": Flag(int),
    "cosine_restart_warmup": Flag(int, 5),
    "lr_jag_after_warmup": Flag(None, False),
    "lr_adjust_steps": Flag(int, 0),
    "save_ckpt": Flag(None, False),
}
FLAGS = {"galore": COMMON, "gradnormlorp": COMMON, "loro": COMMON | LORO}
NAMES = {"galore": "GaLore", "gradnormlorp": "GradNormLoRP", "loro": "LORO"}
MEANINGLESS = ("use_hf_model", "tags", "name", "save_ckpt")
TARGETS = {"attn": "*.self_attn.*_proj", "mlp": "*.mlp.*_proj"}

_ADAM = {"optim.rule": "adamw", "optim.eps": 1e-8}
_EIGHT = {"optim.moments": "int8", "optim.eps": 1e-8}
_FACTOR = {"optim.base": "adafactor"}
GENERAL: dict[str, dict[str, Any]] = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "sgd": {"optim.rule": "sgd"},
    "adafactor": {"optim.rule": "adafactor"},
    "adam8bit": _ADAM | _EIGHT,
    "galore_adamw": {"optim.rule": "galore"},
    "galore_adafactor": {"optim.rule": "galore"} | _FACTOR,
    "galore_adamw8bit": {"optim.rule": "galore"} | _EIGHT,
}
_NORM = {"optim.rule": "gradnormlorp"}
OPTIMIZERS = {
    "galore": GENERAL,
    "gradnormlorp": GENERAL
    | {
        "lowrank": _NORM | {"optim.mode": "lowrank_wn"},
        "weight_norm_galore_adamw": _NORM,
        "weight_norm_galore_adafactor": _NORM | _FACTOR,
        "weight_norm_galore_adamw8bit": _NORM | _EIGHT,
    },
    "loro": GENERAL | {"loro_adamw": {}},
}
PER_LAYER = "_per_layer"


def main(project: str, argv: Sequence[str] | None = None) -> int:
    """Run a pretraining from the command line of a project's script; return the exit code."""
    return pretrain.main(argv, functools.partial(read, project))


def read(project: str, argv: Sequence[str]) -> tuple[Config, list[Problem | str]]:
    """Translate a command line; return the configuration, and everything that is wrong with the line.

    The first process prints what differs from the defaults, as a valid --config, and from the authors' code.
    `--help` and `--to_config FILE` exit. Raises ConfigError where there is nothing to check further.
    """
    if any(a in ("-h", "--help") for a in argv):
        print(_help(project))
        raise SystemExit(0)
    problems: list[Problem | str] = []
    values, own = _split(FLAGS[project], argv, problems)
    if problems:
        raise ConfigError(problems)
    found = _Translation(project, values, own)
    tree: dict[str, dict[str, Any]] = {}
    for key, value in found.settings.items():
        if value is not None:
            section, name = key.split(".")
            tree.setdefault(section, {})[name] = value
    config, wrong = parse(own, onto=from_dict(tree))
    problems = [*found.problems, *wrong]
    if problems:
        if values["to_config"]:
            raise ConfigError(problems)
        return config, problems
    if env_procs()[0] == 0:
        say("The configuration, where it differs from the defaults:")
        say(yaml.safe_dump(_changed(config), sort_keys=False).rstrip())
        say(f"Differs from {NAMES[project]}'s code in:")
        for note in found.notes:
            say(f"- {note}")
    if values["to_config"]:
        _write(values["to_config"], config)
        raise SystemExit(0)
    return config, []


def _split(
    flags: Mapping[str, Flag], argv: Sequence[str], problems: list[Problem | str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the value of every flag, and the options of our own as they stand."""
    values = {name: flag.default for name, flag in flags.items()}
    own: list[str] = []
    rest = deque(argv)
    while rest:
        argument = rest.popleft()
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            problems.append(f"{argument!r} is not an option. `--help` lists them")
            continue
        flag = flags.get(name)
        ours = "." in name or name in ("local_rank", "local-rank")  # launchers add the latter
        takes = ours or (not rest[0].startswith("--") if flag is None and rest else flag and flag.kind)
        value = text if equals else rest.popleft() if takes and rest else None
        if ours:
            own += [f"--{name}"] if value is None else [f"--{name}={value}"]
        elif flag is None:
            near = difflib.get_close_matches(name, flags, n=1)
            remedy = f"Perhaps --{near[0]} is meant" if near else "`--help` lists them"
            problems.append(Problem(f"--{name}", value, "is not a flag of the script", remedy))
        elif flag.kind is None:
            values[name] = True
            if value is not None:
                problems.append(Problem(f"--{name}", value, "takes no value", f"Write --{name}"))
        elif value is None:
            problems.append(Problem(f"--{name}", None, "has no value", f"Write --{name} VALUE"))
        else:
            values[name] = _value(name, flag.kind, value, problems)
    missing = (name for name, value in values.items() if value is REQUIRED)
    problems += [Problem(f"--{name}", None, "is required", f"Write --{name} VALUE") for name in missing]
    return values, own


def _value(name: str, kind: Any, text: str, problems: list[Problem | str]) -> Any:
    if isinstance(kind, tuple):
        if text not in kind:
            problems.append(Problem(f"--{name}", text, "is not known", f"Use one of {', '.join(kind)}"))
        return text
    try:
        return kind(text)
    except ValueError:
        wanted = {float: "a number", str: "text"}.get(kind, "a whole number")
        problems.append(Problem(f"--{name}", text, f"is not {wanted}", "Give one"))
        return None


class _Translation:
    """What the values of the flags become: settings by field, notes on what differs, problems."""

    def __init__(self, project: str, values: Mapping[str, Any], own: Sequence[str]):
        self.project, self.values = project, values
        self.stated = dict(option.removeprefix("--").split("=", 1) for option in own if "=" in option)
        self.n_procs = env_procs()[1]
        self.problems: list[Problem | str] = []
        self.notes: list[str] = []
        flags = FLAGS[project]
        self.settings = {f.becomes: values[name] for name, f in flags.items() if f.becomes is not None}
        self._engine()
        self._model_and_data()
        self._optimizer()
        self._steps()
        self._schedule()
        if idle := [
            f"--{name}"
            for name in MEANINGLESS
            if values.get(name) != getattr(flags.get(name), "default", None)
        ]:
            self.notes.append(f"{', '.join(idle)}: accepted, without a meaning here")

    def _refuse(self, flag: str, reason: str, remedy: str) -> None:
        self.problems.append(Problem(f"--{flag}", self.values[flag], reason, remedy))

    def _engine(self) -> None:
        kind = "local" if self.n_procs == 1 else "ddp"
        self.settings["engine.kind"] = kind
        kind = self.stated.get("engine.kind", kind)
        if self.values["single_gpu"] and self.n_procs > 1:
            reason = f"{self.n_procs} processes were started"
            self._refuse("single_gpu", reason, "Start one, or leave it out")
        if self.values["dtype"] in ("bfloat16", "bf16"):
            self.settings["precision.compute"] = "bfloat16"
            if kind == "zero":
                self.notes.append("ZeRO updates float32 weights; bfloat16 is the arithmetic (theirs: both)")
            else:
                self.settings["precision.params"] = "bfloat16"

    def _model_and_data(self) -> None:
        values, name = self.values, self.values["model_config"]
        stem = Path(name).stem
        shipped = not Path(name).is_file() and find_shipped("model_configs", stem) is not None
        self.settings["model.config"] = stem if shipped else name
        if values["activation_checkpointing"]:
            self.settings["model.checkpointing"] = "full"
        self.settings["run.dir"] = values["save_dir"] or f"runs/{stem}_{values['optimizer']}"
        self.settings["data.source"] = "hub"
        if self.stated.get("data.source", "hub") in ("hub", "files"):
            self.settings["data.tokenizer"] = "t5-base"
        once = "" if self.project == "loro" else "; their loader gives each of --workers one in that many"
        self.notes += [
            f"documents come in an order of the seed, each once in a pass{once}",
            "a step takes the mean over its tokens, theirs the mean of the means of micro-batches",
            "valid/loss is the mean over all tokens; theirs divides by one batch too many",
            "a run started again goes on with optimizer, schedule and data; theirs has weights and counters",
        ]

    def _optimizer(self) -> None:
        values, name = self.values, self.values["optimizer"]
        known = OPTIMIZERS[self.project]
        plain = name.removesuffix(PER_LAYER)
        if plain not in known:
            self._refuse("optimizer", "is not known", f"Use one of {', '.join(known)}")
            return
        if plain != name:
            self.settings["optim.per_layer"] = True
            self.notes.append(
                "blocks are updated once a step, in its last backward, and all flags count steps; theirs"
                " updates in every micro-batch, and doubles the steps of the schedule and the gap"
            )
            if values["grad_clipping"]:
                self.notes.append("gradients are clipped by the norm of the step before; theirs are not")
            name = plain
        if self.project == "loro":
            self._loro(name)
        self.settings |= {k: v for k, v in known[name].items() if k not in self.settings}
        rule = self.settings.get("optim.rule")
        if rule in PROJECTED:
            self.settings |= {
                "optim.rank": values["rank"],
                "optim.refresh_every": values["update_proj_gap"],
                "optim.scale": values["galore_scale"],
                "optim.side": values["proj_type"],
                "optim.subspace": "svd",
            }
            self.notes.append("bases come by SVD, as theirs; --optim.subspace warm finds them in less time")
        if rule == "sgd" or "adafactor" in name:
            self.settings["optim.momentum"] = values["beta1"]
        if name in ("adam", "adamw", "adam8bit"):
            self.notes.append("eps is added before the bias correction, and weight decay decoupled")
        if "8bit" in name:
            self.notes.append(
                "eight-bit blocks lie within rows"
                + ("" if name == "adam8bit" else "; only moments of projected gradients have eight bits")
            )
        if self.project == "gradnormlorp" and name.startswith("weight_norm"):
            self.notes.append(
                "magnitudes persist and gradients are tangential (optim.mode=weightnorm);"
                " theirs changes no weight, or does not run"
            )
        if self.project == "gradnormlorp" and name.startswith("galore"):
            self.notes.append("all weights are trained; theirs trains adapters beside frozen random ones")
        if name == "lowrank":
            self.notes.append(
                "a row or vector that is zero is trained without normalisation; theirs turns NaN"
            )
        self.settings["train.clip_norm"] = values["grad_clipping"] or None

    def _loro(self, name: str) -> None:
        """Set what the flags of low-rank weights say."""
        values, settings = self.values, self.settings
        scope = values["loro_scope"]
        if scope is not None and values["loro_mlp_dense"]:
            scope = {"all": "attn", "attn": "attn"}.get(scope)
        if scope is None:
            if values["loro_refresh"]:
                self._refuse("loro_refresh", "needs low-rank weights", "Give --loro_scope, or leave it out")
            settings |= {"optim.rule": "adamw"} if name == "loro_adamw" else {}
            return
        if name not in ("loro_adamw", "adam", "adamw"):
            remedy = "Use loro_adamw, or leave --loro_scope out"
            self._refuse("optimizer", "does not train low-rank weights", remedy)
            return
        rule = "loro" if (name, values["loro_type"]) == ("loro_adamw", "loro") else "factored"
        settings |= {
            "optim.rule": rule,
            "optim.targets": [TARGETS[scope]] if scope in TARGETS else None,
            "optim.attn_rank": None if scope == "mlp" else values["loro_attn_rank"],
            "optim.mlp_rank": None if scope == "attn" else values["loro_mlp_rank"],
            "optim.init": values["loro_init"],
            "optim.refresh_moments": values["loro_refresh"] or "none",
        }
        if rule == "loro":
            settings |= {
                "optim.exact_every": values["loro_freq"],
                "optim.lr_scaler": values["loro_lr_scaler"],
            }
            self.notes.append("a pair of deficient rank takes a lazy step in the place of an exact one")
        if values["loro_refresh"]:
            if values["loro_refresh_freq"] < 1:
                self._refuse("loro_refresh_freq", "must be at least 1 with --loro_refresh", "Raise it")
            elif rule != "loro" or values["loro_refresh_freq"] != values["loro_freq"]:
                settings["optim.refresh_moments_every"] = values["loro_refresh_freq"]
        if values["loro_init"] in ("orth", "xavorth"):
            self.notes.append(
                f"--loro_init {values['loro_init']} holds in bfloat16 too; theirs is normal there"
            )
        if values["grad_clipping"]:
            self.notes.append("--grad_clipping clips all gradients; theirs those of dense weights")

    def _steps(self) -> None:
        values = self.values
        slots = values["batch_size"] * self.n_procs
        accumulation, total = values["gradient_accumulation"], values["total_batch_size"]
        if total and accumulation and total != accumulation * slots:
            reason = f"is not {self.n_procs} processes × {values['batch_size']} × {accumulation} accumulation"
            self._refuse("total_batch_size", reason, "Leave one of them out")
        self.settings["train.global_batch"] = total = total or slots * (accumulation or 1)
        if values["max_train_tokens"]:
            per_step = total * values["max_length"]
            self.settings["train.steps"] = values["max_train_tokens"] // per_step
            self.notes.append(
                f"--max_train_tokens / {per_step:,} tokens a step are the steps; theirs / {total}"
            )
        self.notes.append("the steps are those of --num_training_steps; theirs makes one more")

    def _schedule(self) -> None:
        values, settings, kind = self.values, self.settings, self.values["scheduler"]
        restarts = kind in ("cosine_restart", "cosine_restart_zero")
        if kind == "cosine_restarts":
            self._refuse("scheduler", "lacks its arguments, in their script too", "Use cosine")
            return
        settings["train.schedule"] = "linear" if kind == "const" else kind
        if kind in ("linear", "const"):
            settings["train.min_lr_ratio"] = 1.0 if kind == "const" else 0.0
        if values.get("lr_adjust_steps") and (values["lr_adjust_steps"] > 0 or not restarts):
            self._refuse("lr_adjust_steps", "is for cosine_restart, and not above 0", "Leave it out")
        if not restarts:
            return
        every = values["cosine_restart_freq"]
        if every is None:
            self._refuse("cosine_restart_freq", f"{kind} needs it", "Give a number of steps")
        compat = self.stated.get("train.restart_at") == "compat"
        exact = settings.get("optim.exact_every") if settings.get("optim.refresh_moments") != "none" else None
        refresh = settings.get("optim.refresh_moments_every") or exact
        if refresh and not compat:
            every = refresh
        if not compat:
            self.notes.append(
                f"the learning rate has a ramp after every {every} steps, where refreshes are; theirs are"
                " counted apart after the warm-up (--train.restart_at compat)"
            )
        settings |= {
            "train.restart_every": every,
            "train.restart_warmup_steps": values["cosine_restart_warmup"],
            "train.restart_in_warmup": not values["lr_jag_after_warmup"],
            "train.peak_delay_steps": max(-values["lr_adjust_steps"], 0),
        }
        if kind == "cosine_restart_zero":
            self.notes.append("the first step has the rate 0; theirs goes on to the next rate")


def _changed(config: Config) -> dict[str, dict[str, Any]]:
    """Return the fields that differ from their defaults, by section."""
    ours, defaults = (json.loads(json.dumps(asdict(c))) for c in (config, Config()))  # tuples are lists there
    changed = {
        section: {name: value for name, value in fields.items() if value != defaults[section][name]}
        for section, fields in ours.items()
    }
    return {section: fields for section, fields in changed.items() if fields}


def _write(path: str, config: Config) -> None:
    if env_procs()[0] != 0:
        return
    try:
        Path(path).write_text(to_yaml(config))
    except OSError as error:
        raise ConfigError(
            [Problem("--to_config", path, f"cannot be written: {error}", "Name a file")]
        ) from error
    say(f"written to {path}")


def _help(project: str) -> str:
    """Return the flags, with their defaults and the fields that they become."""
    lines = [
        f"The flags of {NAMES[project]}'s pretraining script. Options of lrpretrain.pretrain may be added."
    ]
    for name, (kind, default, becomes) in FLAGS[project].items():
        shown = "" if kind is None else "REQUIRED" if default is REQUIRED else str(default)
        choices = f"one of {', '.join(kind)}" if isinstance(kind, tuple) else ""
        lines.append(f"  --{name} {shown}".ljust(36) + (f"→ {becomes}" if becomes else choices))
    lines.append(f"--optimizer: {', '.join(OPTIMIZERS[project])}; with {PER_LAYER} at the end layer by layer")
    return "\n".join(lines)
