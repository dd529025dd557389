# SPDX-License-Identifier: LGPL-2.1-or-later
"""virsh and virtnbdbackup as they are, against virtbackupd: on a guest of libvirt's they see what
libvirtd shows them."""

import dataclasses
import pathlib
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests import daemon_scene
from tests.live import libvirtd, nbdclient
from virtbackup.conf import native_conf

pytestmark = pytest.mark.needs("libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "nbdcopy")

NAME = "vm"
CLUSTER = libvirtd.CLUSTER
ANY_PORT = "<domainbackup mode='pull'/>"


@dataclasses.dataclass
class Served:
    """A guest, by libvirtd's socket and by ours."""

    host: libvirtd.Host
    domain: libvirtd.Domain
    socket: pathlib.Path
    directory: pathlib.Path

    @property
    def ours(self) -> str:
        return f"qemu:///system?socket={self.socket}"

    @property
    def theirs(self) -> str:
        return self.host.daemon.uri

    def virsh(self, uri: str, *words: str, status: int = 0) -> str:
        """What virsh prints; standard error, where it is to fail."""
        argv = ["virsh", "-c", uri, *words]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, (words, done.stdout, done.stderr)
        return done.stderr if status else done.stdout

    def both(self, *words: str, status: int = 0) -> tuple[str, str]:
        """Of libvirtd and of virtbackupd."""
        return self.virsh(self.theirs, *words, status=status), self.virsh(
            self.ours, *words, status=status
        )

    def checkpoints(self, *words: str) -> list[str]:
        """Their names, as ours has them."""
        listing = ("checkpoint-list", NAME, "--name", "--topological")
        return self.virsh(self.ours, *listing, *words).split()

    def file(self, name: str, text: str) -> str:
        path = self.directory / name
        path.write_text(text)
        return str(path)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    directory.chmod(0o755)
    image = libvirtd.image(directory / "a.qcow2", 1)
    other = libvirtd.image(directory / "b.qcow2", 2)
    devices = libvirtd.disk_xml("vda", image) + libvirtd.disk_xml("sdb", other)
    devices += "<disk type='file' device='cdrom'><target dev='sdc' bus='sata'/><readonly/></disk>"
    (directory / "libvirtd").mkdir()
    with (
        libvirtd.host(directory / "libvirtd", directory) as host,
        host.domain(NAME, devices) as domain,
        host.domain("off", "", persistent=True) as other_domain,
        daemon_scene.running(directory, host.daemon.uri) as ours,
    ):
        other_domain.libvirt.destroy()
        yield Served(host, domain, ours.path, directory)


# --- looking --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "list --all", "list --name", "list --uuid", "list --inactive", "list --state-running",
        "list --transient --table", "list --persistent", "list --with-snapshot",
        "list --without-snapshot", "list --with-checkpoint", "list --without-checkpoint",
        "list --all --without-checkpoint", "list --all --with-checkpoint --without-checkpoint",
        "dominfo vm", "domstate vm --reason",
        "domid vm", "domuuid vm", "domname 1", "dumpxml vm", "dumpxml vm --security-info",
        "domblklist vm", "domblklist vm --details", "domblkinfo vm vda",
        "domblkinfo vm sdb --human",
        "blockjob vm vda", "nodeinfo", "hostname", "capabilities", "version", "domjobinfo vm",
        "domblkstat vm vda --human", "domstats vm --state --block", "checkpoint-list vm",
        "dominfo off", "domjobinfo off --completed", "domstate off --reason",
    ],
)  # fmt: skip
def test_the_same_output(served: Served, command: str) -> None:
    """Where a call is ours and libvirt's. What time changes by itself is left out, and what a virsh
    newer than libvirt 9.0 asks besides and can do without."""
    words = command.split()
    theirs, ours = (_comparable(text) for text in served.both(*words))
    assert ours == theirs


def _comparable(text: str) -> str:
    text = re.sub(r"Autostart Once:.*\n", "", text)
    return re.sub(r"CPU time: +\S+|CPU MHz.*|CPU frequency.*|_times?[ =].*|cpu\.time.*", "*", text)


@pytest.mark.parametrize(
    "command",
    [
        "domstate nope", "dumpxml nope", "domstate 77",
        "domstate 11111111-1111-1111-1111-111111111111", "backup-dumpxml vm", "domjobabort vm",
        "checkpoint-dumpxml vm nope", "checkpoint-delete vm nope", "checkpoint-parent vm nope",
        "domblkinfo vm nope", "checkpoint-info vm nope",
        "domjobinfo off", "domjobinfo off --rawstats", "domjobabort off", "suspend off",
        "domblkstat off vda", "domblkinfo off nope", "backup-begin off", "checkpoint-create off",
        "checkpoint-create-as vm x --diskspec vda --diskspec sdb --diskspec vda",
        "checkpoint-create-as vm x --diskspec sdc", "checkpoint-create-as vm x --diskspec vdz",
    ],
)  # fmt: skip
def test_the_same_error(served: Served, command: str) -> None:
    theirs, ours = served.both(*command.split(), status=1)
    assert ours == theirs


