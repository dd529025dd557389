# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image file read as it lies there, without QEMU: the checksum of its disk, and of all else.

Two checksums cover every byte of a qcow2 file, each byte once: that of the disk, or the increment,
which the file's data clusters have, and ``checksum.TABLES`` of the rest. Of a raw file there is no
rest. The file's data is read once, and what it has no place for is not read.

Only images as a backup has them: clusters of whole blocks, no snapshots, nothing encrypted, no
other file with the data. What a compressed cluster is of the disk, only QEMU can tell.
"""

import array
import contextlib
import dataclasses
import enum
import errno
import os
import pathlib
import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from virtbackup.nbd import checksum, header

if TYPE_CHECKING:
    from virtbackup.nbd import copy

CHUNK = 1 << 20
"""Bytes of a read, at most."""

_ZEROES = 1 << 38
"""Bytes of a hole that are hashed together: in milliseconds."""
_MOST_BESIDE = 1 << 30
"""Bytes, beside twice those of a disk, that an image of it may have: far more than it takes."""
_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_ENTRY = 8
_COMPRESSED = 1 << 62
_ZERO = 1
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSION_TYPE = 1 << 3
"""The one incompatible feature that does not matter here."""
_MOST_L1 = 32 << 20
"""Bytes, as QEMU has it."""
_FREE, _DATA, _TABLE = range(3)
_MOST_TOGETHER = 1 << 12
"""Entries of a table."""
_NOTHING = tuple(array.array("Q", (0,)) * count for count in (1 << 10, 1 << 5))
"""Entries as most of a large disk's are."""


class Damaged(Exception):
    """It cannot be read as the image of the disk; the text says why."""


class Kind(enum.Enum):
    """What an image has of a range of its disk."""

    DATA = "data"
    ZERO = "zero"
    ABSENT = "absent"
    """Nothing: what is behind the image shows through."""
    COMPRESSED = "compressed"


@dataclasses.dataclass(frozen=True)
class Run:
    """LENGTH bytes of a disk from OFFSET on; of data, from AT of the file on."""

    offset: int
    length: int
    kind: Kind
    at: int = 0


@dataclasses.dataclass(frozen=True)
class Content:
    """What was read of a file."""

    checksum: str
    read: int
    """Bytes."""


class File:
    """A file opened for reading. A context manager. Errors: OSError, everywhere."""

    def __init__(self, path: pathlib.Path) -> None:
        # What is a FIFO by now is not waited for.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.size = os.lseek(self._fd, 0, os.SEEK_END)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """Zeroes behind the end."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill BUFFER from OFFSET on; with zeroes behind the end."""
        while buffer:
            count = os.preadv(self._fd, [buffer], offset)
            if not count:
                buffer[:] = bytes(len(buffer))
                return
            buffer, offset = buffer[count:], offset + count

    def will_read(self, offset: int, length: int) -> None:
        """Have the kernel begin to read that."""
        with contextlib.suppress(OSError):  # a hint
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether there may be data) of all between START, a block's border, and END,
        cut at blocks; the rest are holes."""
        at = start
        while at < end:
            data = self._seek(at, os.SEEK_DATA, end) // checksum.BLOCK * checksum.BLOCK
            data = min(max(data, at), end)
            if data > at:
                yield at, data, False
            if data == end:
                return
            hole = self._seek(max(data, at), os.SEEK_HOLE, end)
            at = min(-(-max(hole, data + 1) // checksum.BLOCK) * checksum.BLOCK, end)
            yield data, at, True

    def _seek(self, at: int, what: int, end: int) -> int:
        """Where the next data or hole begins; END where there is none before."""
        try:
            return min(os.lseek(self._fd, at, what), end)
        except OSError as failure:
            if failure.errno == errno.ENXIO:
                return end
            if failure.errno == errno.EINVAL:  # of a device; all of it may be data
                return at if what == os.SEEK_DATA else end
            raise


# --- raw ------------------------------------------------------------------------------------------


def read_raw(
    file: File,
    size: int,
    *,
    progress: "copy.Progress | None" = None,
    index: int = 0,
    cancel: "copy.Cancel | None" = None,
) -> Content:
    """The checksum of the disk of SIZE bytes at the beginning of FILE.

    Errors: OSError; VIR_ERR_OPERATION_ABORTED when cancelled.
    """
    hashing = _Hashing(file, size, progress, index, cancel)
    for start, end, data in file.parts(0, size):
        if data:
            hashing.data(start, end - start, start)
        else:
            hashing.zeroes(start, end - start)
    return hashing.result()


class _Hashing:
    """The checksum of a disk in the making, from the disk's start to its end."""

    def __init__(
        self,
        file: File,
        size: int,
        progress: "copy.Progress | None" = None,
        index: int = 0,
        cancel: "copy.Cancel | None" = None,
    ) -> None:
        self._file = file
        self._tree = checksum.Tree(size)
        self._buffer = memoryview(bytearray(CHUNK))
        self._progress = progress
        self._index = index
        self._cancel = cancel
        self._read = 0
        if progress is not None:
            progress.start(index, size)

    def data(self, offset: int, length: int, at: int, hidden: int = 0) -> None:
        """LENGTH bytes at AT of the file; the first HIDDEN of them count as zeroes."""
        for done in range(0, length, CHUNK):
            if self._cancel is not None:
                self._cancel.check()
            part = self._buffer[: min(CHUNK, length - done)]
            self._file.read_into(part, at + done)
            if hidden > done:
                part[: hidden - done] = bytes(min(hidden - done, len(part)))
            self._tree.add(offset + done, len(part), checksum.scan(part)[0])
            self._read += len(part)
            self._advance(len(part))

    def zeroes(self, offset: int, length: int) -> None:
        for done in range(0, length, _ZEROES):  # a file system may tell of more than there is time
            if self._cancel is not None:
                self._cancel.check()
            part = min(_ZEROES, length - done)
            self._tree.add_zeroes(offset + done, part)
            self._advance(part)

    def absent(self, offset: int, length: int) -> None:
        self._tree.add_absent(offset, length)
        self._advance(length)

    def result(self) -> Content:
        return Content(self._tree.hexdigest(), self._read)

    def _advance(self, count: int) -> None:
        if self._progress is not None:
            self._progress.advance(self._index, count)


