# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs on terminals: what they show, and those that are typed into."""

import codecs
import contextlib
import fcntl
import os
import pathlib
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from tests import waiting


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


class Terminal:
    """A program on a terminal of its own that is typed into."""

    def __init__(self, argv: Sequence[str], home: pathlib.Path, env: Mapping[str, str]) -> None:
        """ENV is beside what every program has."""
        self.master, slave = pty.openpty()
        environment = {"TERM": "dumb", "INPUTRC": "/dev/null", "COLUMNS": "200", **env}
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, cwd=home, start_new_session=True,
            env={**os.environ, "HOME": str(home), **environment}, preexec_fn=_take,
        )  # fmt: skip
        os.close(slave)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str) -> str:
        """What comes up to TEXT and with it."""
        end = time.monotonic() + waiting.DEADLINE
        while text not in self.seen:
            if not self.comes_within(end - time.monotonic()):
                raise AssertionError(f"no {text!r} in {self.seen!r}")
        before, self.seen = self.seen.split(text, 1)
        return before + text

    def comes_within(self, timeout: float) -> bool:
        """Whether something comes within TIMEOUT seconds, which is seen then."""
        if timeout < 0 or not select.select([self.master], [], [], timeout)[0]:
            return False
        self.seen += self._decoder.decode(os.read(self.master, 4096))
        self.seen = self.seen.replace("\r\n", "\n")
        return True

    def insist(self, key: str, text: str) -> None:
        """Press KEY until TEXT comes: twice at once may be once, for a signal."""
        end = time.monotonic() + waiting.DEADLINE
        while text not in self.seen and time.monotonic() < end:
            self.type(key)
            while self.comes_within(0.05):
                pass
        self.wait_for(text)


def _take() -> None:
    """Make standard input the controlling terminal, for Ctrl-C."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
