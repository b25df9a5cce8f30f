"""Traces of a few steps: which steps are in them, and where they lie."""

import gzip
import json

import pytest
import torch

from lrpretrain.train.recorder import recorder


def recorded(folder):
    """Return the steps in each trace of a folder, by file name."""
    found = {}
    for path in sorted(folder.glob("*")):
        with gzip.open(path) as file:
            names = {event["name"] for event in json.load(file)["traceEvents"]}
        found[path.name] = sorted(int(name[8:]) for name in names if name.startswith("training"))
    return found


@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
@pytest.mark.parametrize(
    ("wait", "steps", "first", "last", "expected"),
    [
        (0, 1, 1, 3, {"step_00000001.json.gz": [1]}),
        (2, 2, 1, 6, {"step_00000004.json.gz": [3, 4]}),
        (2, 2, 101, 106, {"step_00000104.json.gz": [103, 104]}),  # resumed at 100
        (2, 5, 1, 4, {"step_00000004.json.gz": [3, 4]}),  # it ended before
        (2, 2, 1, 1, {}),
        (2, 0, 1, 6, {}),
    ],
)
def test_the_steps_asked_for_are_recorded(tmp_path, wait, steps, first, last, expected):
    with recorder(tmp_path / "profile", wait, steps) as record:
        for step in range(first, last + 1):
            with torch.profiler.record_function(f"training{step}"):
                torch.ones(3).sum()
            record(step)
    assert recorded(tmp_path / "profile") == expected


def three_steps_of_five(folder):
    with recorder(folder, 1, 5) as record:
        for step in (1, 2, 3):
            record(step)
        raise KeyboardInterrupt


def test_what_was_recorded_before_an_error_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        three_steps_of_five(tmp_path)
    assert [path.name for path in tmp_path.glob("*")] == ["step_00000003.json.gz"]
