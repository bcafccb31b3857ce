"""Stop signals set a flag, however many come; only a second Ctrl-C ends the process at once."""

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


@pytest.mark.parametrize(
    ("first", "second"), [("SIGUSR1", "SIGTERM"), ("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGINT"), ("SIGINT", "SIGTERM")]
)
def test_a_schedulers_signals_are_one_request(first, second):
    """However far apart: the second must not cut the checkpoint short that the first asked for."""
    done = two_signals(first, second, 1.05)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{first}\n", "")


def test_a_second_ctrl_c_ends_the_process_at_once():
    done = two_signals("SIGINT", "SIGINT", 1.05)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted a second time: ended at once, without a checkpoint\n"


def test_one_that_follows_at_once_is_an_echo():
    """A launcher hands on the Ctrl-C that the terminal has sent to all."""
    done = two_signals("SIGINT", "SIGINT", 0.2)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIGINT\n", "")
