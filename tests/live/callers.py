# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of ours, each in a process of its own that a test may kill: forked off one that has
imported everything, so that a hundred of them take no time.

    python -m tests.live.callers [URI]

That one reads a line of JSON for each call: [URI, METHOD, ARGUMENT...] of the only domain there, or
["virsh-backup", WORD...]. It prints the pid of the process that is to make it and has stopped by
SIGSTOP; and, once that has gone on, how it ended. With URI it connects there at once, and calls for
no URI are made on that connection.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback

import virtbackup
from tests import waiting
from tests.live import proxy
from virtbackup.tools import virsh_backup

REFUSED = 1
"""How a call ends that raises ``virtbackup.Error``."""


class Caller:
    """Makes calls, one at a time."""

    def __init__(self, uri: str = "") -> None:
        """Calls for no URI of their own go there."""
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (``close`` does)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.live.callers", uri],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
        )  # fmt: skip
        self._begun: int | None = None

    def begin(self, *call: str) -> int:
        """The pid of a process that makes CALL, as the module has it, once it may go on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(call)}\n")
        self._process.stdin.flush()
        self._begun = int(self._line())
        return self._begun

    def end(self) -> int:
        """The exit status of the process that was begun last, negative for a signal."""
        status = int(self._line())
        self._begun = None
        return status

    def spoilt(self, between: proxy.Proxy, spoil: tuple[int, proxy.Fault], *call: str) -> int:
        """Make CALL with a fault of the proxy's, which may kill its process; how it ended,
        done or killed."""
        pid = self.begin(*call)
        between.kill_client = lambda: os.kill(pid, signal.SIGKILL)
        between.arm(*spoil)
        os.kill(pid, signal.SIGCONT)
        status = self.end()
        assert status in (0, -signal.SIGKILL), (spoil, between.spoilt)
        return status

    def close(self) -> None:
        """Nothing that was called may have had a traceback."""
        with self._said:
            if self._begun is not None:
                os.kill(self._begun, signal.SIGKILL)
            self._process.communicate(timeout=waiting.DEADLINE)
            self._said.seek(0)
            said = self._said.read()
        assert "Traceback" not in said, said

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def _call(known: virtbackup.Domain | None, first: str, *words: str) -> int:
    if first == "virsh-backup":
        os.dup2(2, 1)
        with open(os.devnull) as nothing:  # noqa: PTH123  (no path, a device)
            sys.stdin = nothing
            return virsh_backup.main(words)
    method, *arguments = words
    try:
        getattr(known if not first else _domain(first), method)(*arguments)
    except virtbackup.Error:
        return REFUSED
    return 0


def _domain(uri: str) -> virtbackup.Domain:
    [domain] = virtbackup.open(uri).listAllDomains()
    return domain


def main(uri: str = "") -> None:
    importlib.import_module("virtbackup.tools.pull")  # as the command would
    known = _domain(uri) if uri else None
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            try:
                os._exit(_call(known, *json.loads(line)))
            except BaseException:  # noqa: BLE001  (seen in ``Caller.close``)
                traceback.print_exc()
                os._exit(2)
        os.waitpid(pid, os.WUNTRACED)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
