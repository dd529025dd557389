# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a QEMU that goes on having an image open keeps every other QEMU from writing to it.

QEMU locks what it writes to, byte by byte (file-posix). That keeps those of this host out where the
file system locks; those of another host have to be kept out by the file not being there.
"""

import os
import pathlib
import stat
from collections.abc import Iterable

_LOCAL = frozenset(("ext2", "ext3", "ext4", "xfs", "f2fs", "zfs", "bcachefs", "tmpfs", "overlay"))
"""File systems that only one host has, and whose files are known by their device's number."""


def is_kept(pid: int, filename: str) -> bool:
    """Whether FILENAME, as process PID knows it, is a file that is on no other host, and is locked
    by whoever writes to it. Not where that cannot be seen."""
    if not filename.startswith("/"):
        return False
    try:
        found = pathlib.Path(f"/proc/{pid}/root", filename.lstrip("/")).stat()
        mounts = pathlib.Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
        locks = pathlib.Path("/proc/locks").read_text()
    except OSError:
        return False
    return (
        stat.S_ISREG(found.st_mode)
        and file_systems(mounts.splitlines(), found.st_dev) <= _LOCAL
        and is_locked(locks.splitlines(), found.st_dev, found.st_ino)
    )


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


def is_locked(locks: Iterable[str], device: int, inode: int) -> bool:
    """Whether somebody has a lock of QEMU's kind on a file, by the lines of /proc/locks."""
    name = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    return any(words[1:2] == ["OFDLCK"] and name in words for words in map(str.split, locks))
