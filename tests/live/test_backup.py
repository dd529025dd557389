# SPDX-License-Identifier: LGPL-2.1-or-later
"""One backup's way through a real QEMU: what is exported is the instant of the start."""

import contextlib
import functools
import os
import pathlib
import socket
import subprocess
import threading
from typing import Any

import libvirt
import nbd
import pytest

import virtbackup
from tests import waiting
from tests.live import machines, nbdclient, places, steps
from virtbackup.qemu import capabilities, process

SIZE = 64 << 20


def unix(directory: pathlib.Path, disks: str = "") -> str:
    return (
        f'<domainbackup><address type="unix" path="{directory}/nbd.sock"/>'
        f"<disks>{disks}</disks></domainbackup>"
    )


@pytest.mark.parametrize("extra", [(), ("-S",)], ids=["running", "paused"])
def test_exports_show_the_instant_of_the_start(
    tmp_path: pathlib.Path, extra: tuple[str, ...]
) -> None:
    with machines.two_disks(tmp_path, *extra) as machine, virtbackup.open(machine.uri) as conn:
        machine.io("vda", "write -P 1 0 3M")
        machine.io("sdb", "write -P 2 1M 70k")
        dom = conn.lookupByID(1)
        before = machine.state()
        dom.backupStart(unix(tmp_path))
        machine.io("vda", "write -P 9 1M 100k")
        machine.io("vda", "write -z 2M 64k")
        machine.io("sdb", "discard 1M 64k")
        machine.io("sdb", "write -P 9 33M 512")
        expected = {
            "vda": b"\1" * (3 << 20) + bytes(SIZE - (3 << 20)),
            "sdb": bytes(1 << 20) + b"\2" * (70 << 10) + bytes(SIZE - (1 << 20) - (70 << 10)),
        }
        socket_path = tmp_path / "nbd.sock"
        found = nbdclient.exports(socket_path)
        assert {name: item["export-size"] for name, item in found.items()} == {
            "vda": SIZE,
            "sdb": SIZE,
        }
        assert all(item["is_read_only"] and item["can_multi_conn"] for item in found.values())
        for name, content in expected.items():
            assert nbdclient.read(socket_path, name) == content
            converted = tmp_path / "converted.raw"
            subprocess.run(
                ["qemu-img", "convert", "-O", "raw", nbdclient.uri(socket_path, name), converted],
                check=True,
            )
            assert converted.read_bytes() == content
        dom.backupStop()
        assert machine.state() == before
        assert not socket_path.exists()
        machine.io("vda", "read -P 9 1M 100k")
        machine.io("sdb", "read -P 9 33M 512")


@pytest.mark.parametrize(
    ("host", "family"),
    [
        ("127.0.0.1", socket.AF_INET),
        pytest.param("::1", socket.AF_INET6, marks=places.IPV6),
        ("localhost", socket.AF_INET),
    ],
)
def test_tcp(tmp_path: pathlib.Path, host: str, family: socket.AddressFamily) -> None:
    port = places.free_port(host, family)
    xml = f'<domainbackup><address type="ip" host="{host}" port="{port}"/></domainbackup>'
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        machine.io("vda", "write -P 7 0 64k")
        dom = conn.lookupByID(1)
        dom.backupStart(xml)
        at = f"[{host}]" if ":" in host else host
        assert nbdclient.read_uri(f"nbd://{at}:{port}/vda")[: 64 << 10] == b"\7" * (64 << 10)
        dom.backupStop()


def test_port_in_use_is_named_and_nothing_remains(tmp_path: pathlib.Path) -> None:
    with (
        machines.two_disks(tmp_path) as machine,
        virtbackup.open(machine.uri) as conn,
        socket.socket() as taken,
    ):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        before = machine.state()
        xml = f'<domainbackup><address type="ip" host="127.0.0.1" port="{port}"/></domainbackup>'
        with pytest.raises(virtbackup.Error, match=f"127.0.0.1:{port}.*Address already in use"):
            conn.lookupByID(1).backupStart(xml)
        assert machine.state() == before


def test_disks_however_they_were_attached(tmp_path: pathlib.Path) -> None:
    base = machines.image(tmp_path / "base.qcow2", 3 << 20, "qcow2")
    chain = machines.image(tmp_path / "top.qcow2", 3 << 20, "qcow2", backing=base)
    odd = tmp_path / "odd.raw"
    odd.write_bytes(b"x" * 100_001)
    for name in ("anonymous", "plugged", "readonly"):
        machines.image(tmp_path / f"{name}.raw", 1 << 20)
    with (
        machines.qemu(
            tmp_path,
            "-device", "virtio-scsi,id=scsi0",
            "-drive", f"file={chain},format=qcow2,if=none,id=d0",
            "-device", "scsi-hd,drive=d0,id=chain",
            "-drive", f"file={odd},format=raw,if=none,id=odd", "-device", "scsi-hd,drive=odd",
            "-drive", f"file={tmp_path}/anonymous.raw,format=raw,if=virtio",
            "-drive", f"file={tmp_path}/readonly.raw,format=raw,if=none,id=ro,readonly=on",
            "-device", "scsi-hd,drive=ro,id=readonly",
            "-drive", "if=none,id=cd", "-device", "ide-cd,drive=cd,id=empty",
            "-device", "pcie-root-port,id=port0",
        ) as machine,
        virtbackup.open(machine.uri) as conn,
    ):  # fmt: skip
        machine.probe(
            "blockdev-add", driver="raw", node_name="P",
            file={"driver": "file", "filename": f"{tmp_path}/plugged.raw"},
        )  # fmt: skip
        machine.probe("device_add", driver="virtio-blk-pci", id="hot", drive="P", bus="port0")
        dom = conn.lookupByID(1)
        for disk in ("chain", "hot"):
            machine.io(disk, "write -P 5 64k 64k")
        before = machine.state()
        dom.backupStart(unix(tmp_path))
        found = nbdclient.exports(tmp_path / "nbd.sock")
        assert {name: item["export-size"] for name, item in found.items()} == {
            "chain": 3 << 20,
            "odd": 100_352,
            "virtio0": 1 << 20,
            "hot": 1 << 20,
        }  # fmt: skip
        for disk in ("chain", "hot"):
            machine.io(disk, "write -P 6 64k 64k")
            content = nbdclient.read(tmp_path / "nbd.sock", disk)
            assert content[: 128 << 10] == bytes(64 << 10) + b"\5" * (64 << 10)
        assert nbdclient.read(tmp_path / "nbd.sock", "odd")[:100_001] == b"x" * 100_001
        dom.backupStop()
        assert machine.state() == before
        for name, why in (("readonly", "is read-only"), ("empty", "has no media")):
            with pytest.raises(virtbackup.Error, match=f"disk '{name}' {why}"):
                dom.backupStart(unix(tmp_path, f'<disk name="{name}"/>'))
        assert machine.state() == before


