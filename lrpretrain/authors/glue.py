"""The flags of the authors' GLUE scripts, and what they become here.

Source: the parsers of GradNormLoRP (Jhhuangkay's repository at 66c8e76, `test_fine.py`) and LORO
(mzf666/LORO-main at 4da57b6, `run_glue.py`). The names and defaults are theirs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrpretrain import finetune
from lrpretrain.authors import command_line
from lrpretrain.authors.command_line import REQUIRED, TO_CONFIG, Flag, Translation
from lrpretrain.config import FinetuneConfig
from lrpretrain.data.glue import TASKS
from lrpretrain.errors import Problem
from lrpretrain.optim.groups import PROJECTED

CONSTANT = ("constant", "constant_with_warmup")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", *CONSTANT)
COMMON = {
    "lora_r": Flag(int, 8),
    "load_pretrained_model": Flag(str),
    "task_name": Flag(tuple(TASKS), None, "data.task"),
    "train_file": Flag(str, None, "data.path"),
    "validation_file": Flag(str, None, "data.validation_path"),
    "max_length": Flag(int, 128, "data.seq_len"),
    "pad_to_max_length": Flag(None, False),
    "model_name_or_path": Flag(str, REQUIRED, "model.init_from"),
    "use_slow_tokenizer": Flag(None, False),
    "per_device_train_batch_size": Flag(int, 8, "train.micro_batch"),
    "per_device_eval_batch_size": Flag(int, 8),
    "learning_rate": Flag(float, 5e-5, "optim.lr"),
    "weight_decay": Flag(float, 0.0, "optim.weight_decay"),
    "num_train_epochs": Flag(int, 3, "train.epochs"),
    "max_train_steps": Flag(int, None, "train.steps"),
    "gradient_accumulation_steps": Flag(int, 1),
    "lr_scheduler_type": Flag(SCHEDULES, "linear"),
    "num_warmup_steps": Flag(int, 0, "train.warmup_steps"),
    "output_dir": Flag(str),
    "seed": Flag(int, None, "train.seed"),
    "push_to_hub": Flag(None, False),
    "hub_model_id": Flag(str),
    "hub_token": Flag(str),
    "trust_remote_code": Flag(bool, False),
    "checkpointing_steps": Flag(str),
    "resume_from_checkpoint": Flag(str),
    "with_tracking": Flag(None, False),
    "report_to": Flag(str, "all"),
    "ignore_mismatched_sizes": Flag(None, False),
    "update_proj_gap": Flag(int, 50),
    "galore_scale": Flag(float, 1.0),
    "proj_type": Flag(("std", "reverse_std", "left", "right", "full"), "std"),
    "lora_all_modules": Flag(None, False),
    "eval_llama": Flag(None, False),
    "to_config": TO_CONFIG,
}
GRADNORMLORP = {
    "enable_galore": Flag(None, False),
    "enable_lowrank": Flag(None, False),
    "enable_wngalore": Flag(None, False),
    "low_rank_method": Flag(str),
}
LORO = {
    "task_name": Flag(tuple(TASKS), "mrpc", "data.task"),
    "model_name_or_path": Flag(str, "roberta-base", "model.init_from"),
    "per_device_eval_batch_size": Flag(int, 128),
    "learning_rate": Flag(float, 1e-6, "optim.lr"),
    "save_ckpt": Flag(None, False),
    "optimizer": Flag(str.lower, "adamw"),
    "loro_type": Flag(("eucl", "loro"), "eucl"),
    "loro_freq": Flag(int, 10),
    "loro_rank": Flag(int, 128),
    "loro_init": Flag(str, "xavier"),
    "loro_scope": Flag(str),
    "loro_lr_scaler": Flag(float, 1.0),
    "loro_alpha": Flag(float, 1.0),
}
FLAGS = {"gradnormlorp": COMMON | GRADNORMLORP, "loro": COMMON | LORO}
IDLE = {
    "pad_to_max_length": "rows are padded to the longest one beside them, which changes nothing",
    "use_slow_tokenizer": "a fast tokenizer gives the same ids",
    "per_device_eval_batch_size": "evaluation takes as many rows at a time as training",
    "ignore_mismatched_sizes": "a head for another number of labels is always drawn anew",
    "trust_remote_code": "no code of the hub is run",
    "hub_model_id": "nothing is uploaded",
    "hub_token": "nothing is uploaded",
    "with_tracking": "curves are always kept, in metrics.jsonl and for TensorBoard",
    "report_to": "curves are always kept, in metrics.jsonl and for TensorBoard",
    "low_rank_method": "a label for runs, without a meaning here",
    "save_ckpt": "the newest checkpoint of a run is always kept",
}
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {"optim.rule": "adamw", "optim.eps": 1e-8},
    "galore": {"optim.rule": "galore"},
    "lowrank": {"optim.rule": "gradnormlorp", "optim.mode": "lowrank_wn"},
    "wngalore": {"optim.rule": "gradnormlorp"},
    "loro": {"optim.rule": "loro"},
}
DIFFERENCES = {
    "adamw": "eps is added before the bias correction",
    "lowrank": "a row or vector that is zero is trained without normalisation; theirs turns NaN",
    "wngalore": "magnitudes persist and gradients are tangential (optim.mode=weightnorm), in the layers of"
    " --lora_all_modules; theirs changes no weight, or does not run",
}
OPTIMIZERS = {"loro": {"adamw": "adamw", "galore_adamw": "galore", "loro_adamw": "loro"}}
# Layers by the family of the model and a scope; None: all linear layers of its blocks.
LAYERS: dict[str, dict[str, list[str] | None]] = {
    "bert": {"all": None, "qkv": ["*.query", "*.key", "*.value"], "qv": ["*.query", "*.value"]},
    "llama": {
        "all": None,
        "qkv": ["*.q_proj", "*.k_proj", "*.v_proj"],
        "qv": ["*.q_proj", "*.v_proj"],
        "attn": ["*.self_attn.*_proj"],
        "mlp": ["*.mlp.*_proj"],
    },
}
FEW = {"bert": ["*.query"], "llama": LAYERS["llama"]["qv"]}
"""The layers without --lora_all_modules."""


def main(project: str, argv: Sequence[str] | None = None) -> int:
    """Run a fine-tuning from the command line of a project's script; return the exit code."""
    return finetune.main(argv, functools.partial(read, project))


