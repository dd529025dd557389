# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups of a real Linux guest that writes to two disks all the time, in one order.

The guest does write N to vda, and when it is done to sda, so in anything that is of one instant
their newest records differ by 0 or 1, and every other byte follows from these two numbers.
"""

import pathlib
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

import virtbackup
from demo import guest, judge, kernel, records
from tests.live import machines

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img", "nbdcopy")

ROUNDS = 4


@pytest.fixture(scope="module")
def running() -> Iterator[guest.Guest]:
    """A guest that has overwritten all of vda at least once."""
    with tempfile.TemporaryDirectory(prefix="vb-guest-", dir="/var/tmp") as name:
        try:
            machine = guest.start(pathlib.Path(name), machines.INTO_ROOT)
        except kernel.Unavailable as error:
            pytest.skip(f"no kernel for the guest: {error}")
        with machine:
            machine.wait_for_number(records.DISKS[0].slots)
            yield machine


def read(socket: pathlib.Path, disk: records.Disk, copy: pathlib.Path) -> pathlib.Path:
    """The whole export of DISK, read by a client that is not ours."""
    subprocess.run(["nbdcopy", f"nbd+unix:///{disk.name}?socket={socket}", copy], check=True)
    return copy


@pytest.mark.parametrize("turn", range(ROUNDS))
def test_all_disks_are_of_one_instant(running: guest.Guest, turn: int) -> None:
    directory = running.directory
    socket = directory / "backup.sock"
    before = running.report.number
    with virtbackup.open(running.uri) as connection:
        domain = connection.lookupByName(guest.NAME)
        domain.backupStart(f'<domainbackup><address type="unix" path="{socket}"/></domainbackup>')
        try:
            started = running.wait_for_report().number
            copies = [read(socket, disk, directory / disk.name) for disk in records.DISKS]
            again = [read(socket, disk, directory / "again") for disk in records.DISKS[:1]]
        finally:
            domain.backupStop()
    pulled = running.wait_for_report().number
    verdicts = [judge.examine(disk, copy) for disk, copy in zip(records.DISKS, copies, strict=True)]
    assert judge.together(verdicts) == ()
    assert judge.first_difference(copies[0], again[0]) is None
    assert before <= verdicts[0].newest <= started
    assert pulled > started, "the guest wrote nothing while it was read"
