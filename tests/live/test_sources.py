# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that are not simply one image in one device, each written to while it is backed up."""

import functools
import itertools
import pathlib
import subprocess

import libvirt
import pytest

import virtbackup
from tests import waiting
from tests.live import machines, nbdclient
from virtbackup.tools import pull

SIZE = 1 << 20

pytestmark = pytest.mark.needs("qemu-system-x86_64", "qemu-storage-daemon", "qemu-img")


def xml(directory: pathlib.Path, disks: str = "", branch: str = "") -> str:
    return (
        f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/>{branch}'
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
        dom.branchCreate("b")
        dom.backupStart(
            xml(
                tmp_path,
                '<disk name="vda" type="incremental"/><disk name="vdb" present="no"/>',
                '<branch name="b"/>',
            )
        )
        dom.backupStop()
        dom.branchDelete("b")
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


def test_one_image_below_a_filter_and_in_parts(tmp_path: pathlib.Path) -> None:
    """QEMU tells such a disk's file within options. Parts that have nothing in common are two
    disks."""
    image = machines.image(tmp_path / "a.raw", SIZE)
    half = SIZE // 2

    def disk(name: str, options: str, prefix: str = "") -> tuple[str, ...]:
        file = f"driver=file,{prefix}file.locking=off,{prefix}file.filename={image}"
        return (
            "-blockdev", f"{options},node-name=node-{name},{prefix}file.{file}",
            "-device", f"virtio-blk,drive=node-{name},id={name},share-rw=on",
        )  # fmt: skip

    group = ("-object", "throttle-group,id=group")
    whole = disk("whole", "raw")
    slow = (*group, *disk("slow", "throttle,throttle-group=group,file.driver=raw", "file."))
    first = disk("first", f"raw,size={half}")
    second = disk("second", f"raw,offset={half},size={half}")
    for disks in (whole, slow), (slow, second), (whole, first):
        with machines.qemu(tmp_path, *itertools.chain(*disks)) as machine:
            before = machine.state()
            for engine in machines.engines():
                with (
                    virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
                    pytest.raises(virtbackup.Error, match=r"both write to '.*/a\.raw'"),
                ):
                    conn.lookupByID(1).backupStart(xml(tmp_path))
            assert machine.state() == before
    with machines.qemu(tmp_path, *first, *second) as machine:
        machine.io("first", f"write -P 1 0 {half}")
        machine.io("second", f"write -P 2 0 {half}")
        with virtbackup.open(machine.uri) as conn:
            dom = conn.lookupByID(1)
            dom.backupStart(xml(tmp_path))
            machine.io("first", f"write -P 3 0 {half}")
            assert nbdclient.read(tmp_path / "nbd.sock", "first") == b"\1" * half
            assert nbdclient.read(tmp_path / "nbd.sock", "second") == b"\2" * half
            dom.backupStop()


def test_a_drive_that_another_one_is_made_of(tmp_path: pathlib.Path) -> None:
    """As for COLO, or record and replay. The guest has but the other one; to name it is to be
    asked for it. Of all drives, a job would be below another's."""
    for name in "ab":
        machines.image(tmp_path / name, SIZE, "qcow2")
    with (
        machines.qemu(
            tmp_path,
            "-drive", f"file={tmp_path}/a,format=qcow2,if=none,id=a",
            "-drive", "driver=blkreplay,image=a,if=none,id=replay",
            "-device", "virtio-blk,drive=replay,id=vda",
            "-drive", f"file={tmp_path}/b,format=qcow2,if=none,id=b",
            "-drive", "driver=quorum,vote-threshold=1,children.0=b,if=none,id=quorum",
            "-device", "virtio-blk,drive=quorum,id=vdb",
        ) as machine,
        virtbackup.open(machine.uri) as conn,
    ):  # fmt: skip
        dom = conn.lookupByID(1)
        dom.branchCreate("b")
        disks = "".join(f'<disk name="{name}" type="incremental"/>' for name in ("vda", "vdb"))
        made = pull.pull(dom, tmp_path / "out")
        assert {disk.name for disk in made.disks} == {"vda", "vdb"}
        for document in xml(tmp_path), xml(tmp_path, disks, '<branch name="b"/>'):
            dom.backupStart(document)
            machine.io("vda", "write -P 1 0 64k")
            machine.io("vdb", "write -P 2 0 64k")
            assert set(nbdclient.exports(tmp_path / "nbd.sock")) == {"vda", "vdb"}
            dom.backupStop()
        with pytest.raises(virtbackup.Error, match="disk 'vda' is made of disk 'a'"):
            dom.backupStart(xml(tmp_path, '<disk name="a"/>'))
        dom.backupStart(xml(tmp_path, '<disk name="a"/><disk name="vda" present="no"/>'))
        assert nbdclient.read(tmp_path / "nbd.sock", "a")[:1] == b"\1"
        dom.backupStop()
        dom.branchDelete("b")
        assert "virtbackup" not in str(machine.state())


def test_a_guest_that_is_recorded(tmp_path: pathlib.Path) -> None:
    """QEMU would stand still for ever, guest and all, as soon as that writes."""
    for name in "ab":
        machines.image(tmp_path / name, SIZE, "qcow2")
    with (
        machines.qemu(
            tmp_path,
            "-icount", f"shift=7,rr=record,rrfile={tmp_path}/replay",
            "-drive", f"file={tmp_path}/a,format=qcow2,if=none,id=a",
            "-drive", "driver=blkreplay,image=a,if=none,id=replay",
            "-device", "virtio-blk,drive=replay,id=vda",
            "-object", "throttle-group,id=group",
            "-blockdev", f"qcow2,node-name=B,file.driver=file,file.filename={tmp_path}/b",
            "-blockdev", "blkreplay,node-name=R,image=B",
            "-blockdev", "throttle,node-name=T,throttle-group=group,file=R",
            "-device", "virtio-blk,drive=T,id=vdb",
        ) as machine,
        virtbackup.open(machine.uri) as conn,
    ):  # fmt: skip
        before = machine.state()
        without = '<disk name="vda" present="no"/>'
        for disks, named in ("", "vda"), (f'{without}<disk name="a"/>', "a"), (without, "vdb"):
            with pytest.raises(virtbackup.Error, match=rf"'{named}' is recorded or replayed \(rr"):
                conn.lookupByID(1).backupStart(xml(tmp_path, disks))
        assert machine.state() == before


@pytest.mark.skipif(machines.version() < (7, 2, 0), reason="it dies of the end of the job")
@pytest.mark.parametrize("engine", machines.engines())
def test_an_image_that_is_corrupt(tmp_path: pathlib.Path, engine: str) -> None:
    """QEMU closes it once it sees that, and has neither an image for the disk then nor tells of
    anybody's. What is not backed up any more is told, and the other disk's backup can be ended,
    also where that has lost its backing image meanwhile."""
    machines.image(tmp_path / "a", SIZE, "qcow2")
    base = machines.image(tmp_path / "base", SIZE, "qcow2")
    machines.image(tmp_path / "b", SIZE, "qcow2", backing=base)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", str(tmp_path / "a")], check=True
    )
    with (tmp_path / "a").open("r+b") as file:
        file.seek(40)
        l1_table = int.from_bytes(file.read(8), "big")
        file.seek(l1_table)
        file.seek(int.from_bytes(file.read(8), "big") & 0xFFFFFFFFFFFE00)
        file.write((1 << 63 | l1_table).to_bytes(8, "big"))  # of the first cluster, to be in place
    with (
        machines.qemu(
            tmp_path,
            "-blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={tmp_path}/a",
            "-device", "virtio-blk,drive=A,id=vda",
            "-blockdev", f"qcow2,node-name=B,file.driver=file,file.filename={tmp_path}/b",
            "-device", "virtio-blk,drive=B,id=vdb",
        ) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):  # fmt: skip
        dom = conn.lookupByID(1)
        dom.backupStart(xml(tmp_path, branch='<branch name="b"/>'))
        machine.probe("block-stream", **{"device": "B", "job-id": "stream"})
        waiting.until(lambda: "stream" not in [job["id"] for job in machine.probe("query-jobs")])
        with pytest.raises(AssertionError, match="write failed"):
            machine.io("vda", "write 0 4k")
        assert dom.backupGetInfo().state == "failed"
        with pytest.raises(virtbackup.Error, match=r"not good: disk 'vda': QEMU has closed its im"):
            dom.backupStop()
        before = machine.state()
        assert "virtbackup" not in str(before)
        for disks in "", '<disk name="vda"/>':
            with pytest.raises(virtbackup.Error, match="disk 'vda' has no image any more"):
                dom.backupStart(xml(tmp_path, disks))
        with pytest.raises(virtbackup.Error, match="disk 'vda' has no image any more"):
            pull.pull(dom, tmp_path / "out")
        with pytest.raises(virtbackup.Error, match="it has closed one that it found corrupt"):
            dom.branchCreate("b")
        dom.backupStart(xml(tmp_path, '<disk name="vda" present="no"/>'))
        assert nbdclient.read(tmp_path / "nbd.sock", "vdb") == bytes(SIZE)
        assert dom.backupGetInfo().state == "running"
        dom.backupStop()
        assert machine.state() == before


