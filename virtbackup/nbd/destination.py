# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk put back into an export of an NBD server (``target.Target``).

What it had is overwritten, zeroes included, which are written so that they take no space where that
can be done; what is behind the disk's end stays.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import nbd

from virtbackup import errors
from virtbackup.nbd import connection, copy, device, extents, polling

_ZEROES = memoryview(bytes(1 << 20))
_MOST_ZEROES = 1 << 30
_MOST_DATA = 32 << 20
_MOST_STATUS = 1 << 31
_MOST_LOOKED_AT = 64 << 10
"""Bytes of data that are read to see whether they are zeroes. qemu-img writes up to 4 KiB of them
to a raw file that it creates."""
_POLL = 100
"""Milliseconds after which a wait looks whether it is still wanted."""
_IN_FLIGHT = 8


class Server:
    """An export of a running NBD server, by its URI. No wait outlives ``shorten``."""

    def __init__(
        self, uri: str, size: int, *, overwrite: bool, cancel: copy.Cancel | None = None
    ) -> None:
        """Errors: it has data, or may have, and that is not to be OVERWRITten."""
        self._uri = uri
        self._cancel = cancel
        self._size = size
        self._unwanted = False
        self._handle: Any = nbd.NBD()
        self._in_flight: dict[int, tuple[int, memoryview | None]] = {}
        """Cookie -> (offset, data, which stays as it is until it is written)."""
        self._flags = 0
        """Of each write."""
        with self._naming("connect to"):
            self._handle.set_pread_initialize(False)
            self._handle.add_meta_context(connection.ALLOCATION)
            self._handle.aio_connect_uri(uri)
            self._wait(lambda: not self._handle.aio_is_connecting())
            has = connection.size_of(self._handle)
            if has is None:
                raise self._failed("open", connection.TOO_LARGE)
            if self._handle.is_read_only():
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_FAILED, f"cannot write {uri}: it is read-only"
                )
            self._can_zero = self._handle.can_zero()
            self._can_flush: bool = self._handle.can_flush()
            if not self._can_flush and self._handle.can_fua():
                self._flags = nbd.CMD_FLAG_FUA
            self._least = max(1, self._handle.get_block_size(nbd.SIZE_MINIMUM))
            most = self._handle.get_block_size(nbd.SIZE_MAXIMUM) or _MOST_DATA
            self._most = max(self._least, min(most, _MOST_DATA) // self._least * self._least)
        if has < size:
            raise device.too_small(uri, has, size)
        self._has: int = has
        with self._naming("read allocation of"):
            self._blank = self._is_blank()
        if not (self._blank or overwrite):
            raise errors.error(
                libvirt.VIR_ERR_OPERATION_INVALID, f"{uri} has data; --force overwrites it"
            )

    @property
    def makes_durable(self) -> bool:
        """Whether the server can be told to put what it gets on its medium."""
        return self._can_flush or self._flags != 0

    def write(self, offset: int, data: memoryview) -> None:
        # The caller uses DATA for something else after this.
        copied = bytes(data) + self._behind(offset + len(data))
        view = memoryview(copied)
        for start in range(0, len(view), self._most):
            self._write(offset + start, view[start : start + self._most])

    def write_zeroes(self, offset: int, length: int) -> None:
        if self._blank:
            return
        if behind := self._behind(offset + length):
            # The block that the disk ends in is written as a whole.
            inside = (offset + length) % self._least
            length -= inside
            self._write(offset + length, memoryview(bytes(inside) + behind))
        most = _MOST_ZEROES if self._can_zero else min(self._most, len(_ZEROES))
        for start in range(0, length, most):
            count = min(most, length - start)
            if not self._can_zero:
                self._write(offset + start, _ZEROES[:count])
                continue
            with self._naming("write", offset + start):
                cookie = self._handle.aio_zero(count, offset + start, flags=self._flags)
            self._under_way(cookie, offset + start, None)

    def finish(self) -> int:
        with self._naming("write"):
            self._drain(0)
            if self._can_flush:
                cookie = self._handle.aio_flush()
                self._wait(lambda: self._handle.aio_command_completed(cookie))
            self._handle.aio_disconnect()
        self._handle = None
        return self._size

    def shorten(self) -> None:
        self._unwanted = True

    def discard(self) -> None:
        self._handle = None
        self._in_flight.clear()

    def _is_blank(self) -> bool:
        """Whether all of the export is zero, by what the server says; a little data is read. Not
        where it cannot say or read that, or says what cannot be: it may be overwritten all the
        same."""
        if not self._handle.can_meta_context(connection.ALLOCATION):
            return False
        try:
            return self._is_told_to_be_blank()
        except extents.BadStatus:  # which a newer libnbd finds first
            return False
        except nbd.Error:
            if not self._handle.aio_is_ready():  # the server is lost
                raise
            return False

    def _is_told_to_be_blank(self) -> bool:
        looked_at = 0
        answers: list[list[int]] = []

        def extent(name: str, _offset: int, entries: list[int], _error: object) -> int:
            if name == connection.ALLOCATION:
                answers.append(entries)
            return 0

        offset = 0
        while offset < self._has:
            count = min(_MOST_STATUS, self._has - offset)
            cookie = self._handle.aio_block_status(count, offset, extent)
            self._wait(lambda cookie=cookie: self._handle.aio_command_completed(cookie))  # type: ignore[misc]
            if not answers:
                return False
            known = list(extents.parse(answers.pop(), offset, self._has))
            answers.clear()
            for one in known:
                if one.kind is not extents.Kind.DATA:
                    continue
                looked_at += one.length
                if looked_at > _MOST_LOOKED_AT or any(self._read(one.offset, one.length)):
                    return False
            offset = known[-1].end
        return True

    def _lacking(self, end: int) -> int:
        """Bytes from END, the disk's own, to where the server takes a request to end."""
        least: int = self._least
        return min(-(-end // least) * least, self._has) - end

    def _behind(self, end: int) -> bytes:
        """What the server has from END, the disk's own, to where it takes a request to end."""
        lacking = self._lacking(end)
        if lacking == 0 or self._blank:
            return bytes(lacking)
        start = end // self._least * self._least
        with self._naming("read", start):
            return self._read(start, end + lacking - start)[end - start :]

    def _read(self, start: int, length: int) -> bytes:
        buffer = nbd.Buffer(length)
        cookie = self._handle.aio_pread(buffer, start)
        self._wait(lambda: self._handle.aio_command_completed(cookie))
        return bytes(buffer.to_bytearray())

    def _write(self, offset: int, data: memoryview) -> None:
        with self._naming("write", offset):
            cookie = self._handle.aio_pwrite(data, offset, flags=self._flags)
        self._under_way(cookie, offset, data)

    def _under_way(self, cookie: int, offset: int, data: memoryview | None) -> None:
        self._in_flight[cookie] = offset, data
        self._drain(_IN_FLIGHT - 1)

    def _drain(self, most: int) -> None:
        """Until MOST commands are in flight. Errors: one of them failed."""
        while len(self._in_flight) > most:
            with self._naming("write"):
                self._wait(lambda: self._handle.aio_peek_command_completed() != 0)
            while self._in_flight and (cookie := self._handle.aio_peek_command_completed()) > 0:
                offset, _ = self._in_flight[cookie]
                with self._naming("write", offset):
                    self._handle.aio_command_completed(cookie)
                del self._in_flight[cookie]

    def _wait(self, done: Callable[[], bool]) -> None:
        while not done():
            if self._unwanted:
                raise errors.error(libvirt.VIR_ERR_OPERATION_ABORTED, polling.CANCELLED)
            if self._cancel is not None:
                self._cancel.check()
            self._handle.poll(_POLL)

    @contextlib.contextmanager
    def _naming(self, what: str, offset: int | None = None) -> Iterator[None]:
        try:
            yield
        except nbd.Error as failure:
            # That a server wants TLS, libnbd tells in words alone.
            told = failure.errnum not in (0, errno.EOPNOTSUPP)
            reason = os.strerror(failure.errnum) if told else failure.string
            raise self._failed(what, reason, offset) from failure

    def _failed(self, what: str, reason: str, offset: int | None = None) -> errors.Error:
        place = "" if offset is None else f" at offset {offset}"
        return errors.error(
            libvirt.VIR_ERR_OPERATION_FAILED, f"cannot {what} {self._uri}{place}: {reason}"
        )
