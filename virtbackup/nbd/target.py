# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a copy goes: a fresh file that stays sparse, raw or qcow2, and safe on disk at the end.

A target is given only what is not zero, each block once, in any order. It has the disk begin to
write while the copy goes on and drops what is written from the page cache, so that the last sync is
short and the host's cache survives a backup.
"""

import array
import collections
import contextlib
import os
import pathlib
import sys
from typing import Protocol

from virtbackup import errors
from virtbackup.nbd import qcow2

_WINDOW = 4 << 20
"""Bytes written before the disk is told to begin with them; with 2 and with 8 MiB a copy took
about a tenth longer."""
_L2_TABLES = 16
"""L2 tables kept in memory: each covers 512 MiB of the disk in 64 KiB."""


class Target(Protocol):
    """Takes a disk's bytes. Every failure is an errors.Error that names the path."""

    def write(self, offset: int, data: memoryview) -> None:
        """DATA at OFFSET of the disk; OFFSET is a multiple of 64 KiB."""

    def finish(self) -> int:
        """Make all of it durable; the bytes that it takes on its file system."""

    def shorten(self) -> None:
        """From another thread: nothing of it is wanted, so let a sync under way be short."""

    def discard(self) -> None:
        """Close and remove it, finished or not; nothing is raised."""


class Nowhere:
    """Forgets everything: for reading alone."""

    def write(self, offset: int, data: memoryview) -> None:
        """Nothing."""

    def finish(self) -> int:
        return 0

    def shorten(self) -> None:
        """Nothing."""

    def discard(self) -> None:
        """Nothing."""


class _Window:
    """Gathers writes into ranges worth telling the disk about.

    A range reaches back over the one before it, whose pages are clean by then and can be dropped;
    never over the whole file, which would be searched again each time.
    """

    def __init__(self) -> None:
        self._size = self._end = 0
        self._start: int | None = None
        self._before: int | None = None

    def add(self, start: int, end: int) -> tuple[int, int] | None:
        """Note a write; (offset, length) once there is enough, else None."""
        self._size += end - start
        self._start = start if self._start is None else min(self._start, start)
        self._end = max(self._end, end)
        if self._size < _WINDOW:
            return None
        first = self._start if self._before is None else min(self._start, self._before)
        length = self._end - first
        self._before, self._start, self._size, self._end = self._start, None, 0, 0
        return first, length


class _File:
    """A file made by us and not there before: mode 0600, as it holds a guest's data."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._written = _Window()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd: int | None = os.open(path, flags, 0o600)
        except OSError as failure:
            raise errors.system_error(failure, f"cannot create {path}") from failure

    def pwrite(self, data: memoryview | bytes, offset: int) -> None:
        assert self._fd is not None
        view = memoryview(data)
        start = offset
        try:
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count
        except OSError as failure:
            raise self._error(failure) from failure
        if ready := self._written.add(start, offset):
            with contextlib.suppress(OSError):  # a hint, which a file system may refuse
                # Begins to write what is dirty, drops what is not.
                os.posix_fadvise(self._fd, ready[0], ready[1], os.POSIX_FADV_DONTNEED)

    def pread(self, size: int, offset: int) -> bytes:
        assert self._fd is not None
        try:
            return os.pread(self._fd, size, offset)
        except OSError as failure:
            raise errors.system_error(failure, f"cannot read {self.path}") from failure

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
        with contextlib.suppress(OSError):
            os.truncate(self.path, 0)

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
        self._file.pwrite(data, offset)

    def finish(self) -> int:
        return self._file.finish()

    def shorten(self) -> None:
        self._file.shorten()

    def discard(self) -> None:
        self._file.discard()


class Qcow2:
    """A qcow2 image: data clusters in the order they come, tables last, the header last of all.

    Until it is finished, the file has no header: nobody can take it for a disk.
    """

    def __init__(self, path: pathlib.Path, size: int) -> None:
        self._file = _File(path)
        self._size = size
        with contextlib.suppress(errors.Error):  # too large for the file system: not needed
            # Writes into a hole are cheaper than writes at the end; ``finish`` cuts the rest off.
            self._file.truncate(size)
        self._clusters = 1  # the header's
        self._l1: dict[int, int] = {}
        self._l2: collections.OrderedDict[int, array.array[int]] = collections.OrderedDict()

    def write(self, offset: int, data: memoryview) -> None:
        first, self._clusters = self._clusters, self._clusters + -(-len(data) // qcow2.CLUSTER)
        guest = offset // qcow2.CLUSTER
        for number in range(first, self._clusters):
            index, place = divmod(guest, qcow2.ENTRIES)
            if place == 0 or number == first:
                table = self._table(index)
            table[place] = qcow2.entry(number)
            guest += 1
        self._file.pwrite(data, first * qcow2.CLUSTER)

    def finish(self) -> int:
        while self._l2:
            self._store_oldest()
        end = qcow2.ending(self._size, self._clusters, self._l1)
        self._file.pwrite(end.l1_table, end.l1_at)
        for offset, refcounts in end.refcounts():
            self._file.pwrite(refcounts, offset)
        self._file.pwrite(end.table, end.table_at)
        self._file.truncate(end.file_size)
        self._file.pwrite(end.header, 0)
        return self._file.finish()

    def shorten(self) -> None:
        self._file.shorten()

    def discard(self) -> None:
        self._file.discard()

    def _table(self, index: int) -> "array.array[int]":
        """The L2 table of that index, the latest of those in memory."""
        if index in self._l2:
            self._l2.move_to_end(index)
            return self._l2[index]
        if len(self._l2) == _L2_TABLES:
            self._store_oldest()
        table = array.array("Q", bytes(qcow2.CLUSTER))
        if index in self._l1:
            table = array.array("Q", self._file.pread(qcow2.CLUSTER, self._place(index)))
            _swap(table)
        self._l2[index] = table
        return table

    def _store_oldest(self) -> None:
        index, table = self._l2.popitem(last=False)
        if index not in self._l1:
            self._l1[index] = self._clusters
            self._clusters += 1
        _swap(table)
        self._file.pwrite(table.tobytes(), self._place(index))

    def _place(self, index: int) -> int:
        return self._l1[index] * qcow2.CLUSTER


def _swap(table: "array.array[int]") -> None:
    """Between this machine's order and the file's, big endian."""
    if sys.byteorder == "little":
        table.byteswap()
