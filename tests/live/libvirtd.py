# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirtd of the tests' own, without systemd, and domains on it.

It runs in a mount namespace in which everything that a libvirtd shares with another one is hidden
by something empty: the system's is neither used nor seen, and the test's own process is left where
it is. Only the daemon's socket is where both see it. Mounts that a test makes are seen inside.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import libvirt
import libvirt_qemu
from lxml import etree

from tests import waiting
from tests.live import machines, nbdclient
from virtbackup.qemu import lifecycle, passthrough

HIDDEN = ("/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
DEADLINE = waiting.DEADLINE
wait_for = waiting.until
read = nbdclient.read
MIB = 1 << 20

# Everything below the directory in $1; the daemon takes the shell's place.
_INSIDE = """
for path in {hidden}; do mkdir -p "$path"; done
mount --bind "$1/run" /run/libvirt
mount --bind "$1/lib" /var/lib/libvirt
mount --bind "$1/cache" /var/cache/libvirt
mount --bind "$1/log" /var/log/libvirt
mount --bind "$1/etc" /etc/libvirt
hostname "$2"
exec libvirtd -p "$1/libvirtd.pid"
"""

_QEMU_CONF = """
user = "root"
group = "root"
security_driver = "none"
security_default_confined = 0
cgroup_controllers = []
stdio_handler = "file"
remember_owner = 0
namespaces = ["mount"]
"""
_LIBVIRTD_CONF = """
unix_sock_dir = "{directory}/sock"
auth_unix_ro = "none"
auth_unix_rw = "none"
listen_tls = 0
listen_tcp = 0
host_uuid = "{uuid}"
log_outputs = "{level}:file:{directory}/libvirtd.log"
log_filters = "3:remote 4:event 3:util 3:rpc"
"""


# The parent of the daemon, and of the QEMUs that it leaves to themselves: libvirt waits until a
# QEMU that has ended is gone, and who takes them away else, in a container, may take its time.
PARENT = """
import ctypes, os, sys
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
print(os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), flush=True)
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"""


class Libvirtd:
    """One daemon in DIRECTORY, which all users may enter."""

    def __init__(self, directory: pathlib.Path, like: "Libvirtd | None" = None) -> None:
        """As if on another host than LIKE, from which it has what that found out about QEMU."""
        self.directory = directory
        self._hostname = "elsewhere" if like else None
        directory.chmod(0o755)
        for name in ("run", "lib", "cache", "log", "etc", "sock"):
            (directory / name).mkdir()
        if like is not None:
            shutil.copytree(like.directory / "cache", directory / "cache", dirs_exist_ok=True)
        (directory / "etc" / "qemu.conf").write_text(_QEMU_CONF)
        conf = _LIBVIRTD_CONF.format(directory=directory, level=3, uuid=uuid.uuid4())
        (directory / "etc" / "libvirtd.conf").write_text(conf)
        self.log = directory / "libvirtd.log"
        self._parents: list[subprocess.Popen[bytes]] = []
        self._daemon: int | None = None
        try:
            self.start()
        except BaseException:
            if self.runs():
                self.kill()
            raise

    @property
    def socket(self) -> pathlib.Path:
        return self.directory / "sock" / "libvirt-sock"

    @property
    def uri(self) -> str:
        return f"qemu:///system?socket={self.socket}"

    @property
    def pid(self) -> int:
        """The daemon's process."""
        assert self._daemon is not None
        return self._daemon

    def start(self) -> None:
        """Start the daemon; it takes up the domains that are running."""
        self.socket.unlink(missing_ok=True)
        script = _INSIDE.format(hidden=" ".join(HIDDEN))
        with (self.directory / "output").open("ab") as output:
            parent = subprocess.Popen(
                [sys.executable, "-c", PARENT,
                 "unshare", "--mount", "--uts", "--propagation", "slave", "sh", "-ec", script,
                 "sh", str(self.directory), self._hostname or socket.gethostname()],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        assert parent.stdout is not None
        self._daemon = int(parent.stdout.readline())
        self._parents.append(parent)
        wait_for(self._answers)

    def _answers(self) -> bool:
        assert self.runs(), (self.directory / "output").read_text()
        if not self.socket.is_socket():
            return False
        try:
            libvirt.openReadOnly(self.uri).close()
        except libvirt.libvirtError:
            return False
        return True

    def runs(self) -> bool:
        return self._daemon is not None and pathlib.Path(f"/proc/{self._daemon}").exists()

    def kill(self) -> None:
        """SIGKILL; its domains run on."""
        self._end(signal.SIGKILL)

    def _end(self, by: signal.Signals) -> None:
        assert self._daemon is not None
        os.kill(self._daemon, by)
        wait_for(lambda: not self.runs())
        self._daemon = None

    def close(self) -> None:
        """End all domains and the daemon."""
        if not self.runs():
            self.start()
        with contextlib.closing(libvirt.open(self.uri)) as connection:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                domain.destroy()
        self._end(signal.SIGTERM)
        for parent in self._parents:
            parent.communicate(timeout=DEADLINE)


@contextlib.contextmanager
def running(directory: pathlib.Path, like: Libvirtd | None = None) -> Iterator[Libvirtd]:
    """A daemon for as long as this lasts."""
    daemon = Libvirtd(directory, like)
    try:
        yield daemon
    finally:
        daemon.close()


# --- domains on it --------------------------------------------------------------------------------

_ATTEMPTS = 10
SIZE = 4 << 20
CLUSTER = 64 << 10

_DOMAIN = """
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>{os}</os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='scsi' model='virtio-scsi'/>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {devices}
  </devices>
  {more}
</domain>"""


def domain_xml(name: str, devices: str, more: str = "", os: str = "", memory: int = 48) -> str:
    """A small domain."""
    return _DOMAIN.format(name=name, devices=devices, more=more, os=os, memory=memory)


def disk_xml(
    target: str,
    path: pathlib.Path | str,
    fmt: str = "qcow2",
    inside: str = "",
    attributes: str = "",
    driver: str = "",
) -> str:
    """A disk of a file; INSIDE goes into it, ATTRIBUTES to it and DRIVER to its driver."""
    bus = {"v": "virtio", "s": "scsi", "h": "sata"}[target[0]]
    return (
        f"<disk type='file' device='disk' {attributes}>"
        f"<driver name='qemu' type='{fmt}' {driver}/>"
        f"<source file='{path}'/><target dev='{target}' bus='{bus}'/>{inside}</disk>"
    )


def pattern(seed: int, size: int = SIZE) -> bytes:
    """What an image holds at first: every cluster its own byte, none of them zero."""
    return b"".join(bytes([1 + (seed * 37 + n) % 251]) * CLUSTER for n in range(size // CLUSTER))


def image(path: pathlib.Path, seed: int, fmt: str = "qcow2", *options: str) -> pathlib.Path:
    """An image with its pattern; OPTIONS go to qemu-img convert."""
    raw = path.with_suffix(".pattern")
    raw.write_bytes(pattern(seed))
    argv = ["qemu-img", "convert", "-f", "raw", "-O", fmt, *options, str(raw), str(path)]
    for _ in range(_ATTEMPTS):
        done = subprocess.run(argv, check=False, capture_output=True)
        # qemu-img measures how fast it encrypts, which does not always work on a busy machine.
        if b"Unable to get accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    raw.unlink()
    return path


class Domain:
    """A running domain, and a way to its QEMU that knows nothing of the package."""

    def __init__(self, domain: "libvirt.virDomain") -> None:
        self.libvirt = domain

    def monitor(self, command: str, **arguments: Any) -> Any:
        """What QEMU replies. Raises AssertionError for an error."""
        reply = self.reply(command, **arguments)
        assert "error" not in reply, reply
        return reply["return"]

    def reply(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The whole reply, an error included."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": names})
        reply: dict[str, Any] = json.loads(libvirt_qemu.qemuMonitorCommand(self.libvirt, line, 0))
        return reply

    def write(self, target: str, cluster: int, byte: int = 255) -> None:
        """Let the guest write a cluster of a disk."""
        self.io(target, f"write -P {byte} {cluster * CLUSTER} {CLUSTER}")

    def io(self, target: str, command: str) -> None:
        """Let the guest's disk do a qemu-io command."""
        drive = next(d for d in self.monitor("query-block") if self.alias(target) in d["qdev"])
        said = libvirt_qemu.qemuMonitorCommand(
            self.libvirt, f'qemu-io -d {drive["qdev"]} "{command}"', 1
        )
        assert "rror" not in said, said

    def alias(self, target: str) -> str:
        """What libvirt calls a disk in QEMU."""
        for disk in etree.fromstring(self.libvirt.XMLDesc()).iterfind("devices/disk"):
            if disk.find(f"target[@dev='{target}']") is not None:
                alias = disk.find("alias")
                assert alias is not None
                return alias.get("name", "")
        raise AssertionError(f"no disk {target}")

    def state(self) -> dict[str, Any]:
        """What QEMU and libvirt know of the domain's disks, comparable before and after."""
        state: dict[str, Any] = {}
        for command in machines.STATE_QUERIES:
            state[command] = machines.comparable(self.monitor(command))
        for node in state["query-named-block-nodes"]:
            if node["drv"] == "file":
                del node["image"]["virtual-size"]  # an image grows as the guest writes
        return {**state, "xml": self.libvirt.XMLDesc()}


@dataclasses.dataclass
class Host:
    """A daemon, a connection to it and a place for images."""

    daemon: Libvirtd
    connection: "libvirt.virConnect"
    directory: pathlib.Path
    """QEMU's users may enter it."""

    def path(self, name: str) -> pathlib.Path:
        return self.directory / name

    def revive(self) -> None:
        """Start a daemon that has died."""
        if not self.daemon.runs():
            self.daemon.start()
            self.connection = libvirt.open(self.daemon.uri)

    def again(self, name: str) -> Domain:
        """The domain, by a new connection: the daemon was started again."""
        self.connection = libvirt.open(self.daemon.uri)
        return Domain(self.connection.lookupByName(name))

    @contextlib.contextmanager
    def domain(
        self, name: str, devices: str, persistent: bool = False, **more: Any
    ) -> Iterator[Domain]:
        """A running domain; gone afterwards. MORE goes into its XML; without anything to boot, its
        guest does nothing at all."""
        firmware = self.daemon.directory / "halt.bin"
        firmware.write_bytes(machines.HALT)
        more.setdefault("os", f"<loader type='rom'>{firmware}</loader>")
        xml = domain_xml(name, devices, **more)
        if persistent:
            found = self.connection.defineXML(xml)
            found.create()
        else:
            found = self.connection.createXML(xml)
        try:
            yield Domain(found)
        finally:
            # By the connection of now: the daemon may have been restarted.
            with contextlib.suppress(libvirt.libvirtError):
                self.connection.lookupByName(name).destroy()
            if persistent:
                _undefine(self.connection.lookupByName(name))


@contextlib.contextmanager
def host(directory: pathlib.Path, images: pathlib.Path) -> Iterator[Host]:
    """A daemon in DIRECTORY and a connection to it."""
    libvirt.registerErrorHandler(lambda *_: None, None)  # it would print what is raised
    with running(directory) as daemon, contextlib.closing(libvirt.open(daemon.uri)) as connection:
        yield Host(daemon, connection, images)


def _undefine(domain: "libvirt.virDomain") -> None:
    flags = (
        libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    )
    with contextlib.suppress(libvirt.libvirtError):
        domain.undefineFlags(flags)


def kill(domain: "libvirt.virDomain") -> None:
    """Its QEMU, by SIGKILL."""
    pid = passthrough.pid_of(domain)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def _quit(domain: "libvirt.virDomain") -> None:
    """What libvirt sees of a guest that shuts down."""
    with contextlib.suppress(libvirt.libvirtError):  # it may be gone before it answers
        Domain(domain).monitor("quit")


ENDS: dict[str, tuple[Callable[["libvirt.virDomain"], object], str]] = {
    "destroyed": (lambda domain: domain.destroy(), "the domain was destroyed"),
    "killed": (kill, "QEMU crashed or was killed"),
    "shut down": (_quit, "the guest shut down"),
}
"""How a domain may end: what does it, and why that was, as a backup tells it."""


def end_of_a_transient_domain() -> str:
    """Why a transient domain that is destroyed has ended, as a backup of this process has it: that
    is heard where there is an event loop, which a test may have left behind."""
    return "the domain was destroyed" if lifecycle.has_event_loop() else lifecycle.UNKNOWN
