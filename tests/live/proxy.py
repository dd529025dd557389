# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QMP proxy that spoils one command: real QEMU behind it, real faults before it.

It stands on a unix socket of its own and passes lines and descriptors on. The command to be spoilt
is chosen by its number, counted from 0 over all connections, the handshake not counted.
"""

import array
import contextlib
import json
import pathlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

from tests.live import machines

Fault = Literal[
    "refuse", "lose-reply", "hang-up-before", "hang-up-after", "kill-before", "kill-after",
    "kill-qemu-before", "kill-qemu-after",
]  # fmt: skip
"""refuse: QEMU never sees the command, the client gets an error. lose-reply: QEMU does it, the
client gets an error all the same. hang-up-*: the connection ends before or after QEMU did it.
kill-*: so does the client's process, by SIGKILL. kill-qemu-*: QEMU is killed, before it sees the
command, or when it has done it and its reply is on the way; then nobody listens any more."""

_WITHHELD = 10**6
"""Added to the id of a command whose reply the client does not get."""


class Proxy:
    """Serves clients one after the other, as a QMP socket does."""

    def __init__(self, directory: pathlib.Path, qmp: pathlib.Path, start: bool = True) -> None:
        """Without START it is for QEMU's process to call ``listen``, so that its clients see that
        process at the other end as they would without a proxy; ``start`` comes then."""
        self.path = directory / "proxy.sock"
        self._qmp = qmp
        self.commands: list[str] = []
        self.spoil: tuple[int, Fault] | None = None
        self.spoilt: str | None = None
        self.kill_client: Callable[[], None] = lambda: None
        self.kill_qemu: Callable[[], None] = lambda: None
        self.path.unlink(missing_ok=True)  # of one whose QEMU was killed
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        if start:
            self.listen()
            self.start()

    def listen(self) -> None:
        """Let clients connect; whose process calls this is the one that they see."""
        self._listener.listen()

    def start(self) -> None:
        """Serve them."""
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"qmp://{self.path}"

    def arm(self, number: int, fault: Fault) -> None:
        """Spoil command NUMBER from now on."""
        self.commands.clear()
        self.spoilt = None
        self.spoil = (number, fault)

    def disarm(self) -> None:
        self.commands.clear()
        self.spoil = None

    def close(self) -> None:
        _hang_up(self._listener)
        self._thread.join()
        self._listener.close()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, socket.socket(socket.AF_UNIX) as qemu:
                qemu.connect(str(self._qmp))
                down = threading.Thread(target=self._down, args=(qemu, client), daemon=True)
                down.start()
                self._up(client, qemu)
                _hang_up(qemu)
                down.join()

    def _up(self, client: socket.socket, qemu: socket.socket) -> None:
        """From the client to QEMU, until the client goes or a fault hangs up."""
        pending = b""
        while True:
            data, fds = receive(client)
            if not data:
                return
            pending += data
            while b"\n" in pending:
                line, pending = pending.split(b"\n", 1)
                if not self._pass_on(json.loads(line), line, fds, client, qemu):
                    return
                fds = []

    def _pass_on(
        self,
        command: dict[str, Any],
        line: bytes,
        fds: list[int],
        client: socket.socket,
        qemu: socket.socket,
    ) -> bool:
        fault = self._fault(command["execute"])
        if fault == "kill-qemu-before":
            self._end_qemu()
            _hang_up(client)
            return False
        if fault == "kill-qemu-after":
            # The other direction kills QEMU when the reply comes.
            send(qemu, json.dumps({**command, "id": _WITHHELD + command["id"]}).encode(), fds)
            return True
        if fault is not None and fault.startswith("kill"):
            self.kill_client()
        if fault in ("hang-up-before", "kill-before"):
            _hang_up(client)
            return False
        if fault == "refuse":
            _refuse(client, command)
            return True
        if fault == "lose-reply":
            # QEMU answers with an id of ours, which the client hears nothing of.
            send(qemu, json.dumps({**command, "id": _WITHHELD + command["id"]}).encode(), fds)
            _refuse(client, command)
            return True
        if fault in ("hang-up-after", "kill-after"):
            # By an id of ours: the reply may be here before the client was hung up.
            send(qemu, json.dumps({**command, "id": _WITHHELD + command["id"]}).encode(), fds)
            _hang_up(client)
            return False
        send(qemu, line, fds)
        return True

    def _down(self, qemu: socket.socket, client: socket.socket) -> None:
        """From QEMU to the client, until QEMU goes."""
        pending = b""
        while data := receive(qemu)[0]:
            pending += data
            while b"\n" in pending:
                line, pending = pending.split(b"\n", 1)
                id = json.loads(line).get("id")
                if id is None or id < _WITHHELD:
                    with contextlib.suppress(OSError):
                        client.sendall(line + b"\n")
                elif self.spoil is not None and self.spoil[1] == "kill-qemu-after":
                    self._end_qemu()
        _hang_up(client)

    def _end_qemu(self) -> None:
        _hang_up(self._listener)
        self.kill_qemu()

    def _fault(self, execute: str) -> Fault | None:
        if execute == "qmp_capabilities":
            return None
        self.commands.append(execute)
        if self.spoil is not None and len(self.commands) - 1 == self.spoil[0]:
            self.spoilt = execute
            return self.spoil[1]
        return None


@contextlib.contextmanager
def taken_for_qemu(directory: pathlib.Path, *argv: str) -> Iterator[tuple[machines.Machine, Proxy]]:
    """A QEMU with ARGV, and a proxy whose clients see QEMU's process at the other end."""
    between = Proxy(directory, directory / "qmp.sock", start=False)
    with machines.qemu(directory, "-name", "vm", *argv, before_exec=between.listen) as machine:
        between.kill_qemu = machine.kill
        between.start()
        with between:
            yield machine, between


@contextlib.contextmanager
def spoiled(directory: pathlib.Path, *extra: str) -> Iterator[tuple[machines.Machine, Proxy]]:
    """A machine, and a proxy for it."""
    with (
        machines.two_disks(directory, *extra) as machine,
        Proxy(directory, machine.qmp) as between,
    ):
        yield machine, between


def receive(source: socket.socket) -> tuple[bytes, list[int]]:
    """What has come, with the descriptors that came along; nothing when the other end is gone."""
    fds = array.array("i")
    try:
        data, ancillary, _, _ = source.recvmsg(1 << 16, socket.CMSG_SPACE(16))
    except OSError:
        return b"", []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


def send(target: socket.socket, line: bytes, fds: list[int]) -> None:
    """Pass LINE on, and the descriptors FDS, which are closed here."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with contextlib.suppress(BrokenPipeError):  # it was killed: its end is told by receive
        target.sendmsg([line + b"\n"], rights)
    for fd in fds:
        socket.close(fd)


def _refuse(client: socket.socket, command: dict[str, Any]) -> None:
    error = {"class": "GenericError", "desc": "spoilt by the test"}
    client.sendall(json.dumps({"error": error, "id": command["id"]}).encode() + b"\r\n")


def _hang_up(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        return
