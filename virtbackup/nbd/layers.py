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
import os
import select
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import nbd

from virtbackup.nbd import checksum, connection, copy, extents, store, target, view

CHUNK = 512 << 10
"""Bytes of a read, at most."""
BUFFERS = 16
STRETCH = 256 << 20
"""Bytes of the disk that are looked at together; more where little is on it."""
_MOST_STRETCH = 1 << 31
_FEW, _MANY = 256, 8192
"""Extents of a stretch: the next one is longer, or shorter."""
_LEAST_STRETCH = 8 << 20


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
    with contextlib.ExitStack() as always:
        sources = _open(jobs, cancel, always)
        size = sources[0].size
        assert all(source.size == size for source in sources), jobs
        wake = store.Wake()
        always.callback(wake.close)
        where = open_target(size)
        undo = always.enter_context(contextlib.ExitStack())
        undo.callback(where.discard)
        run = _Run(sources, size, where, wake, cancel, progress, index)
        try:
            run.run()
            check([source.tree.hexdigest() for source in sources])
            stored = run.finish()
            undo.pop_all()
        except BaseException:
            run.abandon()
            raise
        finally:
            run.close()
    return Result(run.tree.hexdigest(), run.read, stored)


def shown(jobs: Sequence[copy.Job], cancel: copy.Cancel) -> Iterator[view.Part]:
    """What shows through of a disk of layers, as ``merge`` has them; nothing is read."""
    with contextlib.ExitStack() as always:
        sources = _open(jobs, cancel, always)
        for _, parts in _stretches(sources, sources[0].size):
            yield from parts


def changes(
    job: copy.Job, cancel: copy.Cancel
) -> Iterator[tuple[int, int, extents.Kind, extents.Kind]]:
    """(start, end, how it is allocated, SKIP where it has not changed) of an export; where the
    server does not tell of changes, nothing has changed. Errors: as ``merge``."""
    with contextlib.ExitStack() as always:
        source = _Source(job, cancel, always, demand=(connection.ALLOCATION,))
        source.negotiate()
        start = 0
        while start < source.size:
            end = min(source.size, start + STRETCH)
            yield from source.told(start, end)
            start = end


