# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP without any I/O: bytes in by ``receive_data``, messages out by ``next_message``.

Source: QEMU's docs/interop/qmp-spec: one JSON object a line, from QEMU ended by CR LF.
"""

import collections
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

MAX_LINE = 64 << 20
"""Bytes of one message; a monitor that sends more is broken (the schema is the largest)."""


class ProtocolError(Exception):
    """What came is not QMP; the connection cannot go on."""


@dataclasses.dataclass(frozen=True)
class Greeting:
    """The first message: QEMU's version (major, minor, micro) and its packager's word."""

    version: tuple[int, int, int]
    package: str


@dataclasses.dataclass(frozen=True)
class Success:
    """A command's ``return``."""

    id: int
    value: Any


@dataclasses.dataclass(frozen=True)
class Failure:
    """A command's ``error``; ``id`` is None when QEMU could not tell which command it was."""

    id: int | None
    error_class: str
    desc: str


@dataclasses.dataclass(frozen=True)
class Event:
    """An asynchronous event; ``time`` in seconds since the epoch by QEMU's clock."""

    name: str
    data: Mapping[str, Any]
    time: float


Message = Greeting | Success | Failure | Event


def encode(execute: str, arguments: Mapping[str, Any] | None, id: int) -> bytes:
    """One command as a line."""
    message: dict[str, Any] = {"execute": execute}
    if arguments:
        message["arguments"] = arguments
    message["id"] = id
    return json.dumps(message, separators=(",", ":")).encode() + b"\r\n"


class Parser:
    """Splits what QEMU sends into messages, however it was cut on the way."""

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max_line = max_line
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._lines: collections.deque[bytes] = collections.deque()

    def receive_data(self, data: bytes) -> None:
        """Take bytes as they came. Errors: ProtocolError for a line without an end."""
        *ended, rest = data.split(b"\n")
        for line in ended:
            self._keep(line)
            self._lines.append(b"".join(self._pending))
            self._pending.clear()
            self._pending_size = 0
        self._keep(rest)

    def _keep(self, part: bytes) -> None:
        self._pending_size += len(part)
        if self._pending_size > self._max_line:
            raise ProtocolError(f"a message is longer than {self._max_line} bytes")
        self._pending.append(part)

    def next_line(self) -> bytes | None:
        """The next whole line, its end stripped, or None until more data comes."""
        while self._lines:
            if line := self._lines.popleft().strip():
                return line
        return None

    def next_message(self) -> Message | None:
        """The next message, or None until more data comes. Errors: ProtocolError."""
        line = self.next_line()
        return None if line is None else decode(line)


def decode(line: bytes) -> Message:
    """One line as a message. Errors: ProtocolError for anything QMP does not know."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as failure:
        raise ProtocolError(f"not JSON: {failure}") from failure
    match message:
        case {"return": value, "id": int(id)} if not isinstance(id, bool):
            return Success(id, value)
        case {"error": {"class": str(error_class), "desc": str(desc)}}:
            id = message.get("id")
            return Failure(id if type(id) is int else None, error_class, desc)
        case {
            "event": str(name),
            "timestamp": {"seconds": int(seconds), "microseconds": int(microseconds)},
        }:
            data = message.get("data", {})
            if isinstance(data, dict):
                return Event(name, data, seconds + microseconds / 1e6)
        case {
            "QMP": {
                "version": {
                    "qemu": {"major": int(major), "minor": int(minor), "micro": int(micro)},
                    "package": str(package),
                }
            }
        }:
            return Greeting((major, minor, micro), package)
    raise ProtocolError(f"not a QMP message: {line[:100]!r}")