def test_a_checkpoint_to_be_redefined_has_a_name(served: Served) -> None:
    nameless = served.file("nameless.xml", "<domaincheckpoint/>")
    words = "checkpoint-create", NAME, nameless, "--redefine"
    theirs, ours = served.both(*words, status=1)
    assert ours == theirs


def test_a_read_only_connection(served: Served) -> None:
    start = ["backup-begin", NAME]
    for uri in (served.theirs, served.ours):
        argv = ["virsh", "-r", "-c", uri, *start]
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        assert done.returncode == 1
        assert "read only access prevents virDomainBackupBegin" in done.stderr


# --- backups --------------------------------------------------------------------------------------


@pytest.fixture
def pull(served: Served) -> str:
    """A document of libvirt's own, which libvirtd takes, too."""
    return served.file(
        "pull.xml",
        f"<domainbackup mode='pull'><server transport='unix' socket='{served.directory}/nbd.sock'/>"
        f"<disks><disk name='vda' type='file'><scratch file='{served.directory}/scratch'/></disk>"
        "</disks></domainbackup>",
    )


def test_a_backup_as_libvirtd_shows_it(served: Served, pull: str) -> None:
    shown = []
    for uri in (served.theirs, served.ours):
        said = [served.virsh(uri, "backup-begin", NAME, pull)]
        said.append(served.virsh(uri, "domjobinfo", NAME))
        said.append(served.virsh(uri, "domjobinfo", NAME, "--rawstats"))
        assert libvirtd.read(served.directory / "nbd.sock", "vda") == libvirtd.pattern(1)
        said.append(served.virsh(uri, "domjobabort", NAME))
        libvirtd.wait_for(lambda uri=uri: "None" in served.virsh(uri, "domjobinfo", NAME))  # type: ignore[misc]
        said.append(served.virsh(uri, "domjobinfo", NAME, "--completed", "--keep-completed"))
        said.append(served.virsh(uri, "domjobinfo", NAME, "--completed"))
        said.append(served.virsh(uri, "domjobinfo", NAME, "--completed"))
        shown.append([_without_numbers(text) for text in said])
    assert shown[1] == shown[0]


def _without_numbers(text: str) -> str:
    return re.sub(r"[\d.]+ +(ms|KiB|MiB|B|s)\b|time_elapsed.*|disk_temp.*", "#", text)


def test_the_document_of_a_running_backup(served: Served, pull: str) -> None:
    """As libvirtd tells it, but for the format of the scratch image and its number."""
    told = []
    for uri in (served.theirs, served.ours):
        served.virsh(uri, "backup-begin", NAME, pull)
        try:
            shown = served.virsh(uri, "backup-dumpxml", NAME)
        finally:
            served.virsh(uri, "domjobabort", NAME)
        libvirtd.wait_for(lambda uri=uri: "None" in served.virsh(uri, "domjobinfo", NAME))  # type: ignore[misc]
        document = native_conf.BackupDef.parse(shown)
        told.append([dataclasses.replace(disk, driver=None, index=None) for disk in document.disks])
        assert document.server == native_conf.UnixServer(f"{served.directory}/nbd.sock")
    assert told[1] == told[0]


def test_the_port_that_was_picked_is_told(served: Served) -> None:
    served.virsh(served.ours, "backup-begin", NAME, served.file("any.xml", ANY_PORT))
    try:
        shown = served.virsh(served.ours, "backup-dumpxml", NAME)
        port = native_conf.BackupDef.parse(shown).server.port  # type: ignore[union-attr]
        uri = f"nbd://localhost:{port}/vda"
        subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True)
    finally:
        served.virsh(served.ours, "domjobabort", NAME)


