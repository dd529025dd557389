# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's programs as the writers of our qcow2 files: both that can be, and what may become of them.

How a copy's file looks is in test_copy and test_incremental.
"""

import contextlib
import errno
import gc
import itertools
import json
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import libvirt
import pytest

import virtbackup
from tests import waiting
from tests.live import copies, places
from virtbackup.nbd import copy, qcow2, vhost_user, writer

pytestmark = [
    pytest.mark.needs("qemu-storage-daemon", "qemu-nbd", "qemu-img", "setpriv"),
    pytest.mark.timeout(120),
]

BLOCK = 1 << 16
SLOW_TO_SLEEP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <signal.h>
#include <time.h>

static int later(struct pollfd *fds, nfds_t count, const struct timespec *most,
                 const sigset_t *mask)
{
    static const struct timespec none, moment = {0, 100000000};
    static int hung_up;
    int (*real)(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *);
    int found;

    real = dlsym(RTLD_NEXT, "ppoll");
    if (hung_up && !most && real(fds, count, &none, mask) == 0)
        nanosleep(&moment, 0);
    found = real(fds, count, most, mask);
    for (nfds_t i = 0; found > 0 && i < count; i++)
        hung_up |= fds[i].revents & POLLHUP;
    return found;
}

int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *most, const sigset_t *mask)
{
    return later(fds, count, most, mask);
}

int __ppoll_chk(struct pollfd *fds, nfds_t count, const struct timespec *most,
                const sigset_t *mask, size_t size)
{
    return later(fds, count, most, mask);
}
"""
"""A library by which a program whose client has left sleeps a moment later than it was about to. A
storage daemon that gets SIGTERM in that moment sleeps on."""
PROGRAMS = ("qemu-storage-daemon", "qemu-nbd")


