# SPDX-License-Identifier: LGPL-2.1-or-later
"""One thread that waits for all connections of a copy at once, for what was stored, and for an end
that somebody else wants."""

import select
import time
from collections.abc import Sequence

import libvirt

from virtbackup import errors
from virtbackup.nbd import connection, store

CANCELLED = "the copy was cancelled"
PATIENCE = 30.0
"""Seconds without a server's greeting until it is seen to whether it can accept a connection."""
_BURST = 0.1
"""Seconds of a bandwidth that may be read at once."""
_TICK = 0.001


class Cancel:
    """Ends a copy from a signal handler or another thread; ``set`` may be called from either."""

    def __init__(self) -> None:
        self._wake = store.Wake()
        self.is_set = False

    def set(self) -> None:
        """From now on ``check`` raises, and a copy that waits wakes up."""
        self.is_set = True
        self._wake.set()

    def check(self) -> None:
        """Raise VIR_ERR_OPERATION_ABORTED once ``set`` was called."""
        if self.is_set:
            raise errors.error(libvirt.VIR_ERR_OPERATION_ABORTED, CANCELLED)

    def fileno(self) -> int:
        """Readable once set."""
        return self._wake.fileno()

    def close(self) -> None:
        self._wake.close()


class Rate:
    """How much may be read for now: so many BYTES a second, of all disks together."""

    def __init__(self, bytes: int) -> None:
        self._bytes = bytes
        self._most = max(float(connection.CHUNK), bytes * _BURST)
        self._left = self._most
        self._at = time.monotonic()

    def delay(self) -> float:
        """Seconds until the next read may begin."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._bytes)
        self._at = now
        return 0.0 if self._left > 0 else -self._left / self._bytes + _TICK

    def take(self, count: int) -> None:
        """A read of COUNT bytes begins; the next may have to wait for that."""
        self._left -= count


class Loop:
    """Waits for all connections at once, for what was stored, and for the cancel."""

    def __init__(self, cancel: Cancel, rate: Rate | None = None) -> None:
        self._cancel = cancel
        self._rate = rate
        self._held = False
        """Whether a read waits for the rate; by the time of the ``wait`` it may have its turn."""
        self.stored = store.Wake()
        self._poll = select.poll()
        self._poll.register(cancel, select.POLLIN)
        self._poll.register(self.stored, select.POLLIN)
        self._connections: list[connection.Connection] = []
        self._polled: dict[int, tuple[connection.Connection, int]] = {}
        """Descriptor -> whose it is, and what is waited for."""

    def begin(
        self, export: connection.Export, contexts: Sequence[str] = (connection.ALLOCATION,)
    ) -> connection.Connection:
        """A connection in the making, which goes on in every ``wait``."""
        made = connection.Connection(export, contexts)
        self._connections.append(made)
        return made

    def negotiate(self, one: connection.Connection) -> None:
        """Wait until the connection is past the handshake, for as long as a server may yet take it.
        Errors: it cannot."""
        look = time.monotonic() + PATIENCE
        while not one.ready:
            self.wait(max(0.0, look - time.monotonic()))
            if time.monotonic() >= look:
                one.check_accepted()
                look = time.monotonic() + PATIENCE
        one.negotiate()

    def connect(
        self, export: connection.Export, contexts: Sequence[str] = (connection.ALLOCATION,)
    ) -> connection.Connection:
        """A connection that is past the handshake."""
        made = self.begin(export, contexts)
        self.negotiate(made)
        return made

    def wait(self, most: float | None = None) -> list[connection.Connection]:
        """Sleep until somebody can go on, for MOST seconds; the connections that did. Errors: lost;
        cancelled."""
        self._register()
        moved = []
        turn = self._rate.delay() if self._rate is not None and self._held else None
        self._held = False
        limits = [seconds for seconds in (turn, most) if seconds is not None]
        for fd, event in self._poll.poll(min(limits) * 1000 if limits else None):
            if fd in self._polled:
                one, _ = self._polled[fd]
                one.notify(event)
                moved.append(one)
            elif fd == self.stored.fileno():
                self.stored.clear()
        self._cancel.check()
        return moved

    def _register(self) -> None:
        """Have poll look for what each connection waits for. Errors: one was lost.

        A descriptor's number is not for ever: libnbd, which tries one address after the other, may
        get another one; and what it has closed, any thread may have opened as something else.
        """
        wanted = {}
        for one in self._connections:
            if not (mask := one.mask()):
                one.fail()
            wanted[one.fileno()] = one, mask
        if wanted == self._polled:
            return
        for fd in self._polled.keys() - wanted.keys():
            self._poll.unregister(fd)
        for fd, (_, mask) in wanted.items():
            self._poll.register(fd, mask)
        self._polled = wanted

    def may_read(self) -> bool:
        """Whether a read may begin just now; where not, ``wait`` returns when one may."""
        may = self._rate is None or self._rate.delay() == 0.0
        self._held = self._held or not may
        return may

    def note_read(self, count: int) -> None:
        """Reads of COUNT bytes have begun."""
        if self._rate is not None:
            self._rate.take(count)

    def leave(self, one: connection.Connection) -> None:
        """Close the connection and wait for it no more."""
        self._connections.remove(one)
        one.close()

    def leave_all(self) -> None:
        for one in self._connections:
            one.close()
        self._connections.clear()

    def close(self) -> None:
        self.leave_all()
        self.stored.close()
