# SPDX-License-Identifier: LGPL-2.1-or-later
"""A backup that another version of the package has begun: what can be done about it, and what is
told of it.

Its status is made from that of this version's, by what the recorded ones do not have.
"""

import json
import pathlib
import re
from collections.abc import Iterator

import libvirt
import pytest

import virtbackup
from tests import waiting
from tests.live import machines, scene
from tests.test_status import STATUSES
from virtbackup.qemu import capabilities, status

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

SIZE = 4 << 20


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    with machines.two_disks(tmp_path, size=SIZE) as one:
        yield one


def begin(machine: machines.Machine, of_version: int, branch: str = "") -> None:
    """Start a backup, and have its status be of that version."""
    with virtbackup.open(machine.uri) as conn:
        conn.lookupByID(1).backupStart(
            f'<domainbackup><address type="unix" path="{machine.directory}/nbd.sock"/>{branch}'
            "</domainbackup>"
        )
    [path] = scene.state_files()
    told = {**json.loads(path.read_text()), "version": of_version}
    recorded = next((one for one in STATUSES if one.stem == f"{of_version}-plain"), None)
    if recorded is not None:
        known = json.loads(recorded.read_text())
        told = {key: told[key] for key in known}
        [keys] = {tuple(disk) for disk in known["disks"]}
        disks = [{**disk, "guarded": bool(disk["guards"])} for disk in told["disks"]]
        told["disks"] = [{key: disk[key] for key in keys} for disk in disks]
    path.write_text(json.dumps(told))


def stop(machine: machines.Machine) -> str | None:
    """Why the backup is not good; None: it is."""
    with virtbackup.open(machine.uri) as conn:
        try:
            conn.lookupByID(1).backupStop()
        except libvirt.libvirtError as failure:
            return str(failure)
    return None


def needs_guards_of_some() -> bool:
    """Whether the QEMU under test needs a guard for some disks and not for others."""
    return capabilities.SNAPSHOT_LOAD_BELOW.affects(machines.version())


def test_what_was_not_noted_is_not_called_good(machine: machines.Machine) -> None:
    before = machine.state()
    begin(machine, of_version=8)
    with virtbackup.open(machine.uri) as conn:
        info = conn.lookupByID(1).backupGetInfo()
    reason = stop(machine)
    if needs_guards_of_some():
        assert info.state == "failed"
        assert "did not note whether the disk was kept from going back to a snapshot" in str(reason)
    else:
        assert (info.state, reason) == ("running", None)
    assert machine.state() == before
    assert not scene.state_files()


def test_all_that_is_needed_was_noted(machine: machines.Machine) -> None:
    before = machine.state()
    begin(machine, of_version=9)
    assert stop(machine) is None
    assert machine.state() == before
    assert not scene.state_files()


@pytest.mark.parametrize("of_version", [9, status.VERSION])
def test_an_image_that_is_streamed_meanwhile(tmp_path: pathlib.Path, of_version: int) -> None:
    """That it was not taken away, is told by what was not noted by an older version."""
    base = machines.image(tmp_path / "base", SIZE, "qcow2")
    top = machines.image(tmp_path / "top", SIZE, "qcow2", backing=base)
    disk = f"qcow2,node-name=A,file.driver=file,file.filename={top}"
    device = ("-device", "virtio-blk,drive=A,id=vda")
    with machines.qemu(tmp_path, "-blockdev", disk, *device) as machine:
        begin(machine, of_version)
        machine.probe("block-stream", job_id="theirs", device="A")
        machine.probe.wait_event("BLOCK_JOB_COMPLETED")
        waiting.until(lambda: "theirs" not in str(machine.probe("query-block-jobs")))
        reason = stop(machine)
    if of_version == status.VERSION:
        assert reason is None
    else:
        assert "disk 'vda': it has lost the image '" in str(reason)
        assert "the older version of virtbackup that began the backup did not note" in str(reason)


@pytest.mark.parametrize("of_version", [8, 9])
def test_a_branch_goes_on(machine: machines.Machine, of_version: int) -> None:
    """Its bitmap keeps the disk from going back to a snapshot, whatever else was noted."""
    begin(machine, of_version, branch='<branch name="nightly"/>')
    assert stop(machine) is None
    with virtbackup.open(machine.uri) as conn:
        [line] = conn.lookupByID(1).branchList()
    assert all(disk.sound and disk.point for disk in line.disks)


def test_whose_verdict_was_not_told_yet_is_not_passed_over(machine: machines.Machine) -> None:
    """QEMU has nothing of it any more, as where it was given up: its stop may come yet, which is
    not to tell of another one."""
    start = (
        f'<domainbackup><address type="unix" path="{machine.directory}/nbd.sock"/></domainbackup>'
    )
    begin(machine, of_version=status.VERSION)
    [path] = scene.state_files()
    told = json.loads(path.read_text())
    assert stop(machine) is None
    path.write_text(json.dumps({**told, "version": status.VERSION + 1}))
    with virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        with pytest.raises(libvirt.libvirtError, match="was begun by a newer version"):
            dom.backupStart(start)
        [line] = dom.backupCleanup()
        assert "not known, thus not good" in line
        dom.backupStart(start)
        dom.backupStop()


def test_what_cannot_be_read_is_left_to_the_monitor_it_is_of(tmp_path: pathlib.Path) -> None:
    """A clean-up over another one of the same QEMU does not end it."""
    other = f"qmp://{tmp_path}/other.sock"
    monitor = ("-qmp", f"unix:{tmp_path}/other.sock,server=on,wait=off")
    with machines.two_disks(tmp_path, *monitor, size=SIZE) as machine:
        begin(machine, of_version=status.VERSION + 1)
        with virtbackup.open(other) as conn:
            dom = conn.lookupByID(1)
            start = "<domainbackup><address type='unix' path='/x'/></domainbackup>"
            for ask in (dom.backupCleanup, lambda: dom.backupStart(start)):
                with pytest.raises(libvirt.libvirtError, match=r"newer version.*another monitor"):
                    ask()
        with virtbackup.open(machine.uri) as conn:
            assert conn.lookupByID(1).backupCleanup()[0].startswith("verdict on backup ")


@pytest.mark.parametrize("version", [7, status.VERSION + 1])
def test_what_cannot_be_read_is_not_taken_for_none(version: int, machine: machines.Machine) -> None:
    before = machine.state()
    begin(machine, of_version=version)
    words = "was begun by (an older|a newer) version of virtbackup"
    assert re.search(words, str(stop(machine)))
    with virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        for ask in (
            dom.backupGetInfo,
            dom.backupGetXMLDesc,
            lambda: dom.branchDelete("nightly"),
            lambda: dom.backupStart(
                '<domainbackup><address type="unix" path="/x"/></domainbackup>'
            ),
        ):
            with pytest.raises(libvirt.libvirtError, match=words):
                ask()
        assert len(dom.XMLDesc()) > 0
        told = dom.backupCleanup()
        assert re.match(
            f"verdict on backup [0-9a-f]+: not known, thus not good: .* {words}", told[0]
        )
        with pytest.raises(libvirt.libvirtError, match="no domain backup job present"):
            dom.backupStop()
    assert machine.state() == before
    assert not scene.state_files()
