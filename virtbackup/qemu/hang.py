# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding out whether a scratch image's file system hangs, without anybody hanging with it.

A guest's write that has to save old data waits for the scratch image as long as that takes. QEMU's
main loop does not, until it is told to do something that looks at the image, waits for all requests
or closes the image: ``query-named-block-nodes``, ``job-cancel``, ``block-export-del``,
``blockdev-del``. Then all of the guest stands still. So before anything of the kind the file system
is asked, from outside, and what a close waits for is left to others.
"""

import contextlib
import dataclasses
import errno
import io
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from virtbackup import runtime

_LOOK_AGAIN = 0.002
_ALL = 0.1
"""Seconds within which all file systems answer as a rule."""
_CLOSING = 2.0
"""Seconds to wait for a file to be closed."""
_NOT_TOLD = {errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ESPIPE}
"""What ``sync_file_range`` says of itself, or who forbids it."""
_WAIT_BEFORE = 1
"""SYNC_FILE_RANGE_WAIT_BEFORE of linux/fs.h."""
_BEYOND = 1 << 62
"""An offset at which no file has a page to wait for."""
_INODE = re.compile(r"^ino:\s*(\d+)$", re.MULTILINE)

_pending: dict[str, subprocess.Popen[bytes]] = {}
"""Path -> who still waits for its file system: nobody else needs to."""
_left: "list[subprocess.Popen[bytes]]" = []
"""Who waits for one of several file systems."""
_keepers: list[subprocess.Popen[bytes]] = []
"""Processes that wait to close a file."""


@dataclasses.dataclass(frozen=True)
class Image:
    """A scratch image: what is known of it without looking at its file system."""

    directory: str
    """Where it was made."""
    inode: int | None
    """None while it has none, and where that is not known."""


class Question:
    """Whether file systems answer that files or directories are on; asked at once, for the answer
    to be there when it is wanted. A context: who has not answered by its end is not waited for."""

    def __init__(self, paths: Iterable[str]) -> None:
        every = frozenset(paths)
        self._asked = {path: one for path in every if (one := _pending_for(path)) is not None}
        self._together = every - self._asked.keys()
        # Most of the time all answer at once, and one process is enough.
        self._of_all = _touch(self._together) if self._together else None

    def unanswered(self, paths: Collection[str], end: float) -> frozenset[str]:
        """Those of PATHS without an answer at END, by the monotonic clock."""
        now = time.monotonic()
        if self._of_all is not None and not _ends(self._of_all, now + min(_ALL, (end - now) / 2)):
            self._ask_each()
        asked = self._asked.keys() & paths
        while pending := {path for path in asked if self._waits(path)}:
            if time.monotonic() > end:
                break
            _wait(self._asked[min(pending)], end)
        return frozenset(pending)

    def _waits(self, path: str) -> bool:
        """Whether there is no answer of PATH. That who was asked before has heeded being killed is
        none."""
        ended = self._asked[path].poll()
        if ended != -signal.SIGKILL:
            return ended is None
        if (again := _touch([path])) is not None:
            self._asked[path] = again
        return again is not None

    def _ask_each(self) -> None:
        """One process for each file system: to know which it is that does not answer."""
        for path in self._together - self._asked.keys():
            if (one := _touch([path])) is not None:
                self._asked[path] = one

    def __enter__(self) -> "Question":
        return self

    def __exit__(self, *_: object) -> None:
        if self._of_all is not None and self._of_all.poll() is None:
            _left.append(self._of_all)
            self._of_all.kill()
        for path, one in self._asked.items():
            if one.poll() is None:
                _pending[path] = one
                one.kill()  # heeded once the file system lets it
        _left[:] = [one for one in _left if one.poll() is None]


def hanging(images: Mapping[str, Image], pid: int | None, limit: float) -> frozenset[str]:
    """Those of IMAGES, by their keys, whose file system does not answer within LIMIT seconds, or
    for which a request of process PID is under way for that long.

    The images are asked by PID's own descriptors, as a name may lead elsewhere by now; where those
    cannot be seen, by their directories. Where nothing hangs this takes a few milliseconds.
    """
    end = time.monotonic() + limit
    opened = _descriptors(pid, images)
    paths = {
        key: [f"/proc/{pid}/fd/{fd}" for fd in opened[key]] or [image.directory]
        for key, image in images.items()
    }
    every = {path for some in paths.values() for path in some}
    with Question(every) as question:
        under_way = _requests(pid, {fd for some in opened.values() for fd in some})
        silent = question.unanswered(every, end)
    while under_way := {
        thread: was for thread, was in under_way.items() if _call(thread) == was[0]
    }:
        if time.monotonic() > end:
            break
        time.sleep(_LOOK_AGAIN)
    waited_for = {fd for _, fd in under_way.values()}
    return frozenset(
        key
        for key in images
        if not (silent.isdisjoint(paths[key]) and waited_for.isdisjoint(opened[key]))
    )


def used(images: Mapping[str, Image], pid: int | None) -> dict[str, int]:
    """Key -> bytes that an image takes on its file system, which must answer; only those that
    process PID is seen to have open."""
    sizes = {}
    for key, fds in _descriptors(pid, images).items():
        for fd in fds:
            with contextlib.suppress(OSError):
                sizes[key] = pathlib.Path(f"/proc/{pid}/fd/{fd}").stat().st_blocks * 512
    return sizes


def unwritten(images: Mapping[str, Image], pid: int | None) -> dict[str, str]:
    """Key -> why the kernel could not write what it had taken for an image, whose file system must
    answer; only those that process PID is seen to have open.

    Nothing else tells: such data is right while it is in the page cache, and what is read later is
    what the disk has there. The kernel tells each error once to whoever opens the file, and once
    more by what PID has open since before it; so this is for the last to ask, and a second time
    finds what a first one did not live to tell, or another program has asked for.
    """
    told = {}
    for key, fds in _descriptors(pid, images).items():
        for fd in fds:
            for opened in (_opened_anew, _opened_by):
                with contextlib.suppress(OSError), opened(pid, fd) as file:
                    if number := _write_error(file.fileno()):
                        told[key] = os.strerror(number)
                        break
    return told


def _opened_anew(pid: int | None, fd: int) -> io.FileIO:
    """The file that process PID has open as FD. Errors: OSError."""
    return io.FileIO(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))


def _opened_by(pid: int | None, fd: int) -> io.FileIO:
    """Process PID's own open file. Errors: OSError, as of ``runtime.duplicate``."""
    with io.FileIO(os.pidfd_open(pid or 0)) as process:
        return io.FileIO(runtime.duplicate(process.fileno(), fd))


