# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which layer of a disk shows through, block by block the same as by the plainest reckoning."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from virtbackup.nbd import extents, view

KINDS = st.sampled_from(list(extents.Kind))


def runs(kinds: list[extents.Kind], start: int) -> list[extents.Extent]:
    """A byte for each of KINDS."""
    single = (extents.Extent(start + i, 1, kind) for i, kind in enumerate(kinds))
    return list(extents.merge(single))


@given(st.integers(0, 99), st.integers(0, 12).flatmap(
    lambda size: st.lists(st.lists(KINDS, min_size=size, max_size=size), min_size=1, max_size=5)
))  # fmt: skip
def test_owners(start: int, layers: list[list[extents.Kind]]) -> None:
    parts = view.owners([runs(kinds, start) for kinds in layers])
    seen = [part.layer for part in parts for _ in range(part.start, part.end)]
    last = len(layers) - 1
    assert seen == [
        next((i for i, kind in enumerate(column) if kind is not extents.Kind.SKIP), last)
        for column in zip(*layers, strict=True)
    ]
    assert all(a.end == b.start for a, b in itertools.pairwise(parts))
    for layer in range(len(layers)):
        ranges = view.shown(parts, layer)
        flat = [at - start for begin, end in ranges for at in range(begin, end)]
        assert flat == [i for i, owner in enumerate(seen) if owner == layer]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
        middle = start + len(seen) // 2
        assert [at for a, b in view.cut(ranges, start + 1, middle) for at in range(a, b)] == [
            at + start for at in flat if start + 1 <= at + start < middle
        ]


@given(st.lists(st.tuples(KINDS, KINDS), max_size=12))
def test_held(pairs: list[tuple[extents.Kind, extents.Kind]]) -> None:
    changes, allocation = [a for a, _ in pairs], [b for _, b in pairs]
    held = view.held(runs(changes, 0), runs(allocation, 0))
    assert [one.kind for one in held for _ in range(one.length)] == [
        a if a is extents.Kind.SKIP else b for a, b in pairs
    ]
