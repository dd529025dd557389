# SPDX-License-Identifier: LGPL-2.1-or-later
"""The RPC's messages without any I/O: bytes and descriptors in by ``receive_data``, messages out
by ``next_message``; and what every peer makes of them: calls, replies, errors, events.

Source: libvirt's virnetprotocol.x and virnetmessage.c. A message is a length word that counts
itself, six words of header, and the payload. Descriptors follow the message: one NUL byte each,
which the length does not count, with the descriptor as the byte's SCM_RIGHTS.
"""

import collections
import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

from virtbackup.remote import program, protocol, xdr
from virtbackup.remote.program import MessageStatus, MessageType, Proc

ProtocolError = xdr.ProtocolError
CodecError = xdr.CodecError

LENGTH_SIZE = 4
"""Bytes of the length word."""
_HEADER = struct.Struct(">IIIiiIi")
"""Length, program, version, procedure, type, serial, status."""
_COUNT = struct.Struct(">I")
_PREFIX = LENGTH_SIZE + program.HEADER_SIZE


@dataclasses.dataclass(frozen=True)
class Message:
    """One message. ``type`` and ``status`` may be numbers that nobody knows. ``fds`` are the
    owner's to close; with descriptors, or room for them, the type is one of ``WITH_FDS``."""

    program: int
    version: int
    procedure: int
    type: int
    serial: int
    status: int = MessageStatus.OK
    payload: bytes = b""
    fds: tuple[int, ...] = ()

    @property
    def proc(self) -> Proc | None:
        """The row of our table; None when we do not know the procedure, or not in this version."""
        known = known_program(self)
        return None if known is None else known.by_number.get(self.procedure)

    def encode(self) -> bytes:
        """The bytes, behind which go the descriptors with their bytes. Errors: CodecError when
        a peer would not take it."""
        count = b""
        if self.type in program.WITH_FDS:
            count = _COUNT.pack(len(self.fds))
        if len(self.fds) > (program.FDS_MAX if count else 0):
            raise CodecError(f"{len(self.fds)} descriptors, at most {program.FDS_MAX}")
        length = _PREFIX + len(count) + len(self.payload)
        if length - LENGTH_SIZE > program.MESSAGE_MAX:
            raise CodecError(f"message of {length} bytes, at most {program.MESSAGE_MAX}")
        head = _HEADER.pack(
            length,
            self.program,
            self.version,
            self.procedure,
            self.type,
            self.serial,
            self.status,
        )
        return b"".join((head, count, self.payload))


def known_program(message: Message) -> program.Program | None:
    """The program of MESSAGE; None when we do not know it, or not in this version."""
    known = protocol.PROGRAMS.get(message.program)
    return known if known is not None and known.version == message.version else None


