# SPDX-License-Identifier: LGPL-2.1-or-later
"""The data mover: NBD exports to files, all disks at once, checksummed on the way. On libnbd.

A copy is full, or an increment: what has changed since an earlier copy, in a qcow2 file with that
copy behind it.

One thread with one poll receives from every connection of every disk, and a thread for each disk
hashes and writes. Reads are in flight on each connection all the while, and the server is asked
ahead where it has data. Buffers are made once: memory has a bound whatever the disks' sizes.

A byte that could not be read, an answer that makes no sense, a connection that ends: all of it is
an error that names the export and the offset, and no file of the copy is left.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from virtbackup.nbd import checksum, connection, extents, filename, polling, qcow2, store, target
from virtbackup.nbd.connection import CHUNK

if TYPE_CHECKING:
    from virtbackup.nbd import writer

Format = Literal["qcow2", "raw"]
Backing = qcow2.Backing
Cancel = polling.Cancel

MEMORY = 32 << 20
"""Bytes of all disks' buffers together, but one buffer for each disk at least."""
_RAW = (CHUNK, 8)
_QCOW2 = (768 << 10, 8)
"""(bytes of a buffer, buffers of a disk), where MEMORY allows it. QEMU, which writes qcow2, is told
less often with large ones; with more of them, or with larger ones, a copy took longer, and most of
all with those of a whole MiB."""
_FEW = 4
"""Buffers below which they are better small."""
CONNECTIONS = 2
"""To a server that says that several clients see the same."""
_LOOK_AHEAD = 256
"""Extents known and not yet read below which the server is asked for more."""
_MOST_EARLY = 1024
"""Extents passed over while an earlier one is being read or stored."""
_WORTH_ASKING = 4 << 20
"""Bytes that have changed of which the server is asked whether they are zero; less is read."""
HELD = "qemu:allocation-depth"
"""The context that tells what an image holds itself, when it is opened without its backing file."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One disk to copy; PATH is a file that does not exist yet or, for a raw one, a block device;
    None to read for the sum alone."""

    export: connection.Export
    path: pathlib.Path | None
    format: Format = "raw"
    size: int | None = None
    """Only so many bytes of an export that has at least those; None is all of it."""
    dirty: str | None = None
    """The context that tells what has changed, ``qemu:dirty-bitmap:NAME``: the copy is an increment
    of that. None: it is full."""
    backing: Backing | None = None
    """What an increment is written on top of, and nothing else: FORMAT is qcow2 then."""
    compression: "writer.Compression | None" = None
    """How QEMU is to compress what it writes; None: nothing is compressed. FORMAT is qcow2."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a job. All sizes are bytes."""

    size: int
    checksum: str
    """As virtbackup.nbd.checksum defines it."""
    read: int
    """What was transferred; the rest the server said to be zero, or unchanged."""
    stored: int
    """What the file takes on its file system."""
    changed: int
    """What the copy holds, in whole blocks, data or zero: all of a disk that was copied in full."""
    algorithm: str
    """Of the checksum: ``checksum.ALGORITHM``, or of an increment ``checksum.INCREMENT``."""


class Progress(Protocol):
    """Is told how the copy goes; INDEX is the job's."""

    def start(self, index: int, size: int) -> None:
        """The disk was opened and has SIZE bytes."""

    def advance(self, index: int, count: int) -> None:
        """COUNT more bytes are done."""


def copy(
    jobs: Sequence[Job],
    *,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
    bandwidth: int | None = None,
    when_read: Callable[[], None] | None = None,
    when_failed: Callable[[BaseException], None] | None = None,
) -> list[Result]:
    """Copy every disk; when this returns, all files are whole and on disk. BANDWIDTH: bytes that
    are read a second, of all disks together; None: as many as can be. WHEN_READ is called, once,
    when the servers are not needed any more, while the files are being synced. WHEN_FAILED is
    called with what ends the copy before the files are removed, which may take as long as their
    file system hangs.

    Errors: VIR_ERR_OPERATION_FAILED for a server that cannot be reached, refuses, answers wrong or
    does not tell what has changed; VIR_ERR_SYSTEM_ERROR for a file; VIR_ERR_OPERATION_ABORTED when
    cancelled; WHEN_READ's. On any error no file of these jobs remains.
    """
    for job in jobs:
        assert job.path is None or (job.dirty is None) == (job.backing is None), job
        assert (job.backing or job.compression) is None or job.format == "qcow2", job
    share = MEMORY // max(1, len(jobs))
    with contextlib.ExitStack() as always, contextlib.ExitStack() as undo:
        if cancel is None:
            cancel = Cancel()
            always.callback(cancel.close)
        loop = polling.Loop(cancel, None if bandwidth is None else polling.Rate(bandwidth))
        always.callback(loop.close)
        disks = []
        try:
            for index, job in enumerate(jobs):
                disk = _Disk(job, index, _buffers(job, share), loop, progress)
                undo.callback(disk.store.abandon)
                disk.begin()
                disks.append(disk)
            _run(loop, disks, when_read)
        except BaseException as failure:
            loop.leave_all()
            if when_failed is not None:
                when_failed(failure)
            raise
        results = [disk.result() for disk in disks]
        undo.pop_all()
    return results


