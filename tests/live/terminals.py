# SPDX-License-Identifier: LGPL-2.1-or-later
"""What programs show on a terminal."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from typing import Literal


def shown(
    argv: Sequence[str],
    stream: Literal["stdout", "stderr"] = "stdout",
    env: Mapping[str, str] | None = None,
) -> tuple[bytes, bytes]:
    """What ARGV, which has to succeed, writes to STREAM, a terminal of 80 columns, and to the other
    one, which is none."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    on = stream == "stdout"
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, env=env,
        stdout=theirs if on else subprocess.PIPE, stderr=subprocess.PIPE if on else theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(ours, 65536):
                seen += part
        os.close(ours)
        said = process.communicate(timeout=60)
    assert process.returncode == 0, (seen, said)
    return seen, said[1] if on else said[0]
