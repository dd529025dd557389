# SPDX-License-Identifier: LGPL-2.1-or-later
"""A block device that a disk is written to (``target.Target``): from its start, all of the disk.

What the device had is overwritten, zeroes included: a device has no holes, so what nobody wrote is
zeroed at the end. Zeroes take no space where the device can do that; else they are written. What is
behind the disk's end stays as it was.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import pathlib
import stat
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import libvirt

from virtbackup import errors, runtime
from virtbackup.nbd import checksum, polling, target

_BLKROGET = 0x125E
_BLKZEROOUT = 0x127F
_BLKSSZGET = 0x1268
_KEEP_SIZE_PUNCH_HOLE = 1 | 2
_CANNOT = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)
_LIBC = ctypes.CDLL(None, use_errno=True)
_FLOCK = struct.Struct("hhqqi4x")
"""Of the system call for 64 bits: type, whence, start, length, process."""
_ZEROES = memoryview(bytes(1 << 20))
_MOST_ZEROES = 64 << 20
"""Bytes of a request, during which nothing can end it."""
_SYS_SECTOR = 512
"""Bytes of what the kernel counts a device's size in, whatever its own sectors."""
_WINDOW = 16 << 20
"""Bytes written before the device is told to begin with them."""


def too_small(name: str, has: int, needs: int) -> errors.Error:
    return errors.error(
        libvirt.VIR_ERR_OPERATION_FAILED,
        f"{name} is too small: it has {has} bytes, and the disk {needs}",
    )


def held(path: pathlib.Path) -> int:
    """A descriptor of the block device at PATH, held alone: nobody has it mounted or open for
    himself, and no QEMU uses it. Errors: VIR_ERR_OPERATION_INVALID, VIR_ERR_SYSTEM_ERROR."""
    try:
        if not stat.S_ISBLK(path.stat().st_mode):
            raise _invalid(f"{path} is not a block device")
        # For a block device O_EXCL without O_CREAT is: nobody else has it, as a mount does.
        fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as failure:
        if failure.errno == errno.EBUSY:
            raise _invalid(f"{path} is in use: it is mounted, or a part of something") from failure
        raise errors.system_error(failure, f"cannot open {path} for writing") from failure
    if _is_read_only(fd):  # which some kernels tell at the first write
        os.close(fd)
        raise _invalid(f"{path} is read-only: nothing was written to it")
    try:
        # QEMU does not open a device so; it locks some bytes of it.
        lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
    except OSError as failure:
        os.close(fd)
        if failure.errno in (errno.EAGAIN, errno.EACCES):
            raise _invalid(f"{path} is in use: another program, as a QEMU, locks it") from failure
        raise errors.system_error(failure, f"cannot lock {path}") from failure
    if user := _user_of(os.fstat(fd).st_rdev):
        os.close(fd)
        raise _invalid(f"{path} is in use: process {user} has it open")
    return fd


def _is_read_only(fd: int) -> bool:
    try:
        return bool(struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0])
    except OSError:
        return False


def meets(one: int, other: int) -> bool:
    """Whether two devices, by their numbers, have bytes in common: one is the other, or a part."""
    return one == other or _whole(one) == other or _whole(other) == one


def has_bytes_of(path: pathlib.Path, medium: pathlib.Path) -> bool:
    """Whether what is written to PATH, a block device, is written to MEDIUM, a file or a device."""
    one, other = _number(path), _number(medium)
    if one is not None and other is not None and meets(one, other):
        return True
    behind = _behind(path)
    try:
        return behind is not None and (behind.samefile(medium) or has_bytes_of(behind, medium))
    except (OSError, ValueError):
        return False