def checksum_of_file(
    path: pathlib.Path, fmt: Format, size: int | None = None, *, cancel: Cancel | None = None
) -> str:
    """The checksum of the disk in an image, of its first SIZE bytes where SIZE is not None.

    QEMU's qemu-nbd reads the image, so this also proves that QEMU can. Errors: as ``copy``.
    """
    export = _image(path, {"driver": fmt, "file": _file(path)})
    return copy([Job(export, None, size=size)], cancel=cancel)[0].checksum


def checksum_of_increment(
    path: pathlib.Path, size: int | None = None, *, cancel: Cancel | None = None
) -> str:
    """The checksum of the increment in a qcow2 image, of a disk of SIZE bytes.

    The image alone is read, nothing of what is behind it. SIZE None is the image's, which is that
    of a disk of whole sectors. Errors: as ``copy``.
    """
    export = _image(path, {"driver": "qcow2", "file": _file(path), "backing": None}, "-A")
    return copy([Job(export, None, size=size, dirty=HELD)], cancel=cancel)[0].checksum


def _image(path: pathlib.Path, node: dict[str, Any], *options: str) -> connection.Export:
    """The export of a qemu-nbd that opens an image as NODE says, for one connection."""
    # Not its name alone: that could be taken for a protocol's.
    argv = ("qemu-nbd", "--read-only", *options, f"json:{json.dumps(node)}")
    return connection.Export(connection.Program(argv, f"image {path}"), "")


def _file(path: pathlib.Path) -> dict[str, str]:
    return {"driver": "file", "filename": filename.told(path)}


def _run(
    loop: polling.Loop, disks: Sequence["_Disk"], when_read: Callable[[], None] | None
) -> None:
    """Until all DISKS are copied."""
    by_connection = {id(c): disk for disk in disks for c in disk.connections}
    busy = list(disks)
    while busy := [disk for disk in busy if not disk.go_on()]:
        if when_read is not None and all(disk.is_read for disk in disks):
            when_read()
            when_read = None
        else:
            for one in loop.wait():
                by_connection[id(one)].receive(one)
            busy.sort(key=lambda disk: disk.asked)  # the first takes what a bandwidth leaves


class _Walk:
    """A way through a part of a disk: what is known of it and not seen to, and what to ask next."""

    def __init__(
        self, one: connection.Connection, context: str, allocation: extents.Allocation
    ) -> None:
        self.context = context
        self.todo: collections.deque[extents.Extent] = collections.deque()
        self._connection = one
        self._allocation = allocation
        self._asking = False

    @property
    def done(self) -> bool:
        return self._allocation.complete and not self.todo

    def ask(self) -> None:
        """When little is known, and no answer is under way."""
        if not self._asking and not self._allocation.complete and len(self.todo) < _LOOK_AHEAD:
            self._connection.ask([self.context], *self._allocation.next_request())
            self._asking = True

    def learn(self, request: connection.Request) -> None:
        """Take the answer. Errors: BadStatus."""
        self._asking = False
        if len(request.answers) != 1:
            raise extents.BadStatus(f"{len(request.answers)} answers in {self.context}")
        [(_, entries)] = request.answers
        self.todo.extend(self._allocation.receive(request.offset, entries))


