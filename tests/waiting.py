# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for what no event tells."""

import time
from collections.abc import Callable

DEADLINE = 30.0
"""Seconds, on a machine that does other things too."""
_LOOK_AGAIN = 0.005


def until(what: Callable[[], object], deadline: float = DEADLINE) -> None:
    """Wait until WHAT holds. Errors: AssertionError."""
    end = time.monotonic() + deadline
    while not what():
        assert time.monotonic() < end, what
        time.sleep(_LOOK_AGAIN)
