# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events of libvirt's domains: libvirt's own, and the ends of backups that are made beside it.

libvirt hands out events in a program with an event loop, which has to be there before a connection
is opened: the program's own, or ``event_loop``. Without one, only what this process knows itself is
told.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable

import libvirt

from virtbackup import errors, hypervisor
from virtbackup.qemu import domain_obj, ending, events, libvirt_queries, lifecycle

logger = logging.getLogger(__name__)

RECONNECT = 0.5
"""Seconds between two tries to reach a libvirt that went away."""


class Lifecycle:
    """libvirt's lifecycle events of all domains, on one connection after the other."""

    def __init__(
        self, tell: Callable[[hypervisor.Event], None], reconnect: Callable[[], None]
    ) -> None:
        """RECONNECT is called, by a thread, when the connection was lost, until that has made
        another one known by ``attach``. Errors: errors.Error."""
        self._tell = tell
        self._reconnect = reconnect
        # Reentrant, as a signal's handler may close who has us.
        self._lock = threading.RLock()
        self._connection: libvirt.virConnect | None = None
        self._undo: list[Callable[[], object]] = []

    def attach(self, connection: "libvirt.virConnect", owned: bool) -> None:
        """Tell what happens on CONNECTION, and on no other. Only where it is OWNED by us, its end
        is noticed: others have a callback of theirs for that. Errors: libvirt's own."""
        with self._lock:
            if connection is self._connection or not lifecycle.has_event_loop():
                return
            with libvirt_queries.own_errors():
                id = connection.domainEventRegisterAny(
                    None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._hear, None
                )
                undo = [lambda: connection.domainEventDeregisterAny(id)]
                if owned:
                    connection.registerCloseCallback(self._lost, None)
                    undo.append(connection.unregisterCloseCallback)
            self._let_go()
            self._connection, self._undo = connection, undo

    def detach(self) -> None:
        """Tell nothing more."""
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        self._connection = None
        while self._undo:
            with contextlib.suppress(libvirt.libvirtError, TypeError):  # the latter once closed
                self._undo.pop()()

    def _hear(
        self,
        connection: "libvirt.virConnect",
        found: "libvirt.virDomain",
        event: int,
        detail: int,
        opaque: object,
    ) -> None:
        self._tell(hypervisor.LifecycleEvent(libvirt_queries.ref_of(found), event, detail))

    def _lost(self, connection: "libvirt.virConnect", reason: int, opaque: object) -> None:
        """By the event loop, which must not wait."""
        threading.Thread(
            target=self._find_again,
            args=(connection,),
            name="virtbackup-libvirt-reconnect",
            daemon=True,
        ).start()

    def _find_again(self, lost: "libvirt.virConnect") -> None:
        while self._connection is lost:
            try:
                self._reconnect()
            except errors.Error as failure:
                logger.debug("libvirt is not back yet: %s", failure)
            time.sleep(RECONNECT)


class LibvirtEvents(libvirt_queries.LibvirtQueries):
    """The hook of ``hypervisor.EventDriver``, for a driver on libvirt's connections."""

    def __init__(self) -> None:
        self._events = events.Events(self._begin, self._end)
        self._lifecycle = Lifecycle(self._events.emit, self._reconnect)
        self._domains: dict[str, domain_obj.DomainObj] = {}
        self._refs: dict[str, hypervisor.DomainRef] = {}
        """By uuid, as those of ``_domains`` were when they were asked for first."""
        self._owned = True

    def _obj(self, ref: hypervisor.DomainRef) -> domain_obj.DomainObj:
        """What is kept of a domain."""
        raise NotImplementedError

    def event_register(self, callback: events.Callback) -> Callable[[], None]:
        """libvirt's lifecycle events, where there is a loop; the ends of backups that are running
        now, whoever started them, or that are started or asked for here. Errors: libvirt's own."""
        return self._events.register(callback)

    def _begin(self) -> None:
        self._lifecycle.attach(self._connection, self._owned)
        for ref in self._left_behind():
            self._obj(ref)
        for uuid, one in list(self._domains.items()):
            one.listen(self._notify(self._refs[uuid]))

    def _end(self) -> None:
        self._lifecycle.detach()
        for one in list(self._domains.values()):
            one.listen(None)

    def _reconnect(self) -> None:
        connection = self._connection
        if self._events:
            self._lifecycle.attach(connection, self._owned)

    def _connected_anew(self, connection: "libvirt.virConnect") -> None:
        """CONNECTION takes the place of a lost one, and is ours."""
        if self._events:
            self._lifecycle.attach(connection, owned=True)

    def _notify(self, ref: hypervisor.DomainRef) -> ending.Notify | None:
        """Whom to tell of the end of a domain's backup; None where nobody wants to know."""
        self._refs[ref.uuid] = ref
        if not self._events:
            return None

        def notify(good: bool, reason: str | None) -> None:
            self._events.emit(hypervisor.BackupEnded(self._ref_now(ref), good, reason))

        return notify

    def _ref_now(self, ref: hypervisor.DomainRef) -> hypervisor.DomainRef:
        """The domain as it is now."""
        with contextlib.suppress(errors.Error):
            found = self.domain_lookup(uuid=ref.uuid)
            if found is not None:
                return found
        return dataclasses.replace(ref, id=None)
