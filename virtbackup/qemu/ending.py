# SPDX-License-Identifier: LGPL-2.1-or-later
"""Telling that a domain's backup has ended, whoever ended it, and once.

Whoever stops a backup here says so; whatever else ends one is seen by looking at its status file,
and at QEMU's process. There is a thread for that while a backup runs and somebody wants to know.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from virtbackup import errors, runtime
from virtbackup.qemu import lifecycle, naming, status

logger = logging.getLogger(__name__)

Notify = Callable[[bool, str | None], None]
"""(whether the backup was good, else why not)"""
Tell = Callable[[naming.BackupId, bool, str | None], None]
"""(which backup has ended, as ``Notify``)"""
PassedOn = Callable[[status.Status], runtime.Process | None]
"""Who passes on what the QEMU of a backup says, where who did is gone; None: nobody. Errors:
errors.Error, as that is not known just now."""

LOOK = 0.2
"""Seconds between two looks."""
LOOK_AT_STOP = 0.01
"""Seconds between two looks while another process stops the backup: its verdict is on disk for a
moment only."""
STOP_TIME = 5.0
"""Seconds that a stop may take before it is looked at as seldom as anything."""
GRACE = 1.0
"""Seconds in which somebody may get to know why QEMU has ended."""

CANCELLED = "the backup was cancelled"
_ELSEWHERE = "the backup was stopped by another process, which was told whether it was good"
GONE = "QEMU is gone"


def nobody(running: status.Status) -> None:
    """As ``PassedOn``, of a QEMU whose own process is known."""


def reason_of(verdict: dict[str, str]) -> str:
    """Why a backup is not good, by a VERDICT: disk -> why it is not."""
    disks = "; ".join(f"disk '{target}': {why}" for target, why in verdict.items())
    return f"the backup is not good: {disks}"


class Loads(Protocol):
    """Where a status is."""

    def load(self) -> status.Status | None:
        """The status; None where there is none. Errors: errors.Error."""


class Ending:
    """The end of one domain's backup, each time that there is one."""

    def __init__(
        self,
        file: Loads,
        why_gone: Callable[[], str | None],
        passed_on: PassedOn = nobody,
    ) -> None:
        """FILE has the domain's status; WHY_GONE: as ``job.BackupJob``."""
        self._file = file
        self._why_gone = why_gone
        self._passed_on = passed_on
        self._notify: Notify | None = None
        # Taken and let go of without a line of Python, in which a signal's exception could come.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._id: naming.BackupId | None = None
        """The backup whose end is to be told."""
        self._told: naming.BackupId | None = None
        """The one whose end was told last; it may be there yet, to be stopped."""
        self._stops: set[object] = set()
        """The calls that stop one just now: which, they know once they have; it is theirs to tell.
        """
        self._overtaken: set[naming.BackupId] = set()
        """Those that are to be told so yet, although another one runs already."""

    def listen(self, notify: Notify | None) -> None:
        """Have NOTIFY told of the end of the backup that runs now, and of later ones that ``find``
        finds; None: nobody."""
        with self._lock:
            self._notify = notify
            if notify is None:
                self._id = None
                self._changed.notify_all()
        self.find()

    def find(self) -> None:
        """Look whether a backup runs. Errors: none, what cannot be read is not found."""
        if self._notify is None:
            return
        running = self._load()
        if running is None or running.phase == "starting":
            return
        with self._lock:
            before = self._id
            if running.id in (before, self._told) or self._notify is None:
                return
            if _known_end(running) is not None:
                self._told = running.id  # it has ended before anybody wanted to know
                return
            notify, unseen = self._notify, before is not None
            if before is not None and self._stops:
                self._overtaken.add(before)
                unseen = False
            self._id = running.id
            self._changed.notify_all()
        if unseen:
            notify(False, _ELSEWHERE)
        threading.Thread(
            target=self._follow, args=(running.id,), name="virtbackup-ending", daemon=True
        ).start()

    @contextlib.contextmanager
    def stopping(self) -> Iterator[Tell]:
        """While the backup is stopped here: nobody else tells its end. What is yielded does, once
        the stop has ended it; else it goes on to be looked at."""
        self.find()
        this = object()
        try:
            with self._lock:
                self._stops.add(this)
            yield self._tell
        finally:
            with self._lock:
                self._stops.discard(this)
                untold = () if self._stops else tuple(self._overtaken)
                self._changed.notify_all()
            for id in untold:
                self._tell(id, False, _ELSEWHERE)

    def _tell(
        self, id: naming.BackupId, good: bool, reason: str | None, seen: bool = False
    ) -> None:
        """Tell the end of backup ID, unless that was done; SEEN: by who only looks."""
        with self._lock:
            if seen and self._stops:
                return
            if id in self._overtaken:
                self._overtaken.discard(id)
            elif id == self._id:
                self._id, self._told = None, id
            elif seen or id == self._told:
                return
            else:  # who has started it has not come to have it found
                self._told = id
            notify = self._notify
            self._changed.notify_all()
        if notify is not None:
            notify(good, reason)

    def _follow(self, id: naming.BackupId) -> None:
        following = _Following(id)
        pause, said = LOOK, ""
        while not self._is_done_within(id, pause):
            try:
                end = following.look(self._file.load(), self._why_gone, self._passed_on)
            except errors.Error as failure:
                if str(failure) != said:
                    logger.warning("backup=%s cannot tell whether it has ended: %s", id, failure)
                    said = str(failure)
                continue
            if end is not None:
                self._tell(id, *end, seen=True)
            pause = following.pause

    def _is_done_within(self, id: naming.BackupId, pause: float) -> bool:
        """Whether ID's end was told, or nobody wants to know it, after PAUSE seconds or before."""
        with self._lock:
            return self._changed.wait_for(lambda: self._id != id, pause)

    def _load(self) -> status.Status | None:
        with contextlib.suppress(errors.Error):
            return self._file.load()
        return None


