# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bytes of a qcow2 image that is written once, from front to back. Pure.

Made here because a copy through a qemu-nbd process costs each byte a second socket. Source: QEMU's
docs/interop/qcow2.txt, version 3. The layout is the plainest: clusters of 64 KiB, each used once,
all of them counted; a guest cluster without an entry is the backing file's, or reads as zeroes.
"""

import dataclasses
import struct
from collections.abc import Iterator
from typing import Literal

from virtbackup import errors

CLUSTER = 1 << 16
ENTRIES = CLUSTER // 8
"""Entries of an L2 table."""
ENTRY = 8
"""Bytes of an entry."""
PAGE = 1 << 12
PAGE_ENTRIES = PAGE // ENTRY
"""L2 tables are written in pages of so many entries, and a hole does for an empty one: whole tables
of a large disk on which little has changed would be as much as the changes."""
SECTOR = 512
"""The virtual size is a multiple of it."""

_COPIED = 1 << 63
_ZEROES = struct.pack(">Q", 1)
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
_MOST_NAME = 1023
_REFCOUNTS = CLUSTER // 2


@dataclasses.dataclass(frozen=True)
class Backing:
    """The image behind an image, by its name as it stands in the file.

    That is a path from the directory of the image on. Errors: VIR_ERR_INVALID_ARG for what QEMU
    would refuse or take for something else than a file.
    """

    file: str
    format: Literal["qcow2", "raw"]

    def __post_init__(self) -> None:
        if not 0 < len(self.file.encode()) <= _MOST_NAME or "\0" in self.file:
            raise _bad_name(f"'{self.file}' cannot be the name of a backing file")
        if ":" in self.file.partition("/")[0]:
            raise _bad_name(f"QEMU takes '{self.file}' for a protocol, not for a file's name")


def _bad_name(text: str) -> errors.Error:
    return errors.invalid_arg("backupPull", "backing", text)


def virtual_size(size: int) -> int:
    """SIZE rounded up to what an image can have."""
    return -(-size // SECTOR) * SECTOR


def entry(cluster: int) -> int:
    """The L1 or L2 entry that points to the host cluster of that number, used once."""
    return cluster * CLUSTER | _COPIED


def entries(first: int, count: int) -> bytes:
    """The L2 entries of COUNT guest clusters that are in the host clusters from FIRST on."""
    return struct.pack(f">{count}Q", *map(entry, range(first, first + count)))


def zeroes(count: int) -> bytes:
    """The L2 entries of COUNT guest clusters of zeroes that have no place in the file."""
    return _ZEROES * count


@dataclasses.dataclass(frozen=True)
class Ending:
    """What closes an image: tables behind the clusters, then the header at 0."""

    l1_at: int
    l1_table: bytes
    refcounts_at: int
    clusters: int
    """All of the file's, so many refcounts, each of them 1: ``refcounts()``."""
    table_at: int
    table: bytes
    header: bytes

    @property
    def file_size(self) -> int:
        return self.clusters * CLUSTER

    def refcounts(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes), a cluster at a time: a large image has more than fits in memory."""
        for first in range(0, self.clusters, _REFCOUNTS):
            count = min(_REFCOUNTS, self.clusters - first)
            yield self.refcounts_at + first * 2, struct.pack(">H", 1) * count


def ending(size: int, clusters: int, l1: dict[int, int], backing: Backing | None = None) -> Ending:
    """Close an image of SIZE bytes whose file has CLUSTERS clusters so far, the header's included.

    L1 maps the index of each L2 table to its host cluster.
    """
    size = virtual_size(size)
    l1_size = max(1, -(-size // (CLUSTER * ENTRIES)))
    l1_at = clusters
    blocks_at = l1_at + _clusters(l1_size * 8)
    blocks, table = _refcounts(blocks_at)
    table_at = blocks_at + blocks
    addresses = [(blocks_at + i) * CLUSTER for i in range(blocks)]
    return Ending(
        l1_at=l1_at * CLUSTER,
        l1_table=struct.pack(f">{l1_size}Q", *(_l1_entry(l1, i) for i in range(l1_size))),
        refcounts_at=blocks_at * CLUSTER,
        clusters=table_at + table,
        table_at=table_at * CLUSTER,
        table=struct.pack(f">{blocks}Q", *addresses),
        header=_header(size, l1_size, l1_at, table_at, table, backing),
    )


def _l1_entry(l1: dict[int, int], index: int) -> int:
    return entry(l1[index]) if index in l1 else 0


def _clusters(size: int) -> int:
    return -(-size // CLUSTER)


def _refcounts(clusters: int) -> tuple[int, int]:
    """The clusters of refcounts, and of their table, that count CLUSTERS and themselves."""
    blocks = table = 0
    while True:
        needed = -(-(clusters + blocks + table) // _REFCOUNTS)
        if needed == blocks:
            return blocks, table
        blocks, table = needed, _clusters(needed * 8)


def _header(
    size: int, l1_size: int, l1_at: int, table_at: int, table: int, backing: Backing | None
) -> bytes:
    extensions = _extensions(backing)
    name = backing.file.encode() if backing else b""
    fixed = _HEADER.pack(
        b"QFI\xfb",
        3,  # version
        _HEADER.size + len(extensions) if backing else 0,
        len(name),
        CLUSTER.bit_length() - 1,
        size,
        0,  # no encryption
        l1_size,
        l1_at * CLUSTER,
        table_at * CLUSTER,
        table,
        0,  # no snapshots
        0,
        0,  # no incompatible, compatible or autoclear features
        0,
        0,
        4,  # refcounts of 1 << 4 bits
        _HEADER.size,
    )
    return fixed + extensions + name


def _extensions(backing: Backing | None) -> bytes:
    """The header extensions and what ends them; without any, the zeroes behind the header do."""
    if backing is None:
        return b""
    fmt = backing.format.encode()
    padded = fmt.ljust(-(-len(fmt) // 8) * 8, b"\0")
    return _EXTENSION.pack(_BACKING_FORMAT, len(fmt)) + padded + _EXTENSION.pack(0, 0)
