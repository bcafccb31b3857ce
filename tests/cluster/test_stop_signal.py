"""The first stop signal sets a flag; a second one ends the process at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cca_ds.cluster.stop_signal import STOP_SIGNALS, StopSignal

NAMES = ["SIGTERM", "SIGUSR1", "SIGINT"]
PROGRAM = """
import os, signal, sys, time
from cca_ds.cluster.stop_signal import StopSignal
stop = StopSignal()
os.kill(os.getpid(), int(sys.argv[1]))
time.sleep(float(sys.argv[3]))
os.kill(os.getpid(), int(sys.argv[2]))
time.sleep(0.1)
print(stop.name)
"""


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_sets_the_flag(stop, name):
    assert not stop.requested
    os.kill(os.getpid(), getattr(signal, name))
    assert stop.requested
    assert stop.name == name


def two_signals(first, second, seconds_between):
    numbers = [str(int(getattr(signal, name))) for name in (first, second)]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *numbers, str(seconds_between)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("second", NAMES)
def test_a_second_signal_of_any_kind_ends_the_process_at_once(second):
    done = two_signals("SIGUSR1", second, 1.05)
    assert done.returncode == 128 + getattr(signal, second)
    assert done.stdout == ""
    assert done.stderr == f"a second signal, {second}: ended at once\n"


def test_one_that_follows_at_once_is_the_launchers_echo():
    """DeepSpeed's launcher sends SIGTERM when it gets the Ctrl-C that the terminal has sent to all."""
    done = two_signals("SIGINT", "SIGTERM", 0.2)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIGINT\n", "")
