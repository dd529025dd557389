# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups of a real Linux guest that writes to two disks all the time, in one order.

The guest does write N to vda, and when it is done to sda, so in anything that is of one instant
their newest records differ by 0 or 1, and every other byte follows from these two numbers.
"""

import pathlib
import subprocess

import pytest

import virtbackup
from demo import guest, judge, records
from tests import conftest

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "nbdcopy")

ROUNDS = 8 if conftest.long() else 1


def read(socket: pathlib.Path, disk: records.Disk, copy: pathlib.Path) -> pathlib.Path:
    """The whole export of DISK, read by a client that is not ours."""
    subprocess.run(["nbdcopy", f"nbd+unix:///{disk.name}?socket={socket}", copy], check=True)
    return copy


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_all_disks_are_of_one_instant(linux: guest.Guest, turn: int) -> None:
    directory = linux.directory
    socket = directory / "backup.sock"
    before = linux.report.number
    with virtbackup.open(linux.uri) as connection:
        domain = connection.lookupByName(guest.NAME)
        domain.backupStart(f'<domainbackup><address type="unix" path="{socket}"/></domainbackup>')
        try:
            started = linux.wait_for_report().number
            copies = [read(socket, disk, directory / disk.name) for disk in records.DISKS]
            again = [read(socket, disk, directory / "again") for disk in records.DISKS[:1]]
        finally:
            domain.backupStop()
    pulled = linux.wait_for_report().number
    verdicts = [judge.examine(disk, copy) for disk, copy in zip(records.DISKS, copies, strict=True)]
    assert judge.together(verdicts) == ()
    assert judge.first_difference(copies[0], again[0]) is None
    assert before <= verdicts[0].newest <= started
    assert pulled > started, "the guest wrote nothing while it was read"
