# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks that are backed up to block devices: what is on them, what is refused, and what fails."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator

import libvirt
import pytest

import virtbackup
from tests import strict_json, waiting
from tests.live import machines, nbdclient, places, points
from virtbackup.nbd import checksum, device
from virtbackup.tools import devices, listing, manifest, pull, verify

pytestmark = [
    pytest.mark.needs("qemu-system-x86_64", "qemu-img", "qemu-nbd", "losetup", "nbdcopy"),
    pytest.mark.may_skip,  # where there are no loop devices
    pytest.mark.timeout(120),
]

BLOCK = checksum.BLOCK
SIZE = points.SIZE + 3 * BLOCK
"""Of a device: a bit more than the disk."""


@pytest.fixture
def guest(tmp_path: pathlib.Path) -> Iterator[points.Guest]:
    (tmp_path / "images").mkdir()
    with points.guest(tmp_path / "images") as one:
        yield one


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    with places.block_device(tmp_path / "device", SIZE) as made:
        yield made


def backing(disk: pathlib.Path, tmp_path: pathlib.Path) -> bytes:
    """What the device has, by the file behind it."""
    subprocess.run(["sync", disk], check=True)
    return (tmp_path / "device").read_bytes()


def names(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def idle(guest: points.Guest) -> bool:
    """Whether no backup runs."""
    try:
        guest.domain.backupGetInfo()
    except virtbackup.Error:
        return True
    return False


# --- good -----------------------------------------------------------------------------------------


def test_a_disk_on_a_device(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Every command reads it there, and what is behind the disk is nobody's."""
    out, shown = tmp_path / "out", guest.contents()
    status, said, err = points.call(
        "-c", guest.machine.uri, "backup-pull", "vm", str(out), f"--target=vda={disk}", "--check"
    )
    assert (status, err) == (0, "")
    assert f"vda: {disk} (4.00 MiB, 4.00 MiB stored)\n" in said
    assert names(out) == ["manifest.json", "sdb.qcow2"]
    assert disk.read_bytes() == shown["vda"] + places.FF * (SIZE - points.SIZE)
    assert backing(disk, tmp_path) == disk.read_bytes()
    [vda, sdb] = json.loads((out / "manifest.json").read_text())["disks"]
    assert (vda["type"], vda["file"], vda["format"]) == ("block", str(disk), "raw")
    assert (vda["size"], vda["kind"], vda["tables"]) == (points.SIZE, "full", None)
    assert (sdb["type"], sdb["file"]) == ("file", "sdb.qcow2")

    status, said, err = points.call("backup-list", str(out))
    assert (status, err) == (0, "")
    assert f" on {disk}\n" in said
    status, said, err = points.call("backup-list", str(out), "--json")
    told = json.loads(said)["points"][0]["disks"][0]
    assert (told["type"], told["file"], told["problem"]) == ("block", str(disk), None)

    status, said, err = points.call("backup-verify", str(out))
    assert (status, err) == (0, "")
    assert said.startswith("2 files, ")

    restored = tmp_path / "restored"
    status, _, err = points.call("backup-restore", str(out), str(restored), "--format=raw")
    assert (status, err) == (0, "")
    for name in shown:
        assert (restored / f"{name}.raw").read_bytes() == shown[name]
    argv = ("backup-restore", str(out), str(disk), "--disk=vda", "--force")
    status, _, err = points.call(*argv)
    assert (status, f"{disk} is a file of the backups themselves" in err) == (1, True)

    status, said, err = points.call("backup-map", str(out), "--disk=vda", "--json")
    assert (status, err) == (0, "")
    assert f'"size": {points.SIZE}' in said


@pytest.mark.needs("qemu-storage-daemon")
def test_it_is_served(guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shown = guest.contents()
    pull.pull(guest.domain, tmp_path / "out", targets={"sdb": disk}, fmt="raw")
    argv = ["backup-serve", str(tmp_path / "out"), "--unix", str(tmp_path / "sock")]
    with subprocess.Popen(
        [sys.executable, "-m", "virtbackup.tools.virsh_backup", *argv],
        stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("Backup of ")
            for name in shown:
                got = tmp_path / "got"
                uri = nbdclient.uri(tmp_path / "sock", name)
                subprocess.run(["nbdcopy", uri, got], check=True)
                assert got.read_bytes() == shown[name]
        finally:
            server.send_signal(signal.SIGTERM)


def test_all_disks_on_devices(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """By a link, which stays what the manifest tells, and from another directory."""
    link = tmp_path / "by-name"
    link.symlink_to(disk)
    with places.block_device(tmp_path / "other", points.SIZE + 512) as other:
        shown = guest.contents()
        made = pull.pull(
            guest.domain, tmp_path / "out",
            targets={"vda": pathlib.Path(os.path.relpath(link)), "sdb": other},
        )  # fmt: skip
        assert [one.file for one in made.disks] == [str(link), str(other)]
        assert names(tmp_path / "out") == ["manifest.json"]
        assert disk.read_bytes()[: points.SIZE] == shown["vda"]
        assert other.read_bytes() == shown["sdb"] + places.FF * 512
        assert verify.verify(listing.read(tmp_path / "out")).good


def test_what_is_spoilt_on_it_is_found(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    pull.pull(guest.domain, out, targets={"vda": disk})
    source = random.Random(3)
    content = disk.read_bytes()
    for at in (0, points.SIZE - 1, *source.sample(range(points.SIZE), 20)):
        with disk.open("r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1 << source.randrange(8)]))
        [problem] = verify.verify(listing.read(out)).problems
        assert (problem.disk, problem.file) == ("vda", str(disk))
        assert "it is not what was backed up" in problem.text
        with disk.open("r+b") as file:
            file.seek(at)
            file.write(content[at : at + 1])
    with disk.open("r+b") as file:
        file.seek(points.SIZE)  # nobody's
        file.write(b"x")
    assert verify.verify(listing.read(out)).good
    with places.block_device(tmp_path / "small", points.SIZE - 512) as small:
        text = (out / "manifest.json").read_text()
        made = manifest.Manifest.from_json(text.replace(f'"{disk}"', f'"{small}"'))
        (out / "manifest.json").write_text(made.to_json())
        [problem] = verify.verify(listing.read(out)).problems
        assert problem.text == (
            f"it has {points.SIZE - 512} bytes, expected at least {points.SIZE}"
        )
    for other, text in ((tmp_path / "small", "it is no block device"), ("/none", "it is missing")):
        disks = tuple(
            one if one.type == "file" else manifest.Disk(**{**vars(one), "file": str(other)})
            for one in made.disks
        )
        changed = manifest.Manifest(**{**vars(made), "disks": disks})
        (out / "manifest.json").write_text(changed.to_json())
        [problem] = verify.verify(listing.read(out)).problems
        assert problem.text == text


# --- a manifest that may name anything ------------------------------------------------------------


def renamed(directory: pathlib.Path, old: pathlib.Path, new: pathlib.Path) -> None:
    """Have the manifest of DIRECTORY, which is sound, name another device."""
    path = directory / "manifest.json"
    made = manifest.Manifest.from_json(path.read_text())
    disks = tuple(
        dataclasses.replace(one, file=str(new)) if one.file == str(old) else one
        for one in made.disks
    )
    path.write_text(dataclasses.replace(made, disks=disks).to_json())


@contextlib.contextmanager
def serving(
    directory: pathlib.Path, *options: str
) -> Iterator[tuple[dict[str, str], pathlib.Path]]:
    """A backup-serve: its exports, and the file that has what it says on standard error."""
    errors = directory.with_suffix(".err")
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "backup-serve", str(directory)]
    with (
        errors.open("w") as log,
        subprocess.Popen(
            [*argv, *options, "--json"], stdout=subprocess.PIPE, stderr=log, text=True
        ) as server,
    ):
        try:
            yield strict_json.loads(strict_json.first(server))["exports"], errors
        finally:
            server.send_signal(signal.SIGTERM)


@pytest.mark.needs("qemu-storage-daemon")
def test_nothing_else_is_given_away(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A forged manifest, one of another machine, or a device that has something else by now."""
    out, shown = tmp_path / "out", guest.contents()
    pull.pull(guest.domain, out, targets={"vda": disk})
    with places.block_device(tmp_path / "secret", SIZE) as secret:
        secret.write_bytes(b"secret\n" * (SIZE // 7))
        renamed(out, disk, secret)
        argv = ("backup-serve", str(out), "--unix", str(tmp_path / "sock"))
        status, said, err = points.call(*argv)
        assert (status, said) == (1, "")
        warning, error, _advice = err.splitlines()
        assert warning == (
            f"warning: {secret} is not in the directory and is checked first;"
            f" --device vda={secret} serves it at once"
        )
        assert f"disk 'vda': {secret} is not good: it is not what was backed up: its" in error
        assert not (tmp_path / "sock").exists()

        status, said, err = points.call("backup-restore", str(out), str(tmp_path / "restored"))
        assert (status, said) == (1, "")
        assert f"disk 'vda': {secret} is not good" in err
        assert not (tmp_path / "restored").exists()
        with places.block_device(tmp_path / "other", SIZE) as other:
            status, said, err = points.call(
                "backup-restore", str(out), str(other), "--disk=vda", "--force"
            )
            assert (status, said) == (1, "")
            assert err.splitlines()[0].endswith(f"not {checksum_of(out, 'vda')}")
            assert other.read_bytes() == places.FF * SIZE

        for option in ("--disk=sdb", f"--device=vda={disk}"):
            with serving(out, option) as (exports, log):
                for name, uri in exports.items():
                    assert nbdclient.read_uri(uri) == shown[name]
                assert log.read_text() == ""
        with serving(out, f"--device=vda={secret}") as (exports, _):
            assert nbdclient.read_uri(exports["vda"]).startswith(b"secret\nsecret\n")


def checksum_of(directory: pathlib.Path, name: str) -> str:
    [point] = listing.read(directory).points
    return point.disk(name).checksum.value


@pytest.mark.needs("qemu-storage-daemon")
def test_a_device_that_is_elsewhere_now(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out, shown = tmp_path / "out", guest.contents()
    pull.pull(guest.domain, out, targets={"vda": disk})
    renamed(out, disk, pathlib.Path("/dev/gone"))
    named = f"--device=vda={disk}"
    status, _, err = points.call("backup-verify", str(out))
    assert (status, "disk 'vda', /dev/gone: it is missing" in err) == (1, True)
    status, _, err = points.call("backup-verify", str(out), named)
    assert (status, err) == (0, "")
    restored = tmp_path / "restored"
    argv = ("backup-restore", str(out), str(restored), "--format=raw")
    status, _, err = points.call(*argv)
    assert (status, "/dev/gone is not good: it is missing" in err) == (1, True)
    status, _, err = points.call(*argv, named)
    assert (status, err) == (0, "")
    assert (restored / "vda.raw").read_bytes() == shown["vda"]
    status, _, err = points.call(
        "backup-restore", str(out), str(disk), "--disk=vda", "--force", named
    )
    assert (status, f"{disk} is a file of the backups themselves" in err) == (1, True)
    with serving(out, named) as (exports, _):
        assert nbdclient.read_uri(exports["vda"]) == shown["vda"]
    status, said, err = points.call("backup-map", str(out), named, "--json")
    assert (status, err) == (0, "")
    assert len(json.loads(said)["disks"]) == 2
    with disk.open("r+b") as opened:
        opened.write(b"x")
    status, _, err = points.call("backup-verify", str(out), named)
    assert (status, f"disk 'vda', {disk}: it is not what was backed up" in err) == (1, True)
    for command in ("backup-verify", "backup-serve", "backup-map"):
        status, _, err = points.call(command, str(out), f"--device=sdb={disk}")
        assert status == 1
        assert f"no disk 'sdb' of {out} is on a device, so it is not {disk}" in err
        status, _, err = points.call(command, str(out), "--device=vda")
        assert (status, "invalid --device 'vda': expected DISK=DEVICE" in err) == (2, True)


# --- refused --------------------------------------------------------------------------------------


def refused(guest: points.Guest, tmp_path: pathlib.Path, *argv: str) -> str:
    """What backup-pull says; nothing has changed by then."""
    status, out, err = points.call(
        "-c", guest.machine.uri, "backup-pull", "vm", str(tmp_path / "out"), *argv
    )
    assert (status, out) == (1, "")
    assert not (tmp_path / "out").exists()
    assert idle(guest)
    assert err.startswith("error: ")
    return err


def test_a_restore_over_the_backup(guest: points.Guest, tmp_path: pathlib.Path) -> None:
    """To the device that another disk was backed up to, by the name of a part of it or of the
    whole: it has the same bytes."""
    (tmp_path / "file").write_bytes(bytes(4 * SIZE))
    with places.loop_device(tmp_path / "file", "--partscan") as whole:
        part = places.add_part(whole, 2 * SIZE)
        if not part.is_block_device():
            pytest.skip("no partitions")
        for taken, other in ((part, whole), (whole, part)):
            out = tmp_path / taken.name
            target = f"--target=vda={taken}"
            done = points.call("-c", guest.machine.uri, "backup-pull", "vm", str(out), target)
            assert done[0] == 0
            before = whole.read_bytes()
            argv = ("backup-restore", str(out), str(other), "--disk=sdb", "--force")
            status, _, err = points.call(*argv)
            assert (status, f"{other} is a file of the backups themselves" in err) == (1, True)
            assert whole.read_bytes() == before


def test_what_is_no_device(
    guest: points.Guest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path, pathlib.Path("/dev/null")):
        text = refused(guest, tmp_path, f"--target=vda={path}")
        assert f"disk 'vda': {path} is not a block device\n" in text
    text = refused(guest, tmp_path, f"--target=vda={tmp_path / 'none'}")
    assert f"disk 'vda': cannot open {tmp_path / 'none'} for writing: No such file" in text
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    text = refused(guest, tmp_path, "--target=vda=none")
    assert "disk 'vda': cannot open none for writing: No such file" in text


def test_devices_that_cannot_be(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    target = f"--target=vda={disk}"
    for argv, text in (
        ((f"--target=vdz={disk}",), f"disk 'vdz' is not in the backup, so {disk} cannot take it"),
        ((target, f"--target=sdb={disk}"), f"disk 'sdb': {disk} takes disk 'vda' already"),
        ((target, "--branch=b"), f"disk 'vda': a backup of a branch cannot go to {disk}, as"),
        ((target, "--branch=b", "--incremental"), "increments are qcow2 images over the files"),
        ((target, "--incremental"), "disk 'vda': backup type 'incremental' needs a branch"),
    ):
        assert text in refused(guest, tmp_path, *argv)
    link = tmp_path / "link"
    link.symlink_to(disk)
    text = refused(guest, tmp_path, target, f"--target=sdb={link}")
    assert f"disk 'sdb': {link} takes disk 'vda' already" in text
    with places.loop_device(tmp_path / "device") as again:
        for one, two in ((disk, again), (again, disk)):
            text = refused(guest, tmp_path, f"--target=vda={one}", f"--target=sdb={two}")
            assert f"disk 'sdb': {two} takes disk 'vda' already" in text
    document = tmp_path / "without.xml"
    document.write_text(
        f'<domainbackup><address type="unix" path="{tmp_path}/s"/>'
        '<disks><disk name="vda" present="no"/></disks></domainbackup>'
    )
    text = refused(guest, tmp_path, target, f"--xml={document}")
    assert "disk 'vda' is not in the backup" in text
    assert disk.read_bytes() == places.FF * SIZE


def test_loop_devices_over_parts_of_a_file(disk: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """They have bytes in common where the parts meet."""
    file, half = tmp_path / "device", SIZE // 2
    with (
        places.loop_device(file, f"--sizelimit={half}") as first,
        places.loop_device(file, f"--offset={half}") as second,
        places.loop_device(file, f"--offset={half - 512}", "--sizelimit=1024") as both,
    ):
        made = [disk, first, second, both]
        apart = [(a, b) for a in made for b in made if not device.share(a, b)]
    assert apart == [(first, second), (second, first)]


@pytest.mark.parametrize("given", ["vda", "vda=", "=/dev/x"])
def test_targets_that_are_none(given: str, tmp_path: pathlib.Path) -> None:
    argv = ["-c", "qmp:///none", "backup-pull", "vm", str(tmp_path), f"--target={given}"]
    status, _, err = points.call(*argv)
    assert (status, f"invalid --target '{given}': expected DISK=DEVICE" in err) == (2, True)
    status, _, err = points.call(*argv[:-1], "--target=a=/b", "--target=a=/c")
    assert (status, "disk 'a' has one already" in err) == (2, True)


def test_a_device_that_is_too_small(guest: points.Guest, tmp_path: pathlib.Path) -> None:
    with places.block_device(tmp_path / "small", points.SIZE - 512) as small:
        text = refused(guest, tmp_path, f"--target=vda={small}")
        assert text.endswith(
            f"disk 'vda': {small} is too small: it has {points.SIZE - 512} bytes, and the disk"
            f" {points.SIZE}\n"
        )
        assert small.read_bytes() == places.FF * (points.SIZE - 512)


def test_a_device_that_can_only_be_read(guest: points.Guest, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    with places.loop_device(tmp_path / "file", "--read-only") as disk:
        text = refused(guest, tmp_path, f"--target=vda={disk}")
    assert text.endswith(f"disk 'vda': {disk} is read-only: nothing was written to it\n")


@pytest.mark.needs("mkfs.ext4", "mount")
def test_a_device_that_is_in_use(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    target = f"--target=vda={disk}"
    descriptor = os.open(disk, os.O_RDONLY | os.O_EXCL)
    assert f"disk 'vda': {disk} is in use: it is mounted, or" in refused(guest, tmp_path, target)
    os.close(descriptor)
    assert disk.read_bytes() == places.FF * SIZE
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    (tmp_path / "mount").mkdir()
    if subprocess.run(["mount", disk, tmp_path / "mount"], capture_output=True).returncode:
        pytest.skip("mount refused")
    try:
        text = refused(guest, tmp_path, target)
        assert f"disk 'vda': {disk} is in use: it is mounted, or" in text
    finally:
        subprocess.run(["umount", tmp_path / "mount"], check=True)


@pytest.mark.needs("qemu-storage-daemon")
def test_a_device_that_a_qemu_has_by_another_name(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """As a guest of libvirt's has its devices: QEMU's lock is on that name, not on this one."""
    number = disk.stat().st_rdev
    other = pathlib.Path(f"/dev/virtbackup-test-{os.getpid()}")
    try:
        os.mknod(other, 0o600 | stat.S_IFBLK, number)
    except PermissionError:
        pytest.skip("no device can be made here")
    ready = tmp_path / "pid"
    node = {"driver": "host_device", "filename": str(other), "node-name": "n"}
    argv = ["qemu-storage-daemon", "--blockdev", json.dumps(node), "--pidfile", str(ready)]
    try:
        with subprocess.Popen(argv) as qemu:
            try:
                waiting.until(ready.exists)
                text = refused(guest, tmp_path, f"--target=vda={disk}")
                assert f"disk 'vda': {disk} is in use: process {qemu.pid} (qemu-storage-da" in text
            finally:
                qemu.kill()
    finally:
        other.unlink()
    assert device.look(disk) == SIZE


@pytest.mark.needs("qemu-storage-daemon")
def test_a_device_that_a_qemu_has(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    node = {"driver": "host_device", "filename": str(disk), "node-name": "n", "locking": "on"}
    ready = tmp_path / "pid"
    with subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", json.dumps(node), "--pidfile", ready,
         "--nbd-server", f"addr.type=unix,addr.path={tmp_path}/sock",
         "--export", "type=nbd,id=e,node-name=n,writable=on"]
    ) as other:  # fmt: skip
        try:
            waiting.until(ready.exists)
            text = refused(guest, tmp_path, f"--target=vda={disk}")
            assert f"disk 'vda': {disk} is in use: another program, as a QEMU, locks it" in text
        finally:
            other.terminate()
    assert disk.read_bytes() == places.FF * SIZE


@pytest.mark.skipif(bool(machines.INTO_ROOT), reason="the guest's QEMU has another /dev")
def test_the_guests_own_device(tmp_path: pathlib.Path) -> None:
    """Even where nothing is locked."""
    with places.block_device(tmp_path / "device", SIZE) as disk:
        images = tmp_path / "images"
        images.mkdir()
        with machines.two_disks(
            images, "-name", "vm",
            "-blockdev", f"host_device,filename={disk},node-name=C,locking=off",
            "-device", "virtio-blk,drive=C,id=vdb", size=1 << 20,
        ) as machine, virtbackup.open(machine.uri) as connection:  # fmt: skip
            domain = connection.lookupByName("vm")
            with pytest.raises(virtbackup.Error) as raised:
                pull.pull(domain, tmp_path / "out", targets={"vda": disk})
        assert f"disk 'vda': {disk} is the guest's own disk 'vdb'" in str(raised.value)
        assert disk.read_bytes() == places.FF * SIZE


def test_a_network_disk_whose_name_is_that_of_the_device(
    guest: points.Guest, disk: pathlib.Path
) -> None:
    """That is no path here. As libvirt has it; over QMP a name is a URI."""
    source = f"<source protocol='nbd' name='{disk}'><host name='backup.example'/></source>"
    with virtbackup.open(guest.machine.uri) as connection:
        known = connection.lookupByName("vm").XMLDesc()
    network = f"<disk type='network' device='disk'>{source}<target dev='vdz'/></disk>"
    known = known.replace("</devices>", f"{network}</devices>")
    document = "<domainbackup><address type='unix' path='/a'/><disks><disk name='vda'/></disks>"
    wanted = pull._wanted(f"{document}</domainbackup>", known, None, None)
    assert devices.usable({"vda": disk}, wanted, known) == {"vda": disk}
    theirs = known.replace("type='network'", "type='block'")
    theirs = theirs.replace(source, f"<source dev='{disk}'/>")
    with pytest.raises(virtbackup.Error, match="is the guest's own disk 'vdz'"):
        devices.usable({"vda": disk}, wanted, theirs)


# --- what fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path, number: int
) -> None:
    argv = ["-c", guest.machine.uri, "backup-pull", "vm", str(tmp_path / "out")]
    argv += [f"--target=vda={disk}", "--bandwidth=200KiB", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "virtbackup.tools.virsh_backup", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as one:  # fmt: skip
        assert one.stdout is not None
        for line in one.stdout:
            if json.loads(line)["event"] == "progress":
                break
        one.send_signal(number)
        _, err = one.communicate(timeout=waiting.DEADLINE)
    assert one.returncode == 128 + number
    assert f"(what {disk} has now is not a backup)\n" in err
    assert not (tmp_path / "out").exists()
    assert idle(guest)


def test_a_device_that_fails(guest: points.Guest, tmp_path: pathlib.Path) -> None:
    """It is a file of a file system that is full."""
    with places.small_file_system(tmp_path / "full", 1 << 20) as full:
        (full / "sparse").touch()
        os.truncate(full / "sparse", SIZE)
        with places.loop_device(full / "sparse") as disk:
            text = refused(guest, tmp_path, f"--target=vda={disk}")
    assert f"disk 'vda': cannot write {disk}: " in text
    assert text.endswith(f"(what {disk} has now is not a backup)\n")


def test_a_backup_that_is_not_good(
    guest: points.Guest, disk: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """QEMU is killed in the middle."""

    class Progress:
        def start(self, index: int, size: int) -> None:
            """It goes on."""

        def advance(self, index: int, count: int) -> None:
            guest.machine.kill()

    with pytest.raises(virtbackup.Error) as raised:
        pull.pull(
            guest.domain, tmp_path / "out", targets={"vda": disk}, progress=Progress(),
            bandwidth=1 << 20,
        )  # fmt: skip
    assert f"(what {disk} has now is not a backup)" in str(raised.value)
    assert not (tmp_path / "out").exists()


# --- the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [2, 1, 0])
@pytest.mark.parametrize("size", [41 * BLOCK, 40 * BLOCK + 700])
def test_zeroes_are_there_in_every_way(tmp_path: pathlib.Path, ways: int, size: int) -> None:
    """Those that are told and those that nobody tells of: given back, zeroed, or written."""
    with places.block_device(tmp_path / "disk", 42 * BLOCK) as path:
        where = device.Device(path, size)
        del where._ways[: 2 - ways]
        data = random.Random(1).randbytes(BLOCK)
        want = bytearray(size)
        for block in (0, 3, 17):
            where.write(block * BLOCK, memoryview(data))
            want[block * BLOCK : (block + 1) * BLOCK] = data
        where.write_zeroes(4 * BLOCK, 3 * BLOCK)
        assert where.finish() == size
        assert path.read_bytes() == want + places.FF * (42 * BLOCK - size)


def test_it_is_held_while_it_is_written(disk: pathlib.Path) -> None:
    where = device.Device(disk, BLOCK)
    with pytest.raises(virtbackup.Error, match="is in use"):
        device.Device(disk, BLOCK)
    where.discard()
    with disk.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as udev does, which is nobody's use
        device.Device(disk, BLOCK).discard()


def test_a_copy_that_is_cancelled_leaves_the_device(disk: pathlib.Path) -> None:
    where = device.Device(disk, SIZE)
    where.shorten()
    with pytest.raises(virtbackup.Error) as raised:
        where.finish()
    assert raised.value.get_error_code() == libvirt.VIR_ERR_OPERATION_ABORTED
    where.discard()
    assert disk.read_bytes() == places.FF * SIZE


@pytest.mark.skipif(bool(machines.INTO_ROOT), reason="the guest's QEMU has another /dev")
def test_a_loop_device_over_the_guests_own_image(
    guest: points.Guest, tmp_path: pathlib.Path
) -> None:
    image = guest.machine.directory / "b.raw"
    with places.loop_device(image) as disk:
        text = refused(guest, tmp_path, f"--target=vda={disk}")
        assert f"disk 'vda': {disk} is the guest's own disk 'sdb'" in text
