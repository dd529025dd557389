# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watching a running backup for the guest's sake.

The guest's writes wait for the scratch images, and fail or stand still when there is no more room
for those. So whoever started the backup and is still there looks at the room that is left, by
descriptors of the images and without the monitor, the more often the less there is, and has the
backup given up before it is too late. Now and then QEMU is asked, too, whether the guest stands.
And where QEMU ends, what the backup has left outside of it goes at once, the images' room included.
"""

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

from virtbackup import errors
from virtbackup.qemu import scratch

logger = logging.getLogger(__name__)

KEEP = 128 << 20
"""Bytes of a file system below which a backup is given up; at most half of what was free."""
FASTEST = 8 << 30
"""Bytes a second at which no guest can fill a file system: room divided by it is time to sleep."""
SHORTEST, LONGEST = 0.002, 0.5
"""Seconds between two looks at the room."""
LOOK = 2.0
"""Seconds between two looks at the guest."""
_JOIN = 5.0
"""Seconds for the thread to end."""
TRY_AGAIN = 0.2
"""Seconds after which to try again to end a backup, when the monitor is not to be had."""


@dataclasses.dataclass(frozen=True)
class Image:
    """A scratch image that may grow, by a descriptor that is closed by ``close_all``."""

    target: str
    fd: int
    worst_case: int
    """Bytes that it can come to take."""

    @property
    def growth(self) -> int:
        """Bytes that it can still come to take."""
        return max(0, self.worst_case - os.fstat(self.fd).st_blocks * 512)


def close_all(images: list[Image]) -> None:
    """Close the descriptors of IMAGES, and empty it: each is closed once, whoever else does this,
    too."""
    while images:
        with contextlib.suppress(IndexError, OSError):
            os.close(images.pop().fd)


class Watched(Protocol):
    """The backup that is watched. Errors, of each: errors.Error."""

    def is_over(self) -> bool:
        """Whether it has ended."""

    def why_ended(self) -> str | None:
        """Why it has, without anybody having said so to it: there is no QEMU of it any more. None:
        there is, or it is not known yet."""

    def note_end(self, reason: str) -> None:
        """It has ended so, for REASON."""

    def guest_trouble(self) -> str | None:
        """Why the guest stands still, if it does."""

    def give_up(self, reason: str) -> bool:
        """End it for REASON. Whether there is nothing more to watch: not where QEMU turns out to
        have ended, and why is to be known yet."""

    def let_go(self) -> None:
        """It is watched no more."""


class Watch:
    """A thread that watches one backup until it is over, given up, or nobody watches any more."""

    def __init__(self, images: list[Image], backup: Watched) -> None:
        """IMAGES are closed by the watch when it ends, and when this fails. Errors: OSError."""
        self._open = images
        self._images = tuple(images)
        self._backup = backup
        self._closed = threading.Event()
        self._warned: dict[str, str] = {}
        """What could not be done -> why, as it was told last: not twice a second for hours."""
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name="virtbackup-watch", daemon=True)
        try:
            self._keep = {
                image.target: min(KEEP, scratch.free_bytes(image.fd) // 2) for image in images
            }
        except BaseException:
            close_all(images)
            raise

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def wake(self) -> None:
        """Have a look at once; returns before that."""
        self._woken.set()

    def close(self, wait: bool = True) -> None:
        """Watch no more; returns when the images' descriptors are closed, or after a while when a
        file system hangs, or at once where WAIT is False."""
        self._closed.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN if wait else 0.0)
        else:  # of a start that was interrupted nobody knows whether it came to a thread
            close_all(self._open)

    def _run(self) -> None:
        try:
            next_look = time.monotonic() + LOOK
            # Closed before it began, it has no descriptors any more.
            while not self._closed.is_set() and self._goes_on():
                if (ended := self._ask(self._backup.why_ended)) is not None:
                    self._insist(self._backup.note_end, ended)
                    return
                reason = self._no_room()
                if reason is None and time.monotonic() > next_look:
                    next_look = time.monotonic() + LOOK
                    reason = self._ask(self._backup.guest_trouble)
                if reason is not None and self._insist(self._backup.give_up, reason):
                    return
        finally:
            close_all(self._open)
            self._backup.let_go()

    def _goes_on(self) -> bool:
        """Whether to watch on, after a pause."""
        self._woken.wait(self._pause())
        self._woken.clear()
        return not self._closed.is_set() and not self._over()

    def _over(self) -> bool:
        try:
            return self._backup.is_over()
        except errors.Error as failure:
            self._warn("cannot tell whether the backup is over", failure)
            return False

    def _room(self, image: Image) -> int:
        """Bytes until the backup has to be given up for IMAGE's file system; where a file system
        cannot be asked just now, as if there were plenty."""
        try:
            device = os.fstat(image.fd).st_dev
            same = [other for other in self._images if os.fstat(other.fd).st_dev == device]
            growth = sum(other.growth for other in same)
            if not growth:
                return FASTEST
            return scratch.free_bytes(image.fd) - min(self._keep[image.target], growth)
        except OSError as failure:
            self._warn(f"cannot look at disk '{image.target}'", failure)
            return FASTEST

    def _pause(self) -> float:
        room = min(map(self._room, self._images), default=FASTEST)
        return min(max(room / FASTEST, SHORTEST), LONGEST)

    def _no_room(self) -> str | None:
        for image in self._images:
            if self._room(image) > 0:
                continue
            with contextlib.suppress(OSError):  # looked at again in a moment
                free = scratch.free_bytes(image.fd)
                return (
                    f"given up before the scratch image of disk '{image.target}' could fill its"
                    f" file system, of which {free} bytes were left, and stop the guest"
                )
        return None

    def _ask(self, what: Callable[[], str | None]) -> str | None:
        try:
            return what()
        except errors.Error as failure:
            self._warn("cannot look at the guest", failure)
            return None

    def _insist(self, end: Callable[[str], bool | None], reason: str) -> bool:
        """Whether there is nothing more to watch."""
        while not self._over():
            try:
                return end(reason) is not False
            except errors.Error as failure:
                self._warn("cannot end the backup, trying again", failure)
            if self._closed.wait(TRY_AGAIN):
                break
        return True

    def _warn(self, what: str, failure: Exception) -> None:
        if self._warned.get(what) != (why := str(failure)):
            logger.warning("watch: %s: %s", what, why)
            self._warned[what] = why
