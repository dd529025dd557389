# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who keeps others from writing to an image, by what the kernel tells."""

import fcntl
import os
import pathlib
import struct

import pytest

from virtbackup.qemu import image_lock

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
60 27 0:45 / /srv/my\\040images rw,relatime - nfs4 server:/images rw,vers=4.2
61 27 8:1 /var /mnt rw,relatime - ext4 /dev/sda1 rw
nonsense
"""
LOCKS = """\
1: OFDLCK ADVISORY  READ  -1 08:01:1234 100 101
2: POSIX  ADVISORY  WRITE 4711 08:01:1235 0 EOF
3: -> FLOCK  ADVISORY  WRITE 4712 08:01:1236 0 EOF
"""


def test_file_systems() -> None:
    lines = MOUNTS.splitlines()
    assert image_lock.file_systems(lines, os.makedev(8, 1)) == {"ext4"}
    assert image_lock.file_systems(lines, os.makedev(0, 45)) == {"nfs4"}
    assert image_lock.file_systems(lines, os.makedev(0, 99)) == {"unknown"}


@pytest.mark.parametrize(
    ("inode", "expected"), [(1234, True), (1235, False), (1236, False), (123, False)]
)
def test_locks(inode: int, expected: bool) -> None:
    assert image_lock.is_locked(LOCKS.splitlines(), os.makedev(8, 1), inode) is expected


def test_a_file_of_a_process(tmp_path: pathlib.Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"")
    assert not image_lock.is_kept(os.getpid(), str(image))
    with image.open("r+b") as opened:
        lock = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(opened, fcntl.F_OFD_SETLK, lock)
        assert image_lock.is_kept(os.getpid(), str(image))
    assert not image_lock.is_kept(os.getpid(), str(image))


@pytest.mark.parametrize(
    "filename", ["", "json:{}", "nbd://host/x", "relative", "/dev/null", "/nowhere/at/all"]
)
def test_what_is_no_such_file(filename: str) -> None:
    assert not image_lock.is_kept(os.getpid(), filename)
