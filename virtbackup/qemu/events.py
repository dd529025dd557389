# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is to be told what happens to a driver's domains (``hypervisor.EventDriver``)."""

import contextlib
import itertools
import logging
import os
import select
import threading
from collections.abc import Callable

from virtbackup import hypervisor, runtime

logger = logging.getLogger(__name__)

Callback = Callable[[hypervisor.Event], None]


class Events:
    """The callbacks of one driver. True while there are any."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """BEGIN is called when there is a first callback, END when the last is gone: where that was
        in the middle of BEGIN, once more after it. Neither waits for an event that is being told.
        """
        self._begin = begin
        self._end = end
        # Reentrant, as a signal's handler may close us.
        self._changing = threading.RLock()
        self._callbacks: dict[int, Callback] = {}
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def register(self, callback: Callback) -> Callable[[], None]:
        """As ``event_register``. Errors: those of BEGIN; CALLBACK is not registered then."""
        with self._changing:
            number = next(self._numbers)
            first = not self._callbacks
            self._callbacks[number] = callback
            if first:
                try:
                    self._begin()
                except BaseException:
                    self._remove(number)
                    raise
                if not self._callbacks:  # a signal's handler has closed us meanwhile
                    self._end()
        return lambda: self._unregister(number)

    def emit(self, event: hypervisor.Event) -> None:
        """Tell EVENT to everybody."""
        for callback in list(self._callbacks.values()):
            callback(event)

    def close(self) -> None:
        """Tell nobody anything any more."""
        with self._changing:
            for number in list(self._callbacks):
                self._remove(number)

    def _unregister(self, number: int) -> None:
        with self._changing:
            self._remove(number)

    def _remove(self, number: int) -> None:
        if self._callbacks.pop(number, None) is not None and not self._callbacks:
            self._end()


class ProcessEnd:
    """Tells the end of a process, which is nobody's child here: by one thread, without polling."""

    def __init__(self, tell: Callable[[], None]) -> None:
        """TELL is called, by that thread, once a process has ended."""
        self._tell = tell
        # Reentrant, as a signal's handler may close who has us.
        self._lock = threading.RLock()
        self._process: runtime.Process | None = None
        self._leave: int | None = None
        """An eventfd that ends the thread."""

    def watch(self, process: runtime.Process | None) -> None:
        """Tell the end of PROCESS from now on, and of no other; None: of nobody."""
        with self._lock:
            if process == self._process:
                return
            if self._leave is not None:
                os.eventfd_write(self._leave, 1)
            self._process = self._leave = None
            if process is None or process[0] == os.getpid():
                return  # the monitor of a fake is in this process
            with contextlib.ExitStack() as undo:
                try:
                    pidfd = os.pidfd_open(process[0])
                    undo.callback(os.close, pidfd)
                    leave = os.eventfd(0, os.EFD_CLOEXEC)
                    undo.callback(os.close, leave)
                except ProcessLookupError:
                    return
                except OSError as failure:
                    logger.warning("pid=%d its end will not be seen: %s", process[0], failure)
                    return
                if not runtime.is_alive(process):  # another one has its number by now
                    return
                undo.pop_all()
            self._process, self._leave = process, leave
            threading.Thread(
                target=self._run,
                args=(process, pidfd, leave),
                name="virtbackup-process-end",
                daemon=True,
            ).start()

    def _run(self, process: runtime.Process, pidfd: int, leave: int) -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(leave, select.POLLIN)
        poll.poll()
        os.close(pidfd)
        with self._lock:
            ended = self._process == process and self._leave == leave
            if ended:
                self._process = self._leave = None
            os.close(leave)
        if ended:
            self._tell()
