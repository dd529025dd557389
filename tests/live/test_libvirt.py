# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups of a real libvirt's domains, beside libvirt's own work on them."""

import contextlib
import io
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import libvirt
import libvirt_qemu
import nbd
import pytest

import virtbackup
from tests import conftest, strict_json, waiting
from tests.live import certificates, libvirtd, machines, nbdclient, places, steps, test_json
from tests.live.libvirtd import disk_xml, image, pattern
from virtbackup.qemu import capabilities, domain_obj, passthrough
from virtbackup.tools import pull, virsh_connection

pytestmark = pytest.mark.needs("libvirtd", "virsh", "qemu-system-x86_64", "nbdcopy", "unshare")


@pytest.fixture
def connection(host: libvirtd.Host) -> Iterator[virtbackup.Connection]:
    with virtbackup.open(host.daemon.uri) as opened:
        yield opened


def document(host: libvirtd.Host, disks: str = "", branch: str = "") -> str:
    line = f'<branch name="{branch}"/>' if branch else ""
    return (
        f'<domainbackup><address type="unix" path="{socket(host)}"/>{line}'
        f"<disks>{disks}</disks></domainbackup>"
    )


def socket(host: libvirtd.Host) -> pathlib.Path:
    return host.path("nbd.sock")


def left_in_qemu(domain: libvirtd.Domain) -> list[str]:
    """What is in QEMU of ours."""
    return [line for line in str(domain.state()).split("'") if "virtbackup" in line]


def left_over(
    domain: libvirtd.Domain, scratch_dir: pathlib.Path, state_dir: pathlib.Path
) -> list[str]:
    """What is there of ours."""
    files = [str(path) for path in (*scratch_dir.iterdir(), *state_dir.glob("*.json"))]
    return files + left_in_qemu(domain)


SECRET = "5c9a8f0e-6a4b-4f0e-9a53-5b1f4f4d3f10"


def test_every_kind_of_disk_by_its_target(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
) -> None:
    """XML in another order than libvirt numbers its nodes; filters, chains and sources over a
    network, an encrypted one and one whose data is elsewhere; drives without a medium."""
    images = {
        "vda": image(host.path("base.qcow2"), 1),
        "vdb": image(host.path("b.raw"), 2, "raw"),
        "sdb": image(host.path("shared.raw"), 4, "raw"),
        "vdc": image(host.path("transient.qcow2"), 5),
        "vdd": image(host.path("served.raw"), 6, "raw"),
        "vdf": image(host.path("f.qcow2"), 8, "qcow2", "-o", f"data_file={host.path('f.data')}"),
        "hda": image(host.path("h.qcow2"), 9),
    }
    overlay = host.path("a.qcow2")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
    subprocess.run([*create, str(images["vda"]), str(overlay)], check=True)
    images["vda"] = overlay
    middle, top = host.path("middle.qcow2"), host.path("top.qcow2")
    subprocess.run([*create, str(image(host.path("cor.qcow2"), 3)), str(middle)], check=True)
    subprocess.run([*create, str(middle), str(top)], check=True)
    secret = host.connection.secretDefineXML(
        f"<secret ephemeral='yes' private='yes'><uuid>{SECRET}</uuid></secret>"
    )
    secret.setValue(b"passphrase")
    luks = image(
        host.path("luks.qcow2"), 7, "qcow2", "--object", "secret,id=s,data=passphrase",
        "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100",
    )  # fmt: skip
    first = image(host.path("first.iso"), 76, "raw")
    served = f"<source protocol='nbd'><host transport='unix' socket='{host.path('served')}'/>"
    cdrom = (
        "<disk type='file' device='cdrom'>{source}<target dev='{target}' bus='sata'/>"
        "<readonly/></disk>"
    )
    devices = [
        cdrom.format(target="hdc", source=""),
        cdrom.format(target="hdd", source=f"<source file='{first}'/>"),
        disk_xml("sdb", images["sdb"], "raw", "<shareable/>"),
        disk_xml("vdf", images["vdf"]),
        disk_xml(
            "vde", luks,
            inside=f"<encryption format='luks'><secret type='passphrase' uuid='{SECRET}'/>"
            "</encryption>",
        ),
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
        f"{served}</source><target dev='vdd' bus='virtio'/></disk>",
        disk_xml("hda", images["hda"]),
        disk_xml("vdc", images["vdc"], inside="<transient/>"),
        disk_xml("sda", top, driver="copy_on_read='on'"),
        disk_xml(
            "vdb", images["vdb"], "raw",
            "<iotune><total_iops_sec>1000</total_iops_sec></iotune>",
        ),
        disk_xml("vda", images["vda"]),
    ]  # fmt: skip
    with (
        _served(host.path("served"), images["vdd"]),
        host.domain("kinds", "".join(devices)) as domain,
    ):
        _change_medium(domain, host, "hdd")
        dom = connection.lookupByName("kinds")
        before = domain.state()
        dom.backupStart(document(host))
        disks = ("vda", "vdb", "sda", "sdb", "vdc", "vdd", "vde", "vdf", "hda")
        seeds = {target: seed for seed, target in enumerate(disks, 1)}
        assert {disk.export for disk in dom.backupGetInfo().disks} == set(seeds)
        for target in seeds:
            domain.write(target, 1)
        for target, seed in seeds.items():
            assert libvirtd.read(socket(host), target) == pattern(seed), target
        dom.backupStop()
        assert domain.state() == before
        assert not left_over(domain, scratch_dir, state_dir)
    for target, path, fmt in (("vda", overlay, "qcow2"), ("vdb", images["vdb"], "raw")):
        found = machines.contents(path, fmt)
        seed = seeds[target]
        assert found[libvirtd.CLUSTER :][: libvirtd.CLUSTER] == b"\xff" * libvirtd.CLUSTER
        assert found[2 * libvirtd.CLUSTER :] == pattern(seed)[2 * libvirtd.CLUSTER :]


@contextlib.contextmanager
def _served(path: pathlib.Path, raw: pathlib.Path) -> Iterator[None]:
    """An NBD server of one image at a unix socket, whose export has no name."""
    argv = ["qemu-nbd", "-f", "raw", "-k", str(path), "-e", "8", "-t", str(raw)]
    with subprocess.Popen(argv) as server:
        try:
            libvirtd.wait_for(path.is_socket)
            yield
        finally:
            server.terminate()


def _change_medium(domain: libvirtd.Domain, host: libvirtd.Host, target: str) -> None:
    other = image(host.path("other.iso"), 77, "raw")
    domain.libvirt.updateDeviceFlags(
        "<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>"
        f"<source file='{other}'/><target dev='{target}' bus='sata'/><readonly/></disk>"
    )


def two_disks(host: libvirtd.Host, directory: str = ".") -> str:
    """vda, a qcow2 image, and sdb, a raw one."""
    a, b = (host.path(f"{directory}/{name}") for name in ("a.qcow2", "b.raw"))
    return disk_xml("vda", image(a, 1)) + disk_xml("sdb", image(b, 2, "raw"), "raw")


def right(host: libvirtd.Host) -> bool:
    """Whether both exports show the disks as they were made."""
    return all(
        libvirtd.read(socket(host), target) == pattern(seed)
        for target, seed in (("vda", 1), ("sdb", 2))
    )


# --- disks that not both know ---------------------------------------------------------------------


