"""GLUE's metrics against their definitions."""

import math

import numpy as np
import pytest

from lrpretrain.data.glue import TASKS
from lrpretrain.train.score import measure


def logits(predicted):
    return np.array([[-1.0, 1.0] if label else [1.0, -1.0] for label in predicted])


def test_metrics_of_classes():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1], float)
    found = logits([1, 1, 0, 0, 0, 1, 0, 1])  # 3 true and 1 false positive, 3 true and 1 false negative
    assert measure("accuracy", found, labels) == 6 / 8
    assert measure("f1", found, labels) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert measure("matthews", found, labels) == pytest.approx((3 * 3 - 1 * 1) / math.sqrt(4 * 4 * 4 * 4))
    nothing = logits([0] * 8)
    assert (measure("f1", nothing, labels), measure("matthews", nothing, labels)) == (0, 0)


def test_metrics_of_numbers():
    labels, found = np.array([0.0, 1.0, 2.0, 3.0]), np.array([[0.0], [1.0], [10.0], [9.0]])
    deviations = found[:, 0] - 5, labels - 1.5
    pearson = np.dot(*deviations) / np.prod([np.linalg.norm(d) for d in deviations])
    assert measure("pearson", found, labels) == pytest.approx(pearson)
    assert measure("spearman", found, labels) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert math.isnan(measure("pearson", np.ones((4, 1)), labels))


def test_every_task_has_metrics():
    assert len(TASKS) == 9
    for task in TASKS.values():
        outputs = np.random.default_rng(0).normal(size=(12, task.labels))
        labels = np.arange(12.0) % max(task.labels, 2)
        assert all(math.isfinite(measure(metric, outputs, labels)) for metric in task.metrics)
