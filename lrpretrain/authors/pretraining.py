"""The flags of the authors' pretraining scripts, and what they become here.

Source: the parsers of GaLore (jiaweizzhao/GaLore at 2cc66f8, `torchrun_main.py`), GradNormLoRP (Jhhuangkay's
repository at 66c8e76, the same and `test_train.py`) and LORO (mzf666/LORO-main at 4da57b6, `run_c4.py`). The
names and defaults are theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrpretrain import pretrain
from lrpretrain.authors import command_line
from lrpretrain.authors.command_line import REQUIRED, TO_CONFIG, Flag, Translation
from lrpretrain.config import Config, find_shipped
from lrpretrain.errors import Problem
from lrpretrain.optim.groups import PROJECTED


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
    "to_config": TO_CONFIG,
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
NAMED = {
    project: [name + end for end in ("", PER_LAYER) for name in OPTIMIZERS[project]] for project in OPTIMIZERS
}


def main(project: str, argv: Sequence[str] | None = None) -> int:
    """Run a pretraining from the command line of a project's script; return the exit code."""
    return pretrain.main(argv, functools.partial(read, project))


def read(project: str, argv: Sequence[str]) -> tuple[Config, list[Problem | str]]:
    """Translate a command line, as `command_line.read` does."""
    return command_line.read(Pretraining, project, argv)


class Pretraining(Translation[Config]):
    """What the flags of a project's pretraining script become."""

    kind, script, entry = Config, "pretraining", "lrpretrain.pretrain"
    flags, optimizers = FLAGS, NAMED
    idle = dict.fromkeys(MEANINGLESS, "accepted, without a meaning here")

    def translate(self) -> None:
        """Set what no flag becomes by itself."""
        self._engine()
        self._model_and_data()
        self._optimizer()
        self._steps()
        self._schedule()

    def _engine(self) -> None:
        kind = self.stated.get("engine.kind", self.settings["engine.kind"])
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
