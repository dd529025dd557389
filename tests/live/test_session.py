# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user's own libvirt, qemu:///session: daemon, QEMU and backup are all that user's."""

import dataclasses
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests.live import libvirtd, machines
from tests.live.libvirtd import disk_xml, image, pattern

pytestmark = [
    pytest.mark.needs("libvirtd", "virsh", "qemu-system-x86_64", "nbdcopy"),
    pytest.mark.may_skip,  # where no other user may read what is to be tested
]

USER = "nobody"


@dataclasses.dataclass(frozen=True)
class Session:
    """A user who has a directory."""

    directory: pathlib.Path

    @property
    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name == "PATH"}
        return {
            **inherited,
            "HOME": str(self.directory),
            "XDG_RUNTIME_DIR": str(self.directory / "run"),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, *argv: str) -> "subprocess.CompletedProcess[str]":
        """As the user."""
        return subprocess.run(
            argv, user=USER, group=pwd.getpwnam(USER).pw_gid, extra_groups=[], env=self.environment,
            cwd=self.directory, check=False, capture_output=True, text=True,
        )  # fmt: skip

    def virsh(self, *words: str) -> str:
        done = self.run("virsh", "-q", "-c", "qemu:///session", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def shell(self, *words: str) -> "subprocess.CompletedProcess[str]":
        module = "virtbackup.tools.virsh_backup"
        return self.run(sys.executable, "-m", module, "-c", "qemu:///session", *words)


@pytest.fixture
def session() -> Iterator[Session]:
    if os.geteuid() != 0:
        pytest.skip("another user's session wants root")
    with tempfile.TemporaryDirectory(prefix="vb-session-", dir="/var/tmp") as name:
        one = Session(pathlib.Path(name))
        settings = one.directory / ".config" / "libvirt"
        for path in (one.directory, one.directory / "run", settings.parent, settings):
            path.mkdir(exist_ok=True)
            path.chmod(0o700)
            shutil.chown(path, USER)
        # No virtlogd, which would outlive all the rest by half a minute.
        (settings / "qemu.conf").write_text('stdio_handler = "file"\n')
        try:
            done = one.run(sys.executable, "-c", "import virtbackup, libvirt_qemu, lxml, nbd")
        except PermissionError as error:
            pytest.skip(f"user '{USER}' may not run what is to be tested: {error}")
        if done.returncode != 0:
            pytest.skip(f"user '{USER}' may not read what is to be tested: {done.stderr}")
        parent = subprocess.Popen(
            [sys.executable, "-c", libvirtd.PARENT, "libvirtd"],
            user=USER, group=pwd.getpwnam(USER).pw_gid, extra_groups=[],
            env=one.environment, cwd=name, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert parent.stdout is not None
        daemon = int(parent.stdout.readline())
        try:
            sockets = one.directory / "run" / "libvirt"
            libvirtd.wait_for(lambda: (sockets / "libvirt-sock").is_socket())
            yield one
            for domain in one.virsh("list", "--name").split():
                one.virsh("destroy", domain)
        finally:
            os.kill(daemon, signal.SIGTERM)
            parent.communicate(timeout=libvirtd.DEADLINE)


def test_backups_of_a_users_own_domain(session: Session) -> None:
    own = session.directory
    xml = own / "domain.xml"
    xml.write_text(libvirtd.domain_xml("mine", disk_xml("vda", image(own / "a.qcow2", 1))))
    shutil.chown(own / "a.qcow2", USER)
    session.virsh("create", str(xml))

    for number in (1, 2):
        done = session.shell("backup-pull", "mine", str(own / "out"), "--branch", "b", "--auto")
        assert (done.returncode, done.stderr) == (0, "")
        made = own / "out" / f"vda.{number:04}.qcow2"
        assert machines.contents(made, "qcow2") == pattern(1)

    before = session.virsh("dumpxml", "mine")
    document = own / "backup.xml"
    socket = own / "nbd.sock"
    document.write_text(
        f'<domainbackup><address type="unix" path="{socket}"/><disks><disk name="vda">'
        f'<source file="{own}/scratch"/></disk></disks></domainbackup>'
    )
    assert session.shell("backup-start", "mine", str(document)).returncode == 0
    assert libvirtd.read(socket, "vda") == pattern(1)
    assert session.shell("backup-stop", "mine").returncode == 0
    assert session.virsh("dumpxml", "mine") == before

    assert session.shell("backup-start", "mine", str(document)).returncode == 0
    session.virsh("destroy", "mine")
    stopped = session.shell("backup-stop", "mine")
    assert stopped.returncode == 1
    assert "disk 'vda': the domain is gone" in stopped.stderr
    assert not socket.exists()
    assert not (own / "scratch").exists()
    assert not list((own / "run" / "virtbackup").glob("*.json"))
