# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that are not simply one image in one device, each written to while it is backed up."""

import pathlib

import pytest

import virtbackup
from tests.live import machines, nbdclient

SIZE = 1 << 20

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-img")


def xml(directory: pathlib.Path, disks: str = "") -> str:
    return (
        f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/>'
        f"<disks>{disks}</disks></domainbackup>"
    )


def test_one_node_in_two_devices(tmp_path: pathlib.Path) -> None:
    """It is backed up once, whichever device writes."""
    image = machines.image(tmp_path / "a.raw", SIZE)
    with (
        machines.qemu(
            tmp_path,
            "-blockdev", f"raw,node-name=A,file.driver=file,file.filename={image}",
            "-device", "virtio-blk,drive=A,id=vda,share-rw=on",
            "-device", "virtio-blk,drive=A,id=vdb,share-rw=on",
        ) as machine,
        virtbackup.open(machine.uri) as conn,
    ):  # fmt: skip
        dom = conn.lookupByID(1)
        machine.io("vda", "write -P 1 0 1M")
        before = machine.state()
        with pytest.raises(virtbackup.Error, match="disks 'vda' and 'vdb' are the same block node"):
            dom.backupStart(xml(tmp_path))
        assert machine.state() == before
        dom.backupStart(xml(tmp_path, '<disk name="vdb" present="no"/>'))
        machine.io("vda", "write -P 2 0 64k")
        machine.io("vdb", "write -P 3 128k 64k")
        assert nbdclient.read(tmp_path / "nbd.sock", "vda") == b"\1" * SIZE
        dom.backupStop()
        assert machine.state() == before


def test_one_image_in_two_nodes(tmp_path: pathlib.Path) -> None:
    """As for a guest with multipath. QEMU does not see it where it is told not to lock."""
    image = machines.image(tmp_path / "a.raw", SIZE)
    disks = []
    for node in "AB":
        disks += [
            "-blockdev", f"raw,node-name={node},file.driver=file,file.locking=off,"
            f"file.filename={image}",
            "-device", f"virtio-blk,drive={node},id=disk{node},share-rw=on",
        ]  # fmt: skip
    with machines.qemu(tmp_path, *disks) as machine, virtbackup.open(machine.uri) as conn:
        before = machine.state()
        for left_out in "", '<disk name="diskB" present="no"/>':
            with pytest.raises(
                virtbackup.Error, match=r"'diskA' and disk 'diskB' both write to '.*/a\.raw'"
            ):
                conn.lookupByID(1).backupStart(xml(tmp_path, left_out))
        assert machine.state() == before


def test_a_drive_that_goes_with_its_device(tmp_path: pathlib.Path) -> None:
    """What ``-drive`` made QEMU deletes when the device is unplugged, the backup job included."""
    for name in "ab":
        machines.image(tmp_path / f"{name}.raw", SIZE)
    with (
        machines.qemu(
            tmp_path,
            "-device", "virtio-scsi,id=scsi0",
            "-drive", f"file={tmp_path}/a.raw,format=raw,if=none,id=a",
            "-device", "scsi-hd,drive=a,id=sda",
            "-drive", f"file={tmp_path}/b.raw,format=raw,if=none,id=b",
            "-device", "scsi-hd,drive=b,id=sdb",
        ) as machine,
        virtbackup.open(machine.uri) as conn,
    ):  # fmt: skip
        dom = conn.lookupByID(1)
        dom.backupStart(xml(tmp_path))
        machine.probe("device_del", id="sdb")
        machine.probe.wait_event("DEVICE_DELETED")
        with pytest.raises(virtbackup.Error) as caught:
            dom.backupStop()
        assert str(caught.value).endswith(
            "the backup is not good: disk 'sdb': the disk was unplugged during the backup, and its"
            " backup job ended: Operation canceled"
        )
        assert "virtbackup" not in str(machine.state())
