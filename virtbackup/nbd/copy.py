# SPDX-License-Identifier: LGPL-2.1-or-later
"""The data mover: NBD exports to files, all disks at once, checksummed on the way. On libnbd.

One thread with one poll receives from every connection of every disk, and a thread for each disk
hashes and writes. Reads are in flight on each connection all the while, and the server is asked
ahead where it has data. Buffers are made once: memory has a bound whatever the disks' sizes.

A byte that could not be read, an answer that makes no sense, a connection that ends: all of it is
an error that names the export and the offset, and no file of the copy is left.
"""

import collections
import contextlib
import dataclasses
import pathlib
import select
from collections.abc import Sequence
from typing import Literal, Protocol

import libvirt

from virtbackup import errors
from virtbackup.nbd import checksum, connection, extents, store, target

Format = Literal["qcow2", "raw"]

CHUNK = 512 << 10
"""Bytes of a buffer, and of a read where the server allows it."""
BUFFERS = 8
"""In flight for a disk; fewer when MAX_BUFFERS says so."""
MAX_BUFFERS = 64
"""For all disks together, but one for each at least."""
CONNECTIONS = 2
"""To a server that says that several clients see the same."""
_LOOK_AHEAD = 256
"""Extents known and not yet read below which the server is asked for more."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One disk to copy; PATH is a file that does not exist yet, None to read for the sum alone."""

    export: connection.Export
    path: pathlib.Path | None
    format: Format = "raw"
    size: int | None = None
    """Only so many bytes of an export that has at least those; None is all of it."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a job. All sizes are bytes."""

    size: int
    checksum: str
    """As virtbackup.nbd.checksum defines it."""
    read: int
    """What was transferred; the rest the server said to be zero."""
    stored: int
    """What the file takes on its file system."""


class Progress(Protocol):
    """Is told how the copy goes; INDEX is the job's."""

    def start(self, index: int, size: int) -> None:
        """The disk was opened and has SIZE bytes."""

    def advance(self, index: int, count: int) -> None:
        """COUNT more bytes are done."""


class Cancel:
    """Ends a copy from a signal handler or another thread; ``set`` may be called from either."""

    def __init__(self) -> None:
        self._wake = store.Wake()
        self._is_set = False

    def set(self) -> None:
        """From now on ``check`` raises, and a copy that waits wakes up."""
        self._is_set = True
        self._wake.set()

    def check(self) -> None:
        """Raise VIR_ERR_OPERATION_ABORTED once ``set`` was called."""
        if self._is_set:
            raise errors.error(libvirt.VIR_ERR_OPERATION_ABORTED, "the copy was cancelled")

    def fileno(self) -> int:
        """Readable once set."""
        return self._wake.fileno()

    def close(self) -> None:
        self._wake.close()