class Parser:
    """Splits what a peer sends into messages, however it was cut on the way.

    It holds at most one message that has no end yet, and what came with the end of the last.
    MAX_LENGTH: bytes of a message without its length word. After a ProtocolError the connection is
    of no use; ``take_fds`` gives what is to be closed.
    """

    def __init__(self, max_length: int = program.MESSAGE_MAX) -> None:
        self._max = max_length + LENGTH_SIZE
        self._buffer = bytearray()
        self._fds: collections.deque[int] = collections.deque()

    def receive_data(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes as they came, and the descriptors that came with them; those are the parser's
        now. Errors: ProtocolError for a length that cannot be, for too many descriptors, and when
        the messages that came before are not taken."""
        self._fds.extend(fds)
        if len(self._fds) > program.FDS_MAX:
            raise ProtocolError(f"more than {program.FDS_MAX} descriptors")
        if len(self._buffer) > self._max + program.FDS_MAX:
            raise ProtocolError(f"more than {self._max} bytes of messages are not taken")
        self._buffer += data
        self._length()

    def next_message(self) -> Message | None:
        """The next message with its descriptors, or None until more data comes.
        Errors: ProtocolError."""
        length = self._length()
        if length is None or len(self._buffer) < length:
            self._refuse_stray_fds()
            return None
        _, *header = _HEADER.unpack_from(self._buffer)
        start, count = _PREFIX, 0
        if header[3] in program.WITH_FDS:
            count = self._count(length)
            start += _COUNT.size
        if len(self._buffer) < length + count:
            return None
        if any(self._buffer[length : length + count]):
            raise ProtocolError("descriptors come with bytes that are not NUL")
        if len(self._fds) < count:
            raise ProtocolError(f"{len(self._fds)} of {count} descriptors came")
        payload = bytes(memoryview(self._buffer)[start:length])
        del self._buffer[: length + count]
        fds = tuple(self._fds.popleft() for _ in range(count))
        program_, version, procedure, type, serial, status = header
        return Message(program_, version, procedure, type, serial, status, payload, fds)

    @property
    def held_bytes(self) -> int:
        """How many bytes wait for the end of their message."""
        return len(self._buffer)

    def take_fds(self) -> list[int]:
        """The descriptors that belong to no message yet, for their new owner to close."""
        taken = list(self._fds)
        self._fds.clear()
        return taken

    def _length(self) -> int | None:
        """The first message's length word; None where it is not all there."""
        if len(self._buffer) < LENGTH_SIZE:
            return None
        (length,) = _COUNT.unpack_from(self._buffer)
        if not _PREFIX <= length <= self._max:
            raise ProtocolError(f"message of {length} bytes, not from {_PREFIX} to {self._max}")
        return int(length)

    def _count(self, length: int) -> int:
        """How many descriptors the first message, which is all there, says it has."""
        if length < _PREFIX + _COUNT.size:
            raise ProtocolError("the message ends within its number of descriptors")
        (count,) = _COUNT.unpack_from(self._buffer, _PREFIX)
        if count > program.FDS_MAX:
            raise ProtocolError(f"{count} descriptors, at most {program.FDS_MAX}")
        return int(count)

    def _refuse_stray_fds(self) -> None:
        if self._fds and not self._buffer:
            raise ProtocolError(f"{len(self._fds)} descriptors that no message has announced")


# --- what is sent ---


def call(
    of: program.Program, name: str, serial: int, args: Any = None, fds: Sequence[int] = ()
) -> Message:
    """A call of the procedure NAME. Errors: CodecError when ARGS do not fit."""
    proc = of[name]
    type = MessageType.CALL_WITH_FDS if fds else MessageType.CALL
    payload = _payload(proc.args, args)
    return Message(of.number, of.version, proc.number, type, serial, 0, payload, tuple(fds))


def reply(to: Message, ret: Any = None, fds: Sequence[int] = ()) -> Message:
    """The good answer to a call that is in our table. Errors: CodecError when RET does not fit;
    then an error is due."""
    assert to.proc is not None
    type = MessageType.REPLY_WITH_FDS if fds else MessageType.REPLY
    return dataclasses.replace(
        to, type=type, status=MessageStatus.OK, payload=_payload(to.proc.ret, ret), fds=tuple(fds)
    )


def event(of: program.Program, name: str, value: Any) -> Message:
    """The event NAME. Its serial is 1, as libvirtd's is. Errors: CodecError."""
    proc = of[name]
    payload = _payload(proc.args, value)
    return Message(of.number, of.version, proc.number, MessageType.MESSAGE, 1, 0, payload)


def _payload(kind: type | None, value: Any) -> bytes:
    assert type(value) is (kind or type(None)), (kind, value)
    return xdr.encode(value)


# --- what is received ---


def args(message: Message) -> Any:
    """What a call of, or an event in, our table carries; None for void. Errors: CodecError."""
    assert message.proc is not None
    return _decoded(message.proc.args, message.payload)


def ret(message: Message) -> Any:
    """What a good reply to a call of our table carries; None for void. Errors: CodecError."""
    assert message.proc is not None
    return _decoded(message.proc.ret, message.payload)


def _decoded(kind: type | None, payload: bytes) -> Any:
    return None if kind is None else xdr.decode(kind, payload)
