# SPDX-License-Identifier: LGPL-2.1-or-later
"""virtbackupd, as a program."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def daemon(socket: pathlib.Path, *uris: str, log: pathlib.Path) -> Iterator[int]:
    """A virtbackupd that serves URIS; its pid."""
    argv = [sys.executable, "-m", "virtbackup.tools.virtbackupd", "-v", "--listen"]
    argv += [f"unix:{socket}", *(word for uri in uris for word in ("--uri", uri))]
    with log.open("ab") as output:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=output)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        assert line.startswith("virtbackupd: listening on "), log.read_text()
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()
    assert process.returncode == 0, log.read_text()