def copy(
    jobs: Sequence[Job], *, progress: Progress | None = None, cancel: Cancel | None = None
) -> list[Result]:
    """Copy every disk; when this returns, all files are whole and on disk.

    Errors: VIR_ERR_OPERATION_FAILED for a server that cannot be reached, refuses or answers wrong,
    VIR_ERR_SYSTEM_ERROR for a file, VIR_ERR_OPERATION_ABORTED when cancelled. On any error no file
    of these jobs remains.
    """
    buffers = min(BUFFERS, max(1, MAX_BUFFERS // max(1, len(jobs))))
    with contextlib.ExitStack() as always, contextlib.ExitStack() as undo:
        if cancel is None:
            cancel = Cancel()
            always.callback(cancel.close)
        loop = _Loop(cancel)
        always.callback(loop.close)
        disks = []
        for index, job in enumerate(jobs):
            disk = _Disk(job, index, buffers, loop, progress)
            undo.callback(disk.store.abandon)
            disk.begin()
            disks.append(disk)
        loop.run(disks)
        results = [disk.result() for disk in disks]
        undo.pop_all()
    return results


def checksum_of_export(export: connection.Export, *, cancel: Cancel | None = None) -> str:
    """The checksum of what an export reads as. Errors: as ``copy``."""
    return copy([Job(export, None)], cancel=cancel)[0].checksum


def checksum_of_file(
    path: pathlib.Path, fmt: Format, size: int | None = None, *, cancel: Cancel | None = None
) -> str:
    """The checksum of the disk in an image, of its first SIZE bytes where SIZE is not None.

    QEMU's qemu-nbd reads the image, so this also proves that QEMU can. Errors: as ``copy``.
    """
    # Options, as a file's name alone could be taken for a protocol's; a comma is doubled in them.
    filename = str(path.absolute()).replace(",", ",,")
    options = f"driver={fmt},file.driver=file,file.filename={filename}"
    argv = ("qemu-nbd", "--read-only", "--image-opts", options)
    server = connection.Program(argv, f"image {path}")
    export = connection.Export(server, "")
    return copy([Job(export, None, size=size)], cancel=cancel)[0].checksum


class _Loop:
    """Waits for all connections at once, for what was stored, and for the cancel."""

    def __init__(self, cancel: Cancel) -> None:
        self._cancel = cancel
        self.stored = store.Wake()
        self._poll = select.poll()
        self._poll.register(cancel, select.POLLIN)
        self._poll.register(self.stored, select.POLLIN)
        self._connections: dict[int, connection.Connection] = {}
        self._masks: dict[int, int] = {}

    def connect(self, export: connection.Export) -> connection.Connection:
        """A connection that is past the handshake."""
        made = connection.Connection(export, CHUNK)
        self._connections[made.fileno()] = made
        while not made.ready:
            self.wait()
        made.negotiate()
        return made

    def run(self, disks: Sequence["_Disk"]) -> None:
        """Until all DISKS are copied."""
        by_connection = {id(c): disk for disk in disks for c in disk.connections}
        busy = list(disks)
        while busy := [disk for disk in busy if not disk.go_on()]:
            for one in self.wait():
                by_connection[id(one)].receive(one)

    def wait(self) -> list[connection.Connection]:
        """Sleep until somebody can go on; the connections that did. Errors: lost; cancelled."""
        for fd, one in self._connections.items():
            mask = one.mask()
            if self._masks.get(fd) != mask:
                self._poll.register(fd, mask)
                self._masks[fd] = mask
        moved = []
        for fd, event in self._poll.poll():
            if fd in self._connections:
                self._connections[fd].notify(event)
                moved.append(self._connections[fd])
            elif fd == self.stored.fileno():
                self.stored.clear()
        self._cancel.check()
        return moved

    def leave(self, one: connection.Connection) -> None:
        """Close the connection and wait for it no more."""
        fd = one.fileno()
        del self._connections[fd]
        if self._masks.pop(fd, None) is not None:
            self._poll.unregister(fd)
        one.close()

    def close(self) -> None:
        for one in self._connections.values():
            one.close()
        self._connections.clear()
        self.stored.close()


class _Disk:
    """One job under way: what is known and not read, what is in flight, where it goes."""

    def __init__(
        self, job: Job, index: int, buffers: int, loop: _Loop, progress: Progress | None
    ) -> None:
        self._job = job
        self._index = index
        self._loop = loop
        self._progress = progress
        first = loop.connect(job.export)
        self.connections = [first]
        if first.multi and buffers > 1:
            self.connections += [loop.connect(job.export) for _ in range(CONNECTIONS - 1)]
        self._size = first.size if job.size is None else job.size
        if self._size > first.size:
            reason = f"it has {first.size} bytes, expected {self._size}"
            raise connection.failed(job.export, "read", reason)
        self._left = self._size
        self._read = 0
        self._tree = checksum.Tree(self._size)
        self._allocation = extents.Allocation(first.size, checksum.BLOCK)
        self._asking = False
        self._todo: collections.deque[extents.Extent] = collections.deque()
        if not first.tells_allocation and self._size:
            self._todo.append(extents.Extent(0, self._size, extents.Kind.DATA))
        self._free = [store.Chunk(CHUNK) for _ in range(buffers)]
        self._finishing = False
        self.store = store.Store(_open(job, self._size), loop.stored)

    def begin(self) -> None:
        self.store.start()
        if self._progress is not None:
            self._progress.start(self._index, self._size)

    def go_on(self) -> bool:
        """Take back what is stored, put in flight what there are buffers for; whether all is done.

        Errors: what storing met.
        """
        for chunk in self.store.collect():
            self._tree.add(chunk.offset, chunk.length, chunk.digests)
            self._read += chunk.length
            self._advance(chunk.length)
            self._free.append(chunk)
        if self._left:
            self._fill()
        if not self._left and not self._finishing:
            self._finishing = True
            for one in self.connections:
                self._loop.leave(one)
            self.store.finish()
        return self.store.stored is not None

    def receive(self, one: connection.Connection) -> None:
        """Take what the connection brought."""
        for request in one.completed():
            chunk = request.chunk
            if chunk is None:
                self._learn(request)
                continue
            chunk.pending -= 1
            if not chunk.pending:
                self.store.put(chunk)

    def result(self) -> Result:
        """Of a disk that is done; its thread has ended when this returns."""
        self.store.join()
        assert self.store.stored is not None
        return Result(self._size, self._tree.hexdigest(), self._read, self.store.stored)

    def _fill(self) -> None:
        while True:
            self._ask()
            if not self._todo:
                return
            extent = self._todo[0]
            if extent.kind is not extents.Kind.DATA:
                self._todo.popleft()
                self._tree.add_zeroes(extent.offset, extent.length)
                self._advance(extent.length)
            elif self._free:
                self._start(self._free.pop(), self._next_piece())
            else:
                return

    def _ask(self) -> None:
        one = self.connections[0]
        if not one.tells_allocation or self._asking or self._allocation.complete:
            return
        if len(self._todo) < _LOOK_AHEAD:
            one.ask(*self._allocation.next_request())
            self._asking = True

    def _learn(self, request: connection.Request) -> None:
        self._asking = False
        try:
            if len(request.answers) != 1:
                raise extents.BadStatus(f"{len(request.answers)} answers")
            known = self._allocation.receive(request.offset, request.answers[0])
        except extents.BadStatus as failure:
            raise connection.failed(
                self._job.export, "read allocation of", str(failure), request.offset
            ) from failure
        self._todo.extend(extents.clip(known, self._size))

    def _next_piece(self) -> extents.Extent:
        """The first part of the first extent, up to the next border of a chunk."""
        extent = self._todo.popleft()
        end = min(extent.end, (extent.offset // CHUNK + 1) * CHUNK)
        if end < extent.end:
            self._todo.appendleft(extents.Extent(end, extent.end - end, extent.kind))
        return extents.Extent(extent.offset, end - extent.offset, extent.kind)

    def _start(self, chunk: store.Chunk, piece: extents.Extent) -> None:
        chunk.aim(piece.offset, piece.length)
        for offset, length in extents.split(piece, self.connections[0].most):
            one = min(self.connections, key=lambda c: c.load)
            one.read(chunk, offset, length)

    def _advance(self, count: int) -> None:
        self._left -= count
        if self._progress is not None:
            self._progress.advance(self._index, count)


def _open(job: Job, size: int) -> target.Target:
    if job.path is None:
        return target.Nowhere()
    return (target.Qcow2 if job.format == "qcow2" else target.Raw)(job.path, size)