def test_nothing_to_back_up(tmp_path: pathlib.Path) -> None:
    with machines.qemu(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        with pytest.raises(virtbackup.Error, match="no disks selected for backup") as caught:
            conn.lookupByID(1).backupStart(unix(tmp_path))
        assert caught.value.get_error_code() == libvirt.VIR_ERR_CONFIG_UNSUPPORTED


def test_a_qemu_that_has_become_another_user(
    tmp_path: pathlib.Path, scratch_dir: pathlib.Path, state_dir: pathlib.Path
) -> None:
    """It needs no path, neither to the scratch images nor to the socket's directory. The monitor's
    socket tells the user who made it, which was root yet."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    becomes = ("-run-with", "user=nobody") if machines.version() >= (9, 1) else ("-runas", "nobody")
    tmp_path.chmod(0o700)
    with machines.two_disks(tmp_path, *becomes) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        before = machine.state()
        source = f'<disk name="vda"><source file="{scratch_dir}/own"/></disk>'
        for document in (unix(tmp_path), unix(tmp_path, source)):
            dom.backupStart(document)
            assert set(nbdclient.exports(tmp_path / "nbd.sock")) == {"vda", "sdb"}
            dom.backupStop()
            assert machine.state() == before
            assert list(scratch_dir.iterdir()) == []
            assert not (tmp_path / "nbd.sock").exists()


def test_firmware_flash_is_no_disk(tmp_path: pathlib.Path) -> None:
    machines.image(tmp_path / "flash.raw", 4 << 20)
    with (
        machines.two_disks(
            tmp_path, "-drive", f"if=pflash,format=raw,file={tmp_path}/flash.raw"
        ) as machine,
        virtbackup.open(machine.uri) as conn,
    ):
        dom = conn.lookupByID(1)
        dom.backupStart(unix(tmp_path))
        assert set(nbdclient.exports(tmp_path / "nbd.sock")) == {"vda", "sdb"}
        dom.backupStop()


def test_a_floppy(tmp_path: pathlib.Path) -> None:
    """Refused by name where QEMU would stand still for it; elsewhere as any disk."""
    machines.image(tmp_path / "f.raw", 1440 << 10)
    floppy = (
        "-blockdev", f"raw,node-name=F,file.driver=file,file.filename={tmp_path}/f.raw",
        "-device", "isa-fdc,id=fdc", "-device", "floppy,drive=F,id=fd0",
    )  # fmt: skip
    with (
        machines.two_disks(tmp_path, *floppy) as machine,
        virtbackup.open(machine.uri) as conn,
    ):
        dom = conn.lookupByID(1)
        if machines.version() < (7, 2, 0):
            before = machine.state()
            with pytest.raises(virtbackup.Error, match="disk 'fd0' is a floppy or an SD card"):
                dom.backupStart(unix(tmp_path))
            assert machine.state() == before
            dom.backupStart(unix(tmp_path, '<disk name="fd0" present="no"/>'))
        else:
            dom.backupStart(unix(tmp_path))
            assert "fd0" in nbdclient.exports(tmp_path / "nbd.sock")
        dom.backupStop()


@pytest.mark.parametrize("engine", machines.engines())
def test_a_medium_that_is_changed_after_its_job_was_lost(
    tmp_path: pathlib.Path, engine: str
) -> None:
    """What was taken out is its owner's, who may put it in again."""
    if machines.version() < (7, 2, 0):
        return  # a floppy is refused
    one, other = (machines.image(tmp_path / name, 1440 << 10, "qcow2") for name in ("a", "b"))
    floppy = (
        "-blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={one}",
        "-blockdev", f"qcow2,node-name=B,file.driver=file,file.filename={other}",
        "-device", "isa-fdc,id=fdc", "-device", "floppy,drive=A,id=fd0",
    )  # fmt: skip
    with (
        machines.qemu(tmp_path, *floppy) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)
        dom.backupStart(unix(tmp_path))
        [job] = machine.probe("query-jobs")
        machine.probe("block-job-cancel", device=job["id"])
        machine.probe.wait_event("BLOCK_JOB_CANCELLED")
        machine.probe("blockdev-open-tray", id="fd0", force=True)
        in_use = pytest.raises(AssertionError, match="is busy")
        with contextlib.nullcontext() if engine == "hybrid" else in_use:
            machine.probe("blockdev-remove-medium", id="fd0")
            machine.probe("blockdev-insert-medium", id="fd0", node_name="B")
        with pytest.raises(virtbackup.Error, match="its backup job ended"):
            dom.backupStop()
        if engine == "hybrid":
            machine.probe("blockdev-remove-medium", id="fd0")
            machine.probe("blockdev-insert-medium", id="fd0", node_name="A")


def test_disk_in_an_iothread(tmp_path: pathlib.Path) -> None:
    """Refused by name where QEMU would die of it; elsewhere as any disk."""
    machines.image(tmp_path / "a.raw", 1 << 20)
    machines.image(tmp_path / "b.raw", 1 << 20)
    machines.image(tmp_path / "c.raw", 1 << 20)
    with (
        machines.qemu(
            tmp_path,
            "-object", "iothread,id=io0",
            "-device", "virtio-scsi,id=scsi0,iothread=io0",
            "-drive", f"file={tmp_path}/a.raw,format=raw,if=none,id=a",
            "-device", "virtio-blk,drive=a,id=blk,iothread=io0",
            "-drive", f"file={tmp_path}/b.raw,format=raw,if=none,id=b",
            "-device", "scsi-hd,drive=b,id=scsi,bus=scsi0.0",
            "-drive", f"file={tmp_path}/c.raw,format=raw,if=none,id=c",
            "-device", "virtio-blk,drive=c,id=plain",
        ) as machine,
        virtbackup.open(machine.uri) as conn,
    ):  # fmt: skip
        dom = conn.lookupByID(1)
        before = machine.state()
        if (7, 2, 14) <= machines.version() < (8, 0, 0):
            for disk in ("blk", "scsi"):
                others = "".join(
                    f'<disk name="{other}" present="no"/>'
                    for other in ("blk", "scsi")
                    if other != disk
                )
                with pytest.raises(virtbackup.Error, match=f"disk '{disk}' runs in iothread 'io0'"):
                    dom.backupStart(unix(tmp_path, others))
            assert machine.state() == before
            dom.backupStart(
                unix(tmp_path, '<disk name="blk" present="no"/><disk name="scsi" present="no"/>')
            )
        else:
            dom.backupStart(unix(tmp_path))
        for export in nbdclient.exports(tmp_path / "nbd.sock"):
            nbdclient.read(tmp_path / "nbd.sock", export)
        dom.backupStop()
        assert machine.state() == before


def test_disks_left_out_and_export_names(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        dom.backupStart(
            unix(
                tmp_path, '<disk name="sdb" present="no"/><disk name="vda" exportname="root disk"/>'
            )
        )
        assert set(nbdclient.exports(tmp_path / "nbd.sock")) == {"root disk"}
        assert 'name="sdb" present="no"' in dom.backupGetXMLDesc()
        dom.backupStop()


def test_named_scratch(tmp_path: pathlib.Path) -> None:
    scratch = tmp_path / "scratch.qcow2"
    disks = f'<disk name="vda"><source file="{scratch}"/></disk>'
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        machine.io("vda", "write -P 1 0 1M")
        dom.backupStart(unix(tmp_path, disks))
        machine.io("vda", "write -P 3 0 1M")
        assert scratch.stat().st_blocks * 512 > 1 << 20
        dom.backupStop()
        assert not scratch.exists()
        scratch.write_text("somebody's")
        with pytest.raises(virtbackup.Error, match=f"'{scratch}' for backup of 'vda' exists"):
            dom.backupStart(unix(tmp_path, disks))
        assert scratch.read_text() == "somebody's"


@pytest.mark.parametrize("extra", [(), ("-S",)], ids=["running", "paused"])
def test_nameless_scratch_leaves_no_name(tmp_path: pathlib.Path, extra: tuple[str, ...]) -> None:
    place = tmp_path / "place"
    place.mkdir()
    source = f'<source dir="{place}"/>'
    disks = f'<disk name="vda">{source}</disk><disk name="sdb">{source}</disk>'
    with machines.two_disks(tmp_path, *extra) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        machine.io("vda", "write -P 1 0 1M")
        dom.backupStart(unix(tmp_path, disks))
        machine.io("vda", "write -P 3 0 1M")
        assert list(place.iterdir()) == []
        info = {disk.name: disk for disk in dom.backupGetInfo().disks}
        assert (info["vda"].scratch_used or 0) > 1 << 20
        machine.kill()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        ('<disk name="vda"><source dir="/nonexistent"/></disk>', "'vda'.*No such file"),
        ('<disk name="vda"><source file="/nonexistent/x"/></disk>', "'/nonexistent/x'.*'vda'"),
        ('<disk name="nope"/>', "no disk named 'nope'"),
        ('<disk name="vda"/><disk name="vda"/>', "disk 'vda' specified twice"),
        ('<disk name="vda" present="no"/><disk name="sdb" present="no"/>', "no disks selected"),
        ('<disk name="vda" exportname="sdb"/>', "same export name 'sdb'"),
        ('<disk name="vda" type="incremental"/>', "disk 'vda'.*needs a branch"),
    ],
)
def test_bad_disks_are_refused_by_name(tmp_path: pathlib.Path, disk: str, reason: str) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        before = machine.state()
        with pytest.raises(virtbackup.Error, match=reason):
            conn.lookupByID(1).backupStart(unix(tmp_path, disk))
        assert machine.state() == before


