# SPDX-License-Identifier: LGPL-2.1-or-later
"""Increments of real disks: QEMU's storage daemon tells what has changed, qemu-img reads the chain.

A test's disk is a qcow2 image with persistent bitmaps; what it has to be is what nbdcopy reads.
"""

import contextlib
import itertools
import json
import pathlib
import random
import subprocess
from collections.abc import Iterator
from typing import Any

import libvirt
import nbd
import pytest

import virtbackup
from tests.live import copies, machines, nbdclient
from virtbackup.nbd import checksum, connection, copy, writer

pytestmark = [
    pytest.mark.needs(
        "qemu-storage-daemon", "qemu-nbd", "qemu-img", "qemu-io", "nbdcopy", "nbdkit"
    ),
    pytest.mark.timeout(180),
]

BLOCK = checksum.BLOCK
KIB = 1 << 10
MIB = 1 << 20
SIZE = 20 * MIB + 37 * 512


class Disk:
    """A disk in a storage daemon: written through one export, copied from others."""

    def __init__(self, directory: pathlib.Path, size: int, daemon: machines.Machine) -> None:
        self.size = size
        self.daemon = daemon
        self._socket = directory / "nbd.sock"
        image = machines.image(directory / "disk.qcow2", size, "qcow2")
        self._exports = 0
        daemon.probe(
            "blockdev-add", node_name="disk", driver="qcow2", discard="unmap",
            file={"driver": "file", "filename": str(image)},
        )  # fmt: skip
        self.serve()
        self._client = nbd.NBD()
        self._client.set_export_name(self.export(writable=True).name)
        self._client.connect_unix(str(self._socket))

    def serve(self, **options: object) -> None:
        address = {"type": "unix", "data": {"path": str(self._socket)}}
        self.daemon.probe("nbd-server-start", addr=address, **options)

    def export(self, **options: object) -> connection.Export:
        """A new export, read-only unless OPTIONS say else."""
        name = f"e{self._exports}"
        self._exports += 1
        self.daemon.probe(
            "block-export-add", id=name, type="nbd", node_name="disk", name=name, **options
        )  # fmt: skip
        return connection.Export(str(self._socket), name)

    def begin(self, name: str, granularity: int) -> None:
        """From now on changes are recorded in a bitmap of that name."""
        self.daemon.probe(
            "block-dirty-bitmap-add", node="disk", name=name, granularity=granularity,
            persistent=True,
        )  # fmt: skip

    def end(self, name: str) -> connection.Export:
        """No more are; an export that tells them."""
        self.daemon.probe("block-dirty-bitmap-disable", node="disk", name=name)
        return self.export(bitmaps=[name])

    def write(self, offset: int, data: bytes) -> None:
        self._client.pwrite(data, offset)

    def zero(self, offset: int, length: int) -> None:
        self._client.zero(length, offset)

    def discard(self, offset: int, length: int) -> None:
        self._client.trim(length, offset)

    def close(self) -> None:
        """Its writer leaves."""
        self._client.shutdown()

    def contents(self) -> bytes:
        return nbdclient.read(self._socket, self.export().name)


@contextlib.contextmanager
def disk_of(directory: pathlib.Path, size: int = SIZE) -> Iterator[Disk]:
    with machines.storage_daemon(directory) as daemon:
        disk = Disk(directory, size, daemon)
        try:
            yield disk
        finally:
            with contextlib.suppress(nbd.Error):
                disk.close()


def context(name: str) -> str:
    return f"qemu:dirty-bitmap:{name}"


def full(disk: Disk, path: pathlib.Path, fmt: copy.Format = "qcow2") -> copy.Result:
    return copy.copy([copy.Job(disk.export(), path, fmt)])[0]


def increment(
    export: connection.Export,
    path: pathlib.Path,
    backing: copy.Backing,
    name: str = "b",
    progress: copy.Progress | None = None,
) -> copy.Result:
    job = copy.Job(export, path, "qcow2", dirty=context(name), backing=backing)
    return copy.copy([job], progress=progress)[0]


def fill(disk: Disk, source: random.Random) -> None:
    """Data in most of the disk, holes between."""
    for offset in range(0, disk.size, MIB):
        length = source.randrange(1, 9) * 100 * KIB
        disk.write(offset, source.randbytes(min(length, disk.size - offset)))


