# SPDX-License-Identifier: LGPL-2.1-or-later
"""The data mover against real servers, good and bad: nbdkit with its filters, QEMU's own."""

import contextlib
import gc
import itertools
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import libvirt
import pytest

import virtbackup
from tests import waiting
from tests.live import copies, places
from virtbackup.nbd import checksum, connection, copy, layers, polling, store, target, writer

pytestmark = [
    pytest.mark.needs("nbdkit", "qemu-nbd", "qemu-img", "nbdcopy"),
    pytest.mark.timeout(180),
]

BLOCK = checksum.BLOCK
MIB = 1 << 20
FORMATS: tuple[copy.Format, ...] = ("raw", "qcow2")


def copy_one(
    export: connection.Export,
    path: pathlib.Path,
    fmt: copy.Format = "raw",
    progress: copy.Progress | None = None,
    cancel: copy.Cancel | None = None,
) -> copy.Result:
    return copy.copy([copy.Job(export, path, fmt)], progress=progress, cancel=cancel)[0]


def assert_copied(path: pathlib.Path, fmt: str, disk: bytes, result: copy.Result) -> None:
    """PATH has DISK, a qcow2 rounded up to sectors, and RESULT describes it."""
    size = len(disk) if fmt == "raw" else -(-len(disk) // 512) * 512
    assert copies.image_bytes(path, fmt) == disk.ljust(size, b"\0")
    assert result.size == len(disk)
    assert result.checksum == copies.defined_checksum(disk)
    assert result.stored == path.stat().st_blocks * 512


def refused(
    directory: pathlib.Path,
    export: connection.Export,
    progress: copy.Progress | None = None,
    cancel: copy.Cancel | None = None,
) -> virtbackup.Error:
    """The error of a copy that fails; nothing is left of it, in either format."""
    kept = set(directory.iterdir())
    with pytest.raises(virtbackup.Error) as raised:
        copy_one(export, directory / "out", "qcow2", progress, cancel)
    assert set(directory.iterdir()) <= kept
    return raised.value


# --- what is copied is what is served -------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    "argv",
    [
        ("memory", "0"),
        ("memory", "5M"),
        ("pattern", "1"),
        ("pattern", "1000"),
        ("pattern", str(BLOCK + 1)),
        ("pattern", str(3 * MIB + 511)),
        ("pattern", "20M"),
        ("sparse-random", "64M", "seed=1"),
        ("--filter=noextents", "sparse-random", "32M", "seed=2"),
        ("--no-sr", "sparse-random", "32M", "seed=3"),
        ("--filter=multi-conn", "pattern", "4M", "multi-conn-mode=disable"),
        ("--filter=blocksize-policy", "pattern", "2M", "blocksize-minimum=512",
         "blocksize-preferred=4096", "blocksize-maximum=20K", "blocksize-error-policy=error"),
        ("--filter=blocksize-policy", "sparse-random", "8M", "blocksize-minimum=4096",
         "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"),
        ("data", "@65530 1 2 3 4 5 6 7 8 9 @1048576 0*65536 1 @3145727 0xff"),
    ],
    ids=lambda argv: " ".join(argv)[:40],
)  # fmt: skip
def test_nbdkit(tmp_path: pathlib.Path, argv: tuple[str, ...], fmt: copy.Format) -> None:
    with copies.nbdkit(tmp_path, *argv) as server:
        disk = server.contents()
        result = copy_one(server.export, tmp_path / "out", fmt)
    assert_copied(tmp_path / "out", fmt, disk, result)


def alternating(path: pathlib.Path, size: int, grain: int) -> bytes:
    """A raw file whose every other GRAIN is a hole; its bytes."""
    source = random.Random(4)
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, 2 * grain):
            file.seek(offset)
            file.write(source.randbytes(grain))
    return path.read_bytes()


