"""What the authors' command lines have in common: how they are read and what becomes of them.

Options of our own, --section.field VALUE, may stand among the flags and win; with `--to_config FILE` the
configuration is only written.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple

import yaml

from lrpretrain.artifacts.metrics import say
from lrpretrain.config import C, flat, from_dict, parse, to_yaml
from lrpretrain.engine.device import env_procs
from lrpretrain.errors import ConfigError, Problem

NAMES = {"galore": "GaLore", "gradnormlorp": "GradNormLoRP", "loro": "LORO"}


class Flag(NamedTuple):
    """A flag of a script."""

    kind: Callable[[str], Any] | tuple[str, ...] | None
    """Reads the value; a tuple lists what it can be; None: a switch, which takes none."""
    default: Any = None
    becomes: str | None = None
    """The field that gets its value; None: see the translation of the script."""


REQUIRED = object()
TO_CONFIG = Flag(str)  # of ours, in every script


class Translation(ABC, Generic[C]):
    """What a command line for a script of a project becomes: settings by field, notes on what differs.

    Raises ConfigError for a line that cannot be read; what is wrong otherwise is in `problems`.
    """

    kind: type[C]
    script: ClassVar[str]
    """What the script does, in a word."""
    entry: ClassVar[str]
    """Our module that does it, whose options may be added."""
    flags: ClassVar[Mapping[str, Mapping[str, Flag]]]
    """Of the script of each project."""
    idle: ClassVar[Mapping[str, str]]
    """Flags that change nothing, and why."""
    optimizers: ClassVar[Mapping[str, Collection[str]]]
    """What --optimizer can be, for the projects that have it."""

    def __init__(self, project: str, argv: Sequence[str]):
        self.project, flags = project, self.flags[project]
        self.problems: list[Problem | str] = []
        self.notes: list[str] = []
        self.values, self.own = _split(flags, argv, self.problems)
        if self.problems:
            raise ConfigError(self.problems)
        self.stated = dict(option.removeprefix("--").split("=", 1) for option in self.own if "=" in option)
        self.n_procs = env_procs()[1]
        self.settings = {f.becomes: self.values[name] for name, f in flags.items() if f.becomes is not None}
        self.settings["engine.kind"] = "local" if self.n_procs == 1 else "ddp"
        self.translate()
        for reason in dict.fromkeys(self.idle.values()):
            given = [n for n, why in self.idle.items() if why == reason and self.given(n)]
            if given:
                self.notes.append(f"{', '.join(f'--{name}' for name in given)}: {reason}")

    @abstractmethod
    def translate(self) -> None:
        """Set what no flag becomes by itself."""

    def given(self, flag: str) -> bool:
        """Return whether a flag of the script has another value than its default."""
        return flag in self.values and self.values[flag] != self.flags[self.project][flag].default

    def _refuse(self, flag: str, reason: str, remedy: str) -> None:
        self.problems.append(Problem(f"--{flag}", self.values[flag], reason, remedy))

    def read(self) -> tuple[C, list[Problem | str]]:
        """Return the configuration, and everything that is wrong with it."""
        tree: dict[str, dict[str, Any]] = {}
        for key, value in self.settings.items():
            if value is not None:
                section, name = key.split(".")
                tree.setdefault(section, {})[name] = value
        base: C = from_dict(tree, kind=self.kind)
        config, problems = parse(self.own, onto=base, kind=self.kind)
        return config, self.problems + problems


def read(
    translation: type[Translation[C]], project: str, argv: Sequence[str]
) -> tuple[C, list[Problem | str]]:
    """Translate a command line; return the configuration, and everything that is wrong with the line.

    The first process prints what differs from the defaults, as a valid --config, and from the authors' code.
    `--help` and `--to_config FILE` exit. Raises ConfigError where there is nothing to check further.
    """
    if any(a in ("-h", "--help") for a in argv):
        print(_help(translation, project))
        raise SystemExit(0)
    found = translation(project, argv)
    config, problems = found.read()
    path = found.values["to_config"]
    if problems:
        if path:
            raise ConfigError(problems)
        return config, problems
    if env_procs()[0] == 0:
        say("The configuration, where it differs from the defaults:")
        say(yaml.safe_dump(_changed(config), sort_keys=False).rstrip())
        say(f"Differs from {NAMES[project]}'s code in:")
        for note in found.notes:
            say(f"- {note}")
    if path:
        _write(path, config)
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


def _changed(config: C) -> dict[str, dict[str, Any]]:
    """Return the fields that differ from their defaults, by section."""
    changed: dict[str, dict[str, Any]] = {}
    defaults = flat(type(config)())
    for key, value in flat(config).items():
        if value != defaults[key]:
            section, name = key.split(".")
            changed.setdefault(section, {})[name] = value
    return changed


def _write(path: str, config: C) -> None:
    if env_procs()[0] != 0:
        return
    try:
        Path(path).write_text(to_yaml(config))
    except OSError as error:
        raise ConfigError(
            [Problem("--to_config", path, f"cannot be written: {error}", "Name a file")]
        ) from error
    say(f"written to {path}")


def _help(translation: type[Translation[C]], project: str) -> str:
    """Return the flags, with their defaults and the fields that they become."""
    script, entry = translation.script, translation.entry
    lines = [f"The flags of {NAMES[project]}'s {script} script. Options of {entry} may be added."]
    for name, (kind, default, becomes) in translation.flags[project].items():
        shown = "" if kind is None else "REQUIRED" if default is REQUIRED else str(default)
        choices = f"one of {', '.join(kind)}" if isinstance(kind, tuple) else ""
        lines.append(f"  --{name} {shown}".ljust(36) + (f"→ {becomes}" if becomes else choices))
    if known := translation.optimizers.get(project):
        lines.append(f"--optimizer: {', '.join(known)}")
    return "\n".join(lines)