@pytest.fixture(params=PROGRAMS)
def program(
    request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """What is there to write with."""
    name: str = request.param
    only(
        tmp_path / "bin",
        monkeypatch,
        name,
        "qemu-img",
        "setpriv",
        "sh",
        "nbdkit",
        "umount",
        "mount",
    )
    return name


def only(directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    """No program but these can be found."""
    directory.mkdir()
    for name in programs:
        found = shutil.which(name)
        assert found is not None
        (directory / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(directory))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(copies.children())
    yield
    assert set(copies.children()) <= before


def begun(path: pathlib.Path, size: int = 64 * BLOCK, **options: object) -> writer.QemuWriter:
    made = writer.QemuWriter(path, size, **options)  # type: ignore[arg-type]
    made.begin()
    return made


def check(path: pathlib.Path) -> None:
    subprocess.run(["/usr/bin/qemu-img", "check", "-q", "-f", "qcow2", path], check=True)


# --- what is written ------------------------------------------------------------------------------


def test_what_is_written_is_there(tmp_path: pathlib.Path, program: str) -> None:
    """Out of its own memory and out of other, with a name that may be taken for something else."""
    size, source = 5 * BLOCK + 1000, random.Random(1)
    path = tmp_path / "a,b:c=d.qcow2"
    made = begun(path, size)
    assert any(name in program for name in copies.children().values())
    own = made.memory(3 * BLOCK)
    own[:] = source.randbytes(3 * BLOCK)
    other, end = source.randbytes(BLOCK), source.randbytes(1000)
    freed: list[int] = []
    made.write(0, own)
    made.after(lambda: freed.append(1))
    made.write(3 * BLOCK, memoryview(other))
    made.write_zeroes(4 * BLOCK, BLOCK)
    made.write(5 * BLOCK, memoryview(end))
    made.after(lambda: freed.append(2))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes()[:4] == bytes(4), "it can be taken for an image"
    stored = made.finish()
    assert sorted(freed) == [1, 2]
    assert stored == path.stat().st_blocks * 512
    check(path)
    disk = bytes(own) + other + bytes(BLOCK) + end
    os.environ["PATH"] += ":/usr/bin"
    assert copies.image_bytes(path, "qcow2") == disk.ljust(-(-size // 512) * 512, b"\0")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_zeroes_hide_what_is_behind(
    tmp_path: pathlib.Path, program: str, compression: writer.Compression | None
) -> None:
    size = 64 * BLOCK + 512
    behind = tmp_path / "behind.raw"
    behind.write_bytes(b"\xff" * size)
    path = tmp_path / "out"
    backing = qcow2.Backing("behind.raw", "raw")
    made = begun(path, size, backing=backing, compression=compression)
    made.write_zeroes(BLOCK, 2 * BLOCK)
    made.write(5 * BLOCK, memoryview(b"\x05" * BLOCK))
    made.write_zeroes(64 * BLOCK, 512)
    made.finish()
    check(path)
    os.environ["PATH"] += ":/usr/bin"
    disk = bytearray(b"\xff" * size)
    disk[BLOCK : 3 * BLOCK], disk[64 * BLOCK :] = bytes(2 * BLOCK), bytes(512)
    disk[5 * BLOCK : 6 * BLOCK] = b"\x05" * BLOCK
    assert copies.image_bytes(path, "qcow2") == disk


def test_many_small_writes_in_bursts(tmp_path: pathlib.Path, program: str) -> None:
    """The server looks for new commands while others are told to it: one of them in memory that we
    share, where it could see half of something, as it would every second."""
    made = begun(tmp_path / "out", 1 << 28)
    data, source = made.memory(4096), random.Random(2)
    data[:] = b"\x07" * 4096
    end = time.monotonic() + (4 if program == "qemu-storage-daemon" else 1)
    while time.monotonic() < end:
        for _ in range(source.randrange(1, 20)):
            made.write(source.randrange(1 << 16) * 4096, data)
        made.after(lambda: None)
    made.finish()
    check(tmp_path / "out")


def test_it_takes_little_memory(tmp_path: pathlib.Path, program: str) -> None:
    """Of a process of its own: that of ours and QEMU's, in KiB, whatever the disk has."""
    code = """
import pathlib, resource, sys
from virtbackup.nbd import writer
made = writer.QemuWriter(pathlib.Path(sys.argv[1]), 1 << 28)
made.begin()
data = [made.memory(1 << 19) for _ in range(8)]
for at in range(0, 1 << 28, 1 << 19):
    memory = data[at // (1 << 19) % 8]
    memory[:] = bytes([at >> 20 & 255 | 1]) * (1 << 19)
    made.write(at, memory)
    made._settle(4)
made.finish()
told = pathlib.Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in told if line.startswith("VmHWM")))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    argv = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    ours, theirs = map(int, done.stdout.split())
    assert max(ours, theirs) < 64 << 10, (ours, theirs)


# --- what may happen ------------------------------------------------------------------------------


def test_a_program_killed_in_the_middle(tmp_path: pathlib.Path, program: str) -> None:
    out = tmp_path / "out"

    def kill() -> None:
        [pid] = [pid for pid, name in copies.children().items() if name in program]
        os.kill(pid, signal.SIGKILL)

    with (
        copies.nbdkit(tmp_path, "--filter=delay", "pattern", "64M", "rdelay=5ms") as server,
        pytest.raises(virtbackup.Error) as raised,
    ):
        copy.copy([copy.Job(server.export, out, "qcow2")], progress=copies.Watch(kill))
    assert raised.value.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
    assert f"cannot write {out}: the program that writes it has ended" in str(raised.value)
    assert not out.exists()


def fill(made: writer.QemuWriter) -> int:
    for block in range(64):
        made.write(block * BLOCK, memoryview(bytes([block + 1]) * BLOCK))
    return made.finish()


@pytest.mark.needs("cc")
def test_a_storage_daemon_that_is_about_to_sleep_ends(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "slow.so"
    build = [
        "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-x",
        "c",
        "-",
        "-o",
        str(library),
    ]
    subprocess.run(build, input=SLOW_TO_SLEEP, text=True, check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    at_once = writer.QemuWriter._close_link

    def interrupted(made: writer.QemuWriter) -> None:
        """As where the machine is busy, and somebody else's turn comes just then."""
        at_once(made)
        time.sleep(0.05)

    monkeypatch.setattr(writer.QemuWriter, "_close_link", interrupted)
    made = begun(tmp_path / "out.qcow2")
    made.write(0, memoryview(bytes(BLOCK)))
    made.finish()
    monkeypatch.delenv("LD_PRELOAD")
    check(tmp_path / "out.qcow2")


@pytest.mark.may_skip
def test_a_full_file_system(tmp_path: pathlib.Path, program: str) -> None:
    with places.small_file_system(tmp_path / "tiny", 1 << 20) as tiny:
        made = begun(tiny / "out")
        with pytest.raises(virtbackup.Error) as raised:
            fill(made)
        made.discard()
        assert raised.value.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR
        assert f"cannot write {tiny}/out: No space left on device" in str(raised.value)
        assert list(tiny.iterdir()) == []


def test_a_file_that_cannot_be_looked_at(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a server that is cut off: whatever meets it first names the file."""

    def cut_off(_: int) -> os.stat_result:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    made = begun(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", cut_off)
        with pytest.raises(virtbackup.Error, match=f"cannot write {tmp_path}/out: Transport endp"):
            fill(made)
    made.discard()


def test_our_end_is_its_end(tmp_path: pathlib.Path, program: str) -> None:
    """Killed outright, with nobody left to clean up."""
    code = """
import pathlib, signal, sys
from virtbackup.nbd import writer
made = writer.QemuWriter(pathlib.Path(sys.argv[1]), 1 << 20)
made.begin()
print("begun", flush=True)
signal.pause()
"""
    argv = [sys.executable, "-c", code, str(tmp_path / "out")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    [(pid, name)] = copies.children(process.pid).items()
    assert name in program
    writing = os.pidfd_open(pid)
    process.kill()
    process.wait()
    process.stdout.close()
    assert select.select([writing], [], [], waiting.DEADLINE)[0], "it goes on without us"
    os.close(writing)


def test_it_is_given_up(tmp_path: pathlib.Path, program: str) -> None:
    made = begun(tmp_path / "out")
    made.write(0, memoryview(bytes(BLOCK)))
    made.shorten()
    made.discard()
    assert not (tmp_path / "out").exists()
    made = writer.QemuWriter(tmp_path / "out", BLOCK)
    made.shorten()
    with pytest.raises(virtbackup.Error):
        made.begin()
    made.discard()
    assert not (tmp_path / "out").exists()


def test_killed_while_the_file_is_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A qemu-img that went on would make the file again that was removed since, and whole."""
    slow = f": >{tmp_path}/begun; sleep 1"
    monkeypatch.setenv("PATH", places.path_with(tmp_path / "bin", "qemu-img", slow))
    out = tmp_path / "out"
    code = (
        "import pathlib, sys; from virtbackup.nbd import writer;"
        f"writer.QemuWriter(pathlib.Path(sys.argv[1]), {BLOCK}).begin()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(out)]) as one:
        waiting.until((tmp_path / "begun").exists, process=one)
        one.kill()
    out.unlink()
    time.sleep(2)  # nothing tells that one that is slow would have come by now
    assert not out.exists()


def test_a_file_that_is_there_is_not_touched(tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(virtbackup.Error, match=r"cannot create .*/out: File exists"):
        writer.QemuWriter(tmp_path / "out", BLOCK)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ((), "cannot run qemu-img, which is in the package qemu-utils: No such file or directory"),
        (("qemu-img",), "cannot run setpriv, which is in the package util-linux: No such file"),
        (("qemu-img", "setpriv", "sh"), "cannot write {out}: sh: .*qemu-nbd: not found"),
    ],
)
def test_programs_that_are_not_installed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, programs: tuple[str, ...], said: str
) -> None:
    only(tmp_path / "bin", monkeypatch, *programs)
    out = tmp_path / "out"
    made = writer.QemuWriter(out, BLOCK)
    with pytest.raises(virtbackup.Error, match=said.format(out=out)):
        made.begin()
    made.discard()
    assert not out.exists()


def open_files() -> list[str]:
    """But for /dev/null, of which Python's own subprocess leaves one where it can open no pipe."""
    found = []
    for path in pathlib.Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(path.readlink()))
    return sorted(one for one in found if one != "/dev/null")


def test_few_files_may_be_open(tmp_path: pathlib.Path) -> None:
    """Whatever the one too many is for, nothing is left."""
    (out := tmp_path / "out").mkdir()
    failed = 0
    while not (out / "copy").exists():
        # One server for each try: what becomes of one that was left so is its own.
        with copies.nbdkit(tmp_path, "random", "size=1M") as server:
            gc.collect()
            before = open_files()
            used = {int(path.name) for path in pathlib.Path("/proc/self/fd").iterdir()}
            free = (number for number in itertools.count() if number not in used)
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            most = next(itertools.islice(free, failed, None))
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
            try:
                copy.copy([copy.Job(server.export, out / "copy", "qcow2")])
            except virtbackup.Error as failure:
                assert server.process.poll() is None
                assert "Too many open files" in str(failure)
                assert "package" not in str(failure)
                assert list(out.iterdir()) == []
                failed += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            gc.collect()
            assert open_files() == before
    assert failed > 8


def test_no_temporary_directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where all that there are are full, and the target is elsewhere."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    made = writer.QemuWriter(tmp_path / "out", 1 << 20)
    text = f"cannot make a directory for the program that writes {tmp_path}/out: No such file"
    with pytest.raises(virtbackup.Error, match=text):
        made.begin()
    made.discard()
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_cannot_be_made(tmp_path: pathlib.Path) -> None:
    made = writer.QemuWriter(tmp_path / "out", 1 << 62)
    with pytest.raises(
        virtbackup.Error, match=r"cannot write .*/out: .*[Ii]mage.* too (large|big)"
    ):
        made.begin()
    made.discard()


def test_compressed_is_what_qemu_says(tmp_path: pathlib.Path, program: str) -> None:
    made = begun(tmp_path / "out", compression="zlib")
    assert fill(made) < 16 * BLOCK
    argv = ["/usr/bin/qemu-img", "info", "--output=json", str(tmp_path / "out")]
    told = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    assert told["format-specific"]["data"]["compression-type"] == "zlib"
    check(tmp_path / "out")


def test_a_place_in_memory() -> None:
    memory = vhost_user.Memory(BLOCK)
    first, second = memory.take(BLOCK // 2), memory.take(BLOCK // 2)
    start = memory.place(first)
    assert start is not None
    assert memory.place(second) == start + BLOCK // 2
    assert memory.place(second[5:]) == start + BLOCK // 2 + 5
    assert memory.place(memoryview(bytearray(9))) is None
    assert memory.place(memoryview(bytes(9))) is None
    memory.close()
