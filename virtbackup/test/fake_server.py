# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fake QEMU on real sockets: its monitor, and the NBD server that it is told to start.

The monitor serves one client at a time, as QEMU's does: the next waits without a greeting. Exports
show made-up disks: a pattern that tells disk and sector at the beginning, zeroes behind it.
"""

import array
import contextlib
import dataclasses
import errno
import fcntl
import logging
import os
import pathlib
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from virtbackup.qemu import qcow2, recording
from virtbackup.test import fake, fake_state, faults, nbdwire

logger = logging.getLogger(__name__)

MAX_FDS = 16
"""Descriptors that are taken with one message."""
_TRY_AGAIN = 0.01
"""Seconds after which to accept a client that could not be."""
_HEADER = 512
_SECTOR = 512
_CLUSTER = 1 << 16
_DATA = 1 << 20
"""Bytes of a made-up disk, at most, that are not zero."""


class File:
    """A file that a node has open."""

    def __init__(self, path: str | int, readonly: bool) -> None:
        """Errors: OSError; fake.NoFile for what is something else, fake.OtherAccess."""
        flags = os.O_RDONLY if readonly else os.O_RDWR
        if isinstance(path, int):
            if fcntl.fcntl(path, fcntl.F_GETFL) & os.O_ACCMODE != flags:
                raise fake.OtherAccess(errno.EACCES, os.strerror(errno.EACCES))
            self._fd = os.dup(path)
        else:
            # A pipe's other end is not waited for.
            self._fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(self._fd)
            raise fake.NoFile(errno.EINVAL, os.strerror(errno.EINVAL))
        self.key = found.st_dev, found.st_ino

    @property
    def size(self) -> int:
        return -(-os.fstat(self._fd).st_size // _SECTOR) * _SECTOR

    @property
    def header(self) -> bytes:
        return os.pread(self._fd, _HEADER, 0)

    def actual_size(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def format(self, size: int) -> None:
        for offset, data in qcow2.empty_image(size):
            os.pwrite(self._fd, data, offset)
        os.ftruncate(self._fd, qcow2.file_size(size))

    def close(self) -> None:
        os.close(self._fd)


@dataclasses.dataclass(frozen=True)
class Disk:
    """A made-up disk, as an export shows it."""

    name: str
    """Of the image it stands for: what its sectors tell."""
    size: int
    description: str | None = None
    bitmaps: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    """Name -> whether what is not zero is dirty; else nothing is."""
    readable: bool = True

    @property
    def data(self) -> int:
        """Bytes at the beginning that are not zero."""
        return min(self.size // 4 // _CLUSTER * _CLUSTER, _DATA)

    def contexts(self) -> Sequence[str]:
        return [nbdwire.ALLOCATION, *(f"qemu:dirty-bitmap:{name}" for name in self.bitmaps)]

    def read(self, offset: int, length: int) -> bytes:
        if not self.readable:
            raise nbdwire.Unreadable(errno.EOPNOTSUPP)
        end = min(offset + length, self.data)
        first = offset // _SECTOR
        sectors = [self._sector(number) for number in range(first, -(-end // _SECTOR))]
        told = b"".join(sectors)[offset - first * _SECTOR :][: max(0, end - offset)]
        return told + bytes(length - len(told))

    def _sector(self, number: int) -> bytes:
        line = f"{self.name} sector {number}\n".encode()
        return (line * (_SECTOR // len(line) + 1))[:_SECTOR]

    def extents(self, context: str, offset: int, length: int) -> Sequence[nbdwire.Extent]:
        if not self.readable:
            raise nbdwire.Unreadable(errno.EOPNOTSUPP)
        data, rest = 0, nbdwire.HOLE | nbdwire.ZERO
        if context != nbdwire.ALLOCATION:
            dirty = self.bitmaps.get(context.removeprefix("qemu:dirty-bitmap:"))
            if dirty is None:  # it was there when it was chosen
                raise nbdwire.Unreadable(errno.EINVAL)
            data, rest = nbdwire.DIRTY if dirty else 0, 0
        before = max(0, min(offset + length, self.data) - offset)
        found = [nbdwire.Extent(before, data), nbdwire.Extent(length - before, rest)]
        return [extent for extent in found if extent.length]


class Server:
    """One fake QEMU that listens at PATH from when it is made until ``close`` or ``quit``."""

    def __init__(
        self,
        path: pathlib.Path,
        recorded: recording.Recording,
        rules: Sequence[faults.Rule] = (),
    ) -> None:
        """Errors: OSError; ValueError for a recording that is no beginning."""
        self.path = path
        self._lock = threading.RLock()
        self._fake = fake.Fake(recorded, self, rules)
        self._nbd: _NbdServer | None = None
        self._client: socket.socket | None = None
        self._closed = False
        self.ended = threading.Event()
        """Set once nothing is served any more."""
        _remove_abandoned(path)
        self._listener = _listen_at(socket.AF_UNIX, str(path))
        self._thread = threading.Thread(target=self._serve, name=f"fake {path}", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Serve no more."""
        self._closed = True
        _shut_down(self._listener)
        client = self._client
        if client is not None:
            _shut_down(client)
        self._thread.join()

    # --- the monitor ---

    def _serve(self) -> None:
        try:
            while (client := _next_client(self._listener, lambda: self._closed)) is not None:
                self._client = client
                try:
                    with client:
                        self._speak(client)
                except (OSError, ValueError) as failure:
                    logger.debug("monitor client: %s", failure)
                except Exception:  # the next client is served all the same
                    logger.exception("fake QEMU at %s failed", self.path)
                self._client = None
        finally:
            self._closed = True
            self._stop_listening()
            with self._lock:
                self._fake.close()
            self.ended.set()

    def _stop_listening(self) -> None:
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _speak(self, client: socket.socket) -> None:
        """Serve one client to its end."""
        with self._lock:
            greeting = self._fake.connect()
        _send(client, [greeting])
        splitter = fake.Splitter()
        while not self._closed:
            data, fds = _receive(client)
            with self._lock:
                self._fake.take_fds(fds)
            if not data:
                return
            splitter.receive_data(data)
            while (line := splitter.next_message()) is not None:
                with self._lock:
                    answer = self._fake.receive(line)
                if answer.quit:  # whether or not the client is still there to be told
                    self._closed = True
                    self._stop_listening()
                _send(client, answer.messages)
                if answer.hang_up:
                    return

    # --- what the fake needs of the world: fake.Host ---

    def now(self) -> float:
        return time.time()

    def open_image(self, path: str | int, readonly: bool) -> File:
        return File(path, readonly)

    def create_file(self, path: str, size: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(fd, size)
        except OSError as failure:
            raise fake.Unresized(failure.errno, failure.strerror) from failure
        except OverflowError as failure:
            raise fake.Unresized(errno.EINVAL, os.strerror(errno.EINVAL)) from failure
        finally:
            os.close(fd)

    def close_fd(self, fd: int) -> None:
        os.close(fd)

    def start_server(self, address: Mapping[str, Any], fd: int | None, tls: bool) -> None:
        self._nbd = _NbdServer(_listen(address, fd), self, tls)

    def stop_server(self) -> None:
        nbd, self._nbd = self._nbd, None
        if nbd is not None:
            nbd.close()

    def clients(self, export: str) -> int:
        return 0 if self._nbd is None else self._nbd.clients(self._name_of(export))

    def disconnect(self, export: str) -> None:
        if self._nbd is not None:
            self._nbd.disconnect(self._name_of(export))

    def _name_of(self, export: str) -> str:
        return self._fake.layer.state.exports[export].name

    def disks(self) -> dict[str, nbdwire.Export]:
        """What can be read over NBD now, by export name."""
        with self._lock:
            return {
                export.name: self._disk(export)
                for export in self._fake.layer.state.exports.values()
            }

    def _disk(self, export: fake_state.Export) -> Disk:
        layer = self._fake.layer
        source = layer.frozen_source(export.node)
        bitmaps = {
            bitmap.name: bitmap.count > 0
            for node in layer.state.nodes.values()
            for bitmap in node.bitmaps
            if bitmap.export == export.id and bitmap.name is not None
        }
        size = layer.state.nodes[export.node].size
        name = "" if source is None else layer.state.nodes[source].filename
        return Disk(name, size, export.description, bitmaps, source is not None)


class _NbdServer:
    """A thread that accepts, and one for each client."""

    def __init__(self, listener: socket.socket, server: Server, tls: bool) -> None:
        self._tls = tls
        self._listener = listener
        self._server = server
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, nbdwire.Server] = {}
        self._closed = False
        threading.Thread(target=self._accept, name="fake nbd", daemon=True).start()

    def close(self) -> None:
        path = _path_of(self._listener)
        _shut_down(self._listener)
        self._listener.close()
        with self._lock:
            self._closed = True
            for connection in self._connections:
                _shut_down(connection)
        if path is not None:
            pathlib.Path(path).unlink(missing_ok=True)

    def clients(self, export: str) -> int:
        with self._lock:
            return sum(speaks.export == export for speaks in self._connections.values())

    def disconnect(self, export: str) -> None:
        with self._lock:
            for connection, speaks in self._connections.items():
                if speaks.export == export:
                    _shut_down(connection)

    def _accept(self) -> None:
        while (connection := _next_client(self._listener, lambda: self._closed)) is not None:
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                self._connections[connection] = nbdwire.Server(self._server.disks, self._tls)
            threading.Thread(
                target=self._speak, args=(connection,), name="fake nbd client", daemon=True
            ).start()

    def _speak(self, connection: socket.socket) -> None:
        speaks = self._connections[connection]
        try:
            with contextlib.suppress(OSError):
                connection.sendall(speaks.greeting())
                while not speaks.over and (data := connection.recv(1 << 16)):
                    speaks.receive_data(data)
                    while (reply := speaks.next_message()) is not None:
                        connection.sendall(reply)
        except nbdwire.ProtocolError as failure:
            logger.debug("nbd client: %s", failure)
        finally:
            with self._lock:
                del self._connections[connection]
                connection.close()


