# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a silent peer still lives: pings as libvirt sends them (virkeepalive.c). No clock in it.

Any message counts as life. After INTERVAL seconds of silence a ping is due, and another after each
INTERVAL; INTERVAL seconds after the COUNT-th, all unanswered, the peer is dead.
"""

from typing import Literal

from virtbackup.remote import protocol, rpc
from virtbackup.remote.program import MessageType


def _message(name: str) -> rpc.Message:
    keepalive = protocol.KEEPALIVE
    number = keepalive[name].number
    return rpc.Message(keepalive.number, keepalive.version, number, MessageType.MESSAGE, 0)


PING = _message("PING")
PONG = _message("PONG")


def is_keepalive(message: rpc.Message) -> bool:
    """Whether MESSAGE is of this program and of no further interest, once a ping is answered."""
    return message.program == protocol.KEEPALIVE.number


def is_ping(message: rpc.Message) -> bool:
    """Whether MESSAGE is to be answered by PONG."""
    return (
        is_keepalive(message)
        and message.version == PING.version
        and message.type == MessageType.MESSAGE
        and message.procedure == PING.procedure
    )


class Keepalive:
    """Times in seconds of one steady clock. INTERVAL of 0: never a ping, never dead."""

    def __init__(self, interval: float, count: int) -> None:
        self._interval = interval
        self._count = count
        self._pinged = 0
        self._since: float | None = None
        """When the peer was heard, or when the last ping was due; None before the first look."""

    def received(self, now: float) -> None:
        """A message came."""
        self._since = now
        self._pinged = 0

    def due(self, now: float) -> Literal["ping", "dead"] | None:
        """What is to be done now; a ping is told once, and is sent by then."""
        if self.next(now) != 0:
            return None
        if self._pinged >= self._count:
            return "dead"
        self._since = now
        self._pinged += 1
        return "ping"

    def next(self, now: float) -> float | None:
        """Seconds until ``due`` has something to tell; None: never."""
        if self._interval <= 0:
            return None
        if self._since is None:
            self._since = now
        return max(0.0, self._since + self._interval - now)
