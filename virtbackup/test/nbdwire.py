# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server's side of the NBD protocol, read-only: bytes in by ``receive_data``, replies out by
``next_message``. Pure.

Source: the NBD project's doc/proto.md, fixed newstyle with structured replies. For the fake QEMU,
so that any NBD client can pull from it.
"""

import dataclasses
import enum
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

MAX_REQUEST = 32 << 20
"""Bytes that may be read at once; what a server tells that it takes."""
_MAX_OPTION = 1 << 16
_MAX_STRING = 4096

HOLE, ZERO = 1, 2
"""Flags of ``base:allocation``."""
DIRTY = 1
"""Flag of ``qemu:dirty-bitmap:NAME``."""
ALLOCATION = "base:allocation"

_OPTION_MAGIC = 0x49484156454F5054
_OPTION_REPLY_MAGIC = 0x0003E889045565A9
_REQUEST_MAGIC = 0x25609513
_SIMPLE_MAGIC = 0x67446698
_CHUNK_MAGIC = 0x668E33EF
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2


class _Option(enum.IntEnum):
    """What a client may ask for before it reads; the protocol's NBD_OPT_*."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    START_TLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


_ACK, _SERVER, _REP_INFO, _REP_CONTEXT = 1, 2, 3, 4
_UNSUP, _INVALID, _TLS_REQUIRED, _UNKNOWN = ((1 << 31) + code for code in (1, 3, 5, 6))
_INFO_EXPORT, _INFO_NAME, _INFO_DESCRIPTION, _INFO_BLOCK_SIZE = 0, 1, 2, 3

# HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_DF, CAN_MULTI_CONN, SEND_CACHE
_FLAGS = 1 | 2 | 4 | 1 << 7 | 1 << 8 | 1 << 10

_READ, _WRITE, _DISC, _FLUSH, _TRIM, _CACHE, _WRITE_ZEROES, _BLOCK_STATUS = range(8)
_FLAG_DF, _FLAG_REQ_ONE = 4, 8
_DONE = 1
_CHUNK_NONE, _CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS, _CHUNK_ERROR = 0, 1, 2, 5, (1 << 15) + 1
_EPERM, _EINVAL = 1, 22

_OPTION_HEAD = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_CHUNK = struct.Struct(">IHHQI")


class ProtocolError(Exception):
    """What came is not NBD, or more than is taken; the connection cannot go on."""


class Unreadable(Exception):
    """An export cannot be read; ``errno`` is the protocol's number."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


@dataclasses.dataclass(frozen=True)
class Extent:
    """LENGTH bytes that are alike."""

    length: int
    flags: int


class Export(Protocol):
    """What is served."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def description(self) -> str | None:
        """Words for people."""

    def contexts(self) -> Sequence[str]:
        """The metadata that is known of it."""

    def read(self, offset: int, length: int) -> bytes:
        """LENGTH bytes at OFFSET. Errors: Unreadable."""

    def extents(self, context: str, offset: int, length: int) -> Sequence[Extent]:
        """CONTEXT from OFFSET on, LENGTH bytes of it. Errors: Unreadable."""


