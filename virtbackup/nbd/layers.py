# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk of several layers into one image, every layer checked by its checksum in the same pass.

The layers are a full image and increments over it, each served alone. Every byte that any of them
holds is read once and counts for its own layer's checksum; what shows through from above goes to
the target. So a bad layer is found even where all that is bad in it is hidden, nothing is read
twice, and the disk's own checksum comes with it.

One thread reads from all servers, another hashes and writes. Memory has a bound: so many buffers,
and the extents of one stretch of the disk.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from virtbackup.nbd import checksum, connection, copy, extents, polling, store, target, view

BUFFERS = 16
STARTING = 8
"""Servers."""
STRETCH = 256 << 20
"""Bytes of the disk that are looked at together; more where little is on it."""
_MOST_STRETCH = 1 << 31
_FEW, _MANY = 256, 8192
"""Extents of a stretch: the next one is longer, or shorter."""
_LEAST_STRETCH = 8 << 20
_MOST = 2048
"""Extents of one layer by which a stretch ends before its time, as the first one behind a long hole
may; more where there are few layers."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of the disk. Sizes are bytes."""

    checksum: str
    """Of what the disk shows, ``checksum.ALGORITHM``."""
    read: int
    stored: int
    """What the target takes."""


Check = Callable[[Sequence[str]], None]
"""Gets the checksum of every layer before the target is finished; raises to refuse it."""


def merge(
    jobs: Sequence[copy.Job],
    open_target: Callable[[int], target.Target],
    check: Check,
    *,
    progress: copy.Progress | None = None,
    index: int = 0,
    cancel: copy.Cancel,
) -> Result:
    """Write to a target of its own what a disk of layers shows; durable when this returns.

    JOBS says how to read each layer, the uppermost first: what it has of its own for one with
    ``dirty``, which the last one is without. INDEX is the disk's for PROGRESS.

    Errors: those of ``copy.copy``, and what CHECK raises; the target is discarded then.
    """
    with contextlib.closing(polling.Loop(cancel)) as loop:
        sources = _open(jobs, loop)
        size = sources[0].size
        assert all(source.size == size for source in sources), jobs
        with contextlib.ExitStack() as undo:
            where = open_target(size)
            undo.callback(where.discard)
            run = _Run(sources, where, loop, progress, index)
            undo.callback(run.abandon)
            run.run()
            check([source.tree.hexdigest() for source in sources])
            stored = run.finish()
            undo.pop_all()
    return Result(run.tree.hexdigest(), run.read, stored)


def shown(jobs: Sequence[copy.Job], cancel: copy.Cancel) -> Iterator[view.Part]:
    """What shows through of a disk of layers, as ``merge`` has them; nothing is read."""
    with contextlib.closing(polling.Loop(cancel)) as loop:
        sources = _open(jobs, loop)
        for _, parts in _stretches(sources, sources[0].size):
            yield from parts


def changes(
    job: copy.Job, cancel: copy.Cancel
) -> Iterator[tuple[int, int, extents.Kind, extents.Kind]]:
    """(start, end, how it is allocated, SKIP where it has not changed) of an export; where the
    server does not tell of changes, nothing has changed. Errors: as ``merge``."""
    with contextlib.closing(polling.Loop(cancel)) as loop:
        source = _Source(job, loop, demand=(connection.ALLOCATION,))
        source.negotiate()
        start = 0
        while start < source.size:
            for one in source.told(start, min(source.size, start + STRETCH)):
                yield one
                start = one[1]