def _write_error(fd: int) -> int:
    """Why data of the file that FD is of was not written, as errno has it; 0: it was, or there was
    no need yet. Nothing is written nor waited for: fsync(2) would do both."""
    import ctypes  # a millisecond to load, and only a stop needs it

    begin, length = ctypes.c_int64(_BEYOND), ctypes.c_int64(1)
    libc = ctypes.CDLL(None, use_errno=True)
    if not libc.sync_file_range(ctypes.c_int(fd), begin, length, ctypes.c_uint(_WAIT_BEFORE)):
        return 0
    number = ctypes.get_errno()
    return 0 if number in _NOT_TOLD else number


def _pending_for(path: str) -> "subprocess.Popen[bytes] | None":
    """Who was asked before of what is at PATH, and has no answer yet."""
    pending = _pending.pop(path, None)
    return pending if pending is not None and pending.poll() is None else None


def _touch(paths: Iterable[str]) -> "subprocess.Popen[bytes] | None":
    """Have another process change the access time of what is at PATHS: a file system that is
    frozen, too, answers only what changes nothing. A process that hangs in it may not be to be
    killed."""
    return _run("touch", "-c", "-a", "--", *paths)


def _ends(one: "subprocess.Popen[bytes]", end: float) -> bool:
    """Whether ONE ends before END by the monotonic clock."""
    while one.poll() is None:
        if time.monotonic() > end:
            return False
        _wait(one, end)
    return True


def _wait(one: "subprocess.Popen[bytes]", end: float) -> None:
    """Until ONE ends, or END by the monotonic clock."""
    try:
        fd = os.pidfd_open(one.pid)
    except OSError:  # the kernel has no such thing, or no descriptor to spare
        time.sleep(_LOOK_AGAIN)
        return
    try:
        ended = select.poll()
        ended.register(fd, select.POLLIN)
        ended.poll(max(0.0, end - time.monotonic()) * 1000 + 1)
    finally:
        os.close(fd)


