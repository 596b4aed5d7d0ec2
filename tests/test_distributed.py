# SPDX-License-Identifier: Apache-2.0
"""Signals that stop a training between two steps, and a launch whose port is taken."""

from __future__ import annotations

import signal
import socket

import pytest
import torch

from vtclip.distributed import STOPS, StopSignal, joined


def test_the_known_signals_stop():
    names = {signal.Signals(signum).name for signum in STOPS}
    assert {"SIGINT", "SIGTERM"} <= names <= {"SIGINT", "SIGTERM", "SIGHUP"}


@pytest.mark.parametrize("signum", STOPS)
def test_the_first_is_noted_and_a_second_of_its_kind_acts_at_once(signum):
    before = signal.getsignal(signum)
    with StopSignal() as stop:
        assert not stop.received
        signal.raise_signal(signum)
        assert stop.received == signum
        assert signal.getsignal(signum) == signal.SIG_DFL  # of the system: the process ends
    assert signal.getsignal(signum) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no terminals to close")
def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.received
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        message = f"^MASTER_PORT must be free, 127.0.0.1:{port} is taken$"
        with pytest.raises(ValueError, match=message), joined(torch.device("cpu")):
            pass