@pytest.mark.parametrize("grain", [4096, BLOCK, 3 * BLOCK])
@pytest.mark.parametrize("fmt", FORMATS)
def test_many_tiny_extents_of_a_qemu_export(
    tmp_path: pathlib.Path, grain: int, fmt: copy.Format
) -> None:
    disk = alternating(tmp_path / "disk", 1200 * 2 * grain if grain == 4096 else 24 * MIB, grain)
    with copies.qemu_nbd(tmp_path, "-f", "raw", str(tmp_path / "disk")) as server:
        result = copy_one(server.export, tmp_path / "out", fmt)
    assert_copied(tmp_path / "out", fmt, disk, result)
    if grain >= BLOCK:
        assert result.read == sum(
            grain for offset in range(0, len(disk), 2 * grain) if offset + grain <= len(disk)
        )


def test_of_an_answer_without_end_a_part_is_kept(tmp_path: pathlib.Path) -> None:
    """QEMU's have up to 131,072 extents, which as objects took 45 MiB of each disk."""
    count, hole = 9000, 20 << 30
    lines = [f"0 {hole} hole,zero\n"]
    lines += [f"{hole + n * BLOCK} {BLOCK} {'hole,' * (n % 2)}zero\n" for n in range(count)]
    (tmp_path / "list").write_text("".join(lines))
    size = hole + count * BLOCK
    kit = ["--filter=extentlist", "null", str(size), f"extentlist={tmp_path}/list"]
    with copies.nbdkit(tmp_path, *kit) as server, contextlib.closing(copy.Cancel()) as cancel:
        job = copy.Job(server.export, None)
        [result] = copy.copy([job])
        with contextlib.closing(polling.Loop(cancel)) as loop:
            one = loop.connect(server.export)
            request = one.ask([connection.ALLOCATION], hole, count * BLOCK)
            while not list(one.completed()):
                loop.wait()
            stretches = [found for [found], _ in layers._stretches(layers._open([job], loop), size)]
    [(_, entries)] = request.answers
    assert entries == [BLOCK, 2, BLOCK, 3] * 2048
    whole = checksum.Tree(size)
    whole.add_zeroes(0, size)
    assert (result.read, result.checksum) == (0, whole.hexdigest())
    assert max(map(len, stretches)) <= 8192
    assert sum(extent.length for found in stretches for extent in found) == size


def test_asking_whether_an_export_can_be_read_keeps_nothing(tmp_path: pathlib.Path) -> None:
    """A daemon asks of each disk of each backup, for months; libnbd kept the sector each time."""
    with copies.nbdkit(tmp_path, "pattern", "1M") as server:
        tracemalloc.start()
        try:
            for number in range(30):
                if number == 10:
                    before, _ = tracemalloc.get_traced_memory()
                assert connection.unreadable(server.export, 20) is None
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < 20 * 256


def test_tcp(tmp_path: pathlib.Path) -> None:
    port, ready = places.free_port(), tmp_path / "pid"
    argv = ["nbdkit", "-f", "--exit-with-parent", "-i", "127.0.0.1", "-p", str(port)]
    with copies.running([*argv, "-P", str(ready), "pattern", "1M"], ready.exists):
        result = copy_one(connection.Export(("127.0.0.1", port), ""), tmp_path / "out")
    pattern = b"".join(i.to_bytes(8, "big") for i in range(0, MIB, 8))
    assert_copied(tmp_path / "out", "raw", pattern, result)


def test_several_disks_at_once(tmp_path: pathlib.Path) -> None:
    """More disks than buffers for each: the memory is shared out, each disk is its own."""
    with copies.nbdkit(tmp_path, "--filter=exportname", "sparse-random", "16M", "seed=7") as server:
        disk = server.contents()
        jobs = [copy.Job(server.export, tmp_path / f"out{i}", FORMATS[i % 2]) for i in range(20)]
        watch = copies.Watch()
        results = copy.copy(jobs, progress=watch)
    for i, result in enumerate(results):
        assert_copied(tmp_path / f"out{i}", FORMATS[i % 2], disk, result)
    assert watch.sizes == watch.counts == dict.fromkeys(range(20), len(disk))


