# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where an export has data, or has changed, from what the server says of it. Pure.

A server answers a block status request with a flat array of (length, flags) pairs; the NBD
protocol document, NBD_REPLY_TYPE_BLOCK_STATUS, says what a correct one looks like. ``Allocation``
checks the answers and joins them into extents whose borders are multiples of a grain.

Of an increment two questions are asked, one after the other: what has changed, of all the disk,
and how the long changes are allocated. In one question for both, a server would go through the
allocation of all that has not changed: 20 ms of QEMU's time for 256 GiB of qcow2 without any data.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Sequence

STATE_HOLE = 1
"""Bit of a base:allocation flag: not allocated."""
STATE_ZERO = 2
"""Bit of a base:allocation flag: reads as zeroes. The only one that vouches for contents."""
STATE_CHANGED = 1
"""Bit of a flag of a context that tells changes: of ``qemu:dirty-bitmap:NAME``, changed since the
bitmap began; of ``qemu:allocation-depth`` for an image without a backing file, held by the image.
"""


class BadStatus(Exception):
    """A server's answer to block status that the protocol forbids; the text says which rule."""


class Kind(enum.IntEnum):
    """What a reader needs to know of a range; the higher wins where two share a grain."""

    SKIP = -1
    """Has not changed: the backing file has it, whatever it is."""
    HOLE = 0
    """Reads as zeroes and takes no space."""
    ZERO = 1
    """Reads as zeroes, allocated."""
    DATA = 2
    """Has to be read."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """LENGTH bytes from OFFSET on, all of one kind."""

    offset: int
    length: int
    kind: Kind

    @property
    def end(self) -> int:
        return self.offset + self.length


def kind_of(flags: int) -> Kind:
    """The kind of a base:allocation FLAGS; a hole that may not read as zeroes is data."""
    if not flags & STATE_ZERO:
        return Kind.DATA
    return Kind.HOLE if flags & STATE_HOLE else Kind.ZERO


def change_of(flags: int) -> Kind:
    """The kind of FLAGS of a context that tells changes: what has changed has to be read."""
    return Kind.DATA if flags & STATE_CHANGED else Kind.SKIP


def parse(
    entries: Sequence[int], offset: int, size: int, kind: Callable[[int], Kind] = kind_of
) -> Iterator[Extent]:
    """The extents of one reply about OFFSET of an export of SIZE bytes; KIND reads the flags.

    ENTRIES is [length, flags, ...] as libnbd hands it on. The reply may end before what was asked
    (ask again from there) or after it. Errors: BadStatus for an empty reply, half a pair,
    an extent of no length, one that goes past the end of the export.
    """
    if not entries:
        raise BadStatus("no extents")
    if len(entries) % 2:
        raise BadStatus(f"{len(entries)} numbers, expected pairs")
    for length, flags in zip(entries[::2], entries[1::2], strict=True):
        if length <= 0:
            raise BadStatus(f"an extent of {length} bytes at {offset}")
        if length > size - offset:
            raise BadStatus(f"an extent of {length} bytes at {offset}, past the end at {size}")
        yield Extent(offset, length, kind(flags))
        offset += length


def merge(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same, with neighbours of one kind as one. Errors: BadStatus for a gap or an overlap."""
    last: Extent | None = None
    for extent in extents:
        if last is None:
            last = extent
        elif extent.offset != last.end:
            raise BadStatus(f"an extent at {extent.offset}, expected one at {last.end}")
        elif extent.kind == last.kind:
            last = Extent(last.offset, last.length + extent.length, last.kind)
        else:
            yield last
            last = extent
    if last is not None:
        yield last


def align(extents: Iterable[Extent], grain: int) -> Iterator[Extent]:
    """The same with every border a multiple of GRAIN, the first offset and last end excepted.

    EXTENTS are adjoining. A grain that several extents share gets the highest of their kinds, so
    data only grows, and a grain of which any byte has changed has changed.
    """
    return merge(_whole_grains(extents, grain))