def test_address_that_is_a_file_is_refused(tmp_path: pathlib.Path) -> None:
    precious = tmp_path / "nbd.sock"
    precious.write_text("precious")
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        with pytest.raises(virtbackup.Error, match="exists and is not a socket"):
            conn.lookupByID(1).backupStart(unix(tmp_path))
        assert precious.read_text() == "precious"


@pytest.mark.parametrize("same_address", [True, False])
def test_the_users_nbd_server_is_refused_and_untouched(
    tmp_path: pathlib.Path, same_address: bool
) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        theirs, ours = places.free_port(), places.free_port()
        addr = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(theirs)}}
        machine.probe("nbd-server-start", addr=addr)
        before = machine.state()
        port = theirs if same_address else ours
        xml = f'<domainbackup><address type="ip" host="127.0.0.1" port="{port}"/></domainbackup>'
        with pytest.raises(virtbackup.Error, match="already in use") as caught:
            conn.lookupByID(1).backupStart(xml)
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
        assert machine.state() == before
        with socket.create_connection(("127.0.0.1", theirs)) as client:
            assert client.recv(8) == b"NBDMAGIC"


def test_second_start_and_stop_without_start(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        for call in (dom.backupStop, dom.backupGetXMLDesc, dom.backupGetInfo):
            with pytest.raises(virtbackup.Error) as caught:
                call()
            assert caught.value.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
        dom.backupStart(unix(tmp_path))
        state = machine.state()
        with pytest.raises(virtbackup.Error, match="already running") as caught:
            dom.backupStart(unix(tmp_path))
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
        with pytest.raises(virtbackup.Error, match="backup-stop ends it"):
            dom.backupCleanup()
        assert machine.state() == state
        dom.backupStop()


@pytest.mark.parametrize("kind", ["mirror", "commit", "backup"])
def test_disk_with_a_block_job_is_refused_by_name(tmp_path: pathlib.Path, kind: str) -> None:
    overlay = {"driver": "qcow2", "node-name": "over", "file": {"driver": "file"}}
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        machines.image(tmp_path / "target.qcow2", SIZE, "qcow2")
        overlay["file"]["filename"] = f"{tmp_path}/target.qcow2"  # type: ignore[index]
        if kind == "commit":
            machine.probe("blockdev-add", **{**overlay, "backing": None})
            machine.probe("blockdev-snapshot", node="A", overlay="over")
            machine.probe("block-commit", job_id="theirs", device="over", speed=1)
        elif kind == "mirror":
            machine.probe("blockdev-add", **overlay)
            job = {"job-id": "theirs", "device": "A", "target": "over"}
            machine.probe("blockdev-mirror", **job, sync="full", speed=1)
        else:
            machine.probe("blockdev-add", **overlay)
            machine.probe(
                "blockdev-backup", job_id="theirs", device="A", target="over", sync="none"
            )
        before = machine.state()
        with pytest.raises(
            virtbackup.Error, match="disk 'vda' already in active block job 'theirs'"
        ):
            conn.lookupByID(1).backupStart(unix(tmp_path))
        graph = "x-debug-query-block-graph"
        assert machine.state()[graph] == before[graph]
        assert "nbd.sock" not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("step", ["scratch_images", "freeze"])
def test_an_overlay_that_comes_between_the_look_and_the_instant(
    tmp_path: pathlib.Path, step: str
) -> None:
    """The image that was looked at stands still from the overlay on, the other disks do not."""
    overlay = {"driver": "file", "filename": f"{tmp_path}/over.qcow2"}
    machines.image(tmp_path / "over.qcow2", SIZE, "qcow2")
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        machine.probe("blockdev-add", driver="qcow2", node_name="over", file=overlay, backing=None)
        refused = []

        def late(run: process.Run) -> None:
            reply = machine.probe.reply("blockdev-snapshot", node="A", overlay="over")
            refused.append("error" in reply)  # by a scratch image over the same node
            for disk in ("vda", "sdb"):
                machine.io(disk, "write -P 7 0 64k")

        with steps.before(step, late):
            if step == "freeze" and machines.version() < (8, 0, 0):
                dom.backupStart(unix(tmp_path))
                dom.backupStop()
                assert refused == [True]
                return
            with pytest.raises(virtbackup.Error, match="disk 'vda' got another image") as caught:
                dom.backupStart(unix(tmp_path))
        assert caught.value.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
        assert refused == [False]
        assert "virtbackup" not in str(machine.state())
        dom.backupStart(unix(tmp_path))
        for disk in ("vda", "sdb"):
            assert nbdclient.read(tmp_path / "nbd.sock", disk)[:1] == b"\7"
        dom.backupStop()


@pytest.mark.parametrize("engine", machines.engines())
def test_an_overlay_with_a_job_of_its_own_in_the_middle_of_a_start(
    tmp_path: pathlib.Path, engine: str
) -> None:
    """The filter that is seen at the disk's root then is not over the image that was frozen."""
    with (
        machines.two_disks(tmp_path) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)
        for name in ("over", "copy"):
            image = machines.image(tmp_path / f"{name}.qcow2", SIZE, "qcow2")
            file = {"driver": "file", "filename": str(image)}
            machine.probe("blockdev-add", driver="qcow2", node_name=name, file=file, backing=None)

        def late(run: process.Run) -> None:
            machine.probe("blockdev-snapshot", node="A", overlay="over")
            job = {"job-id": "theirs", "device": "over", "target": "copy", "sync": "none"}
            machine.probe("blockdev-backup", **job)

        with (
            steps.before("scratch_images", late),
            pytest.raises(virtbackup.Error, match="disk 'vda' got another image"),
        ):
            dom.backupStart(unix(tmp_path))
        assert "virtbackup" not in str(machine.state())


@pytest.mark.parametrize("engine", machines.engines())
def test_a_backup_job_of_somebody_elses_that_begins_in_the_middle_of_a_start(
    tmp_path: pathlib.Path, engine: str
) -> None:
    """Two filters are over the image that was frozen then, and ours is one."""
    if machines.version() < (6, 0, 0):
        return  # where that cannot be told from an overlay with a job, the start is refused
    copy = machines.image(tmp_path / "copy.qcow2", SIZE, "qcow2")
    with (
        machines.two_disks(tmp_path) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)
        file = {"driver": "file", "filename": str(copy)}
        machine.probe("blockdev-add", driver="qcow2", node_name="copy", file=file)

        def late(run: process.Run) -> None:
            job = {"job-id": "theirs", "device": "A", "target": "copy", "sync": "none"}
            machine.probe("blockdev-backup", **job)
            machine.io("vda", "write -P 7 0 64k")

        with steps.after("freeze", late):
            dom.backupStart(unix(tmp_path))
        machine.io("vda", "write -P 8 64k 64k")
        assert nbdclient.read(tmp_path / "nbd.sock", "vda")[: 128 << 10] == bytes(128 << 10)
        dom.backupStop()
        assert "virtbackup" not in str(machine.state())
        assert [job["status"] for job in machine.probe("query-jobs")] == ["running"]


@pytest.mark.parametrize("branch", ["", '<branch name="b"/>'])
@pytest.mark.parametrize("root", ["A", "throttled", "part", "quorum"])
@pytest.mark.parametrize("engine", machines.engines())
def test_a_guest_does_not_go_back_to_a_snapshot_during_a_backup(
    tmp_path: pathlib.Path, engine: str, root: str, branch: str
) -> None:
    """QEMU would change the disk below the filter of the job, which would not save old data; and
    below a filter that it has anyway, or within what it is made of."""
    if machines.version() < (6, 0, 0):
        return  # it has only loadvm, which takes no disk with a filter
    image = machines.image(tmp_path / "a.qcow2", 4 << 20, "qcow2")
    with (
        machines.qemu(
            tmp_path,
            "-object", "throttle-group,id=group",
            "-blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={image}",
            "-blockdev", "throttle,node-name=throttled,throttle-group=group,file=A",
            *_over_an_image("A", root),
            "-device", f"virtio-blk,drive={root},id=vda",
        ) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):  # fmt: skip
        dom = conn.lookupByID(1)
        xml = unix(tmp_path).replace("</domainbackup>", f"{branch}</domainbackup>")

        def snapshot(verb: str) -> str | None:
            job = {"job-id": "theirs", "tag": "before", "vmstate": "A", "devices": ["A"]}
            machine.probe(f"snapshot-{verb}", **job)

            def told() -> Any:
                return {one["id"]: one for one in machine.probe("query-jobs")}["theirs"]

            waiting.until(lambda: told()["status"] == "concluded")
            failure: str | None = told().get("error")
            machine.probe("job-dismiss", id="theirs")
            return failure

        assert snapshot("save") is None
        machine.io("vda", "write -P 5 0 64k")
        before = machine.state()
        dom.backupStart(xml)
        assert "Device has active dirty bitmap" in str(snapshot("load"))
        assert nbdclient.read(tmp_path / "nbd.sock", "vda")[:1] == b"\5"
        dom.backupStop(virtbackup.VIR_DOMAIN_BACKUP_STOP_CANCEL)
        assert machine.state() == before
        assert snapshot("load") is None
        dom.backupStart(unix(tmp_path))
        assert nbdclient.read(tmp_path / "nbd.sock", "vda")[:1] == b"\0"
        dom.backupStop()


def _over_an_image(image: str, root: str) -> tuple[str, ...]:
    """The arguments for a node ROOT that is made of IMAGE, where that name is of such."""
    nodes = {
        "part": f"raw,node-name=part,file={image},offset=0,size={4 << 20}",
        "quorum": f"quorum,node-name=quorum,vote-threshold=1,children.0={image}",
    }
    return ("-blockdev", nodes[root]) if root in nodes else ()


@pytest.mark.parametrize("engine", machines.engines())
def test_a_job_that_somebody_cancels_in_the_middle_of_a_start(
    tmp_path: pathlib.Path, engine: str
) -> None:
    """With the job the node is gone that the hybrid engine was to export."""
    with (
        machines.two_disks(tmp_path) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)

        def late(run: process.Run) -> None:
            machine.probe("job-cancel", id=run.plan.disks[1].job)
            machine.probe.wait_event("BLOCK_JOB_CANCELLED")

        with steps.after("freeze", late):
            ended = "disk 'sdb': its backup job ended: Operation canceled"
            try:
                dom.backupStart(unix(tmp_path))
            except virtbackup.Error as failure:
                assert engine == "hybrid"
                assert ended in str(failure)
            else:
                with pytest.raises(virtbackup.Error, match=ended):
                    dom.backupStop()
        assert "virtbackup" not in str(machine.state())


@pytest.mark.parametrize("step", ["scratch_images", "freeze"])
@pytest.mark.parametrize("engine", machines.engines())
def test_a_guest_that_migrates_between_the_look_and_the_instant(
    tmp_path: pathlib.Path, engine: str, step: str
) -> None:
    """Another QEMU may write to its disks by then, past the job."""
    with (
        machines.two_disks(tmp_path) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)
        probe = machine.probe

        def late(run: process.Run) -> None:
            probe("migrate", uri="exec:cat >/dev/null")
            waiting.until(lambda: probe("query-migrate")["status"] == "completed")

        with (
            steps.before(step, late),
            pytest.raises(virtbackup.Error, match="'vda' is not this guest's to use") as said,
        ):
            dom.backupStart(unix(tmp_path))
        assert said.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
        probe("cont")
        state = machine.state()
        del state["query-fdsets"]  # up to 9.0 none is given up while the guest does not run
        assert "virtbackup" not in str(state)
        dom.backupStart(unix(tmp_path))
        dom.backupStop()


def test_a_disk_that_is_resized_between_the_look_and_the_instant(tmp_path: pathlib.Path) -> None:
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)

        def late(run: process.Run) -> None:
            machine.probe("block_resize", node_name="B", size=SIZE * 2)

        with steps.before("scratch_images", late), pytest.raises(virtbackup.Error) as refused:
            dom.backupStart(unix(tmp_path))
        assert refused.value.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED
        resized = f"disk 'sdb' was resized from {SIZE} to {SIZE * 2} bytes as the backup began"
        assert resized in str(refused.value)
        assert "virtbackup" not in str(machine.state())
        dom.backupStart(unix(tmp_path))
        dom.backupStop()


