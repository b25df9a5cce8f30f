"""The tasks of GLUE: their rows, from the hub or from files, as batches of ids for a classifier.

Source: Wang et al., "GLUE", arXiv 1804.07461; fields and labels as in the data set nyu-mll/glue.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrpretrain.config import GlueConfig
from lrpretrain.errors import ConfigError, DataError, Problem
from lrpretrain.sharding.procs import Procs

HUB = "nyu-mll/glue"
READERS = {".jsonl": "from_json", ".json": "from_json", ".csv": "from_csv", ".parquet": "from_parquet"}
IGNORED = -100
"""Label of a row that only fills up a process's share: no loss is taken over it."""


@dataclass(frozen=True)
class Task:
    """What a row of a task consists of, and how predictions are measured."""

    fields: tuple[str, ...]
    labels: int
    """Classes; 1: the label is a number."""
    metrics: tuple[str, ...]
    """The first one says which epoch is the best."""


TASKS = {
    "cola": Task(("sentence",), 2, ("matthews", "accuracy")),
    "mnli": Task(("premise", "hypothesis"), 3, ("accuracy",)),
    "mrpc": Task(("sentence1", "sentence2"), 2, ("f1", "accuracy")),
    "qnli": Task(("question", "sentence"), 2, ("accuracy",)),
    "qqp": Task(("question1", "question2"), 2, ("accuracy", "f1")),
    "rte": Task(("sentence1", "sentence2"), 2, ("accuracy",)),
    "sst2": Task(("sentence",), 2, ("accuracy",)),
    "stsb": Task(("sentence1", "sentence2"), 1, ("pearson", "spearman")),
    "wnli": Task(("sentence1", "sentence2"), 2, ("accuracy",)),
}


@dataclass(frozen=True)
class Rows:
    """The rows of a split."""

    texts: tuple[Sequence[str], ...]
    """Of each field."""
    labels: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.labels)

    def by_length(self, which: Sequence[int]) -> list[int]:
        """Return some rows, the shortest first, by characters: together they take little padding."""
        return sorted(which, key=lambda i: sum(len(column[i]) for column in self.texts))


@dataclass(frozen=True)
class Encoder:
    """Turns rows into what a classifier takes."""

    tokenizer: Any
    seq_len: int

    @property
    def identity(self) -> str:
        """What tells tokenizers apart."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return f"sha256:{hashlib.sha256(repr(vocabulary).encode()).hexdigest()}"

    def encode(self, rows: Rows, which: Sequence[int], filled: bool = False) -> dict[str, Tensor]:
        """Return ids, masks and `labels` of some rows, padded to the longest; no label counts if `filled`."""
        texts = [[column[i] for i in which] for column in rows.texts]
        inputs = self.tokenizer(
            *texts, padding=True, truncation=True, max_length=self.seq_len, return_tensors="pt"
        )
        labels = np.full(len(which), IGNORED) if filled else rows.labels[list(which)]
        return {**inputs, "labels": torch.from_numpy(labels).float()}

    def micros(
        self, rows: Rows, which: Sequence[int], micro_batch: int, procs: Procs
    ) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
        """Yield this process's share of some rows in micro-batches, as many of them as on all others.

        Rows of like length go together. Each comes with the numbers of its rows.
        """
        own = rows.by_length(which)[procs.proc :: procs.n_procs]
        most = -(-len(which) // procs.n_procs)
        for begin in range(0, most, micro_batch):
            part = own[begin : begin + micro_batch]
            yield part, self.encode(rows, part if len(part) else which[:1], filled=not len(part))


def validation_splits(data: GlueConfig) -> dict[str, str]:
    """Return the splits to evaluate, by the prefix of their metrics; the first decides what is best."""
    if data.task != "mnli":
        return {"": "validation"}
    splits = {"": "validation_matched", "mismatched_": "validation_mismatched"}
    alone = data.path is not None and Path(data.path).is_file() and data.mismatched_path is None
    return {"": splits[""]} if alone else splits


def problems(data: GlueConfig) -> list[Problem | str]:
    """Return what is wrong with the files that a configuration names."""
    found: list[Problem | str] = []
    if data.path is None:
        for key in ("validation_path", "mismatched_path"):
            if getattr(data, key) is not None:
                reason = "is for rows of files, and data.path names none"
                found.append(Problem(f"data.{key}", getattr(data, key), reason, "Give data.path"))
        return found
    if Path(data.path).is_dir():
        for key in ("validation_path", *(["mismatched_path"] if data.task == "mnli" else [])):
            if getattr(data, key) is not None:
                reason = "is for a file as data.path: of a folder the files validation* are read"
                found.append(Problem(f"data.{key}", getattr(data, key), reason, "Leave it out"))
    for split in ("train", *validation_splits(data).values()):
        key, path = _file(data, split)
        if path is None:
            reason = "is needed where data.path is a file"
            found.append(Problem(key, None, reason, f"Name the file of the {split} rows"))
        elif not path.is_file():
            formats = ", ".join(READERS)
            reason = f"there is no file {path.name} there" if key == "data.path" else "is not there"
            remedy = f"Name a file of rows, or a folder of files such as train.jsonl ({formats})"
            found.append(Problem(key, str(path), reason, remedy))
        elif path.suffix not in READERS:
            found.append(
                Problem(key, str(path), "has a format that is not read", f"Use {', '.join(READERS)}")
            )
    if data.mismatched_path is not None and data.task != "mnli":
        reason = f"data.task={data.task} has no mismatched rows"
        found.append(Problem("data.mismatched_path", data.mismatched_path, reason, "Leave it out"))
    return found


def _file(data: GlueConfig, split: str) -> tuple[str, Path | None]:
    """Return the field that names the file of a split, and the file; None where the field is not set."""
    assert data.path is not None
    folder = Path(data.path)
    if folder.is_dir():
        named = [folder / f"{split}{suffix}" for suffix in READERS]
        return "data.path", next((path for path in named if path.is_file()), folder / f"{split}.*")
    keys = {"train": "path", "validation_mismatched": "mismatched_path"}
    key = keys.get(split, "validation_path")
    name = getattr(data, key)
    return f"data.{key}", None if name is None else Path(name)


def read(data: GlueConfig, split: str) -> Rows:
    """Read the rows of a split. Raises DataError for rows that the task cannot do with."""
    import datasets

    datasets.disable_progress_bars()
    task = TASKS[data.task]
    where = f"{HUB} ({data.task}, {split})"
    try:
        if data.path is None:
            table = datasets.load_dataset(HUB, data.task, split=split)
        else:
            _, path = _file(data, split)
            assert path is not None
            where = str(path)
            # "null" and "12" may be sentences.
            as_text = {"keep_default_na": False, "converters": dict.fromkeys(task.fields, str)}
            options = as_text if path.suffix == ".csv" else {}
            table = getattr(datasets.Dataset, READERS[path.suffix])(where, keep_in_memory=True, **options)
    except Exception as error:  # `datasets` raises those of all its parts
        remedy = "Mend it, or see that the hub can be reached; data.path names files of your own"
        why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{where} cannot be read: {why}. {remedy}.") from error
    if missing := {*task.fields, "label"} - set(table.column_names):
        needs = ", ".join((*task.fields, "label"))
        raise DataError(f"{where} has no field {min(missing)!r}: rows of {data.task} have {needs}.")
    if not len(table):
        raise DataError(f"{where} holds no rows.")
    texts = tuple(
        [_text(text, field, i, where) for i, text in enumerate(table[field])] for field in task.fields
    )
    return Rows(texts, _labels(table["label"], task, where))


def _text(value: Any, field: str, row: int, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} of row {row} is {value!r}, and must be a text. Mend the row.")
    return value


def _labels(values: Sequence[Any], task: Task, where: str) -> npt.NDArray[np.float64]:
    """Return labels as numbers. Raises DataError for one that is none of the task's."""
    known = "a number from 0 to 5" if task.labels == 1 else f"0 to {task.labels - 1}"
    labels = np.empty(len(values))
    for i, value in enumerate(values):
        try:
            labels[i] = float(value)
            fits = 0 <= labels[i] <= 5 if task.labels == 1 else labels[i] in range(task.labels)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            hidden = " GLUE's test rows have no labels: use those of validation." if value == -1 else ""
            raise DataError(f"{where}: the label of row {i} is {value!r}, and must be {known}.{hidden}")
    return labels