def share(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two block devices have bytes in common, as two loop devices over one file do."""
    first, second = _number(one), _number(other)
    if first is not None and second is not None and _whole(first) == _whole(second):
        return meets(first, second)  # two parts of one have not
    behind, mine, theirs = _behind(other), _part(one), _part(other)
    if mine is not None and theirs is not None and mine.file == theirs.file:
        return mine.start < theirs.end and theirs.start < mine.end
    return has_bytes_of(one, other) or (behind is not None and has_bytes_of(one, behind))


class _Part(NamedTuple):
    """Of a file, in bytes."""

    file: tuple[int, int]
    """Its device and inode."""
    start: int
    end: int


def _part(path: pathlib.Path) -> _Part | None:
    """What the loop device at PATH, or the one that it is a part of, has of the file behind it;
    None of anything else."""
    if (behind := _behind(path)) is None:
        return None
    try:
        found = behind.stat()
        place = _in_sys(_whole(path.stat().st_rdev))
        start = int((place / "loop" / "offset").read_text())
        length = int((place / "size").read_text()) * _SYS_SECTOR
    except (OSError, ValueError):
        return None
    return _Part((found.st_dev, found.st_ino), start, start + length)


def _number(path: pathlib.Path) -> int | None:
    """Of the block device at PATH; None of anything else."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None


def _behind(path: pathlib.Path) -> pathlib.Path | None:
    """What has the bytes of the loop device at PATH, or of the one that it is a part of; None of
    anything else."""
    try:
        place = _in_sys(_whole(path.stat().st_rdev)) / "loop" / "backing_file"
        behind = place.read_bytes().removesuffix(b"\n")
        return pathlib.Path(os.fsdecode(behind))
    except (OSError, ValueError):
        return None


def _in_sys(number: int) -> pathlib.Path:
    return pathlib.Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")


def _whole(number: int) -> int:
    """The device that another one is a partition of; else itself."""
    place = _in_sys(number)
    try:
        if (place / "partition").exists():
            major, minor = (place.resolve().parent / "dev").read_text().split(":")
            return os.makedev(int(major), int(minor))
    except (OSError, ValueError):
        pass
    return number


def _user_of(number: int) -> str | None:
    """A QEMU that has a device open, or the whole that it is a part of, or a part: its lock is on
    the name that it has the device by, of which a guest of libvirt's has one of its own."""
    for who, entry in in_qemus():
        with contextlib.suppress(OSError):
            if not str(entry.readlink()).startswith("/dev/"):
                continue
            found = entry.stat()
            if stat.S_ISBLK(found.st_mode) and meets(found.st_rdev, number):
                return who
    return None


def in_qemus() -> Iterator[tuple[str, pathlib.Path]]:
    """What the QEMUs of this host have open, as far as this process may see: who, and the name
    below /proc that leads to it."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = runtime.name_of_qemu(int(process.name))
            if name is not None and int(process.name) != os.getpid():
                for entry in (process / "fd").iterdir():
                    yield f"{process.name} ({name})", entry


def _invalid(text: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_OPERATION_INVALID, text)


def look(path: pathlib.Path) -> int:
    """The bytes of a block device that can be written. Errors: as ``held``."""
    fd = held(path)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as failure:
        raise errors.system_error(failure, f"cannot read the size of {path}") from failure
    finally:
        os.close(fd)


class Device:
    """A block device, held alone while it is written."""

    def __init__(self, path: pathlib.Path, size: int) -> None:
        """Errors: as ``held``; VIR_ERR_OPERATION_FAILED where SIZE bytes have no place on it."""
        self._path = path
        self._size = size
        self._unwanted = False
        self._seen = bytearray(-(-size // checksum.BLOCK))
        """Of every block, whether it has what it is to have."""
        self._written = target.Window(_WINDOW)
        self._ways: list[Callable[[int, int], None]] = [self._punch, self._zero_out]
        """To zero a range, but for writing."""
        self._fd: int | None = held(path)
        try:
            has = os.lseek(self._fd, 0, os.SEEK_END)
            self._sector = struct.unpack("i", fcntl.ioctl(self._fd, _BLKSSZGET, bytes(4)))[0]
        except OSError as failure:
            self.discard()
            raise errors.system_error(failure, f"cannot read the size of {path}") from failure
        if has < size:
            self.discard()
            raise too_small(str(path), has, size)

    def write(self, offset: int, data: memoryview) -> None:
        self._note(offset, len(data))
        self._pwrite(offset, data)
        assert self._fd is not None
        target.write_back(self._fd, self._written, offset, offset + len(data))

    def write_zeroes(self, offset: int, length: int) -> None:
        self._note(offset, length)
        whole = length // self._sector * self._sector
        for start in range(0, whole, _MOST_ZEROES):
            self._zero(offset + start, min(_MOST_ZEROES, whole - start))
        self._write_zeroes(offset + whole, length - whole)

    def finish(self) -> int:
        assert self._fd is not None
        block = checksum.BLOCK
        start = self._seen.find(0)
        while start >= 0:
            end = self._seen.find(1, start)
            end = self._size if end < 0 else end * block
            self.write_zeroes(start * block, end - start * block)
            start = self._seen.find(0, start)
        try:
            os.fsync(self._fd)
            fd, self._fd = self._fd, None
            os.close(fd)
        except OSError as failure:
            raise self._failed(failure) from failure
        return self._size

    def shorten(self) -> None:
        self._unwanted = True

    def discard(self) -> None:
        """Close it: what is written is written."""
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):
            if fd is not None:
                os.close(fd)

    def _note(self, offset: int, length: int) -> None:
        first, last = offset // checksum.BLOCK, -(-(offset + length) // checksum.BLOCK)
        self._seen[first:last] = b"\1" * (last - first)

    def _pwrite(self, offset: int, data: memoryview) -> None:
        assert self._fd is not None
        try:
            target.pwrite(self._fd, data, offset)
        except OSError as failure:
            raise self._failed(failure) from failure

    def _zero(self, offset: int, length: int) -> None:
        """A range of whole sectors."""
        if self._unwanted:
            raise errors.error(libvirt.VIR_ERR_OPERATION_ABORTED, polling.CANCELLED)
        while self._ways:
            try:
                self._ways[0](offset, length)
            except OSError as failure:
                if failure.errno not in _CANNOT:
                    raise self._failed(failure) from failure
                del self._ways[0]
            else:
                return
        self._write_zeroes(offset, length)

    def _punch(self, offset: int, length: int) -> None:
        """Of a device that promises zeroes where it gives space back: without, this fails."""
        start, count = ctypes.c_int64(offset), ctypes.c_int64(length)
        if _LIBC.fallocate(self._fd, _KEEP_SIZE_PUNCH_HOLE, start, count):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _zero_out(self, offset: int, length: int) -> None:
        """By the kernel, which writes zeroes where the device cannot zero."""
        assert self._fd is not None
        fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", offset, length))

    def _write_zeroes(self, offset: int, length: int) -> None:
        for start in range(0, length, len(_ZEROES)):
            self._pwrite(offset + start, _ZEROES[: length - start])

    def _failed(self, failure: OSError) -> errors.Error:
        return errors.system_error(failure, f"cannot write {self._path}")
