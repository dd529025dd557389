# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding out whether a scratch image's file system hangs, without anybody hanging with it.

A guest's write that has to save old data waits for the scratch image as long as that takes. QEMU's
main loop does not, until it is told to do something that looks at the image, waits for all requests
or closes the image: ``query-named-block-nodes``, ``job-cancel``, ``block-export-del``,
``blockdev-del``. Then all of the guest stands still. So before anything of the kind the file system
is asked, from outside, and what a close waits for is left to others.
"""

import contextlib
import os
import pathlib
import subprocess
import time
from collections.abc import Collection, Iterator

_LOOK_AGAIN = 0.002
_CLOSING = 2.0
"""Seconds to wait for a file to be closed."""
_NAMELESS = " (deleted)"
"""How proc(5) marks files without a name."""

_pending: dict[str, subprocess.Popen[bytes]] = {}
"""Directory -> who still waits for its file system: nobody else needs to."""
_keepers: list[subprocess.Popen[bytes]] = []
"""Processes that wait to close a file."""


class Question:
    """Whether the file systems of directories answer; asked at once, for the answer to be there
    when it is wanted."""

    def __init__(self, directories: Collection[str]) -> None:
        self._asked = {name: asked for name in directories if (asked := _ask(name)) is not None}

    def unanswered(self, directories: Collection[str], end: float) -> frozenset[str]:
        """Those of DIRECTORIES without an answer at END, by the monotonic clock."""
        asked = {name: one for name, one in self._asked.items() if name in directories}
        while pending := {name for name, one in asked.items() if one.poll() is None}:
            if time.monotonic() > end:
                break
            time.sleep(_LOOK_AGAIN)
        for name in pending:
            _pending[name] = self._asked[name]
            self._asked[name].kill()  # heeded once the file system lets it
        return frozenset(pending)


def hanging(
    directories: Collection[str], files: Collection[str], pid: int | None, limit: float
) -> frozenset[str]:
    """Those of DIRECTORIES whose file system does not answer within LIMIT seconds, or in which a
    request of process PID is under way for that long: for a file without a name, or one of FILES.

    All names are free of symbolic links. Where nothing hangs this takes a few milliseconds.
    """
    end = time.monotonic() + limit
    question = Question(directories)
    under_way = {} if pid is None else _requests(pid, directories, files)
    found = question.unanswered(directories, end)
    while under_way := {
        thread: was for thread, was in under_way.items() if _call(thread) == was[0]
    }:
        if time.monotonic() > end:
            break
        time.sleep(_LOOK_AGAIN)
    return found | {directory for _, directory in under_way.values()}


def _ask(directory: str) -> "subprocess.Popen[bytes] | None":
    """Have another process change the directory's access time: a file system that is frozen, too,
    answers only what changes nothing. A process that hangs in it may not be to be killed."""
    pending = _pending.pop(directory, None)
    if pending is not None and pending.poll() is None:
        return pending
    with contextlib.suppress(FileNotFoundError):
        return subprocess.Popen(
            ["touch", "-c", "-a", "--", directory],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    return None


@contextlib.contextmanager
def closed_by_another(pid: int | None) -> Iterator[None]:
    """Keep process PID from being the last to close its files without a name.

    Who is waits for what is still being written to the file, and for its blocks to be freed. So
    that is another process, when this ends; it may outlive us.
    """
    fds = []
    for entry, _ in [] if pid is None else _files(pid, ()):
        with contextlib.suppress(OSError):
            fds.append(os.open(entry, os.O_PATH | os.O_CLOEXEC))
    if not fds:
        yield
        return
    keeper = subprocess.Popen(
        ["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=fds,
    )  # fmt: skip
    for fd in fds:
        os.close(fd)
    try:
        yield
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            keeper.communicate(timeout=_CLOSING)
        _keepers[:] = [one for one in (*_keepers, keeper) if one.poll() is None]


def _files(pid: int, files: Collection[str]) -> Iterator[tuple[pathlib.Path, str]]:
    """Descriptors of process PID, as proc(5) has them, that are of a file without a name or of one
    of FILES, and the file's last name. None where ptrace(2) is not allowed us."""
    with contextlib.suppress(OSError):
        for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = str(entry.readlink())
                if name.endswith(_NAMELESS) or name in files:
                    yield entry, name


def _requests(
    pid: int, directories: Collection[str], files: Collection[str]
) -> dict[pathlib.Path, tuple[list[str], str]]:
    """Thread of process PID -> (the system call it is in, the directory of the file it is for).

    Empty where ptrace(2) is not allowed us.
    """
    opened = {}
    for entry, name in _files(pid, files):
        directory = str(pathlib.Path(name).parent)
        if directory in directories:
            opened[int(entry.name)] = directory
    if not opened:
        return {}
    found = {}
    with contextlib.suppress(OSError):
        for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
            call = _call(thread)
            # Its number and first argument; a thread that runs has neither.
            if len(call) > 1 and (place := opened.get(int(call[1], 16))):
                found[thread] = (call, place)
    return found


def _call(thread: pathlib.Path) -> list[str]:
    """The system call that a thread is in, as proc(5)'s ``syscall`` has it."""
    try:
        return (thread / "syscall").read_text().split()
    except OSError:
        return []