def _whole_grains(extents: Iterable[Extent], grain: int) -> Iterator[Extent]:
    shared: Extent | None = None
    for extent in extents:
        start, end, kind = extent.offset, extent.end, extent.kind
        if shared is not None:
            # The rest of the grain that the extents before ended in.
            border = min(end, -(-shared.end // grain) * grain)
            both = max(shared.kind, kind)
            shared = Extent(shared.offset, border - shared.offset, both)
            if border % grain:
                continue
            yield shared
            start, shared = border, None
        border = end // grain * grain
        if border > start:
            yield Extent(start, border - start, kind)
            start = border
        if end > start:
            shared = Extent(start, end - start, kind)
    if shared is not None:
        yield shared


def clip(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """What of EXTENTS lies before SIZE."""
    for extent in extents:
        if extent.offset < size:
            yield Extent(extent.offset, min(extent.end, size) - extent.offset, extent.kind)


def split(extent: Extent, most: int) -> Iterator[tuple[int, int]]:
    """(offset, length) pieces of EXTENT of at most MOST bytes, cut at multiples of MOST."""
    offset = extent.offset
    while offset < extent.end:
        end = min(extent.end, (offset // most + 1) * most)
        yield offset, end - offset
        offset = end


class Allocation:
    """Asks its way through a part of an export: what to ask next, and the aligned extents that are
    known so far. For what has changed as well as for what is allocated.

    The step adapts: it grows while the answers are short and shrinks when they are long, because
    one answer about a fragmented disk keeps the server busy and fills our memory; at once to what
    such an answer was about, where that is less.
    """

    FIRST_STEP = 64 << 20
    LEAST_STEP = 16 << 20
    MOST_STEP = (1 << 32) - (1 << 16)
    FEW = 64
    MANY = 2048

    def __init__(
        self,
        size: int,
        grain: int,
        part: tuple[int, int] | None = None,
        kind: Callable[[int], Kind] = kind_of,
    ) -> None:
        """Through PART, (start, end), of an export of SIZE bytes, or all of it; START and END are
        multiples of GRAIN, END may be the export's. KIND is as for ``parse``."""
        self._size = size
        self._grain = grain
        self._kind = kind
        self._step = self.FIRST_STEP
        self._tail: list[Extent] = []
        self.offset, self._end = part or (0, size)
        """Everything before is known."""

    @property
    def complete(self) -> bool:
        return self.offset >= self._end

    def next_request(self) -> tuple[int, int]:
        """(offset, count) to ask for; not when complete."""
        return self.offset, min(self._step, self._end - self.offset)

    def receive(self, offset: int, entries: Sequence[int]) -> list[Extent]:
        """Take the reply to the request at OFFSET; the aligned extents that it made certain.

        Errors: BadStatus, as ``parse``, and for a reply about another offset than the next one.
        """
        if offset != self.offset:
            raise BadStatus(f"an answer about {offset}, expected one about {self.offset}")
        known = list(merge([*self._tail, *parse(entries, offset, self._size, self._kind)]))
        self.offset = known[-1].end
        self._adapt(len(known), self.offset - offset)
        self._tail = []
        aligned = list(align(clip(known, self._end), self._grain))
        if not self.complete and self.offset % self._grain:
            self._keep_tail(aligned)
        return aligned

    def _keep_tail(self, aligned: list[Extent]) -> None:
        """Hold the last, unfinished grain back until the next reply completes it."""
        last = aligned.pop()
        border = self.offset // self._grain * self._grain
        if border > last.offset:
            aligned.append(Extent(last.offset, border - last.offset, last.kind))
        start = max(border, last.offset)
        self._tail = [Extent(start, last.end - start, last.kind)]

    def _adapt(self, count: int, reach: int) -> None:
        if count <= self.FEW:
            self._step = min(self._step * 2, self.MOST_STEP)
        elif count >= self.MANY:
            self._step = max(min(self._step // 2, reach), self.LEAST_STEP)
