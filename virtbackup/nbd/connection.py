# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection of a copy to an NBD export: what libnbd says gets names here.

Nothing waits: commands are issued, their answers collected when poll says so.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import resource
import select
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import libvirt
import nbd

from virtbackup import errors, runtime
from virtbackup.nbd import store

CHUNK = 512 << 10
"""Bytes of a buffer, where nothing else is best."""
_MOST = 1 << 20
"""Bytes of a read, at most."""
_MOST_ENTRIES = 2 * 4096
"""Numbers of an answer about status that are kept: QEMU gives 32 times as many about a fragmented
disk, and in Python they take some fifty times their bytes."""
_SECTOR = 512
_MOST_SAID = 4096
_OF_CONNECTION = {0, errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE, errno.ESHUTDOWN}
"""libnbd's error numbers for what no server said."""

TOO_LARGE = "it has more bytes than a disk can have"

ALLOCATION: str = nbd.CONTEXT_BASE_ALLOCATION
"""The context that tells where data is."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A server of our own, started by systemd's socket activation for one connection.

    libnbd gives it a socket in a private directory and ends it with the connection.
    """

    argv: tuple[str, ...]
    what: str
    """What it serves, as errors call it."""


@dataclasses.dataclass(frozen=True)
class Tls:
    """TLS is demanded of the server: by certificates, or by a key that both ends have."""

    certificates: str | None = None
    """A directory with ca-cert.pem and, to be known by, client-cert.pem and client-key.pem."""
    psk_file: str | None = None
    """Lines of a name, a colon and a key."""
    username: str | None = None
    """Whose key it is."""
    verify: bool = True
    """The server's certificate must be of that authority, and for the host that is called."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Where to read: SERVER is a unix socket's path, (host, port), or a program to start."""

    server: str | tuple[str, int] | Program
    name: str
    tls: Tls | None = None

    def __str__(self) -> str:
        if isinstance(self.server, Program):
            return self.server.what
        return f"export '{self.name}'"


@dataclasses.dataclass
class Request:
    """A command in flight: a read into CHUNK, or a question in CONTEXTS (CHUNK None)."""

    offset: int
    chunk: store.Chunk | None
    contexts: Sequence[str] = ()
    answers: list[tuple[str, list[int]]] = dataclasses.field(default_factory=list)
    """(context, entries) of those that were asked for, as the server had them."""


