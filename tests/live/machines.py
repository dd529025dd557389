# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real QEMU processes for the live tests: started, spoken to and ended by the test that asked.

A machine has two monitors: the one the code under test uses (``qmp``) and a private one
(``probe``) through which the test looks at QEMU and makes the guest write, because a QMP
monitor serves one client at a time.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from tests import waiting
from virtbackup import runtime

STATE_QUERIES = (
    "query-block",
    "query-named-block-nodes",
    "query-jobs",
    "query-block-jobs",
    "query-block-exports",
    "query-fdsets",
    "x-debug-query-block-graph",
)
VOLATILE = {"actual-size", "writeback"}
_WRITTEN = re.compile(r"^(wrote \d|aio_write failed: )", re.MULTILINE)

HALT = bytes.fromhex("fa f4 eb fd").ljust(16, b"\x90").rjust(64 << 10, b"\x90")
"""Firmware that halts the processor: a guest that does nothing at all."""

FIRMWARE = "halt.bin"
"""Its name in a machine's directory."""

BOOTING = ("-bios", "bios-256k.bin")
"""QEMU's own firmware instead, for what a guest has to boot for, or to have used its disks for."""

INTO_ROOT = (
    ("chroot", os.environ["VIRTBACKUP_QEMU_ROOT"]) if "VIRTBACKUP_QEMU_ROOT" in os.environ else ()
)
"""Another Debian's QEMU can be tested: a root directory in which /tmp and /var/tmp are this
machine's. ``./dev test --matrix`` makes them."""


@functools.cache
def version() -> tuple[int, int, int]:
    """The version of the QEMU under test, for what differs between them: (7, 2, 22)."""
    argv = [*INTO_ROOT, "qemu-system-x86_64", "--version"]
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    found = re.match(r"QEMU emulator version (\d+)\.(\d+)\.(\d+)", said)
    assert found is not None, said
    major, minor, micro = map(int, found.groups())
    return major, minor, micro


def engines() -> list[str]:
    """Those that the QEMU under test has."""
    return ["classic", "hybrid"] if version() >= (8, 0, 0) else ["classic"]


