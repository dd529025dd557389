# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole backups of QEMUs as they spoke from 2.5 on: right, honest, and nothing left of them."""

import pathlib
from collections.abc import Iterator

import nbd
import pytest

import virtbackup
from tests.live import machines, older, scene

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")

MIB = 1 << 20
SIZE = 4 * MIB


FEW = [age for age in older.AGES if age.name in ("5.1", "2.11", "2.5")]
"""Those between which the most changes."""
few = pytest.mark.parametrize("monitor", FEW, ids=lambda age: age.name, indirect=True)


@pytest.fixture(params=older.AGES, ids=lambda age: age.name)
def monitor(request: pytest.FixtureRequest, machine: machines.Machine) -> Iterator[older.Monitor]:
    """What speaks as a QEMU of that age."""
    with older.Monitor(machine.directory, machine.qmp, request.param) as one:
        yield one


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Iterator[machines.Machine]:
    """Two drives with ids, as all QEMUs know them."""
    machines.image(tmp_path / "a.qcow2", SIZE, "qcow2")
    machines.image(tmp_path / "b.raw", SIZE)
    argv = (
        "-drive", f"if=none,id=drive0,format=qcow2,file={tmp_path}/a.qcow2",
        "-device", "virtio-blk,drive=drive0,id=vda",
        "-device", "virtio-scsi,id=scsi0",
        "-drive", f"if=none,id=drive1,format=raw,file={tmp_path}/b.raw",
        "-device", "scsi-hd,drive=drive1,id=sdb",
    )  # fmt: skip
    with machines.qemu(tmp_path, *argv) as one:
        for number, disk in enumerate(("vda", "sdb"), 1):
            one.io(disk, f"write -P {number} 0 {SIZE}")
        yield one


def document(directory: pathlib.Path) -> str:
    return f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/></domainbackup>'


def holds(directory: pathlib.Path, export: str, byte: int) -> bool:
    """Whether every byte of an export is BYTE."""
    handle = nbd.NBD()
    handle.set_export_name(export)
    handle.connect_unix(f"{directory}/nbd.sock")
    assert handle.is_read_only()
    return bytes(handle.pread(SIZE, 0)) == bytes([byte]) * SIZE


def test_a_whole_backup(
    tmp_path: pathlib.Path, machine: machines.Machine, monitor: older.Monitor
) -> None:
    before = machine.state()
    with virtbackup.open(monitor.uri) as conn:
        dom = conn.lookupByID(1)
        for _ in range(2):
            dom.backupStart(document(tmp_path))
            for disk in ("vda", "sdb"):
                machine.io(disk, f"write -P 9 {MIB} {MIB}")
            exports = {disk.name: disk.export for disk in dom.backupGetInfo().disks}
            assert set(exports) == {"vda", "sdb"}
            if ("nbd-server-add", "name") not in monitor.translator.age.members:
                assert exports == {"vda": "vda", "sdb": "sdb"}
            for name in exports.values():
                assert f'exportname="{name}"' in dom.backupGetXMLDesc()
            for number, disk in enumerate(("vda", "sdb"), 1):
                assert holds(tmp_path, exports[disk], number)
                machine.io(disk, f"read -P 9 {MIB} {MIB}")
                machine.io(disk, f"write -P {number} {MIB} {MIB}")
            with pytest.raises(virtbackup.Error, match="another backup job is already running"):
                dom.backupStart(document(tmp_path))
            assert dom.backupGetInfo().state == "running"
            dom.backupStop()
            assert machine.state() == before


@few
def test_a_job_that_was_lost_is_told(
    tmp_path: pathlib.Path, machine: machines.Machine, monitor: older.Monitor
) -> None:
    before = machine.state()
    with virtbackup.open(monitor.uri) as conn:
        dom = conn.lookupByID(1)
        dom.backupStart(document(tmp_path))
        [job, _] = sorted(job["device"] for job in machine.probe("query-block-jobs"))
        machine.probe("block-job-cancel", device=job)
        machine.probe.wait_event("BLOCK_JOB_CANCELLED")
        assert dom.backupGetInfo().state == "failed"
        with pytest.raises(virtbackup.Error, match="the backup is not good: disk 'vda': its"):
            dom.backupStop()
    assert machine.state() == before