class Server:
    """One client's connection."""

    def __init__(self, exports: Callable[[], Mapping[str, Export]], tls: bool = False) -> None:
        """EXPORTS gives what can be chosen now, by name. TLS is demanded, but not simulated: nobody
        is let in."""
        self._exports = exports
        self._tls = tls
        self._buffer = bytearray()
        self._flags: int | None = None
        """The client's, once they came."""
        self._structured = False
        self._contexts: tuple[str, tuple[str, ...]] = ("", ())
        """Of which export, and which."""
        self.export: str | None = None
        """The one that was chosen: the handshake is done."""
        self._size = 0
        self.over = False
        """Nothing more is to be read or sent."""

    def greeting(self) -> bytes:
        """What the server says first."""
        return b"NBDMAGIC" + struct.pack(">QH", _OPTION_MAGIC, _FIXED_NEWSTYLE | _NO_ZEROES)

    def receive_data(self, data: bytes) -> None:
        """Take bytes as they came."""
        self._buffer += data

    def next_message(self) -> bytes | None:
        """What is to be sent for the next whole message; None until more data comes.

        Errors: ProtocolError.
        """
        if self.over:
            return None
        if self._flags is None:
            taken = self._take(4)
            if taken is not None:
                self._flags = int.from_bytes(taken, "big")
                if self._flags & ~(_FIXED_NEWSTYLE | _NO_ZEROES):
                    raise ProtocolError(f"unknown client flags {self._flags:#x}")
            return None if taken is None else b""
        return self._next_option() if self.export is None else self._next_request()

    def _take(self, length: int) -> bytes | None:
        if len(self._buffer) < length:
            return None
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    # --- the handshake ---

    def _next_option(self) -> bytes | None:
        if len(self._buffer) < _OPTION_HEAD.size:
            return None
        magic, option, length = _OPTION_HEAD.unpack_from(self._buffer)
        if magic != _OPTION_MAGIC or length > _MAX_OPTION:
            raise ProtocolError("not an option, or too large a one")
        taken = self._take(_OPTION_HEAD.size + length)
        return None if taken is None else self._answer(option, taken[_OPTION_HEAD.size :])

    def _answer(self, option: int, data: bytes) -> bytes:
        if self._tls and option not in (_Option.ABORT, _Option.START_TLS):
            self.over = option == _Option.EXPORT_NAME
            return b"" if self.over else _reply(option, _TLS_REQUIRED)
        try:
            match option:
                case _Option.EXPORT_NAME:
                    return self._export_name(data.decode(errors="surrogateescape"))
                case _Option.ABORT:
                    self.over = True
                    return _reply(option, _ACK)
                case _Option.LIST:
                    return self._list(data)
                case _Option.INFO | _Option.GO:
                    return self._go(option, data)
                case _Option.STRUCTURED_REPLY:
                    if data:
                        raise ValueError("structured replies take no data")
                    self._structured = True
                    return _reply(option, _ACK)
                case _Option.LIST_META_CONTEXT | _Option.SET_META_CONTEXT:
                    return self._meta_context(option, data)
        except (ValueError, struct.error) as failure:
            return _reply(option, _INVALID, str(failure).encode())
        return _reply(option, _UNSUP)

    def _list(self, data: bytes) -> bytes:
        if data:
            raise ValueError("the list takes no data")
        told = []
        for name, export in self._exports().items():
            text = name.encode()
            about = (export.description or "").encode()
            told.append(_reply(_Option.LIST, _SERVER, struct.pack(">I", len(text)) + text + about))
        return b"".join(told) + _reply(_Option.LIST, _ACK)

    def _export_name(self, name: str) -> bytes:
        """The option that has no way to say no."""
        found = self._exports().get(name)
        if found is None:
            self.over = True
            return b""
        self.export, self._size = name, found.size
        padding = b"" if (self._flags or 0) & _NO_ZEROES else bytes(124)
        return struct.pack(">QH", found.size, _FLAGS) + padding

    def _go(self, option: int, data: bytes) -> bytes:
        name, rest = _string(data)
        (count,) = struct.unpack_from(">H", rest)
        asked = set(struct.unpack(f">{count}H", rest[2:]))
        found = self._exports().get(name)
        if found is None:
            return _reply(option, _UNKNOWN, f"export '{name}' not present".encode())
        infos = [struct.pack(">HQH", _INFO_EXPORT, found.size, _FLAGS)]
        if _INFO_NAME in asked:
            infos.append(struct.pack(">H", _INFO_NAME) + name.encode())
        if _INFO_DESCRIPTION in asked and found.description is not None:
            infos.append(struct.pack(">H", _INFO_DESCRIPTION) + found.description.encode())
        infos.append(struct.pack(">HIII", _INFO_BLOCK_SIZE, 1, 4096, MAX_REQUEST))
        if option == _Option.GO:
            self.export, self._size = name, found.size
        told = b"".join(_reply(option, _REP_INFO, info) for info in infos)
        return told + _reply(option, _ACK)

    def _meta_context(self, option: int, data: bytes) -> bytes:
        if not self._structured:
            raise ValueError("structured replies come first")
        name, rest = _string(data)
        (count,) = struct.unpack_from(">I", rest)
        rest = rest[4:]
        queries = []
        for _ in range(count):
            query, rest = _string(rest)
            queries.append(query)
        if rest:
            raise ValueError("too much data")
        found = self._exports().get(name)
        if found is None:
            return _reply(option, _UNKNOWN, f"export '{name}' not present".encode())
        known = found.contexts()
        if option == _Option.SET_META_CONTEXT:
            chosen = tuple(context for context in known if context in queries)
            self._contexts = name, chosen
        else:
            chosen = tuple(c for c in known if not queries or _is_asked(c, queries))
        told = [
            _reply(option, _REP_CONTEXT, struct.pack(">I", number) + context.encode())
            for number, context in enumerate(chosen)
        ]
        return b"".join(told) + _reply(option, _ACK)

    # --- transmission ---

    def _next_request(self) -> bytes | None:
        taken = self._take(_REQUEST.size)
        if taken is None:
            return None
        magic, flags, type, cookie, offset, length = _REQUEST.unpack(taken)
        if magic != _REQUEST_MAGIC or type == _WRITE:
            # What would be written follows, and is not taken.
            raise ProtocolError("not a request that a read-only server can take")
        if type == _DISC:
            self.over = True
            return b""
        try:
            return b"".join(self._serve(type, flags, cookie, offset, length))
        except Unreadable as failure:
            return self._failed(type, cookie, failure.errno)

    def _serve(
        self, type: int, flags: int, cookie: int, offset: int, length: int
    ) -> Iterator[bytes]:
        export = self._exports().get(self.export or "")
        if export is None:
            raise ProtocolError("the export is gone")
        if type == _FLUSH:
            yield self._succeeded(cookie)
            return
        if type in (_TRIM, _WRITE_ZEROES):
            raise Unreadable(_EPERM)
        whole = length > 0 and offset + length <= self._size
        if not whole or type not in (_READ, _CACHE, _BLOCK_STATUS):
            raise Unreadable(_EINVAL)
        if type == _CACHE:
            yield self._succeeded(cookie)
        elif type == _READ:
            if length > MAX_REQUEST:
                raise Unreadable(_EINVAL)
            yield from self._read(export, flags, cookie, offset, length)
        else:
            yield from self._status(export, flags, cookie, offset, length)

    def _read(
        self, export: Export, flags: int, cookie: int, offset: int, length: int
    ) -> Iterator[bytes]:
        if not self._structured:
            yield self._succeeded(cookie) + export.read(offset, length)
            return
        extents: Sequence[Extent] = export.extents(ALLOCATION, offset, length)
        if flags & _FLAG_DF:
            extents = [Extent(length, 0)]
        end = offset + length
        for extent in extents:
            if extent.flags & ZERO:
                body = struct.pack(">QI", offset, extent.length)
                kind = _CHUNK_HOLE
            else:
                body = struct.pack(">Q", offset) + export.read(offset, extent.length)
                kind = _CHUNK_DATA
            offset += extent.length
            yield _chunk(cookie, kind, body, last=offset == end)

    def _status(
        self, export: Export, flags: int, cookie: int, offset: int, length: int
    ) -> Iterator[bytes]:
        name, contexts = self._contexts
        if name != self.export or not contexts:
            raise Unreadable(_EINVAL)
        for number, context in enumerate(contexts):
            extents = export.extents(context, offset, length)[
                : 1 if flags & _FLAG_REQ_ONE else None
            ]
            body = struct.pack(">I", number)
            body += b"".join(struct.pack(">II", e.length, e.flags) for e in extents)
            yield _chunk(cookie, _CHUNK_STATUS, body, last=number == len(contexts) - 1)

    def _succeeded(self, cookie: int) -> bytes:
        if self._structured:
            return _chunk(cookie, _CHUNK_NONE, b"", last=True)
        return struct.pack(">IIQ", _SIMPLE_MAGIC, 0, cookie)

    def _failed(self, type: int, cookie: int, errno: int) -> bytes:
        if self._structured:
            return _chunk(cookie, _CHUNK_ERROR, struct.pack(">IH", errno, 0), last=True)
        return struct.pack(">IIQ", _SIMPLE_MAGIC, errno, cookie)


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def _chunk(cookie: int, kind: int, body: bytes, last: bool) -> bytes:
    return _CHUNK.pack(_CHUNK_MAGIC, _DONE if last else 0, kind, cookie, len(body)) + body


def _string(data: bytes) -> tuple[str, bytes]:
    """A text with its length in front, and what follows it."""
    (length,) = struct.unpack_from(">I", data)
    if length > len(data) - 4:
        raise ValueError("a text is longer than its option")
    return _text(data[4 : 4 + length]), data[4 + length :]


def _text(data: bytes) -> str:
    if len(data) > _MAX_STRING:
        raise ValueError("a text is too long")
    return data.decode()


def _is_asked(context: str, queries: Sequence[str]) -> bool:
    """Whether a list of QUERIES means CONTEXT: it, or its namespace, ``base:``."""
    return any(context == query or (query.endswith(":") and context.startswith(query))
               for query in queries)  # fmt: skip
