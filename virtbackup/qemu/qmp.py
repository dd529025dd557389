# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP without any I/O: bytes in by ``receive_data``, messages out by ``next_message``.

Source: QEMU's docs/interop/qmp-spec: one JSON object a line, from QEMU ended by CR LF.
"""

import dataclasses
import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

MAX_LINE = 10 << 20
"""Bytes of one message; libvirt takes no more either (QEMU_MONITOR_MAX_RESPONSE). The schema has
300 KiB, a thousand disks in query-block have 1 MiB."""
MAX_WEIGHT = 128 << 20
"""What one message may take in memory, by ``weight``. Block info of MAX_LINE bytes stays below."""
MAX_TEXT = 1000
"""Characters of what QEMU says that are passed on to people."""
_MAX_TIME = 1 << 62


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
    return _ENCODER.encode(message).encode() + b"\r\n"


class Parser:
    """Splits what QEMU sends into messages, however it was cut on the way.

    It holds at most one message that has no end yet, and what came with the end of the last.
    """

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max_line = max_line
        self._buffer = bytearray()
        self._searched = 0
        """How much of the buffer has no end of a line in it."""

    def receive_data(self, data: bytes) -> None:
        """Take bytes as they came. Errors: ProtocolError for a line without an end, and when the
        messages that came before are not taken."""
        if len(self._buffer) > self._max_line and self._end() >= 0:
            raise ProtocolError(f"more than {self._max_line} bytes of messages are not taken")
        self._buffer += data
        if len(self._buffer) > self._max_line and not 0 <= self._end() <= self._max_line:
            raise self._too_long()

    def next_line(self) -> bytes | None:
        """The next whole line, its end stripped, or None until more data comes. Errors:
        ProtocolError, at once, for what begins no message: its line may have no end, as in what an
        NBD server greets with."""
        while (end := self._end()) >= 0:
            if end > self._max_line:
                raise self._too_long()
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[: end + 1]
            self._searched = 0
            if line:
                return line
        if self._buffer[:1] not in _BEGINNINGS:
            raise ProtocolError(f"not a QMP message: {bytes(self._buffer[:100])!r}")
        return None

    def next_message(self) -> Message | None:
        """The next message, or None until more data comes. Errors: ProtocolError."""
        line = self.next_line()
        return None if line is None else decode(line)

    def _end(self) -> int:
        """Where the first line ends; negative where it does not."""
        end = self._buffer.find(b"\n", self._searched)
        self._searched = len(self._buffer) if end < 0 else end
        return end

    def _too_long(self) -> ProtocolError:
        return ProtocolError(f"a message is longer than {self._max_line} bytes")


def weight(line: bytes) -> int:
    """Bytes that LINE takes once it is decoded, guessed from above: a value of one character is an
    object of dozens of bytes, and one wide character makes every one of its string wide."""
    wide = not line.isascii() or b"\\u" in line
    return len(line) * (4 if wide else 1) + 100 * sum(map(line.count, (b"{", b"[", b",", b":")))


def shown(value: Any) -> str:
    """VALUE of any size and shape in one short line, for an error's text."""
    return reprlib.repr(value)[:200]


def one_line(text: str) -> str:
    """What QEMU said, made fit for one line of an error."""
    return _CONTROL.sub(" ", text[:MAX_TEXT]) + ("..." if len(text) > MAX_TEXT else "")


def is_plain(text: str) -> bool:
    """Whether TEXT can be a name: not so long, and nothing in it that a line or XML cannot hold."""
    return len(text) <= MAX_TEXT and not _CONTROL.search(text)


def decode(line: bytes) -> Message:
    """One line as a message. Errors: ProtocolError for anything QMP does not know."""
    if weight(line) > MAX_WEIGHT:
        raise ProtocolError(f"a message of {len(line)} bytes has too many values")
    match _json(line):
        case {"return": value, "id": id} if type(id) is int:
            return Success(id, value)
        case {"error": {"class": str(error_class), "desc": str(desc)}} as message:
            id = message.get("id")
            return Failure(id if type(id) is int else None, error_class, one_line(desc))
        case {"event": str(name), "timestamp": {"seconds": s, "microseconds": us}} as message:
            data = message.get("data", {})
            if isinstance(data, dict) and _is_time(s) and _is_time(us):
                return Event(name, data, s + us / 1e6)
        case {"QMP": {"version": {"qemu": qemu, "package": str(package)}}}:
            match qemu:
                case {"major": major, "minor": minor, "micro": micro}:
                    if all(map(_is_version, (major, minor, micro))):
                        return Greeting((major, minor, micro), package)
    raise ProtocolError(f"not a QMP message: {line[:100]!r}")


def _json(line: bytes) -> Any:
    """The value in LINE: JSON by the letter, and no text that UTF-8 cannot carry."""
    try:
        text = line.decode()
        value = _DECODER.decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as failure:
        raise ProtocolError(f"not JSON: {failure}") from failure
    return value


def _is_time(value: Any) -> bool:
    return type(value) is int and abs(value) < _MAX_TIME


def _is_version(value: Any) -> bool:
    """Versions are told as major * 1000000 + minor * 1000 + micro."""
    return type(value) is int and 0 <= value < 1000


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


_BEGINNINGS = (b"", b"{", b" ", b"\t", b"\r")
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character, as JSON writes it: QEMU sends both halves."""
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ufffe\uffff]+")