def _stretches(
    sources: Sequence["_Source"], size: int
) -> Iterator[tuple[list[list[extents.Extent]], list[view.Part]]]:
    start, length = 0, STRETCH
    while start < size:
        end = min(size, start + length)
        found = [source.kinds(start, end) for source in sources]
        yield found, view.owners(found)
        count = sum(map(len, found))
        if count <= _FEW:
            length = min(length * 2, _MOST_STRETCH)
        elif count >= _MANY:
            length = max(length // 2, _LEAST_STRETCH)
        start = end


@dataclasses.dataclass
class _Chunk:
    """A buffer on its way; SOURCE has read LENGTH bytes at OFFSET into it."""

    memory: memoryview
    source: int = 0
    offset: int = 0
    length: int = 0
    shown: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(start, end) of what goes to the target."""
    digests: bytes = b""

    @property
    def data(self) -> memoryview:
        return self.memory[: self.length]


class _Source:
    """One layer: a libnbd handle, and the checksum in the making."""

    def __init__(
        self,
        job: copy.Job,
        cancel: copy.Cancel,
        undo: contextlib.ExitStack,
        demand: tuple[str, ...] | None = None,
    ) -> None:
        """Begin to connect. The server has to have the contexts DEMANDed; None: all that JOB asks
        in."""
        self._job = job
        self._demand = demand
        self._cancel = cancel
        self._in_flight: dict[int, _Chunk] = {}
        self._handle: Any = nbd.NBD()
        undo.callback(self._close)
        with self._naming("open"):
            self._handle.set_export_name(job.export.name)
            self._handle.add_meta_context(connection.ALLOCATION)
            if job.dirty is not None:
                self._handle.add_meta_context(job.dirty)
            self._handle.set_pread_initialize(False)
            connection.connect(self._handle, job.export)

    def negotiate(self) -> None:
        """Once it is connected, for which this waits: read what the server says of itself."""
        job = self._job
        with self._naming("open"):
            self._wait(lambda: not self._handle.aio_is_connecting())
            whole = self._handle.get_size()
            asked = (connection.ALLOCATION, *([job.dirty] if job.dirty else []))
            self._contexts = tuple(filter(self._handle.can_meta_context, asked))
        self.size: int = whole if job.size is None else job.size
        self._whole: int = whole
        if self.size > whole:
            raise self.failed("read", f"it has {whole} bytes, expected {self.size}")
        if not set(self._contexts) >= set(asked if self._demand is None else self._demand):
            raise self.failed("read allocation of", "the server does not tell it")
        self.tree = checksum.Tree(self.size)

    @property
    def busy(self) -> bool:
        return bool(self._in_flight)

    def kinds(self, start: int, end: int) -> list[extents.Extent]:
        """What the layer has between START and END, multiples of a block, or the disk's end."""
        told = self._ask(start, end)
        allocation = _aligned(told[connection.ALLOCATION], end)
        if self._job.dirty is None:
            return allocation
        return view.held(_aligned(told[self._job.dirty], end), allocation)

    def told(self, start: int, end: int) -> Iterator[tuple[int, int, extents.Kind, extents.Kind]]:
        """(start, end, allocation, change), as the server tells them."""
        found = {name: extents.clip(some, end) for name, some in self._ask(start, end).items()}
        unchanged = [extents.Extent(start, end - start, extents.Kind.SKIP)]
        change = found.get(self._job.dirty or "", iter(unchanged))
        return view.together(found[connection.ALLOCATION], change)

    def read(self, chunk: _Chunk) -> None:
        with self._naming("read", chunk.offset):
            cookie = self._handle.aio_pread(chunk.data, chunk.offset)
        self._in_flight[cookie] = chunk

    def fileno(self) -> int:
        fd: int = self._handle.aio_get_fd()
        return fd

    def mask(self) -> int:
        return connection.mask(self._handle)

    def notify(self, events: int) -> None:
        """Hand what poll said to libnbd. Errors: the connection is lost."""
        with self._naming("read"):
            connection.notify(self._handle, events)

    def completed(self) -> Iterator[_Chunk]:
        """The chunks that are read by now. Errors: they cannot be."""
        while self._in_flight and (cookie := self._handle.aio_peek_command_completed()) > 0:
            chunk = self._in_flight.pop(cookie)
            with self._naming("read", chunk.offset):
                self._handle.aio_command_completed(cookie)
            yield chunk

    def failed(self, what: str, reason: str, offset: int | None = None) -> Exception:
        return connection.failed(self._job.export, what, reason, offset)

    def _ask(self, start: int, end: int) -> dict[str, list[extents.Extent]]:
        """Context -> extents from START on, to END at least."""
        found: dict[str, list[extents.Extent]] = {name: [] for name in self._contexts}
        reach = dict.fromkeys(found, start)
        while (offset := min(reach.values())) < end:
            for name, entries in self._block_status(offset, end - offset):
                if name not in found:
                    continue
                kind = extents.kind_of if name == connection.ALLOCATION else extents.change_of
                try:
                    some = list(extents.parse(entries, offset, self._whole, kind))
                except extents.BadStatus as failure:
                    raise self.failed("read allocation of", str(failure), offset) from failure
                # What is known already in one context was asked for another.
                found[name] += _from(some, reach[name])
                reach[name] = max(reach[name], some[-1].end)
            if min(reach.values()) <= offset:
                raise self.failed("read allocation of", "no answer", offset)
        return found

    def _block_status(self, offset: int, count: int) -> list[tuple[str, list[int]]]:
        answers: list[tuple[str, list[int]]] = []

        def extent(name: str, _offset: int, entries: list[int], _error: object) -> int:
            answers.append((name, entries))
            return 0

        with self._naming("read allocation of", offset):
            cookie = self._handle.aio_block_status(count, offset, extent)
            self._wait(lambda: self._handle.aio_command_completed(cookie))
        return answers

    def _wait(self, done: Callable[[], bool]) -> None:
        while not done():
            self._handle.poll(100)
            self._cancel.check()

    def _close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            connection.leave(handle, self._job.export, idle=not self._in_flight)

    @contextlib.contextmanager
    def _naming(self, what: str, offset: int | None = None) -> Iterator[None]:
        try:
            yield
        except nbd.Error as failure:
            reason = os.strerror(failure.errnum) if failure.errnum else failure.string
            if offset is None and self._in_flight:
                offset = min(chunk.offset for chunk in self._in_flight.values())
            raise self.failed(what, reason, offset) from failure


def _open(
    jobs: Sequence[copy.Job], cancel: copy.Cancel, undo: contextlib.ExitStack
) -> list[_Source]:
    """All servers start at once."""
    sources = [_Source(job, cancel, undo) for job in jobs]
    for source in sources:
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


class _Run:
    """The merge under way."""

    def __init__(
        self,
        sources: Sequence[_Source],
        size: int,
        where: target.Target,
        stored: store.Wake,
        cancel: copy.Cancel,
        progress: copy.Progress | None,
        index: int,
    ) -> None:
        self._sources = sources
        self._size = size
        self._cancel = cancel
        self._progress = progress
        self._index = index
        self._stored = stored
        self._where = where
        self._writer = _Writer(where, stored)
        self.tree = checksum.Tree(size)
        self.read = 0

    def run(self) -> None:
        """Until all is read and written."""
        if self._progress is not None:
            self._progress.start(self._index, self._size)
        self._writer.start()
        free = [_Chunk(target.memory(self._where, CHUNK)) for _ in range(BUFFERS)]
        pieces = self._pieces()
        piece = next(pieces, None)
        while piece is not None or len(free) < BUFFERS:
            while piece is not None and free:
                chunk = free.pop()
                chunk.source, chunk.offset, chunk.length, chunk.shown = piece
                self._sources[chunk.source].read(chunk)
                piece = next(pieces, None)
                free += self._collect()
            if piece is None or not free:
                self._wait()
            free += self._collect()

    def finish(self) -> int:
        """Make the target durable; what it takes."""
        self._writer.end(finish=True)
        while self._writer.stored is None:
            self._poll([])
            self._writer.check()
        return self._writer.stored

    def abandon(self) -> None:
        self._writer.abandon()

    def close(self) -> None:
        self._writer.end(finish=False)

    def _pieces(self) -> Iterator[tuple[int, int, int, list[tuple[int, int]]]]:
        """(source, offset, length, what of it is shown) of every read; what need not be read is
        seen to on the way."""
        for found, parts in _stretches(self._sources, self._size):
            reads = []
            for layer, (source, own) in enumerate(zip(self._sources, found, strict=True)):
                shown = collections.deque(view.shown(parts, layer))
                for extent in own:
                    visible = _take(shown, extent)
                    if extent.kind is extents.Kind.DATA:
                        reads += [
                            (offset, layer, length, view.cut(visible, offset, offset + length))
                            for offset, length in extents.split(extent, CHUNK)
                        ]
                    elif extent.kind is extents.Kind.SKIP:
                        source.tree.add_absent(extent.offset, extent.length)
                    else:
                        source.tree.add_zeroes(extent.offset, extent.length)
                        self._zeroes(visible)
            for offset, layer, length, visible in sorted(reads):
                yield layer, offset, length, visible

    def _zeroes(self, ranges: list[tuple[int, int]]) -> None:
        for start, end in ranges:
            self.tree.add_zeroes(start, end - start)
            self._writer.put((start, end))
            self._advance(end - start)

    def _collect(self) -> list[_Chunk]:
        """Chunks that are free again. Errors: what writing met."""
        self._writer.check()
        done = self._writer.collect()
        for chunk in done:
            self.read += chunk.length
            self._sources[chunk.source].tree.add(chunk.offset, chunk.length, chunk.digests)
            for start, end in chunk.shown:
                first, last = start - chunk.offset, -(-(end - chunk.offset) // checksum.BLOCK)
                digests = chunk.digests[first // checksum.BLOCK * 16 : last * 16]
                self.tree.add(start, end - start, digests)
                self._advance(end - start)
        return done

    def _wait(self) -> None:
        busy = [source for source in self._sources if source.busy]
        # Some may have come with the answer to a question; nothing tells of these any more.
        if self._receive(busy):
            return
        for source, event in self._poll(busy):
            source.notify(event)
        self._receive(busy)

    def _receive(self, busy: Sequence[_Source]) -> bool:
        """Hand on what was read; whether there was any."""
        chunks = [chunk for source in busy for chunk in source.completed()]
        for chunk in chunks:
            self._writer.put(chunk)
        return bool(chunks)

    def _poll(self, sources: Sequence[_Source]) -> list[tuple[_Source, int]]:
        """Sleep until one of SOURCES can go on, or something was written. Errors: cancelled."""
        waiting = {source.fileno(): source for source in sources}
        poll = select.poll()
        poll.register(self._cancel, select.POLLIN)
        poll.register(self._stored, select.POLLIN)
        for fd, source in waiting.items():
            poll.register(fd, source.mask())
        ready = []
        for fd, event in poll.poll():
            if fd in waiting:
                ready.append((waiting[fd], event))
            elif fd == self._stored.fileno():
                self._stored.clear()
        self._cancel.check()
        return ready

    def _advance(self, count: int) -> None:
        if self._progress is not None:
            self._progress.advance(self._index, count)


def _take(
    shown: "collections.deque[tuple[int, int]]", extent: extents.Extent
) -> list[tuple[int, int]]:
    """What of SHOWN, in order, is in EXTENT; what is before its end is taken away."""
    found = []
    while shown and shown[0][0] < extent.end:
        start, end = shown.popleft()
        found.append((max(start, extent.offset), min(end, extent.end)))
        if end > extent.end:
            shown.appendleft((extent.end, end))
            break
    return found


class _Writer(threading.Thread):
    """Hashes chunks and writes what of them is shown; a pair is zeroes from start to end."""

    def __init__(self, where: target.Target, wake: store.Wake) -> None:
        super().__init__(name="virtbackup-layers", daemon=True)
        self._target = where
        self._wake = wake
        self._inbox: store.Inbox[_Chunk | tuple[int, int] | None] = store.Inbox(where)
        self._done: collections.deque[_Chunk] = collections.deque()
        self._failure: BaseException | None = None
        self._finish = self._abandoned = self._closed = False
        self.stored: int | None = None

    def put(self, what: "_Chunk | tuple[int, int]") -> None:
        self._inbox.put(what)

    def end(self, finish: bool) -> None:
        """After the last one: end the thread, the target FINISHed."""
        self._finish = self._finish or finish
        if not self._closed:
            self._inbox.put(None)
        if not finish:
            if self.is_alive():
                self.join()
            self._closed = True
            self._inbox.close()

    def check(self) -> None:
        """Raise what writing met."""
        if self._failure is not None:
            raise self._failure

    def collect(self) -> list[_Chunk]:
        return [self._done.popleft() for _ in range(len(self._done))]

    def abandon(self) -> None:
        self._abandoned = True
        self._target.shorten()
        self.end(finish=False)

    def run(self) -> None:
        try:
            if isinstance(self._target, target.Asynchronous):
                self._target.begin()
            while (what := self._inbox.get()) is not None:
                if not self._abandoned:
                    self._see_to(what)
            if self._finish and not self._abandoned:
                self.stored = self._target.finish()
        except BaseException as failure:  # noqa: BLE001  (raised again, by check)
            self._failure = failure
        finally:
            self._wake.set()

    def _see_to(self, what: "_Chunk | tuple[int, int]") -> None:
        if isinstance(what, tuple):
            self._target.write_zeroes(what[0], what[1] - what[0])
            return
        what.digests, runs = checksum.scan(what.data)
        data = [(what.offset + start, what.offset + end) for start, end in runs]
        for start, end in what.shown:
            at = start
            for first, last in view.cut(data, start, end):
                if first > at:
                    self._target.write_zeroes(at, first - at)
                self._target.write(first, what.data[first - what.offset : last - what.offset])
                at = last
            if end > at:
                self._target.write_zeroes(at, end - at)
        target.after(self._target, lambda: self._give_back(what))

    def _give_back(self, chunk: _Chunk) -> None:
        self._done.append(chunk)
        self._wake.set()
