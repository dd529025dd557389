# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for what no event tells."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

DEADLINE = 120.0
"""Seconds, on a slow machine that does other things too; who waits for what comes takes fewer."""
_LOOK_AGAIN = 0.005


def until(
    what: Callable[[], object],
    deadline: float = DEADLINE,
    process: "subprocess.Popen[Any] | None" = None,
) -> None:
    """Wait until WHAT holds. Errors: AssertionError, at once where PROCESS has ended before."""
    end = time.monotonic() + deadline
    while not what():
        if process is not None:
            assert process.poll() is None, f"{process.args!r} has ended: {process.returncode}"
        assert time.monotonic() < end, what
        time.sleep(_LOOK_AGAIN)


def stop(process: "subprocess.Popen[Any]") -> None:
    """SIGSTOP to PROCESS, which stands still then: until its main thread has come to run, the
    others go on. Errors: AssertionError where it has ended."""
    process.send_signal(signal.SIGSTOP)
    stopped(process)


def stopped(process: "subprocess.Popen[Any]") -> None:
    """Wait until PROCESS stands still. Errors: AssertionError where it has ended."""
    found = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert found is not None
    assert found.si_code == os.CLD_STOPPED, f"{process.args!r} has ended"
