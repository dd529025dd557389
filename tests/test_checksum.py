# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checksum against its definition, whatever the order and the kind of the parts."""

import itertools
import random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from virtbackup.nbd import checksum

BLOCK = checksum.BLOCK


def defined(disk: bytes) -> str:
    """The definition in the module's words."""
    digests = [xxhash.xxh3_128_digest(disk[i : i + BLOCK]) for i in range(0, len(disk), BLOCK)]
    value: str = xxhash.xxh3_128_hexdigest(b"".join(digests))
    return value


def disk_of(pattern: list[bool], tail: int, seed: int = 1) -> bytes:
    """A block for each of PATTERN, zero where false, and a last block of TAIL bytes of data."""
    source = random.Random(seed)
    blocks = [source.randbytes(BLOCK) if data else bytes(BLOCK) for data in pattern]
    return b"".join([*blocks, source.randbytes(tail)])


@pytest.mark.parametrize(
    ("disk", "value"),
    [
        (b"", "99aa06d3014798d86001c324468d497f"),
        (b"a", "29d5ea74c083b930d18d60f8e2a50394"),
        (bytes(BLOCK + 1), "45e2bf658410a80ab0d110e87cb62db3"),
    ],
)
def test_known_values(disk: bytes, value: str) -> None:
    """Manifests live for years: the definition and the library may not drift."""
    tree = checksum.Tree(len(disk))
    if disk:
        tree.add(0, len(disk), checksum.scan(memoryview(disk))[0])
    assert tree.hexdigest() == value == defined(disk)


@given(st.lists(st.booleans(), max_size=6), st.integers(0, BLOCK - 1), st.data())
def test_any_order_and_any_cut_gives_the_definition(
    pattern: list[bool], tail: int, data: st.DataObject
) -> None:
    disk = disk_of(pattern, tail)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(pattern)), max_size=4)) | {0})
    ends = [*(cut * BLOCK for cut in cuts[1:]), len(disk)]
    parts = [(s * BLOCK, e) for s, e in zip(cuts, ends, strict=True) if e > s * BLOCK]
    tree = checksum.Tree(len(disk))
    for start, end in data.draw(st.permutations(parts)):
        part = disk[start:end]
        if part == bytes(len(part)) and data.draw(st.booleans()):
            tree.add_zeroes(start, end - start)
        else:
            tree.add(start, end - start, checksum.scan(memoryview(part))[0])
    assert tree.hexdigest() == defined(disk)


@given(st.lists(st.booleans(), max_size=8), st.integers(0, 200))
def test_scan_tells_where_data_is(pattern: list[bool], tail: int) -> None:
    disk = disk_of(pattern, tail)
    digests, runs = checksum.scan(memoryview(disk))
    assert len(digests) == 16 * -(-len(disk) // BLOCK)
    kept = bytearray(len(disk))
    for start, end in runs:
        kept[start:end] = disk[start:end]
    assert kept == disk
    assert sum(end - start for start, end in runs) == sum(pattern) * BLOCK + tail
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))


def test_a_zero_tail_is_found_too() -> None:
    assert checksum.scan(memoryview(bytes(BLOCK + 5)))[1] == []


def test_one_set_bit_is_data() -> None:
    block = bytearray(BLOCK)
    block[-1] = 1
    assert checksum.scan(memoryview(block))[1] == [(0, BLOCK)]


def test_many_zero_blocks_are_counted_exactly() -> None:
    """More than fit in one update, and a tail."""
    size = 10_000 * BLOCK + 7
    tree = checksum.Tree(size)
    tree.add_zeroes(0, size)
    digests = xxhash.xxh3_128_digest(bytes(BLOCK)) * 10_000 + xxhash.xxh3_128_digest(bytes(7))
    assert tree.hexdigest() == xxhash.xxh3_128_hexdigest(digests)


def test_a_sum_with_a_gap_is_refused() -> None:
    tree = checksum.Tree(2 * BLOCK)
    tree.add_zeroes(BLOCK, BLOCK)
    with pytest.raises(AssertionError):
        tree.hexdigest()