class Probe:
    """A second, independent QMP client: plain, synchronous, knows nothing of the package."""

    def __init__(self, path: pathlib.Path, deadline: float = waiting.DEADLINE) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(deadline)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        json.loads(self._file.readline())
        if "QMP" in self.reply("qmp_capabilities"):
            self.close()
            raise ConnectionResetError("greeted twice, as by a daemon that has just come up")

    @property
    def pid(self) -> int:
        """The process that answers."""
        return runtime.peer_of(self._socket)[0]

    def __call__(self, command: str, **arguments: Any) -> Any:
        reply = self.reply(command, **arguments)
        if "error" in reply:
            raise AssertionError(f"{command}: {reply['error']['desc']}")
        return reply["return"]

    def reply(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The whole reply, an error included; events met on the way are kept."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.exactly(command, names)

    def exactly(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The whole reply to ARGUMENTS as they are."""
        self.send(command, **arguments)
        return self.receive()

    def send(self, command: str, **arguments: Any) -> None:
        """Only ask; ``receive`` has the reply."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())

    def receive(self) -> dict[str, Any]:
        """The next reply; events met on the way are kept."""
        while True:
            message: dict[str, Any] = json.loads(self._file.readline())
            if "event" not in message:
                return message
            self.events.append(message)

    def peek(self) -> bytes:
        """What has come and was not received yet."""
        come, _, _ = select.select([self._socket], [], [], 0)
        return self._socket.recv(1 << 16, socket.MSG_PEEK) if come else b""

    def wait_event(self, name: str) -> dict[str, Any]:
        """The next event of that name (those already met count); socket deadline applies."""
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(index)
            message = json.loads(self._file.readline())
            if "event" in message:
                self.events.append(message)

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Machine:
    """One QEMU or qemu-storage-daemon process in a directory of its own."""

    def __init__(
        self,
        directory: pathlib.Path,
        argv: Sequence[str],
        before_exec: Callable[[], None] | None = None,
    ) -> None:
        """BEFORE_EXEC is called in the process that becomes QEMU."""
        self.directory = directory
        self.qmp = directory / "qmp.sock"
        self._probe_path = directory / "probe.sock"
        self.log = directory / "qemu.log"
        for path in (self._probe_path, self.qmp):
            path.unlink(missing_ok=True)  # of one that was killed
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["stdbuf", "-oL", *INTO_ROOT, *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=before_exec,
            )
        try:
            waiting.until(self._comes_up, process=self.process)
            waiting.until(self.qmp.is_socket, process=self.process)
        except AssertionError as failure:
            self.kill()
            said = self.log.read_text()
            raise AssertionError(f"QEMU did not come up: {failure} {said}") from None

    @property
    def uri(self) -> str:
        return f"qmp://{self.qmp}"

    def _comes_up(self) -> bool:
        """Whether the private monitor answers; its socket is there before somebody listens."""
        try:
            self.probe = Probe(self._probe_path)
        except (FileNotFoundError, ConnectionError, json.JSONDecodeError):
            return False
        return True

    def state(self) -> dict[str, Any]:
        """What QEMU says of its block layer, comparable before and after a backup."""
        state: dict[str, Any] = {}
        for command in STATE_QUERIES:
            reply = self.probe.reply(command)
            state[command] = comparable(reply.get("return", reply.get("error")))
        return state

    def io(self, device: str, command: str) -> None:
        """Make the guest's DEVICE do a qemu-io COMMAND, e.g. ``write -P 0xab 0 64k``.

        DEVICE is a scsi or ide disk's id, or a virtio-blk disk's id (its backend is meant).
        Raises AssertionError when qemu-io reports a failure.
        """
        start = self.log.stat().st_size
        if device in self._virtio():
            device = f"/machine/peripheral/{device}/virtio-backend"
        in_background = version() < (7, 2, 0) and command.startswith("write ")
        line = f'qemu-io -d {device} "{"aio_" if in_background else ""}{command}"'
        said = self.probe("human-monitor-command", command_line=line)
        if in_background and not said:
            self._wait_until_written(start)
        said += self._said(start)
        if "failed" in said or "Error" in said or "Permission" in said:
            raise AssertionError(f"qemu-io {device} {command}: {said}")

    def _wait_until_written(self, start: int, deadline: float = waiting.DEADLINE) -> None:
        """Wait for what a write in the background says when it is done.

        ``write`` itself makes an old QEMU hang, as a guest's virtio or SCSI disk does not: the
        request counts as under way until the command returns, but inside of it the main loop goes
        on, and where that deletes an export of the disk (``blk_unref``) it waits for all requests,
        for ever. 5.2.0 hung so in every fourth deletion; 7.2.22, 10.0.13 and 11.1.3 never did.
        Those disks, and NBD clients, write in the background: 5.2.0 did not hang once with them.
        ``discard``, ``read`` and ``flush`` can only be done the other way.
        """
        end = time.monotonic() + deadline
        while not _WRITTEN.search(self._said(start)):
            if self.process.poll() is not None or time.monotonic() > end:
                raise TimeoutError("a write of the guest does not end")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.001)

    def _said(self, start: int) -> str:
        """What commands wrote to the log from START on."""
        with self.log.open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").splitlines()
        # What begins with the program's name is its own: of NBD clients, say.
        return "\n".join(line for line in lines if not line.startswith("qemu-system"))

    def _virtio(self) -> set[str]:
        found = set()
        for disk in self.probe("query-block"):
            if match := re.fullmatch(
                r"/machine/peripheral/(.*)/virtio-backend", disk.get("qdev", "")
            ):
                found.add(match[1])
        return found

    def kill(self) -> None:
        """SIGKILL, at once."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.probe.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()

    def __enter__(self) -> "Machine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def opened(pid: int) -> list[str]:
    """What process PID has open, as proc(5) names it; it may close some at any moment."""
    found = []
    for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(fd.readlink()))
    return found


def comparable(value: Any) -> Any:
    """Drop what the guest changes by itself: space used, its drivers' write cache, graph ids."""
    if isinstance(value, dict):
        if set(value) == {"edges", "nodes"}:
            return _graph(value)
        return {k: comparable(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return value


def _graph(value: dict[str, Any]) -> Any:
    names = {node["id"]: f"{node['type']} {node['name']}" for node in value["nodes"]}
    edges = [(names[e["parent"]], e["name"], names[e["child"]]) for e in value["edges"]]
    return {"nodes": sorted(names.values()), "edges": sorted(edges)}


def qemu(
    directory: pathlib.Path,
    *extra: str,
    binary: str = "qemu-system-x86_64",
    before_exec: Callable[[], None] | None = None,
) -> Machine:
    """A QEMU whose guest does nothing at all, with EXTRA arguments."""
    (directory / FIRMWARE).write_bytes(HALT)
    return Machine(
        directory,
        [
            binary, "-M", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none",
            "-bios", f"{directory}/{FIRMWARE}",
            "-qmp", f"unix:{directory}/probe.sock,server=on,wait=off",
            "-qmp", f"unix:{directory}/qmp.sock,server=on,wait=off",
            *extra,
        ],
        before_exec,
    )  # fmt: skip


def storage_daemon(
    directory: pathlib.Path, *extra: str, binary: str = "qemu-storage-daemon"
) -> Machine:
    """A qemu-storage-daemon with EXTRA arguments."""
    return Machine(
        directory,
        [
            binary,
            "--chardev", f"socket,path={directory}/probe.sock,server=on,wait=off,id=p0",
            "--monitor", "chardev=p0",
            "--chardev", f"socket,path={directory}/qmp.sock,server=on,wait=off,id=m0",
            "--monitor", "chardev=m0",
            *extra,
        ],
    )  # fmt: skip


def image(
    path: pathlib.Path, size: int, fmt: str = "raw", backing: pathlib.Path | None = None
) -> pathlib.Path:
    """Make an image of SIZE bytes as Debian's qemu-img does."""
    if backing:
        base = ["-b", str(backing), "-F", "qcow2"]
        _create(path, size, fmt, *base)
    elif fmt == "raw":
        with path.open("wb") as file:
            file.truncate(size)
    else:
        path.write_bytes(_empty_image(size, fmt))
    return path


@functools.cache
def _empty_image(size: int, fmt: str) -> bytes:
    """What qemu-img makes, the same for many tests."""
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "image"
        _create(path, size, fmt)
        return path.read_bytes()


def _create(path: pathlib.Path, size: int, fmt: str, *options: str) -> None:
    argv = ["qemu-img", "create", "-q", "-f", fmt, *options, str(path), str(size)]
    subprocess.run(argv, check=True)


def contents(path: pathlib.Path, fmt: str) -> bytes:
    """The guest-visible bytes of an image that nobody writes to."""
    with tempfile.TemporaryDirectory() as name:
        raw = pathlib.Path(name) / "raw"
        argv = ["qemu-img", "convert", "-U", "-f", fmt, "-O", "raw", str(path), str(raw)]
        subprocess.run(argv, check=True)
        return raw.read_bytes()


def on_two_disks(machine: Machine) -> dict[str, bytes]:
    """What the guest of ``two_disks`` has on them at this moment."""
    for disk in ("vda", "sdb"):
        machine.io(disk, "flush")
    return {
        "vda": contents(machine.directory / "a.qcow2", "qcow2"),
        "sdb": contents(machine.directory / "b.raw", "raw"),
    }


@contextlib.contextmanager
def two_disks(directory: pathlib.Path, *extra: str, size: int = 64 << 20) -> Iterator[Machine]:
    """A running QEMU with vda (qcow2, virtio-blk) and sdb (raw, virtio-scsi)."""
    image(directory / "a.qcow2", size, "qcow2")
    image(directory / "b.raw", size)
    with qemu(directory, *two_disks_of(directory), *extra) as machine:
        yield machine


def two_disks_of(directory: pathlib.Path) -> tuple[str, ...]:
    """The arguments for the images vda and sdb in DIRECTORY."""
    return (
        "-blockdev", f"qcow2,node-name=A,file.driver=file,file.filename={directory}/a.qcow2",
        "-device", "virtio-blk,drive=A,id=vda",
        "-device", "virtio-scsi,id=scsi0",
        "-blockdev", f"raw,node-name=B,file.driver=file,file.filename={directory}/b.raw",
        "-device", "scsi-hd,drive=B,id=sdb",
    )  # fmt: skip
