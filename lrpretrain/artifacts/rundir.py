"""The run folder: what lies where, and who may write to it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lrpretrain import __version__
from lrpretrain.config import Config, FinetuneConfig, to_yaml
from lrpretrain.errors import ConfigError, Problem


class RunDir:
    """Paths of a run folder, and its small files. Only the first process writes.

    One that is `part_of` a larger run has no status of its own: that of the whole tells.
    """

    def __init__(self, path: str | Path, part_of: RunDir | None = None):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.tokenizer = self.path / "tokenizer.model"
        self.checkpoints = self.path / "checkpoints"
        self._status: Path = part_of._status if part_of else self.path / "status.json"

    def create(self, *, fresh: bool) -> None:
        """Make the folder and see that it can be written to.

        Raises ConfigError where it cannot, or where a run lies there and a `fresh` one is wanted.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{socket.gethostname()}-{os.getpid()}"
            probe.write_text("")
            probe.unlink(missing_ok=True)
        except OSError as error:
            remedy = "Name a folder that can be written to"
            problem = Problem("run.dir", str(self.path), f"cannot be written to: {error.strerror}", remedy)
            raise ConfigError([problem]) from error
        if fresh and self.metrics.exists() and self.metrics.stat().st_size:
            remedy = "Name another folder, or use run.resume=auto"
            raise ConfigError(
                [Problem("run.dir", str(self.path), "holds a run, which would be overwritten", remedy)]
            )

    def describe(
        self,
        config: Config | FinetuneConfig,
        n_procs: int,
        device: torch.device,
        tokenizer: Path | None = None,
    ) -> None:
        """Write config.yaml and environment.json, and a copy of the sentencepiece file, if there is one."""
        if tokenizer is not None and not self.tokenizer.exists():
            shutil.copyfile(tokenizer, self.tokenizer)
        write_atomically(self.path / "config.yaml", to_yaml(config))
        packages = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy")
        environment = {
            "lrpretrain": __version__,
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in packages},
            "host": socket.gethostname(),
            "n_procs": n_procs,
            "device": torch.cuda.get_device_name()
            if device.type == "cuda"
            else platform.processor() or "cpu",
            "command": sys.argv,
        }
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def read_status(self) -> dict[str, Any]:
        """Return what the last process to end left in status.json, or an empty dict."""
        try:
            status: dict[str, Any] = json.loads(self._status.read_text())
        except (OSError, ValueError):
            return {}
        return status

    def write_status(
        self, state: str, step: int, reason: str = "", exit_code: int | None = None, **more: Any
    ) -> None:
        """Write status.json: `state` is running, finished, stopped or failed."""
        status = {"state": state, "step": step, "reason": reason, "exit_code": exit_code, **more}
        with suppress(OSError):  # a full disk must not take the place of what is to be said
            write_atomically(self._status, json.dumps(status, indent=2) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after `step`: a resumed run writes them again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # the process was killed while it wrote this line
                continue
        write_atomically(self.metrics, "".join(kept))


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whatever happens meanwhile."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(draft, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
