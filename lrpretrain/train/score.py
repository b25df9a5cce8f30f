"""How well a classifier does on the validation rows of a task of GLUE."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from lrpretrain.data.glue import Encoder, Rows, Task
from lrpretrain.engine import Engine
from lrpretrain.model import classifier

Floats = npt.NDArray[np.float64]


class Scorer:
    """Evaluates on the same rows every time, on any number of processes.

    `splits` are the rows by the prefix of their metrics: `valid/accuracy`, `valid/mismatched_accuracy`.
    """

    def __init__(self, task: Task, splits: Mapping[str, Rows], encoder: Encoder, micro_batch: int):
        self._task, self._splits = task, splits
        self._encoder, self._micro_batch = encoder, micro_batch

    def evaluate(self, engine: Engine, flag: Callable[[], int] = int) -> dict[str, float]:
        """Return the metrics of the task, the mean loss, and seconds. All processes must call it.

        Raises Stopped on all of them where the `flag` of one is not 0.
        """
        began = time.perf_counter()
        values: dict[str, float] = {}
        for prefix, rows in self._splits.items():
            outputs = self._outputs(engine, rows, flag)
            loss = classifier.loss_sum(torch.from_numpy(outputs), torch.from_numpy(rows.labels)) / len(rows)
            values[f"valid/{prefix}loss"] = float(loss)
            for name in self._task.metrics:
                values[f"valid/{prefix}{name}"] = measure(name, outputs, rows.labels)
        return values | {"perf/eval_s": time.perf_counter() - began}

    @torch.no_grad()
    def _outputs(self, engine: Engine, rows: Rows, flag: Callable[[], int]) -> Floats:
        """Return the logits of all rows, (rows, labels), on all processes."""
        engine.forward.eval()
        outputs = np.empty((len(rows), self._task.labels))
        at_a_time = self._micro_batch * engine.procs.n_procs
        order = rows.by_length(range(len(rows)))
        for begin in range(0, len(rows), at_a_time):
            engine.procs.agree(flag())
            which = order[begin : begin + at_a_time]
            own = self._encoder.micros(rows, which, self._micro_batch, engine.procs)
            logits = [(part, classifier.logits(engine.forward, m, engine.device)[0]) for part, m in own]
            known = [(part, values[: len(part)].cpu().numpy()) for part, values in logits]
            for part, found in (pair for pairs in engine.procs.gather(known) for pair in pairs):
                outputs[part] = found
        return outputs


def measure(metric: str, outputs: Floats, labels: Floats) -> float:
    """Return a metric of GLUE for logits (rows, classes) or numbers (rows, 1), and labels (rows).

    accuracy; f1 of class 1; matthews, pearson and spearman: correlations, nan where all predictions agree
    but for matthews, which is 0 there.
    """
    from scipy import stats
    from sklearn import metrics

    if metric in ("pearson", "spearman"):
        correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[metric]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            return float(correlation(outputs[:, 0], labels)[0]) if len(labels) > 1 else math.nan
    score = {
        "accuracy": metrics.accuracy_score,
        "f1": metrics.f1_score,
        "matthews": metrics.matthews_corrcoef,
    }[metric]
    options = {"zero_division": 0.0} if metric == "f1" else {}
    return float(score(labels.astype(int), outputs.argmax(1), **options))
