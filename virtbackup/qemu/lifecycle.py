# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hearing from libvirt that a domain has ended, and why.

libvirt hands out events where the program has registered an event loop, and runs it
(virEventRegisterDefaultImpl, libvirtaio). That is the program's affair: none is registered or run
here, and where there is none, nothing is heard, and whoever wants to know has to ask.
"""

import logging
import threading
from collections.abc import Callable

import libvirt

logger = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds until libvirt's event of a domain that it does not know any more must have come."""

UNKNOWN = "the domain is gone"
"""All that can be told of a transient domain once it has ended."""

_SHUT_DOWN = "the guest shut down"
_DESTROYED = "the domain was destroyed"
_CRASHED = "QEMU crashed or was killed"
_MIGRATED = "the domain was migrated to another host"
_SAVED = "the domain was saved to a file"
_SET_BACK = "the domain was set back to a snapshot"

_ENDS = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: _SHUT_DOWN,
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: _DESTROYED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: "the guest crashed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED: _MIGRATED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED: _SAVED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: _CRASHED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT: _SET_BACK,
}
"""Why a domain has stopped, as libvirt's event has it."""
_SHUTOFF = {
    libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: _SHUT_DOWN,
    libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: _DESTROYED,
    libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: _CRASHED,
    libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED: _MIGRATED,
    libvirt.VIR_DOMAIN_SHUTOFF_SAVED: _SAVED,
    libvirt.VIR_DOMAIN_SHUTOFF_FAILED: "the domain failed",
    libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT: _SET_BACK,
}
"""Why it does not run."""
_RUNNING = {
    libvirt.VIR_DOMAIN_RUNNING_FROM_SNAPSHOT: _SET_BACK,
    libvirt.VIR_DOMAIN_RUNNING_RESTORED: "the domain was saved to a file and restored",
}
"""Why it runs anew."""


def why_ended(state: int, reason: int) -> str | None:
    """Why a run of a domain that has ended has, by what libvirt says of the domain since; None
    where that does not tell."""
    if state == libvirt.VIR_DOMAIN_SHUTOFF:
        return _SHUTOFF.get(reason)
    return _RUNNING.get(reason) if state == libvirt.VIR_DOMAIN_RUNNING else None


class Hearing:
    """What is heard of one run of a domain: by libvirt's event loop, in whatever thread runs that,
    which is not held up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._on: tuple[libvirt.virConnect, int] | None = None
        """The connection, and what it calls us there."""
        self._told = threading.Event()
        self._reason: str | None = None
        self.wake: Callable[[], None] = lambda: None
        """Called from the event loop when there is something new: it must not wait."""

    @property
    def listens(self) -> bool:
        """Whether events may come."""
        return self._on is not None

    def listen(self, connection: "libvirt.virConnect", uuid: str) -> None:
        """Listen to the domain of that UUID on CONNECTION, and no more on the one before."""
        with self._lock:
            self._stop_listening()
            if self._closed or not has_event_loop():
                return
            try:
                id = connection.domainEventRegisterAny(
                    connection.lookupByUUIDString(uuid),
                    libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
                    self._hear,
                    None,
                )
            except libvirt.libvirtError as failure:
                logger.info("domain=%s nothing is heard of it: %s", uuid, failure)
            else:
                self._on = connection, id

    def pause(self) -> None:
        """Listen no more, until told to."""
        with self._lock:
            self._stop_listening()

    def close(self) -> None:
        """Listen no more, whoever tells, and forget what was heard."""
        with self._lock:
            self._closed = True
            self._stop_listening()
        self._reason = None

    def reason(self, timeout: float = 0.0) -> str | None:
        """Why the domain ended, where that was heard or is within TIMEOUT seconds."""
        self._told.wait(timeout)
        return self._reason

    def _stop_listening(self) -> None:
        on, self._on = self._on, None
        if on is not None:
            connection, id = on
            try:
                connection.domainEventDeregisterAny(id)
            except (libvirt.libvirtError, TypeError) as failure:  # it was lost, or is closed
                logger.debug("event=%d is not deregistered: %s", id, failure)

    def _hear(
        self,
        connection: "libvirt.virConnect",
        domain: "libvirt.virDomain",
        event: int,
        detail: int,
        opaque: object,
    ) -> None:
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED and self._reason is None:
            self._reason = _ENDS.get(detail, "the domain ended")
            self._told.set()
            self.wake()


def has_event_loop() -> bool:
    """Whether somebody has registered one. libvirt would print an error for the try to have an
    event without, and this prints nothing."""
    try:
        timer = libvirt.virEventAddTimeout(-1, lambda *_: None, None)
    except libvirt.libvirtError:
        return False
    libvirt.virEventRemoveTimeout(timer)
    return True
