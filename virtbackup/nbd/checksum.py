# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checksum of a disk: of what a guest reads, however it is stored. And that of an increment.

Definition, algorithm ``xxh3-128-tree``, block 65536: cut the disk's bytes at multiples of 65536
(the last block is as long as the disk leaves it, and absent when that is 0); take the XXH3-128
digest (seed 0, canonical big endian, 16 bytes) of every block; the checksum is the XXH3-128 of all
the digests put one behind the other in order, in hexadecimal. In Python:

    digests = [xxhash.xxh3_128_digest(disk[i : i + 65536]) for i in range(0, len(disk), 65536)]
    checksum = xxhash.xxh3_128_hexdigest(b"".join(digests))

Blocks may be hashed in any order and a block known to be zero need not be read, so how a disk was
cut into extents and requests, and what is hole or stored zeroes, does not matter.

Definition, algorithm ``xxh3-128-tree-increment``, block 65536: an increment holds some blocks of a
disk, of data or of zeroes, and leaves the others to the image behind it. As above, but every
longest run of blocks that the increment does not hold has, in place of their digests, one entry of
16 bytes: the number of the blocks, big endian. In Python, where ``held`` says it of a block:

    entries = []
    for holds, run in itertools.groupby(range(0, len(disk), 65536), held):
        if holds:
            entries += [xxhash.xxh3_128_digest(disk[i : i + 65536]) for i in run]
        else:
            entries.append(len(list(run)).to_bytes(16, "big"))
    checksum = xxhash.xxh3_128_hexdigest(b"".join(entries))

So it costs what the increment holds, not what the disk has, and is made anew from the increment's
file alone: a qcow2 file tells what it holds (allocated clusters of data and of zeroes, not those of
its backing file) and its size, if not in which place of the last sector the disk ended.

Definition, algorithm ``xxh3-128-tree-tables``, block 65536: of a qcow2 file, all that neither of
the two above has seen. It is ``xxh3-128-tree`` of the file, as long as the file is, with zeroes in
place of each byte that is a byte of the disk: those of clusters of data that are not compressed, up
to the disk's end. So header, tables, counts, compressed clusters and what nobody uses count.
"""

from collections.abc import Callable

import xxhash

ALGORITHM = "xxh3-128-tree"
INCREMENT = "xxh3-128-tree-increment"
TABLES = "xxh3-128-tree-tables"
BLOCK = 1 << 16
"""Bytes; also the grain at which zeroes are found, and qcow2 files are kept sparse."""

_ZERO = bytearray(BLOCK)
_ZERO_DIGEST: bytes = xxhash.xxh3_128_digest(_ZERO)
_MANY = 1 << 12
_ZERO_DIGESTS = memoryview(_ZERO_DIGEST * _MANY)


def scan(data: memoryview) -> tuple[bytes, list[tuple[int, int]]]:
    """The digests of the blocks of DATA, one behind the other, and where DATA is not all zero.

    The latter is (start, end) in order, cut at blocks. DATA starts at a block's border.
    """
    digests: list[bytes] = []
    runs: list[tuple[int, int]] = []
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        end = start + len(block)
        # bytearray == memoryview is memcmp and stops at the first difference.
        zero = _ZERO if end - start == BLOCK else bytearray(end - start)
        if zero == block:
            digests.append(_digest_of_zeroes(end - start))
            continue
        digests.append(xxhash.xxh3_128_digest(block))
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return b"".join(digests), runs


def _digest_of_zeroes(length: int) -> bytes:
    if length == BLOCK:
        return _ZERO_DIGEST
    digest: bytes = xxhash.xxh3_128_digest(bytes(length))
    return digest


class Tree:
    """The checksum in the making; parts may come in any order, each block once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._state = xxhash.xxh3_128()
        self._next = 0
        self._absent = 0
        """Bytes before ``_next`` that are absent and not yet in the state."""
        # What came too early: offset -> (end, what puts it into the state).
        self._early: dict[int, tuple[int, Callable[[], None]]] = {}

    @property
    def early(self) -> int:
        """Parts that wait for one before them."""
        return len(self._early)

    def add(self, offset: int, length: int, digests: bytes) -> None:
        """The DIGESTS of the blocks of LENGTH bytes at OFFSET, a multiple of a block."""
        self._put(offset, offset + length, lambda: self._update(digests))

    def add_zeroes(self, offset: int, length: int) -> None:
        """LENGTH bytes at OFFSET, a multiple of a block, read as zeroes."""
        self._put(offset, offset + length, lambda: self._update_zeroes(length))

    def add_absent(self, offset: int, length: int) -> None:
        """LENGTH bytes at OFFSET, a multiple of a block, are not held by the increment."""
        self._put(offset, offset + length, lambda: self._skip(length))

    def hexdigest(self) -> str:
        """The checksum, when every block of the disk was added."""
        assert self._next == self._size, (self._next, self._size)
        self._end_absent()
        text: str = self._state.hexdigest()
        return text

    def _put(self, offset: int, end: int, update: Callable[[], None]) -> None:
        assert offset % BLOCK == 0, offset
        assert end % BLOCK == 0 or end == self._size, end
        self._early[offset] = (end, update)
        while (part := self._early.pop(self._next, None)) is not None:
            self._next, update = part
            update()

    def _update(self, digests: bytes) -> None:
        self._end_absent()
        self._state.update(digests)

    def _update_zeroes(self, length: int) -> None:
        self._end_absent()
        blocks, rest = divmod(length, BLOCK)
        size = len(_ZERO_DIGEST)
        while blocks:
            count = min(blocks, _MANY)
            self._state.update(_ZERO_DIGESTS[: count * size])
            blocks -= count
        if rest:
            self._state.update(_digest_of_zeroes(rest))

    def _skip(self, length: int) -> None:
        self._absent += length

    def _end_absent(self) -> None:
        if self._absent:
            blocks, self._absent = -(-self._absent // BLOCK), 0
            self._state.update(blocks.to_bytes(len(_ZERO_DIGEST), "big"))
