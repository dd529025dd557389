# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes to a disk that another process has open, which takes the bytes out of our memory itself.

This is the guest's side of vhost-user-blk, as a driver in a guest would be for qemu-storage-daemon:
commands are in a ring that both processes see, an eventfd tells of new ones, another of those that
are done. Over a socket, each byte would be copied twice more, which costs as much as all the rest
of a write. Sources: QEMU's docs/interop/vhost-user.rst; the virtio specification 1.1, 2.6 (split
virtqueues) and 5.2 (block devices).
"""

import ctypes
import errno
import mmap
import os
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable

Done = Callable[[int], object]
"""Is told what became of a command: 0, or an error number."""

SECTOR = 512
COMMANDS = 64
"""At once."""

_VERSION = 1
_REQUEST = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDRESSES = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<IIQQQQ")
_CONFIG = struct.Struct("<III")
_CONFIG_SIZE = 8
(_GET_FEATURES, _SET_FEATURES, _SET_OWNER, _SET_MEM_TABLE) = (1, 2, 3, 5)
(_SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE) = (8, 9, 10)
(_SET_VRING_KICK, _SET_VRING_CALL) = (12, 13)
(_GET_PROTOCOL_FEATURES, _SET_PROTOCOL_FEATURES, _SET_VRING_ENABLE, _GET_CONFIG) = (15, 16, 18, 24)
_FLUSH, _WRITE_ZEROES, _PROTOCOL, _VERSION_1 = 1 << 9, 1 << 14, 1 << 30, 1 << 32
_WANTED = _FLUSH | _WRITE_ZEROES | _PROTOCOL | _VERSION_1
_CONFIG_PROTOCOL = 1 << 9

_TYPE_OUT, _TYPE_FLUSH, _TYPE_WRITE_ZEROES = 1, 4, 13
_NEXT, _DEVICE_WRITES = 1, 2
_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")
_DESCRIPTOR = struct.Struct("<QIHH")
_INDEX = struct.Struct("<H")
_USED = struct.Struct("<II")
_PARTS = 3
"""Descriptors of a command: header, data, status."""
_ENTRIES = 256
_DESCRIPTORS_AT = 0
_AVAILABLE_AT = _DESCRIPTORS_AT + _ENTRIES * _DESCRIPTOR.size
_USED_AT = _AVAILABLE_AT + 4096
_COMMANDS_AT = _USED_AT + 4096
_COMMAND = 64
"""Bytes of a command's header, of its range and of its status, at 0, 16 and 32."""
_RING = _COMMANDS_AT + COMMANDS * _COMMAND
_BASE = 1 << 32
"""Where the memory begins, as the addresses in the ring have it."""


class Lost(Exception):
    """The other process is gone, or is no server of a disk; the text says so."""


class Memory:
    """SIZE bytes that another process may be given to see. Errors: OSError."""

    def __init__(self, size: int) -> None:
        self.size = _RING + size
        self.fd = os.memfd_create("virtbackup", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, self.size)
            self._map = mmap.mmap(self.fd, self.size)
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._taken = _RING

    def take(self, size: int) -> memoryview:
        """SIZE bytes that were not taken before."""
        start, self._taken = self._taken, self._taken + size
        assert self._taken <= self.size, size
        return self.view[start : self._taken]

    def place(self, data: memoryview) -> int | None:
        """Where DATA is in the memory; None: elsewhere."""
        if data.readonly:
            return None
        place = ctypes.addressof(ctypes.c_char.from_buffer(data)) - self._address
        return place if 0 <= place < self.size else None

    def close(self) -> None:
        """Nobody is given it any more; the memory is there as long as anybody has part of it."""
        os.close(self.fd)


