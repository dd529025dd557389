# SPDX-License-Identifier: LGPL-2.1-or-later
"""Record what virsh and a real libvirtd say to each other.

    python -m tests.record_rpc        writes tests/rpcdata/virsh-*.jsonl anew

A file holds one scene, a line one message: which connection it was on, who sent it, its bytes in
hex, and how many descriptors came with it. The host's name and paths are written over. Nothing
here knows more of the RPC than where a message ends, so that the tests of our code have something
to be held against.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

from tests.live import libvirtd

HERE = pathlib.Path(__file__).parent / "rpcdata"
DEADLINE = 60.0
WITH_FDS = (4, 5)
"""The types of messages that descriptors come with."""


@dataclasses.dataclass(frozen=True)
class Said:
    """One message as it was on the wire, without the bytes of its descriptors."""

    connection: int
    by_client: bool
    data: bytes
    fds: int


class Proxy:
    """A unix socket that passes on to another, and what was said on all connections so far."""

    def __init__(self, path: pathlib.Path, server: pathlib.Path) -> None:
        self.path = path
        self.said: list[Said] = []
        self._server = server
        self._connections = 0
        self._lock = threading.Lock()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self._server))
            number, self._connections = self._connections, self._connections + 1
            for ends, by_client in (((client, server), True), ((server, client), False)):
                threading.Thread(
                    target=self._pass_on, args=(*ends, number, by_client), daemon=True
                ).start()

    def _pass_on(
        self, source: socket.socket, target: socket.socket, connection: int, by_client: bool
    ) -> None:
        buffer = b""
        with contextlib.suppress(OSError):
            while True:
                data, fds, _, _ = socket.recv_fds(source, 1 << 16, 64)
                if not data:
                    break
                buffer += data
                with self._lock:
                    buffer = self._take(buffer, connection, by_client)
                # A descriptor comes with the last byte of what was read, and goes with it.
                target.sendall(data[:-1])
                socket.send_fds(target, [data[-1:]], fds)
                for fd in fds:
                    os.close(fd)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _take(self, buffer: bytes, connection: int, by_client: bool) -> bytes:
        """Note all whole messages in BUFFER; what remains of it."""
        while len(buffer) >= 32 or (len(buffer) == 28 and _word(buffer, 0) == 28):
            size = _word(buffer, 0)
            fds = _word(buffer, 28) if _word(buffer, 16) in WITH_FDS else 0
            if len(buffer) < size + fds:
                break
            self.said.append(Said(connection, by_client, buffer[:size], fds))
            buffer = buffer[size + fds :]
        return buffer


def _word(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")


@dataclasses.dataclass
class Scene:
    """A libvirtd, and the proxy before it."""

    host: libvirtd.Host
    proxy: Proxy
    driver: str

    def virsh(self, *argv: str, check: bool = True, pass_fds: tuple[int, ...] = ()) -> str:
        """What a command prints."""
        return self._run([*self._virsh, *argv], check, pass_fds)

    @property
    def _virsh(self) -> list[str]:
        return ["virsh", "-c", f"{self.driver}?socket={self.proxy.path}"]

    def _run(self, argv: list[str], check: bool, pass_fds: tuple[int, ...]) -> str:
        done = subprocess.run(
            argv, check=False, capture_output=True, text=True, timeout=DEADLINE, pass_fds=pass_fds
        )
        assert (done.returncode == 0) == check, (argv, done.stdout, done.stderr)
        return done.stdout

    @contextlib.contextmanager
    def events(self) -> Iterator[None]:
        """All events of what is done meanwhile, until a domain resumes."""
        argv = [*self._virsh, "event", "--all", "--loop", "--timeout", str(int(DEADLINE))]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as listening:
            registered = len(self.proxy.said)
            libvirtd.wait_for(lambda: len(self.proxy.said) >= registered + 2 * 27)
            yield
            assert listening.stdout is not None
            while "Resumed" not in listening.stdout.readline():
                pass
            listening.terminate()


def of_the_test_driver(scene: Scene) -> None:
    """What needs no QEMU; every connection has a test driver of its own."""
    for command in ("list --all", "dominfo test", "domstate test --reason", "domblklist test",
                    "dumpxml test", "dominfo 1", "uri", "version", "nodeinfo",
                    "hostname"):  # fmt: skip
        scene.virsh(*command.split())
    scene.virsh(
        "checkpoint-create-as test one; checkpoint-create-as test two; checkpoint-list test;"
        "checkpoint-list test --tree; checkpoint-info test two; checkpoint-parent test two;"
        "checkpoint-dumpxml test one; checkpoint-delete test one; suspend test; resume test"
    )
    for command in ("backup-begin test", "domstate nobody", "domjobinfo test"):
        scene.virsh(*command.split(), check=False)


def of_a_real_domain(scene: Scene, directory: pathlib.Path) -> None:
    """A backup with a checkpoint, its end, and all events of them."""
    backup, checkpoint = directory / "backup.xml", directory / "checkpoint.xml"
    backup.write_text(
        "<domainbackup mode='pull'>"
        f"<server transport='unix' socket='{directory}/nbd'/></domainbackup>"
    )
    checkpoint.write_text("<domaincheckpoint><name>first</name></domaincheckpoint>")
    for command in ("list --all", "dominfo vm", "domstate vm --reason", "domblklist vm --details",
                    "dumpxml vm", "domblkinfo vm vda", "domblkstat vm vda", "domstats vm",
                    "domjobinfo vm", "blockjob vm vda --info"):  # fmt: skip
        scene.virsh(*command.split())
    with scene.events():
        scene.virsh("backup-begin", "vm", str(backup), str(checkpoint))
        for command in ("backup-dumpxml vm", "domjobinfo vm", "checkpoint-list vm",
                        "checkpoint-dumpxml vm first --size", "checkpoint-info vm first",
                        "domjobabort vm", "domjobinfo vm --completed", "suspend vm",
                        "resume vm"):  # fmt: skip
            scene.virsh(*command.split())
    scene.virsh("checkpoint-delete", "vm", "first")
    for command in ("backup-dumpxml vm", "checkpoint-dumpxml vm first", "domfsfreeze vm"):
        scene.virsh(*command.split(), check=False)
    scene.virsh("qemu-monitor-command", "vm", '{"execute": "query-name"}')
    with (directory / "passed").open("w") as passed:
        argv = ("vm", '{"execute": "getfd", "arguments": {"fdname": "x"}}', "--pass-fds")
        fd = passed.fileno()
        scene.virsh("qemu-monitor-command", *argv, str(fd), pass_fds=(fd,))


@contextlib.contextmanager
def recorded(host: libvirtd.Host, driver: str, directory: pathlib.Path) -> Iterator[Scene]:
    """A scene to be played by virsh on URIs of DRIVER."""
    proxy = Proxy(directory / "proxy", host.daemon.socket)
    try:
        yield Scene(host, proxy, driver)
    finally:
        proxy.close()


def play(host: libvirtd.Host, directory: pathlib.Path) -> dict[str, list[Said]]:
    """All scenes; what was said in each."""
    said = {}
    for name in ("test", "qemu"):
        place = directory / name
        place.mkdir()
        place.chmod(0o755)
        with recorded(host, DRIVERS[name], place) as scene:
            if name == "test":
                of_the_test_driver(scene)
            else:
                disk = libvirtd.disk_xml("vda", libvirtd.image(place / "vda.qcow2", 1))
                with host.domain("vm", disk, persistent=True):
                    of_a_real_domain(scene, place)
            said[name] = scene.proxy.said
    return said


DRIVERS = {"test": "test+unix:///default", "qemu": "qemu:///system"}


def load(path: pathlib.Path) -> list[Said]:
    """A recorded scene."""
    lines = map(json.loads, path.read_text().splitlines())
    return [
        Said(line["connection"], line["from"] == "client", bytes.fromhex(line["data"]), line["fds"])
        for line in lines
    ]


def save(path: pathlib.Path, said: list[Said], hidden: list[str]) -> None:
    """Write a scene, HIDDEN words written over; short ones tell nothing."""
    lines = []
    for one in said:
        data = one.data
        for word in filter(lambda word: len(word) > 3, hidden):
            data = data.replace(word.encode(), b"x" * len(word))
        line = {
            "connection": one.connection,
            "from": "client" if one.by_client else "server",
            "fds": one.fds,
            "data": data.hex(),
        }
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


def main() -> None:
    HERE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="recorded-") as name:
        directory = pathlib.Path(name)
        directory.chmod(0o755)
        place = directory / "libvirtd"
        place.mkdir()
        with libvirtd.host(place, directory) as host:
            scenes = play(host, directory)
            version = host.connection.getLibVersion()
        shown = f"{version // 1000000}.{version // 1000 % 1000}.{version % 1000}"
        hidden = [socket.getfqdn(), socket.gethostname(), name.removeprefix("/tmp/recorded-")]
        for scene, said in scenes.items():
            save(HERE / f"virsh-{scene}-{shown}.jsonl", said, hidden)
            print(f"{scene}: {len(said)} messages", file=sys.stderr)


if __name__ == "__main__":
    main()
