# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scratch images whose storage hangs: the guest waits no longer than it must, and is told of. And
a directory of backups that does.

The guest is Linux and writes all the time. The storage is a server that is stopped with SIGSTOP.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import libvirt
import pytest

import virtbackup
from demo import guest, records
from tests import waiting
from tests.live import branched, machines, scene
from virtbackup.nbd import copy
from virtbackup.qemu import cleanup, hang, scratch, verdict
from virtbackup.tools import pull

pytestmark = [
    pytest.mark.needs(
        "qemu-system-x86_64", "qemu-img", "mount", "mkfs.ext4", "fuse2fs", "nbdkit", "nbdfuse"
    ),
    pytest.mark.may_skip,
]

QUICK = 0.5
"""Seconds of patience in these tests."""
AT_ONCE = 30.0
"""Seconds in which a guest's write is done that waits for nothing, on a machine that does other
things too. What hangs in these tests hangs until it is told to go on."""


@dataclasses.dataclass
class Storage:
    """A file system at PATH and the process that serves it."""

    path: pathlib.Path
    server: "subprocess.Popen[bytes]"
    hangs: bool = False

    def hang(self) -> None:
        waiting.stop(self.server)
        self.hangs = True

    def go_on(self) -> None:
        self.server.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def file_server(directory: pathlib.Path, size: int) -> Iterator[Storage]:
    """A file system of SIZE bytes in user space: when it hangs, nothing is answered.

    It has one thread (-s): with several, a file that is removed as it is closed may keep its other
    name, .fuse_hidden, for ever.
    """
    image, path = _image(directory, size), directory / "mnt"
    path.mkdir()
    with _process(["fuse2fs", "-f", "-s", "-o", "fakeroot,rw", str(image), str(path)]) as server:
        _wait_for(path.is_mount, server)
        with _mounted(path), _going_on(server):
            yield Storage(path, server)


@contextlib.contextmanager
def block_server(
    directory: pathlib.Path, size: int, broken: pathlib.Path = pathlib.Path("/nowhere")
) -> Iterator[Storage]:
    """A file system of SIZE bytes on a disk behind nbdkit: when that hangs, the page cache still
    takes writes for a while. While there is a file BROKEN, nothing can be written to the disk."""
    image, path, disk = _image(directory, size), directory / "mnt", directory / "disk"
    path.mkdir()
    disk.touch()
    socket = directory / "nbdkit.sock"
    with contextlib.ExitStack() as stack:
        argv = ["nbdkit", "-f", "-U", str(socket), "--filter=error", "file", str(image)]
        argv += ["error-pwrite-rate=100%", "error-zero-rate=100%", f"error-file={broken}"]
        server = stack.enter_context(_process(argv))
        _wait_for(socket.is_socket, server)
        fuse = stack.enter_context(_process(["nbdfuse", str(disk), "--unix", str(socket)]))
        _wait_for(lambda: disk.stat().st_size == size, fuse)
        stack.enter_context(_mounted(disk))
        argv = ["mount", "-o", "loop", str(disk), str(path)]
        if subprocess.run(argv, capture_output=True, check=False).returncode:
            pytest.skip("not allowed to mount a loop device")
        stack.enter_context(_mounted(path))
        stack.enter_context(_going_on(server))
        yield Storage(path, server)


def _image(directory: pathlib.Path, size: int) -> pathlib.Path:
    image = directory / "ext4"
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    return image


