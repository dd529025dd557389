# SPDX-License-Identifier: LGPL-2.1-or-later
"""Beside virtnbdbackup, which backs up by libvirt's own engine and checkpoints: each tool's
backups of one domain go on through the other's, and neither starts while the other is at it."""

import pathlib
import subprocess
import sys
from collections.abc import Iterator

import libvirt
import pytest

import virtbackup
from tests import conftest
from tests.live import libvirtd, machines
from tests.live.libvirtd import CLUSTER, disk_xml, image, pattern

pytestmark = pytest.mark.needs(
    "libvirtd", "qemu-system-x86_64", "nbdcopy", "unshare", "virtnbdbackup", "virtnbdrestore"
)

NAME = "shared"
SEEDS = {"vda": 1, "sdb": 2}


class Theirs:
    """virtnbdbackup, on the domain."""

    def __init__(self, host: libvirtd.Host) -> None:
        self._host = host

    def run(self, *options: str) -> "subprocess.CompletedProcess[str]":
        argv = ["virtnbdbackup", "-U", self._host.daemon.uri, "-d", NAME, "--noprogress"]
        argv += ["--scratchdir", str(self._host.directory)]
        argv += ["-f", str(self._host.path("theirs.sock"))]
        return subprocess.run([*argv, *options], check=False, capture_output=True, text=True)

    def backup(self, level: str, directory: pathlib.Path) -> None:
        done = self.run("-l", level, "-o", str(directory))
        assert done.returncode == 0, done.stderr

    def restored(self, directory: pathlib.Path) -> dict[str, bytes]:
        """What is in a backup: disk -> its bytes. One at a time: the NBD server of a disk before
        takes away what has the socket's name as it ends, its successor's socket, too."""
        out = directory.with_name(f"{directory.name}-restored")
        out.mkdir()
        found = {}
        for disk, name in {"vda": "a.qcow2", "sdb": "b.qcow2"}.items():
            argv = ["virtnbdrestore", "-U", self._host.daemon.uri, "--noprogress", "-d", disk]
            argv += ["-i", str(directory), "-o", str(out / disk), "-L", f"{out}/{disk}.log"]
            argv += ["-f", str(self._host.path(f"{directory.name}-{disk}.sock"))]
            done = subprocess.run(argv, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found[disk] = machines.contents(out / disk / name, "qcow2")
        return found


class Ours:
    """backup-pull, by the command line."""

    def __init__(self, host: libvirtd.Host) -> None:
        self._uri = host.daemon.uri

    def backup(self, directory: pathlib.Path, *options: str) -> None:
        argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", self._uri]
        argv += ["backup-pull", NAME, str(directory), *options]
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")

    def restored(self, directory: pathlib.Path) -> dict[str, bytes]:
        """What is in the last backup of a directory: disk -> its bytes."""
        last = {disk: max(directory.glob(f"{disk}*.qcow2")) for disk in SEEDS}
        return {disk: machines.contents(path, "qcow2") for disk, path in last.items()}


class Written:
    """What the guest has on its disks."""

    def __init__(self, domain: libvirtd.Domain) -> None:
        self._domain = domain
        self.disks = {disk: bytearray(pattern(seed)) for disk, seed in SEEDS.items()}
        self._number = 0

    def write(self) -> dict[str, bytes]:
        """Let the guest write a cluster of each disk that it has not written before; all disks."""
        self._number += 1
        for disk, contents in self.disks.items():
            self._domain.write(disk, self._number, 255 - self._number)
            at = self._number * CLUSTER
            contents[at : at + CLUSTER] = bytes([255 - self._number]) * CLUSTER
        return {disk: bytes(contents) for disk, contents in self.disks.items()}


@pytest.fixture
def domain(host: libvirtd.Host) -> Iterator[libvirtd.Domain]:
    disks = disk_xml("vda", image(host.path("a.qcow2"), 1))
    disks += disk_xml("sdb", image(host.path("b.qcow2"), 2))
    with host.domain(NAME, disks, persistent=True) as domain:
        yield domain


@pytest.fixture
def theirs(host: libvirtd.Host, domain: libvirtd.Domain) -> Theirs:
    return Theirs(host)


@pytest.fixture
def ours(host: libvirtd.Host, domain: libvirtd.Domain) -> Ours:
    return Ours(host)


def test_each_goes_on_through_the_others_backups(
    domain: libvirtd.Domain, theirs: Theirs, ours: Ours, tmp_path: pathlib.Path
) -> None:
    """Full and incremental ones, of both: every one of them restores to what the guest had then,
    and the domain is at the end what it was."""
    flags = (0, libvirt.VIR_DOMAIN_XML_INACTIVE)
    before = [domain.libvirt.XMLDesc(flag) for flag in flags]
    guest = Written(domain)
    places = {name: tmp_path / name for name in ("first", "second", "third", "branch", "whole")}

    then = guest.write()
    theirs.backup("full", places["first"])
    guest.write()
    ours.backup(places["branch"], "--branch", "nightly")
    changed = guest.write()
    theirs.backup("inc", places["first"])
    ours.backup(places["whole"])
    assert ours.restored(places["whole"]) == changed
    assert theirs.restored(places["first"]) == changed != then

    changed = guest.write()
    theirs.backup("full", places["second"])
    guest.write()
    ours.backup(places["branch"], "--branch", "nightly", "--incremental")
    changed = guest.write()
    theirs.backup("inc", places["second"])
    last = guest.write()
    ours.backup(places["branch"], "--branch", "nightly", "--incremental")
    assert theirs.restored(places["second"]) == changed
    assert ours.restored(places["branch"]) == last

    if conftest.long():
        last = guest.write()
        theirs.backup("inc", places["second"])
        theirs.backup("full", places["third"])
        (tmp_path / "second-restored").rename(tmp_path / "earlier")
        assert theirs.restored(places["second"]) == theirs.restored(places["third"]) == last
    assert [domain.libvirt.XMLDesc(flag) for flag in flags] == before


@pytest.mark.usefixtures("unasked")
def test_neither_starts_while_the_other_is_at_it(
    host: libvirtd.Host,
    domain: libvirtd.Domain,
    theirs: Theirs,
    tmp_path: pathlib.Path,
    scratch_dir: pathlib.Path,
) -> None:
    """And what runs, and theirs that can go on from there, is none the worse for the try."""
    guest = Written(domain)
    theirs.backup("full", tmp_path / "chain")
    socket = host.path("ours.sock")
    xml = f'<domainbackup><address type="unix" path="{socket}"/></domainbackup>'
    with virtbackup.open(host.daemon.uri) as connection:
        dom = connection.lookupByName(NAME)
        started = theirs.run("-l", "copy", "-o", str(tmp_path / "copy"), "--startonly")
        assert started.returncode == 0, started.stderr
        with pytest.raises(virtbackup.Error, match="backup job is already running: libvirt's own"):
            dom.backupStart(xml)
        assert not list(scratch_dir.iterdir())
        assert domain.libvirt.jobStats()["operation"] == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
        for disk in SEEDS:
            assert libvirtd.read(host.path("theirs.sock"), disk) == guest.disks[disk]
        assert theirs.run("-o", str(tmp_path / "copy"), "--killonly").returncode == 0
        libvirtd.wait_for(lambda: domain.libvirt.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE)

        frozen = guest.write()
        dom.backupStart(xml)
        guest.write()
        refused = theirs.run("-l", "inc", "-o", str(tmp_path / "chain"))
        assert refused.returncode == 1
        assert "Failed to start backup: [internal error: unable to execute" in refused.stderr
        assert "'nbd-server-start': NBD server already running]" in refused.stderr
        assert dom.backupGetInfo().state == "running"
        for disk in SEEDS:
            assert libvirtd.read(socket, disk) == frozen[disk]
        dom.backupStop()
    last = guest.write()
    theirs.backup("inc", tmp_path / "chain")
    assert theirs.restored(tmp_path / "chain") == last


@pytest.mark.usefixtures("unasked")
def test_a_full_one_of_theirs_that_is_refused(
    host: libvirtd.Host, domain: libvirtd.Domain, theirs: Theirs, tmp_path: pathlib.Path
) -> None:
    """By then it has deleted their checkpoints, and they begin anew. An increment that is tried
    before defines a checkpoint again that has no bitmap any more."""
    theirs.backup("full", tmp_path / "chain")
    assert domain.libvirt.listAllCheckpoints()
    xml = f'<domainbackup><address type="unix" path="{host.path("ours.sock")}"/></domainbackup>'
    with virtbackup.open(host.daemon.uri) as connection:
        dom = connection.lookupByName(NAME)
        dom.backupStart(xml)
        refused = theirs.run("-l", "full", "-o", str(tmp_path / "other"))
        assert "'nbd-server-start': NBD server already running]" in refused.stderr
        assert domain.libvirt.listAllCheckpoints() == []
        dom.backupStop()
    assert theirs.run("-l", "inc", "-o", str(tmp_path / "chain")).returncode == 1
    for checkpoint in domain.libvirt.listAllCheckpoints():
        checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    last = Written(domain).write()
    theirs.backup("full", tmp_path / "anew")
    assert theirs.restored(tmp_path / "anew") == last