def change(disk: Disk, source: random.Random) -> None:
    """Data, stored zeroes, zeroes and discards at sectors, the disk's last one among them."""
    kinds = ("write", "write zeroes", "zero", "discard")
    for kind in source.sample(kinds * 3, 12):
        length = source.choice((1, 3, 100, 128, 129, 1000)) * 512
        offset = source.randrange(0, disk.size - length) & ~511
        change_one(disk, kind, offset, length, source)
    change_one(disk, source.choice(kinds[1:]), disk.size - 512, 512, source)


def change_one(disk: Disk, kind: str, offset: int, length: int, source: random.Random) -> None:
    match kind:
        case "write":
            disk.write(offset, source.randbytes(length))
        case "write zeroes":
            disk.write(offset, bytes(length))
        case "zero":
            disk.zero(offset, length)
        case "discard":
            disk.discard(offset, length)


def dirty_grains(export: connection.Export, name: str) -> set[int]:
    """The blocks of which the server says that any byte has changed."""
    assert isinstance(export.server, str)
    client = nbd.NBD()
    client.set_export_name(export.name)
    client.add_meta_context(context(name))
    client.connect_unix(export.server)
    found: list[int] = []

    def extent(_context: str, _offset: int, entries: list[int], _error: object) -> int:
        found.extend(entries)
        return 0

    client.block_status(client.get_size(), 0, extent)
    size = client.get_size()
    client.shutdown()
    assert sum(found[::2]) == size
    grains: set[int] = set()
    offset = 0
    for length, flags in zip(found[::2], found[1::2], strict=True):
        if flags & 1:
            grains |= set(range(offset // BLOCK, -(-(offset + length) // BLOCK)))
        offset += length
    return grains


def held(path: pathlib.Path) -> list[dict[str, Any]]:
    """What of the chain is the image's own, as qemu-img says."""
    argv = ["qemu-img", "map", "--output=json", "-f", "qcow2", str(path)]
    done = subprocess.run(argv, check=True, capture_output=True)
    return [extent for extent in json.loads(done.stdout) if extent["depth"] == 0]


def blocks_of(extents: list[dict[str, Any]]) -> set[int]:
    return {
        block
        for extent in extents
        for block in range(
            extent["start"] // BLOCK, -(-(extent["start"] + extent["length"]) // BLOCK)
        )
    }


def info(path: pathlib.Path) -> dict[str, Any]:
    argv = ["qemu-img", "info", "--output=json", str(path)]
    said: dict[str, Any] = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    return said


def assert_increment(
    path: pathlib.Path, disk: bytes, grains: set[int], result: copy.Result
) -> None:
    """The chain reads as DISK, PATH holds GRAINS of it and nothing else, RESULT says so."""
    assert copies.image_bytes(path, "qcow2") == disk
    assert blocks_of(held(path)) == grains
    assert result.size == len(disk)
    assert result.changed == sum(min(BLOCK, len(disk) - grain * BLOCK) for grain in grains)
    assert result.read <= result.changed
    assert result.algorithm == checksum.INCREMENT
    assert result.checksum == copies.defined_checksum(disk, grains)
    assert copy.checksum_of_increment(path, len(disk)) == result.checksum
    assert result.stored == path.stat().st_blocks * 512


# --- a chain reads as the disk --------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [512, 4 * KIB, 64 * KIB, MIB, 2 << 30])
def test_a_chain_is_the_disk(tmp_path: pathlib.Path, granularity: int) -> None:
    """A full copy and two increments; the checksum of each is right after the next was made."""
    source = random.Random(granularity)
    with disk_of(tmp_path) as disk:
        fill(disk, source)
        behind = "full.qcow2"
        made = full(disk, tmp_path / behind)
        assert (made.changed, made.algorithm) == (SIZE, checksum.ALGORITHM)
        sums = {}
        for name in ("one", "two"):
            disk.begin(name, granularity)
            change(disk, source)
            export = disk.end(name)
            path = tmp_path / f"{name}.qcow2"
            result = increment(export, path, copy.Backing(behind, "qcow2"), name)
            grains = dirty_grains(export, name)
            assert grains
            assert_increment(path, disk.contents(), grains, result)
            said = info(path)
            assert (said["backing-filename"], said["backing-filename-format"]) == (behind, "qcow2")
            sums[path], behind = result.checksum, path.name
        for path, value in sums.items():
            assert copy.checksum_of_increment(path, SIZE) == value


@pytest.mark.parametrize("size", [512, BLOCK - 512, BLOCK, BLOCK + 512, 3 * BLOCK + 1024])
def test_small_disks_on_a_raw_copy(tmp_path: pathlib.Path, size: int) -> None:
    """The last sector changes from data to zeroes, then to data."""
    with disk_of(tmp_path, size) as disk:
        disk.write(0, random.Random(size).randbytes(size))
        full(disk, tmp_path / "full.raw", "raw")
        behind = copy.Backing("full.raw", "raw")
        for name, data in (("one", bytes(512)), ("two", b"\5" * 512)):
            disk.begin(name, 512)
            disk.write(size - 512, data)
            export = disk.end(name)
            result = increment(export, tmp_path / name, behind, name)
            assert_increment(tmp_path / name, disk.contents(), {(size - 1) // BLOCK}, result)
            behind = copy.Backing(name, "qcow2")


def test_nothing_has_changed(tmp_path: pathlib.Path) -> None:
    with disk_of(tmp_path) as disk:
        fill(disk, random.Random(3))
        full(disk, tmp_path / "full.qcow2")
        disk.begin("b", 64 * KIB)
        path = tmp_path / "out"
        result = increment(disk.end("b"), path, copy.Backing("full.qcow2", "qcow2"))
        assert (result.changed, result.read) == (0, 0)
        assert_increment(path, disk.contents(), set(), result)


def test_everything_has_changed(tmp_path: pathlib.Path) -> None:
    """The checksum is that of the disk, under another name."""
    with disk_of(tmp_path) as disk:
        full(disk, tmp_path / "full.qcow2")
        disk.begin("b", 64 * KIB)
        for offset in range(0, SIZE, BLOCK):
            disk.write(offset, random.Random(offset).randbytes(min(BLOCK, SIZE - offset)))
        path = tmp_path / "out"
        result = increment(disk.end("b"), path, copy.Backing("full.qcow2", "qcow2"))
        assert_increment(path, disk.contents(), set(range(-(-SIZE // BLOCK))), result)
        assert result.checksum == copy.copy([copy.Job(disk.export(), None)])[0].checksum


# --- zeroes hide what is behind them --------------------------------------------------------------


@pytest.mark.parametrize("how", ["zero", "discard", "write"])
@pytest.mark.parametrize("length", [3 * BLOCK, 10 * MIB])
def test_zeroes_hide_data(tmp_path: pathlib.Path, how: str, length: int) -> None:
    """Told to be zero where the server is asked, found to be zero where it is not."""
    with disk_of(tmp_path) as disk:
        disk.write(0, random.Random(7).randbytes(SIZE))
        full(disk, tmp_path / "full.qcow2")
        disk.begin("b", 64 * KIB)
        offset = 5 * BLOCK
        if how == "write":
            disk.write(offset, bytes(length))
        else:
            getattr(disk, how)(offset, length)
        path = tmp_path / "out"
        result = increment(disk.end("b"), path, copy.Backing("full.qcow2", "qcow2"))
        contents = disk.contents()
        assert not any(contents[offset : offset + length])
        grains = set(range(5, 5 + length // BLOCK))
        assert_increment(path, contents, grains, result)
        assert all(extent["zero"] and not extent["data"] for extent in held(path))
        asked = how != "write" and length >= 4 * MIB
        assert result.read == (0 if asked else length)
        assert result.stored < 8 * BLOCK


def test_a_change_of_data_and_zeroes_that_is_asked_about(tmp_path: pathlib.Path) -> None:
    """A long change of which the server says where zeroes are, borders within blocks."""
    with disk_of(tmp_path) as disk:
        disk.write(0, random.Random(8).randbytes(SIZE))
        full(disk, tmp_path / "full.qcow2")
        disk.begin("b", 64 * KIB)
        disk.zero(MIB, 16 * MIB)
        for offset in range(2 * MIB + 512, 16 * MIB, MIB + 4096):
            disk.write(offset, random.Random(offset).randbytes(100 * KIB))
        export = disk.end("b")
        path = tmp_path / "out"
        result = increment(export, path, copy.Backing("full.qcow2", "qcow2"))
        assert_increment(path, disk.contents(), dirty_grains(export, "b"), result)
        assert 13 * 100 * KIB <= result.read <= 13 * 4 * BLOCK


def test_a_server_for_one_client_is_not_asked_about_zeroes(tmp_path: pathlib.Path) -> None:
    """A second connection would be another's disk, for all it says: all changes are read."""
    with disk_of(tmp_path) as disk:
        disk.write(0, random.Random(9).randbytes(SIZE))
        full(disk, tmp_path / "full.qcow2")
        disk.begin("b", 64 * KIB)
        disk.zero(0, 8 * MIB)
        disk.close()
        disk.daemon.probe("block-dirty-bitmap-disable", node="disk", name="b")
        disk.daemon.probe("nbd-server-stop")
        disk.serve(max_connections=1)
        export = disk.export(bitmaps=["b"], writable=True)
        path = tmp_path / "out"
        result = increment(export, path, copy.Backing("full.qcow2", "qcow2"))
        assert result.read == result.changed == 8 * MIB
        contents = copies.image_bytes(tmp_path / "full.qcow2", "qcow2")
        expected = bytes(8 * MIB) + contents[8 * MIB :]
        assert_increment(path, expected, set(range(8 * MIB // BLOCK)), result)


# --- what it costs --------------------------------------------------------------------------------


def test_a_large_disk_costs_what_has_changed(tmp_path: pathlib.Path) -> None:
    """64 blocks all over 256 GiB, each in an L2 table of its own."""
    size = 256 << 30
    with disk_of(tmp_path, size) as disk:
        disk.begin("b", 64 * KIB)
        offsets = range(3 * BLOCK, size, size // 64)
        for offset in offsets:
            disk.write(offset, random.Random(offset).randbytes(BLOCK))
        path = tmp_path / "out"
        machines.image(tmp_path / "full.qcow2", size, "qcow2")
        result = increment(disk.end("b"), path, copy.Backing("full.qcow2", "qcow2"))
        assert result.changed == result.read == 64 * BLOCK
        assert result.stored <= 64 * 2 * BLOCK + 8 * BLOCK
        assert blocks_of(held(path)) == {offset // BLOCK for offset in offsets}
        assert copy.checksum_of_increment(path, size) == result.checksum
        subprocess.run(["qemu-img", "check", "-q", path], check=True)


def test_data_and_zeroes_in_any_order(tmp_path: pathlib.Path) -> None:
    """The zeroes are more than one command has, and hide what is behind."""
    size, step, source = 1 << 32, 700 * BLOCK, random.Random(5)
    places = [place * step for place in range(50)]
    made = writer.QemuWriter(tmp_path / "out", size, copy.Backing("behind.qcow2", "qcow2"))
    made.begin()
    todo = [*itertools.product(places, (False, True))]
    for place, zeroes in source.sample(todo, len(todo)):
        if zeroes:
            made.write_zeroes(place + BLOCK, 600 * BLOCK)
        else:
            made.write(place, memoryview(bytes([place // step]) * BLOCK))
    made.finish()
    behind = machines.image(tmp_path / "behind.qcow2", size, "qcow2")
    written = [f"write -P 255 {place} 1M" for place in places]
    expected = machines.image(tmp_path / "expected.qcow2", size, "qcow2")
    wanted = [f"write -P {place // step} {place} 64k" for place in places]
    for path, commands in ((behind, written), (expected, wanted)):
        qemu_io(path, *commands)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", tmp_path / "out"], check=True)
    subprocess.run(["qemu-img", "compare", "-q", expected, tmp_path / "out"], check=True)
    assert blocks_of(held(tmp_path / "out")) == {
        block for place in places for block in range(place // BLOCK, place // BLOCK + 601)
    }


def qemu_io(path: pathlib.Path, *commands: str) -> None:
    options = [option for command in commands for option in ("-c", command)]
    argv = ["qemu-io", "-f", "qcow2", *options, str(path)]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


# --- read alone -----------------------------------------------------------------------------------


def test_an_increment_that_is_only_read(tmp_path: pathlib.Path) -> None:
    with disk_of(tmp_path) as disk:
        fill(disk, random.Random(4))
        disk.begin("b", 64 * KIB)
        change(disk, random.Random(5))
        export = disk.end("b")
        wanted = increment(export, tmp_path / "out", copy.Backing("none.raw", "raw"))
        (result,) = copy.copy([copy.Job(export, None, dirty=context("b"))])
        assert (result.checksum, result.changed) == (wanted.checksum, wanted.changed)
        assert result.stored == 0


def test_the_checksum_notes_every_change_of_the_file(tmp_path: pathlib.Path) -> None:
    """Another byte; zeroes in place of data; a block that is not held any more."""
    with disk_of(tmp_path) as disk:
        disk.begin("b", 64 * KIB)
        disk.write(3 * BLOCK, random.Random(6).randbytes(4 * BLOCK))
        disk.zero(9 * BLOCK, BLOCK)
        export = disk.end("b")
        path = tmp_path / "out"
        machines.image(tmp_path / "full.raw", SIZE)
        result = increment(export, path, copy.Backing("full.raw", "raw"))
    kept, sums = path.read_bytes(), {result.checksum}
    for command in (
        "write -P 5 262144 1",
        "write -z 262144 64k",
        "write -z 0 64k",
        "write 640k 64k",
    ):
        path.write_bytes(kept)
        qemu_io(path, command)
        sums.add(copy.checksum_of_increment(path, SIZE))
    assert len(sums) == 5


def test_the_backing_file_may_be_gone(tmp_path: pathlib.Path) -> None:
    with disk_of(tmp_path) as disk:
        disk.begin("b", 64 * KIB)
        disk.write(BLOCK, b"\1" * 512)
        path = tmp_path / "a,b=c: d.qcow2"
        result = increment(disk.end("b"), path, copy.Backing("gone.qcow2", "qcow2"))
    assert copy.checksum_of_increment(path) == result.checksum


# --- what goes wrong is said ----------------------------------------------------------------------


def test_a_bitmap_that_is_not_exported(tmp_path: pathlib.Path) -> None:
    with disk_of(tmp_path) as disk:
        disk.begin("b", 64 * KIB)
        export = disk.end("b")
        with pytest.raises(virtbackup.Error) as raised:
            increment(export, tmp_path / "out", copy.Backing("full.raw", "raw"), "other")
    assert raised.value.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
    assert (
        f"cannot read changes of export '{export.name}':"
        " it has no context qemu:dirty-bitmap:other" in str(raised.value)
    )
    assert not (tmp_path / "out").exists()


def test_a_server_that_knows_no_contexts(tmp_path: pathlib.Path) -> None:
    with (
        copies.nbdkit(tmp_path, "--no-sr", "memory", "4M") as server,
        pytest.raises(virtbackup.Error, match="it has no context qemu:dirty-bitmap:b"),
    ):
        increment(server.export, tmp_path / "out", copy.Backing("full.raw", "raw"))
    assert not (tmp_path / "out").exists()


def test_a_server_killed_in_the_middle(tmp_path: pathlib.Path) -> None:
    with disk_of(tmp_path, 256 * MIB) as disk:
        disk.begin("b", 64 * KIB)
        for offset in range(0, disk.size, 16 * MIB):
            disk.write(offset, random.Random(offset).randbytes(8 * MIB))
        export = disk.end("b")
        watch = copies.Watch(at_first_byte=disk.daemon.kill)
        with pytest.raises(virtbackup.Error) as raised:
            increment(export, tmp_path / "out", copy.Backing("full.raw", "raw"), progress=watch)
    assert raised.value.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
    # At an offset, where something was in flight on the connection that noticed first.
    assert f"export '{export.name}'" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_what_is_asked_for_wrongly(tmp_path: pathlib.Path) -> None:
    export = connection.Export(str(tmp_path / "none.sock"), "disk")
    backing = copy.Backing("full.raw", "raw")
    for job in (
        copy.Job(export, tmp_path / "out", "raw", dirty="c", backing=backing),
        copy.Job(export, tmp_path / "out", "qcow2", dirty="c"),
        copy.Job(export, tmp_path / "out", "qcow2", backing=backing),
    ):
        with pytest.raises(AssertionError):
            copy.copy([job])
