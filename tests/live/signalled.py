# SPDX-License-Identifier: LGPL-2.1-or-later
"""virsh-backup, as a program of its own, that gets a signal as a line goes over its monitor.

It sends that itself: who reads a trace, and sends one at a line of it, comes when all is over where
nothing lets him run for a moment.
"""

import os
import signal
import sys

from virtbackup.qemu import monitor
from virtbackup.tools import virsh_backup


def program(number: int, at: int | str) -> list[str]:
    """The beginning of a command line. AT: which line, or what is in the first one."""
    return [sys.executable, "-m", "tests.live.signalled", str(int(number)), str(at)]


def main(number: int, at: str) -> int:
    note, count, is_struck = monitor.Lines.note, 0, False

    def strike(self: monitor.Lines, direction: str, line: bytes | str) -> None:
        nonlocal count, is_struck
        note(self, direction, line)
        count += 1
        text = line if isinstance(line, str) else line.decode(errors="replace")
        if not is_struck and (count == int(at) if at.isdigit() else at in text):
            is_struck = True
            os.kill(os.getpid(), number)

    monitor.Lines.note = strike  # type: ignore[method-assign]
    return virsh_backup.main()


if __name__ == "__main__":
    _number, _at = sys.argv[1:3]
    del sys.argv[1:3]
    sys.exit(main(signal.Signals(int(_number)), _at))
