"""Requests to stop set a flag; a second Ctrl-C interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from dgm.training.stop_request import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = handlers()
    made = StopRequest()
    yield made
    made.close()
    assert handlers() == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag(stop: StopRequest, number: signal.Signals):
    assert not stop.raised
    os.kill(os.getpid(), number)
    ends = time.monotonic() + 10  # SIGUSR2 is received by another thread
    while not stop.raised and time.monotonic() < ends:
        time.sleep(0.01)
    assert stop.raised


def test_children_ignore_the_signal_that_slurm_sends_to_all_processes(stop: StopRequest):
    with subprocess.Popen(["sleep", "60"]) as child:
        child.send_signal(signal.SIGUSR2)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        child.terminate()
    assert child.returncode == -signal.SIGTERM


def test_only_a_second_interrupt_interrupts(stop: StopRequest):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.raised
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_repeated_terminations_only_set_the_flag(stop: StopRequest):
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.raised


def test_another_thread_sets_no_handlers_and_does_not_fail():
    before, made = handlers(), []

    def work() -> None:
        made.append(StopRequest())
        made[0].close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(made) == 1 and not made[0].raised
    assert handlers() == before


def test_a_hang_up_that_is_ignored_stays_ignored():
    original = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.raised
        stop.close()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, original)