def _stretches(
    sources: Sequence["_Source"], size: int
) -> Iterator[tuple[list[list[extents.Extent]], list[view.Part]]]:
    start, length = 0, STRETCH
    most = max(_MOST, _MANY // len(sources))
    while start < size:
        end = wanted = min(size, start + length)
        found = []
        for source in sources:
            found.append(source.kinds(start, end, most))
            end = found[-1][-1].end
        found = [list(extents.clip(some, end)) for some in found]
        yield found, view.owners(found)
        count = sum(map(len, found))
        if end < wanted:
            length = max(end - start, _LEAST_STRETCH)
        elif count <= _FEW:
            length = min(length * 2, _MOST_STRETCH)
        elif count >= _MANY:
            length = max(length // 2, _LEAST_STRETCH)
        start = end


class _Source:
    """One layer: a connection to its server, and the checksum in the making."""

    def __init__(
        self, job: copy.Job, loop: polling.Loop, demand: Sequence[str] | None = None
    ) -> None:
        """Begin to connect. The server has to have the contexts DEMANDed; None: all that JOB asks
        in."""
        self._job = job
        self._loop = loop
        asked = (connection.ALLOCATION, *([job.dirty] if job.dirty else []))
        self._demand = asked if demand is None else demand
        self._connection = loop.begin(job.export, asked)
        self._read: collections.deque[store.Chunk] = collections.deque()

    def negotiate(self) -> None:
        """Once it is connected, for which this waits: read what the server says of itself."""
        self._loop.negotiate(self._connection)
        whole, job = self._connection.size, self._job
        self.size = whole if job.size is None else job.size
        if self.size > whole:
            raise self._failed("read", f"it has {whole} bytes, expected {self.size}")
        if not self._connection.tells.issuperset(self._demand):
            raise self._failed("read allocation of", "the server does not tell it")
        self.tree = checksum.Tree(self.size)

    def kinds(self, start: int, end: int, most: int) -> list[extents.Extent]:
        """What the layer has between START and END, multiples of a block, or the disk's end; where
        that are more than about MOST extents, to one such before END."""
        told, end = self._ask(start, end, most)
        allocation = _aligned(told[connection.ALLOCATION], end)
        if self._job.dirty is None:
            return allocation
        return view.held(_aligned(told[self._job.dirty], end), allocation)

    def told(self, start: int, end: int) -> Iterator[tuple[int, int, extents.Kind, extents.Kind]]:
        """(start, end, allocation, change), as the server tells them, to END or before it."""
        told, end = self._ask(start, end, _MANY)
        found = {name: extents.clip(some, end) for name, some in told.items()}
        unchanged = [extents.Extent(start, end - start, extents.Kind.SKIP)]
        change = found.get(self._job.dirty or "", iter(unchanged))
        return view.together(found[connection.ALLOCATION], change)

    def read(self, chunk: store.Chunk) -> None:
        """Begin to read what CHUNK is aimed at."""
        for offset, length in chunk.pieces:
            self._connection.read(chunk, offset, length)

    def completed(self) -> Iterator[store.Chunk]:
        """The chunks that are read by now. Errors: they cannot be."""
        self._receive()
        while self._read:
            yield self._read.popleft()

    def leave(self) -> None:
        """Nothing more is wanted of the server."""
        self._loop.leave(self._connection)

    def _ask(self, start: int, end: int, most: int) -> tuple[dict[str, list[extents.Extent]], int]:
        """Context -> extents from START on, to an end at least; that is END, or once there are MOST
        of a context one of a block before."""
        found: dict[str, list[extents.Extent]] = {name: [] for name in self._connection.tells}
        reach = dict.fromkeys(found, start)
        while (offset := min(reach.values())) < end:
            known = offset // checksum.BLOCK * checksum.BLOCK
            if known > start and max(map(len, found.values())) >= most:
                return found, known
            for name, entries in self._block_status(offset, end - offset):
                kind = extents.kind_of if name == connection.ALLOCATION else extents.change_of
                try:
                    some = list(extents.parse(entries, offset, self._connection.size, kind))
                except extents.BadStatus as failure:
                    raise self._failed("read allocation of", str(failure), offset) from failure
                # What is known already in one context was asked for another.
                found[name] += _from(some, reach[name])
                reach[name] = max(reach[name], some[-1].end)
            if min(reach.values()) <= offset:
                raise self._failed("read allocation of", "no answer", offset)
        return found, end

    def _block_status(self, offset: int, count: int) -> list[tuple[str, list[int]]]:
        request = self._connection.ask(tuple(self._connection.tells), offset, count)
        while not self._receive(request):
            self._loop.wait()
        return request.answers

    def _receive(self, wanted: connection.Request | None = None) -> bool:
        """Take what has come; whether the answer to WANTED is in it."""
        came = False
        for request in self._connection.completed():
            came = came or request is wanted
            if request.chunk is not None:
                self._read.append(request.chunk)
        return came

    def _failed(self, what: str, reason: str, offset: int | None = None) -> Exception:
        return connection.failed(self._job.export, what, reason, offset)


def _open(jobs: Sequence[copy.Job], loop: polling.Loop) -> list[_Source]:
    """A few servers start at a time: those of many layers would take longer than the first of them
    waits for a word of its client."""
    sources: list[_Source] = []
    silent: collections.deque[_Source] = collections.deque()
    for job in jobs:
        if len(silent) == STARTING:
            silent.popleft().negotiate()
        sources.append(_Source(job, loop))
        silent.append(sources[-1])
    for source in silent:
        source.negotiate()
    return sources


def _from(found: list[extents.Extent], start: int) -> list[extents.Extent]:
    """What of FOUND is not before START."""
    return [
        extents.Extent(max(one.offset, start), one.end - max(one.offset, start), one.kind)
        for one in found
        if one.end > start
    ]


def _aligned(found: list[extents.Extent], end: int) -> list[extents.Extent]:
    return list(extents.align(extents.clip(found, end), checksum.BLOCK))


@dataclasses.dataclass(frozen=True)
class _Piece:
    """LENGTH bytes at OFFSET that LAYER has, of which SHOWN, (start, end), goes to the target; or
    zeroes that are shown, whichever layer has them (None)."""

    offset: int
    length: int
    layer: int | None
    shown: Sequence[tuple[int, int]]


class _Run:
    """The merge under way."""

    def __init__(
        self,
        sources: Sequence[_Source],
        where: target.Target,
        loop: polling.Loop,
        progress: copy.Progress | None,
        index: int,
    ) -> None:
        """What goes wrong from here on, ``abandon`` is to be called."""
        self._sources = sources
        self._size = sources[0].size
        self._loop = loop
        self._progress = progress
        self._index = index
        self._store = store.Store(where, loop.stored)
        self._free = [store.Chunk(connection.CHUNK, where) for _ in range(BUFFERS)]
        self._under_way: dict[store.Chunk, _Piece] = {}
        self.tree = checksum.Tree(self._size)
        self.read = 0

    def run(self) -> None:
        """Until all is read and written."""
        if self._progress is not None:
            self._progress.start(self._index, self._size)
        self._store.start()
        pieces = self._pieces()
        piece = next(pieces, None)
        while piece is not None or self._under_way:
            if piece is not None and self._free:
                self._begin(self._free.pop(), piece)
                piece = next(pieces, None)
            else:
                self._wait()
            self._collect()

    def finish(self) -> int:
        """Make the target durable; what it takes."""
        for source in self._sources:
            source.leave()
        self._store.finish()
        while self._store.stored is None:
            self._loop.wait()
            self._store.collect()
        self._store.close()
        return self._store.stored

    def abandon(self) -> None:
        """Leave nothing of the target."""
        self._store.abandon()

    def _pieces(self) -> Iterator[_Piece]:
        """What is to be read or written; the rest is seen to on the way."""
        for found, parts in _stretches(self._sources, self._size):
            pieces = []
            for layer, (source, own) in enumerate(zip(self._sources, found, strict=True)):
                shown = collections.deque(view.shown(parts, layer))
                for extent in own:
                    if extent.kind is extents.Kind.DATA:
                        pieces += [
                            _Piece(offset, length, layer, _take(shown, offset + length))
                            for offset, length in extents.split(extent, connection.CHUNK)
                        ]
                    elif extent.kind is extents.Kind.SKIP:
                        source.tree.add_absent(extent.offset, extent.length)
                    else:
                        source.tree.add_zeroes(extent.offset, extent.length)
                        pieces += [
                            _Piece(start, end - start, None, [(start, end)])
                            for start, end in _take(shown, extent.end)
                        ]
            yield from sorted(pieces, key=lambda piece: piece.offset)

    def _begin(self, chunk: store.Chunk, piece: _Piece) -> None:
        self._under_way[chunk] = piece
        place = [(piece.offset, piece.length)]
        if piece.layer is None:
            chunk.aim(place, zero=True)
            self._store.put(chunk)
        else:
            chunk.aim(place, shown=piece.shown)
            self._sources[piece.layer].read(chunk)

    def _collect(self) -> None:
        """Take back the chunks that are stored. Errors: what storing met."""
        for chunk in self._store.collect():
            self._note_stored(self._under_way.pop(chunk), chunk)
            self._free.append(chunk)

    def _note_stored(self, piece: _Piece, chunk: store.Chunk) -> None:
        if piece.layer is None:
            self.tree.add_zeroes(piece.offset, piece.length)
        else:
            [digests] = chunk.digests
            self.read += piece.length
            self._sources[piece.layer].tree.add(piece.offset, piece.length, digests)
            for start, end in piece.shown:
                first, last = start - piece.offset, -(-(end - piece.offset) // checksum.BLOCK)
                part = digests[first // checksum.BLOCK * 16 : last * 16]
                self.tree.add(start, end - start, part)
        if self._progress is not None:
            self._progress.advance(self._index, sum(end - start for start, end in piece.shown))

    def _wait(self) -> None:
        """Until something was read or stored."""
        # Some may have come with the answer to a question; nothing tells of these any more.
        if not self._receive():
            self._loop.wait()
            self._receive()

    def _receive(self) -> bool:
        """Hand on what was read; whether there was any."""
        chunks = [chunk for source in self._sources for chunk in source.completed()]
        for chunk in chunks:
            self._store.put(chunk)
        return bool(chunks)


def _take(shown: "collections.deque[tuple[int, int]]", border: int) -> list[tuple[int, int]]:
    """What of SHOWN, in order, is before BORDER; it is taken away."""
    found = []
    while shown and shown[0][0] < border:
        start, end = shown.popleft()
        found.append((start, min(end, border)))
        if end > border:
            shown.appendleft((border, end))
            break
    return found