def test_a_bandwidth_is_for_all_disks_alike(tmp_path: pathlib.Path) -> None:
    """None waits for the end of another one."""
    order: list[int] = []

    class Order:
        def start(self, index: int, size: int) -> None:
            """Nothing."""

        def advance(self, index: int, count: int) -> None:
            order.append(index)

    with contextlib.ExitStack() as stack:
        jobs = []
        for name in ("a", "b", "c"):
            directory = tmp_path / name
            directory.mkdir()
            server = stack.enter_context(copies.nbdkit(directory, "pattern", "4M"))
            jobs.append(copy.Job(server.export, None))
        copy.copy(jobs, bandwidth=16 << 20, progress=Order())
    early = order[: len(order) // 2]
    assert all(early.count(index) > len(early) // 6 for index in range(3)), order


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", ["0", "1", "20M"])
def test_once_all_is_read_the_server_is_not_needed(
    tmp_path: pathlib.Path, size: str, fmt: copy.Format
) -> None:
    ended: list[int] = []
    with copies.nbdkit(tmp_path, "pattern", size) as server:
        disk = server.contents()

        def end_server() -> None:
            server.process.kill()
            ended.append(server.process.wait())

        job = copy.Job(server.export, tmp_path / "out", fmt)
        [result] = copy.copy([job], when_read=end_server)
    assert ended == [-signal.SIGKILL]
    assert_copied(tmp_path / "out", fmt, disk, result)


def test_nothing_is_left_of_a_copy_whose_server_calls_it_bad(tmp_path: pathlib.Path) -> None:
    def refuse() -> None:
        raise virtbackup.Error(libvirt.VIR_ERR_OPERATION_FAILED, "it was not good")

    with copies.nbdkit(tmp_path, "--filter=exportname", "pattern", "20M") as server:
        jobs = [copy.Job(server.export, tmp_path / fmt, fmt) for fmt in FORMATS]
        with pytest.raises(virtbackup.Error, match="it was not good"):
            copy.copy(jobs, when_read=refuse)
    assert not any((tmp_path / fmt).exists() for fmt in FORMATS)


def test_no_disk_is_no_work() -> None:
    assert copy.copy([]) == []


# --- sparse stays sparse --------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("filters", [(), ("--filter=noextents",)], ids=["told", "found"])
def test_zeroes_are_not_stored(
    tmp_path: pathlib.Path, fmt: copy.Format, filters: tuple[str, ...]
) -> None:
    """Told to be zero by the server, or found to be zero where the server says data."""
    argv = (*filters, "data", "@8388608 1 @33554432 0*262144 2 @50331647 3*65536 @67108863 0")
    with copies.nbdkit(tmp_path, *argv) as server:
        disk = server.contents()
        result = copy_one(server.export, tmp_path / "out", fmt)
    assert_copied(tmp_path / "out", fmt, disk, result)
    blocks = sum(any(disk[i : i + BLOCK]) for i in range(0, len(disk), BLOCK))
    assert 0 < blocks < 8
    assert result.stored <= (blocks + 6) * BLOCK
    assert result.read == (len(disk) if filters else blocks * BLOCK)


def test_a_qcow2_in_any_order(tmp_path: pathlib.Path) -> None:
    """Blocks all over a large disk."""
    source = random.Random(9)
    disk = {offset * BLOCK: source.randbytes(BLOCK) for offset in range(3, 1 << 18, 7000)}
    disk |= {offset + BLOCK: source.randbytes(BLOCK) for offset in list(disk)}
    made = writer.QemuWriter(tmp_path / "out", 1 << 34)
    made.begin()
    order = list(disk)
    source.shuffle(order)
    for offset in order:
        made.write(offset, memoryview(disk[offset]))
    made.finish()
    expected = tmp_path / "expected"
    with expected.open("wb") as file:
        file.truncate(1 << 34)
        for offset, data in disk.items():
            file.seek(offset)
            file.write(data)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", tmp_path / "out"], check=True)
    subprocess.run(
        ["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", expected, tmp_path / "out"],
        check=True,
    )


def test_a_huge_empty_disk_takes_no_time_and_no_space(tmp_path: pathlib.Path) -> None:
    with copies.nbdkit(tmp_path, "memory", "2T") as server:
        result = copy_one(server.export, tmp_path / "out", "qcow2")
    assert (result.size, result.read) == (2 << 40, 0)
    assert result.stored < MIB


# --- one checksum ---------------------------------------------------------------------------------


def test_the_checksum_is_the_same_however_it_is_read(tmp_path: pathlib.Path) -> None:
    size = 9 * MIB + 1000
    with copies.nbdkit(
        tmp_path, "--filter=truncate", "sparse-random", "16M", f"truncate={size}"
    ) as kit:
        wanted = copy.copy([copy.Job(kit.export, None)])[0].checksum
        for fmt in FORMATS:
            assert copy_one(kit.export, tmp_path / fmt, fmt).checksum == wanted
    for fmt in FORMATS:
        assert copy.checksum_of_file(tmp_path / fmt, fmt, size) == wanted
    path = tmp_path / "a,b=c.raw"
    path.write_bytes((tmp_path / "raw").read_bytes())
    assert copy.checksum_of_file(path, "raw", size) == wanted
    with path.open("r+b") as file:
        file.seek(size - 1)
        [last] = file.read(1)
        file.seek(size - 1)
        file.write(bytes([last ^ 1]))  # whatever it is
    assert copy.checksum_of_file(path, "raw", size) != wanted


def test_a_file_that_is_too_short_or_absent(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "short.raw"
    path.write_bytes(bytes(1024))
    with pytest.raises(virtbackup.Error, match=r"short\.raw: it has 1024 bytes, expected 4096"):
        copy.checksum_of_file(path, "raw", 4096)
    with pytest.raises(virtbackup.Error, match=r"cannot connect to image .*absent\.raw"):
        copy.checksum_of_file(tmp_path / "absent.raw", "raw")


def test_a_reading_program_that_ends_without_a_word() -> None:
    """As one that the kernel kills does: that is not the image's trouble."""
    export = connection.Export(connection.Program(("true",), "image x"), "")
    with pytest.raises(virtbackup.Error, match="image x: the program that reads it has ended"):
        copy.copy([copy.Job(export, None)])


# --- what goes wrong is said ----------------------------------------------------------------------


def test_a_read_error_names_export_and_offset(tmp_path: pathlib.Path) -> None:
    """QEMU's own server with a bad sector at 5 MiB: the read that covers it is named."""
    (tmp_path / "disk").write_bytes(random.Random(1).randbytes(8 * MIB))
    options = (
        "driver=raw,file.driver=blkdebug,file.image.driver=file,"
        f"file.image.filename={tmp_path}/disk,"
        f"file.inject-error.0.event=none,file.inject-error.0.sector={5 * MIB // 512}"
    )
    with copies.qemu_nbd(tmp_path, "--image-opts", options) as server:
        error = refused(tmp_path, server.export)
        assert server.process.poll() is None
    assert error.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
    assert f"cannot read export 'disk' at offset {5 * MIB}: Input/output error" in str(error)


def test_an_allocation_error_is_an_error(tmp_path: pathlib.Path) -> None:
    argv = ("--filter=error", "memory", "4M", "error-extents=EIO", "error-extents-rate=100%")
    with copies.nbdkit(tmp_path, *argv) as server:
        error = refused(tmp_path, server.export)
    assert "cannot read allocation of export 'disk' at offset 0: Input/output error" in str(error)


def leave_no_descriptor(pid: int) -> int:
    """Take from a server what it could yet open; its limit from now on. Its clients have gone, and
    the last of them was served."""
    opened = pathlib.Path(f"/proc/{pid}/fd")

    def only_listens() -> bool:
        """And has none among its first descriptors that it is about to open or has just closed."""
        try:
            found = {int(one.name): str(one.readlink()) for one in opened.iterdir()}
        except FileNotFoundError:  # closed meanwhile
            return False
        return max(found) < len(found) and sum("socket:" in it for it in found.values()) == 1

    waiting.until(only_listens)
    used = {int(one.name) for one in opened.iterdir()}
    limit = next(number for number in itertools.count() if number not in used)
    most = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, most))
    return limit


def serve_disk(
    directory: pathlib.Path, address: str
) -> contextlib.AbstractContextManager[copies.Server]:
    """1 MiB of zeroes, by a qemu-nbd on an ADDRESS of that kind."""
    (directory / "disk").write_bytes(bytes(MIB))
    argv = ("-f", "raw", str(directory / "disk"))
    return (
        copies.qemu_nbd(directory, *argv) if address == "unix" else copies.qemu_nbd_on_a_port(*argv)
    )


def test_a_read_that_has_its_turn_by_the_time_of_the_wait() -> None:
    """Nothing else would end the wait: the copy stood still, and the backup with it."""
    cancel, rate = copy.Cancel(), polling.Rate(100 * MIB)
    loop = polling.Loop(cancel, rate)
    try:
        loop.note_read(11 * MIB)
        assert not loop.may_read()
        waiting.until(lambda: rate.delay() == 0)
        began = time.monotonic()
        loop.wait(60)
        assert time.monotonic() - began < 50
        assert loop.may_read()
    finally:
        loop.close()
        cancel.close()


def test_a_connection_that_is_lost_with_the_read_that_is_sent(tmp_path: pathlib.Path) -> None:
    """libnbd closes it then and there, so another thread may have its descriptor's number by the
    time of the wait, of which nothing ever came; and a copy stood still, and the backup with it."""
    cancel = copy.Cancel()
    loop = polling.Loop(cancel)
    chunk = store.Chunk(BLOCK, target.Nowhere())
    chunk.aim([(0, BLOCK)])
    other = None
    try:
        with copies.nbdkit(tmp_path, "pattern", "1M") as server:
            connected = loop.connect(server.export)
            number = connected.fileno()
            server.process.kill()
            server.process.wait()
            connected.read(chunk, 0, BLOCK)
        other = os.eventfd(0)
        assert other == number
        with pytest.raises(virtbackup.Error, match="cannot read export 'disk' at offset 0: "):
            loop.wait(10)
    finally:
        loop.close()
        cancel.close()
        if other is not None:
            os.close(other)


@pytest.mark.parametrize("what", ["read", "ask"])
def test_a_command_to_a_connection_that_is_lost_by_then(tmp_path: pathlib.Path, what: str) -> None:
    """The first of the commands in flight tells why; libnbd calls the new one invalid."""
    cancel = copy.Cancel()
    chunk = store.Chunk(2 * BLOCK, target.Nowhere())
    chunk.aim([(0, 2 * BLOCK)])
    with contextlib.closing(cancel), contextlib.closing(polling.Loop(cancel)) as loop:
        with copies.nbdkit(tmp_path, "pattern", "1M") as server:
            connected = loop.connect(server.export)
        connected.read(chunk, 0, BLOCK)
        commands: dict[str, Callable[[], object]] = {
            "read": lambda: connected.read(chunk, BLOCK, BLOCK),
            "ask": lambda: connected.ask([connection.ALLOCATION], BLOCK, BLOCK),
        }
        with pytest.raises(virtbackup.Error, match="at offset 0: Transport endpoint is not"):
            commands[what]()


@pytest.mark.parametrize("address", ["unix", "ip"])
def test_a_server_without_a_free_descriptor(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """It would let clients wait for ever."""
    monkeypatch.setattr(polling, "PATIENCE", 0.5)
    with serve_disk(tmp_path, address) as server:
        pid = server.process.pid
        copy_one(server.export, tmp_path / "before")  # who looked for it has been accepted by now
        limit = leave_no_descriptor(pid)
        error = refused(tmp_path, server.export)
    assert str(error) == (
        f"operation failed: cannot connect to export 'disk': process {pid} accepts no connection:"
        f" it has no free file descriptor (of {limit})"
    )


@pytest.mark.parametrize("address", ["unix", "ip"])
def test_a_server_that_stands_still_is_waited_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(polling, "PATIENCE", 0.1)
    with serve_disk(tmp_path, address) as server:
        waiting.stop(server.process)
        timer = threading.Timer(1.0, server.process.send_signal, (signal.SIGCONT,))
        began = time.monotonic()
        timer.start()
        assert copy_one(server.export, tmp_path / "out").size == MIB
        assert time.monotonic() - began > 0.9
        timer.join()


def test_a_server_killed_in_the_middle(tmp_path: pathlib.Path) -> None:
    with copies.nbdkit(tmp_path, "--filter=delay", "pattern", "64M", "rdelay=10ms") as server:
        error = refused(tmp_path, server.export, copies.Watch(at_first_byte=server.process.kill))
    assert error.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
    # The second connection may have nothing in flight just then.
    assert "export 'disk' at offset " in str(error) or "cannot talk to export 'disk'" in str(error)


def test_a_server_that_is_not_there(tmp_path: pathlib.Path) -> None:
    error = refused(tmp_path, connection.Export(str(tmp_path / "none.sock"), "disk"))
    assert "cannot connect to export 'disk': No such file or directory" in str(error)


def test_an_export_that_is_not_there(tmp_path: pathlib.Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with copies.qemu_nbd(tmp_path, "-f", "raw", str(tmp_path / "disk")) as server:
        assert isinstance(server.export.server, str)
        error = refused(tmp_path, connection.Export(server.export.server, "other"))
    assert "cannot connect to export 'other'" in str(error)


@pytest.fixture
def tiny(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system with room for 1 MiB."""
    with places.small_file_system(tmp_path / "tiny", MIB) as path:
        yield path


@pytest.mark.may_skip
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_full_target(tmp_path: pathlib.Path, tiny: pathlib.Path, fmt: copy.Format) -> None:
    with (
        copies.nbdkit(tmp_path, "pattern", "8M") as server,
        pytest.raises(virtbackup.Error) as raised,
    ):
        copy_one(server.export, tiny / "out", fmt)
    assert raised.value.get_error_code() == libvirt.VIR_ERR_SYSTEM_ERROR
    assert f"cannot write {tiny}/out: No space left on device" in str(raised.value)
    assert list(tiny.iterdir()) == []


@pytest.mark.may_skip
def test_one_disk_that_fails_takes_the_others_with_it(
    tmp_path: pathlib.Path, tiny: pathlib.Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with copies.nbdkit(tmp_path, "pattern", "8M") as server:
        paths = [(out / "a", 0), (tiny / "b", 1), (out / "c", 0)]
        jobs = [copy.Job(server.export, path, FORMATS[n]) for path, n in paths]
        with pytest.raises(virtbackup.Error, match="No space left"):
            copy.copy(jobs)
    assert list(out.iterdir()) == list(tiny.iterdir()) == []


def test_a_file_that_exists_is_not_touched(tmp_path: pathlib.Path) -> None:
    (tmp_path / "out").write_text("mine")
    with copies.nbdkit(tmp_path, "pattern", "1M") as server:
        error = refused(tmp_path, server.export)
    assert f"cannot create {tmp_path}/out: File exists" in str(error)
    assert (tmp_path / "out").read_text() == "mine"


# --- cancelled ------------------------------------------------------------------------------------


def test_cancel_wakes_a_copy_that_waits(tmp_path: pathlib.Path) -> None:
    """The server does not answer for a minute; another thread cancels once the copy waits."""
    cancel = copy.Cancel()
    started = threading.Event()

    def when_started() -> None:
        started.wait()
        cancel.set()

    thread = threading.Thread(target=when_started)
    thread.start()
    with copies.nbdkit(tmp_path, "--filter=delay", "memory", "4M", "delay-extents=60") as server:
        begin = time.monotonic()
        error = refused(tmp_path, server.export, copies.Watch(at_start=started.set), cancel)
    thread.join()
    cancel.close()
    assert error.get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED
    assert time.monotonic() - begin < 50


def test_cancel_in_the_middle(tmp_path: pathlib.Path) -> None:
    cancel = copy.Cancel()
    watch = copies.Watch(at_first_byte=cancel.set)
    with copies.nbdkit(tmp_path, "pattern", "256M") as server:
        error = refused(tmp_path, server.export, watch, cancel)
    cancel.close()
    assert error.get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED
    assert 0 < watch.counts[0] < 256 * MIB


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_link_in_place_of_what_is_given_up(tmp_path: pathlib.Path, fmt: copy.Format) -> None:
    """By whoever else may write to the directory: what it leads to stays as it is."""
    path, other, cancel = tmp_path / "out", tmp_path / "other", copy.Cancel()
    other.write_bytes(b"theirs")

    def replace() -> None:
        path.unlink()
        path.symlink_to(other)
        cancel.set()

    with (
        copies.nbdkit(tmp_path, "pattern", "256M") as server,
        pytest.raises(virtbackup.Error, match="cancelled"),
    ):
        copy_one(server.export, path, fmt, copies.Watch(at_first_byte=replace), cancel)
    cancel.close()
    assert other.read_bytes() == b"theirs"
    assert not os.path.lexists(path)


def test_a_link_in_place_of_what_is_compressed(tmp_path: pathlib.Path) -> None:
    """An image that ends within a cluster is cut to its size at the end: that, no other."""
    path, other = tmp_path / "out", tmp_path / "other"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(other), "1G"], check=True)
    theirs = other.read_bytes()

    def replace() -> None:
        path.unlink()
        path.symlink_to(other)

    with copies.nbdkit(tmp_path, "pattern", "4096") as server:
        job = copy.Job(server.export, path, "qcow2", compression="zstd")
        copy.copy([job], progress=copies.Watch(at_first_byte=replace))
    assert other.read_bytes() == theirs


def test_nothing_is_left_of_a_copy(tmp_path: pathlib.Path) -> None:
    """No thread, no descriptor, good or bad."""
    gc.collect()  # what an earlier test left to it may hold descriptors
    # Some of an earlier test's may yet end.
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with copies.nbdkit(tmp_path, "pattern", "64M") as server:
        copy_one(server.export, tmp_path / "out")
        copy.checksum_of_file(tmp_path / "out", "raw")
        (tmp_path / "out").unlink()
        refused(tmp_path, connection.Export(str(tmp_path / "none.sock"), "disk"))
        refused(tmp_path, server.export, copies.Watch(at_first_byte=server.process.kill))
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors  # noqa: PTH208


_NO_PROGRAM = """
import gc, os, virtbackup
from virtbackup.nbd import connection, copy
export = connection.Export(connection.Program(("qemu-nbd", "none"), "image none"), "")
before = os.listdir("/proc/self/fd")
try:
    copy.copy([copy.Job(export, None)])
except virtbackup.Error as failure:
    print(failure)
gc.collect()
print(len(os.listdir("/proc/self/fd")) - len(before))
"""


@pytest.mark.needs("unshare", "mount")
def test_nothing_is_left_of_a_program_that_is_not_started() -> None:
    """libnbd makes a directory for its socket, always there."""
    if os.geteuid() != 0:
        pytest.skip("wants root, to mount something")
    script = 'mount -t tmpfs -o ro none /tmp && exec "$@"'
    argv = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", _NO_PROGRAM]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    text = (
        "operation failed: cannot connect to image none: Read-only file system"
        " (in /tmp, where libnbd makes its socket)"
    )
    assert done.stdout == f"{text}\n0\n"


# --- memory ---------------------------------------------------------------------------------------


_PEAK = """
import pathlib, sys
from virtbackup.nbd import connection, copy
export = connection.Export(sys.argv[1], "disk")
copy.copy([copy.Job(export, None) for _ in range(int(sys.argv[2]))])
status = pathlib.Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize(("argv", "disks"), [(("pattern", "512M"), 1), (("pattern", "32M"), 20)])
def test_memory_has_a_bound(tmp_path: pathlib.Path, argv: tuple[str, str], disks: int) -> None:
    with copies.nbdkit(tmp_path, *argv) as server:
        assert isinstance(server.export.server, str)
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, server.export.server, str(disks)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    assert int(done.stdout) < 100 << 10, "KiB"
