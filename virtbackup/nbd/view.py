# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a disk shows that is made of layers: of every range, which layer has it. Pure.

A layer's extents are of kind SKIP where it leaves the range to the layers behind it. All lists are
adjoining, in order, and cover the same range.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from virtbackup.nbd import extents


def together(
    one: Iterable[extents.Extent], other: Iterable[extents.Extent]
) -> Iterator[tuple[int, int, extents.Kind, extents.Kind]]:
    """(start, end, kind in ONE, kind in OTHER), cut where either of them is."""
    mine, theirs = iter(one), iter(other)
    a, b = next(mine, None), next(theirs, None)
    start = a.offset if a is not None else 0
    while a is not None and b is not None:
        end = min(a.end, b.end)
        yield start, end, a.kind, b.kind
        a = next(mine, None) if a.end == end else a
        b = next(theirs, None) if b.end == end else b
        start = end


def held(
    changes: Iterable[extents.Extent], allocation: Iterable[extents.Extent]
) -> list[extents.Extent]:
    """What an increment holds: of what CHANGES tells to be held, how it is allocated; else SKIP."""
    cut = (
        extents.Extent(start, end - start, change if change is extents.Kind.SKIP else kind)
        for start, end, change, kind in together(changes, allocation)
    )
    return list(extents.merge(cut))


@dataclasses.dataclass(frozen=True)
class Part:
    """From START to END LAYER has what is shown, all of it of one KIND."""

    start: int
    end: int
    layer: int
    kind: extents.Kind


def owners(layers: Sequence[Sequence[extents.Extent]]) -> list[Part]:
    """Which of LAYERS, the uppermost first, shows through; the last one has everything."""
    last = len(layers) - 1
    top = [Part(extent.offset, extent.end, last, extent.kind) for extent in layers[-1]]
    for index in reversed(range(last)):
        top = list(_over(layers[index], index, top))
    return top


def _over(layer: Sequence[extents.Extent], index: int, below: Sequence[Part]) -> Iterator[Part]:
    parts = iter(below)
    part = next(parts, None)
    for extent in layer:
        if extent.kind is not extents.Kind.SKIP:
            yield Part(extent.offset, extent.end, index, extent.kind)
        while part is not None and part.start < extent.end:
            if extent.kind is extents.Kind.SKIP:
                start, end = max(part.start, extent.offset), min(part.end, extent.end)
                yield Part(start, end, part.layer, part.kind)
            if part.end > extent.end:
                break
            part = next(parts, None)


def shown(parts: Sequence[Part], layer: int) -> list[tuple[int, int]]:
    """(start, end) of what LAYER has of PARTS, neighbours as one."""
    found: list[tuple[int, int]] = []
    for part in parts:
        if part.layer != layer:
            continue
        if found and found[-1][1] == part.start:
            found[-1] = (found[-1][0], part.end)
        else:
            found.append((part.start, part.end))
    return found


def cut(ranges: Sequence[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What of RANGES lies between START and END."""
    return [(max(a, start), min(b, end)) for a, b in ranges if a < end and b > start]