@contextlib.contextmanager
def closed_by_another(pid: int | None, inodes: Collection[int]) -> Iterator[None]:
    """Keep process PID from being the last to close the files with INODES.

    Who is waits for what is still being written to the file, and for its blocks to be freed. So
    that is another process, when this ends; it may outlive us.
    """
    # Not a pipe of subprocess's: a signal's exception may come as it has started the process, and
    # then nobody would ever close that.
    pair: tuple[socket.socket, ...] = ()
    keeper = None
    try:
        with contextlib.suppress(OSError):
            pair = socket.socketpair()
            keeper = _keeper(pid, inodes, pair[1])
        yield
    finally:
        for end in pair:
            end.close()
        if keeper is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                keeper.wait(_CLOSING)
            _keepers[:] = [one for one in (*_keepers, keeper) if one.poll() is None]


def _keeper(
    pid: int | None, inodes: Collection[int], stdin: socket.socket
) -> "subprocess.Popen[bytes] | None":
    """A process that has those files of process PID open until the end of its STDIN; None where
    there are none."""
    files: list[io.FileIO] = []
    try:
        for fd in _opened(pid, inodes):
            with contextlib.suppress(OSError):
                path = f"/proc/{pid}/fd/{fd}"
                files.append(io.FileIO(os.open(path, os.O_PATH | os.O_CLOEXEC)))
        fds = [file.fileno() for file in files]
        return _run("cat", pass_fds=fds, stdin=stdin) if fds else None
    finally:
        for file in files:
            file.close()


def _run(*argv: str, **options: Any) -> "subprocess.Popen[bytes] | None":
    """Start one of the core utilities; None where it is not to be had."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with contextlib.suppress(OSError):
        return subprocess.Popen(argv, **{**quiet, "stderr": subprocess.DEVNULL, **options})
    return None


def _opened(pid: int | None, inodes: Collection[int | None]) -> dict[int, int]:
    """Descriptor of process PID -> which of the files with INODES it is of. Empty where ptrace(2)
    is not allowed us, on which proc(5) makes this depend."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in pathlib.Path(f"/proc/{pid}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                match = _INODE.search(entry.read_text())
                if match and int(match[1]) in inodes:
                    found[int(entry.name)] = int(match[1])
    return found


def _descriptors(pid: int | None, images: Mapping[str, Image]) -> dict[str, list[int]]:
    """Key -> descriptors of process PID that are of an image: by its inode, and where files of
    several file systems have that, by the directory."""
    opened = _opened(pid, {image.inode for image in images.values()})
    places = {fd: _place(pid, fd) for fd in opened}
    known = {image.directory for image in images.values()}
    found = {}
    for key, image in images.items():
        own = [fd for fd, inode in opened.items() if inode == image.inode]
        there = [fd for fd in own if places[fd] == image.directory]
        # A mount namespace of its own may call the directory otherwise.
        found[key] = there or [fd for fd in own if places[fd] not in known]
    return found


def _place(pid: int | None, fd: int) -> str:
    """The directory of a file that process PID has open, which is not asked."""
    try:
        return str(pathlib.Path(f"/proc/{pid}/fd/{fd}").readlink().parent)
    except OSError:
        return ""


def _requests(
    pid: int | None, opened: Collection[int]
) -> dict[pathlib.Path, tuple[list[str], int]]:
    """Thread of process PID -> (the system call it is in, which of the descriptors OPENED it is
    for)."""
    found: dict[pathlib.Path, tuple[list[str], int]] = {}
    if not opened:
        return found
    with contextlib.suppress(OSError):
        for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
            call = _call(thread)
            # Its number and first argument; a thread that runs has neither.
            if len(call) > 1 and (fd := int(call[1], 16)) in opened:
                found[thread] = (call, fd)
    return found


def _call(thread: pathlib.Path) -> list[str]:
    """The system call that a thread is in, as proc(5)'s ``syscall`` has it."""
    try:
        return (thread / "syscall").read_text().split()
    except OSError:
        return []
