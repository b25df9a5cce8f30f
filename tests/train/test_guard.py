"""Signals: the first is noted, its echo is ignored, a later one ends the process at once."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lrpretrain.errors import EXIT_STOPPED
from lrpretrain.train.guard import Guard, restarted_after_stop

NOTED = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.parametrize("number", NOTED)
def test_the_first_signal_is_noted(number):
    with Guard() as guard:
        assert not guard.wants_stop and guard.reason is None
        signal.raise_signal(number)
        assert guard.wants_stop and guard.reason == number.name


def test_an_echo_of_the_first_signal_is_ignored():
    with Guard() as guard:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert guard.reason == "SIGTERM"


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_handlers_are_restored_on_the_way_out(error):
    before = {number: signal.getsignal(number) for number in NOTED}
    try:
        with Guard():
            assert all(signal.getsignal(number) != before[number] for number in NOTED)
            if error is not None:
                raise error
    except RuntimeError:
        pass
    assert {number: signal.getsignal(number) for number in NOTED} == before


def test_making_a_guard_changes_nothing_yet():
    before = {number: signal.getsignal(number) for number in NOTED}
    Guard()
    assert {number: signal.getsignal(number) for number in NOTED} == before


PROCESS = """
import signal, sys, time
from lrpretrain.train import guard
if sys.argv[1:]:
    guard.SAME_SIGNAL_S = float(sys.argv[1])
with guard.Guard() as g:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.05)
    print("first", flush=True)
    try:
        signal.raise_signal(signal.SIGINT)
        print("second", flush=True)
    finally:
        print("cleaned up", flush=True)
"""


def run(*argv):
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", PROCESS, *argv], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert result.stderr == ""
    return result.returncode, result.stdout.splitlines()


def test_a_later_signal_ends_the_process_at_once():
    assert run("0.01") == (128 + signal.SIGINT, ["first"])


def test_a_signal_within_five_seconds_does_not():
    assert run() == (0, ["first", "second", "cleaned up"])


STOPPED = {"exit_code": EXIT_STOPPED, "launch_id": "job"}


@pytest.mark.parametrize(
    ("status", "run_id", "restarts", "expected"),
    [
        (STOPPED, "job", "1", True),
        (STOPPED, "job", "3", True),
        (STOPPED, "job", "0", False),  # the user started it again, under the same id
        (STOPPED, "job", None, False),
        (STOPPED, "another", "1", False),
        (STOPPED, None, "1", False),
        ({"exit_code": EXIT_STOPPED, "launch_id": None}, None, "1", False),
        ({"exit_code": EXIT_STOPPED}, "job", "1", False),
        (STOPPED | {"exit_code": 1}, "job", "1", False),  # a failure: torchrun is right to restart it
        (STOPPED | {"exit_code": 0}, "job", "1", False),
        ({}, "job", "1", False),
    ],
)
def test_a_restart_after_a_deliberate_stop_is_recognised(monkeypatch, status, run_id, restarts, expected):
    for name, value in (("TORCHELASTIC_RUN_ID", run_id), ("TORCHELASTIC_RESTART_COUNT", restarts)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert restarted_after_stop(status) is expected
