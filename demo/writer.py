# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only program of the guest: writes records to all disks, for ever, past every cache.

Once it has written everywhere it leaves the processor to others now and then: a guest that does
not, where it is emulated, is all that one processor of the host does.
Five times a second it says on the console which write was done last on all disks, and how long
the slowest write took since it last said so: ``wrote NUMBER slowest MICROSECONDS``.
"""

import mmap
import os
import time

from demo import records

REPORT_EVERY = 0.2
PAUSE = 0.002


def main() -> None:
    """Write until the machine is switched off."""
    targets = [(disk, _open(disk), mmap.mmap(-1, disk.record)) for disk in records.DISKS]
    number, slowest, reported = 0, 0.0, time.monotonic()
    print("writing", flush=True)
    while True:
        number += 1
        for disk, file, buffer in targets:
            slot = disk.slot(number)
            buffer[:] = disk.content(number, slot)
            before = time.monotonic()
            os.pwritev(file, [buffer], slot * disk.record)
            after = time.monotonic()
            slowest = max(slowest, after - before)
        if after - reported >= REPORT_EVERY:
            print(f"wrote {number} slowest {slowest * 1e6:.0f}", flush=True)
            slowest, reported = 0.0, after
        if number > records.DISKS[0].slots:
            time.sleep(PAUSE)


def _open(disk: records.Disk) -> int:
    return os.open(f"/dev/{disk.name}", os.O_RDWR | os.O_DIRECT)