class Connection:
    """A libnbd handle with what is in flight on it."""

    def __init__(self, export: Export, contexts: Sequence[str]) -> None:
        """Begin to connect; questions will be in CONTEXTS."""
        self._export = export
        self._contexts = contexts
        self._in_flight: dict[int, Request] = {}
        self._doing = "connect to"
        self._is_greeted = False
        self._words = _Words(export.server) if isinstance(export.server, Program) else None
        self._handle: Any = nbd.NBD()
        try:
            with self._naming(self._doing):
                self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        self._handle.set_export_name(self._export.name)
        for context in self._contexts:
            self._handle.add_meta_context(context)
        # A buffer is looked at only when its read succeeded.
        self._handle.set_pread_initialize(False)
        # libnbd knows DF for structured reads alone; it holds for every read.
        self._handle.set_strict_mode(self._handle.get_strict_mode() & ~nbd.STRICT_FLAGS)
        connect(self._handle, self._export, () if self._words is None else self._words.heard)

    def negotiate(self) -> None:
        """Once ready: read what the server said of itself."""
        self._doing = "talk to"
        with self._naming("open"):
            handle = self._handle
            if (size := size_of(handle)) is None:
                raise self._error("open", TOO_LARGE)
            self.size = size
            one_only = isinstance(self._export.server, Program)
            self.multi: bool = handle.can_multi_conn() and not one_only
            self.tells = frozenset(filter(handle.can_meta_context, self._contexts))
            """Those of the contexts that the server has."""
            most = handle.get_block_size(nbd.SIZE_MAXIMUM)
            self.most: int = min(_MOST, most or _MOST)
            """Bytes of a read."""
            # An unfragmented answer is faster, and QEMU sends an error in it instead of hanging up.
            self._flags = nbd.CMD_FLAG_DF if handle.can_df() else 0
        if self._words is not None:
            self._words.close()  # the image is open, and a chain may have as many as may be

    @property
    def ready(self) -> bool:
        return bool(self._handle.aio_is_ready() or self._handle.aio_is_processing())

    @property
    def load(self) -> int:
        """Commands in flight."""
        return len(self._in_flight)

    def fileno(self) -> int:
        """Not of one that was lost; that of one that is not greeted may be another one later."""
        if not self._is_greeted:
            self._fd: int = self._handle.aio_get_fd()
        return self._fd

    def mask(self) -> int:
        """The poll events that libnbd waits for; none where the connection was lost."""
        return mask(self._handle)

    def notify(self, events: int) -> None:
        """Hand what poll said to libnbd. Errors: the connection is lost."""
        self._is_greeted = self._is_greeted or bool(events & select.POLLIN)
        try:
            notify(self._handle, events)
        except nbd.Error as failure:
            raise self._named(failure, self._doing) from failure
        if not self._in_flight and not self.mask():
            self.fail()

    def fail(self) -> NoReturn:
        """Errors: what became of the connection, which was lost."""
        for _ in self.completed():
            pass
        raise self._error(self._doing, self._why_ended() or "the server closed the connection")

    def check_accepted(self) -> None:
        """Errors: the server cannot take the connection, and has not, as far as can be seen."""
        if not self._is_greeted and (reason := _why_not_accepted(self.fileno())):
            raise self._error(self._doing, reason)

    def read(self, chunk: store.Chunk, offset: int, length: int) -> None:
        # A context manager for each read would take longer than all else here.
        try:
            cookie = self._handle.aio_pread(chunk.part(offset, length), offset, flags=self._flags)
        except nbd.Error as failure:
            self._check_alive()
            raise self._named(failure, "read", offset) from failure
        chunk.pending += 1
        self._in_flight[cookie] = Request(offset, chunk)

    def ask(self, contexts: Sequence[str], offset: int, count: int) -> Request:
        """Ask for the status of COUNT bytes at OFFSET; what is said in others is passed over, and
        so is what is behind many extents, of which to ask again."""
        request = Request(offset, None, contexts)

        def extent(context: str, _offset: int, entries: list[int], _error: object) -> int:
            if context in contexts:
                request.answers.append((context, entries[:_MOST_ENTRIES]))
            return 0

        try:
            cookie = self._handle.aio_block_status(count, offset, extent)
        except nbd.Error as failure:
            self._check_alive()
            raise self._named(failure, "read allocation of", offset) from failure
        self._in_flight[cookie] = request
        return request

    def completed(self) -> Iterator[Request]:
        """Every request that was answered since. Errors: it failed."""
        while self._in_flight and (cookie := self._handle.aio_peek_command_completed()) > 0:
            request = self._in_flight.pop(cookie)
            what = "read" if request.chunk else "read allocation of"
            try:
                self._handle.aio_command_completed(cookie)
            except nbd.Error as failure:
                raise self._named(failure, what, request.offset) from failure
            if request.chunk is not None:
                request.chunk.pending -= 1
            yield request

    def _check_alive(self) -> None:
        """Errors: the connection was lost, of which libnbd says to a new command that it is not
        valid."""
        if not self.mask():
            self.fail()

    def close(self) -> None:
        """Let go; what is in flight is given up."""
        handle, self._handle = self._handle, None
        if handle is not None:
            leave(handle, self._export, idle=not self._in_flight)
        if self._words is not None:
            self._words.close()

    @contextlib.contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        try:
            yield
        except nbd.Error as failure:
            raise self._named(failure, what) from failure

    def _named(self, failure: Any, what: str, offset: int | None = None) -> errors.Error:
        reason = os.strerror(failure.errnum) if failure.errnum else failure.string
        if "mkdtemp" in (failure.string or ""):  # nobody would look for the image's trouble there
            reason += " (in /tmp, where libnbd makes its socket)"
        if failure.errnum in _OF_CONNECTION:
            reason = self._why_ended() or reason
        if offset is None and self._in_flight:
            offset = min(request.offset for request in self._in_flight.values())
        return self._error(what, reason, offset)

    def _why_ended(self) -> str:
        """Why a program of our own has hung up: what it has said, as far as it had not served."""
        if self._words is None:
            return ""
        return self._words.said() or ("" if self.mask() else "the program that reads it has ended")

    def _error(self, what: str, reason: str, offset: int | None = None) -> errors.Error:
        return failed(self._export, what, reason, offset)


