# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who keeps others from writing to an image, by what the kernel tells."""

import fcntl
import os
import pathlib
import struct
import subprocess

import pytest

from virtbackup.qemu import image_lock

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
60 27 0:45 / /srv/my\\040images rw,relatime - nfs4 server:/images rw,vers=4.2
61 27 8:1 /var /mnt rw,relatime - ext4 /dev/sda1 rw
nonsense
"""


def test_file_systems() -> None:
    assert image_lock.local_mounts(MOUNTS.splitlines()) == {"27", "61"}


def test_a_file_of_a_process(tmp_path: pathlib.Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"")
    assert not image_lock.is_kept(os.getpid(), str(image))
    with image.open("r+b") as opened:
        lock = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(opened, fcntl.F_OFD_SETLK, lock)
        assert image_lock.is_kept(os.getpid(), str(image))
    assert not image_lock.is_kept(os.getpid(), str(image))


def test_a_lock_of_another_kind_and_of_somebody_else(tmp_path: pathlib.Path) -> None:
    """Of a process it goes with any descriptor that the process closes."""
    image = tmp_path / "image"
    image.write_bytes(b"")
    with image.open("r+b") as opened:
        fcntl.lockf(opened, fcntl.LOCK_EX)
        assert not image_lock.is_kept(os.getpid(), str(image))
    with image.open("r+b") as opened, subprocess.Popen(["cat", str(image), "-"], stdin=-1) as other:
        lock = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 100, 1, 0)
        fcntl.fcntl(opened, fcntl.F_OFD_SETLK, lock)
        assert image_lock.is_kept(os.getpid(), str(image))
        assert not image_lock.is_kept(other.pid, str(image))
        other.kill()


@pytest.mark.parametrize(
    "filename", ["", "json:{}", "nbd://host/x", "relative", "/dev/null", "/nowhere/at/all"]
)
def test_what_is_no_such_file(filename: str) -> None:
    assert not image_lock.is_kept(os.getpid(), filename)