def test_an_image_that_two_guests_share(tmp_path: pathlib.Path) -> None:
    """What the other one writes is not saved; the disk is named, among those that nobody shares."""
    shared = machines.image(tmp_path / "shared.raw", SIZE)
    (there := tmp_path / "there").mkdir()
    disk = (
        "-blockdev", f"raw,node-name=S,file.driver=file,file.filename={shared}",
        "-device", "virtio-blk,drive=S,id=vdc,share-rw=on",
    )  # fmt: skip
    with machines.two_disks(tmp_path, *disk, size=SIZE) as machine, machines.qemu(there, *disk):
        before = machine.state()
        for engine in machines.engines():
            with virtbackup.open(f"{machine.uri}?engine={engine}") as conn:
                dom = conn.lookupByID(1)
                with pytest.raises(virtbackup.Error, match="image of disk 'vdc' is open") as caught:
                    dom.backupStart(xml(tmp_path))
                assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED
                assert machine.state() == before
                dom.backupStart(xml(tmp_path, '<disk name="vdc" present="no"/>'))
                dom.backupStop()
        assert machine.state() == before


def test_a_disk_that_another_process_writes(tmp_path: pathlib.Path) -> None:
    """Its data never passes QEMU, which has no node of it."""
    (there := tmp_path / "there").mkdir()
    for name in "ab":
        machines.image(tmp_path / f"{name}.raw", SIZE)
    with (
        machines.storage_daemon(
            there,
            "--blockdev", f"raw,node-name=b,file.driver=file,file.filename={tmp_path}/b.raw",
            "--export", "vhost-user-blk,id=b,node-name=b,writable=on,addr.type=unix,"
            f"addr.path={there}/vhost.sock",
        ),
        machines.qemu(
            tmp_path,
            "-object", "memory-backend-memfd,id=memory,size=64M,share=on",
            "-machine", "memory-backend=memory",
            "-blockdev", f"raw,node-name=A,file.driver=file,file.filename={tmp_path}/a.raw",
            "-device", "virtio-blk,drive=A,id=vda",
            "-chardev", f"socket,id=there,path={there}/vhost.sock",
            "-device", "vhost-user-blk-pci,chardev=there,id=vdb",
        ) as machine,
        virtbackup.open(machine.uri) as conn,
    ):  # fmt: skip
        dom = conn.lookupByID(1)
        before = machine.state()
        for disks in "", '<disk name="vda"/>', '<disk name="vdb"/>':
            with pytest.raises(virtbackup.Error, match=r"'vdb' is not one that QEMU .*-blk-pci"):
                dom.backupStart(xml(tmp_path, disks))
        assert machine.state() == before
        dom.backupStart(xml(tmp_path, '<disk name="vdb" present="no"/>'))
        assert nbdclient.read(tmp_path / "nbd.sock", "vda") == bytes(SIZE)
        dom.backupStop()


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