@dataclass(frozen=True)
class RowBatch:
    """This process's micro-batches of a global batch, and what all processes know of the whole."""

    micros: list[dict[str, Tensor]]
    tokens: int
    targets: int
    flag: int


class RowLoader:
    """Deals global batches of training rows, each row once in a pass, in an order of the seed.

    The batches are the same on any number of processes. The last one of a pass is of what is left over.
    Raises ConfigError for the position (`state`) of another task or other rows.
    """

    dropped = 0

    def __init__(
        self,
        rows: Rows,
        encoder: Encoder,
        *,
        task: str,
        seed: int,
        micro_batch: int,
        global_batch: int,
        procs: Procs,
        state: Mapping[str, Any] | None = None,
    ):
        self._rows, self._encoder, self._procs = rows, encoder, procs
        self._seed, self._micro_batch, self._global_batch = seed, micro_batch, global_batch
        self.epoch = steps_of_epoch(len(rows), global_batch)
        self._identity = {
            "data.task": task,
            "data.path": len(rows),
            "data.seq_len": encoder.seq_len,
            "train.seed": seed,
            "train.global_batch": global_batch,
        }
        self._given = 0
        self.wait_ms = 0.0
        if state is not None:
            self._restore(state)

    def next(self, flag: Callable[[], int] = int) -> RowBatch:
        """Return the next batch; `flag` tells what asks this process to stop, or 0."""
        began = time.perf_counter()
        epoch, at = divmod(self._given, self.epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))
        which = order[at * self._global_batch : (at + 1) * self._global_batch].tolist()
        parts = self._encoder.micros(self._rows, which, self._micro_batch, self._procs)
        own = [(len(part), micro) for part, micro in parts]
        self.wait_ms = (time.perf_counter() - began) * 1e3
        tokens = sum(int(micro["attention_mask"].sum()) for held, micro in own if held)
        self._given += 1
        return RowBatch(
            [micro for _, micro in own],
            tokens=int(self._procs.sum([tokens])[0]),
            targets=len(which),
            flag=int(self._procs.max([flag()])[0]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the position, which is the same on all processes."""
        return {"given": self._given, **self._identity}

    def _restore(self, state: Mapping[str, Any]) -> None:
        wrong: list[Problem | str] = []
        for key, now in self._identity.items():
            if state.get(key) != now:
                reason = f"the checkpoint was written with {state.get(key)!r}"
                shown = f"{now} rows" if key == "data.path" else now
                wrong.append(Problem(key, shown, reason, "Go on with that, or start in another run.dir"))
        if wrong:
            raise ConfigError(wrong)
        self._given = state["given"]


def steps_of_epoch(rows: int, global_batch: int) -> int:
    """Return the optimizer steps of a pass over so many rows."""
    return -(-rows // global_batch)
