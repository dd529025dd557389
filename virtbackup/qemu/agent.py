# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest agent, for the instant of a start: the guest's file systems stand still and go on
(qemu_agent.c). By libvirt, or by the agent's own socket.

Frozen file systems are worse than no backup, so there is a second process that thaws them should
this one die in between; and a thaw that fails is tried again, and said aloud.
"""

import contextlib
import json
import logging
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import libvirt

from virtbackup import errors
from virtbackup.qemu import qmp

logger = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds until the agent must have answered that it is there, or thawed."""
FREEZE_TIMEOUT = 60.0
"""Seconds that a freeze may take: the guest writes out what it has."""
ATTEMPTS = 3
"""How often a thaw is tried."""
_PAUSE = 1.0
"""Seconds between two attempts."""
_SENTINEL = b"\xff"
"""What the agent's answer to a delimited sync begins with: what came before is of no use."""


class Agent(Protocol):
    """A guest's agent."""

    what: tuple[str, ...]
    """What the second process is told, to find the same agent."""

    def freeze(self) -> int:
        """Freeze all file systems; how many. Errors: errors.Error; then none is frozen, as far as
        it could be seen to."""

    def thaw(self) -> None:
        """Thaw all of them. Errors: libvirt.libvirtError."""


class LibvirtAgent:
    """The agent of a domain of libvirt's."""

    def __init__(self, connection: "libvirt.virConnect", uuid: str) -> None:
        self._connection, self._uuid = connection, uuid
        self.what: tuple[str, ...] = ("libvirt", connection.getURI(), uuid)

    def freeze(self) -> int:
        return int(self._connection.lookupByUUIDString(self._uuid).fsFreeze())

    def thaw(self) -> None:
        self._connection.lookupByUUIDString(self._uuid).fsThaw()


class SocketAgent:
    """The agent behind a unix socket of QEMU's (``-chardev socket,...,server=on``), which serves
    one client at a time."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.what: tuple[str, ...] = ("socket", path)

    def freeze(self) -> int:
        with self._connected() as connection:
            count = connection.execute("guest-fsfreeze-freeze", FREEZE_TIMEOUT)
        if type(count) is not int:
            raise _failed(f"unexpected reply to guest-fsfreeze-freeze: {qmp.shown(count)}")
        return count

    def thaw(self) -> None:
        with self._connected() as connection:
            connection.execute("guest-fsfreeze-thaw", TIMEOUT)

    @contextlib.contextmanager
    def _connected(self) -> Iterator["_Connection"]:
        """A connection that is known to be answered."""
        end = time.monotonic() + TIMEOUT
        with socket.socket(socket.AF_UNIX) as opened:
            opened.settimeout(TIMEOUT)
            try:
                opened.connect(self._path)
                connection = _Connection(opened, self._path)
                connection.sync(end)
                yield connection
            except TimeoutError as failure:
                raise errors.error(
                    libvirt.VIR_ERR_OPERATION_TIMEOUT,
                    f"guest agent '{self._path}' does not answer",
                ) from failure
            except OSError as failure:
                raise errors.system_error(
                    failure, f"cannot speak to guest agent '{self._path}'"
                ) from failure


class _Connection:
    """One JSON object a line each way, as docs/interop/qemu-ga says."""

    def __init__(self, opened: socket.socket, path: str) -> None:
        self._socket = opened
        self._path = path
        self._parser = qmp.Parser()

    def sync(self, end: float) -> None:
        """Wait until the agent answers us, whatever was said before. Errors: TimeoutError."""
        token = secrets.randbelow(1 << 31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
        self._socket.sendall(_SENTINEL + json.dumps(request).encode() + b"\n")
        seen = b""
        while _SENTINEL not in seen:
            seen = self._receive(end)
        self._parser.receive_data(seen.rpartition(_SENTINEL)[2])
        while self._answer(end) != token:
            pass

    def execute(self, command: str, timeout: float) -> object:
        """What COMMAND returns. Errors: errors.Error with the agent's words; TimeoutError."""
        self._socket.sendall(json.dumps({"execute": command}).encode() + b"\n")
        return self._answer(time.monotonic() + timeout)

    def _answer(self, end: float) -> object:
        while (line := self._parser.next_line()) is None:
            self._parser.receive_data(self._receive(end))
        try:
            message = json.loads(line)
        except ValueError as failure:
            raise _failed(f"'{self._path}' does not speak as an agent: {failure}") from failure
        match message:
            case {"return": value}:
                return value
            case {"error": {"desc": str(desc)}}:
                raise _failed(qmp.one_line(desc))
        raise _failed(f"'{self._path}' does not speak as an agent: {qmp.shown(message)}")

    def _receive(self, end: float) -> bytes:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        if data := self._socket.recv(1 << 16):
            return data
        raise ConnectionError("it hung up")


def _failed(detail: str) -> errors.Error:
    return errors.error(libvirt.VIR_ERR_OPERATION_FAILED, f"guest agent: {detail}")


# --- for the instant of a start ---


@contextlib.contextmanager
def standing_still(agent: Agent) -> Iterator[None]:
    """The guest's file systems are frozen within, and thawed whatever happens.

    Errors: those of ``Agent.freeze``, nothing being frozen then; VIR_ERR_SYSTEM_ERROR.
    """
    with _guard(agent):
        try:
            count = agent.freeze()
        except libvirt.libvirtError:
            # Some may be frozen all the same; of those that are not a thaw takes no notice.
            with contextlib.suppress(libvirt.libvirtError):
                agent.thaw()
            raise
        logger.info("agent=%s frozen=%d", agent.what[-1], count)
        try:
            yield
        finally:
            thaw(agent)


def thaw(agent: Agent, pause: Callable[[float], None] = time.sleep) -> bool:
    """Whether the file systems go on; a failure is said aloud, and tried again."""
    for attempt in range(ATTEMPTS):
        if attempt:
            pause(_PAUSE)
        try:
            agent.thaw()
        except libvirt.libvirtError as failure:
            logger.error("agent=%s the guest's file systems are still FROZEN: %s",
                         agent.what[-1], failure)  # fmt: skip
        else:
            return True
    text = (
        f"warning: the guest's file systems could not be thawed and may be FROZEN"
        f" ({' '.join(agent.what)}): thaw them, as by 'virsh domfsthaw'"
    )
    print(text, file=sys.stderr, flush=True)
    return False


_DONE = b"done\n"


@contextlib.contextmanager
def _guard(agent: Agent) -> Iterator[None]:
    """A process that thaws if this one ends within."""
    argv = [sys.executable, "-m", __name__, *agent.what]
    try:
        guard = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
    except OSError as failure:
        raise errors.system_error(failure, "cannot start what thaws the guest") from failure
    with guard:
        assert guard.stdin is not None
        assert guard.stdout is not None
        if guard.stdout.read(1) == b"":
            raise _failed("what is to thaw the guest, should we die, cannot reach its agent")
        try:
            yield
        finally:
            guard.stdin.write(_DONE)
            guard.stdin.close()


def main(argv: list[str]) -> int:
    """The second process: ready once it has said so; its input ends with ours."""
    agent: Agent
    if argv[0] == "libvirt":
        agent = LibvirtAgent(libvirt.open(argv[1]), argv[2])
    else:
        agent = SocketAgent(argv[1])
    sys.stdout.write(".")
    sys.stdout.flush()
    if sys.stdin.buffer.read() == _DONE:
        return 0
    return 0 if thaw(agent) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