def test_a_disk_that_is_not_in_qemu_is_refused_by_its_target(
    host: libvirtd.Host, connection: virtbackup.Connection
) -> None:
    """A vhost-user disk's data never passes QEMU."""
    server, raw = host.path("vhost"), image(host.path("v.raw"), 3, "raw")
    argv = [
        "qemu-storage-daemon",
        "--blockdev", f"raw,node-name=v,file.driver=file,file.filename={raw}",
        "--export", "vhost-user-blk,id=v,node-name=v,writable=on,addr.type=unix,"
        f"addr.path={server}",
    ]  # fmt: skip
    vhost = (
        "<disk type='vhostuser' device='disk'><driver name='qemu' type='raw'/>"
        f"<source type='unix' path='{server}'/><target dev='vdb' bus='virtio'/></disk>"
    )
    memory = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
    with contextlib.ExitStack() as ends:
        daemon = ends.enter_context(subprocess.Popen(argv))
        ends.callback(daemon.terminate)
        libvirtd.wait_for(server.is_socket)
        ends.enter_context(host.domain("unlike", two_disks(host) + vhost, more=memory))
        dom = connection.lookupByName("unlike")
        for disks in ("", '<disk name="vdb"/>'):
            with pytest.raises(virtbackup.Error, match=r"disk 'vdb' is not one that QEMU"):
                dom.backupStart(document(host, disks))
        dom.backupStart(document(host, '<disk name="vdb" present="no"/>'))
        assert right(host)
        dom.backupStop()


def test_a_drive_that_is_not_in_the_xml_is_refused_by_its_id(
    host: libvirtd.Host, connection: virtbackup.Connection
) -> None:
    raw = image(host.path("extra.raw"), 3, "raw")
    with host.domain("unlike", two_disks(host)) as domain:
        file = {"driver": "file", "filename": str(raw)}
        domain.monitor("blockdev-add", driver="raw", node_name="extra", file=file)
        domain.monitor("device_add", driver="scsi-hd", id="disk9", drive="extra", bus="scsi0.0")
        dom = connection.lookupByName("unlike")
        for disks in ("", '<disk name="disk9"/>', '<disk name="vda"/><disk name="disk9"/>'):
            with pytest.raises(virtbackup.Error, match=rf"device 'disk9' of QEMU writes '{raw}'"):
                dom.backupStart(document(host, disks))
        with pytest.raises(virtbackup.Error, match=r"no disk named 'vdz'"):
            dom.backupStart(document(host, '<disk name="vdz" present="no"/>'
                                           '<disk name="disk9" present="no"/>'))  # fmt: skip
        dom.backupStart(document(host, '<disk name="disk9" present="no"/>'))
        assert right(host)
        dom.backupStop()


def test_a_drive_of_the_command_line_is_refused_by_its_id(
    host: libvirtd.Host, connection: virtbackup.Connection
) -> None:
    """``<qemu:commandline>``; one that is only read is no matter."""
    drives = ""
    for name, options, slot in (("own", "", "0x10"), ("seen", ",read-only=on", "0x11")):
        raw = image(host.path(f"{name}.raw"), 3, "raw")
        blockdev = f"driver=raw,node-name={name},file.driver=file,file.filename={raw}{options}"
        for words in (
            ("-blockdev", blockdev),
            ("-device", f"virtio-blk-pci,drive={name},id={name},addr={slot}"),
        ):
            drives += "".join(f"<qemu:arg value='{word}'/>" for word in words)
    more = f"<qemu:commandline>{drives}</qemu:commandline>"
    with host.domain("unlike", two_disks(host), more=more):
        dom = connection.lookupByName("unlike")
        for disks in ("", '<disk name="own"/>'):
            with pytest.raises(virtbackup.Error, match=r"device 'own' of QEMU writes '.*own.raw'"):
                dom.backupStart(document(host, disks))
        dom.backupStart(document(host, '<disk name="own" present="no"/>'))
        assert right(host)
        dom.backupStop()


def test_a_disk_in_an_iothread_is_refused_by_its_target(
    host: libvirtd.Host, connection: virtbackup.Connection
) -> None:
    """Where QEMU would not survive its backup."""
    disks = disk_xml("vda", image(host.path("a.qcow2"), 1)) + disk_xml(
        "vdb", image(host.path("b.qcow2"), 2), driver="iothread='1'"
    )
    with host.domain("threads", disks, more="<iothreads>1</iothreads>") as domain:
        dom = connection.lookupByName("threads")
        if capabilities.NBD_IOTHREAD_ABORT.affects(machines.version()):
            with pytest.raises(virtbackup.Error, match=r"disk 'vdb' runs in iothread 'iothread1'"):
                dom.backupStart(document(host))
            dom.backupStart(document(host, '<disk name="vdb" present="no"/>'))
        else:
            dom.backupStart(document(host))
            assert libvirtd.read(socket(host), "vdb") == pattern(2)
        assert libvirtd.read(socket(host), "vda") == pattern(1)
        dom.backupStop()
        assert not left_in_qemu(domain)


def test_a_branch_of_a_disk_that_copies_on_read(
    host: libvirtd.Host, connection: virtbackup.Connection
) -> None:
    base, top = image(host.path("base.qcow2"), 1), host.path("a.qcow2")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
    subprocess.run([*create, str(base), str(top)], check=True)
    with host.domain("filtered", disk_xml("vda", top, driver="copy_on_read='on'")) as domain:
        dom = connection.lookupByName("filtered")
        branch = document(host, '<disk name="vda" type="auto"/>', "nightly")
        dom.backupStart(branch)
        assert libvirtd.read(socket(host), "vda") == pattern(1)
        dom.backupStop()
        assert top.stat().st_blocks * 512 > libvirtd.SIZE  # by what the backup has read
        for cluster in (2, 3):
            domain.write("vda", cluster)
            dom.backupStart(branch)
            assert changed(socket(host), "nightly") == {cluster}
            dom.backupStop()


# --- a QEMU of another user -----------------------------------------------------------------------

QEMU_USER = "libvirt-qemu"


@pytest.fixture
def confined(host: libvirtd.Host) -> Iterator[libvirtd.Domain]:
    """A domain whose QEMU is not root's."""
    user = pwd.getpwnam(QEMU_USER)
    label = (
        "<seclabel type='static' model='dac' relabel='yes'>"
        f"<label>+{user.pw_uid}:+{user.pw_gid}</label></seclabel>"
    )
    with host.domain("confined", two_disks(host), more=label) as domain:
        yield domain


