# SPDX-License-Identifier: LGPL-2.1-or-later
"""Threads for what may take its time (libvirt's virthreadpool.c)."""

import collections
import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

Work = Callable[[], None]


class Workers:
    """Threads that do one thing after the other; made when they are needed.

    There are as many as MOST for ordinary work, and however many it takes for what is urgent: that
    never waits for anybody. Whoever calls it so sees to it that this is not much.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._urgent: collections.deque[Work] = collections.deque()
        self._ordinary: collections.deque[Work] = collections.deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._busy_with_ordinary = 0
        self._closed = False
        self._numbers = 0

    def do(self, what: Work, urgent: bool = False) -> None:
        """Have a thread do WHAT; what it raises is logged."""
        with self._changed:
            (self._urgent if urgent else self._ordinary).append(what)
            if self._idle >= len(self._urgent) + self._startable():
                self._changed.notify()
                return
            self._numbers += 1
            thread = threading.Thread(target=self._run, name=f"worker-{self._numbers}", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()  # under the lock: nobody joins one that was not started
            except RuntimeError as failure:
                self._threads.discard(thread)
                logger.warning("threads=%d no more: %s", len(self._threads), failure)

    def close(self, timeout: float) -> None:
        """Do what is left to do, and what comes of that, for up to TIMEOUT seconds."""
        end = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._threads and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def _startable(self) -> int:
        """How much ordinary work need not wait."""
        return min(len(self._ordinary), self._most - self._busy_with_ordinary)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            what, is_ordinary = work
            try:
                what()
            except Exception:
                logger.exception("a worker failed")
            del what, work  # an idle thread keeps nothing alive
            with self._changed:
                self._busy_with_ordinary -= is_ordinary
        with self._changed:
            self._threads.discard(threading.current_thread())
            if self._closed:
                self._changed.notify_all()

    def _next(self) -> tuple[Work, bool] | None:
        """What to do, and whether it is ordinary; None: end."""
        with self._changed:
            while True:
                if self._urgent:
                    return self._urgent.popleft(), False
                if self._startable():
                    self._busy_with_ordinary += 1
                    return self._ordinary.popleft(), True
                if self._closed or self._idle >= self._most:
                    return None
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
