# SPDX-License-Identifier: LGPL-2.1-or-later
"""A qcow2 file that QEMU itself writes, compressed where that is wanted (``target.Target``).

A program of QEMU's has the file open and takes the data: a qemu-storage-daemon, which is shown the
memory that it is in, or, where there is none that can do that, a qemu-nbd over a socket.
"""

import contextlib
import errno
import json
import logging
import os
import pathlib
import select
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import libvirt
import nbd

from virtbackup import errors
from virtbackup.nbd import connection, header, qcow2, target, vhost_user

logger = logging.getLogger(__name__)

Compression = Literal["zlib", "zstd"]

END_TIMEOUT = 60.0
"""Seconds for a program to end."""
_IN_FLIGHT = vhost_user.COMMANDS
_SPARE = 1 << 20
"""Bytes of memory for what is written from elsewhere."""
_ROOM = 32 << 20
"""Bytes that ``memory`` can be asked for; only what is used takes memory."""
_PROBE = 1 << 20

# Without these, glibc maps the buffer of each request anew and gives it back, which has the kernel
# clear every page of it: half of what a write costs qemu-nbd.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
    "MALLOC_TOP_PAD_": str(4 << 20),
}
# Systemd's socket activation; what listens is the standard input.
_ACTIVATED = ("sh", "-c", """LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&0 </dev/null""", "sh")
_LOST = {errno.ENOTCONN, errno.ECONNRESET, errno.EPIPE, errno.ESHUTDOWN}
"""What libnbd says of commands when the server is gone."""
_ENDED = "the program that writes it has ended"
_PACKAGES = {"qemu-img": "qemu-utils", "setpriv": "util-linux"}


class _Link(Protocol):
    """How a program is told what to write; what is under way goes on in ``notify``. Errors of all
    methods: vhost_user.Lost."""

    most_zeroes: int
    """Bytes of a ``write_zeroes``."""

    def write(self, offset: int, data: memoryview, done: vhost_user.Done) -> None:
        """DATA stays as it is until DONE is called."""

    def write_zeroes(self, offset: int, length: int, done: vhost_user.Done) -> None: ...

    def flush(self, done: vhost_user.Done) -> None: ...

    def push(self) -> None:
        """There may be nothing more for a while."""

    def register(self, poll: select.poll) -> None:
        """Have POLL look for what is to be seen to."""

    def notify(self, fd: int, events: int) -> None:
        """See to EVENTS that poll found."""

    def close(self) -> None: ...


class _Nbd:
    """A link to a qemu-nbd."""

    most_zeroes = 1 << 30

    def __init__(self, connected: socket.socket) -> None:
        self._handle: Any = nbd.NBD()
        with self._naming():
            self._handle.connect_socket(connected.detach())

    def write(self, offset: int, data: memoryview, done: vhost_user.Done) -> None:
        with self._naming():
            self._handle.aio_pwrite(data, offset, _completion(done))

    def write_zeroes(self, offset: int, length: int, done: vhost_user.Done) -> None:
        with self._naming():
            self._handle.aio_zero(length, offset, _completion(done))

    def flush(self, done: vhost_user.Done) -> None:
        with self._naming():
            self._handle.aio_flush(_completion(done))

    def push(self) -> None:
        """Nothing was held back."""

    def register(self, poll: select.poll) -> None:
        poll.register(self._handle.aio_get_fd(), connection.mask(self._handle))

    def notify(self, fd: int, events: int) -> None:
        with self._naming():
            if fd != self._handle.aio_get_fd():
                return
            connection.notify(self._handle, events)
            if self._handle.aio_is_dead() or self._handle.aio_is_closed():
                raise vhost_user.Lost(_ENDED)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        with contextlib.suppress(nbd.Error):
            handle.aio_disconnect()

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except nbd.Error as failure:
            reason = _ENDED if failure.errnum in _LOST else failure.string
            raise vhost_user.Lost(reason) from failure


def _completion(done: vhost_user.Done) -> Callable[[Any], int]:
    def completed(number: Any) -> int:
        done(number.value)
        return 1

    return completed


class _Batch:
    """Writes whose memory is needed again, and what is to be done when it can be had."""

    def __init__(self) -> None:
        self.flying = 0
        self.done: Callable[[], None] | None = None


