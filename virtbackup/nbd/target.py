# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a copy goes: a fresh file that stays sparse, raw or qcow2, and safe on disk at the end.

A target is given what is not zero and told where zeroes are, each block once, in any order. Zeroes
count only where a backing file would show through else. It has the disk begin to write while the
copy goes on and drops what is written from the page cache, so that the last sync is short and the
host's cache survives a backup.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Protocol

from virtbackup import errors
from virtbackup.nbd import qcow2

_WINDOW = 4 << 20
"""Bytes written before the disk is told to begin with them; with 2 and with 8 MiB a copy took
about a tenth longer."""
_PAGES = 1024
"""Pages of L2 tables kept in memory, so 4 MiB at most."""
_PAGES_OF_TABLE = qcow2.ENTRIES // qcow2.PAGE_ENTRIES


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

    def pwrite(self, data: memoryview | bytes | bytearray, offset: int) -> None:
        """Write DATA of the disk, which goes on its way to the medium soon."""
        assert self._fd is not None
        self.pwrite_table(data, offset)
        if ready := self._written.add(offset, offset + len(data)):
            with contextlib.suppress(OSError):  # a hint, which a file system may refuse
                # Begins to write what is dirty, drops what is not.
                os.posix_fadvise(self._fd, ready[0], ready[1], os.POSIX_FADV_DONTNEED)

    def pwrite_table(self, data: memoryview | bytes | bytearray, offset: int) -> None:
        """Write DATA that is little and in many places: the last sync has it done faster."""
        assert self._fd is not None
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count
        except OSError as failure:
            raise self._error(failure) from failure

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

    def write_zeroes(self, offset: int, length: int) -> None:
        """They are there."""

    def finish(self) -> int:
        return self._file.finish()

    def shorten(self) -> None:
        self._file.shorten()

    def discard(self) -> None:
        self._file.discard()


class Qcow2:
    """A qcow2 image: data clusters in the order they come, tables between and behind them, the
    header last of all.

    What it is not given, BACKING has, zeroes without one. Until it is finished, the file has no
    header: nobody can take it for a disk.
    """

    def __init__(self, path: pathlib.Path, size: int, backing: qcow2.Backing | None = None) -> None:
        self._file = _File(path)
        self._size = size
        self._backing = backing
        with contextlib.suppress(errors.Error):  # too large for the file system: not needed
            # Writes into a hole are cheaper than writes at the end; ``finish`` cuts the rest off.
            self._file.truncate(size)
        self._clusters = 1  # the header's
        self._l1: dict[int, int] = {}
        self._pages: dict[int, bytearray] = {}

    def write(self, offset: int, data: memoryview) -> None:
        first, count = self._clusters, -(-len(data) // qcow2.CLUSTER)
        self._clusters += count
        for page, place, done, some in _by_page(offset // qcow2.CLUSTER, count):
            self._set(page, place, qcow2.entries(first + done, some))
        self._file.pwrite(data, first * qcow2.CLUSTER)

    def write_zeroes(self, offset: int, length: int) -> None:
        if self._backing is None:
            return
        guest, count = offset // qcow2.CLUSTER, -(-length // qcow2.CLUSTER)
        for page, place, _, some in _by_page(guest, count):
            self._set(page, place, qcow2.zeroes(some))

    def finish(self) -> int:
        self._store_pages()
        end = qcow2.ending(self._size, self._clusters, self._l1, self._backing)
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

    def _set(self, page: int, place: int, entries: bytes) -> None:
        """ENTRIES are those of the page of that number from the one at PLACE on."""
        start = place * qcow2.ENTRY
        self._page(page)[start : start + len(entries)] = entries

    def _page(self, number: int) -> bytearray:
        """The page of L2 entries of that number, one of those in memory."""
        page = self._pages.get(number)
        if page is None:
            if len(self._pages) == _PAGES:
                # All, so that tables interrupt the data in few places.
                self._store_pages()
            page = self._pages[number] = bytearray(qcow2.PAGE)
            if number // _PAGES_OF_TABLE in self._l1:
                stored = self._file.pread(qcow2.PAGE, self._place(number))
                page[: len(stored)] = stored  # nothing where the file ends before the page
        return page

    def _store_pages(self) -> None:
        for number, page in self._pages.items():
            table = number // _PAGES_OF_TABLE
            if table not in self._l1:
                self._l1[table] = self._clusters
                self._clusters += 1
            self._file.pwrite_table(page, self._place(number))
        self._pages.clear()

    def _place(self, number: int) -> int:
        """Where in the file the page of that number is."""
        table, place = divmod(number, _PAGES_OF_TABLE)
        return self._l1[table] * qcow2.CLUSTER + place * qcow2.PAGE


def _by_page(guest: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """COUNT clusters of the disk from GUEST on as the pages have them: (the page's number, the
    first one's place in it, clusters before that one, clusters)."""
    done = 0
    while done < count:
        page, place = divmod(guest + done, qcow2.PAGE_ENTRIES)
        some = min(qcow2.PAGE_ENTRIES - place, count - done)
        yield page, place, done, some
        done += some
