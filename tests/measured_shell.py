# SPDX-License-Identifier: LGPL-2.1-or-later
"""As a program: virsh-backup, less patient, telling how much memory it took.

python tests/measured_shell.py SECONDS FILE ARG...

Runs ``virsh-backup ARG...``, waits SECONDS for what it waits for a minute otherwise, and writes its
peak of resident memory to FILE, in KiB.
"""

import pathlib
import re
import sys

from virtbackup.qemu import monitor
from virtbackup.tools import virsh_backup


def main(seconds: str, file: str, *argv: str) -> int:
    monitor.CONNECT_TIMEOUT = monitor.REPLY_TIMEOUT = float(seconds)
    status = virsh_backup.main(argv)
    # Not getrusage(2): its peak is that of the process before exec, too.
    found = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found
    pathlib.Path(file).write_text(found[1])
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
