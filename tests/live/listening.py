# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hearing what a driver tells of its domains, in a process of its own (event_printer)."""

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tests import waiting

DEADLINE = waiting.DEADLINE


class Listener:
    """One process that listens."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ahead: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put("end")

    def has_heard(self, timeout: float) -> bool:
        """Whether there is a line within TIMEOUT seconds; it stays the next one."""
        if not self._ahead:
            with contextlib.suppress(queue.Empty):
                self._ahead.append(self._lines.get(timeout=timeout))
        return bool(self._ahead)

    def line(self) -> str:
        """The next line, as it comes."""
        return self._ahead.pop() if self._ahead else self._lines.get(timeout=DEADLINE)

    def next(self, kind: str) -> list[Any]:
        """The next event of a KIND, without that; those of the other are passed over."""
        while True:
            event: list[Any] = json.loads(self.line())
            if event[0] == kind:
                return event[1:]

    def is_silent_after(self, command: str, answer: str) -> None:
        """Send COMMAND, to which ANSWER must be the next line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        assert self.line() == answer

    def close(self) -> list[str]:
        """What was said and not asked for."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(DEADLINE) == 0
        rest = []
        while (line := self.line()) != "end":
            rest.append(line)
        return rest

    def kill(self) -> None:
        """End it, and the reading of what it says."""
        self._process.kill()
        self._reader.join(DEADLINE)


@contextlib.contextmanager
def listening(uri: str, *options: str) -> Iterator[Listener]:
    """Who listens at URI."""
    argv = [sys.executable, "-m", "tests.live.event_printer", uri, *options]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        listener = Listener(process)
        try:
            assert listener.line() == "ready"
            yield listener
        finally:
            listener.kill()
