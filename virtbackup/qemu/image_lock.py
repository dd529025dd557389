# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a QEMU that goes on having an image open keeps every other QEMU from writing to it.

QEMU locks what it writes to, byte by byte (file-posix). That keeps those of this host out where the
file system locks; those of another host have to be kept out by the file not being there.
"""

import fcntl
import os
import pathlib
import stat
import struct
from collections.abc import Iterable

_FLOCK = struct.Struct("hhqqi4x")
"""Of the system call for 64 bits: type, whence, start, length, process."""
_LOCAL = frozenset(("ext2", "ext3", "ext4", "xfs", "f2fs", "zfs", "bcachefs", "tmpfs", "overlay"))
"""File systems that only one host has, and whose files are known by their device's number."""


def is_kept(pid: int, filename: str) -> bool:
    """Whether FILENAME, as process PID knows it, is a file that is on no other host, and is locked
    by whoever writes to it. Not where that cannot be seen."""
    if not filename.startswith("/"):
        return False
    try:
        path = pathlib.Path(f"/proc/{pid}/root", filename.lstrip("/"))
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        mounts = pathlib.Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        device = os.fstat(fd).st_dev
        return file_systems(mounts.splitlines(), device) <= _LOCAL and is_locked(fd)
    finally:
        os.close(fd)


def file_systems(mountinfo: Iterable[str], device: int) -> set[str]:
    """Of which kind the file system is that has DEVICE's number, by the lines of mountinfo
    (proc(5)): one, where it is known."""
    number = f"{os.major(device)}:{os.minor(device)}"
    found = set()
    for line in mountinfo:
        mount, _, kind = line.partition(" - ")
        if mount.split(" ")[2:3] == [number]:
            found.add(kind.split(" ")[0])
    return found or {"unknown"}


def is_locked(fd: int) -> bool:
    """Whether somebody has a lock of QEMU's kind on a file: one of an open file, not of a process.
    The kernel's list of all locks takes 10 ms to be read."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        kind, _, _, _, process = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    except OSError:
        return False
    return bool(kind != fcntl.F_UNLCK and process == -1)
