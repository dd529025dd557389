# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images read as they lie there: the two checksums against their definitions, and what is refused.

What QEMU makes of the same files is in live/test_image.py.
"""

import os
import pathlib
import struct

import pytest
import xxhash

from tests.live import points
from virtbackup.nbd import checksum, image

BLOCK = checksum.BLOCK


def defined(content: bytes | bytearray) -> str:
    """The definition of ``checksum.ALGORITHM`` in that module's words."""
    blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    value: str = xxhash.xxh3_128_hexdigest(b"".join(map(xxhash.xxh3_128_digest, blocks)))
    return value


@pytest.fixture(params=[2 * BLOCK, 4 * BLOCK + 700, 4 * BLOCK - 1])
def backed(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> points.Backed:
    layers: list[dict[int, int | None]] = [
        {0: 1, 1: None, 2: 2, 3: 6, 4: 3},
        {0: 4, 1: None, 4: 5},
    ]
    return points.built(tmp_path / "b", request.param, layers)


def test_both_checksums_of_an_image(backed: points.Backed) -> None:
    for number, made in backed.made.items():
        [disk] = made.disks
        path = backed.directory / disk.file
        with image.File(path) as file:
            found = image.Qcow2(file, disk.size)
            assert not found.has_compressed
            assert found.read(number > 1).checksum == disk.checksum.value
            rest = bytearray(path.read_bytes())
            for run in found.runs():
                if run.kind is image.Kind.DATA:
                    rest[run.at : run.at + run.length] = bytes(run.length)
            assert found.read_tables().checksum == defined(rest)
        assert image.tables_checksum(path, disk.size) == defined(rest)


def test_data_that_nobody_uses_counts(backed: points.Backed) -> None:
    [disk] = backed.made[1].disks
    path = backed.directory / disk.file
    before = image.tables_checksum(path, disk.size)
    size = path.stat().st_size
    os.truncate(path, size + 5 * BLOCK)
    assert image.tables_checksum(path, disk.size) != before
    with path.open("r+b") as file:
        file.seek(size + 3 * BLOCK)
        file.write(b"x")
    assert image.tables_checksum(path, disk.size) != before
    os.truncate(path, size)
    assert image.tables_checksum(path, disk.size) == before


@pytest.mark.parametrize("size", [1, BLOCK, 3 * BLOCK + 5, 5 << 20])
def test_raw(size: int, tmp_path: pathlib.Path) -> None:
    """Where it has data only in places, too."""
    path = tmp_path / "raw"
    with path.open("wb") as file:
        os.truncate(path, size)
        for at in (0, BLOCK, 2 * BLOCK + 4096, 4 << 20):
            file.seek(at)
            file.write(b"data"[: max(0, size - at)])
    content = path.read_bytes()
    assert len(content) == size
    with image.File(path) as opened:
        found = image.read_raw(opened, size)
        assert found.checksum == defined(content)
        assert image.read_raw(opened, size // 2).checksum == defined(content[: size // 2])
    assert found.read <= size


def test_holes_are_not_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "raw"
    path.touch()
    os.truncate(path, 1 << 40)
    with path.open("r+b") as file:
        file.seek(1 << 39)
        file.write(b"x")
    with image.File(path) as opened:
        assert list(opened.parts(0, 1 << 40)) == [
            (0, 1 << 39, False),
            (1 << 39, (1 << 39) + BLOCK, True),
            ((1 << 39) + BLOCK, 1 << 40, False),
        ]


def header(content: bytes | bytearray) -> dict[str, int]:
    l1_at, table_at = struct.unpack_from(">QQ", content, 40)
    [l2] = struct.unpack_from(">Q", content, l1_at)
    return {"l1": l1_at, "l2": l2 & ((1 << 56) - 512), "refcounts": table_at}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({0: b"QFI"}, None),
        ({0: b"X"}, "it is not a qcow2 image"),
        ({7: b"\4"}, "it is not a qcow2 image"),
        ({23: b"\x0f"}, "its clusters of 2^15 bytes are not of a backup"),
        ({23: b"\x3f"}, "its clusters of 2^63 bytes are not of a backup"),
        ({24: bytes(8)}, "the sizes that its header tells do not fit the disk"),
        ({36: bytes(4)}, "the sizes that its header tells do not fit the disk"),
        ({36: b"\xff" * 4}, "the sizes that its header tells do not fit the disk"),
        ({35: b"\1"}, "it is encrypted, or has snapshots"),
        ({63: b"\1"}, "it is encrypted, or has snapshots"),
        ({79: b"\4"}, "its incompatible features, 0x4, are not of a backup"),
        ({79: b"\x10"}, "its incompatible features, 0x10, are not of a backup"),
        ({40: bytes(8)}, "its first table is out of place, at offset 0"),
        ({40: b"\x7f"}, "its first table is out of place, at offset "),
        ({"l1": b"\x80\x7f"}, "one of its tables is out of place"),
        ({"l1": struct.pack(">Q", 1 << 63 | BLOCK - 512)}, "one of its tables is out of place"),
        ({"l2": struct.pack(">Q", 1 << 63 | BLOCK + 512)}, "offset 0 of the disk is out of place"),
    ],
)
def test_what_is_refused(
    tmp_path: pathlib.Path, change: dict[int | str, bytes], reason: str | None
) -> None:
    backed = points.built(tmp_path / "b", 4 * BLOCK, [{0: 1, 2: 2}])
    path = backed.directory / "vda.0001.qcow2"
    content = bytearray(path.read_bytes())
    places = header(content)
    for at, value in change.items():
        start = places[at] if isinstance(at, str) else at
        content[start : start + len(value)] = value
    path.write_bytes(content)
    if reason is None:
        image.tables_checksum(path, 4 * BLOCK)
        return
    with pytest.raises(image.Damaged) as raised:
        image.tables_checksum(path, 4 * BLOCK)
    assert reason in str(raised.value)


@pytest.mark.parametrize("place", ["header", "l1", "l2"])
def test_a_cluster_of_two_uses_is_refused(tmp_path: pathlib.Path, place: str) -> None:
    """Else data of the disk could hide a table from the checksum of the tables."""
    backed = points.built(tmp_path / "b", 4 * BLOCK, [{0: 1, 2: 2}])
    path = backed.directory / "vda.0001.qcow2"
    content = bytearray(path.read_bytes())
    places = header(content)
    entry = struct.pack(">Q", 1 << 63 | places.get(place, 0))
    if place == "header":
        entry = struct.pack(">Q", 1 << 63 | struct.unpack_from(">Q", content, places["l2"])[0])
    start = places["l2"] + 8  # of the disk's second cluster
    content[start : start + 8] = entry
    path.write_bytes(content)
    with pytest.raises(image.Damaged, match="has two uses"):
        image.tables_checksum(path, 4 * BLOCK)


@pytest.mark.parametrize("length", [0, 71, 72, 103])
def test_a_file_shorter_than_a_header(tmp_path: pathlib.Path, length: int) -> None:
    backed = points.built(tmp_path / "b", BLOCK, [{0: 1}])
    path = backed.directory / "vda.0001.qcow2"
    os.truncate(path, length)
    with pytest.raises(image.Damaged):
        image.tables_checksum(path, BLOCK)