class _Words:
    """What a program says on its standard error, which has what an image says and is not ours."""

    def __init__(self, program: Program) -> None:
        """Errors: VIR_ERR_SYSTEM_ERROR where no more files may be open."""
        self._image = program.argv[-1]
        self._fd: int | None = None
        try:
            self._fd = given(os.memfd_create("virtbackup-words"))
        except OSError as failure:
            raise errors.system_error(failure, "cannot make a file in memory") from failure
        os.set_inheritable(self._fd, True)  # libnbd gives its child all that is so
        shell = """exec 2>> "$1"; shift; exec "$@" """
        self.heard = ("sh", "-c", shell, "sh", f"/proc/self/fd/{self._fd}")
        """What starts the program."""

    def said(self) -> str:
        """The last of it, in a line, without the image that it is about."""
        if self._fd is None:
            return ""
        start = max(0, os.fstat(self._fd).st_size - _MOST_SAID)
        text = os.pread(self._fd, _MOST_SAID, start).decode(errors="replace").strip()
        text = text.removeprefix("qemu-nbd: ").removeprefix("Failed to blk_new_open ")
        return " ".join(text.removeprefix(f"'{self._image}': ").split())

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def given(fd: int) -> int:
    """Another number for FD, which is closed: one that programs of ours, and the shells that start
    them, have nothing else by. Errors: OSError."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    except OSError as failure:  # EINVAL where not even so many may be open
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from failure
    finally:
        os.close(fd)


def _why_not_accepted(fd: int) -> str | None:
    """Why the process that is called cannot take the connection; None where that is not seen, as it
    may just be slow."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as connected:
        if connected.family == socket.AF_UNIX:
            pid, _, _ = runtime.peer_of(connected)
        else:
            pid = runtime.not_accepted_by(connected)
        if not pid or pid == os.getpid():  # of another namespace, or listening in another's name
            return None
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
        used = sum(int(name) < limit for name in os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
        if used >= limit:
            return (
                f"process {pid} accepts no connection: it has no free file descriptor (of {limit})"
            )
    return None


def size_of(handle: Any) -> int | None:
    """Bytes of the export that a libnbd handle has open; None: more than a file, and libnbd, can
    tell. Errors: nbd.Error."""
    try:
        size: int = handle.get_size()
    except nbd.Error as failure:
        if failure.string is not None:
            raise
        return None
    return size if size >= 0 else None


def mask(handle: Any) -> int:
    """The poll events that a libnbd handle waits for."""
    direction = handle.aio_get_direction()
    read = select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0
    return read | (select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0)


def notify(handle: Any, events: int) -> None:
    """Hand what poll said to a libnbd handle. Errors: nbd.Error."""
    direction = handle.aio_get_direction()
    if direction & nbd.AIO_DIRECTION_READ and events & ~select.POLLOUT:
        handle.aio_notify_read()
    elif direction & nbd.AIO_DIRECTION_WRITE:
        handle.aio_notify_write()


def connect(handle: Any, export: Export, heard: Sequence[str] = ()) -> None:
    """Have a libnbd handle begin to connect to EXPORT's server, which HEARD starts where that is a
    program. Errors: nbd.Error."""
    server, tls = export.server, export.tls
    if tls is not None:
        handle.set_tls(nbd.TLS_REQUIRE)
        handle.set_tls_verify_peer(tls.verify)
        if tls.certificates is not None:
            handle.set_tls_certificates(tls.certificates)
        if tls.psk_file is not None:
            handle.set_tls_psk_file(tls.psk_file)
        if tls.username is not None:
            handle.set_tls_username(tls.username)
    if isinstance(server, str):
        handle.aio_connect_unix(server)
    elif isinstance(server, Program):
        # One that lost its only client before that came to speak would wait for another for ever.
        prefix = tied() if shutil.which("setpriv") else ()
        handle.aio_connect_systemd_socket_activation([*prefix, *heard, *server.argv])
    else:
        handle.aio_connect_tcp(server[0], str(server[1]))


def tied() -> tuple[str, ...]:
    """What a program is started by to end with the thread that starts it, however that ends.

    The kernel sees to that, and the shell to a process that ended before the kernel was told.
    """
    shell = """[ "$PPID" = "$1" ] || exit; shift; exec "$@" """
    return ("setpriv", "--pdeathsig", "KILL", "sh", "-c", shell, "sh", str(os.getpid()))


def leave(handle: Any, export: Export, *, idle: bool) -> None:
    """Before a libnbd handle is let go: say good-bye where it is IDLE, and end its program.

    libnbd waits for that, after a SIGTERM of its own. Where this process has a handler of SIGTERM,
    that is lost on a program that has not come to its exec.
    """
    with contextlib.suppress(nbd.Error):
        if isinstance(export.server, Program):
            handle.kill_subprocess(signal.SIGKILL)
        elif idle:
            handle.aio_disconnect()


def unreadable(export: Export, timeout: float) -> str | None:
    """Why the first sector of EXPORT cannot be read; None when it can.

    Errors: VIR_ERR_OPERATION_FAILED when that cannot be told: there is no connection, or no answer
    within TIMEOUT seconds.
    """
    end = time.monotonic() + timeout
    handle: Any = nbd.NBD()
    try:
        handle.set_export_name(export.name)
        connect(handle, export)
        while handle.aio_is_connecting():
            _wait(handle, export, end)
        flags = nbd.CMD_FLAG_DF if handle.can_df() else 0
        handle.set_strict_mode(handle.get_strict_mode() & ~nbd.STRICT_FLAGS)
        # Not libnbd's own Buffer: libnbd 1.14 lets none of those go.
        read = handle.aio_pread(memoryview(bytearray(_SECTOR)), 0, flags=flags)
    except nbd.Error as failure:
        raise failed(export, "connect to", failure.string) from failure
    try:
        while not handle.aio_command_completed(read):
            _wait(handle, export, end)
    except nbd.Error as failure:
        if failure.errnum in _OF_CONNECTION:
            raise failed(export, "read", failure.string, 0) from failure
        return os.strerror(failure.errnum)
    return None


def _wait(handle: Any, export: Export, end: float) -> None:
    left = end - time.monotonic()
    if left <= 0 or handle.poll(int(left * 1000) + 1) == 0:
        raise failed(export, "read", "no answer", 0)


def failed(export: Export, what: str, reason: str, offset: int | None = None) -> errors.Error:
    place = "" if offset is None else f" at offset {offset}"
    return errors.error(
        libvirt.VIR_ERR_OPERATION_FAILED, f"cannot {what} {export}{place}: {reason}"
    )
