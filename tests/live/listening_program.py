# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that starts a backup of a libvirt domain and stays, with an event loop or without.

    python -m tests.live.listening_program URI DOMAIN SOCKET LOOP WAY

A program has one event loop of libvirt's for good, so the tests have this one to themselves. LOOP
is ``default``, ``asyncio``, ``idle`` (one that nobody runs) or ``none``; WAY is ``open`` or
``install``, the drop-in. For each line on its input, a Python expression, it prints what that is.
"""

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import libvirt

import virtbackup
from tests import waiting
from virtbackup import extend
from virtbackup.qemu import libvirt_driver, lifecycle


class Program:
    """What the expressions see as ``p``."""

    def __init__(self, uri: str, name: str, socket: str, way: str) -> None:
        self._threads = threading.active_count()
        self._xml = f'<domainbackup><address type="unix" path="{socket}"/></domainbackup>'
        self.ended: list[tuple[str, str]] = []
        """What the driver told of the ends of its backups."""
        init = libvirt_driver.LibvirtDriver.__init__

        def told(driver: libvirt_driver.LibvirtDriver, *args: Any, **options: Any) -> None:
            init(driver, *args, **options)
            driver.backup_ended = lambda uuid, reason: self.ended.append((uuid, reason))

        libvirt_driver.LibvirtDriver.__init__ = told  # type: ignore[method-assign, assignment]
        self.connection: Any
        if way == "install":
            extend.install(libvirt)
            self.connection = libvirt.open(uri)
        else:
            self.connection = virtbackup.open(uri)
        self.domain = self.connection.lookupByName(name)

    def start(self, branch: str = "") -> None:
        more = f'<branch name="{branch}"/><disks><disk name="vda" type="auto"/></disks>'
        end = "</domainbackup>"
        self.domain.backupStart(self._xml.replace(end, more + end) if branch else self._xml)

    def stop(self) -> str:
        """What the stop says."""
        try:
            self.domain.backupStop()
        except libvirt.libvirtError as failure:
            return str(failure)
        return "good"

    def next_end(self) -> str:
        """What the driver tells next."""
        waiting.until(lambda: self.ended)
        return self.ended.pop()[1]

    def listens(self) -> int:
        """How many listen."""
        return sum(hearing.listens for hearing in _hearings)

    def threads(self) -> int:
        """How many there are more than at first."""
        return threading.active_count() - self._threads

    def close(self) -> int:
        """libvirt's number of references that are left; None where that is not told."""
        del self.domain
        code: int = self.connection.close()
        return code

    def uninstall(self) -> None:
        extend.uninstall(libvirt)


_hearings: list[lifecycle.Hearing] = []


def _noting_hearings() -> None:
    init = lifecycle.Hearing.__init__

    def noted(hearing: lifecycle.Hearing) -> None:
        init(hearing)
        _hearings.append(hearing)

    lifecycle.Hearing.__init__ = noted  # type: ignore[method-assign, assignment]


def _print(_: object, error: Any) -> None:
    """What libvirt would print of every error, of those that have to do with events."""
    if "event" in str(error[2]):
        print(error[2], file=sys.stderr)


def _serve(program: Program) -> None:
    for line in sys.stdin:
        print(repr(eval(line, {"p": program})), flush=True)


def _make(argv: list[str]) -> Program:
    return Program(argv[0], argv[1], argv[2], argv[4])


@contextlib.contextmanager
def _default_loop() -> Iterator[None]:
    libvirt.virEventRegisterDefaultImpl()
    stop = threading.Event()
    timer = libvirt.virEventAddTimeout(-1, lambda *_: None, None)

    def run() -> None:
        while not stop.is_set():
            libvirt.virEventRunDefaultImpl()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        libvirt.virEventUpdateTimeout(timer, 0)
        thread.join()


async def _in_asyncio(work: Callable[[], None]) -> None:
    import libvirtaio

    libvirtaio.virEventRegisterAsyncIOImpl()
    await asyncio.get_running_loop().run_in_executor(None, work)


def main(argv: list[str]) -> None:
    logging.disable(logging.WARNING)
    libvirt.registerErrorHandler(_print, None)
    _noting_hearings()

    def work() -> None:
        _serve(_make(argv))

    match argv[3]:
        case "default":
            with _default_loop():
                work()
        case "asyncio":
            asyncio.run(_in_asyncio(work))
        case "idle":
            libvirt.virEventRegisterDefaultImpl()
            work()
        case "none":
            work()


if __name__ == "__main__":
    main(sys.argv[1:])
