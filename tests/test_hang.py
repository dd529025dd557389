# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a file system answers, and whether a process waits for a file."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from virtbackup.qemu import hang


@contextlib.contextmanager
def reader_of(fifo: pathlib.Path) -> Iterator[int]:
    """A process that waits in read(2) of FIFO, by pid."""
    os.mkfifo(fifo)
    code = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); print(flush=True); os.read(fd, 1)"
    argv = [sys.executable, "-c", code, str(fifo)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_file_system_that_answers_and_one_that_is_not_there(tmp_path: pathlib.Path) -> None:
    start = time.monotonic()
    assert hang.hanging({str(tmp_path), str(tmp_path / "none")}, (), os.getpid(), 60) == set()
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("nameless", [False, True])
def test_a_process_that_waits_for_a_file(tmp_path: pathlib.Path, nameless: bool) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    other.mkdir()
    fifo = here / "fifo"
    with reader_of(fifo) as pid:
        files = [] if nameless else [str(fifo)]
        if nameless:
            fifo.unlink()
        while hang.hanging([str(here), str(other)], files, pid, 0.05) != {str(here)}:
            pass  # it has not come to read yet; the test's own time limit applies
        assert hang.hanging([str(other)], files, pid, 0.05) == set()
        if not nameless:
            assert hang.hanging([str(here)], [], pid, 0.05) == set()


def test_another_process_closes_last(tmp_path: pathlib.Path) -> None:
    """As long as it is needed; then there is no such process any more."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        path.unlink()
        fd = os.dup(file.fileno())
        status = pathlib.Path(f"/proc/self/fd/{fd}")
        with hang.closed_by_another(os.getpid()):
            keeper = files_of_children()
            assert str(status.readlink()) in keeper
        os.close(fd)
    assert not files_of_children()


def files_of_children() -> set[str]:
    """The nameless files of our children."""
    found = set()
    children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        for entry in pathlib.Path(f"/proc/{child}/fd").iterdir():
            if (name := str(entry.readlink())).endswith("(deleted)"):
                found.add(name)
    return found