def read(project: str, argv: Sequence[str]) -> tuple[FinetuneConfig, list[Problem | str]]:
    """Translate a command line, as `command_line.read` does."""
    return command_line.read(Finetuning, project, argv)


class Finetuning(Translation[FinetuneConfig]):
    """What the flags of a project's GLUE script become."""

    kind, script, entry = FinetuneConfig, "GLUE", "lrpretrain.finetune"
    flags, optimizers, idle = FLAGS, OPTIMIZERS, IDLE

    def translate(self) -> None:
        """Set what no flag becomes by itself."""
        self._model_and_data()
        self._steps()
        self._schedule()
        self._optimizer()
        self._results()

    def _model_and_data(self) -> None:
        values = self.values
        if values["load_pretrained_model"]:
            self.settings["model.init_from"] = values["load_pretrained_model"]
            self.notes.append(
                "--load_pretrained_model has config and tokenizer, too; --model_name_or_path is not read"
            )
        elif values["eval_llama"]:
            self.notes.append("the weights of --model_name_or_path are loaded; theirs draws new ones")
        if values["eval_llama"]:
            self.notes.append("rows are padded on the right by the model's tokenizer; theirs left by t5-base")
        self.task = self.stated.get("data.task", values["task_name"])
        if self.task is None:
            remedy = f"Use one of {', '.join(TASKS)}: its fields are those of --train_file"
            self._refuse("task_name", "is needed", remedy)
        elif values["train_file"]:
            self.notes.append("rows come from --train_file; theirs takes the hub's where a task is named")

    def _steps(self) -> None:
        values, settings = self.values, self.settings
        accumulation = values["gradient_accumulation_steps"]
        settings["train.global_batch"] = values["per_device_train_batch_size"] * self.n_procs * accumulation
        if accumulation > 1:
            every = f"every {accumulation} micro-batches"
            self.notes.append(f"an update follows {every}; theirs the first one, and then {every}")
        if values["max_train_steps"] is not None:  # as many epochs as it takes: each has a step
            settings["train.epochs"] = max(values["max_train_steps"], 1)
        save = values["checkpointing_steps"]
        if save is not None and save != "epoch" and not save.isdigit():
            self._refuse("checkpointing_steps", "is not known", "Use epoch, or a number of steps")
        elif save is not None:
            settings["train.save_every"] = 0 if save == "epoch" else int(save)
            self.notes.append("of the checkpoints of a run the newest is kept; theirs keeps all")
        if values["resume_from_checkpoint"]:
            reason = "is not read: a run goes on from the checkpoints in its --output_dir"
            self._refuse("resume_from_checkpoint", reason, "Leave it out")
        self.notes.append("a run started again goes on where it was, with the same --output_dir")
        if values["seed"] is None and "train.seed" not in self.stated:
            self.notes.append("without --seed the seed is 0; theirs differs from run to run")

    def _schedule(self) -> None:
        """Set what Hugging Face's schedulers are here; their restarts have one cycle, their power is 1."""
        values, settings, kind = self.values, self.settings, self.values["lr_scheduler_type"]
        settings["train.schedule"] = "cosine" if kind.startswith("cosine") else "linear"
        settings["train.min_lr_ratio"] = 1.0 if kind in CONSTANT else 0.0
        if kind == "polynomial":
            settings["train.min_lr_ratio"] = 1e-7 / max(values["learning_rate"], 1e-7)
        if kind == "constant" and values["num_warmup_steps"]:
            settings["train.warmup_steps"] = 0
            self.notes.append("--lr_scheduler_type constant has no warm-up, in theirs as well")

    def _optimizer(self) -> None:
        values, settings = self.values, self.settings
        method = self._method()
        if method is None:
            return
        settings |= METHODS[method]
        model = self.stated.get("model.init_from", settings["model.init_from"])
        family = _family(model)
        if settings["optim.rule"] in PROJECTED:
            settings |= {
                "optim.rank": values["lora_r"],
                "optim.refresh_every": values["update_proj_gap"],
                "optim.scale": values["galore_scale"],
                "optim.side": values["proj_type"],
                "optim.subspace": "svd",
                "optim.targets": None if values["lora_all_modules"] else FEW[family],
            }
            self.notes.append("bases come by SVD, as theirs; --optim.subspace warm finds them in less time")
        if method == "loro":
            self._loro(family)
        if method in DIFFERENCES:
            self.notes.append(DIFFERENCES[method])
        if self.project == "loro" and method == "galore":
            self.notes.append("all else is trained as well, the head included; theirs freezes it")
        if values["weight_decay"]:
            theirs = {"adamw": "but for biases and norms", "loro": "in factors"}.get(method, "nowhere")
            self.notes.append(f"weights decay wherever they are trained; theirs {theirs}")
        settings["run.dir"] = values["output_dir"] or f"runs/{Path(model).name}_{self.task}_{method}"

    def _method(self) -> str | None:
        """Return the method that the flags choose; None if they choose none or several."""
        values = self.values
        if self.project == "loro":
            if values["optimizer"] not in (known := OPTIMIZERS["loro"]):
                self._refuse("optimizer", "is not known", f"Use one of {', '.join(known)}")
            return known.get(values["optimizer"])
        chosen = [name for name in ("galore", "lowrank", "wngalore") if values[f"enable_{name}"]]
        if len(chosen) > 1:
            others = " and ".join(f"--enable_{name}" for name in chosen[1:])
            self._refuse(f"enable_{chosen[0]}", f"does not go with {others}", "Choose one")
            return None
        return (chosen or ["adamw"])[0]

    def _loro(self, family: str) -> None:
        """Set what the flags of LORO's adapters say."""
        values, settings, scope = self.values, self.settings, self.values["loro_scope"]
        if scope not in LAYERS[family]:
            reason = "is needed" if scope is None else f"is not a part of {family} models"
            self._refuse("loro_scope", reason, f"Use one of {', '.join(LAYERS[family])}")
            return
        exact = values["loro_type"] == "loro"
        settings |= {
            "optim.rank": values["loro_rank"],
            "optim.adapter_alpha": values["loro_alpha"],
            "optim.init": values["loro_init"],
            "optim.targets": LAYERS[family][scope],
            "optim.exact_every": values["loro_freq"] if exact else 0,
            "optim.lr_scaler": values["loro_lr_scaler"] if exact else 1.0,
        }
        if exact:
            self.notes.append("a pair of deficient rank takes a lazy step in the place of an exact one")
        if self.stated.get("optim.compat") != "true":
            self.notes.append(
                "biases of adapted layers are kept, and the head is trained; theirs makes the biases zero and"
                " leaves the head as it was drawn (--optim.compat true)"
            )

    def _results(self) -> None:
        if self.values["push_to_hub"]:
            remedy = "Leave it out; --export DIR writes a folder that can be uploaded"
            self._refuse("push_to_hub", "nothing is uploaded", remedy)
        self.notes.append(
            "results.json has all epochs, the best and the last; theirs, all_results.json, the last"
        )
        if self.task == "mnli":
            self.notes.append("it has the matched and the mismatched rows; theirs the latter")
        if self.project == "loro":
            self.notes += [
                "the best epoch is that of the first metric; theirs takes the best of each metric",
                "it trains on the GPU, if any, and in several processes; theirs on one CPU",
            ]
        self.notes.append("the model is written by --export DIR; theirs leaves it in --output_dir")


def _family(name: str) -> str:
    """Return the family of a model, by the config.json of its folder, or by its name as the scripts do."""
    try:
        kind = str(json.loads((Path(name) / "config.json").read_text())["model_type"])
    except (OSError, ValueError, LookupError, TypeError):
        kind = name
    return "bert" if "bert" in kind.lower() else "llama"
