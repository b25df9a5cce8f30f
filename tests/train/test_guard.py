"""Signals and the time limit: what asks for a stop, what is an echo, and what ends a process at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrpretrain.errors import EXIT_STOPPED
from lrpretrain.train import guard as guards
from lrpretrain.train.guard import TIME_LIMIT, Guard, reason, restarted_after_stop

NOTED = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


def flag_within(guard, seconds=5.0):
    """Return what asks for a stop, once the guard's thread has heard of it."""
    until = time.monotonic() + seconds
    while not guard.flag() and time.monotonic() < until:
        time.sleep(0.001)
    return guard.flag()


@pytest.mark.parametrize("number", NOTED)
def test_the_first_signal_is_noted(number):
    with Guard() as guard:
        assert guard.flag() == 0
        signal.raise_signal(number)
        assert flag_within(guard) == number
    assert reason(number) == number.name


def test_an_echo_of_the_first_signal_is_ignored():
    with Guard() as guard:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert flag_within(guard) == signal.SIGTERM
    assert guard.flag() == signal.SIGTERM


def test_a_guard_within_another_hears_first():
    with Guard() as outer:
        with Guard() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert flag_within(inner) == signal.SIGTERM
        assert outer.flag() == 0
        signal.raise_signal(signal.SIGINT)
        assert flag_within(outer) == signal.SIGINT


def test_what_to_do_at_the_first_signal_can_be_said():
    heard = []
    with Guard() as guard:
        guard.leave = heard.append
        for _ in range(2):
            signal.raise_signal(signal.SIGUSR1)
        flag_within(guard)
    assert heard == [signal.SIGUSR1]


def test_the_time_limit_leaves_room_for_a_step_and_a_save(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(guards.time, "monotonic", lambda: now)
    monkeypatch.setattr(guards, "_age_s", lambda: 20.0)

    def first(guard, pace):
        """Look every `pace` seconds; return the age of the process at which a stop is asked for."""
        nonlocal now
        while not guard.flag():
            now += pace
        return now - 1000 + 20

    guard = Guard()
    guard.limit(400)
    assert first(guard, 1.0) == 400 - 40 - 2 + 1  # a tenth of the limit, two steps; the first look after
    assert guard.flag() == TIME_LIMIT and reason(TIME_LIMIT) == "time limit"
    now = 1000.0
    guard = Guard()
    guard.limit(400)
    guard.saved(4.0)
    assert first(guard, 10.0) == 400 - 8 - 20 + 8  # looks come at multiples of 10
    now = 1000.0
    guard = Guard()
    guard.limit(100_000)
    assert first(guard, 1.0) == 100_000 - 300 - 2 + 1
    assert Guard().flag() == 0


@pytest.mark.parametrize("launch", [None, "job"])
def test_the_time_limit_counts_from_the_start_of_the_process_or_of_its_torchrun(monkeypatch, launch):
    """A process that torchrun has restarted is younger than what the limit is for."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    env = os.environ | ({} if launch is None else {"TORCHELASTIC_RUN_ID": launch})
    code = "import time; time.sleep(0.5); from lrpretrain.train.guard import _age_s; print(_age_s())"
    began = time.monotonic()
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    took = time.monotonic() - began
    child_age = float(child.stdout)
    assert (0.5 < child_age < took + 0.1) == (launch is None)
    assert launch is None or abs(guards._age_s() - child_age) < took + 0.1  # the parent is this process


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
import hashlib, os, signal, sys, threading, time
from lrpretrain.train import guard
echo_s, between_s = map(float, sys.argv[1:])
guard.SAME_SIGNAL_S = echo_s

def send():
    for number in (signal.SIGTERM, signal.SIGINT):
        time.sleep(between_s)
        os.kill(os.getpid(), number)
    time.sleep(between_s)
    print("alive", flush=True)
    os._exit(0)

with guard.Guard():
    threading.Thread(target=send).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, as a collective that hangs
"""


def run(*argv):
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", PROCESS, *argv], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert result.stderr == ""
    return result.returncode, result.stdout.splitlines()


def test_a_later_signal_ends_a_process_at_once_even_if_it_hangs():
    assert run("0.01", "0.3") == (128 + signal.SIGINT, [])


def test_a_signal_within_five_seconds_does_not():
    assert run("5", "0.3") == (0, ["alive"])


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