def test_checkpoints_by_virsh(served: Served) -> None:
    served.virsh(served.ours, "checkpoint-create-as", NAME, "one")
    again = served.virsh(served.ours, "checkpoint-create-as", NAME, "one", status=1)
    assert again == "error: operation failed: domain moment one already exists\n"
    served.domain.write("vda", 3)
    served.virsh(served.ours, "checkpoint-create-as", NAME, "two")
    served.domain.write("vda", 5)
    assert served.checkpoints() == ["one", "two"]
    assert served.checkpoints("--roots") == ["one"]
    assert served.virsh(served.ours, "checkpoint-parent", NAME, "two").strip() == "one"
    sized = served.virsh(served.ours, "checkpoint-dumpxml", NAME, "one", "--size", "--no-domain")
    assert f'<disk name="vda" checkpoint="bitmap" bitmap="one" size="{2 * CLUSTER}"/>' in sized
    assert '<disk name="sdc" checkpoint="no"/>' in sized
    incremental = served.file(
        "inc.xml",
        "<domainbackup mode='pull'><incremental>one</incremental>"
        f"<server transport='unix' socket='{served.directory}/nbd.sock'/></domainbackup>",
    )
    three = served.file("three.xml", "<domaincheckpoint><name>three</name></domaincheckpoint>")
    served.virsh(served.ours, "backup-begin", NAME, incremental, three)
    assert served.checkpoints()[-1] == "three"
    dirty = nbdclient.changed(served.directory / "nbd.sock", "vda", "backup-vda")
    assert dirty == [(n * CLUSTER, CLUSTER) for n in (3, 5)]
    served.virsh(served.ours, "domjobabort", NAME)
    assert served.checkpoints() == [
        "one", "two", "three",
    ]  # fmt: skip
    served.virsh(served.ours, "checkpoint-delete", NAME, "two", "--children")
    assert served.checkpoints() == ["one"]
    served.virsh(served.ours, "checkpoint-delete", NAME, "one")
    bitmaps = served.domain.monitor("query-named-block-nodes")
    assert "dirty-bitmaps" not in str(bitmaps)


def test_events(served: Served, pull: str) -> None:
    argv = ["virsh", "-c", served.ours, "event", NAME, "--all", "--loop", "--timeout", "20"]
    path = served.directory / "events"
    with path.open("wb") as output, subprocess.Popen(argv, stdout=output) as watching:
        while "Suspended" not in path.read_text():  # it takes virsh a moment to register
            served.virsh(served.ours, "suspend", NAME)
            served.virsh(served.ours, "resume", NAME)
        served.virsh(served.ours, "backup-begin", NAME, pull)
        served.virsh(served.ours, "domjobabort", NAME)
        libvirtd.wait_for(lambda: "success: 1" in path.read_text())
        watching.send_signal(signal.SIGINT)
    seen = path.read_text()
    assert "event 'lifecycle' for domain 'vm': Resumed" in seen
    assert "event 'job-completed' for domain 'vm'" in seen


# --- virtnbdbackup --------------------------------------------------------------------------------


@pytest.mark.needs("virtnbdbackup", "virtnbdrestore")
def test_virtnbdbackup(served: Served) -> None:
    """Full, twice incremental, restored, compared with the guest's disks of the last one."""
    target = served.directory / "backup"
    _virtnbdbackup(served, "full", target)
    for round in range(2):
        served.domain.write("vda", 7 + round, 40 + round)
        served.domain.write("sdb", 20 + round, 50 + round)
        _virtnbdbackup(served, "inc", target)
    names = served.checkpoints()
    assert names == [f"virtnbdbackup.{n}" for n in range(3)]
    restored = served.directory / "restored"
    restored.mkdir()
    _run(
        "virtnbdrestore", "-U", served.ours, "-i", str(target), "-o", str(restored), "-a", "restore"
    )
    for disk, image in (("vda", "a"), ("sdb", "b")):
        [made] = [path for path in restored.iterdir() if path.name.startswith(image)]
        now = _content(served, disk)
        assert _raw(made) == now, disk
    for name in reversed(names):
        served.virsh(served.ours, "checkpoint-delete", NAME, name)


def _virtnbdbackup(served: Served, level: str, target: pathlib.Path) -> None:
    _run(
        "virtnbdbackup", "-U", served.ours, "-d", NAME, "-l", level, "-o", str(target),
        "-f", str(served.directory / "vnb.sock"),
    )  # fmt: skip


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.lower(), done.stderr


def _content(served: Served, disk: str) -> bytes:
    """What the guest reads, by a backup of ours that is asked for by libvirt's own call."""
    xml = served.file(
        "now.xml",
        f"<domainbackup mode='pull'><server transport='unix' socket='{served.directory}/now.sock'/>"
        "</domainbackup>",
    )
    served.virsh(served.ours, "backup-begin", NAME, xml)
    try:
        return libvirtd.read(served.directory / "now.sock", disk)
    finally:
        served.virsh(served.ours, "domjobabort", NAME)


def _raw(path: pathlib.Path) -> bytes:
    raw = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(raw)], check=True)
    return raw.read_bytes()