class QemuWriter(target.Asynchronous):
    """A qcow2 image of SIZE bytes at PATH, which must not exist, over BACKING if given.

    Until it is finished, the file has no header: nobody can take it for a disk. Errors:
    VIR_ERR_SYSTEM_ERROR for the file and for programs that are not there, VIR_ERR_OPERATION_FAILED
    for what programs meet.
    """

    def __init__(
        self,
        path: pathlib.Path,
        size: int,
        backing: qcow2.Backing | None = None,
        compression: Compression | None = None,
    ) -> None:
        self._path = path
        self._backing = backing
        self._compression: Compression | None = compression
        self._disk = size
        self._size = qcow2.virtual_size(size)
        # What compresses takes whole clusters only; the image is cut to its size afterwards.
        self._made = self._size if compression is None else _rounded(size, qcow2.CLUSTER)
        self._failure: int | None = None
        self._flying = 0
        self._batch = _Batch()
        self._written = 0
        self._file_end = 0
        self._link: _Link | None = None
        self._lock = threading.Lock()
        self._unwanted = False
        self._program: subprocess.Popen[bytes] | None = None
        """What has the file open."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            opened = os.open(path, flags, 0o600)
        except OSError as failure:
            raise errors.system_error(failure, f"cannot create {path}") from failure
        self._made_file = os.fstat(opened)
        with contextlib.ExitStack() as undo:
            undo.callback(path.unlink)
            try:
                self._fd: int | None = connection.given(opened)
                undo.callback(os.close, self._fd)
                self._memory = vhost_user.Memory(_ROOM + _SPARE)
            except OSError as failure:
                raise errors.system_error(failure, f"cannot make memory for {path}") from failure
            undo.pop_all()
        # By whatever name it has by now, or somebody else's file has that.
        self._own = f"/proc/self/fd/{self._fd}"
        self._spare = self._memory.take(_SPARE)

    def memory(self, size: int) -> memoryview:
        return self._memory.take(size)

    def begin(self) -> None:
        backing, options = self._backing, []
        if self._compression is not None:
            options += ["-o", f"compression_type={self._compression}"]
        if backing is not None:
            options += ["-u", "-b", backing.file, "-F", backing.format]
        size = str(self._made)
        self._run("qemu-img", "create", "-q", "-f", "qcow2", *options, self._own, size)
        try:
            self._link = self._open_shared()
        except (errors.Error, vhost_user.Lost) as failure:
            if self._unwanted:
                raise self._failed("it is not wanted any more") from failure
            logger.info("event=no-shared-memory file=%s reason=%s", self._path, failure)
            self._link = self._open_nbd()
        self._pwrite(bytes(len(header.MAGIC)))

    def write(self, offset: int, data: memoryview) -> None:
        end = offset + self._padded(offset, len(data))
        if end - offset == len(data) and self._memory.place(data) is not None:
            self._issue_write(offset, data)
        else:
            self._write_copied(offset, data, end)
        self._written += len(data)
        if self._written >= target.WINDOW:
            self._written = 0
            self._write_back()

    def write_zeroes(self, offset: int, length: int) -> None:
        # Without a backing file, what no write has touched reads as zeroes.
        if self._backing is None:
            return
        most = self._linked.most_zeroes
        end = offset + self._padded(offset, length)
        for start in range(offset, end, most):
            self._issue_zeroes(start, min(most, end - start))

    def after(self, done: Callable[[], None]) -> None:
        batch, self._batch = self._batch, _Batch()
        if batch.flying:
            batch.done = done
            self._linked.push()
        else:
            done()

    def wait(self, wake: target.Wake | None) -> None:
        self._check()
        poll = select.poll()
        with self._naming():
            self._linked.register(poll)
        if wake is not None:
            poll.register(wake, select.POLLIN)
        for fd, events in poll.poll():
            if wake is not None and fd == wake.fileno():
                wake.clear()
                continue
            with self._naming():
                self._linked.notify(fd, events)
        self._check()

    def finish(self) -> int:
        """Everything on the disk, the file closed; the bytes that it takes there."""
        self._settle(0)
        self._issue(lambda done: self._linked.flush(done))  # the tables; the disk is ours to sync
        self._settle(0)
        # In this order: a storage daemon that is about to sleep does not notice a signal before it
        # is woken, as it is by the link's end. A qemu-nbd would end by that alone.
        if self._program is not None:
            self._program.terminate()
        self._close_link()
        self._end()
        self._pwrite(header.MAGIC)
        if self._made != self._size:
            # What is behind it is not wanted, and not found from where that name is.
            file = {"driver": "file", "filename": self._own}
            image = json.dumps({"driver": "qcow2", "file": file, "backing": None})
            self._run("qemu-img", "resize", "-q", "--shrink", f"json:{image}", str(self._size))
        assert self._fd is not None
        try:
            os.fsync(self._fd)
            stored = os.fstat(self._fd).st_blocks * 512
            fd, self._fd = self._fd, None
            os.close(fd)
        except OSError as failure:
            raise errors.system_error(failure, f"cannot write {self._path}") from failure
        self._memory.close()
        return stored

    def shorten(self) -> None:
        # From another thread: what waits for the program gets an error.
        with self._lock:
            self._unwanted = True
            if self._program is not None:
                self._program.kill()
        target.cut(self._path, self._made_file)

    def discard(self) -> None:
        self.shorten()
        self._close_link()
        if self._program is not None:
            with contextlib.suppress(errors.Error):
                self._reap()
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):
            if fd is not None:
                os.close(fd)
                self._memory.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    # --- commands ---------------------------------------------------------------------------------

    @property
    def _linked(self) -> _Link:
        assert self._link is not None
        return self._link

    def _padded(self, offset: int, length: int) -> int:
        """LENGTH, with what is behind the disk's end in the image as it was made."""
        return self._made - offset if offset + length >= self._disk else length

    def _issue_write(self, offset: int, data: memoryview) -> None:
        self._issue(lambda done: self._linked.write(offset, data, done))

    def _write_copied(self, offset: int, data: memoryview, end: int) -> None:
        """Write DATA, with zeroes up to END, out of memory of our own."""
        for start in range(offset, end, _SPARE):
            self._settle(0)
            part = data[start - offset : start - offset + _SPARE]
            length = min(_SPARE, end - start)
            self._spare[: len(part)] = part
            self._spare[len(part) : length] = bytes(length - len(part))
            self._issue_write(start, self._spare[:length])

    def _issue_zeroes(self, offset: int, length: int) -> None:
        self._issue(lambda done: self._linked.write_zeroes(offset, length, done))

    def _issue(self, command: Callable[[vhost_user.Done], None]) -> None:
        self._settle(_IN_FLIGHT - 1)
        batch = self._batch

        def done(number: int) -> None:
            self._flying -= 1
            batch.flying -= 1
            if number:
                self._failure = self._failure or number
            elif not batch.flying and batch.done is not None:
                batch.done()

        self._flying += 1
        batch.flying += 1
        with self._naming():
            command(done)

    def _settle(self, most: int) -> None:
        """Wait until at most so many are in flight. Errors: one of them failed."""
        while self._flying > most:
            self.wait(None)
        self._check()

    def _check(self) -> None:
        if self._failure in _LOST:
            raise self._failed(_ENDED)
        if self._failure is not None:
            reason = OSError(self._failure, os.strerror(self._failure))
            if self._failure == errno.EIO:
                reason = self._reason(reason)
            raise errors.system_error(reason, f"cannot write {self._path}")

    def _reason(self, reason: OSError) -> OSError:
        """A virtual disk knows one error only: see what keeps us from making the file longer."""
        assert self._fd is not None
        try:
            os.posix_fallocate(self._fd, os.fstat(self._fd).st_size, _PROBE)
        except OSError as failure:
            return failure
        return reason

    def _write_back(self) -> None:
        """Have the disk begin with what is new in the file, and drop of it what is there by now."""
        assert self._fd is not None
        start = max(0, self._file_end - target.WINDOW)
        with contextlib.suppress(OSError):  # a hint, which a file system may refuse
            self._file_end = os.fstat(self._fd).st_size
            os.posix_fadvise(self._fd, start, self._file_end - start, os.POSIX_FADV_DONTNEED)

    def _pwrite(self, data: bytes) -> None:
        """Write over the start of the header."""
        assert self._fd is not None
        try:
            os.pwrite(self._fd, data, 0)
        except OSError as failure:
            raise errors.system_error(failure, f"cannot write {self._path}") from failure

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except vhost_user.Lost as failure:
            words = ""
            if self._program is not None:
                self._kill()
                words = self._reap()[1]
            raise self._failed(": ".join(filter(None, (str(failure), words)))) from failure

    def _failed(self, reason: str) -> errors.Error:
        return errors.error(
            libvirt.VIR_ERR_OPERATION_FAILED, f"cannot write {self._path}: {reason}"
        )

    # --- programs ---------------------------------------------------------------------------------

    def _open_shared(self) -> _Link:
        node = json.dumps({**self._node(), "node-name": "image"})
        export = "type=vhost-user-blk,id=image,node-name=image,writable=on,addr.type=fd,addr.str="
        with self._listening() as (listening, client):
            argv = ["qemu-storage-daemon", "--blockdev", node, "--export", f"{export}0"]
            self._start((*connection.tied(), *argv), listening)
            listening.close()
            link = vhost_user.Client(client.dup(), self._memory)
            try:
                link.connect()
            except vhost_user.Lost as failure:
                link.close()
                self._kill()
                raise self._failed(self._reap()[1] or str(failure)) from failure
        return link

    def _open_nbd(self) -> _Link:
        node = json.dumps(self._node())
        with self._listening() as (listening, client):
            argv = ["qemu-nbd", "--cache=unsafe", f"json:{node}"]
            self._start(
                (*connection.tied(), *_ACTIVATED, *argv), listening, {**os.environ, **_MALLOC}
            )
            listening.close()
            try:
                return _Nbd(client)
            except vhost_user.Lost as failure:
                self._kill()
                raise self._failed(self._reap()[1] or str(failure)) from failure

    def _node(self) -> dict[str, Any]:
        file = {"driver": "file", "filename": self._own}
        cache = {"no-flush": True}  # it is for us to sync
        node: dict[str, Any] = {
            "driver": "qcow2",
            "file": {**file, "cache": cache},
            "cache": cache,
            # Or the counts are written with each new table, of which scattered changes need many.
            "lazy-refcounts": True,
        }
        if self._backing is not None:
            node["backing"] = None  # only whole clusters are written: nothing is read from it
        if self._compression is not None:
            node = {"driver": "compress", "file": node}
        return node

    @contextlib.contextmanager
    def _listening(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """A socket that listens, and one that is connected to it already."""
        with (
            self._directory() as directory,
            socket.socket(socket.AF_UNIX) as listening,
            socket.socket(socket.AF_UNIX) as client,
        ):
            try:
                listening.bind(f"{directory}/socket")
                listening.listen(1)
                client.connect(f"{directory}/socket")
            except OSError as failure:
                text = f"cannot make a socket in {directory}"
                raise errors.system_error(failure, text) from failure
            yield listening, client

    @contextlib.contextmanager
    def _directory(self) -> Iterator[str]:
        try:
            made = tempfile.TemporaryDirectory(prefix="virtbackup-")
        except OSError as failure:
            text = f"cannot make a directory for the program that writes {self._path}"
            raise errors.system_error(failure, text) from failure
        with made as directory:
            yield directory

    def _run(self, *argv: str) -> None:
        if shutil.which(argv[0]) is None:  # the shell that ties it to us would tell it otherwise
            failure = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            raise _cannot_run(argv[0], failure) from failure
        self._start((*connection.tied(), *argv))
        self._end(None)  # it may have much to sync

    def _start(
        self,
        argv: Sequence[str],
        stdin: socket.socket | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        assert self._fd is not None
        given = subprocess.DEVNULL if stdin is None else stdin.fileno()
        with self._lock:
            try:
                self._program = subprocess.Popen(
                    argv, stdin=given, stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE, start_new_session=True, env=env, pass_fds=[self._fd],
                )  # fmt: skip
            except OSError as failure:
                raise _cannot_run(argv[0], failure) from failure
            if self._unwanted:
                self._program.kill()

    def _kill(self) -> None:
        with self._lock:
            if self._program is not None:
                self._program.kill()

    def _end(self, timeout: float | None = END_TIMEOUT) -> None:
        """Wait until the program has let go of the file. Errors: it failed."""
        status, words = self._reap(timeout)
        if status:
            raise self._failed(words or f"the program that writes it ended with status {status}")

    def _reap(self, timeout: float | None = END_TIMEOUT) -> tuple[int, str]:
        """(status, the last thing it said) of the program, which ends. Errors: it does not."""
        assert self._program is not None
        try:
            said = self._program.communicate(timeout=timeout)[1]
        except subprocess.TimeoutExpired as failure:
            raise self._failed("the program that writes it does not end") from failure
        words = said.decode(errors="replace").strip().replace(self._own, str(self._path))
        status = self._program.returncode
        with self._lock:
            self._program = None
        return status, words.splitlines()[-1] if words else ""

    def _close_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _cannot_run(program: str, failure: OSError) -> errors.Error:
    text = f"cannot run {program}"
    if isinstance(failure, FileNotFoundError):
        text = f"{text}, which is in the package {_PACKAGES[program]}"
    return errors.system_error(failure, text)
