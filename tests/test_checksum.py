# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checksum against its definition, whatever the order and the kind of the parts."""

import itertools
import random
from collections.abc import Sequence

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


def defined_increment(disk: bytes, held: Sequence[bool]) -> str:
    """The definition in the module's words; HELD says it of each block."""
    entries = []
    blocks = range(0, len(disk), BLOCK)
    for holds, run in itertools.groupby(blocks, lambda i: held[i // BLOCK]):
        if holds:
            entries += [xxhash.xxh3_128_digest(disk[i : i + BLOCK]) for i in run]
        else:
            entries.append(len(list(run)).to_bytes(16, "big"))
    value: str = xxhash.xxh3_128_hexdigest(b"".join(entries))
    return value


@given(st.lists(st.sampled_from([None, False, True]), max_size=9), st.booleans(), st.data())
def test_an_increment_in_any_order_and_cut_gives_the_definition(
    pattern: list[bool | None], tail: bool, data: st.DataObject
) -> None:
    """None is a block that is not held; a tail is a last block of 100 bytes, held or not."""
    disk = disk_of([bool(block) for block in pattern], 100 if tail else 0)
    held = [block is not None for block in pattern] + [data.draw(st.booleans())] * tail
    parts = []
    for holds, run in itertools.groupby(range(len(held)), held.__getitem__):
        blocks = list(run)
        cut = data.draw(st.integers(0, len(blocks)))
        parts += [(holds, part) for part in (blocks[:cut], blocks[cut:]) if part]
    tree = checksum.Tree(len(disk))
    for holds, part in data.draw(st.permutations(parts)):
        start, end = part[0] * BLOCK, min(len(disk), (part[-1] + 1) * BLOCK)
        if not holds:
            tree.add_absent(start, end - start)
        elif disk[start:end] == bytes(end - start):
            tree.add_zeroes(start, end - start)
        else:
            tree.add(start, end - start, checksum.scan(memoryview(disk[start:end]))[0])
    assert tree.hexdigest() == defined_increment(disk, held)
    assert tree.early == 0


def test_known_values_of_increments() -> None:
    tree = checksum.Tree(5 * BLOCK + 1)
    tree.add_absent(0, 2 * BLOCK)
    tree.add_zeroes(2 * BLOCK, BLOCK)
    tree.add_absent(3 * BLOCK, 2 * BLOCK + 1)
    zero = xxhash.xxh3_128_digest(bytes(BLOCK))
    defined = bytes(15) + b"\2" + zero + bytes(15) + b"\3"
    assert (
        tree.hexdigest() == xxhash.xxh3_128_hexdigest(defined) == "4210b305c048effb84eecd73aa881204"
    )


def test_what_an_increment_holds_matters() -> None:
    """Two with the same digests in other places, and zeroes against nothing."""
    sums = set()
    for pattern in itertools.product((False, True), repeat=4):
        tree = checksum.Tree(4 * BLOCK)
        for block, held in enumerate(pattern):
            (tree.add_zeroes if held else tree.add_absent)(block * BLOCK, BLOCK)
        sums.add(tree.hexdigest())
    assert len(sums) == 16


def test_parts_that_came_early_are_counted() -> None:
    tree = checksum.Tree(3 * BLOCK)
    tree.add_absent(2 * BLOCK, BLOCK)
    tree.add_zeroes(BLOCK, BLOCK)
    assert tree.early == 2
    tree.add_absent(0, BLOCK)
    assert tree.early == 0


def test_a_sum_with_a_gap_is_refused() -> None:
    tree = checksum.Tree(2 * BLOCK)
    tree.add_zeroes(BLOCK, BLOCK)
    with pytest.raises(AssertionError):
        tree.hexdigest()
