# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backups of a real libvirt's domains, beside libvirt's own work on them."""

import contextlib
import os
import pathlib
import pwd
import subprocess
import sys
from collections.abc import Iterator

import libvirt_qemu
import pytest

import virtbackup
from tests.live import libvirtd, machines
from tests.live.libvirtd import disk_xml, image, pattern

pytestmark = pytest.mark.needs("libvirtd", "virsh", "qemu-system-x86_64", "nbdcopy", "unshare")


@pytest.fixture
def host(libvirt_host: libvirtd.Host) -> Iterator[libvirtd.Host]:
    """The daemon, its images gone after each test."""
    yield libvirt_host
    for path in libvirt_host.directory.iterdir():
        path.unlink()


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


def left_over(
    domain: libvirtd.Domain, scratch_dir: pathlib.Path, state_dir: pathlib.Path
) -> list[str]:
    """What is there of ours."""
    files = [str(path) for path in (*scratch_dir.iterdir(), *state_dir.glob("*.json"))]
    return files + [line for line in str(domain.state()).split("'") if "virtbackup" in line]


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


def two_disks(host: libvirtd.Host) -> str:
    """vda, a qcow2 image, and sdb, a raw one."""
    return disk_xml("vda", image(host.path("a.qcow2"), 1)) + disk_xml(
        "sdb", image(host.path("b.raw"), 2, "raw"), "raw"
    )


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
    with subprocess.Popen(argv) as daemon:
        libvirtd.wait_for(server.is_socket)
        with host.domain("two", two_disks(host) + vhost, memory):
            dom = connection.lookupByName("two")
            for disks in ("", '<disk name="vdb"/>'):
                with pytest.raises(virtbackup.Error, match=r"disk 'vdb' is not one that QEMU"):
                    dom.backupStart(document(host, disks))
            dom.backupStart(document(host, '<disk name="vdb" present="no"/>'))
            assert right(host)
            dom.backupStop()
        daemon.terminate()


def test_a_drive_that_is_not_in_the_xml_is_refused_by_its_id(
    host: libvirtd.Host, connection: virtbackup.Connection
) -> None:
    raw = image(host.path("extra.raw"), 3, "raw")
    with host.domain("two", two_disks(host)) as domain:
        file = {"driver": "file", "filename": str(raw)}
        domain.monitor("blockdev-add", driver="raw", node_name="extra", file=file)
        domain.monitor("device_add", driver="scsi-hd", id="disk9", drive="extra", bus="scsi0.0")
        dom = connection.lookupByName("two")
        with pytest.raises(virtbackup.Error, match=rf"device 'disk9' of QEMU writes '{raw}'"):
            dom.backupStart(document(host))
        with pytest.raises(virtbackup.Error, match=r"no disk named 'vdz'"):
            dom.backupStart(document(host, '<disk name="vdz" present="no"/>'
                                           '<disk name="disk9" present="no"/>'))  # fmt: skip
        dom.backupStart(document(host, '<disk name="disk9" present="no"/>'))
        assert right(host)
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
    with host.domain("confined", two_disks(host), label) as domain:
        yield domain


def test_a_qemu_of_another_user_needs_no_path(
    host: libvirtd.Host,
    connection: virtbackup.Connection,
    confined: libvirtd.Domain,
    scratch_dir: pathlib.Path,
    state_dir: pathlib.Path,
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
    confined.monitor(
        "nbd-server-start", addr={"type": "inet", "data": {"host": "::1", "port": "0"}}
    )
    with pytest.raises(virtbackup.Error, match="already in use by another job"):
        dom.backupStart(document(host).replace(str(socket(host)), str(taken)))
    assert not taken.exists()
    confined.monitor("nbd-server-stop")
    dom.backupStart(document(host))
    dom.backupStop()


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
