# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a copy goes: a fresh file that stays sparse, and safe on disk at the end.

A target is given what is not zero and told where zeroes are, each block once, in any order. Zeroes
count only where a backing file would show through else. It has the disk begin to write while the
copy goes on and drops what is written from the page cache, so that the last sync is short and the
host's cache survives a backup.
"""

import abc
import contextlib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Protocol

from virtbackup import errors

_PAGE = 4096
"""Bytes; the grain at which raw files are kept sparse, as most file systems keep them."""
_ZERO = bytearray(_PAGE)

WINDOW = 4 << 20
"""Bytes written before the disk is told to begin with them; with 2 and with 8 MiB a copy took
about a tenth longer."""


class Target(Protocol):
    """Takes a disk's bytes. Every failure is an errors.Error that names the path."""

    def write(self, offset: int, data: memoryview) -> None:
        """DATA at OFFSET of the disk; OFFSET is a multiple of 64 KiB."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """LENGTH zeroes at OFFSET, a multiple of 64 KiB, of which a file takes no space."""

    def finish(self) -> int:
        """Make all of it durable; the bytes that it takes on its file system."""

    def shorten(self) -> None:
        """From another thread: nothing of it is wanted, so let a sync under way be short."""

    def discard(self) -> None:
        """Close and remove it, finished or not; nothing is raised."""


class Wake(Protocol):
    """Something that another thread sets."""

    def fileno(self) -> int:
        """Readable once set."""

    def clear(self) -> None:
        """Not for one that is not set."""


class Asynchronous(abc.ABC):
    """A target that writes while its thread does something else; used by that thread alone."""

    @abc.abstractmethod
    def memory(self, size: int) -> memoryview:
        """SIZE bytes of memory that it writes from best."""

    @abc.abstractmethod
    def begin(self) -> None:
        """Before the first write. Errors: what keeps it from being written."""

    @abc.abstractmethod
    def after(self, done: Callable[[], None]) -> None:
        """Have DONE called when the data of all ``write``s since the last call is not needed any
        more: at once, or by a later call of another method."""

    @abc.abstractmethod
    def wait(self, wake: Wake) -> None:
        """Sleep until WAKE is set, and clear it, or something was written. Errors: it was not."""


def memory(where: Target, size: int) -> memoryview:
    """SIZE bytes of memory for what is to be written to WHERE."""
    if isinstance(where, Asynchronous):
        return where.memory(size)
    return memoryview(bytearray(size))


def after(where: Target, done: Callable[[], None]) -> None:
    """Have DONE called when the data that went to WHERE since the last call is not needed now."""
    if isinstance(where, Asynchronous):
        where.after(done)
    else:
        done()


class Nowhere:
    """Forgets everything: for reading alone."""

    def write(self, offset: int, data: memoryview) -> None:
        """Nothing."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """Nothing."""

    def finish(self) -> int:
        return 0

    def shorten(self) -> None:
        """Nothing."""

    def discard(self) -> None:
        """Nothing."""


class Window:
    """Gathers writes into ranges worth telling the disk about.

    A range reaches back over the one before it, whose pages are clean by then and can be dropped;
    never over the whole file, which would be searched again each time.
    """

    def __init__(self, most: int = WINDOW) -> None:
        """MOST: bytes that are written before."""
        self._most = most
        self._size = self._end = 0
        self._start: int | None = None
        self._before: int | None = None

    def add(self, start: int, end: int) -> tuple[int, int] | None:
        """Note a write; (offset, length) once there is enough, else None."""
        self._size += end - start
        self._start = start if self._start is None else min(self._start, start)
        self._end = max(self._end, end)
        if self._size < self._most:
            return None
        first = self._start if self._before is None else min(self._start, self._before)
        length = self._end - first
        self._before, self._start, self._size, self._end = self._start, None, 0, 0
        return first, length


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """Write all of DATA. Errors: OSError."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def write_back(fd: int, window: Window, start: int, end: int) -> None:
    """Once WINDOW is full, have the disk begin with what is dirty, and drop what is not."""
    if ready := window.add(start, end):
        with contextlib.suppress(OSError):  # a hint, which a file system may refuse
            os.posix_fadvise(fd, ready[0], ready[1], os.POSIX_FADV_DONTNEED)


def cut(path: pathlib.Path, made: os.stat_result) -> None:
    """Have the file at PATH take no space, if that is still the one that was MADE; by whoever may
    write to the directory it may be a link to another by now."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if os.path.samestat(os.fstat(fd), made):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)


def filled(data: memoryview) -> list[tuple[int, int]]:
    """Where DATA is not pages of zeroes, as (start, end) in order. One page of zeroes between two
    others is not left out: to write both apart takes longer than to write it."""
    runs: list[tuple[int, int]] = []
    # Most pages do not even begin with a zero, so of most data nothing more is looked at.
    begins, start = bytes(data[::_PAGE]), 0
    page = begins.find(0)
    while page >= 0:
        first, last = page * _PAGE, min((page + 1) * _PAGE, len(data))
        zero = _ZERO if last - first == _PAGE else bytearray(last - first)
        if zero == data[first:last]:
            if start < first:
                runs.append((start, first))
            start = last
        page = begins.find(0, page + 1)
    if start < len(data):
        runs.append((start, len(data)))
    return _joined(runs)


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """RUNS, those that are but a page apart as one."""
    joined: list[tuple[int, int]] = []
    for start, end in runs:
        if joined and start - joined[-1][1] <= _PAGE:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


class _File:
    """A file made by us and not there before: mode 0600, as it holds a guest's data."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._written = Window()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd: int | None = os.open(path, flags, 0o600)
        except OSError as failure:
            raise errors.system_error(failure, f"cannot create {path}") from failure
        self._made = os.fstat(self._fd)

    def pwrite(self, data: memoryview, offset: int) -> None:
        """Write DATA of the disk, which goes on its way to the medium soon."""
        assert self._fd is not None
        try:
            pwrite(self._fd, data, offset)
        except OSError as failure:
            raise self._error(failure) from failure
        write_back(self._fd, self._written, offset, offset + len(data))

    def truncate(self, size: int) -> None:
        assert self._fd is not None
        try:
            os.ftruncate(self._fd, size)
        except OSError as failure:
            raise self._error(failure) from failure

    def finish(self) -> int:
        """Everything on the disk, the file closed; the bytes that it takes there."""
        assert self._fd is not None
        try:
            os.fsync(self._fd)
            stored = os.fstat(self._fd).st_blocks * 512
            fd, self._fd = self._fd, None
            os.close(fd)
        except OSError as failure:
            raise self._error(failure) from failure
        return stored

    def shorten(self) -> None:
        # By name: the other thread may close the descriptor at any moment.
        cut(self.path, self._made)

    def discard(self) -> None:
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):
            if fd is not None:
                os.close(fd)
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _error(self, failure: OSError) -> errors.Error:
        return errors.system_error(failure, f"cannot write {self.path}")


class Raw:
    """A raw image: holes where the disk has zeroes."""

    def __init__(self, path: pathlib.Path, size: int) -> None:
        self._file = _File(path)
        try:
            self._file.truncate(size)
        except BaseException:
            self._file.discard()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        for start, end in filled(data):
            self._file.pwrite(data[start:end], offset + start)

    def write_zeroes(self, offset: int, length: int) -> None:
        """They are there."""

    def finish(self) -> int:
        return self._file.finish()

    def shorten(self) -> None:
        self._file.shorten()

    def discard(self) -> None:
        self._file.discard()