def test_disks_that_are_another_guests_by_now(tmp_path: pathlib.Path) -> None:
    """Those of a guest that was migrated, or has yet to come in: another QEMU writes to them, past
    whatever would save their old data."""
    machines.image(tmp_path / "a.qcow2", SIZE, "qcow2")
    (there := tmp_path / "there").mkdir()
    disk = machines.two_disks_of(tmp_path)[:4]
    with (
        machines.qemu(tmp_path, *disk) as source,
        machines.qemu(there, *disk, "-incoming", "defer") as destination,
        virtbackup.open(source.uri) as here,
        virtbackup.open(destination.uri) as elsewhere,
    ):
        refused(elsewhere, destination)
        destination.probe("migrate-incoming", uri=f"unix:{tmp_path}/migration")
        source.probe("migrate", uri=f"unix:{tmp_path}/migration")
        waiting.until(lambda: source.probe("query-status")["status"] == "postmigrate")
        waiting.until(lambda: destination.probe("query-status")["running"])
        refused(here, source)
        source.probe("system_reset")  # it is called 'prelaunch' then, as one that never ran
        refused(here, source)
        dom = elsewhere.lookupByID(1)
        dom.backupStart(xml(there))
        destination.io("vda", "write -P 1 0 64k")
        assert nbdclient.read(there / "nbd.sock", "vda") == bytes(SIZE)
        dom.backupStop()


def refused(conn: virtbackup.Connection, machine: machines.Machine) -> None:
    """Neither a backup nor a branch can begin, nor a branch end, and nothing was tried."""
    before = machine.state()
    dom = conn.lookupByID(1)
    documents = xml(machine.directory), xml(machine.directory, branch='<branch name="b"/>')
    begins = [functools.partial(dom.backupStart, document) for document in documents]
    changes = [functools.partial(change, "b") for change in (dom.branchCreate, dom.branchDelete)]
    for begin in (*begins, *changes):
        with pytest.raises(virtbackup.Error, match="'vda' is not this guest's to use") as caught:
            begin()
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    assert machine.state() == before
