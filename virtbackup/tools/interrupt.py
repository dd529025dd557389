# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGINT, SIGTERM and SIGHUP at a point of one's own choice, and all undone that is to be."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from virtbackup import errors

if TYPE_CHECKING:  # at run time where it is used: it brings libnbd with it
    from virtbackup.nbd import copy

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The last one is a terminal that was closed, or a connection to it that broke."""
GOES_WELL = 2.0
"""Seconds within which a QEMU that answers ends a backup."""
LOOK_AGAIN = 0.5
"""Seconds after which who cannot wait for ``woken`` sees a signal that came just before that."""


@contextlib.contextmanager
def deferred() -> "Iterator[copy.Cancel]":
    """The signals set the cancel, however many come, and take effect when the block ended: SIGINT
    as KeyboardInterrupt, others as SystemExit.

    So no exception comes out of nowhere between a step and the note of it, nor into a clean-up.
    Ignored signals stay ignored; outside the main thread nothing can be caught.
    """
    from virtbackup.nbd import copy

    cancel = copy.Cancel()
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        cancel.set()

    with contextlib.ExitStack() as undo:
        undo.callback(cancel.close)
        undo.enter_context(_handled(note))
        try:
            yield cancel
        except errors.Error as failure:
            if caught:
                raise _exception_of(caught[0]) from failure
            raise
    if caught:
        raise _exception_of(caught[0])


@contextlib.contextmanager
def hurried(cancel: "copy.Cancel") -> Iterator[None]:
    """Within ``deferred``, which gave CANCEL: a signal behind the first ends the block as its
    exception, for those who will not wait, once the block takes as long as nothing takes that goes
    well. All are noted as any other."""
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
    began = time.monotonic()
    is_over = False

    def note(number: int, frame: object) -> None:
        is_first = not cancel.is_set
        before[number](number, frame)
        if not is_first and not is_over and time.monotonic() >= began + GOES_WELL:
            raise _exception_of(number)

    with _handled(note):
        try:
            yield
        finally:
            is_over = True  # nothing is to come into what gives the signals their handlers back


def check_late(cancel: "copy.Cancel", done: str) -> None:
    """Errors: cancelled, when there is nothing to undo any more; it says what is DONE."""
    try:
        cancel.check()
    except errors.Error as failure:
        raise errors.error(failure.get_error_code(), f"that was too late: {done}") from failure


class Undo(contextlib.ExitStack):
    """What is to be done where a signal comes."""

    def __init__(self) -> None:
        super().__init__()
        self.caught: list[int] = []
        """The signals that have come."""


@contextlib.contextmanager
def held() -> Iterator[Undo]:
    """A signal takes effect when the block ended, and then what is on the stack is done; a second
    signal does at once, for those who will not wait. An error of the block is told instead.

    For a change of a guest that must not be left half-done, and takes no longer than QEMU does.
    """
    undo = Undo()
    caught = undo.caught

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        if len(caught) > 1:
            raise _exception_of(number)

    with _handled(note), undo:
        try:
            yield undo
        except Exception:
            undo.pop_all()
            raise
        if not caught:
            undo.pop_all()
    if caught:
        raise _exception_of(caught[0])


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """A signal comes as its exception, which also SIGTERM and SIGHUP have then, in place of an end
    without any clean-up."""

    def end(number: int, _frame: object) -> None:
        raise _exception_of(number)

    with _handled(end):
        yield


@contextlib.contextmanager
def is_the_end() -> Iterator[None]:
    """A signal ends the block, work that knows no other end, and is no error."""
    with contextlib.suppress(KeyboardInterrupt, SystemExit), at_once():
        yield


@contextlib.contextmanager
def woken() -> Iterator[socket.socket]:
    """What is readable once a signal has come, for who waits for it as well: Python's own handler
    runs only when that wait ends, which a signal that comes just before it does not end."""
    out, into = socket.socketpair()
    with out, into:
        into.setblocking(False)
        if threading.current_thread() is not threading.main_thread():
            yield out
            return
        before = signal.set_wakeup_fd(into.fileno(), warn_on_full_buffer=False)
        try:
            yield out
        finally:
            signal.set_wakeup_fd(before)


@contextlib.contextmanager
def _handled(note: Callable[[int, object], None]) -> Iterator[None]:
    """NOTE is the handler of the signals that are not ignored."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        # All at once: a signal in the middle waits until each has its own handler again.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, before)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _exception_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