@few
def test_a_server_that_was_replaced_is_told_and_left_alone(
    tmp_path: pathlib.Path, machine: machines.Machine, monitor: older.Monitor
) -> None:
    address = {"type": "unix", "data": {"path": f"{tmp_path}/theirs.sock"}}
    with virtbackup.open(monitor.uri) as conn:
        dom = conn.lookupByID(1)
        dom.backupStart(document(tmp_path))
        machine.probe("nbd-server-stop")
        machine.probe("nbd-server-start", addr=address)
        machine.probe("nbd-server-add", device="drive1", name="theirs")
        with pytest.raises(virtbackup.Error, match="disk 'vda': its export was removed"):
            dom.backupStop()
    client = nbd.NBD()
    client.set_export_name("theirs")
    client.connect_unix(f"{tmp_path}/theirs.sock")
    client.shutdown()
    machine.probe("nbd-server-stop")


@few
def test_a_job_in_place_of_ours_is_told_and_left_alone(
    tmp_path: pathlib.Path, machine: machines.Machine, monitor: older.Monitor
) -> None:
    """It is called as ours was where jobs are called as their drives."""
    with virtbackup.open(monitor.uri) as conn:
        dom = conn.lookupByID(1)
        dom.backupStart(document(tmp_path))
        ours = sorted(job["device"] for job in machine.probe("query-block-jobs"))[0]
        machine.probe("block-job-cancel", device=ours)
        machine.probe.wait_event("BLOCK_JOB_CANCELLED")
        theirs = {"job_id": "drive0", "device": "drive0", "target": f"{tmp_path}/theirs"}
        machine.probe("drive-backup", sync="full", format="raw", speed=1, **theirs)
        assert dom.backupGetInfo().state == "failed"
        with pytest.raises(virtbackup.Error, match="the backup is not good: disk 'vda': its"):
            dom.backupStop()
    assert [job["id"] for job in machine.probe("query-jobs")] == ["drive0"]


@few
@pytest.mark.parametrize("ends", ["cleanup", "start"])
def test_what_a_crash_leaves_is_removed(
    tmp_path: pathlib.Path, machine: machines.Machine, monitor: older.Monitor, ends: str
) -> None:
    before = machine.state()
    scene.start_and_die(monitor.uri, document(tmp_path), autodestroy=True)
    assert machine.state() != before
    with virtbackup.open(monitor.uri) as conn:
        dom = conn.lookupByID(1)
        if ends == "cleanup":
            assert "job" in " ".join(dom.backupCleanup())
        else:
            dom.backupStart(document(tmp_path))
            dom.backupStop()
    assert machine.state() == before


@few
def test_a_start_that_fails_leaves_nothing(
    tmp_path: pathlib.Path, machine: machines.Machine, monitor: older.Monitor
) -> None:
    machines.image(tmp_path / "theirs", SIZE)
    filename = f"{tmp_path}/theirs"
    machine.probe("blockdev-add", driver="file", node_name="theirs", filename=filename)
    job = {"job_id": "drive1", "device": "drive1", "target": "theirs"}
    machine.probe("blockdev-mirror", sync="top", **job)
    before = machine.state()
    with virtbackup.open(monitor.uri) as conn:
        with pytest.raises(virtbackup.Error, match=r"'(sdb|drive1)'"):
            conn.lookupByID(1).backupStart(document(tmp_path))
        assert conn.lookupByID(1).backupCleanup() == []
    after = machine.state()
    for query in ("query-jobs", "query-block-jobs"):
        assert len(after.pop(query)) == len(before.pop(query))
    assert after == before
    assert not (tmp_path / "nbd.sock").exists()
