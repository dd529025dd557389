# SPDX-License-Identifier: LGPL-2.1-or-later
"""That the shell answers as virsh does, on one libvirt: what is printed, and whether it failed."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator

import libvirt
import pytest

from tests.live import libvirtd
from tests.live.libvirtd import disk_xml, image
from virtbackup.tools import virsh_backup

pytestmark = pytest.mark.needs("libvirtd", "virsh", "qemu-system-x86_64", "unshare")

OFF = """
<domain type='qemu'>
  <name>Bravo</name>
  <title>Of no use, "yet"</title>
  <memory unit='KiB'>65536</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='/none'/>
      <target dev='vdz' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""

SNAPSHOT = """
<domainsnapshot>
  <name>then</name>
  <creationTime>1</creationTime>
  <state>shutoff</state>
  <disks><disk name='vdz' snapshot='internal'/></disks>
  {domain}
</domainsnapshot>
"""

SAME = (
    "list", "list --all", "list --inactive", "list --title", "list --all --title",
    "list --all --name", "list --all --uuid", "list --all --id", "list --inactive --id",
    "list --all --id --name", "list --persistent", "list --all --persistent", "list --transient",
    "list --all --transient", "list --persistent --transient", "list --all --autostart",
    "list --all --no-autostart", "list --autostart", "list --all --with-managed-save",
    "list --all --with-snapshot", "list --without-snapshot",
    "list --with-snapshot --without-snapshot", "list --with-checkpoint",
    "list --without-checkpoint", "list --all --without-managed-save",
    "list --all --managed-save",
    "list --all --managed-save --title", "list --state-running", "list --state-shutoff",
    "list --state-paused", "list --state-other", "list --state-running --inactive",
    "list --state-shutoff --title", "list --table", "list --table --name", "list more",
    "list --nope", "dominfo alpha", "dominfo Bravo", "dominfo charlie", "dominfo nope", "dominfo",
    "dominfo alpha more", "domstate alpha", "domstate Bravo --reason", "domstate charlie --reason",
    "domid alpha", "domid Bravo", "domname 1", "domuuid alpha", "domuuid nope",
    "domblklist alpha", "domblklist alpha --details", "domblklist Bravo --inactive",
    "domblklist alpha --inactive --details", "dumpxml alpha", "dumpxml Bravo --inactive",
    "dumpxml alpha --inactive", "dumpxml charlie --inactive --security-info",
    "dumpxml alpha --migratable", "dumpxml alpha --xpath //disk/target",
    "dumpxml alpha --xpath //disk/@type", "dumpxml alpha --xpath //nope",
    "dumpxml alpha --xpath //target --wrap", "dumpxml alpha --update-cpu --xpath //memory/text()",
    "uri", "hostname", "echo a b", "echo --shell 'a b' c", "echo --xml '<&>'",
    "echo --split a,b,,c", "echo --split --xml a", "echo a; echo b", "echo a # b", "echo \"a",
    "pwd", "nope", "help nope", "quit 1", "exit",
)  # fmt: skip
"""Of what both print the same."""


@pytest.fixture(scope="module")
def three(libvirt_host: libvirtd.Host) -> Iterator[libvirtd.Host]:
    """A transient domain that runs, a persistent one that does not, and one that is saved."""
    host = libvirt_host
    place = host.path("like-virsh")
    place.mkdir()
    place.chmod(0o755)
    vda, sdb = (image(place / f"{name}.qcow2", number) for number, name in enumerate("ab"))
    with host.domain("alpha", disk_xml("vda", vda)):
        off = host.connection.defineXML(OFF)
        with host.domain("charlie", disk_xml("sdb", sdb), persistent=True):
            saved = host.connection.lookupByName("charlie")
            saved.setAutostart(1)
            snapshot = SNAPSHOT.format(domain=off.XMLDesc())
            off.snapshotCreateXML(snapshot, libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)
            saved.managedSave()
            yield host
            saved.managedSaveRemove()
        off.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)


Told = tuple[bool, str, list[str]]
"""Whether it was done, what was printed, and the errors but for the hint behind them."""


def _told(status: int, out: str, err: str) -> Told:
    errors = [one for one in err.splitlines() if one.startswith("error: ")]
    return status == 0, _alike(out), errors


def _alike(text: str) -> str:
    """TEXT without the spaces and empty lines that virsh has at its end, and the seconds that pass
    between two questions."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"(?<=CPU time:       )[0-9.]+s", "0s", lines).rstrip("\n")


def _theirs(host: libvirtd.Host, line: str) -> Told:
    argv = ["virsh", "-c", host.daemon.uri, line]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(argv, check=False, capture_output=True, text=True, env=environment)
    return _told(done.returncode, done.stdout, done.stderr)


Ask = Callable[[str], Told]


@pytest.fixture
def ours(three: libvirtd.Host, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Our answer to a line."""

    def ask(line: str) -> Told:
        status = virsh_backup.main(["-c", three.daemon.uri, line])
        return _told(status, *capsys.readouterr())

    return ask


@pytest.mark.parametrize("line", SAME)
def test_the_same_is_printed(three: libvirtd.Host, ours: Ask, line: str) -> None:
    assert ours(line) == _theirs(three, line)


def test_a_document_as_a_whole(three: libvirtd.Host, ours: Ask) -> None:
    """virsh puts an XML declaration in front of it."""
    line = "dumpxml alpha --xpath /"
    _, theirs, _ = _theirs(three, line)
    assert ours(line) == (True, theirs.partition("\n")[2], [])


def test_versions(three: libvirtd.Host, ours: Ask) -> None:
    """We have more than one library to tell of; what runs the domains is the same."""
    _, theirs, _ = _theirs(three, "version --daemon")
    assert ours("version --daemon")[1].splitlines()[-2:] == theirs.splitlines()[-2:]
