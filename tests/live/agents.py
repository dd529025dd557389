# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guest agents: a Linux guest that runs the real one, and one without a guest that can be told how
to behave.
"""

import contextlib
import json
import pathlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

from demo import initramfs, kernel
from tests import waiting
from tests.live import libvirtd

DISK = 16 << 20
CHANNEL = "org.qemu.guest_agent.0"

# The file system is written to and synchronised all the time, so that only one that stands still
# is clean.
_SCRIPT = """
busybox mkdir -p /mnt /var/run /run
busybox mount -t ext4 /dev/vda /mnt
while ! busybox ls /dev/vport* >/dev/null 2>&1; do busybox usleep 10000; done
qemu-ga -m virtio-serial -p /dev/vport*p1 -t /run -f /run/qga.pid &
busybox echo agent started >/dev/ttyS0
number=0
while :; do
    number=$((number + 1))
    busybox dd if=/dev/zero of=/mnt/$((number % 50)) bs=4k count=3 conv=fsync 2>/dev/null
    busybox usleep 2000
done
"""


class Boot:
    """What a guest with the agent boots from, and its disk, in DIRECTORY."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Errors: kernel.Unavailable."""
        linux = kernel.fetch(("virtio_console",))
        agent = kernel.fetch_program("qemu-guest-agent", "sbin/qemu-ga")
        files = {"/bin/qemu-ga": agent.read_bytes()}
        files.update({str(path): path.read_bytes() for path in initramfs.libraries(agent)})
        self.kernel = directory / "vmlinuz"
        self.kernel.write_bytes(linux.image.read_bytes())
        self.initrd = directory / "initrd"
        self.initrd.write_bytes(initramfs.build_for(linux, files, _SCRIPT))
        self.disk = directory / "ext4.raw"
        with self.disk.open("wb") as file:
            file.truncate(DISK)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self.disk)], check=True)
        self.console = directory / "console.log"


@contextlib.contextmanager
def domain(host: libvirtd.Host, name: str, boot: Boot) -> Iterator[libvirtd.Domain]:
    """A libvirt domain whose agent answers."""
    devices = libvirtd.disk_xml("vda", boot.disk, "raw") + (
        f"<serial type='file'><source path='{boot.console}'/></serial>"
        f"<channel type='unix'><target type='virtio' name='{CHANNEL}'/></channel>"
    )
    os_xml = (
        f"<kernel>{boot.kernel}</kernel><initrd>{boot.initrd}</initrd>"
        f"<cmdline>{kernel.COMMAND_LINE}</cmdline>"
    )
    # Without ACPI a guest of QEMU 11.1 finds no virtio device behind a PCI Express port.
    acpi = "<features><acpi/></features>"
    with host.domain(name, devices, more=acpi, os=os_xml, memory=256) as running:
        libvirtd.wait_for(lambda: "state='connected'" in running.libvirt.XMLDesc(), 90)
        yield running


def is_clean(path: pathlib.Path) -> bool:
    """Whether a file system was at rest: nothing is to be recovered, and nothing is wrong."""
    dump = ["dumpe2fs", "-h", str(path)]
    said = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
    if "needs_recovery" in said:
        return False
    check = subprocess.run(["e2fsck", "-fn", str(path)], check=False, capture_output=True)
    return check.returncode == 0


Reply = Callable[[dict[str, Any]], "bytes | None"]
"""A command -> what is sent back; None: nothing, ever."""


def returns(value: Any) -> Reply:
    return lambda _: json.dumps({"return": value}).encode() + b"\n"


def refuses(text: str) -> Reply:
    error = {"error": {"class": "GenericError", "desc": text}}
    return lambda _: json.dumps(error).encode() + b"\n"


def sync(message: dict[str, Any]) -> bytes:
    return b"\xff" + json.dumps({"return": message["arguments"]["id"]}).encode() + b"\n"


class FakeAgent:
    """An agent behind a unix socket, which serves one client at a time as QEMU's does."""

    def __init__(self, path: pathlib.Path, **replies: Reply) -> None:
        """REPLIES are to guest-fsfreeze-NAME, and to ``sync``."""
        self.path = path
        self.commands: list[str] = []
        self.said = threading.Condition()
        self._replies: dict[str, Reply] = {
            "sync": sync, "freeze": returns(2), "thaw": returns(2), **replies
        }  # fmt: skip
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def on(self, **replies: Reply) -> None:
        """Behave otherwise from now on."""
        self._replies.update(replies)

    def wait_for(self, *commands: str) -> None:
        """Wait until these commands have come, in this order, and no others."""
        with self.said:
            came = self.said.wait_for(lambda: len(self.commands) >= len(commands), waiting.DEADLINE)
            assert came, self.commands
            assert tuple(self.commands) == commands

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def __enter__(self) -> "FakeAgent":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client:
                try:
                    self._talk(client)
                except OSError:
                    continue

    def _talk(self, client: socket.socket) -> None:
        for line in client.makefile("rb"):
            message = json.loads(line.lstrip(b"\xff"))
            name = {"guest-sync-delimited": "sync"}.get(message["execute"], message["execute"])
            name = name.removeprefix("guest-fsfreeze-")
            if name != "sync":
                with self.said:
                    self.commands.append(name)
                    self.said.notify_all()
            reply = self._replies[name](message)
            if reply is not None:
                client.sendall(reply)