def test_a_disk_with_a_filter_that_is_resized_as_the_backup_begins(tmp_path: pathlib.Path) -> None:
    with (
        machines.qemu(tmp_path, *_filtered(tmp_path, SIZE)) as machine,
        virtbackup.open(machine.uri) as conn,
    ):
        dom = conn.lookupByID(1)

        def late(run: process.Run) -> None:
            machine.probe("block_resize", node_name="filtered", size=SIZE * 2)

        resized = f"disk 'vda' was resized from {SIZE} to {SIZE * 2} bytes as the backup began"
        with (
            steps.before("scratch_images", late),
            pytest.raises(virtbackup.Error, match=resized),
        ):
            dom.backupStart(unix(tmp_path))
        assert "virtbackup" not in str(machine.state())
        dom.backupStart(unix(tmp_path))
        dom.backupStop()


def _filtered(directory: pathlib.Path, size: int) -> tuple[str, ...]:
    """The arguments for vda of SIZE bytes, whose node ``filtered`` is over its image, ``A``."""
    image = machines.image(directory / "a.qcow2", size, "qcow2")
    return (
        "-object", "throttle-group,id=group",
        "-blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={image}",
        "-blockdev", "throttle,node-name=filtered,throttle-group=group,file=A",
        "-device", "virtio-blk,drive=filtered,id=vda",
    )  # fmt: skip