# --- qcow2 ----------------------------------------------------------------------------------------


class Qcow2:
    """A qcow2 image of a disk of SIZE bytes. Errors: Damaged, OSError, everywhere."""

    def __init__(self, file: File, size: int) -> None:
        self._file = file
        self._disk = size
        data = file.read(0, min(file.size, 1 << 16))
        if len(data) < _FIXED.size:
            raise Damaged("it is shorter than the header of a qcow2 image")
        (magic, version, _, _, bits, virtual, crypt, l1_size, self._l1_at,
         _, _, snapshots, _) = _FIXED.unpack_from(data)  # fmt: skip
        if magic != header.MAGIC or version not in (2, 3):
            raise Damaged("it is not a qcow2 image")
        if version == 3:
            if len(data) < _FIXED.size + _V3.size:
                raise Damaged("it is shorter than the header of a qcow2 image")
            features = _V3.unpack_from(data, _FIXED.size)[0]
            if features & ~_COMPRESSION_TYPE:
                raise Damaged(f"its incompatible features, {features:#x}, are not of a backup")
        if crypt or snapshots:
            raise Damaged("it is encrypted, or has snapshots, so it is not of a backup")
        if not 16 <= bits <= 21:
            raise Damaged(f"its clusters of 2^{bits} bytes are not of a backup")
        self._cluster = 1 << bits
        self._entries = self._cluster // _ENTRY
        self._zero_flag = version == 3
        self._tables = -(-size // (self._cluster * self._entries))
        if virtual < size or not self._tables <= l1_size <= _MOST_L1 // _ENTRY:
            raise Damaged("the sizes that its header tells do not fit the disk")
        if file.size > 2 * virtual + _MOST_BESIDE:
            raise Damaged(f"it has {file.size} bytes, more than any image of the disk")
        self.has_compressed = False
        self._used = bytearray(-(-file.size // self._cluster))
        self._tail: tuple[int, int] | None = None
        """(start, end) of what is behind the disk's end in the last cluster of data."""
        self._note_used()

    def read(
        self,
        increment: bool,
        *,
        progress: "copy.Progress | None" = None,
        index: int = 0,
        cancel: "copy.Cancel | None" = None,
    ) -> Content:
        """The checksum of what the image, which has nothing compressed, has of the disk; and of
        nothing behind it where it is an INCREMENT."""
        assert not self.has_compressed
        hashing = _Hashing(self._file, self._disk, progress, index, cancel)
        for run in self.runs():
            match run.kind:
                case Kind.DATA:
                    hashing.data(run.offset, run.length, run.at)
                case Kind.ABSENT if increment:
                    hashing.absent(run.offset, run.length)
                case _:
                    hashing.zeroes(run.offset, run.length)
        return hashing.result()

    def read_tables(self, cancel: "copy.Cancel | None" = None) -> Content:
        """``checksum.TABLES``, of all in the file that is not the disk's own bytes."""
        hashing = _Hashing(self._file, self._file.size, None, 0, cancel)
        at = 0
        for start, end in self._rest():
            first = start // checksum.BLOCK * checksum.BLOCK
            hashing.zeroes(at, first - at)
            for one, other, data in self._file.parts(first, end):
                if data:
                    hashing.data(one, other - one, one, max(0, start - one))
                else:
                    hashing.zeroes(one, other - one)
            at = end
        hashing.zeroes(at, self._file.size - at)
        return hashing.result()

    def runs(self) -> Iterator[Run]:
        """What the image has of the disk, from its start to its end."""
        reach = self._cluster * self._entries
        for number, entry in enumerate(self._read_table(self._l1_at, self._tables)):
            start = number * reach
            end = min(start + reach, self._disk)
            if not entry & _OFFSET:
                yield Run(start, end - start, Kind.ABSENT)
                continue
            table = self._read_table(entry & _OFFSET, self._entries)
            yield from self._runs_of_table(table, start, end)

    def _read_table(self, at: int, entries: int) -> "array.array[int]":
        table = array.array("Q", (0,)) * entries
        self._file.read_into(memoryview(table).cast("B"), at)
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def _runs_of_table(self, table: "array.array[int]", start: int, end: int) -> Iterator[Run]:
        count, place = -(-(end - start) // self._cluster), 0
        while place < count:
            entry, first = table[place], place
            kind, at = self._kind(entry), entry & _OFFSET
            if kind is Kind.COMPRESSED:
                place += 1
            else:
                step = self._cluster if kind is Kind.DATA else 0
                place = _end_of_run(table, place, count, step)
            offset = start + first * self._cluster
            length = min(start + place * self._cluster, end) - offset
            if kind is Kind.DATA and at % self._cluster:
                raise Damaged(f"the data at offset {offset} of the disk is out of place")
            yield Run(offset, length, kind, at)

    def _kind(self, entry: int) -> Kind:
        if entry & _COMPRESSED:
            return Kind.COMPRESSED
        if self._zero_flag and entry & _ZERO:
            return Kind.ZERO
        return Kind.DATA if entry & _OFFSET else Kind.ABSENT

    def _check_place(self, at: int, length: int, what: str) -> None:
        if not at or at % self._cluster or at + length > self._file.size:
            raise Damaged(f"{what} is out of place, at offset {at} of the file")

    # --- where what is --------------------------------------------------------------------------

    def _note_used(self) -> None:
        """Which clusters of the file have what. Errors: one of them has two things."""
        self._note(0, self._cluster, _TABLE)
        if self._tables:
            self._check_place(self._l1_at, self._tables * _ENTRY, "its first table")
            self._note(self._l1_at, self._tables * _ENTRY, _TABLE)
        for entry in self._read_table(self._l1_at, self._tables):
            if at := entry & _OFFSET:
                self._check_place(at, self._cluster, "one of its tables")
                self._note(at, self._cluster, _TABLE)
                self._file.will_read(at, self._cluster)
        for run in self.runs():
            if run.kind is Kind.COMPRESSED:
                self.has_compressed = True
            elif run.kind is Kind.DATA:
                self._note(run.at, run.length, _DATA)
                end = run.at + run.length
                if end % self._cluster:
                    self._tail = end, -(-end // self._cluster) * self._cluster

    def _note(self, at: int, length: int, use: int) -> None:
        first, last = at // self._cluster, -(-(at + length) // self._cluster)
        last = min(last, len(self._used))
        count = last - first
        if self._used.count(_FREE, first, last) != max(count, 0):
            raise Damaged(f"the cluster at offset {at} of the file, or one behind it, has two uses")
        if count > 0:
            self._used[first:last] = bytes((use,)) * count

    def _rest(self) -> Iterator[tuple[int, int]]:
        """(start, end) of what is not the disk's bytes, in order; only the start of one may be in
        the middle of a block."""
        is_data = self._used.translate(bytes(int(use == _DATA) for use in range(256)))
        tail = self._tail
        place, count, size = 0, len(is_data), self._file.size
        while place < count:
            start = is_data.find(0, place)
            start = count if start < 0 else start
            if tail is not None and tail[1] <= start * self._cluster:
                if tail[0] < size:
                    yield tail[0], min(tail[1], size)
                tail = None
            if start == count:
                break
            place = is_data.find(1, start)
            place = count if place < 0 else place
            yield start * self._cluster, min(place * self._cluster, size)


def _end_of_run(table: "array.array[int]", start: int, end: int, step: int) -> int:
    """How far, END at most, each entry from START on is STEP more than the one before it. Many are
    looked at together: a large disk has millions."""
    first, place, count = table[start], start + 1, 1
    if not first:
        return _end_of_nothing(table, place, end)
    while place < end and count:
        count = min(count, end - place)
        value = first + (place - start) * step
        expected = array.array("Q", range(value, value + count * step, step) if step else (value,))
        if table[place : place + count] == (expected if step else expected * count):
            place += count
            count = min(2 * count, _MOST_TOGETHER)
        else:
            count //= 2
    return place


def _end_of_nothing(table: "array.array[int]", place: int, end: int) -> int:
    """How far, END at most, each entry from PLACE on is 0."""
    for nothing in _NOTHING:
        count = len(nothing)
        while place + count <= end and table[place : place + count] == nothing:
            place += count
    while place < end and not table[place]:
        place += 1
    return place


def tables_checksum(path: pathlib.Path, size: int, cancel: "copy.Cancel | None" = None) -> str:
    """``checksum.TABLES`` of the qcow2 image of a disk of SIZE bytes. Errors: Damaged, OSError;
    VIR_ERR_OPERATION_ABORTED when cancelled."""
    with File(path) as file:
        return Qcow2(file, size).read_tables(cancel).checksum
