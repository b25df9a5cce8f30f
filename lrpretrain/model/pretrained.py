"""Weights to start from: the safetensors of a Hugging Face folder, of which each process reads its tiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrpretrain.errors import ConfigError, Problem


class Pretrained:
    """The tensors of a folder's model*.safetensors, by name; nothing is read before it is asked for.

    Raises ConfigError for a folder that is not there, holds no such file, or one that cannot be read.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.files: dict[str, Any] = {}
        paths = sorted(Path(folder).glob("model*.safetensors"))
        if not paths:
            raise self._refused("has no model*.safetensors", "Name a folder that save_pretrained wrote")
        for path in paths:
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise self._refused(f"{path.name} cannot be read: {error}", "Fetch it again") from error
            self.files |= dict.fromkeys(file.keys(), file)

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
        """Return what keeps the files from filling a model of these shapes; they may hold more."""
        missing = [name for name in shapes if name not in self.files]
        found = {name: self.shape(name) for name in shapes if name in self.files}
        other = [name for name, shape in found.items() if shape != shapes[name]]
        remedy = "Use its own config.json as model.config, or another folder"
        reasons = [f"lacks {len(missing)} tensors of model.config, such as {missing[0]}"] if missing else []
        if other:
            example = f"such as {other[0]}: {found[other[0]]}, not {shapes[other[0]]}"
            reasons.append(f"has {len(other)} tensors of other shapes than model.config, {example}")
        return [Problem("model.init_from", self.folder, reason, remedy) for reason in reasons]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def read(self, name: str, *spans: slice) -> Tensor:
        """Return a rectangle of a tensor (with one span, rows of a matrix) on the CPU, as it is stored."""
        tensor: Tensor = self.files[name].get_slice(name)[spans]
        return tensor

    def _refused(self, reason: str, remedy: str) -> ConfigError:
        return ConfigError([Problem("model.init_from", self.folder, reason, remedy)])