def test_a_qemu_of_another_user_needs_no_path(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    confined: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither to the scratch images, nor to the socket's directory."""
    dom = connection.lookupByName("confined")
    before = confined.state()
    dom.backupStart(document(host, f'<disk name="vda"><source file="{scratch_dir}/own"/></disk>'))
    assert right(host)
    dom.backupStop()
    assert confined.state() == before
    assert not left_over(confined, scratch_dir, state_dir)
    assert not socket(host).exists()
    taken = host.path("other.sock")
    loopback = "::1" if places.has_ipv6() else "127.0.0.1"
    confined.monitor(
        "nbd-server-start", addr={"type": "inet", "data": {"host": loopback, "port": "0"}}
    )
    with pytest.raises(virtbackup.Error, match="already in use by another job"):
        dom.backupStart(document(host).replace(str(socket(host)), str(taken)))
    assert not taken.exists()
    confined.monitor("nbd-server-stop")
    monkeypatch.setattr(passthrough, "pid_of", lambda _: None)  # as in a container
    dom.backupStart(document(host))
    assert right(host)
    dom.backupStop()
    assert not left_over(confined, scratch_dir, state_dir)


def test_a_pull_from_a_qemu_of_another_user(
    host: libvirtd.Host, confined: libvirtd.Domain, tmp_path: pathlib.Path
) -> None:
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", host.daemon.uri]
    pull = [*argv, "backup-pull", "confined", str(tmp_path / "backup"), "--format", "raw"]
    done = subprocess.run(pull, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "backup" / "vda.raw").read_bytes() == pattern(1)
    assert (tmp_path / "backup" / "sdb.raw").read_bytes() == pattern(2)
    assert not done.stderr


def test_tls_on_a_picked_port_of_another_users_qemu(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    confined: libvirtd.Domain,
    tmp_path: pathlib.Path,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The port comes with its socket; the keys are read by QEMU's user, or by nobody."""
    keys, conf = host.path("keys"), tmp_path / "virtbackup.conf"
    certificates.keys(keys)
    keys.chmod(0o755)
    (keys / "keys.psk").chmod(0o600)
    conf.write_text(f'backup_tls_psk_dir = "{keys}"')
    monkeypatch.setenv("VIRTBACKUP_CONF", str(conf))
    dom, before = connection.lookupByName("confined"), confined.state()
    address = '<address type="ip" host="127.0.0.1" autoport="yes" tls="yes"/>'
    xml = f"<domainbackup>{address}</domainbackup>"
    with pytest.raises(virtbackup.Error, match=r"cannot use the TLS .* user 'libvirt-qemu'"):
        dom.backupStart(xml)
    assert confined.state() == before
    shutil.chown(keys / "keys.psk", QEMU_USER)
    pull.pull(dom, tmp_path / "backup", xml=xml, fmt="raw")
    assert (tmp_path / "backup" / "vda.raw").read_bytes() == pattern(1)
    assert confined.state() == before
    assert not left_over(confined, scratch_dir, state_dir)
    assert "virtbackup" not in str(confined.monitor("qom-list", path="/objects"))


@pytest.fixture
def old_libvirt(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that passes no files on."""
    monkeypatch.delattr(libvirt_qemu, "qemuMonitorCommandWithFiles")


@pytest.mark.usefixtures("old_libvirt")
def test_what_another_user_may_not_open_is_named(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    confined: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dom = connection.lookupByName("confined")
    before = confined.state()
    with pytest.raises(virtbackup.Error, match=rf"{socket(host)}.*denied.*'{QEMU_USER}'"):
        dom.backupStart(document(host))
    own = host.directory / "of-qemu"
    own.mkdir()
    user = pwd.getpwnam(QEMU_USER)
    try:
        own.chmod(0o755)
        xml = document(host).replace(str(socket(host)), f"{own}/nbd.sock")
        os.chown(own, user.pw_uid, -1)
        with pytest.raises(virtbackup.Error, match=rf"'vda'.*{scratch_dir}.*enied.*'{QEMU_USER}'"):
            dom.backupStart(xml)
        assert confined.state() == before
        assert not list(scratch_dir.iterdir())
        monkeypatch.setenv("VIRTBACKUP_SCRATCH_DIR", str(own))
        dom.backupStart(xml)
        assert [path.name for path in own.iterdir()] == ["nbd.sock"]
        assert libvirtd.read(own / "nbd.sock", "vda") == pattern(1)
        dom.backupStop()
        assert confined.state() == before
        assert not left_over(confined, scratch_dir, state_dir)
        assert not list(own.iterdir())
    finally:
        own.rmdir()


# --- what becomes of a domain meanwhile -----------------------------------------------------------


@pytest.fixture
def persistent(host: libvirtd.Host) -> Iterator[libvirtd.Domain]:
    """A domain with a definition that outlasts it, for a test that changes it."""
    with host.domain("lasting", two_disks(host), persistent=True) as domain:
        yield domain


@pytest.fixture(scope="module")
def two_disks_defined(libvirt_host: libvirtd.Host) -> Iterator[None]:
    libvirt_host.path("two").mkdir()
    with libvirt_host.domain("two", two_disks(libvirt_host, "two"), persistent=True):
        yield


@pytest.fixture
def two(host: libvirtd.Host, two_disks_defined: None) -> libvirtd.Domain:
    """A running domain that is as before after each test; other tests used it before."""
    domain = host.connection.lookupByName("two")
    if not domain.isActive():
        domain.create()
    return libvirtd.Domain(domain)


@pytest.mark.parametrize("how", libvirtd.ENDS)
def test_a_domain_that_ends_during_its_backup(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    two: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    end, reason = libvirtd.ENDS[how]
    dom = connection.lookupByName("two")
    dom.backupStart(document(host))
    end(two.libvirt)
    libvirtd.wait_for(lambda: not two.libvirt.isActive())
    info = dom.backupGetInfo()
    assert (info.state, {disk.reason for disk in info.disks}) == ("failed", {reason})
    with pytest.raises(virtbackup.Error, match=f"disk 'vda': {reason}; disk 'sdb': {reason}"):
        dom.backupStop()
    assert not caplog.records
    with pytest.raises(virtbackup.Error, match="no domain backup job present"):
        dom.backupStop()
    assert not list(scratch_dir.iterdir())
    assert not list(state_dir.glob("*.json"))
    assert not socket(host).exists()
    for call in (lambda: dom.backupStart(document(host)), dom.branchList):
        with pytest.raises(virtbackup.Error) as error:
            call()
        assert str(error.value) == "Requested operation is not valid: domain is not running"
        assert error.value.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID
    two.libvirt.create()
    dom.backupStart(document(host))
    assert right(host)
    dom.backupStop()


def test_a_transient_domain_that_ends_is_still_listed_for_its_stop(
    host: libvirtd.Host, connection: virtbackup.Connection, scratch_dir: pathlib.Path
) -> None:
    with host.domain("passing", two_disks(host)) as domain:
        connection.lookupByName("passing").backupStart(document(host))
        domain.libvirt.destroy()
        reason = libvirtd.end_of_a_transient_domain()
        with pytest.raises(virtbackup.Error, match=f"disk 'vda': {reason}"):
            connection.lookupByName("passing").backupStop()
        assert not list(scratch_dir.iterdir())
        assert "passing" not in [one.name() for one in connection.listAllDomains()]


class EndAt(io.StringIO):
    """A trace that ends the domain at its line NUMBER, before that is sent or believed."""

    def __init__(self, number: int, end: Callable[[], object]) -> None:
        super().__init__()
        self._left = number
        self._end = end

    def write(self, line: str) -> int:
        self._left -= 1
        if self._left == 0:
            self._end()
        return len(line)


@pytest.mark.parametrize("how", ["destroyed", "killed"])
@pytest.mark.parametrize("line", [1, 2, 10, 40] if conftest.long() else [2, 40])
def test_a_domain_that_ends_in_the_middle_of_its_stop(
    host: libvirtd.Host, connection: virtbackup.Connection, scratch_dir: pathlib.Path,
    state_dir: pathlib.Path, how: str, line: int,
) -> None:  # fmt: skip
    """The first stop tells why."""
    end, _ = libvirtd.ENDS[how]
    with host.domain("passing", two_disks(host)) as domain:
        dom = connection.lookupByName("passing")
        dom.backupStart(document(host))
        connection.setTrace(EndAt(line, lambda: end(domain.libvirt)))
        try:
            with pytest.raises(virtbackup.Error) as error:
                dom.backupStop()
        finally:
            connection.setTrace(None)
        reason = libvirtd.end_of_a_transient_domain()
        assert f"is not good: disk 'vda': {reason}" in str(error.value)
        assert not list(scratch_dir.iterdir())
        assert not list(state_dir.glob("*.json"))


SNAPSHOT = "<domainsnapshot><name>{}</name></domainsnapshot>"
ONE_DISK = (
    "<domainsnapshot><name>{}</name><disks><disk name='vda' snapshot='external'/>"
    "<disk name='sdb' snapshot='no'/></disks></domainsnapshot>"
)
DISK_ONLY = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
)


def commit(domain: "libvirt.virDomain", target: str) -> None:
    """Bring a disk's external snapshot back into what is below it."""
    domain.blockCommit(target, None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    _until_ready(domain, target)
    domain.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    libvirtd.wait_for(lambda: not domain.blockJobInfo(target))


def _until_ready(domain: "libvirt.virDomain", target: str) -> None:
    def is_ready() -> bool:
        job = domain.blockJobInfo(target)
        return bool(job["cur"] == job["end"] and "ready='yes'" in domain.XMLDesc())

    libvirtd.wait_for(is_ready)


def test_what_a_backup_does_not_mind(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    persistent: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
) -> None:
    """libvirt does it, the guest is as it is to be then, and what is frozen stays so."""
    dom, domain = connection.lookupByName("lasting"), persistent.libvirt
    before = persistent.state()
    dom.backupStart(document(host))
    core = host.path("core")
    for call, state in (
        (domain.suspend, libvirt.VIR_DOMAIN_PAUSED),
        (domain.resume, libvirt.VIR_DOMAIN_RUNNING),
        (lambda: domain.reset(0), libvirt.VIR_DOMAIN_RUNNING),
        (
            lambda: domain.coreDump(str(core), libvirt.VIR_DUMP_MEMORY_ONLY),
            libvirt.VIR_DOMAIN_RUNNING,
        ),
        (lambda: domain.coreDump(str(core), 0), libvirt.VIR_DOMAIN_RUNNING),
    ):
        call()
        assert domain.state()[0] == state
        assert dom.backupGetInfo().state == "running"
        assert right(host)
        persistent.write("vda", 3, pattern(1)[3 * libvirtd.CLUSTER])
    dom.backupStop()
    assert persistent.state() == before
    assert not left_over(persistent, scratch_dir, state_dir)


def test_a_start_and_a_stop_of_a_paused_domain(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    persistent: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
) -> None:
    dom, domain = connection.lookupByName("lasting"), persistent.libvirt
    domain.suspend()
    dom.backupStart(document(host))
    assert right(host)
    dom.backupStop()
    assert domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    assert not left_over(persistent, scratch_dir, state_dir)
    domain.resume()


def test_an_internal_snapshot_meanwhile(
    host: libvirtd.Host, connection: virtbackup.Connection, scratch_dir: pathlib.Path
) -> None:
    disks = disk_xml("vda", image(host.path("a.qcow2"), 1))
    with host.domain("inside", disks, persistent=True) as domain:
        dom = connection.lookupByName("inside")
        dom.backupStart(document(host))
        domain.write("vda", 3)
        try:  # newer ones can
            domain.libvirt.snapshotCreateXML(SNAPSHOT.format("s"))
        except libvirt.libvirtError as failure:
            assert "Failed to take snapshot" in str(failure)
        assert domain.libvirt.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        assert libvirtd.read(socket(host), "vda") == pattern(1)
        dom.backupStop()
        domain.libvirt.snapshotCreateXML(SNAPSHOT.format("later"))
        assert not list(scratch_dir.iterdir())


@pytest.mark.usefixtures("unasked")
def test_libvirts_own_work_meanwhile_and_afterwards(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    persistent: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
) -> None:
    """What QEMU does not allow beside a backup fails, and harms neither; all of it works after."""
    dom, domain = connection.lookupByName("lasting"), persistent.libvirt
    saved = str(host.path("saved"))
    before = persistent.state()
    dom.backupStart(document(host))
    refused: dict[str, Callable[[], object]] = {
        "NBD server already running": lambda: domain.backupBegin(
            NATIVE.format(host.path("theirs")), None
        ),
        "'block_resize'": lambda: domain.blockResize("vda", 2 * libvirtd.SIZE, 1),
        "'blockdev-mirror'": lambda: domain.blockCopy(
            "vda", COPY.format(host.path("copy.qcow2")), {}, COPY_FLAGS
        ),
    }
    if dom.backupGetInfo().engine == "classic":
        refused["Node '[^']*' is busy"] = lambda: domain.snapshotCreateXML(
            SNAPSHOT.format("s"), DISK_ONLY
        )
    for reason, call in refused.items():
        with pytest.raises(libvirt.libvirtError, match=reason):
            call()
    assert domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    persistent.write("vda", 3)
    assert right(host)
    dom.backupStop()
    assert persistent.state() == before
    domain.snapshotCreateXML(SNAPSHOT.format("s"), DISK_ONLY)
    persistent.write("vda", 4)
    dom.backupStart(document(host, '<disk name="sdb" present="no"/>'))
    seen = bytearray(pattern(1))
    for cluster in (3, 4):
        at = cluster * libvirtd.CLUSTER
        seen[at : at + libvirtd.CLUSTER] = b"\xff" * libvirtd.CLUSTER
    with pytest.raises(libvirt.libvirtError, match="'block-commit'"):
        domain.blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    commit(domain, "sdb")
    assert libvirtd.read(socket(host), "vda") == seen
    dom.backupStop()
    commit(domain, "vda")
    domain.backupBegin(NATIVE.format(host.path("theirs")), None)
    assert libvirtd.read(host.path("theirs"), "vda") == seen
    domain.abortJob()
    libvirtd.wait_for(lambda: domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE)
    disk = disk_xml("sdb", host.path("b.raw"), "raw")
    domain.detachDevice(disk)
    domain.attachDevice(disk)
    domain.save(saved)
    host.connection.restore(saved)
    dom.backupStart(document(host))
    assert libvirtd.read(socket(host), "vda") == seen
    dom.backupStop()
    assert not left_over(persistent, scratch_dir, state_dir)


COPY = "<disk type='file'><source file='{}'/></disk>"
COPY_FLAGS = libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
NATIVE = "<domainbackup mode='pull'><server transport='unix' socket='{}'/></domainbackup>"


def test_a_disk_that_libvirt_unplugs_meanwhile(
    host: libvirtd.Host, connection: virtbackup.Connection, two: libvirtd.Domain
) -> None:
    dom = connection.lookupByName("two")
    dom.backupStart(document(host))
    disk = disk_xml("sdb", host.path("two/b.raw"), "raw")
    two.libvirt.detachDevice(disk)
    assert right(host)
    with pytest.raises(virtbackup.Error, match=r"good: disk 'sdb': the disk was unplugged[^;]*$"):
        dom.backupStop()
    two.libvirt.attachDevice(disk)
    dom.backupStart(document(host))
    assert right(host)
    dom.backupStop()
    with (
        steps.before("scratch_images", lambda _: two.libvirt.detachDevice(disk)),
        pytest.raises(virtbackup.Error, match="disk 'sdb' was unplugged, or its medium"),
    ):
        dom.backupStart(document(host))
    two.libvirt.attachDevice(disk)


def test_a_disk_in_whose_place_libvirt_plugs_another_meanwhile(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
) -> None:
    """It is somebody else's from then on, who may write to it past the job."""
    raw, other = image(host.path("remote.raw"), 2, "raw"), image(host.path("c.qcow2"), 3)
    path = host.path("remote.sock")
    remote = (
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
        f"<source protocol='nbd' name=''><host transport='unix' socket='{path}'/></source>"
        "<target dev='sdb' bus='scsi'/></disk>"
    )
    disks = disk_xml("vda", image(host.path("a.qcow2"), 1)) + remote
    with _served(path, raw), host.domain("replugged", disks) as domain:
        dom = connection.lookupByName("replugged")
        dom.backupStart(document(host))
        domain.libvirt.detachDevice(remote)
        with raw.open("r+b") as file:
            file.write(b"\xee")
        domain.libvirt.attachDevice(disk_xml("sdb", other))
        assert not right(host)
        [sdb] = [disk for disk in dom.backupGetInfo().disks if disk.state == "failed"]
        assert (sdb.name, "its device got another image" in str(sdb.reason)) == ("sdb", True)
        with pytest.raises(virtbackup.Error, match=r"good: disk 'sdb': its device got another im"):
            dom.backupStop()
        assert not left_over(domain, scratch_dir, state_dir)
        assert str(path) not in str(domain.monitor("query-named-block-nodes"))


def test_a_domain_that_is_set_back_to_a_snapshot(
    host: libvirtd.Host, connection: virtbackup.Connection, scratch_dir: pathlib.Path
) -> None:
    disks = disk_xml("vda", image(host.path("a.qcow2"), 1))
    with host.domain("back", disks, persistent=True) as domain:
        snapshot = domain.libvirt.snapshotCreateXML(SNAPSHOT.format("s"))
        dom = connection.lookupByName("back")
        dom.backupStart(document(host))
        domain.libvirt.revertToSnapshot(snapshot)
        reason = "disk 'vda': the domain was set back to a snapshot"
        with pytest.raises(virtbackup.Error, match=reason):
            dom.backupStop()
        assert not list(scratch_dir.iterdir())
        assert not left_in_qemu(domain)
        dom.backupStart(document(host))
        dom.backupStop()
        dom.branchCreate("nightly")
        with pytest.raises(libvirt.libvirtError, match="active dirty bitmaps"):
            domain.libvirt.revertToSnapshot(snapshot)


def test_libvirtd_is_killed_and_started_again_meanwhile(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    two: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
) -> None:
    dom = connection.lookupByName("two")
    dom.backupStart(document(host))
    host.daemon.kill()
    assert right(host)
    with pytest.raises(virtbackup.Error):
        dom.backupGetInfo()
    words = r"\(the backup is not stopped: a stop tells its verdict, once QEMU can be asked again"
    with pytest.raises(virtbackup.Error, match=words):
        dom.backupStop()
    host.daemon.start()
    two = host.again("two")
    two.write("vda", 3, pattern(1)[3 * libvirtd.CLUSTER])
    assert dom.backupGetInfo().state == "running"
    assert right(host)
    dom.backupStop()
    assert not left_over(two, scratch_dir, state_dir)


@pytest.mark.parametrize("when", ["freeze", "stopped", "closed"])
def test_a_backup_that_ends_with_its_connection_while_libvirtd_restarts(
    host: libvirtd.Host,
    two: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """What a call could not do then, or undo, the connection's close does."""
    with contextlib.ExitStack() as undo:
        opened = virtbackup.open(host.daemon.uri)
        undo.callback(opened.close)
        dom = opened.lookupByName("two")
        owned = virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY
        if when == "freeze":
            kill = steps.before("freeze", lambda _: host.daemon.kill())
            words = (
                r"^internal error: the connection to libvirt was lost: .* \(no backup was started;"
                " what is left of it ends with the connection, else with the next start, or"
                r" backup-cleanup\)$"
            )
            with monkeypatch.context() as patch:
                patch.setattr(domain_obj, "PATIENCE", 0.5)
                with kill, pytest.raises(virtbackup.Error, match=words):
                    dom.backupStart(document(host), owned)
        else:
            dom.backupStart(document(host), owned)
            host.daemon.kill()
        if when == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(domain_obj, "PATIENCE", 0.5)
                words = "connect.*is not stopped: it ends with the connection, else with the next"
                with pytest.raises(virtbackup.Error, match=words):
                    dom.backupStop()
        late = threading.Timer(1, host.daemon.start)
        late.start()
        undo.callback(late.join)
        opened.close()
    two = host.again("two")
    assert not left_over(two, scratch_dir, state_dir)
    assert not socket(host).exists()


def test_libvirtd_restarts_while_a_backup_is_started(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    two: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
) -> None:
    dom = connection.lookupByName("two")
    late = threading.Timer(1, host.daemon.start)

    def restart(_: object) -> None:
        host.daemon.kill()
        late.start()

    words = r"lost: .* \(no backup was started, and nothing is left of it\)$"
    with steps.before("exports", restart), pytest.raises(virtbackup.Error, match=words):
        dom.backupStart(document(host))
    late.join()
    two = host.again("two")
    assert not left_over(two, scratch_dir, state_dir)


def test_a_start_is_interrupted_as_it_waits_for_libvirtd_to_be_undone(
    host: libvirtd.Host, two: libvirtd.Domain, scratch_dir: pathlib.Path, state_dir: pathlib.Path
) -> None:
    """What is left ends with the connection all the same."""
    connection = virtbackup.open(host.daemon.uri)
    late = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))

    def kill(_: object) -> None:
        host.daemon.kill()
        late.start()

    with contextlib.closing(connection):
        dom = connection.lookupByName("two")
        with steps.before("exports", kill), pytest.raises(KeyboardInterrupt):
            dom.backupStart(document(host), virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY)
        late.join()
        host.daemon.start()
    two = host.again("two")
    assert not left_over(two, scratch_dir, state_dir)


def test_libvirtd_restarts_while_a_backup_is_stopped_that_ends_with_its_connection(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    two: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
) -> None:
    """As that of a pull, which has copied everything by then."""
    dom = connection.lookupByName("two")
    dom.backupStart(document(host), virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY)
    host.daemon.kill()
    late = threading.Timer(1, host.daemon.start)
    late.start()
    dom.backupStop()
    late.join()
    two = host.again("two")
    assert not left_over(two, scratch_dir, state_dir)


CLOSED_BY_A_SIGNAL = """
import signal, sys
import virtbackup
from virtbackup.qemu import domain_obj
connection = virtbackup.open(sys.argv[1])
signal.signal(signal.SIGUSR1, lambda *_: connection.close())
made = domain_obj.DomainObj.__init__
def make(*args, **options):
    made(*args, **options)
    signal.raise_signal(signal.SIGUSR1)
domain_obj.DomainObj.__init__ = make
try:
    connection.lookupByName("two").backupGetInfo()
except virtbackup.Error:
    print("closed")
"""


def test_a_signal_s_handler_closes_the_connection_as_a_domain_is_asked_for(
    host: libvirtd.Host, two: libvirtd.Domain
) -> None:
    argv = [sys.executable, "-c", CLOSED_BY_A_SIGNAL, host.daemon.uri]
    assert subprocess.check_output(argv, timeout=waiting.DEADLINE) == b"closed\n"


CLOSED_AS_LIBVIRT_IS_ASKED = """
import signal, sys
import virtbackup
from virtbackup.qemu import libvirt_driver
connection = virtbackup.open(sys.argv[1])
domain = connection.lookupByName("two")
domain.backupStart(sys.argv[2], virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY)
signal.signal(signal.SIGUSR1, lambda *_: connection.close())
is_alive = libvirt_driver.LibvirtDriver.is_alive
def ask(driver):
    libvirt_driver.LibvirtDriver.is_alive = is_alive
    signal.raise_signal(signal.SIGUSR1)
    return is_alive(driver)
libvirt_driver.LibvirtDriver.is_alive = ask
domain.state()
"""


def test_a_signal_s_handler_closes_the_connection_as_libvirt_is_asked(
    host: libvirtd.Host, two: libvirtd.Domain, scratch_dir: pathlib.Path, state_dir: pathlib.Path
) -> None:
    argv = [sys.executable, "-c", CLOSED_AS_LIBVIRT_IS_ASKED, host.daemon.uri, document(host)]
    subprocess.run(argv, check=True, timeout=waiting.DEADLINE)
    assert not left_over(two, scratch_dir, state_dir)


def test_libvirtd_does_not_come_back_for_backups_that_end_with_their_connection(
    host: libvirtd.Host, two: libvirtd.Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for once, and not for each."""
    patience, untils = 1.0, list[float | None]()
    close = domain_obj.DomainObj.close

    def note(one: domain_obj.DomainObj, until: float | None = None) -> None:
        untils.append(until)
        close(one, until)

    monkeypatch.setattr(domain_obj, "PATIENCE", patience)
    monkeypatch.setattr(domain_obj.DomainObj, "close", note)
    disks = disk_xml("vda", image(host.path("c.qcow2"), 3))
    with host.domain("other", disks), virtbackup.open(host.daemon.uri) as opened:
        own = document(host).replace(str(socket(host)), str(host.path("own.sock")))
        owned = virtbackup.VIR_DOMAIN_BACKUP_START_AUTODESTROY
        opened.lookupByName("two").backupStart(document(host), owned)
        opened.lookupByName("other").backupStart(own, owned)
        host.daemon.kill()
        began = time.monotonic()
        opened.close()
        assert time.monotonic() - began >= patience
        assert (len(untils), len({*untils} - {None})) == (2, 1)
        host.daemon.start()
        host.connection = libvirt.open(host.daemon.uri)
        with virtbackup.open(host.daemon.uri) as again:
            for name in ("two", "other"):
                again.lookupByName(name).backupStop()


def test_a_restart_of_libvirtd_that_nobody_has_noticed(
    host: libvirtd.Host, connection: virtbackup.Connection, two: libvirtd.Domain
) -> None:
    """The first call after it is made on a new connection, with an event loop or without."""
    dom = connection.lookupByName("two")
    dom.backupStart(document(host))
    _restart(host)
    dom.backupStop()
    _restart(host)
    assert connection.lookupByName("two").UUIDString() == two.libvirt.UUIDString()


def _restart(host: libvirtd.Host) -> None:
    host.daemon.kill()
    host.daemon.start()
    host.connection = libvirt.open(host.daemon.uri)


@pytest.mark.parametrize("raw", [False, True])
def test_a_domain_that_is_migrated_meanwhile(
    raw: bool,
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    scratch_dir: pathlib.Path,
) -> None:
    """With the classic engine QEMU keeps the disks, and with both the lock of a raw image, and the
    other one has to give up."""
    a, b = host.path("a.qcow2"), host.path("b")
    fmt = "raw" if raw else "qcow2"
    disks = disk_xml("vda", image(a, 1)) + disk_xml("sdb", image(b, 2, fmt), fmt)
    flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_UNSAFE
    to = (flags, None, "tcp://127.0.0.1")
    with (
        tempfile.TemporaryDirectory(prefix="vb-libvirtd-", dir="/var/tmp") as name,
        host.domain("moves", disks) as domain,
        libvirtd.running(pathlib.Path(name), host.daemon) as elsewhere,
        contextlib.closing(libvirt.open(elsewhere.uri)) as there,
        virtbackup.open(elsewhere.uri) as connection_there,
    ):
        dom = connection.lookupByName("moves")
        dom.backupStart(document(host))
        if dom.backupGetInfo().engine == "hybrid" and not raw:
            domain.libvirt.migrate(there, *to)
            with pytest.raises(virtbackup.Error, match=r"'vda': the domain (was migrated|is gone)"):
                dom.backupStop()
        else:
            # libvirt tells of it what the one or the other side said.
            with pytest.raises(libvirt.libvirtError, match=r'Failed to get "write" lock|migration'):
                domain.libvirt.migrate(there, *to)
            assert domain.libvirt.state()[0] == libvirt.VIR_DOMAIN_RUNNING
            domain.write("vda", 3, pattern(1)[3 * libvirtd.CLUSTER])
            assert right(host)
            dom.backupStop()
            assert not left_in_qemu(domain)
            domain.libvirt.migrate(there, *to)
        assert not list(scratch_dir.iterdir())
        moved = connection_there.lookupByName("moves")
        assert not left_in_qemu(libvirtd.Domain(there.lookupByName("moves")))
        moved.backupStart(document(host))
        assert right(host)
        moved.backupStop()
        assert not list(scratch_dir.iterdir())


def test_a_migration_that_is_aborted(
    host: libvirtd.Host, connection: virtbackup.Connection, scratch_dir: pathlib.Path
) -> None:
    """It changes nothing for the backup."""
    flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_UNSAFE
    with (
        tempfile.TemporaryDirectory(prefix="vb-libvirtd-", dir="/var/tmp") as name,
        host.domain("stays", two_disks(host), memory=256) as domain,
        libvirtd.running(pathlib.Path(name), host.daemon) as elsewhere,
        contextlib.closing(libvirt.open(elsewhere.uri)) as there,
        contextlib.closing(libvirt.open(host.daemon.uri)) as another,
    ):
        dom = connection.lookupByName("stays")
        dom.backupStart(document(host))
        domain.libvirt.migrateSetMaxSpeed(1)
        said: list[str] = []

        def migrate() -> None:
            try:
                domain.libvirt.migrate(there, flags, None, "tcp://127.0.0.1")
            except libvirt.libvirtError as failure:
                said.append(str(failure))

        thread = threading.Thread(target=migrate)
        thread.start()
        same = another.lookupByName("stays")
        libvirtd.wait_for(lambda: same.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE)
        same.abortJob()
        thread.join()
        assert ["canceled" in text for text in said] == [True], said
        domain.write("vda", 3)
        assert right(host)
        dom.backupStop()
        assert not left_in_qemu(domain)


def test_a_domain_that_is_saved_during_an_increment(
    host: libvirtd.Host, scratch_dir: pathlib.Path, state_dir: pathlib.Path
) -> None:
    """Nobody of ours is there when that happens; and nothing of the branch is lost by it. QEMU
    stores all bitmaps when it gives a disk away, and a copy of this one is being read."""
    disks = disk_xml("vda", image(host.path("a.qcow2"), 1))
    branch = document(host, '<disk name="vda" type="auto"/>', "nightly")
    saved = str(host.path("saved"))
    with host.domain("saved", disks, persistent=True) as domain:
        with virtbackup.open(host.daemon.uri) as before:
            before.lookupByName("saved").backupStart(branch)
            before.lookupByName("saved").backupStop()
        for paused in (False, True):
            for save in (lambda: domain.libvirt.save(saved), domain.libvirt.managedSave):
                domain.write("vda", 1)
                with virtbackup.open(host.daemon.uri) as before:
                    before.lookupByName("saved").backupStart(branch)
                    info = before.lookupByName("saved").backupGetInfo()
                    assert (info.save_failure, info.save_reason) == ("backup", None)
                domain.write("vda", 2)
                with reading(socket(host), "vda"):
                    if paused:
                        domain.libvirt.suspend()
                    save()
                with virtbackup.open(host.daemon.uri) as after:
                    dom = after.lookupByName("saved")
                    reason = "'vda': the domain was saved to a file$"
                    with pytest.raises(virtbackup.Error, match=reason):
                        dom.backupStop()
                    assert not list(scratch_dir.iterdir())
                    assert not list(state_dir.glob("*.json"))
                    assert not socket(host).exists()
                    if domain.libvirt.hasManagedSaveImage():
                        domain.libvirt.create()
                    else:
                        host.connection.restore(saved)
                    if paused:
                        domain.libvirt.resume()
                    dom.backupStart(branch)
                    assert changed(socket(host), "nightly") == {1, 2}
                    domain.write("vda", 3)
                    dom.backupStop()
                    dom.backupStart(branch)
                    assert changed(socket(host), "nightly") == {3}
                    dom.backupStop()
                    for command in ("query-jobs", "query-block-exports"):
                        assert domain.monitor(command) == []
                    assert not list(scratch_dir.iterdir())


@contextlib.contextmanager
def reading(path: pathlib.Path, export: str) -> Iterator[None]:
    """A client reads all the time, until it is cut off or this ends."""
    client = nbd.NBD()
    client.connect_uri(f"nbd+unix:///{export}?socket={path}")
    ends = threading.Event()

    def read() -> None:
        with contextlib.suppress(nbd.Error):
            while not ends.is_set():
                client.pread(libvirtd.CLUSTER, 0)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def test_a_save_is_refused_where_nobody_else_is_kept_from_a_disk(
    host: libvirtd.Host, connection: virtbackup.Connection, scratch_dir: pathlib.Path
) -> None:
    """As with the classic engine QEMU keeps a disk, also of a migration to another host."""
    raw = host.path("remote.raw")
    raw.write_bytes(pattern(1))
    path = host.path("remote.sock")
    disks = (
        "<disk type='network' device='disk'><driver name='qemu' type='raw'/>"
        f"<source protocol='nbd' name=''><host transport='unix' socket='{path}'/></source>"
        "<target dev='vda' bus='virtio'/></disk>"
    )
    with _served(path, raw), host.domain("remote", disks, persistent=True) as domain:
        dom = connection.lookupByName("remote")
        dom.backupStart(document(host))
        saves = (lambda: domain.libvirt.save(str(host.path("s"))), domain.libvirt.managedSave)
        if dom.backupGetInfo().engine == "hybrid":
            saves[0]()
            with pytest.raises(virtbackup.Error, match="'vda': the domain was saved to a file"):
                dom.backupStop()
            return
        for save in saves * 3:
            info = dom.backupGetInfo()
            assert (info.save_failure, "'vda' is no local file" in str(info.save_reason)) == (
                "save",
                True,
            )
            with pytest.raises(libvirt.libvirtError, match=r"job 'domain save' .*failed"):
                save()
        assert domain.libvirt.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        domain.write("vda", 3)
        assert libvirtd.read(socket(host), "vda") == pattern(1)
        dom.backupStop()
        assert not list(scratch_dir.iterdir())
        saves[0]()


def test_scratch_space_that_runs_out_ends_the_backup_and_not_the_guest(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    two: libvirtd.Domain,
    scratch_dir: pathlib.Path,
) -> None:
    """It is watched by way of libvirt, too."""
    dom = connection.lookupByName("two")
    with places.small_file_system(scratch_dir, 3 << 20):
        dom.backupStart(document(host))
        for cluster in range(libvirtd.SIZE // libvirtd.CLUSTER):
            two.write("vda", cluster, pattern(1)[cluster * libvirtd.CLUSTER])
            if dom.backupGetInfo().state == "failed":
                break
        libvirtd.wait_for(lambda: dom.backupGetInfo().state == "failed")
        with pytest.raises(virtbackup.Error, match="'vda': given up before the scratch image"):
            dom.backupStop()
        assert two.monitor("query-status")["running"]
        assert not left_in_qemu(two)


def test_a_start_in_the_middle_of_which_somebody_dies(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    two: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """QEMU: nothing is left. libvirtd: what is left, the next start removes."""
    dom = connection.lookupByName("two")
    with (
        steps.before("freeze", lambda _: libvirtd.kill(two.libvirt)),
        pytest.raises(virtbackup.Error, match=r"monitor|domain is not running"),
    ):
        dom.backupStart(document(host))
    assert not list(scratch_dir.iterdir())
    assert not list(state_dir.glob("*.json"))
    assert not socket(host).exists()
    libvirtd.wait_for(lambda: not two.libvirt.isActive())
    two.libvirt.create()
    with monkeypatch.context() as patch:
        patch.setattr(domain_obj, "PATIENCE", 0.5)
        with steps.before("freeze", lambda _: host.daemon.kill()), pytest.raises(virtbackup.Error):
            dom.backupStart(document(host))
    host.daemon.start()
    two = host.again("two")
    dom.backupStart(document(host))
    assert right(host)
    dom.backupStop()
    assert not left_over(two, scratch_dir, state_dir)


def test_a_snapshot_of_libvirts_in_the_middle_of_a_start(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    persistent: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
) -> None:
    """Of one disk: it would be shown as it was at the snapshot, the other as at the start."""
    dom = connection.lookupByName("lasting")

    def late(_: object) -> None:
        persistent.libvirt.snapshotCreateXML(ONE_DISK.format("s"), DISK_ONLY)
        persistent.write("vda", 0)
        persistent.write("sdb", 0)

    with (
        steps.before("scratch_images", late),
        pytest.raises(virtbackup.Error, match="disk 'vda' got another image"),
    ):
        dom.backupStart(document(host))
    assert not left_over(persistent, scratch_dir, state_dir)
    dom.backupStart(document(host))
    for disk in ("vda", "sdb"):
        assert libvirtd.read(socket(host), disk)[:1] == b"\xff"
    dom.backupStop()


# --- libvirt's own jobs ---------------------------------------------------------------------------


def test_jobs_of_libvirts_own(
    host: libvirtd.Host, connection: virtbackup.Connection, persistent: libvirtd.Domain
) -> None:
    """On a chosen disk: refused by name. On one that is left out: no matter."""
    dom, domain = connection.lookupByName("lasting"), persistent.libvirt
    domain.backupBegin(NATIVE.format(host.path("theirs")), None)
    with pytest.raises(virtbackup.Error, match=r"already running: libvirt's own"):
        dom.backupStart(document(host))
    domain.abortJob()
    libvirtd.wait_for(lambda: domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE)
    domain.blockCopy("vda", COPY.format(host.path("copy.qcow2")), {}, COPY_FLAGS)
    with pytest.raises(virtbackup.Error, match=r"disk 'vda' already in active block job of lib"):
        dom.backupStart(document(host))
    dom.backupStart(document(host, '<disk name="vda" present="no"/>'))
    assert libvirtd.read(socket(host), "sdb") == pattern(2)
    domain.blockJobAbort("vda")
    dom.backupStop()
    domain.snapshotCreateXML(SNAPSHOT.format("s"), DISK_ONLY)
    domain.blockCommit("sdb", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    with pytest.raises(virtbackup.Error, match=r"disk 'sdb' already in active block job of lib"):
        dom.backupStart(document(host))
    dom.backupStart(document(host, '<disk name="sdb" present="no"/>'))
    assert libvirtd.read(socket(host), "vda") == pattern(1)
    _until_ready(domain, "sdb")
    domain.blockJobAbort("sdb", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    dom.backupStop()


# --- connections ----------------------------------------------------------------------------------


def test_a_connection_that_is_read_only(
    host: libvirtd.Host, connection: virtbackup.Connection, two: libvirtd.Domain
) -> None:
    dom = connection.lookupByName("two")
    with virtbackup.open(host.daemon.uri, readonly=True) as opened:
        readonly = opened.lookupByName("two")
        with pytest.raises(virtbackup.Error, match="read only access prevents virDomainBackupSta"):
            readonly.backupStart(document(host))
        with pytest.raises(virtbackup.Error, match="no domain backup job present"):
            readonly.backupGetXMLDesc()
        dom.backupStart(document(host))
        assert readonly.backupGetXMLDesc() == dom.backupGetXMLDesc()
        with pytest.raises(virtbackup.Error) as error:
            readonly.backupGetInfo()
        assert error.value.get_error_code() == libvirt.VIR_ERR_OPERATION_DENIED
        dom.backupStop()


def test_the_domain_is_tainted_until_it_is_started_anew(
    connection: virtbackup.Connection, two: libvirtd.Domain
) -> None:
    def is_tainted() -> bool:
        said = two.libvirt.messages(libvirt.VIR_DOMAIN_MESSAGE_TAINTING)
        return any("custom monitor control commands issued" in line for line in said)

    two.libvirt.destroy()
    two.libvirt.create()
    assert not is_tainted()
    connection.lookupByName("two").branchList()
    assert is_tainted()
    two.libvirt.destroy()
    two.libvirt.create()
    assert not is_tainted()


def test_every_way_to_spell_a_uri_leads_to_the_same_backup(
    host: libvirtd.Host, connection: virtbackup.Connection, two: libvirtd.Domain
) -> None:
    connection.lookupByName("two").backupStart(document(host))
    other = f"qemu+unix:///system?socket={host.daemon.socket}&engine=classic"
    with virtbackup.open(other) as opened:
        assert opened.lookupByName("two").backupGetInfo().state == "running"
        opened.lookupByName("two").backupStop()


def test_two_domains_at_once(
    host: libvirtd.Host, connection: virtbackup.Connection, two: libvirtd.Domain
) -> None:
    disks = disk_xml("vda", image(host.path("c.qcow2"), 3))
    with host.domain("other", disks):
        connection.lookupByName("two").backupStart(document(host))
        own = document(host).replace(str(socket(host)), str(host.path("own.sock")))
        connection.lookupByName("other").backupStart(own)
        assert right(host)
        assert libvirtd.read(host.path("own.sock"), "vda") == pattern(3)
        connection.lookupByName("two").backupStop()
        assert libvirtd.read(host.path("own.sock"), "vda") == pattern(3)
        connection.lookupByName("other").backupStop()


# --- libvirt's own engine -------------------------------------------------------------------------


def test_the_same_calls_on_libvirts_own_engine(
    host: libvirtd.Host, two: libvirtd.Domain, tmp_path: pathlib.Path, scratch_dir: pathlib.Path
) -> None:
    with virtbackup.open(f"{host.daemon.uri}&native=yes") as native:
        domain = native.lookupByName("two")
        with pytest.raises(virtbackup.Error, match="No such file or directory"):
            domain.backupStart(document(host).replace(f"{socket(host)}", "/nowhere/nbd.sock"))
        domain.backupStart(document(host))
        assert two.libvirt.jobStats()["operation"] == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
        assert right(host)
        assert domain.backupGetInfo().engine == "libvirt"
        assert f'path="{socket(host)}"' in domain.backupGetXMLDesc()
        with pytest.raises(virtbackup.Error, match="another backup job is already running"):
            domain.backupStart(document(host))
        domain.backupStop()
        with pytest.raises(virtbackup.Error) as none:
            domain.backupStop()
        assert none.value.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_BACKUP
        with pytest.raises(virtbackup.Error, match="branch 'b': libvirt's own backup has check"):
            domain.backupStart(document(host, branch="b"))
        made = pull.pull(domain, tmp_path / "out", xml=document(host))
        assert {disk.name for disk in made.disks} == {"vda", "sdb"}
        assert machines.contents(tmp_path / "out" / "vda.qcow2", "qcow2") == pattern(1)
        domain.backupStart(document(host))
        two.libvirt.abortJob()  # of which libvirt itself may yet have to learn
        told = r"its backup job ended|somebody else ended it|no domain backup job present"
        with pytest.raises(virtbackup.Error, match=told):
            domain.backupStop()
    waiting.until(lambda: list(scratch_dir.iterdir()) == [])


def test_both_engines_compared(
    host: libvirtd.Host, two: libvirtd.Domain, tmp_path: pathlib.Path
) -> None:
    """A guest that does not write: both have to show the same bytes."""
    xml = tmp_path / "backup.xml"
    xml.write_text(document(host))
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", host.daemon.uri]

    def run(*options: str) -> "subprocess.CompletedProcess[str]":
        words = [*argv, "compare", "two", str(xml), *options]
        return subprocess.run(words, check=False, capture_output=True, text=True)

    assert run("--rounds", "0").returncode == 2
    told = strict_json.loads(run("--rounds", "2", "--json").stdout)
    assert list(strict_json.differences(test_json.example("compare", told), told)) == []
    assert told["agree"] is True
    ours, theirs = told["engines"]["virtbackup"], told["engines"]["libvirt"]
    assert ours["checksums"] == theirs["checksums"]
    assert len(ours["checksums"]) == 2
    assert ours["commands"] > 10
    assert min(ours["start"], theirs["start"]) > 0
    xml.write_text(document(host, branch="b"))
    refused = run()
    assert refused.returncode == 1
    assert "branch 'b': only full backups without a branch can be compared" in refused.stderr
    assert left_in_qemu(two) == []


def test_a_comparison_that_is_interrupted_leaves_nothing(
    host: libvirtd.Host, two: libvirtd.Domain, tmp_path: pathlib.Path, state_dir: pathlib.Path
) -> None:
    """At any moment, be it by our engine that the guest is backed up then or by libvirt's."""
    xml = tmp_path / "backup.xml"
    xml.write_text(document(host))
    argv = [sys.executable, "-m", "virtbackup.tools.virsh_backup", "-c", host.daemon.uri]
    before = two.state()
    ended: list[tuple[int, str]] = []
    for step in range(0, 12, 1 if conftest.long() else 2):
        number = (signal.SIGINT, signal.SIGTERM)[len(ended) % 2]
        process = subprocess.Popen(
            [*argv, "compare", "two", str(xml), "--rounds", "1000"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        waiting.until(lambda: bool(left_in_qemu(two)), process=process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(step * 0.037)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        ended.append((process.returncode - 128 - number, err.partition(" ")[0]))
        assert two.libvirt.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE, step
        assert two.state() == before, step
        assert [path.name for path in state_dir.iterdir() if path.suffix == ".json"] == []
    assert ended == [(0, "error:")] * len(ended)


# --- branches and checkpoints ---------------------------------------------------------------------

CHECKPOINT = "<domaincheckpoint><name>{}</name>{}</domaincheckpoint>"


def changed(socket: pathlib.Path, context: str) -> set[int]:
    """The clusters that an export tells to have changed."""
    return {
        cluster
        for offset, length in nbdclient.changed(socket, "vda", context)
        for cluster in range(offset // libvirtd.CLUSTER, (offset + length) // libvirtd.CLUSTER)
    }


def test_branches_and_libvirts_checkpoints_do_not_disturb_each_other(
    host: libvirtd.Host, connection: virtbackup.Connection, state_dir: pathlib.Path
) -> None:
    disks = disk_xml("vda", image(host.path("a.qcow2"), 1))
    with host.domain("lined", disks, persistent=True) as persistent:
        dom, domain = connection.lookupByName("lined"), persistent.libvirt
        branch = document(host, '<disk name="vda" type="auto"/>', "nightly")

        def ours() -> set[int] | None:
            dom.backupStart(branch)
            [disk] = dom.backupGetInfo().disks
            found = changed(socket(host), "nightly") if disk.type == "incremental" else None
            dom.backupStop()
            return found

        def point() -> object:
            [branch] = (branch for branch in dom.branchList() if branch.name == "nightly")
            return branch.disks[0].point

        def theirs(since: str | None, now: str) -> set[int] | None:
            line = f"<incremental>{since}</incremental>" if since else ""
            xml = NATIVE.format(host.path("theirs")).replace("</domain", line + "</domain")
            domain.backupBegin(xml, CHECKPOINT.format(now, ""))
            found = changed(host.path("theirs"), "backup-vda") if since else None
            domain.abortJob()
            libvirtd.wait_for(lambda: domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE)
            return found

        domain.checkpointCreateXML(CHECKPOINT.format("alone", ""))
        assert ours() is None
        persistent.write("vda", 1)
        assert theirs(None, "first") is None
        persistent.write("vda", 2)
        assert ours() == {1, 2}
        assert theirs("first", "second") == {2}
        persistent.write("vda", 3)
        dom.backupStart(branch)
        domain.checkpointCreateXML(CHECKPOINT.format("between", ""))
        dom.backupStop()
        persistent.write("vda", 4)
        assert theirs("second", "third") == {3, 4}
        before = point()
        domain.snapshotCreateXML(SNAPSHOT.format("s"), DISK_ONLY)
        persistent.write("vda", 5)
        assert ours() == {4, 5}
        persistent.write("vda", 6)
        assert theirs("third", "fourth") == {5, 6}
        commit(domain, "vda")
        persistent.write("vda", 7)
        # The note of the backup over the snapshot went with its overlay: all since the one before.
        assert point() == before
        found = ours()
        assert found is not None
        assert found >= {4, 5, 6, 7}
        assert theirs("fourth", "fifth") == {7}
        for name in ("alone", "first", "second", "between", "third", "fourth", "fifth"):
            domain.checkpointLookupByName(name).delete()
        persistent.write("vda", 8)
        assert ours() == {8}
        dom.branchDelete("nightly")
        left = [m["name"] for d in persistent.monitor("query-block")
                for m in d["inserted"].get("dirty-bitmaps", [])]  # fmt: skip
        assert left == []


# --- the shell's event loop -----------------------------------------------------------------------


def test_the_shells_event_loop_outlives_its_connections(libvirt_host: libvirtd.Host) -> None:
    """libvirtd lets go of a connection whose process has a loop that nobody runs, half a minute
    later: that of the shell, connected anew, and any other of the process."""
    uri = libvirt_host.daemon.uri
    control = virsh_connection.Control(uri)
    control.connection()
    control.connect(f"{uri}&engine=classic", readonly=False)
    control.close()
    control.connection()
    control.close()
    loops = [one for one in threading.enumerate() if one.name == "virtbackup-event-loop"]
    assert len(loops) == 1
    assert loops[0].is_alive()