class Client:
    """A disk that the server at the other end of a connected socket has."""

    most_zeroes = 16 << 20
    """Bytes of one command; QEMU takes no more."""

    def __init__(self, server: socket.socket, memory: Memory) -> None:
        self._server = server
        self._memory = memory
        self._ring = memory.view
        # Stored and loaded in one piece, which ``struct`` does not do: it clears first.
        self._available = memory.view[_AVAILABLE_AT + 2 : _AVAILABLE_AT + 4].cast("H")
        self._used = memory.view[_USED_AT + 2 : _USED_AT + 4].cast("H")
        self._kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._free = list(range(COMMANDS))
        self._under_way: dict[int, Done] = {}
        self._issued = self._told = self._seen = 0
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Come to terms, which waits for a server that is not up yet. Errors: Lost."""
        (has,) = _U64.unpack(self._ask(_GET_FEATURES))
        if _WANTED & ~has:
            raise Lost(f"it has not all features that are needed: {has:#x}")
        self._tell(_SET_OWNER)
        (protocol,) = _U64.unpack(self._ask(_GET_PROTOCOL_FEATURES))
        self._tell(_SET_PROTOCOL_FEATURES, _U64.pack(protocol & _CONFIG_PROTOCOL))
        self._tell(_SET_FEATURES, _U64.pack(_WANTED))
        region = _REGION.pack(1, 0, _BASE, self._memory.size, _BASE, 0)
        self._tell(_SET_MEM_TABLE, region, self._memory.fd)
        self._tell(_SET_VRING_NUM, _STATE.pack(0, _ENTRIES))
        self._tell(_SET_VRING_BASE, _STATE.pack(0, 0))
        addresses = (_BASE + at for at in (_DESCRIPTORS_AT, _USED_AT, _AVAILABLE_AT))
        self._tell(_SET_VRING_ADDR, _ADDRESSES.pack(0, 0, *addresses, 0))
        self._tell(_SET_VRING_CALL, _U64.pack(0), self._call)
        self._tell(_SET_VRING_KICK, _U64.pack(0), self._kick)
        self._tell(_SET_VRING_ENABLE, _STATE.pack(0, 1))
        # All before is done once this is answered.
        self._ask(_GET_CONFIG, _CONFIG.pack(0, _CONFIG_SIZE, 0) + bytes(_CONFIG_SIZE))

    def write(self, offset: int, data: memoryview, done: Done) -> None:
        """DATA is in the memory, in whole sectors, and stays as it is until DONE is called."""
        place = self._memory.place(data)
        assert place is not None
        self._issue(_TYPE_OUT, offset, (place, len(data)), done)

    def write_zeroes(self, offset: int, length: int, done: Done) -> None:
        """So that they take no space; ``most_zeroes`` at most, in whole sectors."""
        command = self._free[-1]
        at = _COMMANDS_AT + command * _COMMAND + 16
        _RANGE.pack_into(self._ring, at, offset // SECTOR, length // SECTOR, 0)
        self._issue(_TYPE_WRITE_ZEROES, 0, (at, _RANGE.size), done)

    def flush(self, done: Done) -> None:
        """When it is done, what was done before is in the file, tables and all."""
        self._issue(_TYPE_FLUSH, 0, None, done)

    def push(self) -> None:
        """Have the server begin with what it was not told of yet."""
        if self._told != self._issued:
            self._told = self._issued
            self._fence()
            self._available[0] = _index(self._issued % (1 << 16))
            os.eventfd_write(self._kick, 1)

    def register(self, poll: select.poll) -> None:
        self.push()
        poll.register(self._call, select.POLLIN)
        poll.register(self._server, select.POLLIN)

    def notify(self, fd: int, _events: int) -> None:
        """See to what poll found. Errors: Lost."""
        if fd == self._call:
            os.eventfd_read(self._call)
            self._complete()
        elif fd == self._server.fileno():
            raise Lost("the program that writes it has ended")

    def close(self) -> None:
        self._server.close()
        os.close(self._kick)
        os.close(self._call)

    def _issue(self, kind: int, offset: int, data: tuple[int, int] | None, done: Done) -> None:
        """A command of a KIND with DATA, (place, length), of the memory."""
        command, ring = self._free.pop(), self._ring
        header, first = _COMMANDS_AT + command * _COMMAND, command * _PARTS
        status = header + 32
        _HEADER.pack_into(ring, header, kind, 0, offset // SECTOR)
        ring[status] = 0xFF
        self._describe(first, header, _HEADER.size, _NEXT, first + 1)
        if data is not None:
            self._describe(first + 1, *data, _NEXT, first + 2)
            self._describe(first + 2, status, 1, _DEVICE_WRITES, 0)
        else:
            self._describe(first + 1, status, 1, _DEVICE_WRITES, 0)
        self._under_way[first] = done
        _INDEX.pack_into(ring, _AVAILABLE_AT + 4 + 2 * (self._issued % _ENTRIES), first)
        self._issued += 1

    def _describe(self, number: int, place: int, length: int, flags: int, following: int) -> None:
        at = _DESCRIPTORS_AT + number * _DESCRIPTOR.size
        _DESCRIPTOR.pack_into(self._ring, at, _BASE + place, length, flags, following)

    def _complete(self) -> None:
        ring = self._ring
        end = _index(self._used[0])
        self._fence()
        while self._seen % (1 << 16) != end:
            first, _ = _USED.unpack_from(ring, _USED_AT + 4 + 8 * (self._seen % _ENTRIES))
            self._seen += 1
            done = self._under_way.pop(first, None)
            if done is None:
                raise Lost("the program that writes it tells of a command that it was not given")
            command = first // _PARTS
            self._free.append(command)
            done(errno.EIO if ring[_COMMANDS_AT + command * _COMMAND + 32] else 0)

    def _fence(self) -> None:
        """What comes before is seen before what comes after, by processors that would not have it
        so by themselves: a lock is let go of, then taken."""
        for _ in range(2):
            with self._lock:
                pass

    def _tell(self, request: int, payload: bytes = b"", fd: int | None = None) -> None:
        message = _REQUEST.pack(request, _VERSION, len(payload)) + payload
        try:
            socket.send_fds(self._server, [message], [] if fd is None else [fd])
        except OSError as failure:
            raise Lost(failure.strerror) from failure

    def _ask(self, request: int, payload: bytes = b"") -> bytes:
        self._tell(request, payload)
        said, _, size = _REQUEST.unpack(self._receive(_REQUEST.size))
        if said != request or size > 4096:
            raise Lost(f"it answers {said} to {request}")
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        try:
            data = self._server.recv(size, socket.MSG_WAITALL)
        except OSError as failure:
            raise Lost(failure.strerror) from failure
        if len(data) < size:
            raise Lost("it has ended")
        return data


def _index(value: int) -> int:
    """A little-endian one in the processor's order, or the other way round."""
    return (
        value if sys.byteorder == "little" else int.from_bytes(value.to_bytes(2, "little"), "big")
    )