class _Disk:
    """One job under way: what is known and not read, what is in flight, where it goes."""

    def __init__(
        self,
        job: Job,
        index: int,
        buffers: tuple[int, int],
        loop: polling.Loop,
        progress: Progress | None,
    ) -> None:
        """BUFFERS: their size and number."""
        self._job = job
        self._chunk, count = buffers
        self._index = index
        self._loop = loop
        self._progress = progress
        first = loop.connect(job.export, _contexts(job))
        self.connections = [first]
        if first.multi and (count > 1 or job.dirty is not None):
            self.connections += [loop.connect(job.export) for _ in range(CONNECTIONS - 1)]
        self._size = first.size if job.size is None else job.size
        if self._size > first.size:
            reason = f"it has {first.size} bytes, expected {self._size}"
            raise connection.failed(job.export, "read", reason)
        self._left = self._changed = self._size
        self._read = 0
        self.asked = 0
        """Bytes that the server was to read by now."""
        self._tree = checksum.Tree(self._size)
        # The way through all of the disk, and on top one through a part whose turn it is.
        self._walks = [self._first_walk()]
        self.is_read = False
        """Whether nothing more is asked of the server."""
        where = _open(job, self._size)
        try:
            self.store = store.Store(where, loop.stored)
            self._free = [store.Chunk(self._chunk, where) for _ in range(count)]
        except BaseException:
            where.discard()
            raise

    def begin(self) -> None:
        self.store.start()
        if self._progress is not None:
            self._progress.start(self._index, self._size)

    def go_on(self) -> bool:
        """Take back what is stored, put in flight what there are buffers for; whether all is done.

        Errors: what storing met.
        """
        for chunk in self.store.collect():
            self._note_stored(chunk)
            self._free.append(chunk)
        if self._left:
            self._fill()
        if not self._left and not self.is_read:
            self.is_read = True
            for one in self.connections:
                self._loop.leave(one)
            self.store.finish()
            return False  # however fast that is: first, what waits for is_read
        return self.store.stored is not None

    def _note_stored(self, chunk: store.Chunk) -> None:
        if chunk.zero:
            for offset, length in chunk.pieces:
                self._tree.add_zeroes(offset, length)
        else:
            for (offset, length), digests in zip(chunk.pieces, chunk.digests, strict=True):
                self._tree.add(offset, length, digests)
                self._read += length
        self._advance(sum(length for _, length in chunk.pieces))

    def receive(self, one: connection.Connection) -> None:
        """Take what the connection brought."""
        for request in one.completed():
            chunk = request.chunk
            if chunk is None:
                self._learn(request)
                continue
            if not chunk.pending:
                self.store.put(chunk)

    def result(self) -> Result:
        """Of a disk that is done; its thread has ended when this returns."""
        self.store.close()
        assert self.store.stored is not None
        return Result(
            size=self._size,
            checksum=self._tree.hexdigest(),
            read=self._read,
            stored=self.store.stored,
            changed=self._changed,
            algorithm=checksum.ALGORITHM if self._job.dirty is None else checksum.INCREMENT,
        )

    def _first_walk(self) -> _Walk:
        """Errors: the server does not tell what has changed."""
        whole, first, context = (0, self._size), self.connections[0], self._job.dirty
        if context is None:
            return self._walk_allocation(first, whole)
        if context not in first.tells:
            reason = f"it has no context {context}"
            raise connection.failed(self._job.export, "read changes of", reason)
        kind = extents.change_of
        return _Walk(first, context, extents.Allocation(first.size, checksum.BLOCK, whole, kind))

    def _walk_allocation(self, one: connection.Connection, part: tuple[int, int]) -> _Walk:
        """All of PART is data where the server cannot tell."""
        start, end = part
        told = connection.ALLOCATION in one.tells
        known = extents.Allocation(one.size, checksum.BLOCK, part if told else (end, end))
        walk = _Walk(one, connection.ALLOCATION, known)
        if not told and start < end:
            walk.todo.append(extents.Extent(start, end - start, extents.Kind.DATA))
        return walk

    def _fill(self) -> None:
        while True:
            for walk in self._walks:
                walk.ask()
            walk = self._walks[-1]
            if walk.done and len(self._walks) > 1:
                self._walks.pop()
            elif not walk.todo or not self._take(walk):
                return

    def _take(self, walk: _Walk) -> bool:
        """See to the first extent of WALK, or to a part; whether there was room for it."""
        extent = walk.todo[0]
        if self._worth_asking(extent, walk):
            walk.todo.popleft()
            part = extent.offset, extent.end
            self._walks.append(self._walk_allocation(self.connections[-1], part))
        elif not self._to_store(extent.kind):
            if self._tree.early >= _MOST_EARLY:
                return False
            self._pass_over(walk.todo.popleft())
        elif not self._free:
            return False
        elif extent.kind is extents.Kind.DATA:
            if not self._loop.may_read():
                return False
            self._start(self._free.pop(), self._gather(walk))
        else:
            self._store_zeroes(self._free.pop(), walk.todo.popleft())
        return True

    def _gather(self, walk: _Walk) -> list[extents.Extent]:
        """The data at the head of WALK, up to the next border of a chunk; and more, when it is
        known and comes before that, in small pieces with nothing between that is to be stored."""
        pieces = [self._next_piece(walk.todo)]
        border = -(-pieces[0].end // self._chunk) * self._chunk
        while walk.todo and walk.todo[0].offset < border:
            extent = walk.todo[0]
            if extent.kind is extents.Kind.DATA:
                if self._worth_asking(extent, walk):
                    break
                pieces.append(self._next_piece(walk.todo))
            elif self._to_store(extent.kind) or self._tree.early >= _MOST_EARLY:
                break
            else:
                self._pass_over(walk.todo.popleft())
        return pieces

    def _next_piece(self, todo: collections.deque[extents.Extent]) -> extents.Extent:
        """The first part of the first extent, up to the next border of a chunk."""
        extent = todo.popleft()
        end = min(extent.end, (extent.offset // self._chunk + 1) * self._chunk)
        if end < extent.end:
            todo.appendleft(extents.Extent(end, extent.end - end, extent.kind))
        return extents.Extent(extent.offset, end - extent.offset, extent.kind)

    def _worth_asking(self, extent: extents.Extent, walk: _Walk) -> bool:
        """Whether EXTENT, which has changed, may be zeroes, and many of them."""
        return (
            walk.context == self._job.dirty
            and extent.kind is extents.Kind.DATA
            and extent.length >= _WORTH_ASKING
        )

    def _to_store(self, kind: extents.Kind) -> bool:
        """Zeroes are, where a backing file would show through else."""
        if kind is extents.Kind.DATA:
            return True
        return kind is not extents.Kind.SKIP and self._job.backing is not None

    def _store_zeroes(self, chunk: store.Chunk, extent: extents.Extent) -> None:
        chunk.aim([(extent.offset, extent.length)], zero=True)
        self.store.put(chunk)

    def _pass_over(self, extent: extents.Extent) -> None:
        """Nothing of the extent is read or written."""
        if extent.kind is extents.Kind.SKIP:
            self._tree.add_absent(extent.offset, extent.length)
            self._changed -= extent.length
        else:
            self._tree.add_zeroes(extent.offset, extent.length)
        self._advance(extent.length)

    def _learn(self, request: connection.Request) -> None:
        walk = next(walk for walk in self._walks if walk.context in request.contexts)
        try:
            walk.learn(request)
        except extents.BadStatus as failure:
            raise connection.failed(
                self._job.export, "read allocation of", str(failure), request.offset
            ) from failure

    def _start(self, chunk: store.Chunk, pieces: Sequence[extents.Extent]) -> None:
        chunk.aim([(piece.offset, piece.length) for piece in pieces])
        count = sum(piece.length for piece in pieces)
        self.asked += count
        self._loop.note_read(count)
        for piece in pieces:
            for offset, length in extents.split(piece, self.connections[0].most):
                one = min(self.connections, key=lambda c: c.load)
                one.read(chunk, offset, length)

    def _advance(self, count: int) -> None:
        self._left -= count
        if self._progress is not None:
            self._progress.advance(self._index, count)


def _buffers(job: Job, share: int) -> tuple[int, int]:
    """Their size and number for a disk that has a SHARE of the memory, in bytes."""
    size, wanted = _QCOW2 if job.format == "qcow2" else _RAW
    if share < _FEW * size:
        size = CHUNK
    return size, max(1, min(wanted, share // size))


def _contexts(job: Job) -> tuple[str, ...]:
    """What the first connection is asked about; the second, if there is one, allocation.

    A server answers in every context that a connection has, and allocation of all the disk costs
    it more than an increment is worth.
    """
    if job.dirty is None:
        return (connection.ALLOCATION,)
    if isinstance(job.export.server, connection.Program):
        return (job.dirty, connection.ALLOCATION)
    return (job.dirty,)


def _open(job: Job, size: int) -> target.Target:
    if job.path is None:
        return target.Nowhere()
    if job.format == "raw":
        if job.path.is_block_device():
            from virtbackup.nbd import device  # few need it

            return device.Device(job.path, size)
        return target.Raw(job.path, size)
    from virtbackup.nbd import writer  # takes a while, and is for this format alone

    return writer.QemuWriter(job.path, size, job.backing, job.compression)