def _next_client(listener: socket.socket, is_closed: Callable[[], bool]) -> socket.socket | None:
    """Who comes next; None once nobody is served any more. He waits while no descriptor is left."""
    while not is_closed():
        try:
            return listener.accept()[0]
        except OSError:
            time.sleep(_TRY_AGAIN)
    return None


def _receive(client: socket.socket) -> tuple[bytes, list[int]]:
    """What came, and the descriptors that came with it."""
    fds = array.array("i")
    space = socket.CMSG_SPACE(MAX_FDS * fds.itemsize)
    data, ancillary, _, _ = client.recvmsg(1 << 16, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
    return data, list(fds)


def _send(client: socket.socket, messages: Iterator[Any] | Sequence[Any]) -> None:
    for message in messages:
        client.sendall(fake.encode(message))


def _remove_abandoned(path: pathlib.Path) -> None:
    """A socket on which nobody listens any more."""
    with contextlib.suppress(OSError):
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()


def _listen_at(family: socket.AddressFamily, where: str | tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _listen(address: Mapping[str, Any], fd: int | None) -> socket.socket:
    """A listening socket at a QAPI SocketAddress. Errors: OSError."""
    if fd is not None:
        return _listen_by(fd)
    data = address["data"]
    try:
        if address["type"] == "unix":
            pathlib.Path(data["path"]).unlink(missing_ok=True)  # as QEMU does
            return _listen_at(socket.AF_UNIX, data["path"])
        return _listen_on_port(data["host"], data["port"])
    except ValueError as failure:  # no path or no host at all
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from failure


def _listen_by(fd: int) -> socket.socket:
    """The socket of FD, which listens from now on. Errors: OSError; it is closed then."""
    try:
        listener = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise
    try:
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _listen_on_port(host: str, port: str) -> socket.socket:
    """At the first address of HOST's that is this machine's. Errors: OSError."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as failure:
        raise fake.Unresolved(failure.errno, failure.strerror) from failure
    for number, (family, _, _, _, where) in enumerate(found, 1):
        try:
            return _listen_at(family, where)
        except OSError:
            if number == len(found):
                raise
    raise AssertionError("a name has an address")


def _path_of(listener: socket.socket) -> str | None:
    """Where a unix socket is."""
    with contextlib.suppress(OSError):
        name = listener.getsockname()
        return name if isinstance(name, str) and name else None
    return None


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
