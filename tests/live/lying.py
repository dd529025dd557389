# SPDX-License-Identifier: LGPL-2.1-or-later
"""An NBD server that says what it is told to, right or wrong: nbdkit would not."""

import contextlib
import pathlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

from tests import waiting

_MAGIC, _OPTION_MAGIC = 0x4E42444D41474943, 0x49484156454F5054
_OPTION_REPLY, _STRUCTURED_REPLY = 0x3E889045565A9, 0x668E33EF
_GO, _STRUCTURED, _SET_META_CONTEXT = 7, 8, 10
_ACK, _INFO, _META_CONTEXT, _UNSUPPORTED = 1, 3, 4, (1 << 31) + 1
_NONE, _BLOCK_STATUS = 0, 5
_DISCONNECT, _STATUS = 2, 7
_FLAGS = 1 | 1 << 2 | 1 << 6
"""It has flags, can flush, and write zeroes."""


@contextlib.contextmanager
def serving(path: pathlib.Path, size: int, *told: Sequence[int]) -> Iterator[None]:
    """At the socket PATH to one client: an export of SIZE bytes, of which the answers to block
    status are TOLD, [length, flags, ...] each. What is written is not kept."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            connected, _ = listening.accept()
            with (
                connected,
                connected.makefile("rwb", buffering=0) as file,
                contextlib.suppress(OSError, struct.error),  # the client has hung up
            ):
                _serve(file, size, list(told))

        thread = threading.Thread(target=serve, daemon=True)  # nobody may come
        thread.start()
        try:
            yield
        finally:
            thread.join(waiting.DEADLINE)


def _read(file: "socket.SocketIO", form: str) -> tuple[int, ...]:
    data, size = b"", struct.calcsize(form)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return struct.unpack(form, data)


def _serve(file: "socket.SocketIO", size: int, told: list[Sequence[int]]) -> None:
    def reply(kind: int, data: bytes = b"") -> None:
        file.write(struct.pack(">QIII", _OPTION_REPLY, option, kind, len(data)) + data)

    def answer(kind: int, data: bytes = b"") -> None:
        file.write(struct.pack(">IHHQI", _STRUCTURED_REPLY, 1, kind, cookie, len(data)) + data)

    file.write(struct.pack(">QQH", _MAGIC, _OPTION_MAGIC, 3))
    _read(file, ">I")
    option = 0
    while option != _GO:
        _, option, length = _read(file, ">QII")
        _read(file, f"{length}s")
        if option == _SET_META_CONTEXT:
            reply(_META_CONTEXT, struct.pack(">I", 1) + b"base:allocation")
        elif option == _GO:
            reply(_INFO, struct.pack(">HQH", 0, size, _FLAGS))
        reply(_ACK if option in (_GO, _STRUCTURED, _SET_META_CONTEXT) else _UNSUPPORTED)
    command = 0
    while command != _DISCONNECT:
        _, _, command, cookie, _, length = _read(file, ">IHHQQI")
        if command == 1:
            _read(file, f"{length}s")
        if command == _STATUS:
            numbers = told.pop(0)
            answer(_BLOCK_STATUS, struct.pack(f">I{len(numbers)}I", 1, *numbers))
        elif command != _DISCONNECT:
            answer(_NONE)
