# SPDX-License-Identifier: LGPL-2.1-or-later
"""Documents of libvirt's own dialect started on a real QEMU, as they are and through the shell."""

import pathlib
import subprocess
import sys

import pytest

import virtbackup
from tests.live import machines, nbdclient

pytestmark = pytest.mark.needs("qemu-system-x86_64", "nbdcopy", "nbdinfo")

WRITTEN = 1 << 20, 70 << 10
"""Offset and length, bytes."""


def _native(directory: pathlib.Path, disk: str, before: str = "") -> str:
    return f"""<domainbackup mode='pull'>
      {before}<server transport='unix' socket='{directory}/nbd.sock'/>
      <disks>
        {disk}
      </disks>
    </domainbackup>"""


def test_a_full_backup_of_one_disk(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        machine.io("sdb", "write -P 5 {} {}".format(*WRITTEN))
        dom = conn.lookupByID(1)
        before = machine.state()
        scratch = tmp_path / "scratch.qcow2"
        disk = f"<disk name='sdb' exportname='b'><scratch file='{scratch}'/></disk>"
        dom.backupStart(_native(tmp_path, disk))
        assert scratch.exists()
        machine.io("sdb", "write -P 9 0 4M")
        assert list(nbdclient.exports(tmp_path / "nbd.sock")) == ["b"]
        content = nbdclient.read(tmp_path / "nbd.sock", "b")
        start, length = WRITTEN
        assert content.strip(b"\0") == b"\5" * length
        assert content.index(5) == start
        dom.backupStop()
        assert machine.state() == before
        assert not scratch.exists()


def test_an_incremental_backup(tmp_path: pathlib.Path) -> None:
    """The checkpoint is the branch; what has changed is told under the branch's name."""
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        address = f'<address type="unix" path="{tmp_path}/nbd.sock"/>'
        dom.backupStart(f'<domainbackup>{address}<branch name="nightly"/></domainbackup>')
        dom.backupStop()
        machine.io("vda", "write -P 5 1M 64k")
        disk = "<disk name='vda' exportbitmap='nightly'/>"
        dom.backupStart(_native(tmp_path, disk, "<incremental>nightly</incremental>"))
        changed = nbdclient.changed(tmp_path / "nbd.sock", "vda", "nightly")
        assert changed == [(1 << 20, 64 << 10)]
        info = dom.backupGetInfo()
        assert [(found.name, found.type) for found in info.disks] == [("vda", "incremental")]
        assert info.branch == "nightly"
        dom.backupStop()


def test_the_shell_translates_and_starts_both(tmp_path: pathlib.Path) -> None:
    """A document and its translation, fed back to the shell, are one backup."""
    with machines.two_disks(tmp_path) as machine:

        def shell(*words: str, text: str = "") -> str:
            done = subprocess.run(
                [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-q", "-c", machine.uri,
                 *words],
                input=text, capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        native = _native(tmp_path, "<disk name='sdb' exportname='x'/>")
        proposal = shell("translate", "-", "--to", "proposal", "--domain", "1", text=native)
        running = []
        for document in (native, proposal):
            shell("backup-start", "1", "-", text=document)
            running.append(shell("backup-dumpxml", "1"))
            shell("backup-stop", "1")
        assert running[0] == running[1]
        assert '<disk name="vda" present="no"/>' in running[0]
