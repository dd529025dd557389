# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages over unix, tcp and tls sockets, for blocking threads: one reads, any may send.

The sockets do not block and threads wait beside them, as OpenSSL lets no two threads use one
connection at once. Descriptors travel over unix sockets alone.
"""

import array
import contextlib
import dataclasses
import errno
import functools
import os
import select
import socket
import ssl
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

from virtbackup import runtime
from virtbackup.conf import backup_conf
from virtbackup.remote import rpc

T = TypeVar("T")
CHUNK = 1 << 16
"""Bytes that are read or written at once."""
BACKLOG = 128
SO_PASSRIGHTS = 83
"""asm-generic/socket.h."""
SCM_MAX_FD = 253
"""Descriptors that come with one recvmsg at most (the kernel's limit)."""


ACCEPTED = b"\1"
"""What a server says by tls before all messages, once it takes the client for what its certificate
says (libvirt's virnetserverclient.c)."""


class NotAccepted(OSError):
    """The server does not take our certificate, or wants one."""


class Closed(Exception):
    """The connection has ended: by either side, or since the peer takes nothing more."""


# --- addresses ---


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a server listens: ``unix:PATH``, ``tcp:HOST:PORT`` or ``tls:HOST:PORT``."""

    kind: Literal["unix", "tcp", "tls"]
    path: str = ""
    host: str = ""
    """Without the brackets of an IPv6 address; empty: every address."""
    port: int = 0

    def __str__(self) -> str:
        if self.kind == "unix":
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}:{host}:{self.port}"


def parse_address(text: str) -> Address:
    """The inverse of an Address's str. Errors: ValueError, in words for people."""
    kind, _, rest = text.partition(":")
    if kind == "unix":
        if not rest.startswith("/") or "\0" in rest:
            raise ValueError(f"'{text}': the path of a unix socket is absolute")
        if len(os.fsencode(rest)) > backup_conf.MAX_SUN_PATH:
            raise ValueError(f"'{text}': the path is longer than {backup_conf.MAX_SUN_PATH} bytes")
        return Address("unix", path=rest)
    host, colon, port = rest.rpartition(":")
    if kind not in ("tcp", "tls") or not colon:
        raise ValueError(f"'{text}' is none of unix:PATH, tcp:HOST:PORT, tls:HOST:PORT")
    if not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise ValueError(f"'{text}': '{port}' is no port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"'{text}': an IPv6 address goes in brackets")
    return Address("tls" if kind == "tls" else "tcp", host=host, port=int(port))


def listen(address: Address, mode: int = 0o600) -> socket.socket:
    """A listening socket; MODE is a unix socket's. A unix socket that nobody serves any more is
    replaced. Errors: OSError."""
    if address.kind == "unix":
        return _listen_unix(address.path, mode)
    family, _, _, _, found = socket.getaddrinfo(
        address.host or None, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(found[:2], family=family, backlog=BACKLOG)


def _listen_unix(path: str, mode: int) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(made.fileno(), mode)  # before bind, so that it is never open to more
        with runtime.alone_in(os.path.dirname(path)):  # noqa: PTH120
            try:
                made.bind(path)
            except OSError:
                if not runtime.is_left_over(path):
                    raise
                os.unlink(path)  # noqa: PTH108
                made.bind(path)
            _set_mode(path, mode)  # what the umask took
            made.listen(BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def _set_mode(path: str, mode: int) -> None:
    """Of a socket at PATH, and not of what somebody puts there in its place. Errors: OSError."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(errno.EEXIST, "somebody has replaced it")
        os.chmod(f"/proc/self/fd/{fd}", mode)  # noqa: PTH101
    finally:
        os.close(fd)


def remove(path: str, made: os.stat_result) -> None:
    """Remove a unix socket that was MADE at PATH; not what somebody has put there since."""
    with contextlib.suppress(OSError):  # it is gone
        if os.path.samestat(os.lstat(path), made):
            os.unlink(path)  # noqa: PTH108


def refuse_descriptors(listening: socket.socket) -> None:
    """Have the kernel (Linux 6.16) refuse descriptors that clients pass: some take their owner's
    time to close, which is ours once we have them."""
    with contextlib.suppress(OSError):
        listening.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)


def connected(address: Address, timeout: float | None = None) -> socket.socket:
    """A socket that is connected to a server, without TLS yet. Errors: OSError."""
    if address.kind != "unix":
        return socket.create_connection((address.host or "localhost", address.port), timeout)
    made = socket.socket(socket.AF_UNIX)
    try:
        _connect_unix(made, address.path, timeout)
    except BaseException:
        made.close()
        raise
    return made


def _connect_unix(made: socket.socket, path: str, timeout: float | None) -> None:
    """By a call that blocks: one that does not fails where many wait to be accepted."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout or 0.0))
    try:
        made.connect(path)
    except BlockingIOError as failure:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from failure
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0.0))
    made.settimeout(timeout)


def _timeval(seconds: float) -> bytes:
    """As C has it; 0: for ever."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))


def connect(
    address: Address, context: ssl.SSLContext | None = None, timeout: float | None = None
) -> "Transport":
    """A connection to a server within TIMEOUT seconds; CONTEXT is for tls, and checks the server's
    name where it says so. Errors: OSError, NotAccepted among them."""
    made = connected(address, timeout)
    if address.kind != "tls":
        return Transport(made)
    assert context is not None
    try:
        return Transport(_accepted(context, made, address.host))
    except BaseException:
        made.close()
        raise


def _accepted(context: ssl.SSLContext, made: socket.socket, host: str) -> ssl.SSLSocket:
    wrapped = context.wrap_socket(made, server_hostname=host)
    try:
        # Since TLS 1.3 it is not before this that a client hears of a certificate that is no good.
        if wrapped.recv(1) != ACCEPTED:
            raise NotAccepted(0, "end of file")
    except (ssl.SSLError, ConnectionError) as failure:
        wrapped.close()
        raise NotAccepted(0, failure.strerror or str(failure)) from failure
    except BaseException:
        wrapped.close()
        raise
    return wrapped


# --- messages ---


class Transport:
    """One connection; owns its socket."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._socket.setblocking(False)
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parser = rpc.Parser()
        self._sending = threading.Lock()
        self._using = threading.Lock()
        """Held for one call of a tls socket."""

    @property
    def passes_fds(self) -> bool:
        """Whether descriptors can travel."""
        return self._socket.family == socket.AF_UNIX

    def send(self, message: rpc.Message, timeout: float | None = None) -> None:
        """Send a whole message, with copies of its descriptors. The caller's stay the caller's.

        Errors: CodecError, nothing is sent; Closed, also when the peer has not taken all within
        TIMEOUT seconds. Nothing more can be sent then, nor where a signal's exception comes in
        between: the peer would take what is sent next for the rest.
        """
        data = memoryview(message.encode())
        assert self.passes_fds or not message.fds
        deadline = _deadline(timeout)
        with self._sending, self._closed_on_error():
            try:
                while data:
                    data = data[self._send(deadline, self._socket.send, data[:CHUNK]) :]
                for fd in message.fds:  # each has a byte of its own
                    self._send(deadline, socket.send_fds, self._socket, [b"\0"], [fd])
            except BaseException:
                self.shutdown()
                raise

    def _send(self, deadline: float | None, send: Callable[..., int], *some: object) -> int:
        """How many bytes of SOME were sent."""
        sent = self._when_ready(functools.partial(send, *some), select.POLLOUT, deadline)
        if sent is None:
            raise Closed("the peer takes nothing more")
        return sent

    def receive(self, timeout: float | None = None) -> rpc.Message | None:
        """The next message, whose descriptors are the caller's to close; None when none came
        within TIMEOUT seconds. Errors: ProtocolError, Closed; after either only ``close`` is left.
        """
        deadline = _deadline(timeout)
        while (message := self._parser.next_message()) is None:
            take = functools.partial(read, self._socket)
            with self._closed_on_error():
                got = self._when_ready(take, select.POLLIN, deadline)
            if got is None:
                return None
            data, fds = got
            self._parser.receive_data(data, fds)
            if not data:
                raise Closed("end of file")
        return message

    def shutdown(self) -> None:
        """End the connection; a thread that waits in ``receive`` or ``send`` gets Closed."""
        with contextlib.suppress(OSError):
            # The plain socket's: to tell a tls peer would need the connection for ourselves.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, and descriptors that came and belong to no message. Nobody may wait in
        ``receive`` or ``send``."""
        for fd in self._parser.take_fds():
            os.close(fd)
        self._socket.close()

    def _when_ready(self, use: Callable[[], T], events: int, deadline: float | None) -> T | None:
        """What USE of the socket returns once it does not block, which is when there are EVENTS or
        tls says what else; None at the DEADLINE."""
        while True:
            try:
                with self._using:
                    return use()
            except BlockingIOError:
                wanted = events
            except ssl.SSLWantReadError:
                wanted = select.POLLIN
            except ssl.SSLWantWriteError:
                wanted = select.POLLOUT
            if not _wait(self._socket, wanted, deadline):
                return None

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except ssl.SSLEOFError as failure:
            raise Closed("end of file") from failure
        except OSError as failure:
            raise Closed(failure.strerror or str(failure)) from failure


def read(connected: socket.socket) -> tuple[bytes, list[int]]:
    """What has come on a socket, and the descriptors that came with it; no bytes at its end.

    Errors: ProtocolError for descriptors that the kernel dropped; OSError.
    """
    if connected.family != socket.AF_UNIX:
        return connected.recv(CHUNK), []
    data, ancillary, flags, _ = connected.recvmsg(
        CHUNK, socket.CMSG_SPACE(4 * SCM_MAX_FD), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, control in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(control[: len(control) - len(control) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise rpc.ProtocolError("descriptors were lost on the way")
    return data, list(fds)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _wait(waited_for: socket.socket, events: int, deadline: float | None) -> bool:
    """Whether one of EVENTS, or an error, came before DEADLINE."""
    poll = select.poll()
    poll.register(waited_for, events)
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    return bool(poll.poll(None if left is None else int(left * 1000) + (left > 0)))
