# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGINT and SIGTERM at a point of one's own choice, with all that is to be undone undone."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from virtbackup import errors
from virtbackup.nbd import copy

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def deferred() -> Iterator[copy.Cancel]:
    """SIGINT and SIGTERM set the cancel, however many come, and take effect when the block ended:
    as KeyboardInterrupt, as SystemExit.

    So no exception comes out of nowhere between a step and the note of it, nor into a clean-up.
    Ignored signals stay ignored; outside the main thread nothing can be caught.
    """
    cancel = copy.Cancel()
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        cancel.set()

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield cancel
    except errors.Error as failure:
        if caught:
            raise _exception_of(caught[0]) from failure
        raise
    finally:
        # All at once: a signal in the middle waits until each has its own handler again.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, before)
        for number, handler in before.items():
            signal.signal(number, handler)
        cancel.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if caught:
        raise _exception_of(caught[0])


def _exception_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
