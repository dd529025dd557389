# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a program of the RPC is made of: numbers, limits and its table of procedures.

Source: libvirt's virnetprotocol.x.
"""

import dataclasses
import enum
import functools
from typing import Literal

MESSAGE_MAX = 33554432
"""Bytes of a message without its length word (VIR_NET_MESSAGE_MAX)."""
HEADER_SIZE = 24
"""Bytes (VIR_NET_MESSAGE_HEADER_MAX)."""
FDS_MAX = 32
"""File descriptors with one message (VIR_NET_MESSAGE_NUM_FDS_MAX)."""
STRING_MAX = 4194304
"""Bytes (VIR_NET_MESSAGE_STRING_MAX, REMOTE_STRING_MAX)."""
UUID_SIZE = 16
"""Bytes (VIR_UUID_BUFLEN)."""


class MessageType(enum.IntEnum):
    """virNetMessageType."""

    CALL = 0
    REPLY = 1
    MESSAGE = 2
    """An event, or keepalive."""
    STREAM = 3
    CALL_WITH_FDS = 4
    REPLY_WITH_FDS = 5
    STREAM_HOLE = 6


WITH_FDS = frozenset({MessageType.CALL_WITH_FDS, MessageType.REPLY_WITH_FDS})


class MessageStatus(enum.IntEnum):
    """virNetMessageStatus."""

    OK = 0
    ERROR = 1
    CONTINUE = 2


@dataclasses.dataclass(frozen=True)
class Proc:
    """One procedure or event. ``args`` and ``ret`` are structs for xdr, None is ``void``; what an
    event carries is its ``args``."""

    number: int
    name: str
    args: type | None = None
    ret: type | None = None
    kind: Literal["call", "event"] = "call"


@dataclasses.dataclass(frozen=True)
class Program:
    """One numbered set of procedures. ``REMOTE["CONNECT_OPEN"]`` is the procedure of that name."""

    name: str
    number: int
    version: int
    procedures: tuple[Proc, ...]

    def __getitem__(self, name: str) -> Proc:
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Proc]:
        return {proc.name: proc for proc in self.procedures}

    @functools.cached_property
    def by_number(self) -> dict[int, Proc]:
        """Number -> procedure."""
        return {proc.number: proc for proc in self.procedures}


def event(number: int, name: str, args: type) -> Proc:
    """A row of an event, which a server sends unasked."""
    return Proc(number, name, args, kind="event")
