# SPDX-License-Identifier: LGPL-2.1-or-later
"""The second half of a copy: what was received is hashed and written, in a thread for each disk.

With receiving and storing in one thread, a copy took a third longer; more threads than this won
nothing.
"""

import collections
import os
import queue
import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

from virtbackup import errors
from virtbackup.nbd import checksum, target, view

T = TypeVar("T")


class Chunk:
    """A buffer of SPACE bytes on its way to WHERE: which PIECES of the disk it has, as (offset,
    length).

    The pieces are in order, and no more than SPACE is from the first one's start to the last one's
    end. Or it says of one piece that all of it is ZERO, which may be more than it has space for.
    Where only a part of what it has is wanted, SHOWN says which, as (start, end) in order.
    """

    def __init__(self, space: int, where: target.Target) -> None:
        self._memory = target.memory(where, space)
        self.pieces: Sequence[tuple[int, int]] = ()
        self.shown: Sequence[tuple[int, int]] | None = None
        self.zero = False
        self.pending = 0
        """Reads of it that are in flight."""
        self.digests: Sequence[bytes] = ()
        """Of each piece's blocks, once it is stored."""

    def aim(
        self,
        pieces: Sequence[tuple[int, int]],
        *,
        shown: Sequence[tuple[int, int]] | None = None,
        zero: bool = False,
    ) -> None:
        self.pieces, self.shown, self.zero = pieces, shown, zero

    def part(self, offset: int, length: int) -> memoryview:
        """Where LENGTH bytes at OFFSET of the disk go."""
        start = offset - self.pieces[0][0]
        return self._memory[start : start + length]


class Wake:
    """Something to poll for: set by any thread or signal handler, cleared by the one that polls."""

    def __init__(self) -> None:
        """Errors: VIR_ERR_SYSTEM_ERROR where no more files may be open."""
        try:
            self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as failure:
            raise errors.system_error(failure, "cannot make an eventfd to wait for") from failure
        self._pending = False

    def set(self) -> None:
        if not self._pending:
            self._pending = True
            os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Not for one that is not set. What was done before ``set`` is seen after this."""
        os.eventfd_read(self._fd)
        self._pending = False

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


class Inbox(Generic[T]):
    """What the thread of a target is to do, in order. A target that writes while the thread waits
    goes on meanwhile."""

    def __init__(self, where: target.Target) -> None:
        self._where = where if isinstance(where, target.Asynchronous) else None
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._wake = Wake() if self._where is not None else None

    def put(self, what: T) -> None:
        self._queue.put(what)
        if self._wake is not None:
            self._wake.set()

    def get(self) -> T:
        """Sleep until there is something. Errors: the target's."""
        if self._where is None or self._wake is None:
            return self._queue.get()
        while True:
            try:
                return self._queue.get_nowait()
            except queue.Empty:
                pass
            self._where.wait(self._wake)

    def close(self) -> None:
        """For good; a second time does nothing."""
        wake, self._wake = self._wake, None
        if wake is not None:
            wake.close()


class Store(threading.Thread):
    """Stores the chunks of one disk in a target that is its own from here on."""

    def __init__(self, where: target.Target, wake: Wake) -> None:
        super().__init__(name="virtbackup-store", daemon=True)
        self._target = where
        self._wake = wake
        self._inbox: Inbox[Chunk | None] = Inbox(where)
        self._done: collections.deque[Chunk] = collections.deque()
        self._failure: BaseException | None = None
        self._abandoned = False
        self.stored: int | None = None
        """Bytes that the target takes; None until it is finished."""

    def put(self, chunk: Chunk) -> None:
        """Store CHUNK; it is not to be touched until ``collect`` gives it back."""
        self._inbox.put(chunk)

    def finish(self) -> None:
        """After the last chunk: make the target durable, then wake and set ``stored``."""
        self._inbox.put(None)

    def collect(self) -> list[Chunk]:
        """The chunks that were stored since. Errors: what storing met, as the target raised it."""
        if self._failure is not None:
            raise self._failure
        return [self._done.popleft() for _ in range(len(self._done))]

    def abandon(self) -> None:
        """End the thread, whatever it does, and remove the target, finished or not."""
        self._abandoned = True
        self._inbox.put(None)
        self._target.shorten()
        self.close()
        self._target.discard()

    def close(self) -> None:
        """Wait for the thread, which was told to end."""
        if self.is_alive():
            self.join()
        self._inbox.close()

    def run(self) -> None:
        try:
            if isinstance(self._target, target.Asynchronous):
                self._target.begin()
            while (chunk := self._inbox.get()) is not None:
                if not self._abandoned:
                    self._store(chunk)
            if not self._abandoned:
                self.stored = self._target.finish()
        except BaseException as failure:  # noqa: BLE001  (raised again, by collect)
            self._failure = failure
        finally:
            self._wake.set()

    def _store(self, chunk: Chunk) -> None:
        if chunk.zero:
            for offset, length in chunk.pieces:
                self._target.write_zeroes(offset, length)
        else:
            chunk.digests = [self._store_piece(chunk, *piece) for piece in chunk.pieces]
        target.after(self._target, lambda: self._give_back(chunk))

    def _give_back(self, chunk: Chunk) -> None:
        self._done.append(chunk)
        self._wake.set()

    def _store_piece(self, chunk: Chunk, offset: int, length: int) -> bytes:
        """The digests of its blocks."""
        data = chunk.part(offset, length)
        digests, runs = checksum.scan(data)
        written = [(offset + start, offset + end) for start, end in runs]
        if chunk.shown is None:
            self._write(offset, offset + length, written, offset, data)
        else:
            for start, end in chunk.shown:
                self._write(start, end, view.cut(written, start, end), offset, data)
        return digests

    def _write(
        self,
        start: int,
        end: int,
        runs: Sequence[tuple[int, int]],
        offset: int,
        data: memoryview,
    ) -> None:
        """From START to END: RUNS of DATA, which is at OFFSET, and zeroes."""
        for first, last in runs:
            self._zeroes(start, first)
            self._target.write(first, data[first - offset : last - offset])
            start = last
        self._zeroes(start, end)

    def _zeroes(self, start: int, end: int) -> None:
        if start < end:
            self._target.write_zeroes(start, end - start)