@contextlib.contextmanager
def _process(argv: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


@contextlib.contextmanager
def _going_on(server: "subprocess.Popen[bytes]") -> Iterator[None]:
    """SERVER does not hang when this ends: what it serves could not be unmounted."""
    try:
        yield
    finally:
        server.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def _mounted(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def _wait_for(condition: Callable[[], bool], server: "subprocess.Popen[bytes]") -> None:
    waiting.until(lambda: condition() or server.poll() is not None)
    if server.poll() is not None:
        pytest.skip("not allowed to mount a file system in user space")


def document(linux: guest.Guest, storage: Storage) -> str:
    disks = "".join(
        f'<disk name="{disk.name}"><source dir="{storage.path}"/></disk>' for disk in records.DISKS
    )
    return (
        f'<domainbackup><address type="unix" path="{linux.directory}/backup.sock"/>'
        f"<disks>{disks}</disks></domainbackup>"
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cleanup, scratch, verdict):
        monkeypatch.setattr(module, "PATIENCE", QUICK)


SERVERS = {"file server": file_server, "disk that has filled its page cache": block_server}


@pytest.mark.parametrize("unmounted", [False, True], ids=["", "unmounted"])
@pytest.mark.parametrize("kind", SERVERS)
def test_a_guest_waits_as_long_as_its_scratch_images_and_no_longer(
    linux: guest.Guest, tmp_path: pathlib.Path, kind: str, unmounted: bool
) -> None:
    """Also when an administrator has taken the name of what hangs away (umount -l)."""
    with SERVERS[kind](tmp_path, 160 << 20) as storage, virtbackup.open(linux.uri) as conn:
        [dom] = conn.listAllDomains()
        linux.forget_slowest()
        scene.start_and_die(linux.uri, document(linux, storage))
        storage.hang()
        hung = time.monotonic()
        if unmounted:
            subprocess.run(["umount", "--lazy", str(storage.path)], check=True)
        waiting.until(lambda: any(disk.scratch_hangs for disk in dom.backupGetInfo().disks))
        info = dom.backupGetInfo()
        assert (info.state, info.scratch_timeout) == ("running", None)
        warnings = [disk.warning for disk in info.disks if disk.scratch_hangs]
        assert all("hangs, and the guest's writes with it" in str(text) for text in warnings)
        with pytest.raises(virtbackup.Error, match=r"image of disk '.*' hangs") as refusal:
            dom.backupStop()
        assert refusal.value.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
        with answers_at_once(linux):
            assert linux.monitor.command("query-status")["status"] == "running"
        waited = time.monotonic() - hung
        storage.go_on()
        linux.wait_for_report()
        assert QUICK < linux.report.slowest < waited + AT_ONCE
        waiting.until(lambda: not any(disk.scratch_hangs for disk in dom.backupGetInfo().disks))
        dom.backupStop()
        assert linux.monitor.command("query-jobs") == []
        assert scene.damage(linux) == ()
        if unmounted:  # for the end to find something
            subprocess.run(["mount", "--bind", str(tmp_path), str(storage.path)], check=True)


def test_a_stop_does_not_let_the_guest_wait_for_what_is_still_to_be_written(
    linux: guest.Guest, tmp_path: pathlib.Path
) -> None:
    """The disk under the scratch images hangs; as long as there is page cache nobody notices."""
    with block_server(tmp_path, 1 << 30) as storage, virtbackup.open(linux.uri) as conn:
        [dom] = conn.listAllDomains()
        scene.start_and_die(linux.uri, document(linux, storage))
        linux.wait_for_number(linux.report.number + records.DISKS[0].slots // 4)
        storage.hang()
        linux.forget_slowest()
        with subprocess.Popen(["sync", "-f", str(storage.path)]):
            time.sleep(QUICK)
            assert not any(disk.scratch_hangs for disk in dom.backupGetInfo().disks)
            dom.backupStop()
            with answers_at_once(linux):
                assert linux.monitor.command("query-jobs") == []
            linux.wait_for_report()
            assert linux.report.slowest < AT_ONCE
            storage.go_on()
        assert scene.damage(linux) == ()


def test_a_start_into_a_file_system_that_hangs_is_refused(
    linux: guest.Guest, tmp_path: pathlib.Path
) -> None:
    with file_server(tmp_path, 64 << 20) as storage, virtbackup.open(linux.uri) as conn:
        [dom] = conn.listAllDomains()
        storage.hang()
        with pytest.raises(
            virtbackup.Error, match=r"disk 'vda': the file system of .* does not"
        ) as e:
            dom.backupStart(document(linux, storage))
        assert e.value.get_error_code() == libvirt.VIR_ERR_OPERATION_TIMEOUT
        assert linux.monitor.command("query-block-exports") == []
        storage.go_on()
        dom.backupStart(document(linux, storage))
        dom.backupStop()


def test_which_of_several_file_systems_hangs(tmp_path: pathlib.Path) -> None:
    """They are asked together, and each alone where that takes long."""
    with file_server(tmp_path, 64 << 20) as storage:
        places = {"it": storage.path, "other": tmp_path}
        images = {name: hang.Image(str(path), None) for name, path in places.items()}
        assert hang.hanging(images, None, waiting.DEADLINE) == set()
        storage.hang()
        waiting.until(lambda: hang.hanging(images, None, QUICK) == {"it"})
        for _ in range(2):  # whoever was asked before is asked again
            assert hang.hanging(images, None, QUICK) == {"it"}
        assert hang.hanging({"other": images["other"]}, None, waiting.DEADLINE) == set()
        storage.go_on()
        waiting.until(lambda: not hang.hanging(images, None, QUICK))


class _Ends:
    """Progress: the pull comes to its end at the first byte, and the STORAGE hangs then."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def start(self, index: int, size: int) -> None:
        """Nothing."""

    def advance(self, index: int, count: int) -> None:
        self._storage.hang()
        raise virtbackup.Error(libvirt.VIR_ERR_OPERATION_ABORTED, "it is not wanted any more")


def test_what_never_came_to_the_disk_of_a_scratch_image_is_told_by_the_stop(
    tmp_path: pathlib.Path,
) -> None:
    """Where the page cache has let go of it, clients read what the disk has there, without an
    error; and QEMU, whose writes were taken, knows of none. Nor is it lost to the stop by who has
    asked before: a program that syncs the file, or a stop that was killed."""
    broken, socket = tmp_path / "broken", tmp_path / "nbd.sock"
    document = (
        f'<domainbackup><address type="unix" path="{socket}"/><disks><disk name="vda">'
        f'<source dir="{tmp_path}/mnt"/></disk><disk name="sdb"/></disks></domainbackup>'
    )
    with (
        block_server(tmp_path, 24 << 20, broken) as storage,
        machines.two_disks(tmp_path, size=4 << 20) as machine,
        virtbackup.open(machine.uri) as connection,
    ):
        [dom] = connection.listAllDomains()
        for disk in ("vda", "sdb"):
            machine.io(disk, "write -P 1 0 4M")
        dom.backupStart(document)
        subprocess.run(["sync", "-f", str(storage.path)], check=True)
        broken.touch()
        for disk in ("vda", "sdb"):
            machine.io(disk, "write -P 2 0 1M")
        assert subprocess.run(["sync", "-f", str(storage.path)], capture_output=True).returncode
        for file in pathlib.Path(f"/proc/{machine.process.pid}/fd").iterdir():
            if str(file.readlink()).startswith(str(storage.path)):
                with file.open("rb") as scratch_image:
                    os.posix_fadvise(scratch_image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    with pytest.raises(OSError, match=r"Input/output|Read-only"):
                        os.fsync(scratch_image.fileno())
        broken.unlink()
        assert branched.whole(socket, "vda") != b"\1" * (4 << 20)  # nobody told the client
        assert branched.whole(socket, "sdb") == b"\1" * (4 << 20)
        with pytest.raises(libvirt.libvirtError) as raised:
            dom.backupStop()
    assert str(raised.value) == (
        f"operation failed: the backup is not good: disk 'vda': its scratch image in"
        f" '{storage.path}' has lost data on the way to disk: Input/output error"
    )


@pytest.mark.parametrize("fmt", pull.FORMATS)
def test_a_pull_into_a_file_system_that_hangs_ends_the_backup(
    tmp_path: pathlib.Path, fmt: copy.Format
) -> None:
    """However long it takes until the files are removed, which went before."""
    with (
        file_server(tmp_path, 64 << 20) as storage,
        machines.two_disks(tmp_path, size=16 << 20) as machine,
        virtbackup.open(machine.uri) as conn,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        machine.io("vda", "write -P 1 0 5M")
        domain, out = conn.lookupByID(1), storage.path / "out"
        pulled = pool.submit(pull.pull, domain, out, fmt=fmt, progress=_Ends(storage))
        try:
            waiting.until(lambda: storage.hangs)
            waiting.until(lambda: machine.probe("query-jobs") == [])
            assert machine.probe("query-block-exports") == []
            assert not pulled.done()
        finally:
            storage.go_on()
        with pytest.raises(virtbackup.Error, match="it is not wanted any more"):
            pulled.result(waiting.DEADLINE)
        # One in user space keeps a removed file by another name until it has heard of its close.
        waiting.until(lambda: not out.exists() or not list(out.iterdir()))


@contextlib.contextmanager
def answers_at_once(linux: guest.Guest) -> Iterator[None]:
    """Whether QEMU's main loop runs: it answers what is asked in here."""
    asked = time.monotonic()
    yield
    assert time.monotonic() - asked < AT_ONCE