@pytest.mark.parametrize("branch", ["", '<branch name="b"/>'])
@pytest.mark.parametrize("engine", machines.engines())
def test_a_disk_whose_image_was_made_smaller_below_its_filter(
    tmp_path: pathlib.Path, engine: str, branch: str
) -> None:
    """The filter goes on to tell the old size. Whoever asks what is behind the image's end ends
    QEMU with the hybrid engine, and no bitmap has it that there are zeroes now."""
    xml = unix(tmp_path).replace("</domainbackup>", f"{branch}</domainbackup>")
    with (
        machines.qemu(tmp_path, *_filtered(tmp_path, SIZE)) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)
        dom.backupStart(xml)
        dom.backupStop()
        machine.probe("block_resize", node_name="A", size=SIZE // 2)
        [drive] = machine.probe("query-block")
        told = drive["inserted"]["image"]["virtual-size"]
        before = machine.state()
        smaller = f"disk 'vda' of {SIZE} bytes has an image of {SIZE // 2} bytes, 'A', below"
        if told == SIZE // 2:  # this QEMU's filter has noticed
            assert machines.version() >= (11, 0, 0)
        elif branch or machines.version() >= (6, 0, 0):
            with pytest.raises(virtbackup.Error, match=smaller) as refused:
                dom.backupStart(xml)
            assert refused.value.get_error_code() == libvirt.VIR_ERR_OPERATION_UNSUPPORTED
            assert machine.state() == before
        machine.probe("block_resize", node_name="filtered", size=SIZE // 2)
        dom.backupStart(xml)
        assert len(nbdclient.read(tmp_path / "nbd.sock", "vda")) == SIZE // 2
        dom.backupStop()


@pytest.mark.parametrize("what", ["file", "backing"])
@pytest.mark.parametrize("engine", machines.engines())
def test_another_image_below_a_disk_during_its_backup(
    tmp_path: pathlib.Path, engine: str, what: str
) -> None:
    """QEMU changes the disk below the filter of the job, which does not save old data."""
    if machines.version() < (6, 1, 0):
        return  # it has no blockdev-reopen
    base, other = (machines.image(tmp_path / name, 4 << 20) for name in ("base", "other"))
    overlay = machines.image(tmp_path / "a.qcow2", 4 << 20, "qcow2")
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -q -P 5 0 64k", base], check=True)
    nodes: tuple[str, ...] = ("-blockdev", f"file,node-name=other,filename={other}")
    below = f"file,node-name=base,filename={base}"
    if what == "file":
        nodes += ("-blockdev", below, "-blockdev", "raw,node-name=A,file=base")
        options: dict[str, Any] = {"driver": "raw", "node-name": "A", "file": "other"}
    else:
        file = {"driver": "file", "filename": str(overlay)}
        over = f"qcow2,node-name=A,backing=base,file.driver=file,file.filename={overlay}"
        nodes += ("-blockdev", f"{below},read-only=on", "-blockdev", over)
        options = {"driver": "qcow2", "node-name": "A", "backing": "other", "file": file}
    with (
        machines.qemu(tmp_path, *nodes, "-device", "virtio-blk,drive=A,id=vda") as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)
        dom.backupStart(unix(tmp_path))
        machine.probe("blockdev-reopen", options=[options])
        assert nbdclient.read(tmp_path / "nbd.sock", "vda")[:1] == b"\0"  # not what it was
        _is_told(
            dom, tmp_path, "it got another image, 'other', below its node 'A' during the backup"
        )


def _is_told(dom: virtbackup.Domain, directory: pathlib.Path, reason: str) -> None:
    """The running backup is not good for REASON, before its stop and by it; the next one is."""
    [disk] = dom.backupGetInfo().disks
    assert disk.reason == reason
    with pytest.raises(virtbackup.Error, match=f"disk 'vda': {reason}"):
        dom.backupStop()
    dom.backupStart(unix(directory))
    dom.backupStop()


@pytest.mark.parametrize("what", ["none", "the next"])
@pytest.mark.parametrize("engine", machines.engines())
def test_an_image_that_is_taken_away_during_a_backup(
    tmp_path: pathlib.Path, engine: str, what: str
) -> None:
    if machines.version() < (6, 1, 0):
        return  # it has no blockdev-reopen
    with (
        machines.qemu(tmp_path, *_three_images(tmp_path)) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)
        dom.backupStart(unix(tmp_path))
        assert nbdclient.read(tmp_path / "nbd.sock", "vda")[:1] == b"\2"
        file = {"driver": "file", "filename": f"{tmp_path}/top"}
        backing = None if what == "none" else "base"
        options = {"driver": "qcow2", "node-name": "A", "backing": backing, "file": file}
        machine.probe("blockdev-reopen", options=[options])
        assert nbdclient.read(tmp_path / "nbd.sock", "vda")[:1] != b"\2"
        _is_told(
            dom,
            tmp_path,
            "the image 'mid' was taken away from below its node 'A' during the backup",
        )


@pytest.mark.parametrize(("node", "file", "below"), [("A", "top", "mid"), ("mid", "mid", "base")])
@pytest.mark.parametrize("root", ["A", "throttled"])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("engine", machines.engines())
def test_an_image_that_is_taken_away_beside_a_stream(
    tmp_path: pathlib.Path, engine: str, ends: bool, root: str, node: str, file: str, below: str
) -> None:
    """As long as that job is there, some QEMUs cannot be asked for their nodes, but for what a
    drive has at its root."""
    if machines.version() < (6, 1, 0):
        return  # it has no blockdev-reopen
    base = machines.image(tmp_path / "of-other", 4 << 20, "qcow2")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q 0 4M", str(base)], check=True)
    other = machines.image(tmp_path / "other", 4 << 20, "qcow2", backing=base)
    *nodes, device, vda = _three_images(tmp_path)
    with (
        machines.qemu(
            tmp_path,
            *nodes,
            "-object", "throttle-group,id=group",
            "-blockdev", "throttle,node-name=throttled,throttle-group=group,file=A",
            device, vda.replace("drive=A", f"drive={root}"),
            "-blockdev", f"qcow2,node-name=other,file.driver=file,file.filename={other}",
            "-device", "virtio-blk,drive=other,id=vdb",
        ) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
        contextlib.ExitStack() as undo,
    ):  # fmt: skip
        dom = conn.lookupByID(1)
        dom.backupStart(unix(tmp_path))
        machine.probe("block-stream", job_id="theirs", device="other", speed=1)
        options = {
            "driver": "qcow2", "node-name": node, "backing": None, "read-only": node != "A",
            "file": {"driver": "file", "filename": f"{tmp_path}/{file}"},
        }  # fmt: skip
        machine.probe("blockdev-reopen", options=[options])
        if ends:
            end = functools.partial(machine.probe, "block-job-cancel", device="theirs")
            late = threading.Timer(0.2, end)
            undo.callback(late.join)
            late.start()
        with pytest.raises(virtbackup.Error) as raised:
            dom.backupStop()
        told = f"disk 'vda': the image '{below}' was taken away from below its node '{node}'"
        if capabilities.STREAM_CRASH.affects(machines.version()) and node != "A" and not ends:
            told = (
                f"disk 'vda': the image '{below}' is gone from below its node '{node}', and whether"
                " its data is still there cannot be told: job 'theirs' is not over"
            )
        assert told in str(raised.value)
        assert "'vdb'" not in str(raised.value)


@pytest.mark.parametrize("base", [None, "base"])
@pytest.mark.parametrize("engine", machines.engines())
def test_images_that_are_streamed_during_a_backup(
    tmp_path: pathlib.Path, engine: str, base: str | None
) -> None:
    """The same images are gone, and the data is not; nor does a job of another disk's matter."""
    below = machines.image(tmp_path / "of-other", 4 << 20, "qcow2")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q 0 4M", str(below)], check=True)
    other = machines.image(tmp_path / "other", 4 << 20, "qcow2", backing=below)
    vdb = (
        "-blockdev", f"qcow2,node-name=other,file.driver=file,file.filename={other}",
        "-device", "virtio-blk,drive=other,id=vdb",
    )  # fmt: skip
    with (
        machines.qemu(tmp_path, *_three_images(tmp_path), *vdb) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)
        dom.backupStart(unix(tmp_path))
        before = nbdclient.read(tmp_path / "nbd.sock", "vda")
        into = {} if base is None else {"base-node": base}
        machine.probe("block-stream", **{"job-id": "stream", "device": "A", **into})
        machine.probe.wait_event("BLOCK_JOB_COMPLETED")
        waiting.until(lambda: not any(job["id"] == "stream" for job in machine.probe("query-jobs")))
        assert nbdclient.read(tmp_path / "nbd.sock", "vda") == before
        machine.probe("block-stream", job_id="another", device="other", speed=1)
        assert [disk.reason for disk in dom.backupGetInfo().disks] == [None, None]
        dom.backupStop()


def test_a_snapshot_into_which_all_is_streamed_during_a_backup(tmp_path: pathlib.Path) -> None:
    """The disk is below the job's filter yet, and what it was at the start as well."""
    if "hybrid" not in machines.engines():
        return  # there is no snapshot during the others' backups
    image, over = (machines.image(tmp_path / name, 4 << 20, "qcow2") for name in ("a", "over"))
    disk = ("-blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={image}")
    with (
        machines.qemu(tmp_path, *disk, "-device", "virtio-blk,drive=A,id=vda") as machine,
        virtbackup.open(f"{machine.uri}?engine=hybrid") as conn,
    ):
        dom = conn.lookupByID(1)
        machine.io("vda", "write -P 5 0 64k")
        dom.backupStart(unix(tmp_path))
        before = nbdclient.read(tmp_path / "nbd.sock", "vda")
        file = {"driver": "file", "filename": str(over)}
        machine.probe("blockdev-add", driver="qcow2", node_name="B", file=file, backing=None)
        machine.probe("blockdev-snapshot", node="A", overlay="B")
        machine.probe("block-stream", job_id="stream", device="B")
        machine.probe.wait_event("BLOCK_JOB_COMPLETED")
        machine.io("vda", "write -P 6 0 128k")
        assert nbdclient.read(tmp_path / "nbd.sock", "vda") == before
        dom.backupStop()
        machine.probe("blockdev-del", node_name="A")  # it is not for us to take


def _three_images(directory: pathlib.Path) -> tuple[str, ...]:
    """The arguments for vda, whose node A is over ``mid``, and that over ``base``."""
    base = machines.image(directory / "base", 4 << 20, "qcow2")
    mid = machines.image(directory / "mid", 4 << 20, "qcow2", backing=base)
    top = machines.image(directory / "top", 4 << 20, "qcow2", backing=mid)
    for image, byte in ((base, 1), (mid, 2)):
        write = ["-f", "qcow2", "-c", f"write -q -P {byte} 0 64k", str(image)]
        subprocess.run(["qemu-io", *write], check=True)
    file = "file.driver=file,file.filename"
    return (
        "-blockdev", f"qcow2,node-name=base,read-only=on,{file}={base}",
        "-blockdev", f"qcow2,node-name=mid,read-only=on,backing=base,{file}={mid}",
        "-blockdev", f"qcow2,node-name=A,backing=mid,{file}={top}",
        "-device", "virtio-blk,drive=A,id=vda",
    )  # fmt: skip


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("engine", machines.engines())
def test_another_part_of_its_file_during_a_backup(
    tmp_path: pathlib.Path, engine: str, filtered: bool
) -> None:
    if machines.version() < (6, 1, 0):
        return  # it has no blockdev-reopen
    size = 4 << 20
    file = machines.image(tmp_path / "file", 3 * size)
    write = ["-f", "raw", "-c", f"write -q -P 5 {2 * size} 64k", str(file)]
    subprocess.run(["qemu-io", *write], check=True)
    nodes = [
        "-object", "throttle-group,id=group",
        "-blockdev", f"file,node-name=file,filename={file}",
        "-blockdev", f"raw,node-name=A,file=file,offset={size},size={size}",
    ]  # fmt: skip
    if filtered:
        nodes += ["-blockdev", "throttle,node-name=throttled,throttle-group=group,file=A"]
    root = "throttled" if filtered else "A"
    with (
        machines.qemu(tmp_path, *nodes, "-device", f"virtio-blk,drive={root},id=vda") as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)
        dom.backupStart(unix(tmp_path))
        assert dom.backupGetInfo().state == "running"
        options = {"driver": "raw", "node-name": "A", "file": "file", "size": size}
        machine.probe("blockdev-reopen", options=[{**options, "offset": 2 * size}])
        assert nbdclient.read(tmp_path / "nbd.sock", "vda")[:1] == b"\5"  # not what it was
        _is_told(
            dom,
            tmp_path,
            f"its node 'A' shows its file from byte {2 * size} on, no more from {size}",
        )


@pytest.mark.parametrize("engine", machines.engines())
def test_a_snapshot_below_a_filter_during_a_backup(tmp_path: pathlib.Path, engine: str) -> None:
    """The guest's writes to the new image go through the filter of the job, too."""
    over = machines.image(tmp_path / "over", 4 << 20, "qcow2")
    with (
        machines.qemu(tmp_path, *_filtered(tmp_path, 4 << 20)) as machine,
        virtbackup.open(f"{machine.uri}?engine={engine}") as conn,
    ):
        dom = conn.lookupByID(1)
        machine.io("vda", "write -P 5 0 64k")
        dom.backupStart(unix(tmp_path))
        file = {"driver": "file", "filename": str(over)}
        machine.probe("blockdev-add", driver="qcow2", node_name="B", file=file, backing=None)
        machine.probe("blockdev-snapshot", node="A", overlay="B")
        machine.io("vda", "write -P 6 0 64k")
        assert nbdclient.read(tmp_path / "nbd.sock", "vda")[:1] == b"\5"
        dom.backupStop()
        dom.backupStart(unix(tmp_path))
        assert nbdclient.read(tmp_path / "nbd.sock", "vda")[:1] == b"\6"
        dom.backupStop()


def test_a_backup_that_ends_while_a_migration_takes_its_bitmaps_along(
    tmp_path: pathlib.Path,
) -> None:
    """What keeps a disk from going back to a snapshot cannot be removed then: that is told, and
    done by the next call once it can be."""
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        probe = machine.probe
        before = machine.state()
        taken_along = [{"capability": "dirty-bitmaps", "state": True}]
        probe("migrate-set-capabilities", capabilities=taken_along)
        probe("migrate-set-parameters", max_bandwidth=1000)
        dom.backupStart(unix(tmp_path))
        guarded = "-guard" in str(machine.state())
        probe("migrate", uri="exec:cat >/dev/null")
        waiting.until(lambda: probe("query-migrate")["status"] == "active")
        dom.backupStop()
        if guarded:
            assert machine.state() != before
            with pytest.raises(virtbackup.Error, match=r"in use: bitmap 'virtbackup-.*-guard' of"):
                dom.backupCleanup()
        probe("migrate_cancel")
        waiting.until(lambda: probe("query-migrate")["status"] == "cancelled")
        removed = dom.backupCleanup()
        assert len([line for line in removed if "-guard" in line]) == 2 * guarded
        assert machine.state() == before


def test_disks_are_frozen_at_one_instant(tmp_path: pathlib.Path) -> None:
    """A guest that writes i to one disk, then to the other: never seen further than one."""
    with machines.two_disks(tmp_path) as machine, virtbackup.open(machine.uri) as conn:
        dom = conn.lookupByID(1)
        done = threading.Event()
        written = []

        def write() -> None:
            number = 0
            while not done.is_set():
                number = number % 250 + 1
                for disk in ("vda", "sdb"):
                    machine.io(disk, f"write -P {number} 0 64k")
                written.append(number)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(10):
                dom.backupStart(unix(tmp_path))
                seen = [first_chunk(tmp_path / "nbd.sock", disk) for disk in ("vda", "sdb")]
                now = len(written)
                waiting.until(lambda now=now: len(written) > now + 1)  # type: ignore[misc]
                again = [first_chunk(tmp_path / "nbd.sock", disk) for disk in ("vda", "sdb")]
                dom.backupStop()
                assert all(len(set(chunk)) == 1 for chunk in seen), "a torn write"
                first, second = (chunk[0] for chunk in seen)
                assert (first - second) % 250 in (0, 1)
                assert again == seen
        finally:
            done.set()
            writer.join()


def first_chunk(socket_path: pathlib.Path, export: str) -> bytes:
    client = nbd.NBD()
    client.set_export_name(export)
    client.connect_unix(str(socket_path))
    try:
        return bytes(client.pread(64 << 10, 0))
    finally:
        client.shutdown()


def test_storage_daemon(tmp_path: pathlib.Path) -> None:
    """No guest, no devices: disks are the nodes nobody is over.

    Written to by a FUSE export; QEMU has none before 6.0, and no other way to write beside ours.
    """
    path = machines.image(tmp_path / "a.qcow2", 8 << 20, "qcow2")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 4k", path], check=True)
    machines.image(tmp_path / "b.raw", 4 << 20)
    mount = tmp_path / "guest"
    mount.touch()
    export = ("--export", f"fuse,id=guest,node-name=A,mountpoint={mount},writable=on")
    written_to = machines.version() >= (6, 0, 0)
    with (
        machines.storage_daemon(
            tmp_path,
            "--blockdev", f"file,node-name=fa,filename={path}",
            "--blockdev", "qcow2,node-name=A,file=fa",
            "--blockdev", f"raw,node-name=B,file.driver=file,file.filename={tmp_path}/b.raw",
            *(export if written_to else ()),
        ) as machine,
        virtbackup.open(machine.uri) as conn,
    ):  # fmt: skip
        [dom] = conn.listAllDomains()
        before = machine.state()
        told = dom.XMLDesc()
        dom.branchCreate("b")
        dom.backupStart(unix(tmp_path))
        assert dom.XMLDesc() == told
        assert [branch.name for branch in dom.branchList()] == ["b"]
        assert set(nbdclient.exports(tmp_path / "nbd.sock")) == {"A", "B"}
        if written_to:
            with mount.open("r+b", buffering=0) as disk:
                assert disk.read(4096) == b"\1" * 4096
                disk.seek(0)
                disk.write(b"new" * 1000)
        assert nbdclient.read(tmp_path / "nbd.sock", "A")[:4096] == b"\1" * 4096
        dom.backupStop()
        dom.branchDelete("b")
        assert machine.state() == before
        assert not (tmp_path / "nbd.sock").exists()


@pytest.mark.skipif(machines.version() < (6, 0, 0), reason="it has no FUSE export")
def test_a_storage_daemon_with_an_iothread(tmp_path: pathlib.Path) -> None:
    """It would abort with any engine (7.2), or with hybrid, which is not taken then."""
    machines.image(tmp_path / "a", 1 << 20)
    (mount := tmp_path / "guest").touch()
    with (
        machines.storage_daemon(
            tmp_path,
            "--object", "iothread,id=io0",
            "--blockdev", f"file,node-name=A,filename={tmp_path}/a",
            "--export", f"fuse,id=guest,node-name=A,mountpoint={mount},writable=on,iothread=io0",
        ) as machine,
        virtbackup.open(machine.uri) as conn,
        virtbackup.open(f"{machine.uri}?engine={machines.engines()[-1]}") as other,
    ):  # fmt: skip
        [dom], [refused] = conn.listAllDomains(), other.listAllDomains()
        before = machine.state()
        with pytest.raises(virtbackup.Error, match="disk 'A' runs in iothread 'io0', which QEMU"):
            refused.backupStart(unix(tmp_path))
        assert machine.state() == before
        if machines.version() >= (8, 0, 0):
            dom.backupStart(unix(tmp_path))
            with mount.open("r+b") as disk:
                disk.write(b"new")
            assert nbdclient.read(tmp_path / "nbd.sock", "A") == bytes(1 << 20)
            dom.backupStop()


@pytest.mark.skipif(machines.version() < (7, 0, 0), reason="it has no snapshot-access")
def test_somebodys_own_snapshot_in_a_storage_daemon(tmp_path: pathlib.Path) -> None:
    """That is of his instant, and no disk: the disk below is what cannot be backed up just now."""
    for name in ("a", "scratch"):
        machines.image(tmp_path / name, 1 << 20)
    with (
        machines.storage_daemon(
            tmp_path,
            "--blockdev", f"file,node-name=A,filename={tmp_path}/a",
            "--blockdev", f"file,node-name=S,filename={tmp_path}/scratch",
            "--blockdev", "copy-before-write,node-name=C,file=A,target=S",
            "--blockdev", "snapshot-access,node-name=snapshot,file=C",
        ) as machine,
        virtbackup.open(machine.uri) as conn,
    ):  # fmt: skip
        [dom] = conn.listAllDomains()
        before = machine.state()
        with pytest.raises(virtbackup.Error, match="disk 'C' already in active block job"):
            dom.backupStart(unix(tmp_path))
        assert machine.state() == before


@pytest.mark.parametrize("step", ["scratch_images", "freeze"])
def test_an_overlay_of_a_storage_daemon_in_the_middle_of_a_start(
    tmp_path: pathlib.Path, step: str
) -> None:
    overlay = machines.image(tmp_path / "over.qcow2", 4 << 20, "qcow2")
    disks = ("A", "B")
    for disk in disks:
        machines.image(tmp_path / disk, 4 << 20, "qcow2")
    nodes = [f"qcow2,node-name={disk},file.driver=file,file.filename={tmp_path}/{disk}"
             for disk in disks]  # fmt: skip
    options = [word for node in nodes for word in ("--blockdev", node)]
    with (
        machines.storage_daemon(tmp_path, *options) as machine,
        virtbackup.open(machine.uri) as conn,
    ):
        [dom] = conn.listAllDomains()
        file = {"driver": "file", "filename": str(overlay)}
        machine.probe("blockdev-add", driver="qcow2", node_name="over", file=file, backing=None)
        leave_out = unix(tmp_path, '<disk name="over" present="no"/>')

        def late(run: process.Run) -> None:
            refused = machine.probe.reply("blockdev-snapshot", node="A", overlay="over")
            assert ("error" in refused) == (step == "freeze" and machines.version() < (8, 0, 0))

        with steps.before(step, late):
            if step == "freeze" and machines.version() < (8, 0, 0):
                dom.backupStart(leave_out)
                dom.backupStop()
                return
            with pytest.raises(virtbackup.Error, match=r"disk 'A' got another image .*'over' in"):
                dom.backupStart(leave_out)
        assert "virtbackup" not in str(machine.state())
        dom.backupStart(unix(tmp_path))
        assert set(nbdclient.exports(tmp_path / "nbd.sock")) == {"over", "B"}
        dom.backupStop()
