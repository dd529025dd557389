# SPDX-License-Identifier: LGPL-2.1-or-later
"""The layout of a qcow2 image that is too large to be written in a test."""

import libvirt
import pytest

import virtbackup
from virtbackup.nbd import qcow2

CLUSTER = qcow2.CLUSTER
REFCOUNTS = CLUSTER // 2


@pytest.mark.parametrize(
    "clusters", [1, 2, 32762, 32763, 32764, 32765, 32766, 32767, 32768, 65530, 1 << 20, 1 << 28]
)
def test_the_tables_follow_each_other_and_count_themselves(clusters: int) -> None:
    size = max(1, clusters - 1) * CLUSTER
    end = qcow2.ending(size, clusters, {})
    assert end.l1_at == clusters * CLUSTER
    assert end.refcounts_at == end.l1_at + -(-len(end.l1_table) // CLUSTER) * CLUSTER
    blocks = len(end.table) // 8
    assert blocks == -(-end.clusters // REFCOUNTS)
    assert end.table_at == end.refcounts_at + blocks * CLUSTER
    assert end.file_size == end.table_at + -(-len(end.table) // CLUSTER) * CLUSTER
    addresses = [int.from_bytes(end.table[i : i + 8], "big") for i in range(0, len(end.table), 8)]
    assert addresses == [end.refcounts_at + i * CLUSTER for i in range(blocks)]


def test_every_cluster_is_counted_once() -> None:
    end = qcow2.ending(1 << 40, 70_000, {})
    written = dict(end.refcounts())
    assert sum(map(len, written.values())) == 2 * end.clusters
    assert all(piece == b"\0\1" * (len(piece) // 2) for piece in written.values())
    assert sorted(written) == [end.refcounts_at + i * CLUSTER for i in range(len(written))]


def test_l1_entries_are_where_their_tables_cover() -> None:
    end = qcow2.ending(3 << 29, 9, {0: 4, 2: 8})
    entries = [int.from_bytes(end.l1_table[i : i + 8], "big") for i in (0, 8, 16)]
    assert entries == [1 << 63 | 4 * CLUSTER, 0, 1 << 63 | 8 * CLUSTER]


@pytest.mark.parametrize(("size", "rounded"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_a_size_is_whole_sectors(size: int, rounded: int) -> None:
    assert qcow2.virtual_size(size) == rounded


def test_a_backing_file_is_in_the_header() -> None:
    """As docs/interop/qcow2.txt has it: the extension of the format, the end of extensions, then
    the name where the header says."""
    header = qcow2.ending(1 << 30, 9, {}, qcow2.Backing("vda.0001.qcow2", "qcow2")).header
    place, length = (int.from_bytes(header[i : i + n], "big") for i, n in ((8, 8), (16, 4)))
    assert header[104:112] == bytes.fromhex("e2792aca00000005")
    assert header[112:128] == b"qcow2\0\0\0" + bytes(8)
    assert (place, length) == (128, 14)
    assert header[128:] == b"vda.0001.qcow2"


def test_without_one_the_header_is_as_it_was() -> None:
    header = qcow2.ending(1 << 30, 9, {}).header
    assert len(header) == 104
    assert header[8:20] == bytes(12)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 1024, "nbd:unix:/s", "json:{}", "a:b/c"])
def test_a_name_that_is_none_for_qemu(name: str) -> None:
    with pytest.raises(virtbackup.Error) as raised:
        qcow2.Backing(name, "raw")
    assert raised.value.get_error_code() == libvirt.VIR_ERR_INVALID_ARG


@pytest.mark.parametrize("name", ["x" * 1023, "./a:b", "a/b:c", "\u00e4.raw"])
def test_a_name_that_is_one(name: str) -> None:
    header = qcow2.ending(0, 1, {}, qcow2.Backing(name, "raw")).header
    assert header.endswith(name.encode())
    assert len(header) < CLUSTER


def test_entries() -> None:
    assert qcow2.entries(5, 2) == bytes.fromhex("8000000000050000 8000000000060000")
    assert qcow2.zeroes(2) == bytes.fromhex("0000000000000001 0000000000000001")
