# SPDX-License-Identifier: LGPL-2.1-or-later
"""An empty scratch image, as bytes. Pure.

Made here and not by QEMU's blockdev-create job, which takes a third of a start's time. Source:
QEMU's docs/interop/qcow2.txt, version 3; never version 2, on which snapshot-access kills QEMU.
"""

import struct

CLUSTER = 1 << 16
"""Bytes; also what a backup job copies at least, so no write to the image is ever partial."""

MAX_SIZE = 1 << 51
"""The largest guest-visible size, bytes: QEMU takes an L1 table of at most 32 MiB."""

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
FIXED = 32
"""Bytes of the header that stay as they are made: up to the size."""
_EXTENSION = struct.Struct(">II")
_MARK = 0x7662_6D6B
"""The type of a header extension that QEMU does not know: it passes over it, and keeps it."""
_MAPPED_BY_L1_ENTRY = CLUSTER * (CLUSTER // 8)
_REFCOUNTS_IN_BLOCK = CLUSTER // 2


def empty_image(size: int, mark: str = "") -> list[tuple[int, bytes]]:
    """The (offset, bytes) to be written into an empty file; all else of it is holes.

    SIZE is the guest-visible size in bytes, up to 2 PiB (QEMU's limit for the L1 table). MARK is
    to be found in the header, for as long as there is the image.
    """
    l1_entries = -(-size // _MAPPED_BY_L1_ENTRY)
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    table, block, l1 = CLUSTER, 2 * CLUSTER, 3 * CLUSTER
    clusters = 3 + l1_clusters
    assert clusters <= _REFCOUNTS_IN_BLOCK
    header = _HEADER.pack(
        b"QFI\xfb",
        3,  # version
        0,  # backing file name: none, QEMU is told the node
        0,
        CLUSTER.bit_length() - 1,
        size,
        0,  # no encryption
        l1_entries,
        l1,
        table,
        1,  # clusters of the refcount table
        0,  # no snapshots
        0,
        0,  # no incompatible, compatible or autoclear features
        0,
        0,
        4,  # refcounts of 1 << 4 bits
        _HEADER.size,
    )
    return [
        (0, header + _extension(mark.encode())),
        (table, struct.pack(">Q", block)),
        (block, struct.pack(f">{clusters}H", *[1] * clusters)),
    ]


def _extension(mark: bytes) -> bytes:
    """A header extension that has MARK, and the end of them; nothing for none."""
    if not mark:
        return b""
    padded = mark.ljust(-(-len(mark) // 8) * 8, b"\0")
    return _EXTENSION.pack(_MARK, len(mark)) + padded + _EXTENSION.pack(0, 0)


def full_size(size: int) -> int:
    """Bytes that the file can grow to, when all of SIZE is written."""
    clusters = -(-size // CLUSTER)
    tables = -(-clusters // (CLUSTER // 8))
    used = file_size(size) // CLUSTER + clusters + tables
    # A refcount table that is outgrown is made anew elsewhere, half as large again.
    return (used + -(-used // _REFCOUNTS_IN_BLOCK) * 2 + 2) * CLUSTER


def file_size(size: int) -> int:
    """Bytes of the file that holds the empty image of SIZE."""
    l1_entries = -(-size // _MAPPED_BY_L1_ENTRY)
    return 3 * CLUSTER + -(-l1_entries * 8 // CLUSTER) * CLUSTER
