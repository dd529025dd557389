# SPDX-License-Identifier: LGPL-2.1-or-later
"""Places of a test's own: a small file system, a block device, a port, a PATH."""

import contextlib
import ctypes
import fcntl
import os
import pathlib
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest

FF = b"\xff"
"""What a block device has before anything is written to it."""
_BLKPG, _BLKPG_ADD_PARTITION = 0x1269, 1


def has_ipv6() -> bool:
    """Whether there is a loopback of it, which a kernel or a container may be without."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


IPV6 = (pytest.mark.may_skip, pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))
"""The marks of a case that takes it."""


@contextlib.contextmanager
def small_file_system(path: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """A file system of SIZE bytes at PATH, which is made where it is not there, for as long as this
    lasts. Skips where none may be mounted."""
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not allowed to mount a small file system: this wants root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def automounted(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system that an automounter has mounted, right below the directory of it that is at
    PATH, of which no fsync(2) is possible. Skips where none may be mounted."""
    path.mkdir()
    reading, writing = os.pipe()
    options = f"fd={writing},pgrp={os.getpgrp()},minproto=5,maxproto=5,indirect"
    mount = ["mount", "-t", "autofs", "-o", options, "test", str(path)]
    try:
        if subprocess.run(mount, capture_output=True, pass_fds=[writing]).returncode:
            pytest.skip("not allowed to be an automounter: this wants root")
        os.close(writing)
        writing = -1
        try:
            with small_file_system(path / "mounted", 64 << 20) as mounted:
                yield mounted
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
    finally:
        for fd in {reading, writing} - {-1}:
            os.close(fd)


def synced(monkeypatch: pytest.MonkeyPatch) -> set[pathlib.Path]:
    """What this process makes durable from now on, by fsync(2)."""
    found = set()
    fsync = os.fsync

    def noting(fd: int) -> None:
        fsync(fd)
        found.add(pathlib.Path(f"/proc/self/fd/{fd}").readlink())

    monkeypatch.setattr(os, "fsync", noting)
    return found


@contextlib.contextmanager
def mount_point(path: pathlib.Path) -> Iterator[None]:
    """While this lasts the file at PATH, as what is given to a container, cannot be removed, nor
    another one take its place. Skips where nothing may be mounted."""
    if subprocess.run(["mount", "--bind", str(path), str(path)], capture_output=True).returncode:
        pytest.skip("not allowed to mount a file: this wants root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill_up(path: pathlib.Path, leave: int = 0) -> pathlib.Path:
    """Take all but LEAVE bytes of the file system that has a directory; the file that has them."""
    hog = path / "hog"
    free = os.statvfs(path)
    with hog.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leave)
    return hog


@contextlib.contextmanager
def loop_device(path: pathlib.Path, *options: str) -> Iterator[pathlib.Path]:
    """A block device over a file. Skips where there is none."""
    argv = ["losetup", "--find", "--show", *options, str(path)]
    made = subprocess.run(argv, capture_output=True, text=True)
    if made.returncode:
        pytest.skip("no loop device")
    device = made.stdout.strip()
    try:
        yield pathlib.Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def add_part(whole: pathlib.Path, size: int) -> pathlib.Path:
    """The first SIZE bytes of a loop device as its first part, as addpart(8) does it, which Debian
    13 has no more (linux/blkpg.h)."""
    part = struct.pack("qqi64s64s0q", 0, size, 1, b"", b"")
    kept = ctypes.create_string_buffer(part)
    asked = struct.pack("iiiP", _BLKPG_ADD_PARTITION, 0, len(part), ctypes.addressof(kept))
    with whole.open("rb") as device:
        fcntl.ioctl(device, _BLKPG, asked)
    return pathlib.Path(f"{whole}p1")


@contextlib.contextmanager
def block_device(path: pathlib.Path, size: int) -> Iterator[pathlib.Path]:
    """One of SIZE bytes, all of them FF, which are in the file PATH."""
    path.write_bytes(FF * size)
    with loop_device(path) as device:
        yield device


_held: list[socket.socket] = []


def free_port(host: str = "127.0.0.1", family: socket.AddressFamily = socket.AF_INET) -> int:
    """One on which nobody listens, and that nobody is given who asks for any: it is held to the
    end, which keeps nobody from listening on it."""
    held = socket.socket(family)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((host, 0))
    _held.append(held)
    return int(held.getsockname()[1])


def path_with(directory: pathlib.Path, program: str, first: str) -> str:
    """A PATH on which PROGRAM does what the shell makes of FIRST before it begins; DIRECTORY, which
    is made, is for that."""
    real = shutil.which(program)
    assert real is not None
    directory.mkdir()
    made = directory / program
    made.write_text(f'#!/bin/sh\n{first}\nexec {real} "$@"\n')
    made.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"