class _Following:
    """What was seen of backup ID so far."""

    def __init__(self, id: naming.BackupId) -> None:
        self._id = id
        self._qemu: runtime.Process | None = None
        """Who answers, where that is not who did as the backup began."""
        self._verdict: tuple[bool, str | None] | None = None
        self._gone_since: float | None = None
        self._stops_since: float | None = None

    @property
    def pause(self) -> float:
        """Seconds until the next look."""
        since = self._stops_since
        return LOOK if since is None or time.monotonic() > since + STOP_TIME else LOOK_AT_STOP

    def look(
        self,
        found: status.Status | None,
        why_gone: Callable[[], str | None],
        passed_on: PassedOn = nobody,
    ) -> tuple[bool, str | None] | None:
        """How the backup has ended, by what is FOUND in the status file; None: it has not, or it is
        not known yet. Errors: those of PASSED_ON."""
        if found is None or found.id != self._id:
            return self._verdict or (False, _ELSEWHERE)
        if (end := _known_end(found)) is not None:
            return end
        if found.phase == "stopping":
            self._stops_since = self._stops_since or time.monotonic()
            self._verdict = _verdict(found) or self._verdict
        qemu = self._qemu or found.qemu
        if qemu is None or runtime.is_alive(qemu):
            return None
        reason = why_gone()
        self._gone_since = self._gone_since or time.monotonic()
        says_why = reason is not None and reason != lifecycle.UNKNOWN
        if not says_why and time.monotonic() < self._gone_since + GRACE:
            return None
        if not says_why and (now := passed_on(found)) is not None:
            self._qemu, self._gone_since = now, None
            return None
        return False, reason or GONE


def _known_end(found: status.Status) -> tuple[bool, str | None] | None:
    """How a backup has ended of which there is still a status; None: it has not."""
    if found.given_up is not None:
        return False, found.given_up
    return _verdict(found) or (False, None) if found.told else None


def _verdict(found: status.Status) -> tuple[bool, str | None] | None:
    """That of a stop which is not over; None: there is none yet, or it is not the last word."""
    if found.verdict is None:
        return None
    if found.cancelled:
        return False, CANCELLED
    if found.verdict:
        return False, reason_of(found.verdict)
    return (True, None) if found.advances is None or found.advanced else None
